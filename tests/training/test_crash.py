"""Twenty SIGKILLs at random moments of one run; the bits at the end do not know of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import processes
from softdefend.training import checkpoint

KILLS = 20

# Every training is forked, a process of its own that dies by a real SIGKILL, and the twenty restarts do not
# pay for twenty imports of torch. A kill waits until the run has come a given way, not for a time: a fast
# machine must not finish before the last kill, nor a slow one fail to get anywhere.
NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
from softdefend.cli.main import main
from softdefend.experiments.config import resolve

arguments, kills, seed, epochs = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(seed)
metrics = Path(arguments[-1]) / "metrics.jsonl"
resolve(arguments[1:])  # which makes the parser, once for all

def start():
    pid = os.fork()
    if pid == 0:
        os._exit(main(arguments))
    return pid

def rows():
    return metrics.read_bytes().count(b"\\n") if metrics.exists() else 0

killed = 0
for target in sorted(draw.randrange(epochs // 2) for _ in range(kills)):
    pid = start()
    time.sleep(draw.uniform(0, 0.05))
    while rows() < target and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
print("killed", killed, file=sys.stderr)
status = os.waitpid(start(), 0)[1]
sys.exit(os.waitstatus_to_exitcode(status))
"""

EPOCHS = 60
RUN = f"""--config digits_demo --preset sglr-ema --data.train_size 96 --data.validation 48
--optim.epochs {EPOCHS} --optim.batch_size 32 --net.width 8 --attack.steps 2 --label.start 0.2
--validate.test_size 0 --save.every_steps 2 --evaluate.size 32 --evaluate.curve_size 0
--runtime.threads 1 --progress false"""


def nursery(script: Path, folder: Path, kills: int) -> processes.Program:
    arguments = json.dumps(["train", *RUN.split(), "--folder", str(folder)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return processes.Program([str(script), arguments, str(kills), "7", str(EPOCHS)], environment)


def assert_same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        for pair in zip(first, second, strict=True):
            assert_same(*pair)
    else:
        assert first == second


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path):
    script = tmp_path / "nursery.py"
    script.write_text(NURSERY)
    started = [nursery(script, tmp_path / name, kills) for name, kills in (("whole", 0), ("killed", KILLS))]
    for code, errors in (ends := processes.ended(started, 500)):
        assert code == 0, errors
    assert f"killed {KILLS}" in ends[1][1], "the run ended before all kills: make it longer"
    first, second = (
        checkpoint.load(checkpoint.CheckpointFolder(tmp_path / name / "checkpoints").paths()[-1])
        for name in ("whole", "killed")
    )
    assert_same(first, second)
    for name in ("metrics.jsonl", "best.safetensors", "last.safetensors", "evaluation/last.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == EPOCHS
