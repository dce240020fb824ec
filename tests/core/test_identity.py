from __future__ import annotations

import copy

import pytest
import yaml

from softdefend.core.identity import settings_digest
from softdefend.experiments.config import resolve
from softdefend.training.plain import plain_config


@pytest.fixture(scope="module")
def config() -> dict:
    return plain_config(resolve(["--config", "digits_demo", "--preset", "trades-sglr-awp-ema"]))


def changed(config: dict, path: str, value: object) -> dict:
    made = copy.deepcopy(config)
    *sections, name = path.split(".")
    place = made
    for section in sections:
        place = place[section]
    place[name] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("save.keep", 7),
        ("evaluate.size", 3),
        ("data.cache", "elsewhere"),
        ("data.source", "./digits"),
        ("data.noise_file", "a.npz"),
        ("init_from", "runs/a"),
        ("init_sha256", None),
        ("optim.epochs", 80.0),
        ("optim.nesterov", False),
    ],
)
def test_what_changes_no_result_of_training_is_not_in_the_digest(config, path, value) -> None:
    assert settings_digest(changed(config, path, value)) == settings_digest(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("name", "another"),
        ("threat.eps", "3/255"),
        ("optim.lr", 0.011),
        ("optim.batch_size", 127),
        ("optim.schedule.milestones", [0.5, 0.751]),
        ("data.split_seed", 1),
        ("label.class_path", "softdefend.Hard"),
        ("weight.init_args.average.init_args.decay", 0.9),
        ("init_sha256", "abc"),
        ("runtime.precision", "bf16"),
    ],
)
def test_what_may_change_a_result_is(config, path, value) -> None:
    assert settings_digest(changed(config, path, value)) != settings_digest(config)


def test_it_is_that_of_the_file(config) -> None:
    """Settings are read from a run's config.yaml and resolved again before its weights are evaluated."""
    read = yaml.safe_load(yaml.safe_dump(config))
    assert settings_digest(read) == settings_digest(config)
    assert settings_digest(plain_config(resolve(read))) == settings_digest(config)


def test_a_file_of_anything_has_one() -> None:
    content = yaml.safe_load("{1: 2, null: [2020-01-01, !!binary aGk=], a: !!set {b, c}, 2020-01-02: .nan}")
    assert len(settings_digest(content)) == 64
