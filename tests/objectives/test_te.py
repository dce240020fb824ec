import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.labels import Hard, Predictions
from softdefend.objectives import PGDAT, TE, TRADES, TRADESTE
from softdefend.objectives.te import ramp, weight_from_reference
from softdefend.training import OptimSettings
from softdefend.weights import WeightRule
from tiny import batch_of, believed

K, B = 5, 8
LABEL = torch.arange(B) % K
IMAGE = torch.rand(B, 1, 2, 2, generator=stream(0, "x"))
BATCH = batch_of(IMAGE, LABEL)
CLEAN, ADVERSARIAL = 2 * torch.randn(2, B, K, generator=stream(0, "z"))
TARGET = softmax(torch.randn(B, K, generator=stream(0, "t")).double().numpy(), axis=1)
BELIEF = believed(torch.tensor(TARGET).float(), LABEL)
P, Q = softmax(CLEAN.double().numpy(), axis=1), softmax(ADVERSARIAL.double().numpy(), axis=1)


def started(rule, epoch=199.0, labels=LABEL, k=K, epochs=200):
    """The rule in a run of 200 epochs, at full weight unless said otherwise."""
    rule.setup(RunInfo(labels, k, epochs))
    rule.advance(epoch)
    return rule


def remembering(rule, logits=CLEAN, **settings):
    """The rule after one step that saw these clean logits, and what its attack climbs."""
    rule = started(rule, **settings)
    climb = rule.inner_loss(lambda image: logits, BATCH, LABEL)
    return rule, climb


@pytest.mark.parametrize("kind", [TE, TRADESTE])
@pytest.mark.parametrize(("k", "weight"), [(10, 30.0), (100, 3.0)])
def test_the_scale_is_the_references_300_times_a_mean_over_samples_and_classes(kind, k, weight):
    assert weight_from_reference(k) == weight
    label = torch.arange(6)
    first, later, predicted = torch.randn(3, 6, k, generator=stream(0, "golden"))
    rule = started(kind(weight=weight), labels=label, k=k)
    batch = batch_of(torch.zeros(6, 1, 2, 2), label)
    for logits in (first, later):
        rule.inner_loss(lambda image, logits=logits: logits, batch, label)
    a, b = softmax(first.double().numpy(), axis=1), softmax(later.double().numpy(), axis=1)
    ensemble = 0.9 * 0.1 * a + 0.1 * b
    ensemble /= ensemble.sum(axis=1, keepdims=True)
    reference = 300 * ((softmax(predicted.double().numpy(), axis=1) - ensemble) ** 2).mean()
    assert rule.pull(predicted, batch).item() == pytest.approx(reference, rel=1e-5)


