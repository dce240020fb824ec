"""One training run, and AutoAttack, on 1, 2, 4, 8 GPUs of a machine: speed, messages, records, a kill.

    python benchmarks/scaling.py --gpus 8 --run RUN
    python benchmarks/scaling.py --gpus 8 --parts steps messages --work wrn34_10:1024 --shares
    python benchmarks/scaling.py --quick     # every part, with two processes on the CPU

- ``steps``: those of ``softdefend bench``, with the same batch on every number of GPUs;
- ``messages``: what a step's messages take by themselves (``scaling_messages.py``), and their share of it;
- ``kill``: seconds until all processes have ended once one was killed, and whether the same command then
  ends in the bits of a run that nobody disturbed;
- ``autoattack``: seconds on test images of RUN, and whether each image has the same record.

Every row is in the output once it is measured. A later call replaces rows of the same work and keeps the
rest. Ratios and shares are of rows of one machine since its start (``machine``). Seconds of AutoAttack are
without set-up; ``wall`` is all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from common import RESULTS, make_parser, write_json
from scaling_messages import WORK, Work, forwards, remembers
from softdefend.core.environment import environment
from softdefend.core.errors import SettingError
from softdefend.execution.engine import resolve_device
from softdefend.experiments.bench import base_arguments
from softdefend.experiments.config import resolve
from softdefend.experiments.parallel import command_line

Row = dict[str, Any]
PRESETS = ("pgd-at", "sglr-reference")
COUNTS = (1, 2, 4, 8)
KEYS = {
    "steps": ("net", "recipe", "batch_size", "settings", "processes"),
    "messages": ("what", "net", "batch_size", "processes", "captured"),
    "kill": ("processes",),
    "autoattack": ("weights", "precision", "n", "processes"),
}
"""The parts, in the order in which they run, and what tells their rows from each other."""
SHORT_RUN = [
    *("--config", "digits_demo", "--preset", "sglr-ema", "--data.train_size", "192"),
    *("--data.validation", "48", "--optim.epochs", "24", "--optim.batch_size", "64", "--net.width", "8"),
    *("--attack.steps", "2", "--label.start", "0.2", "--save.every_steps", "2", "--validate.test_size", "0"),
    *("--evaluate.size", "32", "--evaluate.curve_size", "0", "--evaluate.examples", "0"),
    *("--evaluate.attacks", "[fgsm]", "--runtime.deterministic", "true", "--progress", "false"),
]
"""The run that is killed."""
PATIENCE = 120
"""Seconds to wait for the end of the others."""


class FailedError(Exception):
    """A command ended by a fault, or took too long."""


class Results:
    """The output: rows by part, written after each.

    Args:
        path: of the JSON file; rows that it holds are kept.
        environment: of this call.
    """

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.machine = machine()

    def add(self, part: str, row: Row) -> None:
        """Add a row in place of that of the same work."""
        rows = self.content.setdefault(part, [])
        new = {**row, "machine": self.machine}
        rows[:] = [old for old in rows if any(old.get(key) != new.get(key) for key in KEYS[part])] + [new]
        self.content.setdefault("environment", {})[part] = self.environment
        self._write()

    def begin(self, part: str) -> None:
        """Forget what failed in this part earlier."""
        self.content.get("failed", {}).pop(part, None)

    def fail(self, part: str, count: int, why: object) -> None:
        """Note that a part failed on so many processes."""
        print(f"{part} on {count} processes: {why}", file=sys.stderr, flush=True)
        self.content.setdefault("failed", {}).setdefault(part, []).append(f"{count} processes: {why}")
        self._write()

    def _write(self) -> None:
        for part in KEYS:
            rows = self.content.get(part, [])
            rows.sort(key=lambda row: [str(row.get(key)).rjust(6) for key in KEYS[part]])
        add_ratios(self.content)
        add_shares(self.content.get("steps", []), self.content.get("messages", []))
        write_json(self.path, self.content)


def machine() -> str:
    """A name of this machine since it was started."""
    return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:8]


def add_ratios(content: dict[str, list[Row]]) -> None:
    """Put into the rows how many times as fast they are as one process, and into those of AutoAttack whether
    the records are the same bytes."""
    for part, time_of in (("steps", "ms"), ("autoattack", "seconds")):
        rows, names = content.get(part, []), [*KEYS[part][:-1], "machine"]
        one = {_key(row, names): row for row in rows if row["processes"] == 1}
        for row in rows:
            if part == "steps":
                row["images_per_second"] = round(1e3 * row["batch_size"] / row["ms"], 1)
            alone = one.get(_key(row, names))
            if alone is not None:
                row["times_one"] = round(alone[time_of] / row[time_of], 3)
            if alone is not None and part == "autoattack":
                row["same_records"] = row["records"] == alone["records"]


def add_shares(steps: list[Row], messages: list[Row]) -> None:
    """Put into the rows of steps what their messages take by themselves: milliseconds, and share of a step.
    Of a message that was timed both ways the captured figure counts."""
    found: dict[tuple[Any, ...], float] = {}
    for row in sorted(messages, key=lambda row: bool(row["captured"])):
        named = ("what", "net", "batch_size", "processes", "machine")
        found[_key(row, named)] = row["ms"]
    for row in steps:
        where = row["processes"], row["machine"]
        of_net = partial(_of, found, row["net"], None, where)
        spent = {"gradients": of_net("gradients")}
        ways = of_net("statistics forward"), of_net("statistics backward")
        if None not in ways and "per_process" not in row["settings"]:
            spent["statistics"] = forwards(row["recipe"]) * ways[0] + ways[1]
        if remembers(row["recipe"]):
            spent["memory"] = _of(found, None, row["batch_size"], where, "memory")
        known = {what: ms for what, ms in spent.items() if ms is not None}
        for what, ms in known.items():
            row[f"{what}_ms"], row[f"{what}_share"] = round(ms, 4), round(ms / row["ms"], 5)
        if known:
            row["messages_share"] = round(sum(known.values()) / row["ms"], 5)


def _of(found: dict[tuple[Any, ...], float], net: Any, batch: Any, where: tuple[Any, ...], what: str) -> Any:
    return found.get((what, net, batch, *where))


def _key(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def launch(command: Sequence[str], limit: float, look: Callable[[], None] = lambda: None) -> None:
    """Run a command, calling ``look`` meanwhile each second and once at its end.

    Raises:
        FailedError: it ended by a fault, or ran for ``limit`` seconds, when it is stopped.
    """
    process, deadline = subprocess.Popen(command), time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                look()
    finally:
        late = process.poll() is None
        if late:
            stop(process)
    look()
    if late:
        raise FailedError(f"stopped after {limit:.0f} s")
    if process.returncode:
        raise FailedError(f"exit code {process.returncode}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command, which stops the processes that it has started."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_rows(path: Path, seen: list[Row], add: Callable[[Row], None]) -> None:
    """Give what a JSON list of rows holds beyond ``seen`` to ``add``, and note it there."""
    if path.exists():
        content = json.loads(path.read_text())
        for row in (content["rows"] if isinstance(content, dict) else content)[len(seen) :]:
            seen.append(row)
            add(row)


def steps(count: int, args: argparse.Namespace, results: Results) -> None:
    """Training steps, by one ``softdefend bench`` for networks that have the same batches."""
    divisors = args.counts if args.shares and count == 1 else [1]
    batches: dict[str, set[int]] = {}
    for net, batch in args.work:
        batches.setdefault(net, set()).update(batch // divisor for divisor in {1, *divisors})
    groups: dict[tuple[int, ...], list[str]] = {}
    for net, own in batches.items():
        groups.setdefault(tuple(sorted(own)), []).append(net)
    for number, (sizes, nets) in enumerate(groups.items()):
        output = args.folder / f"steps-{count}-{number}.json"
        output.unlink(missing_ok=True)
        words = ["bench", "train", "--nets", *nets, "--presets", *PRESETS]
        words += ["--batch_sizes", *map(str, sizes), "--output", str(output)]
        words += ["--steps", str(args.steps), "--repeats", "2" if args.quick else "5"]
        words += ["--warmup", "1" if args.quick else "3"]
        words += ["--runtime.devices", str(count), "--runtime.device", args.device, *args.settings]
        add = partial(_add, results, "steps", {"settings": " ".join(args.settings), "processes": count})
        launch(command_line(*words), args.limit, partial(read_rows, output, [], add))


def _add(results: Results, part: str, where: Row, row: Row) -> None:
    results.add(part, row | where)


def messages(count: int, args: argparse.Namespace, results: Results) -> None:
    """Messages of a step by themselves."""
    if count == 1:
        return
    output = args.folder / f"messages-{count}.json"
    output.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    script = str(Path(__file__).with_name("scaling_messages.py"))
    words = [script, str(output), "--work", *(f"{net}:{batch}" for net, batch in args.work)]
    words += ["--device", args.device, "--times", "3" if args.quick else "50", "--settings", *args.settings]
    add = partial(_add, results, "messages", {"processes": count})
    launch([sys.executable, *launcher, *words], args.limit, partial(read_rows, output, [], add))


def short_run(folder: Path, count: int, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the short run in a folder, with its output in ``FOLDER.out`` and ``FOLDER.err``."""
    captured = [] if args.device == "cpu" else ["--runtime.capture", "true"]
    words = ["train", *SHORT_RUN, "--folder", str(folder), "--runtime.devices", str(count)]
    words += ["--runtime.device", args.device, *captured]
    with open(f"{folder}.out", "wb") as out, open(f"{folder}.err", "wb") as errors:
        return subprocess.Popen(command_line(*words), stdout=out, stderr=errors)


