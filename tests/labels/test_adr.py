"""ADR against closed forms and a float64 re-derivation of rule, schedules and teacher."""

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
from softdefend.labels import ADR, Predictions
from softdefend.labels.adr import cosine, rectify
from softdefend.objectives import PGDAT, TRADES
from softdefend.training import Engine, OptimSettings, Recipe, RuntimeSettings
from softdefend.training.optim import make_optimizer
from softdefend.training.step import Phase, TrainStep
from tiny import K, about, batch_of

PHASE = Phase("fixed", "fixed", "fixed")


def images(size: int = 6) -> torch.Tensor:
    return torch.rand(size, 1, 6, 6, generator=stream(0, "images"))


def started(net: nn.Module, epoch: float = 0.0, **settings) -> ADR:
    rule = ADR(**settings)
    rule.setup(about(net))
    rule.advance(epoch)
    return rule


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def naive(logits: np.ndarray, label: np.ndarray, temperature: float, interpolation: float) -> np.ndarray:
    """Sample by sample."""
    targets = []
    for z, y in zip(softmax(logits / temperature), label, strict=True):
        share = min(max(interpolation - (max(z) - z[y]), 0.0), 1.0)
        targets.append([share * p + (1 - share) * (c == y) for c, p in enumerate(z)])
    return np.array(targets)


@pytest.mark.parametrize(("temperature", "interpolation"), [(2.5, 0.7), (1.0, 0.95), (0.3, 0.1), (5.0, 1.0)])
def test_the_rule_sample_by_sample(temperature, interpolation):
    logits = 3 * torch.randn(40, 7, generator=stream(0, "z"))
    label = torch.arange(40) % 7
    ours = rectify(logits, label, temperature, interpolation)
    np.testing.assert_allclose(
        ours, naive(logits.double().numpy(), label.numpy(), temperature, interpolation), atol=1e-6
    )
    assert torch.equal(ours.argmax(1), label)


def test_clipping_at_both_ends():
    p = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.4, 0.5, 0.1]])
    label = torch.tensor([1, 0, 0])
    ours = rectify(p.log(), label, 1.0, 0.8)
    torch.testing.assert_close(ours[0], torch.tensor([0.0, 1.0, 0.0]))  # 0.8 - 0.85 is cut to 0: hard
    torch.testing.assert_close(ours[1], 0.8 * p[1] + 0.2 * torch.tensor([1.0, 0, 0]))  # lambda itself
    torch.testing.assert_close(ours[2], 0.7 * p[2] + 0.3 * torch.tensor([1.0, 0, 0]))  # lambda - 0.1
    torch.testing.assert_close(rectify(p.log(), label, 1.0, 1.0)[1], p[1])  # at most the teacher alone


