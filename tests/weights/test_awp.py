from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from killed_runs import train_whole_and_killed
from softdefend import PGD, PGDAT, SGLR, TRADES, Hard, OptimSettings, Plain, ThreatModel
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget
from softdefend.data import Resident, Split
from softdefend.execution.engine import Engine
from softdefend.training import Recipe, RuntimeSettings
from softdefend.training.optim import make_optimizer
from softdefend.training.step import Phase, TrainStep
from softdefend.weights import AWP, EMA, SWA
from softdefend.weights.awp import ascent
from tiny import K, Killed, about

N = 12
LABELS = torch.arange(N) % K
IMAGES = torch.rand(N, 1, 6, 6, generator=stream(0, "img"))
INDEX = torch.tensor([3, 0, 7, 11, 5])
PLAN = torch.stack([INDEX, *torch.zeros(3, 5, dtype=torch.long)], dim=1)
THREAT = ThreatModel("linf", Budget("8/255"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, K),
    )


class _DoubleStep(TrainStep):
    """The step with images and network in float64."""

    def forward(self, image):
        return self.net(image.double())


def make_step(net, rule, label=None, objective=None, optim=None, kind=TrainStep):
    optim = optim or OptimSettings(lr=0.1, momentum=0.9, weight_decay=0.01)
    label, objective = label or Hard(), objective or PGDAT()
    for part in (rule, label, objective):
        part.setup(about(net, LABELS))
    recipe = Recipe(label, objective, rule, THREAT, PGD(steps=3, start="none"))
    optimizer = make_optimizer(net, optim, torch.device("cpu"))
    engine = Engine(RuntimeSettings(device="cpu"))
    return kind(net, Resident(Split(IMAGES, LABELS), "cpu"), recipe, optimizer, engine)


def naive_step(net, optimizer, x, adversarial, gamma, loss):
    """The authors' algorithm: a proxy, one SGD ascent step, scaled differences, add, train, subtract."""
    net.train()
    proxy = copy.deepcopy(net)
    rate = 0.01
    slopes = torch.autograd.grad(loss(proxy(x), proxy(adversarial)), list(proxy.parameters()))
    moves = {}
    for (name, weight), slope in zip(net.named_parameters(), slopes, strict=True):
        if weight.ndim > 1 and "weight" in name:
            step = (weight.detach() + rate * slope) - weight.detach()
            moves[name] = gamma * weight.detach().norm() / (step.norm() + 1e-20) * step
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.add_(moves.get(name, 0.0))
    optimizer.zero_grad()
    clean = net(x) if loss.clean else None
    loss(clean, net(adversarial)).backward()
    optimizer.step()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.sub_(moves.get(name, 0.0))


@pytest.mark.parametrize("objective", [PGDAT, TRADES])
def test_three_whole_steps_equal_the_authors_algorithm_in_float64(objective):
    """Weights, momentum and batch statistics; weight decay is of the perturbed weights, attack made once."""
    net = network().double()
    twin = copy.deepcopy(net)
    step = make_step(net, AWP(gamma=0.05), objective=objective(), kind=_DoubleStep)
    attack, made = step.attack, []
    step.attack = lambda *args, **kwargs: made.append(attack(*args, **kwargs)) or made[-1]
    x, y = IMAGES[INDEX].double(), LABELS[INDEX]
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def loss(clean, adversarial):
        if objective is PGDAT:
            return nn.functional.cross_entropy(adversarial, y)
        kl = nn.functional.kl_div(
            adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True
        )
        return nn.functional.cross_entropy(clean, y) + 6 * kl

    loss.clean = objective is TRADES
    for number in range(3):
        step(PLAN, Phase("fixed", "fixed", "perturbed"), key=number)
        assert len(made) == number + 1
        naive_step(twin, sgd, x, made[-1].double(), 0.05, loss)
        for ours, theirs in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_memory_and_target_move_once_from_predictions_at_the_trained_weights():
    net, rule = network(), SGLR(start=0.0)
    step = make_step(net, AWP(gamma=0.5), label=rule)
    before = copy.deepcopy(net)
    made, target = [], rule.target
    rule.target = lambda batch, seen, phase: made.append(seen) or target(batch, seen, phase)
    attack, adversarial = step.attack, []
    step.attack = lambda *args, **kwargs: adversarial.append(attack(*args, **kwargs)) or adversarial[-1]
    step(PLAN, Phase("refined", "fixed", "perturbed"), key=0)
    assert len(made) == len(adversarial) == 1
    x, y = IMAGES[INDEX], nn.functional.one_hot(LABELS[INDEX], K)
    before.train()
    guide = 0.2 * before(x).softmax(1) + 0.8 * before(adversarial[0]).softmax(1)
    torch.testing.assert_close(rule.memory.read(INDEX), 0.9 * y + 0.1 * guide.detach())


@pytest.mark.parametrize("gamma", [0.005, 0.3])
def test_every_layer_moves_by_gamma_of_its_norm_uphill_and_nothing_else_moves(gamma):
    net = network().double()
    rule = AWP(gamma=gamma)
    rule.setup(about(net))

    def loss():
        return nn.functional.cross_entropy(net(IMAGES.double()), LABELS)

    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    at_trained = loss()
    slopes = dict(
        zip(
            before,
            torch.autograd.grad(at_trained, list(net.parameters()), retain_graph=True),
            strict=True,
        )
    )
    with rule.perturbed(at_trained):
        if gamma < 0.01:
            assert loss() > at_trained
        for name, weight in net.named_parameters():
            move = weight.detach() - before[name]
            if weight.ndim == 1:
                assert torch.equal(weight, before[name]), name
                continue
            assert move.norm().item() == pytest.approx(gamma * before[name].norm().item(), rel=1e-12)
            cosine = (move * slopes[name]).sum() / (move.norm() * slopes[name].norm())
            assert cosine.item() == pytest.approx(1, abs=1e-12)
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())