def said(folder: Path) -> str:
    """What the run in a folder wrote to its standard error."""
    return Path(f"{folder}.err").read_text(errors="replace")


def wait_for_end(run: subprocess.Popen[bytes], folder: Path, limit: float) -> None:
    """Wait until a run has ended well.

    Raises:
        FailedError: it did not.
    """
    try:
        run.wait(limit)
    except subprocess.TimeoutExpired:
        raise FailedError(f"a run had not ended after {limit:.0f} s") from None
    if run.returncode:
        raise FailedError(f"a run ended with exit code {run.returncode}: {said(folder)[-500:]}")


def kill(count: int, args: argparse.Namespace, results: Results) -> None:
    """Kill the last process of a run, and continue it; beside it the same run undisturbed."""
    if count == 1:
        return
    folders = [args.folder / f"{name}-{count}" for name in ("whole", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    runs = {folder: short_run(folder, count, args) for folder in folders}
    whole, killed = folders
    try:
        row = kill_one(runs[killed], killed, count, args.limit)
        results.add("kill", row)
        runs[killed] = short_run(killed, count, args)
        for folder, run in runs.items():
            wait_for_end(run, folder, args.limit)
    finally:
        for run in runs.values():
            if run.poll() is None:
                stop(run)
    names = ("best.safetensors", "last.safetensors", "metrics.jsonl")
    same = {name: (whole / name).read_bytes() == (killed / name).read_bytes() for name in names}
    results.add("kill", {**row, "same_bytes": same})


def kill_one(run: subprocess.Popen[bytes], folder: Path, count: int, limit: float) -> Row:
    """Kill the last of a run's processes in its fourth epoch; when all had ended, and what was said."""
    ranks = wait_for_epochs(run, folder, 3, count, limit)
    os.kill(ranks[count - 1], signal.SIGKILL)
    started = time.monotonic()
    while run.poll() is None or any(map(is_alive, ranks.values())):
        time.sleep(0.01)
        if time.monotonic() - started > PATIENCE:
            raise FailedError(f"others still ran {PATIENCE} s after the kill")
    spent = time.monotonic() - started
    lines = [line for line in said(folder).splitlines() if line.strip()]
    row: Row = {"processes": count, "killed": count - 1, "seconds": round(spent, 2)}
    return row | {"exit": run.returncode, "lines": len(lines), "said": lines[:4]}


def wait_for_epochs(
    run: subprocess.Popen[bytes], folder: Path, epochs: int, count: int, limit: float
) -> dict[int, int]:
    """Wait until a run has come so far; its processes by rank."""
    deadline, metrics = time.monotonic() + limit, folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < epochs:
        if run.poll() is not None:
            raise FailedError(f"a run ended with exit code {run.returncode}: {said(folder)[-500:]}")
        if time.monotonic() > deadline:
            raise FailedError(f"a run had not come to epoch {epochs} after {limit:.0f} s")
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = {rank: int(child) for child in children if (rank := rank_of(int(child))) is not None}
    if sorted(ranks) != list(range(count)):
        raise FailedError(f"found processes of rank {sorted(ranks)} among {count}")
    return ranks


def is_alive(process: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_of(process: int) -> int | None:
    """The rank that a process was started with; None of another kind of process."""
    for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == b"RANK":
            return int(value)
    return None


def autoattack(count: int, args: argparse.Namespace, results: Results) -> None:
    """AutoAttack on test images with a run's best weights, in a copy of its folder."""
    run = args.run or short_run_folder(args)
    copied = args.folder / f"autoattack-{args.precision}-{args.n}-{count}"
    shutil.rmtree(copied, ignore_errors=True)
    copied.mkdir()
    for name in ("config.yaml", "best.safetensors"):
        shutil.copy(run / name, copied / name)
    words = ["evaluate", str(copied), "--which", "best", "--attacks", "autoattack"]
    words += ["--size", args.n, "--batch_size", "4" if args.quick else "250", "--precision", args.precision]
    words += ["--curve_size", "0", "--examples", "0", "--devices", str(count), "--device", args.device]
    started = time.perf_counter()
    launch(command_line(*words), args.limit)
    wall = time.perf_counter() - started
    found = json.loads((copied / "evaluation" / "best.json").read_text())
    own, table = found["attacks"]["autoattack"], copied / "evaluation" / "best.parquet"
    row = {
        "weights": digest(run / "best.safetensors"),
        "data": found["name_of_data"],
        "precision": args.precision,
        "n": own["n"],
        "processes": count,
        "robust": own["count"],
        "seconds": round(own["seconds"], 2),
        "wall": round(wall, 2),
        "microbatch": found["microbatch"],
        "records": digest(table),
    }
    one = args.folder / f"autoattack-{args.precision}-{args.n}-1" / "evaluation" / "best.parquet"
    if count > 1 and one.exists():
        row |= differences(one, table)
    results.add("autoattack", row)


def short_run_folder(args: argparse.Namespace) -> Path:
    """Where part kill leaves the run that nobody disturbed."""
    return Path(args.folder, f"whole-{args.counts[-1]}")


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def differences(one: Path, other: Path) -> Row:
    """Images whose records differ in anything, and in the verdict."""
    tables = [pq.read_table(path) for path in (one, other)]
    rows, others = (table.to_pylist() for table in tables)
    verdicts = (tables[0]["autoattack/robust"].to_pylist(), tables[1]["autoattack/robust"].to_pylist())
    return {
        "other_records": sum(a != b for a, b in zip(rows, others, strict=True)),
        "other_verdicts": sum(a != b for a, b in zip(*verdicts, strict=True)),
    }


def make_arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=KEYS, default=list(KEYS))
    parser.add_argument("--gpus", type=int, default=2, help="the largest number of processes")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of processes, in place of --gpus")
    parser.add_argument("--work", nargs="+", type=Work.parse, metavar="NET:BATCH", help=" ".join(WORK))
    parser.add_argument("--shares", action="store_true", help="one process also takes each one's share")
    parser.add_argument("--steps", type=int, default=5, help="in each of five measurements")
    parser.add_argument("--run", type=Path, help="what to attack; the short run of part kill if not given")
    parser.add_argument("--n", default="all", help="test images to attack")
    parser.add_argument("--precision", choices=("exact", "strict", "fast"), default="exact")
    parser.add_argument("--limit", type=float, default=400, help="seconds for one command")
    parser.add_argument("--quick", action="store_true", help="a toy on the CPU: shows that it runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where runs are kept; nowhere if not given")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    further = "all that follows: words of softdefend train, for steps"
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help=further)
    return parser


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was given, with what was not filled in."""
    parser = make_arguments()
    args = parser.parse_args(words)
    if args.quick:
        args.device, args.steps, args.n = "cpu", 1, "8" if args.n == "all" else args.n
    args.work = args.work or [Work.parse(one) for one in (("small_cnn:16",) if args.quick else WORK)]
    args.counts = sorted(set(args.counts or [count for count in COUNTS if count <= args.gpus]))
    if not args.counts or args.counts[0] < 1:
        parser.error("--gpus and --counts take whole numbers >= 1")
    if args.limit <= 0 or args.steps < 1:
        parser.error("--limit takes seconds > 0, --steps a whole number >= 1")
    if args.n != "all" and not (args.n.isdecimal() and int(args.n) > 0):
        parser.error(f"--n: {args.n}; accepted: all, or a whole number >= 1")
    made = "kill" in args.parts and args.counts[-1] > 1
    there = args.run or (args.folder and short_run_folder(args))
    if "autoattack" in args.parts and not made and not (there and (there / "best.safetensors").is_file()):
        parser.error("part autoattack needs --run with a trained run, or part kill on several processes")
    uneven = [f"{net}:{batch}" for net, batch in args.work if any(batch % count for count in args.counts)]
    if uneven:
        parser.error(f"--work: {', '.join(uneven)} cannot be shared by each of {args.counts}")
    try:
        args.device = resolve_device(args.device).type
        resolve(base_arguments(args.settings))
    except SettingError as error:
        parser.error(str(error))
    return args


def measure(args: argparse.Namespace, results: Results) -> int:
    """All parts; 1 where one failed, else 0."""
    code = 0
    for part, function in zip(KEYS, (steps, messages, kill, autoattack), strict=True):
        if part not in args.parts:
            continue
        results.begin(part)
        for count in args.counts:
            try:
                function(count, args, results)
            except FailedError as error:
                results.fail(part, count, error)
                code = 1
    return code


def main() -> int:
    args = read_arguments()
    # What runs is then stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results(args.output, environment(resolve_device(args.device)))
    with tempfile.TemporaryDirectory() as place:
        args.folder = args.folder or Path(place)
        args.folder.mkdir(parents=True, exist_ok=True)
        return measure(args, results)


if __name__ == "__main__":
    sys.exit(main())