def test_annealing_runs_along_half_a_cosine_in_device_tensors():
    assert cosine(2.5, 2.0, 0.0) == 2.5
    assert cosine(2.5, 2.0, 1.0) == pytest.approx(2.0)
    assert cosine(2.5, 2.0, 0.5) == pytest.approx(2.25)
    rule = started(nn.Flatten())
    here = rule.temperature, rule.interpolation
    # the authors' table of values, one for each of the run's iterations (10 epochs of 7)
    t = np.arange(70)
    wave = 1 + np.cos(np.pi * t / 70)
    temperatures, interpolations = 2.0 + 0.5 * 0.5 * wave, 0.95 + 0.5 * (0.7 - 0.95) * wave
    for step in t:
        rule.advance(step // 7 + step % 7 / 7)
        assert rule.temperature.item() == pytest.approx(temperatures[step], rel=1e-6)
        assert rule.interpolation.item() == pytest.approx(interpolations[step], rel=1e-6)
    assert rule.temperature is here[0]
    assert rule.interpolation is here[1]


def test_three_steps_equal_a_float64_re_derivation():
    """Attack on the rectified label, loss, gradient, SGD, and the teacher with its BN buffers, naively."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()
    ).append(nn.Linear(24, K))
    net = net.double()
    student, teacher = copy.deepcopy(net), copy.deepcopy(net).eval()
    labels = torch.arange(12) % K
    x_all = torch.rand(12, 1, 6, 6, generator=stream(0, "img"))
    rule = ADR(decay=0.6)
    rule.setup(about(net, labels))
    optimizer = make_optimizer(
        net, OptimSettings(lr=0.5, momentum=0.0, weight_decay=0.0), torch.device("cpu")
    )
    attack = PGD(steps=3, step_size=Budget("2/255"), start="none")
    recipe = Recipe(rule, threat=ThreatModel("linf", Budget("8/255")), attack=attack)
    step = _DoubleStep(
        net, Resident(Split(x_all, labels), "cpu"), recipe, optimizer, Engine(RuntimeSettings(device="cpu"))
    )
    rule._forward = lambda image: rule.teacher(image.double())
    for number in range(3):
        index = torch.randperm(12, generator=stream(number, "order"))[:5]
        rule.advance(number + 0.5)
        step(torch.cat([index[:, None], torch.zeros(5, 3, dtype=torch.long)], dim=1), PHASE, key=number)
        rule.after_step()

        x, y = x_all[index].double(), labels[index]
        wave = 0.5 * (1 + math.cos(math.pi * (number + 0.5) / 10))
        tau, interpolation = 2.0 + 0.5 * wave, 0.95 - 0.25 * wave
        with torch.no_grad():
            target = torch.tensor(naive(teacher(x).numpy(), y.numpy(), tau, interpolation))
        attacked, student = x.clone(), student.eval()
        for _ in range(3):
            attacked.requires_grad_(True)
            loss = -(target * torch.log_softmax(student(attacked), 1)).sum()
            (slope,) = torch.autograd.grad(loss, attacked)
            attacked = (attacked + 2 / 255 * slope.sign()).detach()
            attacked = torch.clamp(torch.max(torch.min(attacked, x + 8 / 255), x - 8 / 255), 0, 1)
        student.train().zero_grad()
        loss = -(target * torch.log_softmax(student(attacked), 1)).sum(1).mean()
        loss.backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.5 * p.grad
            for old, new in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
                old.copy_(0.6 * old + 0.4 * new if old.is_floating_point() else new)
        for ours, theirs in ((net, student), (rule.teacher, teacher)):
            for name, value in theirs.state_dict().items():
                np.testing.assert_allclose(ours.state_dict()[name], value, atol=2e-6, err_msg=name)
    assert not torch.equal(rule.teacher[1].running_mean, net[1].running_mean)


class _DoubleStep(TrainStep):
    """The step with images and logits in float64."""

    def forward(self, image):
        return self.net(image.double()).float()


@pytest.mark.parametrize(("attack_label", "shape"), [("rectified", (6, K)), ("hard", (6,))])
def test_the_attack_climbs_away_from_what_is_trained_on(make_net, attack_label, shape):
    rule, batch = started(make_net(), attack_label=attack_label), batch_of(images())
    away_from = rule.attack_target(batch, "fixed")
    assert away_from.shape == shape
    target = rule.target(batch, Predictions(torch.zeros(6, K)), "fixed")
    if attack_label == "rectified":
        assert torch.equal(away_from, target)
    else:
        assert torch.equal(away_from, batch.label)
    assert not target.requires_grad
    torch.testing.assert_close(target.sum(1), torch.ones(6))


def test_a_prediction_never_outlives_its_images_or_its_teacher(make_net):
    net = make_net()
    rule, first, second = started(net, decay=0.0), batch_of(images()), batch_of(images().flip(0))
    of_first = rule.attack_target(first, "fixed")
    of_second = rule.target(second, Predictions(torch.zeros(6, K)), "fixed")
    torch.testing.assert_close(of_second, started(net).attack_target(second, "fixed"))
    assert not torch.equal(of_second, of_first)
    with torch.no_grad():
        net[-1].weight.mul_(3)
    rule.after_step()
    assert not torch.equal(rule.attack_target(second, "fixed"), of_second)
    torch.testing.assert_close(rule.attack_target(first, "fixed"), started(net).attack_target(first, "fixed"))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("objective", [PGDAT(), TRADES()])
def test_one_eval_mode_forward_of_the_teacher_a_step(make_trainer, objective, cutmix):
    rule = ADR()
    trainer = make_trainer(rule, objective, augment=AugmentSettings("crop-flip", pad=1, cutmix=cutmix))
    seen = []
    rule.teacher.register_forward_hook(lambda net, given, _: seen.append((net.training, given[0].shape)))
    trainer.step(trainer.train_data.plan(seed=0, epoch=0)[:8], PHASE, key=1)
    assert seen == [(False, (8, 1, 6, 6))]
    assert not any(module.training for module in rule.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in rule.teacher.parameters())
    # the student's statistics move with its own forwards alone, the teacher's with none
    assert trainer.net[1].num_batches_tracked.item() == (1 if isinstance(objective, PGDAT) else 2)
    assert rule.teacher[1].num_batches_tracked.item() == 0
    assert torch.equal(rule.teacher[1].running_mean, torch.zeros(8))


def test_the_teacher_comes_back_in_the_same_bits(make_net):
    net = make_net()
    rule = started(net)
    with torch.no_grad():
        for number in range(3):
            for value in net.state_dict().values():
                value.add_(number + 1)
            rule.after_step()
    saved = {name: value.clone() for name, value in rule.state_dict().items()}
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    again = started(make_net())
    again.load_state_dict(saved)
    for name, value in again.teacher.state_dict().items():
        assert torch.equal(value, rule.teacher.state_dict()[name]), name
    again.after_step()  # still tied to its own network's tensors, in place
    moved = again.teacher.state_dict()["1.running_mean"]
    torch.testing.assert_close(moved, 0.995 * saved["teacher.1.running_mean"])


def test_the_schedule_needs_no_history(make_net):
    far, near = started(make_net()), started(make_net())
    for epoch in np.linspace(0, 7.25, 30):
        far.advance(epoch)
    near.advance(7.25)
    assert torch.equal(far.temperature, near.temperature)
    assert torch.equal(far.interpolation, near.interpolation)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"decay": 1.1}, "decay"),
        ({"temperature_low": 0.0}, "temperature_low"),
        ({"temperature_high": 1.0}, "temperature_high"),
        ({"temperature_high": math.inf}, "temperature_high"),
        ({"interpolation_low": -0.1}, "interpolation_low"),
        ({"interpolation_high": 0.6}, "interpolation_high"),
        ({"interpolation_high": 1.2}, "interpolation_high"),
        ({"attack_label": "soft"}, "attack_label"),
    ],
)
def test_impossible_settings_are_refused(wrong, named):
    with pytest.raises(SettingError, match=rf"label\.{named}"):
        ADR(**wrong)
