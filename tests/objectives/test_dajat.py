"""DAJAT against a step written with two sets of normalization passed by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import entropy
from torch.func import functional_call

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import AugmentSettings, Batch
from softdefend.labels import Hard, Predictions, Supervision
from softdefend.objectives import DAJAT, TRADES, Consistency
from softdefend.objectives.consistency import jensen_shannon
from softdefend.objectives.dajat import disagreement
from softdefend.training import OptimSettings
from softdefend.weights import AWP
from tiny import K, about, believed, tiny_net

LOGITS = 2 * torch.randn(3, 6, 5, generator=stream(0, "z"))


def test_the_disagreement_is_the_entropy_of_the_mean_less_the_mean_entropy():
    p = softmax(LOGITS.double().numpy(), axis=-1)
    expected = entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0)
    np.testing.assert_allclose(disagreement(LOGITS).numpy(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(disagreement(LOGITS[:2]), jensen_shannon(LOGITS[0], LOGITS[1], 1.0))
    certain = 90 * torch.stack([torch.eye(5)[[0]], torch.eye(5)[[1]], torch.eye(5)[[2]]])
    torch.testing.assert_close(disagreement(certain), torch.tensor([math.log(3)]))


def is_norm(name: str) -> bool:
    return name.startswith("1.")  # the one BatchNorm of tiny_net


def naive_step(net, shared, plain, second, rows, label, goal, threat, velocity):
    """One update of three views; the dictionaries of tensors are changed in place."""
    sets = [plain, second, second]

    def look(view, image, training):
        net.train(training)
        net[3].eval()  # dropout
        return functional_call(net, {**shared, **sets[view]}, (image,))

    noise = torch.rand(len(rows) * len(label), *rows[0].shape[1:], generator=stream(0, "start")) - 0.5
    total, clean_of, eps, length = 0.0, [], float(threat.eps), float(threat.eps) / 4
    attacked = []
    for view, (image, start) in enumerate(zip(rows, noise.chunk(len(rows)), strict=True)):
        x = (image + eps * start).clamp(0, 1)
        with torch.no_grad():
            target = look(view, image, False).softmax(1)
        for _ in range(2):
            x.requires_grad_(True)
            loss = F.kl_div(look(view, x, False).log_softmax(1), target, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x)
            x = (x.detach() + length * grad.sign()).clamp(image - eps, image + eps).clamp(0, 1)
        attacked.append(x.detach())
    for view, (image, x) in enumerate(zip(rows, attacked, strict=True)):
        clean = look(view, image, True)
        adversarial = look(view, x, True)
        divergence = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="batchmean")
        total = total + (F.cross_entropy(clean, label) + goal.beta * divergence) / len(rows)
        clean_of.append(clean.softmax(1))
    middle = torch.stack(clean_of).mean(0)
    for p in clean_of:
        total = total + goal.weight * F.kl_div(middle.log(), p, reduction="batchmean") / len(rows)
    everything = {**shared, **plain, **{f"second.{name}": value for name, value in second.items()}}
    trained = {name: value for name, value in everything.items() if value.requires_grad}
    for (name, value), grad in zip(
        trained.items(), torch.autograd.grad(total, list(trained.values())), strict=True
    ):
        velocity[name] = 0.9 * velocity.get(name, 0.0) + grad + 5e-4 * value.detach()
        with torch.no_grad():
            value -= 0.1 * velocity[name]


def test_a_run_is_that_of_two_sets_of_normalization(make_trainer, monkeypatch):
    """Weights, both sets with their statistics, after six steps on a plain and two augmented views."""

    def start(self, image, generator):
        noise = torch.rand(image.shape, generator=stream(0, "start")) - 0.5
        return image + float(self.eps) * noise

    monkeypatch.setattr(ThreatModel, "random_start", start)
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    goal, net = DAJAT(beta=3.0, weight=5.0), tiny_net().double()
    net[3].p = 0.0
    net.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    trainer = make_trainer(
        Hard(),
        goal,
        net=net,
        attack=PGD(steps=2, start="uniform"),
        augment=AugmentSettings(pad=1, policy="randaugment", plain_first=True),
        optim=OptimSettings(epochs=2, batch_size=16, lr=0.1, schedule=constant()),
    )
    trainer.fit()

    other = tiny_net().double()
    shared, plain = {}, {}
    for name, value in (*other.named_parameters(), *other.named_buffers()):
        kept = value.detach().clone()
        (plain if is_norm(name) else shared)[name] = kept.requires_grad_(value.requires_grad)
    second = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in plain.items()}
    velocity: dict[str, torch.Tensor] = {}
    for epoch in range(2):
        plan = trainer.train_data.plan(seed=0, epoch=epoch, views=3)
        for rows in plan.split(16):
            views = [trainer.train_data.batch(rows, view) for view in range(3)]
            images = [view.image.double() for view in views]
            naive_step(
                other, shared, plain, second, images, views[0].label, goal, trainer.recipe.threat, velocity
            )
    for name, value in trainer.net.state_dict().items():
        expected = {**shared, **plain}[name]
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-7, msg=name)
    for name, value in goal.state_dict().items():
        expected = second["1." + name.removeprefix("layers.0.")]
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-7, msg=name)
    assert not torch.equal(goal.state_dict()["layers.0.running_mean"], trainer.net[1].running_mean)


def constant():
    from softdefend.training.schedules import Schedule

    return Schedule(gamma=1.0)


def test_with_one_view_repeated_it_is_trades():
    """Equal views agree, and their mean is one of them."""
    image = torch.rand(6, 1, 6, 6, generator=stream(0, "x"))
    label = torch.arange(6) % K
    logits = [torch.randn(6, K, generator=stream(0, name)) for name in ("clean", "adversarial")]
    belief = believed(torch.eye(K)[label])
    batch = Batch(torch.arange(6), image.repeat(3, 1, 1, 1), label)
    once = TRADES(4.0).outer_loss(Predictions(logits[1], logits[0]), Batch(batch.index, image, label), belief)
    thrice = Predictions(logits[1].repeat(3, 1), logits[0].repeat(3, 1))
    torch.testing.assert_close(DAJAT(4.0, weight=9.0).outer_loss(thrice, batch, belief), once)


def test_the_network_is_its_own_again_after_every_look():
    net, goal = tiny_net().train(), DAJAT()
    goal.setup(about(net))
    before = {name: value.data_ptr() for name, value in net.state_dict(keep_vars=True).items()}
    goal.predict(net, *torch.rand(2, 12, 1, 6, 6, generator=stream(0, "x")))
    assert {name: value.data_ptr() for name, value in net.state_dict(keep_vars=True).items()} == before
    with pytest.raises(RuntimeError, match="in the middle"), goal._norms.active():
        raise RuntimeError("in the middle")
    assert {name: value.data_ptr() for name, value in net.state_dict(keep_vars=True).items()} == before
    assert int(net[1].num_batches_tracked) == 2  # plain: clean and adversarial
    assert int(goal.state_dict()["layers.0.num_batches_tracked"]) == 4


def test_without_separate_normalization_there_is_nothing_to_save():
    net, goal = tiny_net(), DAJAT(separate_bn=False)
    goal.setup(about(net))
    assert (goal.layers, goal.state_dict()) == (None, {})
    assert goal.view_forward(net) is net


def test_weight_perturbation_leaves_the_second_normalization_alone(make_trainer):
    """It moves weights of more than one dimension; a run with both ends well and knows its second set."""
    trainer = make_trainer(Hard(), DAJAT(beta=2.0, weight=1.0), AWP(gamma=0.005))
    trainer.fit()
    layers = trainer.recipe.objective.layers
    assert all(value.ndim <= 1 for value in layers.parameters())
    assert any((layer.weight != 1).any() for layer in layers.layers)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"beta": -1.0}, r"beta"), ({"weight": float("nan")}, r"weight"), ({"augmented": 0}, r"augmented")],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(SettingError, match=rf"objective\.{said}"):
        DAJAT(**settings)


def test_a_plain_first_view_of_one_is_refused(make_trainer):
    plain = AugmentSettings(plain_first=True)
    with pytest.raises(SettingError, match=r"^augment\.plain_first: got true with TRADES, which"):
        make_trainer(Hard(), TRADES(), augment=plain)
    make_trainer(Hard(), Consistency(), augment=plain)


def test_supervision_serves_every_view():
    label = torch.arange(6) % 5
    targets = torch.softmax(torch.randn(6, 5, generator=stream(0, "t")), dim=1)
    clean = LOGITS.flatten(0, 1).requires_grad_(True)
    batch = Batch(torch.arange(6), torch.zeros(18, 1, 2, 2), label)
    goal = DAJAT(beta=0.0, weight=0.0)
    total = goal.outer_loss(Predictions(clean.detach(), clean), batch, Supervision(label, targets))
    expected = -(targets * LOGITS.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(total.detach(), expected)
