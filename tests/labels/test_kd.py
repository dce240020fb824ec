"""KD against its closed form in numpy, by finite differences, and over whole runs."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import AugmentSettings, Resident, Split
from softdefend.labels import KD, Predictions
from softdefend.labels.base import SoftTerm
from softdefend.labels.kd import mixture
from softdefend.labels.teachers import weights_digest
from softdefend.objectives import PGDAT, TRADES
from softdefend.training import Engine, OptimSettings, Recipe, RuntimeSettings
from softdefend.training.optim import make_optimizer
from softdefend.training.step import Phase, TrainStep
from tiny import K, about, batch_of

PHASE = Phase("fixed", "fixed", "fixed")
PLAN = torch.cat([torch.arange(8)[:, None], torch.zeros(8, 3, dtype=torch.long)], dim=1)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(6, 1, 6, 6, generator=stream(seed, "images"))


def teacher(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, K))


def started(**settings) -> KD:
    rule = KD(**{"standard": teacher(1), "robust": teacher(2), **settings})
    rule.setup(about(teacher(0)))
    return rule


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def predicts(net: nn.Module, image: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).double().eval()(image.double()).numpy()


def naive(f, y, standard, robust, weights=(0.3, 0.1, 0.6), temperature=2.0) -> float:
    """The authors' loss of logits [b, k], as a mean over the batch."""

    def soft_cross_entropy(target):
        return -(target * np.log(softmax(f / temperature))).sum(axis=1).mean() * temperature**2

    hard = -np.log(softmax(f)[np.arange(len(y)), y]).mean()
    soft = [soft_cross_entropy(softmax(g / temperature)) for g in (standard, robust)]
    return weights[0] * hard + weights[1] * soft[0] + weights[2] * soft[1]


@pytest.mark.parametrize(("weights", "temperature"), [((0.3, 0.1, 0.6), 2.0), ((0.5, 0.5, 0.2), 4.0)])
def test_loss_and_gradient_equal_the_closed_form(weights, temperature):
    """The loss to float32, its gradient against central differences of the float64 loss."""
    named = dict(zip(("hard_weight", "standard_weight", "robust_weight"), weights, strict=True))
    rule = started(temperature=temperature, **named)
    batch, adversarial = batch_of(images()), images(1)
    logits = 3 * torch.randn(6, K, generator=stream(0, "z"))
    logits.requires_grad_(True)
    seen = Predictions(logits)
    supervision = rule.supervise(batch, adversarial, seen.detach(), "fixed")
    loss = PGDAT().outer_loss(seen, batch, supervision)
    loss.backward()

    f, y = logits.detach().double().numpy(), batch.label.numpy()
    taught = predicts(rule.standard, adversarial), predicts(rule.robust, adversarial)
    assert loss.item() == pytest.approx(naive(f, y, *taught, weights, temperature), rel=1e-5)
    for place in np.ndindex(*f.shape):
        up, down = f.copy(), f.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = naive(up, y, *taught, weights, temperature) - naive(down, y, *taught, weights, temperature)
        assert logits.grad[place].item() == pytest.approx(slope / 2e-5, abs=1e-5)
    mixed = [np.eye(K)[y], *(softmax(g / temperature) for g in taught)]
    expected = sum(w * m for w, m in zip(weights, mixed, strict=True)) / sum(weights)
    np.testing.assert_allclose(supervision.target, expected, atol=1e-6)


def test_at_temperature_one_it_is_the_cross_entropy_with_the_mixture():
    rule, batch = started(temperature=1.0), batch_of(images())
    supervision = rule.supervise(batch, images(1), Predictions(torch.zeros(6, K)), "fixed")
    logits = torch.randn(6, K, generator=stream(0, "z"))
    expected = nn.functional.cross_entropy(logits, supervision.target, reduction="none")
    torch.testing.assert_close(supervision.cross_entropy(logits), expected)


def test_mixture_weighs_by_coefficients_and_not_by_temperatures():
    terms = (SoftTerm(torch.eye(2), 0.5), SoftTerm(torch.full((2, 2), 0.5), 1.5, temperature=3.0))
    torch.testing.assert_close(mixture(terms), torch.tensor([[0.625, 0.375], [0.375, 0.625]]))


