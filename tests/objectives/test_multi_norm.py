"""Training against several norms: closed forms on linear networks, and the union on digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.attacks import PGD, cross_entropy, margin
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import DataSettings, Resident, load
from softdefend.evaluation import Evaluator, robust_in_all
from softdefend.labels import Predictions, Supervision
from softdefend.models.small_cnn import SmallCNN
from softdefend.objectives import MultiNorm
from tiny import batch_of

RADII = {"linf": "0.05", "l2": "0.15", "l1": "0.2"}
THREAT = ThreatModel("linf", "0.05")
IMAGE = 0.4 + 0.2 * torch.rand(12, 1, 4, 4, generator=stream(0, "x"))
LABEL = torch.arange(12) % 2


def linear() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(2, 16, generator=stream(0, "w")))
    net[1].bias.zero_()
    return net


def attack(how: str, steps: int = 40, threat: ThreatModel = THREAT, **radii: str | None):
    return MultiNorm(how, **(RADII | radii)).training_attack(PGD(steps=steps), threat)


def inside(x_adv: torch.Tensor, image: torch.Tensor = IMAGE) -> torch.Tensor:
    """Which of the balls each image is in, [n, 3] bool."""
    balls = [ThreatModel(norm, eps) for norm, eps in RADII.items()]
    return torch.stack([ball.distance(image, x_adv) <= float(ball.eps) * (1 + 1e-5) for ball in balls], dim=1)


@pytest.mark.parametrize("steep", [1.0, 4.0, 20.0])
def test_the_worst_of_all_balls_has_the_closed_form(steep):
    """The margin rises by the largest of eps times the dual norms of the slope."""
    net = linear()
    net[1].weight[:, 3] *= steep
    slope = net[1].weight[1] - net[1].weight[0]
    duals = {"linf": 1, "l2": 2, "l1": torch.inf}
    most = max(float(RADII[norm]) * slope.norm(p=dual) for norm, dual in duals.items())
    made = attack("max")(net, IMAGE, LABEL, THREAT, generator=stream(0, "a"))
    risen = margin(net(made), LABEL) - margin(net(IMAGE), LABEL)
    torch.testing.assert_close(risen, torch.full((12,), float(most)), rtol=0.03, atol=0)
    assert inside(made).any(1).all()


def test_the_average_takes_what_pgd_finds_in_each_ball():
    net = linear()
    made = attack("average", 5)(net, IMAGE, LABEL, THREAT, generator=stream(0, "a"))
    generator = stream(0, "a")
    each = [PGD(steps=5)(net, IMAGE, LABEL, ThreatModel(n, e), generator=generator) for n, e in RADII.items()]
    torch.testing.assert_close(made, torch.cat(each))


def test_steepest_descent_is_a_naive_reading_of_the_papers_algorithm():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 2)).requires_grad_(False)
    made = attack("msd", 6)(net, IMAGE, LABEL, THREAT)
    balls = [ThreatModel(norm, eps) for norm, eps in RADII.items()]
    for i in range(12):
        x, label = IMAGE[i : i + 1], LABEL[i : i + 1]
        image = x
        for _ in range(6):
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(F.cross_entropy(net(x), label), x)
            tried = [ball.move(image, x.detach(), grad, float(ball.eps) / 4) for ball in balls]
            x = max(tried, key=lambda one: float(F.cross_entropy(net(one), label)))
        torch.testing.assert_close(made[i : i + 1], x)
    assert inside(made).any(1).all()


def test_mixed_gives_every_image_its_own_ball():
    made = attack("mixed")(linear(), IMAGE, LABEL, THREAT, generator=stream(0, "a"))
    assert inside(made)[torch.arange(12), torch.arange(12) % 3].all()
    two = attack("mixed", l2=None)(linear(), IMAGE, LABEL, THREAT, generator=stream(0, "a"))
    assert inside(two)[torch.arange(12), 2 * (torch.arange(12) % 2)].all()
    alone = PGD(steps=40)(linear(), IMAGE[:1], LABEL[:1], THREAT)
    torch.testing.assert_close(
        margin(linear()(two[:1]), LABEL[:1]), margin(linear()(alone), LABEL[:1]), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("how", ["max", "average", "msd", "mixed"])
@pytest.mark.parametrize("l2", [None, "0.15"])
def test_the_cost_is_what_is_said(how, l2):
    net, forwards, gradients = linear(), [], []

    def counted(image):
        logits = net(image)
        forwards.append(len(image))
        if logits.requires_grad:
            logits.register_hook(lambda grad: gradients.append(len(grad)))
        return logits

    attack(how, 10, l2=l2)(counted, IMAGE, LABEL, THREAT, generator=stream(0, "a"))
    objective = MultiNorm(how, **(RADII | {"l2": l2}))
    assert (sum(forwards) + sum(gradients)) / 12 == objective.attack_units(10)


def test_the_average_is_the_mean_of_the_cross_entropies():
    logits = torch.randn(36, 2, generator=stream(0, "z"))
    supervision = Supervision(LABEL, F.one_hot(LABEL, 2).float())
    total = MultiNorm("average").outer_loss(Predictions(logits), batch_of(IMAGE, LABEL), supervision)
    torch.testing.assert_close(total, cross_entropy(logits, LABEL.repeat(3)).mean())


def test_the_runs_own_norm_has_the_threats_radius():
    small = ThreatModel("linf", "0.01")
    made = attack("average", 5, threat=small)(linear(), IMAGE, LABEL, small, generator=stream(0, "a"))
    assert (small.distance(IMAGE, made[:12]) <= 0.01 + 1e-6).all()
    assert (ThreatModel("l2", 1).distance(IMAGE, made[12:24]) > 0.05).all()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"how": "min"}, "objective.how"),
        ({"l2": "99"}, "objective.l2"),
        ({"l1": None, "l2": None}, "two norms"),
    ],
)
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(SettingError, match=word):
        MultiNorm(**settings)


def test_on_digits_the_union_needs_training_against_it():
    bundle = load(DataSettings("digits", train_size=800, validation=100))
    data, test = Resident(bundle.train, "cpu"), Resident(bundle.test, "cpu")
    threats = [ThreatModel("linf", "0.15"), ThreatModel("l2", "1"), ThreatModel("l1", "3.5")]
    radii = {threat.norm: str(threat.eps) for threat in threats}
    attacks = {
        "linf": PGD(steps=4),
        **{
            how: MultiNorm(how, **radii).training_attack(PGD(steps=4), threats[0]) for how in ("max", "mixed")
        },
    }
    union = {}
    for name, made in attacks.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = SmallCNN(10, 1, 8)
        optimizer, draws = torch.optim.Adam(net.parameters(), 0.01), stream(0, "order")
        for _ in range(8):
            for rows in torch.randperm(data.n, generator=draws).split(64):
                batch = data.take(rows)
                image = made(net.eval(), batch.image, batch.label, threats[0], generator=draws)
                optimizer.zero_grad()
                cross_entropy(net.train()(image), batch.label).mean().backward()
                optimizer.step()
        evaluations = [
            Evaluator(net, test, threat)([PGD(steps=10)], index=torch.arange(150)) for threat in threats
        ]
        robust = robust_in_all(evaluations)
        assert robust.sum() <= min(evaluation.worst.sum() for evaluation in evaluations)
        union[name] = float(robust.float().mean())
    print(union)
    assert union["max"] > union["linf"] + 0.05
    assert union["mixed"] > union["linf"]


def test_evaluations_of_other_images_have_no_union():
    net = SmallCNN(10, 1, 4)
    test = Resident(load(DataSettings("digits", train_size=100, validation=50)).test, "cpu")
    one, two = (
        Evaluator(net, test, THREAT)([PGD(steps=1)], index=torch.arange(start, start + 5)) for start in (0, 1)
    )
    assert torch.equal(robust_in_all([one]), one.worst)
    towards = Evaluator(net, test, THREAT, targeted="next")([PGD(steps=1)], index=torch.arange(5))
    for given in ([], [one, two], [one, towards]):
        with pytest.raises(SettingError, match="evaluations"):
            robust_in_all(given)