def test_without_an_update_the_weights_come_back_to_the_bit():
    net = network()
    step = make_step(net, AWP(gamma=0.37))
    before = [p.detach().clone() for p in net.parameters()]
    step.set_lr(0.0)
    for key in range(4):
        step(PLAN, Phase("fixed", "fixed", "perturbed"), key)
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), before, strict=True))


def test_weights_come_back_after_an_interruption():
    net, rule = network(), AWP(gamma=0.5)
    rule.setup(about(net))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(Killed), rule.perturbed(net(IMAGES).logsumexp(1).sum()):
        raise Killed
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), before, strict=True))


def test_where_the_loss_does_not_depend_on_a_weight_it_does_not_move():
    weights, slopes = [torch.ones(2, 3), torch.zeros(2, 2), torch.ones(4, 1)], [torch.zeros(2, 3)]
    slopes += [torch.ones(2, 2), torch.full((4, 1), -2.0)]
    first, second, third = ascent(weights, slopes)
    assert not first.any()
    assert not second.any()
    torch.testing.assert_close(third, -torch.ones(4, 1))


@pytest.mark.parametrize(
    ("label", "objective", "forwards"),
    [(Hard, PGDAT, 1), (Hard, TRADES, 2), (lambda: SGLR(start=0.0), PGDAT, 2)],
)
def test_running_statistics_see_as_many_batches_as_without_perturbation(label, objective, forwards):
    for rule, phase in ((Plain(), "fixed"), (AWP(), "plain"), (AWP(), "perturbed")):
        net = network()
        step = make_step(net, rule, label=label(), objective=objective())
        step(PLAN, Phase("refined" if label is not Hard else "fixed", "fixed", phase), key=0)
        assert int(net[1].num_batches_tracked) == forwards
        assert net.training
        assert net[1].track_running_stats


@pytest.mark.parametrize(
    ("warmup", "epochs", "plain"),
    [(0.0, 200, 0), (0.05, 200, 10), (0.025, 200, 5), (0.5, 3, 2), (1.0, 7, 7)],
)
def test_warm_up_epochs_are_plain(warmup, epochs, plain):
    rule = AWP(warmup=warmup)
    rule.setup(about(network(), epochs=epochs))
    phases = [rule.phase(epoch) for epoch in range(epochs)]
    assert phases == ["plain"] * plain + ["perturbed"] * (epochs - plain)
    assert not rule.perturbs("plain")
    assert rule.perturbs("perturbed")


def test_a_step_of_the_warm_up_is_a_step_without_perturbation():
    nets = [network(), network()]
    for net, rule, phase in zip(nets, (Plain(), AWP()), ("fixed", "plain"), strict=True):
        make_step(net, rule)(PLAN, Phase("fixed", "fixed", phase), key=0)
    assert all(torch.equal(*pair) for pair in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def test_an_average_inside_is_the_same_average_outside(make_trainer):
    """AWP(average=EMA) against AWP alone, whose weights an EMA of our own follows."""
    inside = make_trainer(Hard(), PGDAT(), AWP(average=EMA(0.6)), folder="inside")
    inside.fit()
    outside = make_trainer(Hard(), PGDAT(), AWP(), folder="outside")
    after, averaged, count = outside.recipe.weight.after_step, {}, itertools.count()

    def follow():
        after()
        t = next(count)
        decay = min(0.6, (1 + t) / (10 + t)) if t else 0.0
        for name, weight in outside.net.named_parameters():
            old = averaged.get(name, torch.zeros_like(weight))
            averaged[name] = decay * old + (1 - decay) * weight.detach()

    outside.recipe.weight.after_step = follow
    outside.fit()
    live = weights_of(outside.net)
    for name, value in weights_of(inside.net).items():
        assert torch.equal(value, live[name]), name
    for name, weight in inside.recipe.weight.prediction.named_parameters():
        torch.testing.assert_close(weight, averaged[name])
    assert outside.recipe.weight.prediction is outside.net


@pytest.mark.parametrize("average", [lambda: EMA(0.6), lambda: SWA(start=0.0), lambda: SWA(start=0.4)])
def test_a_run_with_an_average_inside_resumes_to_the_bit(make_trainer, average):
    def trainer(folder):
        return make_trainer(SGLR(), TRADES(), AWP(warmup=0.3, average=average()), folder=folder)

    whole, last = train_whole_and_killed(trainer, (2, 3, 2))
    for ours, theirs in zip(
        whole.recipe.weight.prediction.state_dict().values(),
        last.recipe.weight.prediction.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0.0}, "weight.gamma: got 0.0; accepted: a positive number"),
        ({"gamma": float("nan")}, "weight.gamma: got nan; accepted: a positive number"),
        ({"warmup": 1.1}, "weight.warmup: got 1.1; accepted: a number in [0, 1]"),
        (
            {"average": AWP()},
            "weight.average: got AWP; accepted: a rule that averages, such as EMA or SWA, or null",
        ),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(SettingError) as caught:
        AWP(**wrong)
    assert str(caught.value) == message


def test_a_network_without_weights_to_perturb_is_refused():
    with pytest.raises(SettingError, match=r"net: got Sequential without trainable weights of two or more"):
        AWP().setup(about(nn.Sequential(nn.BatchNorm2d(1))))
