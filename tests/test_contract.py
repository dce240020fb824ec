"""What every label rule, objective and weight rule must do, over the whole grid.

A new rule is found through the public names; these tests say what was forgotten.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

import softdefend
from softdefend.attacks import PGD
from softdefend.complaints import RULES, rules
from softdefend.config import packaged, resolve
from softdefend.data import Batch, DataBundle, DataSettings, load
from softdefend.evaluation import Evaluator
from softdefend.labels import Predictions
from softdefend.modes import attacked
from softdefend.rng import stream
from softdefend.rule import RunInfo
from tiny import K, Killed, tiny_net

ROOT = Path(__file__).parent.parent
LABELS, OBJECTIVES, WEIGHTS = rules("label"), rules("objective"), rules("weight")
BOTH = [f"AWP+{name}" for name in WEIGHTS if name not in ("AWP", "Plain")]
GRID = list(itertools.product(LABELS, OBJECTIVES, [*WEIGHTS, *BOTH]))
GENTLE = {
    "MLCAT": {"l_min": 1.0},
    "SCE": {"alpha": 1.0, "beta": 0.1},
    "TE": {"weight": 5.0},
    "TRADESTE": {"weight": 5.0},
}
"""Where published weights, meant for ten classes and many epochs, smother a small network's first steps."""
CUTS = {"Plain": (2, 4, 3)}
"""Steps after which a run is killed, again and again: within an epoch, across its end, and once more."""


def rule(name: str, classes: int = K):
    """A rule by its name, its other settings as they are by default; AWP+EMA holds EMA."""
    outer, _, inner = name.partition("+")
    kind = getattr(softdefend, outer)
    if inner:
        return kind(average=rule(inner))
    if name == "KD":
        return kind(standard=tiny_net(classes, seed=1), robust=tiny_net(classes, seed=2))
    return kind()


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    """48 training images of scikit-learn's digits."""
    return load(DataSettings("digits", train_size=48, validation=20, test_fraction=0.02))


