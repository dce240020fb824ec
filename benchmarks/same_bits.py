"""Record what the package computes as digests, so that a rebuild can be shown to change nothing.

    python benchmarks/same_bits.py --output before.json       (in the old checkout)
    python benchmarks/same_bits.py --output after.json --compare before.json      (in the new one)

Everything runs on the CPU with one thread: short trainings on the digits with presets that cover every label
rule, objective and weight rule; every attack, the three AutoAttack ensembles, the audit, corruptions and
transfer on three of the networks through the command line; and every attack called directly from Python. A
digest is the sha256 of weights, of metrics, of per-sample records, or of the numbers of a JSON file in their
order: names of keys and weights may change, times and versions are left out. Digests are equal only on the
same machine with the same torch version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRESETS = (
    "sglr-reference",
    "pgd-at-smooth",
    "pgd-at-sat",
    "trades-adr-awp-ema",
    "kd-swa",
    "trades",
    "mart-sglr",
    "te",
    "trades-te",
    "mlcat",
    "consistency-at",
    "pgd-at-sce",
    "n-fgsm",
    "fgsm-rs",
    "pgd-at-awp-swa",
    "pgd-at-ema",
)
SHORT = (
    "--optim.epochs",
    "5",
    "--data.train_size",
    "320",
    "--runtime.threads",
    "1",
    "--evaluate.examples",
    "0",
)
EVALUATED = {"sglr-reference": "linf", "pgd-at-smooth": "l2", "n-fgsm": "linf"}
SHARED_ATTACKS = (
    *("autoattack", "autoattack-plus", "autoattack-rand", "fgsm", "fgsm-margin", "pgd-7x3", "pgd-5-margin"),
    *("pgd-5-kl", "apgd-ce-20x2", "apgd-dlr-20", "apgd-t-10x2", "apgd-ce-5-eot3", "fab-10x2", "fab-t-20"),
    *("square-150", "fmn-30", "deepfool"),
)
NOT_COMPARED = ("seconds", "versions", "weights", "test_data", "time", "commit", "settings", "inputs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the digests")
    parser.add_argument("--compare", type=Path, help="an earlier output; exit code 1 where a digest differs")
    parser.add_argument("--folder", type=Path, help="keeps the runs; a temporary folder if not given")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        digests = {**trainings(folder), **evaluations(folder), **direct_calls()}
    settings.output.write_text(json.dumps(digests, indent=1) + "\n")
    print(f"{len(digests)} digests in {settings.output}")
    if settings.compare:
        before = json.loads(settings.compare.read_text())
        differing = [name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name)]
        print(f"{len(digests) - len(differing)} equal; differing: {', '.join(sorted(differing)) or 'none'}")
        sys.exit(bool(differing))


def trainings(folder: Path) -> dict[str, str]:
    """Weights and metrics of a short run of each preset, by name."""
    protocol = ("train", "--config", "digits_demo", *SHORT)
    command(*protocol, "--preset", "pgd-at", "--folder", str(folder / "teacher"))
    found = {}
    for preset in PRESETS:
        run = folder / preset
        teachers = ("--label.standard", str(folder / "teacher"), "--label.robust", str(folder / "teacher"))
        more = teachers if preset.startswith("kd") else ()
        command(*protocol, "--preset", preset, "--folder", str(run), *more)
        for which in ("best", "last"):
            found[f"{preset}/{which}"] = weights_digest(run / f"{which}.safetensors")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[f"{preset}/metrics"] = digest(list(numbers(rows)))
    return found


def evaluations(folder: Path) -> dict[str, str]:
    """Per-sample records and counts of every attack, audit, corruptions and transfer, by network."""
    found = {}
    for preset, norm in EVALUATED.items():
        run, threat = folder / preset, ("linf", "0.1") if norm == "linf" else ("l2", "0.8")
        attacks = [*SHARED_ATTACKS, *(["cw-linf", "cw-linf-10x2"] if norm == "linf" else ["cw-l2-3x60"])]
        command(
            *("evaluate", str(run), "--which", "last", "--norm", threat[0], "--eps", threat[1]),
            *("--attacks", *attacks, "--size", "48", "--batch_size", "20", "--curve_size", "40"),
            *("--audit", "--audit_size", "48", "--corruptions", "--transfer", str(folder / "teacher")),
        )
        for path in sorted((run / "evaluation").iterdir()):
            if path.suffix == ".parquet":
                found[f"{preset}/evaluation/{path.name}"] = parquet_digest(path)
            elif path.suffix == ".json":
                found[f"{preset}/evaluation/{path.name}"] = digest(
                    list(numbers(json.loads(path.read_text())))
                )
    return found


def direct_calls() -> dict[str, str]:
    """What every attack returns when called from Python, with its own loss and with one of the caller's."""
    import torch

    import softdefend as sd
    from softdefend import attacks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 6)
    )
    image, label = torch.rand(12, 3, 8, 8), torch.arange(12) % 6
    tried: dict[str, Any] = {
        "fgsm": attacks.FGSM(),
        "pgd": attacks.PGD(steps=7, restarts=2),
        "pgd-best": attacks.PGD(steps=5, start="gaussian", keep="best", loss="kl"),
        "apgd": attacks.APGD(steps=12, restarts=2),
        "apgd-dlr": attacks.APGD(steps=12, loss="dlr", eot=2),
        "apgd-t": attacks.TargetedAPGD(steps=9, targets=3),
        "fab-t": attacks.FAB(steps=8, targets=3),
        "fab": attacks.FAB(steps=6, targeted=False, restarts=2),
        "square": attacks.Square(200),
        "fmn": attacks.FMN(20),
        "deepfool": attacks.DeepFool(),
        "cw-l2": attacks.CWL2(rounds=3, steps=30),
        "cw-linf": attacks.CWLinf(steps=8),
        "transfer": attacks.Transfer(net, attacks.PGD(steps=4), "itself"),
    }
    found = {}
    for name, attack in tried.items():
        for norm, eps in (("linf", "8/255"), ("l2", "0.4")):
            if (name == "cw-l2") != (norm == "l2") and name.startswith("cw"):
                continue
            threat = sd.ThreatModel(norm, eps)
            generator = torch.Generator().manual_seed(5)
            result = attack(net, image, label, threat, generator=generator)
            found[f"direct/{name}/{norm}"] = tensor_digest([("result", result)])
            if name.startswith(("pgd", "fgsm", "apgd", "square", "cw-linf")):
                target = (label + 1) % 6

                def loss(logits: torch.Tensor, target: torch.Tensor = target) -> torch.Tensor:
                    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")

                generator = torch.Generator().manual_seed(5)
                result = attack(net, image, label, threat, loss=loss, generator=generator)
                found[f"direct/{name}/{norm}/loss"] = tensor_digest([("result", result)])
    return found


def command(*words: str) -> None:
    """Run ``softdefend`` with one thread; its output is shown where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "softdefend", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"softdefend {' '.join(words)}: code {done.returncode}\n{done.stdout}\n{done.stderr}")


def numbers(content: Any) -> Iterator[Any]:
    """Numbers, truth values and nulls of a JSON value in their order, but for times and versions."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name not in NOT_COMPARED:
                yield from numbers(value)
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value)
    elif not isinstance(content, str):
        yield content


def weights_digest(path: Path) -> str:
    """Of the tensors of a safetensors file in the order of their names, which may change."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return tensor_digest([("weights", file.get_tensor(name)) for name in sorted(file.keys())])


def parquet_digest(path: Path) -> str:
    """Of every column by name."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return digest({name: table[name].to_pylist() for name in sorted(table.column_names)})


def tensor_digest(tensors: list[tuple[str, Any]]) -> str:
    """Of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return total.hexdigest()


def digest(content: Any) -> str:
    """Of a plain value as JSON writes it; floats in full precision."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