def test_the_weight_follows_the_references_ramp_epoch_by_epoch():
    """Epochs counted from one, constant within an epoch, 0.0067 of the weight already in the first."""
    rule = started(TE())
    seen = []
    for epoch in range(200):
        rule.advance(epoch)
        first = rule.scale.item()
        rule.advance(epoch + 0.99)
        assert rule.scale.item() == first
        assert rule.phase(epoch) == ("ensemble" if first > 0 else "base")
        seen.append(first)
    expected = [
        0.0 if e < 90 else 30 * math.exp(-5 * (1 - (min(e, 150) - 90) / 60) ** 2) for e in range(1, 201)
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert seen[88] == 0
    assert seen[89] == pytest.approx(30 * math.exp(-5))
    assert seen[149] == seen[199] == 30


def test_the_ramp_keeps_its_fractions_in_runs_of_other_lengths():
    rule = started(TE(), epochs=36)
    assert [rule.phase(e) for e in (15, 16)] == ["base", "ensemble"]  # 16.2 of 36: epoch 17
    assert ramp(5, 5, 9) == pytest.approx(math.exp(-5))
    assert ramp(9, 5, 9) == ramp(1e9, 5, 9) == 1


def test_one_prediction_is_its_own_ensemble_and_several_are_a_bias_corrected_average():
    rule = started(TE(alpha=0.7))
    table = np.zeros((B, K))
    for step in range(6):
        logits = torch.randn(B, K, generator=stream(0, "many", step=step))
        rule.inner_loss(lambda image, logits=logits: logits, BATCH, LABEL)
        now = softmax(logits.double().numpy(), axis=1)
        table = 0.7 * table + 0.3 * now
        expected = table / (1 - 0.7 ** (step + 1))
        np.testing.assert_allclose(rule.ensemble(BATCH.index), expected, atol=1e-6)
        if step == 0:
            np.testing.assert_allclose(rule.ensemble(BATCH.index), now, atol=1e-6)


def test_only_the_rows_of_the_batch_move():
    rule = started(TE(), labels=torch.arange(20) % K)
    rule.inner_loss(lambda image: CLEAN, BATCH, LABEL)
    assert (rule.memory[:B].sum(1) > 0).all()
    assert (rule.memory[B:] == 0).all()


@pytest.mark.parametrize("kind", [TE, TRADESTE])
def test_the_memory_sees_the_clean_images_only_and_once(kind):
    """A step in the order of training, with a network that answers differently everywhere."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, K))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(K, 4, generator=stream(0, "w")))
    rule = started(kind())
    climb = rule.inner_loss(net, BATCH, LABEL)
    after = rule.memory.clone()
    np.testing.assert_allclose(after, 0.1 * net(IMAGE).softmax(1).detach(), atol=1e-7)
    elsewhere = (IMAGE + 0.3).clamp(0, 1)
    for _ in range(2):  # an attack step and an update, also at perturbed weights
        climb(net(elsewhere))
        seen = rule.predict(net, IMAGE, elsewhere)
        rule.outer_loss(seen, BATCH, BELIEF)
    assert torch.equal(rule.memory, after)


class Perturbing(WeightRule):
    """Asks for a second look at the same weights, as AWP does at others."""

    passes = 2

    def perturbs(self, phase):
        return True


@pytest.mark.parametrize("kind", [TE, TRADESTE])
@pytest.mark.parametrize("weight", [WeightRule, Perturbing])
def test_every_row_moves_once_an_epoch_also_where_weights_are_perturbed(make_trainer, kind, weight):
    trainer = make_trainer(
        Hard(), kind(ramp_start=0.4), weight(), optim=OptimSettings(epochs=5, batch_size=16)
    )
    trainer.fit()
    sums = trainer.recipe.objective.memory.sum(1)  # epochs 2 to 5
    torch.testing.assert_close(sums, torch.full((48,), 1 - 0.9**4))


def test_pgd_at_with_te_against_numpy_in_the_attack_and_in_the_loss():
    earlier = torch.randn(B, K, generator=stream(1, "z"))
    rule, _ = remembering(TE(weight=7.0), logits=earlier)
    rule.advance(119.0)  # epoch 120: half way up the ramp
    climb = rule.inner_loss(lambda image: CLEAN, BATCH, LABEL)
    table = 0.09 * softmax(earlier.double().numpy(), axis=1) + 0.1 * P
    ensemble = table / table.sum(1, keepdims=True)
    w = 7 * math.exp(-5 * 0.25)
    distance = ((Q - ensemble) ** 2).sum(1)
    log_q = log_softmax(ADVERSARIAL.double().numpy(), axis=1)
    np.testing.assert_allclose(climb(ADVERSARIAL), -log_q[np.arange(B), LABEL] + w * distance, rtol=1e-5)
    total = rule.outer_loss(Predictions(ADVERSARIAL), BATCH, BELIEF)
    assert total.item() == pytest.approx(-(TARGET * log_q).sum(1).mean() + w * distance.mean(), rel=1e-5)


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_trades_with_te_against_numpy_in_the_attack_and_in_the_loss(branch):
    earlier = torch.randn(B, K, generator=stream(1, "z"))
    rule, _ = remembering(TRADESTE(beta=4.0, branch=branch, weight=7.0), logits=earlier)
    climb = rule.inner_loss(lambda image: CLEAN, BATCH, LABEL)
    table = 0.09 * softmax(earlier.double().numpy(), axis=1) + 0.1 * P
    ensemble = table / table.sum(1, keepdims=True)
    divergence = rel_entr(P, Q).sum(1)
    np.testing.assert_allclose(
        climb(ADVERSARIAL), 4 * divergence + 7 * ((Q - ensemble) ** 2).sum(1), rtol=1e-4
    )
    cross_entropy = -(TARGET * log_softmax(CLEAN.double().numpy(), axis=1)).sum(1)
    pulled = P if branch == "clean" else Q
    expected = cross_entropy + 4 * divergence + 7 * ((pulled - ensemble) ** 2).sum(1)
    total = rule.outer_loss(Predictions(ADVERSARIAL, CLEAN), BATCH, BELIEF)
    assert total.item() == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("kind", [TE, TRADESTE])
def test_gradients_against_a_naive_float64_rendering(kind):
    rule, _ = remembering(kind(), logits=torch.randn(B, K, generator=stream(1, "z")))
    ensemble = rule.ensemble(BATCH.index).double()
    double = [CLEAN.double().requires_grad_(True), ADVERSARIAL.double().requires_grad_(True)]
    p, q = (z.softmax(1) for z in double)
    target = torch.tensor(TARGET)
    if kind is TE:
        naive = -(target * q.log()).sum(1) + 30 * ((q - ensemble) ** 2).sum(1)
    else:
        naive = (
            -(target * p.log()).sum(1) + 6 * (p * (p / q).log()).sum(1) + 30 * ((p - ensemble) ** 2).sum(1)
        )
    theirs = torch.autograd.grad(naive.mean(), double, materialize_grads=True)
    single = [CLEAN.clone().requires_grad_(True), ADVERSARIAL.clone().requires_grad_(True)]
    total = rule.outer_loss(Predictions(single[1], single[0]), BATCH, BELIEF)
    ours = torch.autograd.grad(total, single, materialize_grads=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "base"), [(TE, PGDAT), (TRADESTE, TRADES)])
def test_before_the_ramp_it_is_the_base_objective_to_the_bit(kind, base):
    rule = started(kind(), epoch=88.9)
    seen = Predictions(ADVERSARIAL, CLEAN)
    climbs = [goal.inner_loss(lambda image: CLEAN, BATCH, LABEL) for goal in (rule, base())]
    assert torch.equal(*[climb(ADVERSARIAL) for climb in climbs])
    assert torch.equal(*[goal.outer_loss(seen, BATCH, BELIEF) for goal in (rule, base())])
    assert (rule.memory == 0).all()


@pytest.mark.parametrize(("kind", "per_step"), [(TE, 1), (TRADESTE, 2)])
def test_the_memorys_forward_uses_running_statistics_and_leaves_them(make_trainer, kind, per_step):
    trainer = make_trainer(Hard(), kind(ramp_start=0.0), optim=OptimSettings(epochs=1, batch_size=16))
    modes = []
    remember = trainer.recipe.objective.remember
    trainer.recipe.objective.remember = lambda *given: (
        modes.append(any(m.training for m in trainer.net.modules())) or remember(*given)
    )
    trainer.fit()
    assert modes == 3 * [False]
    assert int(trainer.net[1].num_batches_tracked) == 3 * per_step


def test_the_attacks_start_as_the_references_do(make_trainer):
    assert make_trainer(Hard(), TE(), folder="a").step.attack.start == "uniform-unclipped"
    assert make_trainer(Hard(), TRADESTE(), folder="b").step.attack.start == "gaussian"


@pytest.mark.parametrize("kind", [TE, TRADESTE])
def test_the_memory_survives_a_round_trip_in_place(kind):
    first, _ = remembering(kind())
    second = started(kind())
    table = second.memory
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    assert second.memory is table
    assert torch.equal(table, first.memory)
    assert table.sum() > 0


@pytest.mark.parametrize("kind", [TE, TRADESTE])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"weight": -1.0}, "weight"),
        ({"alpha": 1.0}, "alpha"),
        ({"ramp_start": -0.1}, "ramp_start"),
        ({"ramp_start": 0.5, "ramp_end": 0.5}, "ramp_end"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, name):
    with pytest.raises(SettingError, match=rf"objective\.{name}"):
        kind(**settings)


def test_an_unknown_branch_is_refused():
    with pytest.raises(SettingError, match=r"objective\.branch"):
        TRADESTE(branch="both")


@pytest.mark.parametrize("kind", [TE, TRADESTE])
def test_images_that_are_mixed_have_no_past(kind):
    assert not kind.mixes