@pytest.mark.parametrize(
    ("settings", "coefficients"),
    [
        ({"standard": None}, [1 / 3, 2 / 3]),
        ({"robust": None}, [0.75, 0.25]),
        ({"robust_weight": 0.0}, [0.3, 0.1]),
        ({"hard_weight": 0.0}, [0.1, 0.6]),
        ({"standard": None, "hard_weight": 0.0}, [0.7]),
    ],
)
def test_coefficients_of_an_absent_teacher_go_to_the_rest(settings, coefficients):
    rule = started(**settings)
    terms = rule.supervise(batch_of(images()), images(1), Predictions(torch.zeros(6, K)), "fixed").terms
    assert [term.coefficient for term in terms] == pytest.approx(coefficients)


@pytest.mark.parametrize(("image", "looked_at"), [("adversarial", 1), ("clean", 0)])
def test_teachers_look_at_the_image_they_are_told_to(image, looked_at):
    rule = started(image=image)
    terms = rule.supervise(batch_of(images()), images(1), Predictions(torch.zeros(6, K)), "fixed").terms
    for term, net in zip(terms[1:], (rule.standard, rule.robust), strict=True):
        np.testing.assert_allclose(term.target, softmax(predicts(net, images(looked_at)) / 2), atol=1e-6)


def test_the_attack_climbs_away_from_the_hard_label():
    assert torch.equal(started().attack_target(batch_of(images()), "fixed"), batch_of(images()).label)


def test_one_step_equals_the_published_rule_rederived_in_float64():
    """Attack on the hard label in train mode, teachers on x', loss, gradient."""
    net = teacher(0).double()
    twin = copy.deepcopy(net)
    labels = torch.arange(12) % K
    x_all = torch.rand(12, 1, 6, 6, generator=stream(0, "img"))
    rule = KD(standard=teacher(1).double(), robust=teacher(2).double())
    rule.setup(about(net, labels))
    rule._to_check.clear()
    rule._forwards = [
        (lambda image, part=part: part(image.double()), weight)
        for part, (_, weight) in zip((rule.standard_net, rule.robust_net), rule._forwards, strict=True)
    ]
    attack = PGD(steps=3, step_size=Budget("2/255"), start="none")
    recipe = Recipe(rule, threat=ThreatModel("linf", Budget("8/255")), attack=attack, attack_bn="train")
    optim = OptimSettings(lr=0.1, momentum=0.0, weight_decay=0.0)
    step = _DoubleStep(
        net,
        Resident(Split(x_all, labels), "cpu"),
        recipe,
        make_optimizer(net, optim, torch.device("cpu")),
        Engine(RuntimeSettings(device="cpu")),
    )
    step(PLAN, PHASE, key=1)

    x, y = x_all[:8].double(), labels[:8]
    attacked = x.clone()
    for _ in range(3):
        attacked.requires_grad_(True)
        loss = nn.functional.cross_entropy(twin(attacked), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, attacked)
        attacked = (attacked + 2 / 255 * slope.sign()).detach()
        attacked = torch.clamp(torch.max(torch.min(attacked, x + 8 / 255), x - 8 / 255), 0, 1)
    logits = twin(attacked)
    with torch.no_grad():
        softened = [
            torch.softmax(part.double().eval()(attacked) / 2, 1)
            for part in (copy.deepcopy(rule.standard), copy.deepcopy(rule.robust))
        ]
    log_q = torch.log_softmax(logits / 2, 1)
    loss = 0.3 * nn.functional.cross_entropy(logits, y)
    for weight, target in zip((0.1, 0.6), softened, strict=True):
        loss = loss + weight * 4 * -(target * log_q).sum(1).mean()
    loss.backward()
    assert step.meters[1].item() / 8 == pytest.approx(loss.item(), abs=1e-6)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, theirs.grad, atol=1e-6)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


class _DoubleStep(TrainStep):
    """The step with images and logits in float64."""

    def forward(self, image):
        return self.net(image.double()).float()


