import subprocess
import sys

import pytest

from softdefend.core.errors import SettingError
from softdefend.execution.engine import RuntimeSettings, count_processes, resolve_device
from softdefend.execution.launched import Place, place_of_this_process

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_what_has_started_the_processes_says_where_each_stands(environment):
    place = place_of_this_process(environment)
    assert place == Place(rank=5, size=8, local_rank=1, local_size=4)
    assert place.nodes == 2


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script without srun
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2"},
    ],
    ids=["nothing", "sbatch", "one", "another program's"],
)
def test_a_process_may_be_alone(environment):
    assert place_of_this_process(environment) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "7"}, "processes"),
        ({"LOCAL_RANK": "4"}, "processes"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(change, named):
    with pytest.raises(SettingError) as refusal:
        place_of_this_process({**TORCHRUN, **change})
    assert refusal.value.setting == named


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert str(resolve_device("auto")) == str(resolve_device("cuda")) == "cuda:1"
    assert str(resolve_device("cpu")) == "cpu"
    for devices in (1, 4, 8, "auto"):
        assert count_processes("auto", devices) == 8
    with pytest.raises(SettingError, match="cuda:1 for 8 processes"):
        resolve_device("cuda:1")
    with pytest.raises(SettingError, match=r"runtime\.devices: got 2 where 8 processes were started"):
        count_processes("auto", 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SettingError, match="4 processes on a machine where each sees 1 GPU"):
        resolve_device("cuda")


def test_auto_is_a_process_for_each_gpu(monkeypatch):
    for gpus, expected in ((0, 1), (1, 1), (3, 3)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert count_processes("auto", "auto") == expected
        assert count_processes("cpu", "auto") == 1
        assert count_processes("cpu", 5) == 5
    assert RuntimeSettings().devices == 1


def test_one_process_computes_in_bf16_without_the_distributed_library():
    """Its import is slow."""
    code = """
import sys, torch
from softdefend.execution.engine import Engine, RuntimeSettings
with Engine(RuntimeSettings(device="cpu", precision="bf16")).autocast():
    print(torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype, "lightning_fabric" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.bfloat16", "False"]