def assert_same(first, second, path=""):
    """Bit equality of nested state."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def final(trainer) -> dict:
    return trainer.folder.checkpoints.load()


@pytest.mark.parametrize(("label", "objective", "weight"), GRID)
def test_a_run_cut_anywhere_and_continued_ends_in_the_same_bits(
    make_trainer, digits, label, objective, weight
):
    """On digits: network, momentum, averages, memories, meters, best and metrics; then it is evaluated."""

    def start(folder):
        return make_trainer(
            rule(label, 10), rule(objective), rule(weight), folder, net=tiny_net(10), data=digits
        )

    whole = start("whole")
    whole.fit()
    died = 0
    for cut in CUTS.get(weight, (4,)):
        part = start("cut")
        made = itertools.count(1)
        body = part.step._body

        def stop(plan, phase, *more, made=made, cut=cut, body=body):
            if next(made) > cut:
                raise Killed
            body(plan, phase, *more)

        part.step._body = stop
        with contextlib.suppress(Killed):
            part.fit()
            died -= 1
        died += 1
        part.folder.close()
    assert died > 0
    last = start("cut")
    last.fit()
    assert_same(final(whole), final(last))
    for name in ("metrics.jsonl", "best.safetensors", "last.safetensors"):
        assert (whole.folder.path / name).read_bytes() == (last.folder.path / name).read_bytes(), name
    evaluated = Evaluator(last.weight.prediction, last.test_data, last.recipe.threat)([PGD(steps=2)])
    assert 0 <= evaluated.robust("pgd-2").rate <= evaluated.clean.rate <= 1


@pytest.mark.parametrize(("label", "objective"), list(itertools.product(LABELS, OBJECTIVES)))
def test_training_learns_and_reports_what_it_measured(make_trainer, bundle, label, objective):
    """Every combination beats guessing on a problem that a linear network solves."""
    # Guessing is 0.25. Teachers that know nothing, or as little as the network, hold it back.
    held_back = label in ("ADR", "KD")
    epochs = 24 if held_back else 12
    trainer = make_trainer(
        rule(label),
        getattr(softdefend, objective)(**GENTLE.get(objective, {})),
        optim=softdefend.OptimSettings(epochs=epochs, batch_size=12, lr=0.1),
    )
    rows = []
    trainer.fit(on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    # Of all 96 images: of the 16 that are held out one more or less would decide.
    splits = (bundle.train, bundle.validation, bundle.test)
    net = trainer.weight.prediction.eval()
    with torch.no_grad():
        right = [
            net(part.images.float() / (255 if part.images.dtype == torch.uint8 else 1)).argmax(1)
            == part.labels
            for part in splits
        ]
    accuracy = float(torch.cat(right).double().mean())
    assert accuracy > (0.4 if held_back else 0.5)
    assert all(0 <= row["train_robust"] <= 1 and row["target_entropy"] >= 0 for row in rows)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("label", LABELS)
def test_targets_are_distributions_and_gradients_flow_where_they_should(make_net, label, objective):
    labels = torch.arange(20) % K
    index = torch.tensor([4, 1, 9, 16, 7, 0])
    views = rule(objective).views
    image = torch.rand(6 * views, 1, 6, 6, generator=stream(0, "x"))
    batch, first = Batch(index, image, labels[index]), Batch(index, image[:6], labels[index])
    adversarial = image + 0.01
    epochs_of_phases = {}
    for epoch in range(10):
        chosen, goal, net = rule(label), rule(objective), make_net().train()
        for part in (chosen, goal):
            part.setup(RunInfo(labels, K, 10, net))
        epochs_of_phases[chosen.phase(epoch), goal.phase(epoch)] = epoch
    for epoch in epochs_of_phases.values():
        chosen, goal, net = rule(label), rule(objective), make_net().train()
        for part in (chosen, goal):
            part.setup(RunInfo(labels, K, 10, net))
            part.advance(epoch + 0.5)
        phase = chosen.phase(epoch)
        away_from = chosen.attack_target(first, phase)
        assert away_from.shape in ((6,), (6, K))
        assert not away_from.requires_grad
        away_from = away_from.repeat(views, *[1] * (away_from.ndim - 1))
        with attacked(net, "eval"):
            loss = goal.inner_loss(net, batch, away_from)(net(adversarial))
            assert loss.shape == (6 * views,)
        assert all(p.grad is None for p in net.parameters())
        seen = goal.predict(net, image, adversarial)
        clean = seen.clean if seen.clean is not None else net(image)
        everything = Predictions(seen.adversarial, clean).detach().first(6)
        supervision = chosen.supervise(first, adversarial[:6], everything, phase)
        target = supervision.target
        assert target.shape == (6, K)
        assert not target.requires_grad
        assert (target >= 0).all()
        torch.testing.assert_close(target.sum(1), torch.ones(6))
        if supervision.weight is not None:
            assert supervision.weight.mean().item() == pytest.approx(1, abs=1e-5)
        total = goal.outer_loss(seen, batch, supervision)
        assert total.shape == ()
        total.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0
            for p in net.parameters()
        )


@pytest.mark.parametrize("label", LABELS)
def test_a_rules_state_is_plain_tensors_and_survives_a_round_trip(label, make_net):
    labels = torch.arange(20) % K
    first, second = rule(label), rule(label)
    for chosen in (first, second):
        chosen.setup(RunInfo(labels, K, 4, make_net()))
    index = torch.arange(20)
    draw = torch.randn(2, 20, K, generator=stream(0, "z"))
    batch = Batch(index, torch.zeros(20, 1, 6, 6), labels)
    first.target(batch, Predictions(draw[0], draw[1]), first.phase(3))
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    second.load_state_dict(saved)
    assert_same(second.state_dict(), saved)
    ahead = [
        chosen.target(batch, Predictions(draw[1], draw[0]), chosen.phase(3)) for chosen in (first, second)
    ]
    assert torch.equal(*ahead)


@pytest.mark.parametrize("name", LABELS + OBJECTIVES + WEIGHTS)
def test_every_rule_has_a_card_a_preset_and_a_documented_source(name):
    kind = getattr(softdefend, name)
    card = ROOT / "docs" / "methods" / f"{name.lower()}.md"
    assert card.is_file(), f"write {card.relative_to(ROOT)}"
    text = card.read_text()
    for heading in ("## Idea", "## Equations", "## Settings", "## Differences", "## Cost", "## Source"):
        assert heading in text, f"{card.name} lacks '{heading}'"
    for setting in inspect.signature(kind).parameters:
        if setting not in ("args", "kwargs"):
            assert f"`{setting}`" in text, f"{card.name} does not explain {setting}"
    mentions = [
        path.stem
        for path in packaged("preset").values()
        if re.search(rf"class_path: {name}\b", path.read_text())
    ]
    assert mentions, f"add a preset that uses {name} to configs/presets"
    assert kind.__doc__, f"{name} has no docstring of its own"


@pytest.mark.parametrize("preset", packaged("preset"))
@pytest.mark.parametrize("protocol", packaged("config"))
def test_every_preset_resolves_with_every_protocol(protocol, preset):
    experiment = resolve(["--config", protocol, "--preset", preset])
    assert experiment.name == preset


@pytest.mark.parametrize(
    ("room", "base"), [("labels", "label"), ("objectives", "objective"), ("weights", "weight")]
)
def test_every_rule_that_is_written_is_public_and_has_a_test(room, base):
    tests = "".join(path.read_text() for path in (ROOT / "tests" / room).glob("test_*.py"))
    found = 0
    for path in (ROOT / "src" / "softdefend" / room).glob("*.py"):
        module = importlib.import_module(f"softdefend.{room}.{path.stem}".removesuffix(".__init__"))
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if (
                own
                and issubclass(kind, RULES[base])
                and kind is not RULES[base]
                and not inspect.isabstract(kind)
            ):
                found += 1
                assert name in softdefend.__all__, f"add {name} to softdefend/__init__.py and its __all__"
                assert re.search(rf"\b{name}\b", tests), f"write a test that uses {name} in tests/{room}/"
    assert found >= 2