@pytest.mark.parametrize(("objective", "updates"), [(PGDAT(), 1), (TRADES(), 2)])
def test_teachers_are_frozen_copies_in_eval_mode(make_trainer, objective, updates):
    given = {"standard": teacher(1).train(), "robust": teacher(2).train()}
    before = [weights_digest(net) for net in given.values()]
    rule = KD(**given)
    trainer = make_trainer(rule, objective)
    trainer.fit()
    nets = [rule.standard_net, rule.robust_net]
    for net, was in zip([*nets, *given.values()], [*before, *before], strict=True):
        assert torch.equal(weights_digest(net), was)
    for net in nets:
        assert not any(module.training for module in net.modules())
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(net.training and net[0].weight.requires_grad for net in given.values())
    # checkpoints hold no teacher, and the student's statistics move with its own forwards alone
    assert {name: len(value) for name, value in trainer.folder.checkpoints.load()["label"].items()} == {
        "standard_sha256": 32,
        "robust_sha256": 32,
    }
    assert trainer.net[1].num_batches_tracked.item() == updates * 3 * trainer.steps_per_epoch


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_each_teacher_looks_once_a_step(make_trainer, cutmix):
    rule = KD(standard=teacher(1), robust=teacher(2))
    trainer = make_trainer(rule, PGDAT(), augment=AugmentSettings("crop-flip", pad=1, cutmix=cutmix))
    seen = []
    plan = trainer.train_data.plan(seed=0, epoch=0)[:8]
    for key in range(2):  # the first step also looks at what the teachers return at all
        seen.clear()
        hooks = [
            net.register_forward_hook(lambda net, given, _: seen.append(given[0]))
            for net in (rule.standard_net, rule.robust_net)
        ]
        trainer.step(plan, PHASE, key=key)
        rule.after_step()
        for hook in hooks:
            hook.remove()
    first, second = seen
    assert first is second
    assert not torch.equal(first, trainer.train_data.batch(plan).image)


def test_a_run_continues_with_its_own_teachers_only(make_trainer, tmp_path):
    whole = make_trainer(KD(standard=teacher(1), robust=teacher(2)), PGDAT(), folder="run")
    whole.fit()
    whole.folder.close()
    other = make_trainer(KD(standard=teacher(1), robust=teacher(3)), PGDAT(), folder="run")
    with pytest.raises(SettingError) as raised:
        other.fit()
    assert "label.robust: got another teacher" in str(raised.value)
    other.folder.close()
    alone = make_trainer(KD(robust=teacher(2)), PGDAT(), folder="run")
    with pytest.raises(SettingError) as raised:
        alone.fit()
    assert "label.standard: got another teacher" in str(raised.value)
    alone.folder.close()
    make_trainer(KD(standard=teacher(1), robust=teacher(2)), PGDAT(), folder="run").fit()


def test_no_teacher_is_refused_at_setup():
    for rule in (KD(), KD(robust=teacher(2), robust_weight=0.0)):
        with pytest.raises(SettingError, match=r"label\.standard, label\.robust: got no teacher"):
            rule.setup(about(teacher(0)))


def test_teachers_of_other_classes_or_images_are_refused():
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 100))
    rule = started(robust=wide)
    with pytest.raises(SettingError, match=r"label\.robust: got a network that returns shape \[2, 100\]"):
        rule.supervise(batch_of(images()), images(1), Predictions(torch.zeros(6, K)), "fixed")
    rule = started(standard=nn.Sequential(nn.Flatten(), nn.Linear(64, K)))
    with pytest.raises(SettingError, match=r"label\.standard: got a network that fails") as raised:
        rule.supervise(batch_of(images()), images(1), Predictions(torch.zeros(6, K)), "fixed")
    assert "images [2, 1, 6, 6]" in str(raised.value)
    with pytest.raises(SettingError, match=r"label\.robust: .*a builtin_function"):
        started(robust=len)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hard_weight": -0.1},
        {"standard_weight": math.nan},
        {"robust_weight": math.inf},
        {"temperature": 0},
        {"image": "both"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"label.{next(iter(wrong))}"):
        KD(**wrong)
