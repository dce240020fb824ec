"""What every label rule, objective and weight rule must do, over the whole grid.

A new rule is found through the public names; these tests say what was forgotten.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

import softdefend
from captured import HostReads, as_on_a_device, places, python_values
from killed_runs import train_whole_and_killed
from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.data import Batch, DataBundle, DataSettings, load
from softdefend.evaluation import Evaluator
from softdefend.execution.network_mode import frozen
from softdefend.experiments.catalog import combined
from softdefend.experiments.config import packaged, resolve
from softdefend.labels import Predictions, SoftTerm, Supervision
from softdefend.training import SaveSettings, ValidateSettings
from softdefend.training.config import RULES, flat_hints
from softdefend.training.plain import plain
from softdefend.training.step import Phase
from softdefend.weights import WeightRule
from tiny import K, tiny_net

pytestmark = pytest.mark.slow  # together
ROOT = Path(__file__).parent.parent
LABELS, OBJECTIVES, WEIGHTS = (RULES[kind].names() for kind in ("label", "objective", "weight"))
BOTH = [f"AWP+{name}" for name in WEIGHTS if name != "Plain" and getattr(softdefend, name)().passes == 1]
GRID = list(itertools.product(LABELS, OBJECTIVES, [*WEIGHTS, *BOTH]))
GENTLE = {
    "MLCAT": {"l_min": 1.0},
    "MultiNorm": {"l2": "0.3", "l1": "0.6"},
    "SCE": {"alpha": 1.0, "beta": 0.1},
    "TE": {"weight": 5.0},
    "TRADESTE": {"weight": 5.0},
}
"""Where published weights, meant for ten classes and many epochs, smother a small network's first steps."""
ALONE = [
    *((name, "PGDAT", "Plain") for name in LABELS),
    *(("Hard", name, "Plain") for name in OBJECTIVES if name != "PGDAT"),
    *(("Hard", "PGDAT", name) for name in (*WEIGHTS, *BOTH) if name != "Plain"),
]
"""Each rule among others that do nothing."""
CUTS = {"Plain": (2, 4, 2)}
"""Steps after which a run of nine is killed, again and again: within an epoch, across its end, and in the
last epoch, where what begins late has begun."""
LONG = 20
"""Epochs of a run in which what begins at 95% has begun in the last but one."""


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
    make_trainer, digits, monkeypatch, label, objective, weight
):
    """On digits: network, momentum, averages, memories, meters, best and metrics; then it is evaluated."""
    monkeypatch.setenv("SOFTDEFEND_COMMIT", "none")  # asking git takes as long as three steps

    def start(folder):
        return make_trainer(
            *(rule(label, 10), rule(objective), rule(weight), folder),
            net=tiny_net(10),
            data=digits,
            attack=PGD(steps=2),
            validate=ValidateSettings(attack=PGD(steps=1)),
            # The run that nobody kills needs no checkpoints within its epochs.
            save=SaveSettings(every_steps=1 if folder == "killed" else None),
        )

    whole, last = train_whole_and_killed(start, CUTS.get(weight, (4, 4)))
    assert_same(final(whole), final(last))
    evaluator = Evaluator(last.recipe.weight.prediction, last.validator.test_data, last.recipe.threat)
    evaluated = evaluator([PGD(steps=2)])
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
        validate=ValidateSettings(every=12, attack=PGD(steps=2)),
        save=SaveSettings(),
    )
    rows = []
    trainer.fit(on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    # Of all 96 images: of the 16 that are held out one more or less would decide.
    splits = (bundle.train, bundle.validation, bundle.test)
    net = trainer.recipe.weight.prediction.eval()
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
        with frozen(net, "eval"):
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_charges_for_all_that_the_label_rule_says(make_net, objective):
    """Another target, other sample weights, other terms: another gradient."""
    labels, net, views = torch.arange(20) % K, make_net().eval(), rule(objective).views
    index = torch.tensor([4, 1, 9, 16, 7, 0])
    label = labels[index]
    batch = Batch(index, torch.rand(6 * views, 1, 6, 6, generator=stream(0, "x")), label)
    logits = 3 * torch.randn(2, 6 * views, K, generator=stream(0, "z"))
    hard = torch.eye(K)[label]
    soft = 0.6 * hard + 0.1
    weight = torch.tensor([0.2, 1.8, 0.5, 1.5, 0.7, 1.3])

    def slope(supervision: Supervision) -> torch.Tensor:
        goal, seen = rule(objective), logits.clone().requires_grad_(True)
        goal.setup(RunInfo(labels, K, 10, make_net()))
        goal.advance(0.0)
        goal.inner_loss(net, batch, label.repeat(views))
        clean = None if goal.predict(net, batch.image, batch.image).clean is None else seen[1]
        goal.outer_loss(Predictions(seen[0], clean), batch, supervision).backward()
        return seen.grad

    as_given = slope(Supervision(label, hard))
    for name, supervision in {
        "target": Supervision(label, soft),
        "weight": Supervision(label, hard, weight),
        "terms": Supervision(label, hard, terms=(SoftTerm(soft, 1.0, 2.0),)),
    }.items():
        ignored = torch.allclose(slope(supervision), as_given, atol=1e-6)
        assert not ignored, f"outer_loss ignores supervision.{name}; supervision.cross_entropy minds it"


def single(make_trainer, names, folder):
    """A long run with one rule that does something, and that rule."""
    trainer = make_trainer(*map(rule, names), folder, optim=softdefend.OptimSettings(LONG, 24, lr=0.1))
    kind = next((i for i, (name, idle) in enumerate(zip(names, IDLE, strict=True)) if name != idle), 0)
    return trainer, trainer.rules[kind]


IDLE = ("Hard", "PGDAT", "Plain")


def one_step(trainer, epoch: int) -> None:
    """As the trainer makes it, over the same rows in every epoch."""
    for part in trainer.rules:
        part.advance(epoch + 0.5)
    trainer.step(rows_of(trainer), phases(trainer, epoch), epoch)
    for part in trainer.rules:
        part.after_step()


def rows_of(trainer) -> torch.Tensor:
    return trainer.train_data.plan(seed=0, epoch=0, views=trainer.recipe.objective.views)[:24]


def phases(trainer, epoch: int) -> Phase:
    return Phase(*(part.phase(epoch) for part in trainer.rules))


def leaves(state):
    """The values of nested state."""
    for value in state.values() if isinstance(state, dict) else state:
        yield from leaves(value) if isinstance(value, (dict, list, tuple)) else (value,)


@pytest.mark.parametrize("names", ALONE, ids="-".join)
def test_a_rules_state_is_plain_and_all_that_a_run_needs_to_go_on(make_trainer, names):
    """Also state that begins with the run's last epochs: another object that takes it over does the same."""
    (first, chosen), (second, other) = (single(make_trainer, names, folder) for folder in ("a", "b"))
    one_step(first, LONG - 2)
    first.recipe.weight.end_epoch(LONG - 2, first._training_images)
    one_step(first, LONG - 1)
    saved = copy.deepcopy(chosen.state_dict())
    plain_types = (torch.Tensor, int, float, str) if isinstance(chosen, WeightRule) else (torch.Tensor,)
    assert all(isinstance(value, plain_types) for value in leaves(saved))
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    for trainer in (first, second):
        one_step(trainer, LONG - 1)
        trainer.recipe.weight.end_epoch(LONG - 1, trainer._training_images)
    why = f"state_dict of {type(chosen).__name__} leaves something out, or load_state_dict does not take it"
    assert_same(first.net.state_dict(), second.net.state_dict(), why)
    assert_same(
        first.recipe.weight.prediction.state_dict(), second.recipe.weight.prediction.state_dict(), why
    )
    assert_same(chosen.state_dict(), other.state_dict(), why)


@pytest.mark.parametrize("names", ALONE, ids="-".join)
def test_a_rule_keeps_the_invariants_of_a_captured_step(make_trainer, names):
    """As far as a CPU can tell; the first step of a phase is a rehearsal and may read the host."""
    trainer, chosen = single(make_trainer, names, "run")
    outside = isinstance(chosen, WeightRule)  # its after_step and end_epoch are never captured
    epochs: dict[str, list[int]] = {}
    for epoch in range(LONG):
        epochs.setdefault(chosen.phase(epoch), []).append(epoch)
    for name, during in epochs.items():
        for part in trainer.rules:
            part.advance(float(during[0]))
        # A tensor that is held here is not freed: no other one can come to lie in its place.
        _held, state = dict(vars(chosen)), chosen.state_dict()
        values, where = python_values(chosen), places(chosen)
        for moment in (during[0] + 0.5, during[-1] + 0.25, during[-1] + 0.75):
            chosen.advance(moment)
            assert python_values(chosen) == values, f"advance writes Python values within phase {name}"
            assert places(chosen) == where, "advance makes new tensors; write into the old, as by fill_"
        live = places(state)
        assert places(chosen.state_dict()) == live, "state_dict returns copies, not the live tensors"
        with as_on_a_device(trainer):
            trainer.step._body(rows_of(trainer), phases(trainer, during[0]))
            values = python_values(chosen)
            with HostReads() as reads:
                trainer.step._body(rows_of(trainer), phases(trainer, during[0]))
        assert reads.found == [], f"a step in phase {name} reads the host, or makes tensors of Python numbers"
        assert python_values(chosen) == values, "a step writes Python values, which a captured one would not"
        assert places(chosen.state_dict()) == live, "a step makes new tensors for state; write into the old"
        if not outside:
            chosen.after_step()
            assert places(chosen) == where, "a step leaves new tensors behind; write into the old"


@pytest.mark.parametrize("name", LABELS + OBJECTIVES + WEIGHTS)
def test_every_constructor_argument_is_kept_under_its_own_name(name):
    """A run's folder records it there, and a resume with another value is refused."""
    kind = getattr(softdefend, name)
    assert plain(kind())["init_args"].keys() == inspect.signature(kind).parameters.keys()


@functools.cache
def used_in_presets() -> set[str]:
    """Names of all rules of all presets, however their files spell them."""
    presets = (combined(resolve(["--preset", preset])) for preset in packaged("preset"))
    return {part for combination in presets for name in combination for part in name.split(" + ")}


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
    assert name in used_in_presets(), f"add a preset that uses {name} to configs/presets"
    assert kind.__doc__, f"{name} has no docstring of its own"


@pytest.fixture
def example(request, tmp_path, monkeypatch):
    """The example of CONTRIBUTING.md in a module of somebody's own; afterwards it is forgotten."""
    if "Prior" in RULES["label"]:
        pytest.skip("the example lies in the package")
    module = getattr(request, "param", "rules_of_mine")
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)[1]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield module
    RULES["label"].unregister("Prior")
    sys.modules.pop(module, None)


