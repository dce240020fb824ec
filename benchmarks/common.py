"""What the benchmark scripts share: arguments, result files, and studies of many runs side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softdefend.core.files import write_atomic
from softdefend.core.store import ResultStore
from softdefend.experiments.parallel import Job, Scheduler, command_line

RESULTS = Path(__file__).parent / "results"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = False, name: str = "") -> None:
    """``--data`` and ``--data-name``."""
    parser.add_argument(
        "--data", type=Path, required=required, help="Parquet folder of CIFAR-10 in hub layout"
    )
    parser.add_argument(
        "--data-name", default=name, required=required, help="what to call the data in the results"
    )


def data_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments of ``softdefend train`` for the data that were named; none where the protocol has its own."""
    return ["--data.source", str(args.data), "--data.name", args.data_name] if args.data else []


def write_json(path: Path, content: object) -> None:
    """Write a result file; a reader sees the old one or the new one."""
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def read_earlier(
    path: Path, data: str, seed: int | None = None, protocol: str | None = None
) -> dict[str, Any]:
    """What a result file holds already; empty without one.

    Raises:
        SystemExit: it holds results on other data, of another seed or protocol, which new ones must not join.
    """
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, given in (("data", data), ("seed", seed), ("protocol", protocol)):
        if name in content and given is not None and content[name] != given:
            sys.exit(
                f"{path}: holds results with {name} {content[name]!r}, not {given!r}; name another --output"
            )
    return content


def compare(folder: Path, arguments: Sequence[str]) -> None:
    """Run ``softdefend compare`` into a folder, its output beside it.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "wb") as log:
        command = command_line("compare", *arguments, "--folder", str(folder))
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def study_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments that studies of many runs share.

    Args:
        description: of the script.
        name: of the study's folder below ``runs``.
    """
    parser = make_parser(description)
    add_data_arguments(parser)
    parser.add_argument("--folder", type=Path, help=f"runs/{name}, or runs/{name}-quick")
    parser.add_argument("--devices", nargs="+", default=["auto"], help="one named twice takes two jobs")
    parser.add_argument("--seconds", type=float, help="stop what still runs after these")
    parser.add_argument("--quick", action="store_true", help="in a few epochs, on digits")
    parser.add_argument("--output", type=Path, help="below benchmarks/results; with --quick, in the folder")
    return parser


def study_arguments(parser: argparse.ArgumentParser, name: str, output: str) -> argparse.Namespace:
    """What was given, with folder and output filled in, and ``named``: what results call the data."""
    args = parser.parse_args()
    args.folder = args.folder or Path("runs", f"{name}-quick" if args.quick else name)
    args.output = args.output or (args.folder if args.quick else RESULTS) / output
    args.named = "digits" if args.quick else args.data_name
    return args


def make_scheduler(args: argparse.Namespace, *, record: bool = False) -> Scheduler:
    """What runs a study's jobs.

    Args:
        args: of the study.
        record: which jobs ended well, so that a later call does not run them again.
    """
    results = ResultStore(args.folder / "jobs") if record else None
    return Scheduler(args.devices, seconds=args.seconds, results=results)


def make_job(
    name: str, command: Callable[..., list[str]], args: argparse.Namespace, after: tuple[str, ...] = ()
) -> Job:
    """A study's job, with its log in the study's folder.

    Args:
        name: of the job.
        command: of a device and ``args``.
        args: of the study.
        after: names of jobs before it.
    """
    return Job(name, partial(command, args=args), args.folder / "logs" / f"{name}.log", after)


def exit_code(scheduler: Scheduler, unfinished: Sequence[str]) -> int:
    """Print which jobs failed and which were not finished; 1 where one failed, else 0."""
    for job, code in scheduler.failed.items():
        print(f"{job.name} ended with code {code}:", file=sys.stderr)
        print(job.log.read_text(errors="replace")[-1500:], file=sys.stderr)
    if unfinished:
        print(f"not finished: {'; '.join(unfinished)}", file=sys.stderr)
    return 1 if scheduler.failed else 0
