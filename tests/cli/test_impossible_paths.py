"""Paths that are longer than the system allows, and links that lead to themselves, in one line each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cli_tools import SMALL
from torch import nn

import softdefend as sd
from softdefend.core.errors import SettingError

Refused = Callable[..., str]
LONG = "x" * 5000
OUTSIDE = ["--model", "small_cnn", "--net.width", "4", "--weights", "RUN/best.safetensors"]

WORDS = {
    "train in": (["train", *SMALL, "--folder", "PATH"], "folder"),
    "train by": (["train", *SMALL, "--config", "PATH"], "--config"),
    "train a preset": (["train", *SMALL, "--preset", "PATH"], "--preset"),
    "train from": (["train", *SMALL, "--folder", "NEW", "--init_from", "PATH"], "init_from"),
    "continue from": (["train", *SMALL, "--folder", "RUN", "--resume", "PATH"], "resume"),
    "evaluate": (["evaluate", "PATH"], "run"),
    "evaluate into": (
        ["evaluate", *OUTSIDE, "--weights", "RUN/best.safetensors", "--output", "PATH"],
        "--output",
    ),
    "transfer from": (["evaluate", "RUN", "--transfer", "PATH"], "--transfer"),
    "log to": (["evaluate", "RUN", "--which", "best", "--log", "PATH/log"], "--log"),
    "compare": (["compare", "--presets", "PATH", *SMALL], "--preset"),
    "distill from": (["distill", "--standard", "PATH", "--folder", "NEW", *SMALL], "--standard"),
    "reproduce with": (["reproduce", "noise", "--folder", "NEW", "--human", "PATH"], "--human"),
    "analyze": (["analyze", "PATH", "--output", "NEW"], "run folder"),
    "analyze into": (["analyze", "RUN", "--output", "PATH", "--parts", "overfitting"], "--output"),
    "audit labels": (["labels", "audit", "PATH", "--output", "NEW"], "run folder"),
    "report": (["report", "PATH"], "run folder"),
}


@pytest.mark.parametrize("kind", ["long", "loop"])
@pytest.mark.parametrize(("words", "setting"), WORDS.values(), ids=WORDS.keys())
def test_a_path_that_cannot_be_is_one_line(words, setting, kind, finished, refused: Refused, tmp_path):
    path = LONG
    if kind == "loop":
        (tmp_path / "loop").symlink_to("loop")
        path = str(tmp_path / "loop")
    filled = {"PATH": path, "NEW": str(tmp_path / "new"), "RUN": str(finished)}

    def fill(word: str) -> str:
        for name, value in filled.items():
            word = word.replace(name, value)
        return word

    refused(list(map(fill, words)), fill(setting), "")


def test_python_refuses_it_too():
    data = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(SettingError, match=r"\Afolder: got x+ \(File name too long\)"):
        sd.train(net, data, folder=LONG, optim=sd.OptimSettings(batch_size=8), progress=False)
