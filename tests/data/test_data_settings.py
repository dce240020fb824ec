from __future__ import annotations

import re
from dataclasses import fields

import pytest
from jsonargparse import ArgumentParser

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--data", type=DataSettings, default=DataSettings())
    return made


def test_the_command_line_sets_every_field_and_explains_it() -> None:
    given = parser().parse_args(["--data.noise=symmetric", "--data.noise_rate=0.4", "--data.train_size=600"])
    settings = parser().instantiate(given).data
    assert settings == DataSettings(noise="symmetric", noise_rate=0.4, train_size=600)
    helped = parser().format_help()
    for field in fields(DataSettings):
        start = helped.index(f"--data.{field.name} ")
        words = helped[start:].split("(type:")[0].split()
        assert len(words) >= 6, f"{field.name} has no help text"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": ""}, "data.source: got nothing"),
        ({"validation": 0}, "data.validation: got 0"),
        ({"train_size": 0}, "data.train_size: got 0"),
        ({"test_fraction": 0.0}, "data.test_fraction: got 0.0"),
        ({"test_fraction": float("nan")}, "data.test_fraction: got nan"),
        ({"noise": "pink"}, "data.noise: got pink"),
        ({"channels": "red"}, "data.channels: got red; accepted: first or gray or rgb"),
        ({"sixteen_bit": "clip"}, "data.sixteen_bit: got clip; accepted: refuse or scale"),
        ({"noise": "symmetric", "noise_rate": 1.0}, "data.noise_rate: got 1.0; accepted: a value in [0, 1)"),
        ({"noise": "symmetric", "noise_rate": -0.1}, "data.noise_rate: got -0.1"),
        ({"noise": "symmetric", "noise_rate": float("nan")}, "data.noise_rate: got nan"),
        ({"noise_rate": 0.4}, "data.noise_rate: got 0.4 with noise none"),
        ({"noise": "file"}, "data.noise_file: got None"),
        ({"noise_file": "labels.npz"}, "data.noise_file: got labels.npz with noise none"),
        ({"noise": "symmetric", "noise_key": "worse"}, "data.noise_key: got worse with noise symmetric"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        DataSettings(**given)  # type: ignore[arg-type]
