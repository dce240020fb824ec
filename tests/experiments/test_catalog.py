"""The catalog of methods: its costs against counted forwards and gradients, its table against the docs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import softdefend
from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.experiments.catalog import PUBLISHED, STEPS, Method, catalog, table, units
from softdefend.experiments.config import packaged, resolve
from softdefend.training.config import RULES
from softdefend.training.step import Phase
from tiny import K

DOC = Path(__file__).parent.parent.parent / "docs" / "methods.md"


@pytest.fixture(scope="module")
def methods() -> list[Method]:
    return catalog()


def test_a_rule_without_defaults_is_named() -> None:
    class Demanding(softdefend.Hard):
        def __init__(self, share: float) -> None:
            self.share = share

    RULES["label"].register("Demanding")(Demanding)
    try:
        with pytest.raises(SettingError, match=r"^Demanding: got .*'share'.*; accepted: a default for every"):
            catalog()
    finally:
        RULES["label"].unregister("Demanding")


class Tolls(nn.Module):
    """A network that keeps count: a forward is one unit, so is the gradient for the images, so is that for
    the weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.units, self.size = net, 0.0, 1

    def forward(self, image: Tensor) -> Tensor:
        share = len(image) / self.size
        self.units += share
        logits: Tensor = self.net(image)
        if torch.is_grad_enabled() and (image.requires_grad or logits.requires_grad):
            self.units += share * (2 if next(self.net.parameters()).requires_grad else 1)
        return logits


@pytest.mark.parametrize("preset", sorted(packaged("preset")))
def test_costs_are_what_a_step_in_the_last_epoch_counts(preset, make_net, make_trainer):
    experiment = resolve(["--preset", preset])
    recipe = experiment.recipe
    if isinstance(recipe.label, softdefend.KD):
        recipe.label.standard, recipe.label.robust = Tolls(make_net(K)), Tolls(make_net(K, seed=1))
    net = Tolls(make_net())
    trainer = make_trainer(*recipe.rules, net=net, attack=replace(recipe.attack, steps=STEPS))
    last = trainer.optim.epochs - 1
    for rule in trainer.rules:
        rule.advance(last + 0.5)
    others = [module for module in trained_elsewhere(recipe.label) if isinstance(module, Tolls)]
    columns = [torch.arange(8)[:, None], torch.zeros(8, 3 * recipe.objective.views, dtype=torch.int64)]
    phase = Phase(*(rule.phase(last) for rule in trainer.rules))
    trainer.step(torch.cat(columns, dim=1), phase, key=1)  # teachers look at two images once
    for module in (net, *others):
        module.size, module.units = 8, 0.0
    trainer.step(torch.cat(columns, dim=1), phase, key=2)
    counted = net.units + sum(module.units for module in others)
    assert counted == pytest.approx(units(*recipe.rules))


def trained_elsewhere(label: object) -> list[nn.Module]:
    """Networks that a label rule holds: teachers."""
    return [value for value in vars(label).values() if isinstance(value, nn.Module)]


def test_every_public_rule_and_preset_is_listed_with_what_it_is(methods):
    names = [method.name for method in methods if method.kind != "preset"]
    assert names == [name for kind in ("label", "objective", "weight") for name in RULES[kind].names()]
    assert {m.name for m in methods if m.kind == "preset"} == set(packaged("preset"))
    for method in methods:
        assert len(method.summary) > 10, method
        assert method.source or method.kind == "preset" or method.name in ("Hard", "Plain"), method.name


def test_published_combinations_name_rules_that_exist_and_ship_as_presets(methods):
    shipped = {method.combination for method in methods if method.kind == "preset"}
    known = set(softdefend.__all__)
    for combination in PUBLISHED:
        assert {part for name in combination for part in name.split(" + ")} <= known, combination
    missing = set(PUBLISHED) - shipped
    assert not missing, f"no preset for {sorted(missing)}"


def test_rules_that_remember_single_images_are_refused_where_images_are_mixed(methods, make_net):
    """A rule remembers single images where its state has a row for each of them."""
    refused = {method.name for method in methods if method.refusal}
    assert refused >= {"SAT", "SGLR", "Consistency", "MART", "TE", "TRADESTE"}
    images = 23  # no size that a network's tensors have
    for name in (name for rules in RULES.values() for name in rules.names()):
        chosen = getattr(softdefend, name)(**({"robust": make_net()} if name == "KD" else {}))
        chosen.setup(RunInfo(torch.arange(images) % K, K, 10, make_net()))
        kept = [value for value in chosen.state_dict().values() if isinstance(value, Tensor) and value.ndim]
        if any(len(value) == images for value in kept):
            assert name in refused, f"{name} remembers images: say mixes = False"
            assert chosen.remembers, f"{name} remembers images: say remembers = True"


def test_the_table_in_the_docs_is_the_generated_one(methods):
    made = table(methods, markdown=True) + "\n"
    assert made == DOC.read_text(), "run: softdefend methods --markdown true > docs/methods.md"


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head(methods):
    for block in table(methods, markdown=True).split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
