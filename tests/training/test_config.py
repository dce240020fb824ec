"""One list of settings: the parser, the keywords of Python and the run folder know the same."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
import yaml
from torch import nn

import softdefend as sd
from softdefend.data import DataSettings
from softdefend.experiments.config import make_parser, resolve
from softdefend.training import Recipe, TrainConfig
from softdefend.training.config import flat, flat_docstrings, flat_hints, nest
from softdefend.training.plain import import_path, plain, plain_config

ABOUT_THE_CALL = {"config", "folder", "resume", "progress", "help", "print_config", "print_completion"}
BROUGHT = {"data", "net", "evaluate"}
"""What a caller from Python has already, or does himself."""


def test_the_parser_has_a_flag_for_every_setting_and_for_nothing_else():
    named = {action.dest.partition(".")[0] for action in make_parser()._actions}
    assert named - ABOUT_THE_CALL == set(flat_hints())


def test_every_setting_says_what_it_is():
    texts = flat_docstrings()
    assert texts.keys() == flat_hints().keys()
    assert all(texts.values())
    told = " ".join(make_parser().format_help().split())
    assert all(f"--{name}" in told for name in texts)


def test_nothing_given_is_the_defaults_of_the_classes():
    assert plain_config(resolve([])) == plain_config(TrainConfig())


def test_flat_and_nested_are_two_forms_of_one_thing():
    made = TrainConfig(name="mine", seed=3, recipe=Recipe(sd.SGLR(r=0.5), attack_bn="batch"))
    again = TrainConfig(**nest(flat(made)))
    assert again == made
    assert set(flat(made)) == {own.name for own in (*fields(TrainConfig), *fields(Recipe))} - {"recipe"}
    without = replace(made, data=None, net=None, evaluate=None)
    assert flat(made).keys() - flat(without).keys() == BROUGHT


def test_what_a_folder_records_is_accepted_again(tmp_path):
    words = [
        "--config",
        "digits_demo",
        "--preset",
        "sglr-awp-ema",
        "--optim.schedule.milestones",
        "[0.2,0.9]",
    ]
    words += ["--attack.step_size", "2/255", "--label.storage", "top-3", "--seed", "5"]
    recorded = plain_config(resolve(words))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(recorded))
    for again in (resolve(recorded), resolve(["--config", str(path)])):
        assert plain_config(again) == recorded
    assert recorded["label"]["class_path"] == "softdefend.SGLR"
    assert recorded["weight"]["init_args"]["average"]["class_path"] == "softdefend.EMA"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"epochs": 3},
            r"^epochs: got an unknown setting; accepted: name, seed, augment, label, objective, ",
        ),
        ({"data_": None}, r"^data_: got an unknown setting"),
        ({"evaluate": None}, r"^evaluate: got an unknown setting"),
        ({"recipe": Recipe()}, r"^recipe: got an unknown setting"),
        ({"seed": "1"}, r"^seed: got '1'; accepted: a whole number$"),
        ({"seed": 1.5}, r"^seed: got 1\.5; accepted: a whole number$"),
        ({"seed": True}, r"^seed: got True; accepted: a whole number$"),
        ({"seed": 2**63}, r"^seed: got 9223372036854775808; accepted: a whole number from -2\^63"),
        ({"name": 3}, r"^name: got 3; accepted: text$"),
        ({"attack_bn": "sometimes"}, r"^attack_bn: got 'sometimes'; accepted: train or batch or eval$"),
        ({"optim": sd.OptimSettings}, r"^optim: got the class OptimSettings; .* as OptimSettings\(\)$"),
        ({"save": sd.Schedule()}, r"^save: got a Schedule; accepted: an object of SaveSettings$"),
        ({"attack": sd.PGD(loss="kl")}, r"^attack\.loss: got 'kl'; accepted: ce"),
        ({"attack": sd.PGD(step_size="2")}, r"^attack\.step_size: got 2; accepted: at most 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_keyword_that_is_no_setting_or_of_another_type_is_one_line(tmp_path, settings, said):
    data = torch.rand(40, 1, 6, 6), torch.arange(40) % 4
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(sd.SettingError, match=said) as refusal:
        sd.train(net, data, folder=tmp_path / "run", **settings)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_none_means_the_default(tmp_path):
    """As for a function whose arguments are None by default."""
    data = torch.rand(40, 1, 6, 6), torch.arange(40) % 4
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    optim = sd.OptimSettings(epochs=1, batch_size=8)
    record = sd.train(net, data, folder=tmp_path, optim=optim, label=None, seed=None, progress=False)
    assert record.config["label"]["class_path"] == "softdefend.Hard"
    assert (record.seed, record.config["data"]) == (0, {"source": "tensors"})
    assert not {"net", "evaluate"} & record.config.keys()


def test_no_list_of_settings_stands_in_the_signature_of_train():
    names = inspect.signature(sd.train).parameters
    assert list(names) == ["net", "data", "folder", "progress", "settings"]


def test_an_attack_of_ones_own_is_recorded_with_its_class():
    class Longer(sd.PGD):
        """A user's attack."""

    recorded = plain(Longer(steps=7))
    assert recorded["class_path"].endswith("Longer")
    assert recorded["init_args"]["steps"] == 7


def test_classes_are_recorded_by_the_path_that_users_know():
    assert import_path(sd.TRADES) == "softdefend.TRADES"
    assert import_path(DataSettings) == "softdefend.DataSettings"
    assert import_path(torch.nn.Conv2d) == "torch.nn.Conv2d"
