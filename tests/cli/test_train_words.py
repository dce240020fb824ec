"""What `softdefend train` prints instead of training: the configuration, and help on one class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from softdefend.cli.main import main
from softdefend.experiments.config import resolve
from softdefend.training.plain import plain_config

Refused = Callable[..., str]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    said = capsys.readouterr()
    assert ended.value.code == 0
    assert said.err == ""
    return said.out


@pytest.mark.parametrize("flag", ["--print_config", "--print_config="])
def test_the_whole_configuration(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "sglr-paper", "--seed", "3"]
    content = yaml.safe_load(printed([words[0], words[1], flag, *words[2:]], capsys))
    whole = plain_config(resolve(words))
    assert {name: content[name] for name in whole} == whole
    assert content.keys() - whole.keys() == {"folder", "resume", "progress"}


def test_only_what_differs_from_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--optim.lr", "0.3", "--print_config=skip_default,skip_unset"]
    assert yaml.safe_load(printed(words, capsys))["optim"] == {"lr": 0.3}


def test_a_configuration_that_cannot_be_used_is_not_printed(refused: Refused) -> None:
    refused(["train", "--print_config", "--optim.lr", "x"], "optim.lr", "x", "a number")
    refused(["train", "--print_config", "stray"], "command line", "'stray'", "--name value")
    refused(["train", "--print_config=all"], "--print_config", "'all'", "skip_default or skip_unset")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label.help", "SGLR"], "--label.clean_weight"),
        (["--label.help=softdefend.SGLR"], "--label.clean_weight"),
        (["--weight.help", "EMA"], "--weight.decay"),
        (["--attack.help", "PGD"], "--attack.steps"),
        (["--validate.attack.help", "CWLinf"], "--validate.attack.steps"),
    ],
)
def test_help_on_a_class(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in printed(words, capsys)


def test_help_on_something_else(refused: Refused) -> None:
    refused(["train", "--label.help", "Foo"], "label", "Foo", "SGLR", "LabelRule")
    refused(["train", "--optim.help"], "optim.help", "unknown", "--label.help")