def test_a_rule_preset_and_protocol_may_live_outside_the_package(example, tmp_path):
    """By its import path."""
    rule_of_mine = f"{{class_path: {example}.Prior, init_args: {{smoothing: 0.2}}}}"
    (tmp_path / "preset.yaml").write_text(f"name: my-prior\nlabel: {rule_of_mine}\n")
    (tmp_path / "protocol.yaml").write_text("optim: {epochs: 7}\nlabel: Smooth\n")
    files = ["--config", str(tmp_path / "protocol.yaml"), "--preset", str(tmp_path / "preset.yaml")]
    experiment = resolve(files)
    assert (experiment.name, experiment.optim.epochs) == ("my-prior", 7)
    mine = experiment.recipe.label
    assert (type(mine).__name__, mine.smoothing) == ("Prior", 0.2)
    mine.setup(RunInfo(torch.tensor([0, 0, 0, 2]), 3, 7))
    batch = Batch(torch.tensor([0]), torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    target = mine.target(batch, Predictions(torch.zeros(1, 3)), mine.phase(0))
    torch.testing.assert_close(target, torch.tensor([[0.95, 0.0, 0.05]]))


@pytest.mark.parametrize("example", ["rules_of_mine", "rules_of_another"], indirect=True)
def test_the_examples_name_means_the_class_that_is_registered(example):
    """Also where a class of the same name is left in the process, as here the second time."""
    module = importlib.import_module(example)
    for smoothing in ("0.2", "0.3"):
        label = resolve(["--label", "Prior", "--label.smoothing", smoothing]).recipe.label
        assert type(label) is module.Prior
        assert label.smoothing == float(smoothing)


BESIDE = "settings beside class_path; accepted: {class_path: NAME, init_args: {SETTING: VALUE}}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label", "{class_path: Smooth, smoothing: 0.3}"], f"label: got {BESIDE}"),
        (["--objective", "{class_path: TRADES, beta: 3}"], f"objective: got {BESIDE}"),
        (
            ["--weight", "{class_path: AWP, init_args: {average: {class_path: EMA, decay: 0.9}}}"],
            f"weight.average: got {BESIDE}",
        ),
        (["--label.class_path", "null"], "label: got null; accepted: ADR or Hard or "),
        (["--optim.epochs="], "optim.epochs: got nothing; accepted: a whole number"),
        (["--optim.lr="], "optim.lr: got nothing; accepted: a number"),
    ],
    ids=str,
)
def test_a_rule_or_setting_that_is_spelt_wrong_is_named(words, said):
    with pytest.raises(SettingError) as refusal:
        resolve(words)
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    ("folder", "base"), [("labels", "label"), ("objectives", "objective"), ("weights", "weight")]
)
def test_every_rule_that_is_written_is_public_and_has_a_test(folder, base):
    tests = "".join(path.read_text() for path in (ROOT / "tests" / folder).glob("test_*.py"))
    found = 0
    for path in (ROOT / "src" / "softdefend" / folder).glob("*.py"):
        module = importlib.import_module(f"softdefend.{folder}.{path.stem}".removesuffix(".__init__"))
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if (
                own
                and issubclass(kind, flat_hints()[base])
                and kind is not flat_hints()[base]
                and not inspect.isabstract(kind)
            ):
                found += 1
                assert name in RULES[base], f"put @{folder.upper()}.register({name!r}) above class {name}"
                assert name in softdefend.__all__, f"add {name} to softdefend/__init__.py and its __all__"
                assert re.search(rf"\b{name}\b", tests), f"write a test that uses {name} in tests/{folder}/"
    assert found >= 2
