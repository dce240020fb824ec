from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from softdefend.attacks import APGD, PGD, TargetedAPGD, cross_entropy, dlr, margin, targeted_dlr
from softdefend.attacks.apgd import checkpoints
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel

ATTACKS = [APGD(steps=30), APGD(steps=30, loss="dlr"), TargetedAPGD(steps=30)]
attacks = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def network(k: int, shape: tuple[int, ...] = (1, 3, 3), hidden: int = 0, scale: float = 1.0) -> nn.Sequential:
    """Linear, or with one hidden layer; the same weights every time."""
    inputs = int(np.prod(shape))
    layers = (
        [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, k)] if hidden else [nn.Linear(inputs, k)]
    )
    net = nn.Sequential(nn.Flatten(), *layers).requires_grad_(False)
    for number, parameter in enumerate(net.parameters()):
        fan = parameter.shape[-1] ** 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=stream(k, "w", number)) / fan)
    net[1].weight.mul_(scale)
    net[1].bias.copy_(-0.5 * net[1].weight.sum(1))  # gray is undecided
    return net


def images(n: int, shape: tuple[int, ...] = (1, 3, 3), seed: int = 0) -> torch.Tensor:
    """Away from 0 and 1, so that a small ball is not cut."""
    return 0.3 + 0.4 * torch.rand(n, *shape, generator=stream(seed, "x"))


def run(attack, net, image, label, threat, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return attack(net, image, label, threat, generator=generator, **options).detach()


# --- what the attack finds ---------------------------------------------------------------------------------


def certified(
    net: nn.Sequential, image: torch.Tensor, label: torch.Tensor, threat: ThreatModel
) -> torch.Tensor:
    """The largest margin over the ball of a linear network, [b]; the image is robust where it is negative."""
    slope = net[1].weight[None] - net[1].weight[label][:, None]
    dual = slope.abs().sum(2) if threat.norm == "linf" else slope.norm(dim=2)
    logits = net(image)
    worst = logits - logits.gather(1, label[:, None]) + float(threat.eps) * dual
    return worst.scatter(1, label[:, None], -torch.inf).amax(1)


@norms
@attacks
def test_two_classes_reach_the_closed_form_optimum(attack, norm):
    """Exactly the images whose optimum is wrong are fooled; the others end at their optimum."""
    net, image, threat = network(2), images(80), ThreatModel(norm, Budget({"linf": 0.03, "l2": 0.08}[norm]))
    label = net(image).argmax(1)
    optimum = certified(net, image, label, threat)
    reached = margin(net(run(attack, net, image, label, threat)), label)
    robust = optimum < 0
    assert 10 < robust.sum() < 70
    assert optimum.abs().min() > 1e-4
    assert torch.equal(reached < 0, robust)
    torch.testing.assert_close(reached[robust], optimum[robust], atol=1e-3, rtol=0)


@norms
@pytest.mark.parametrize("k", [3, 4, 7])
def test_targets_decide_every_image_of_a_linear_network(k, norm):
    net, image, threat = network(k), images(120), ThreatModel(norm, Budget({"linf": 0.03, "l2": 0.08}[norm]))
    label = net(image).argmax(1)
    optimum = certified(net, image, label, threat)
    right = net(run(TargetedAPGD(), net, image, label, threat)).argmax(1) == label
    clear = optimum.abs() > 1e-4
    assert clear.float().mean() > 0.95
    assert 20 < right.sum() < 100
    assert torch.equal(right[clear], optimum[clear] < 0)


def plainly(net, image, label, eps, norm, steps, noise, rho=0.75) -> tuple[torch.Tensor, bool]:
    """Auto-PGD on the cross-entropy of one image [c, h, w], line by line (Algorithm 1), until the network is
    fooled. Losses are kept in a list, as the conditions of section 3.1 are written. Also returned: whether
    two losses that were compared are equal up to rounding."""

    def look(point):
        point = point.clone().requires_grad_(True)
        logits = net(point[None])
        loss = nn.functional.cross_entropy(logits, label[None])
        (slope,) = torch.autograd.grad(loss, point)
        return loss.item(), slope, logits.argmax() != label

    def project(point):
        delta = point - image
        if norm == "linf":
            return (image + delta.clamp(-eps, eps)).clamp(0, 1)
        return (image + delta * min(1.0, eps / max(float(delta.norm()), 1e-12))).clamp(0, 1)

    size = noise.abs().max() if norm == "linf" else noise.norm()
    point = (image + eps * noise / size).clamp(0, 1)
    loss, slope, wrong = look(point)
    best = best_before = loss
    best_point, best_slope, last_point = point, slope, point
    step, halved, since, losses, tied = 2 * eps, True, 0, [0.0], False
    for number in range(1, steps + 1):
        if wrong:
            return point, tied
        target = project(point + step * (slope.sign() if norm == "linf" else slope / slope.norm()))
        share = 1.0 if number == 1 else 0.75
        last_point, point = (
            point,
            project(point + share * (target - point) + (1 - share) * (point - last_point)),
        )
        loss, slope, wrong = look(point)
        tied = tied or min(abs(loss - best), abs(loss - losses[-1])) < 1e-13
        losses.append(loss)
        if loss > best:
            best, best_point, best_slope = loss, point, slope
        if number in {4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}:  # the schedule of 20 steps
            window = losses[since:]
            ups = sum(b > a for a, b in pairwise(window))
            condition = ups <= rho * (number - since) or (not halved and best_before == best)
            if condition and not wrong:
                point, slope = best_point, best_slope
            step = step / 2 if condition else step
            halved, best_before, since = condition, best, number
    return point if wrong else best_point, tied


@norms
def test_iterates_are_those_of_the_paper(norm):
    """Against a plain version for one image at a time, in float64."""
    net = network(5, hidden=40, scale=20).double()
    image, threat = images(60).double(), ThreatModel(norm, Budget({"linf": 0.05, "l2": 0.12}[norm]))
    label = net(image).argmax(1)
    attack, generator = APGD(steps=20), torch.Generator().manual_seed(4)
    found = attack(net, image, label, threat, generator=generator)
    torch.manual_seed(4)
    noise = 2 * torch.rand(image.shape) - 1 if norm == "linf" else torch.randn(image.shape)
    plain, tied = zip(
        *(
            plainly(net, *pair, float(threat.eps), norm, 20, t.double())
            for *pair, t in zip(image, label, noise, strict=True)
        ),
        strict=True,
    )
    fooled = net(found).argmax(1) != label
    assert 5 < fooled.sum() < 55
    # Which of two equal losses is the larger one differs between processors, and from there on the path.
    apart = (found - torch.stack(plain)).abs().flatten(1).amax(1) > 1e-9
    assert torch.tensor(tied)[apart].all()
    assert apart.sum() <= 3


@norms
def test_beats_pgd_of_equal_steps_on_a_rugged_network(norm):
    net, image, threat = network(5, hidden=60, scale=15), images(200), ThreatModel(norm, Budget("0.1"))
    label = net(image).argmax(1)

    def loss(attack):
        adversarial = run(attack, net, image, label, threat, loss=lambda logits: cross_entropy(logits, label))
        return cross_entropy(net(adversarial), label)

    ours, pgd = loss(APGD(steps=20)), loss(PGD(steps=20, keep="best"))
    assert ours.mean() > pgd.mean()
    assert (ours >= pgd).float().mean() > 0.6


def test_more_restarts_never_fool_fewer():
    net, image, threat = network(5, hidden=60, scale=15), images(200), ThreatModel("linf", Budget("0.02"))
    label = net(image).argmax(1)
    robust = [
        net(run(APGD(steps=5, restarts=restarts), net, image, label, threat)).argmax(1) == label
        for restarts in (1, 6)
    ]
    assert (robust[1] <= robust[0]).all()
    assert robust[1].sum() < robust[0].sum()


def test_gradients_are_averaged_over_forwards_and_the_last_one_decides():
    """A network that adds another slope at each forward; the first move follows the mean of them."""
    slopes = [3.0, -1.0, -1.0]  # the mean points up, the last one down
    image, label = torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.int64)
    calls, seen = [], []

    def forward(x):
        seen.append(x.detach().clone())
        slope = slopes[len(calls) % 3] if x.requires_grad else 0.0
        calls.append(x.requires_grad)
        margin = slope * x.flatten(1)[:, 0] - 10
        if not x.requires_grad:
            calls.clear()
        return torch.stack([-margin, margin], dim=1)

    for eot, up in ((3, True), (1, True)):
        calls.clear(), seen.clear()
        run(APGD(steps=2, loss="dlr", eot=eot), forward, image, label, ThreatModel("linf", Budget("0.1")))
        start, first = seen[1], seen[1 + eot]
        assert len(seen) == 1 + 2 * eot + 1  # clean, start and one step, and a last look without gradient
        assert (first[start < 0.6] > start[start < 0.6]).all() == up
    slopes[:] = [1.0, -3.0, 1.0]
    calls.clear(), seen.clear()
    run(APGD(steps=2, loss="dlr", eot=3), forward, image, label, ThreatModel("linf", Budget("0.1")))
    assert (seen[4] <= 0.5).all()
    assert APGD(eot=20).name == "apgd-ce-eot20"
    assert APGD(steps=50, restarts=2, loss="dlr", eot=5).name == "apgd-dlr-50x2-eot5"


def test_averaging_changes_nothing_where_nothing_is_random():
    net, image, threat = network(5, hidden=40, scale=6), images(30), ThreatModel("linf", Budget("0.02"))
    label, counted = net(image).argmax(1), Counted(net)
    once = run(APGD(steps=12), net, image, label, threat)
    # Four equal gradients have exactly their own mean.
    assert torch.equal(run(APGD(steps=12, eot=4), counted, image, label, threat), once)


# --- what it never does ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([APGD(steps=7), APGD(steps=1, loss="dlr"), TargetedAPGD(steps=4, targets=2)]),
    st.sampled_from(["linf", "l2"]),
    st.floats(1e-4, 1.0),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    st.integers(2, 6),
    st.integers(0, 1000),
)
def test_stays_in_the_ball_and_in_the_box(attack, norm, eps, shape, k, seed):
    """Any shape, any number of classes; images reach 0 and 1."""
    net, threat = network(k, shape, hidden=8, scale=5), ThreatModel(norm, Budget(eps))
    image = (1.4 * torch.rand(5, *shape, generator=stream(seed, "x")) - 0.2).clamp(0, 1)
    label = torch.randint(k, (5,), generator=stream(seed, "y"))
    adversarial = run(attack, net, image, label, threat, seed)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (threat.distance(image, adversarial) <= eps * (1 + 1e-5) + 1e-7).all()


@norms
@pytest.mark.parametrize("attack", [*ATTACKS[:2], TargetedAPGD(steps=30, targets=1)], ids=lambda a: a.name)
def test_a_sample_does_not_feel_its_batch(attack, norm):
    """With the same noise; later targets draw theirs for those who are left, so here there is one."""
    net, threat = network(5, hidden=40, scale=6), ThreatModel(norm, Budget({"linf": 0.02, "l2": 0.06}[norm]))
    image, other = images(8), images(8, seed=1)
    mixed = torch.cat([image[:4], other[4:]])
    whole, part = (run(attack, net, x, net(x).argmax(1), threat) for x in (image, mixed))
    torch.testing.assert_close(whole[:4], part[:4])
    assert not torch.allclose(whole[4:], part[4:])


@attacks
def test_images_wrong_from_the_outset_come_back_and_cost_one_forward(attack):
    net, image = network(5), images(6)
    label = (net(image).argmax(1) + 1) % 5
    counted = Counted(net)
    assert torch.equal(run(attack, counted, image, label, ThreatModel()), image)
    assert (counted.forwards, counted.backwards) == (6, 0)


class Counted:
    """A forward that remembers what it saw."""

    def __init__(self, net) -> None:
        self.net, self.forwards, self.backwards, self.seen = net, 0, 0, []

    def __call__(self, image):
        self.forwards += len(image)
        self.backwards += len(image) * image.requires_grad
        self.seen.append(image.detach().clone())
        return self.net(image)


@pytest.mark.parametrize(("attack", "searches"), [(APGD(steps=9, restarts=2), 2), (TargetedAPGD(steps=9), 4)])
def test_cost_of_robust_images(attack, searches):
    """Clean once; per search the start and the steps, of which the last needs no gradient."""
    net, image = network(5), images(6)
    counted = Counted(net)
    run(attack, counted, image, net(image).argmax(1), ThreatModel("linf", Budget("1e-4")))
    assert counted.forwards == 6 * (1 + searches * 10)
    assert counted.backwards == 6 * searches * 9


def test_later_targets_see_only_who_is_left():
    net, image, threat = network(5), images(60), ThreatModel("linf", Budget("0.03"))
    label = net(image).argmax(1)
    counted, first = Counted(net), TargetedAPGD(steps=9, targets=1)
    left = int((net(run(first, net, image, label, threat)).argmax(1) == label).sum())
    run(TargetedAPGD(steps=9, targets=2), counted, image, label, threat)
    sizes = [len(x) for x in counted.seen]
    assert 0 < left < 60
    assert sizes[:2] == [60, 60]
    assert sizes[2:11] == sorted(sizes[2:11], reverse=True)  # who fell is dropped at the next packing
    assert sizes[10] < sizes[2]
    assert sizes[11] == left
    assert sizes[12:] == sorted(sizes[12:], reverse=True)


def test_images_that_fell_are_dropped_soon():
    """Images in groups that fall at steps 3, 8 and 16: each costs at most a quarter more than it needs."""
    image, label, step = torch.full((9, 1, 2, 2), 0.5), torch.zeros(9, dtype=torch.int64), [-2]
    falls = {0.5: 3, 0.6: 8, 0.7: 16}
    image[3:6], image[6:] = 0.6, 0.7
    seen = dict.fromkeys(falls, 0)

    def forward(x):
        step[0] += 1  # the clean forward is number -1, the start 0
        logits = x.flatten(1)[:, :2] * 0
        for row, point in enumerate(x.detach().flatten(1).mean(1).tolist()):
            group = min(falls, key=lambda center: abs(center - point))
            seen[group] += 1
            logits[row, int(step[0] >= falls[group])] += 1
        return logits

    APGD(steps=30)(forward, image, label, ThreatModel("linf", Budget("0.01")))
    # clean, start and the steps up to the packing that follows the fall: 3, 8, 18
    assert seen == {0.5: 3 * (2 + 3), 0.6: 3 * (2 + 8), 0.7: 3 * (2 + 18)}


@norms
def test_the_start_is_the_generators_noise_stretched_to_the_ball(norm):
    net, image, threat = network(5, (2, 3, 4)), images(4, (2, 3, 4)), ThreatModel(norm, Budget("0.1"))
    counted = Counted(net)
    run(APGD(steps=1), counted, image, net(image).argmax(1), threat, seed=7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = (2 * torch.rand(4, 2, 3, 4) - 1 if norm == "linf" else torch.randn(4, 2, 3, 4)).numpy()
    size = (
        np.abs(noise).reshape(4, -1).max(1)
        if norm == "linf"
        else np.linalg.norm(noise.reshape(4, -1), axis=1)
    )
    np.testing.assert_allclose(
        counted.seen[1], image.numpy() + 0.1 * noise / size[:, None, None, None], atol=1e-6
    )


class HostReads(TorchDispatchMode):
    """Counts operators whose result decides a number or a shape on the host: a synchronisation on a GPU."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAIT:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@norms
@pytest.mark.parametrize(
    ("attack", "searches"),
    [(APGD(steps=30), 1), (APGD(steps=30, loss="dlr"), 1), (TargetedAPGD(steps=30), 4)],
)
def test_the_host_reads_at_packings_only(attack, searches, norm):
    """Once per search, and after the start and steps 1 to 8, 10, 12, 15, 18, 22, 27 and 30."""
    net, image = network(5), images(6)
    label, threat = net(image).argmax(1), ThreatModel(norm, Budget("1e-4"))
    with HostReads() as reads:
        run(attack, net, image, label, threat)
    assert reads.count == {"nonzero": searches * (1 + 9 + 7)}


def test_parameters_get_no_gradient_and_modes_stay():
    net, image = network(5).train().requires_grad_(True), images(6)
    for attack in ATTACKS:
        run(attack, net, image, torch.arange(6) % 5, ThreatModel())
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# --- odd networks ------------------------------------------------------------------------------------------


@norms
@attacks
def test_flat_networks_give_an_allowed_image(attack, norm):
    """No gradient anywhere: the result is some point of the ball, without NaN."""
    image, label = images(4), torch.zeros(4, dtype=torch.int64)
    bias = torch.tensor([3.0, 1.0, 0.0, -1.0, -2.0])
    adversarial = run(
        attack, lambda x: 0 * x.flatten(1)[:, :5] + bias, image, label, ThreatModel(norm, Budget("0.1"))
    )
    assert adversarial.isfinite().all()
    assert (ThreatModel(norm).distance(image, adversarial) <= 0.1 + 1e-6).all()


@norms
@attacks
def test_pixels_without_a_gradient_do_not_poison_the_image(attack, norm):
    """The square root's slope at 0 is infinite, and 0 times that is NaN; one pixel suffers from it."""
    net, image = network(5), images(40)
    threat = ThreatModel(norm, Budget({"linf": 0.03, "l2": 0.08}[norm]))
    image[:, 0, 0, 0] = 0

    def forward(x):
        return net(x) + 0 * x[:, :, 0, 0].sqrt()

    label = forward(image).argmax(1)
    adversarial = run(attack, forward, image, label, threat)
    assert adversarial.isfinite().all()
    assert 0 < (forward(adversarial).argmax(1) == label).sum() < 40


def test_soft_targets_that_are_one_hot_attack_as_labels_do():
    net, image, threat = network(5, hidden=40, scale=6), images(20), ThreatModel("linf", Budget("0.03"))
    label = net(image).argmax(1)
    for attack in ATTACKS:
        soft = run(attack, net, image, nn.functional.one_hot(label, 5).float(), threat)
        assert torch.allclose(run(attack, net, image, label, threat), soft)


@attacks
def test_a_given_loss_is_climbed_to_its_end_whatever_the_verdict(attack):
    """Minus the cross-entropy of wrong labels and right ones alike ends at the least harmful corner."""
    net, image, threat = network(2), images(20), ThreatModel("linf", Budget("0.1"))
    label = torch.arange(20) % 2
    adversarial = run(attack, net, image, label, threat, loss=lambda logits: -cross_entropy(logits, label))
    dual = (net[1].weight[1 - label] - net[1].weight[label]).abs().sum(1)
    torch.testing.assert_close(
        margin(net(adversarial), label), margin(net(image), label) - 0.1 * dual, atol=1e-3, rtol=0
    )


# --- its parts ---------------------------------------------------------------------------------------------

LOGITS = 3 * torch.randn(9, 6, generator=stream(0, "z"), dtype=torch.float64)
LABEL = torch.cat([LOGITS.argmax(1)[:5], torch.tensor([0, 1, 2, 3])])
AIM = (LABEL + torch.arange(1, 6).repeat(2)[:9]) % 6


def test_dlr_is_the_papers_ratio():
    expected, aimed = [], []
    for z, y, t in zip(LOGITS.tolist(), LABEL.tolist(), AIM.tolist(), strict=True):
        down = sorted(z, reverse=True)
        expected.append(-(z[y] - max(z[:y] + z[y + 1 :])) / (down[0] - down[2]))
        aimed.append(-(z[y] - z[t]) / (down[0] - (down[2] + down[3]) / 2))
    np.testing.assert_allclose(dlr(LOGITS, LABEL), expected)
    np.testing.assert_allclose(targeted_dlr(LOGITS, LABEL, AIM), aimed)


def test_dlr_forgets_scale_and_shift_and_its_sign_is_the_verdict():
    np.testing.assert_allclose(dlr(100 * LOGITS - 7, LABEL), dlr(LOGITS, LABEL))
    np.testing.assert_allclose(targeted_dlr(100 * LOGITS - 7, LABEL, AIM), targeted_dlr(LOGITS, LABEL, AIM))
    assert torch.equal(dlr(LOGITS, LABEL) > 0, LOGITS.argmax(1) != LABEL)


def test_dlr_of_few_classes_is_a_difference_of_logits():
    two, three = LOGITS[:, :2], LOGITS[:, :3]
    label, aim = LABEL % 2, 1 - LABEL % 2
    np.testing.assert_allclose(dlr(two, label), [z[1 - y] - z[y] for z, y in zip(two, label, strict=True)])
    np.testing.assert_allclose(
        targeted_dlr(three, label, aim), [z[1 - y] - z[y] for z, y in zip(three, label, strict=True)]
    )


def test_equal_logits_have_finite_losses():
    flat = torch.zeros(2, 5, requires_grad=True)
    label, aim = torch.tensor([0, 1]), torch.tensor([1, 2])
    (dlr(flat, label) + targeted_dlr(flat, label, aim)).sum().backward()
    assert flat.grad.isfinite().all()


def test_checkpoints_are_the_papers():
    """p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 (section 3.1)."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 33, 250])
def test_checkpoints_of_other_lengths(steps):
    found = checkpoints(steps)
    gaps = np.diff([0, *found])
    assert found[0] == max(int(0.22 * steps), 1)
    assert (gaps >= max(int(0.06 * steps), 1)).all()
    assert (np.diff(gaps) <= 0).all()
    assert steps - gaps[-1] < found[-1] <= steps


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("apgd-ce", APGD()),
        ("apgd-dlr", APGD(loss="dlr")),
        ("apgd-t", TargetedAPGD()),
        ("apgd-ce-100x5", APGD(restarts=5)),
        ("apgd-dlr-50", APGD(loss="dlr", steps=50)),
        ("apgd-t-20x2", TargetedAPGD(steps=20, restarts=2)),
        ("apgd-ce-eot20", APGD(eot=20)),
        ("apgd-dlr-50x2-eot5", APGD(loss="dlr", steps=50, restarts=2, eot=5)),
    ],
)
def test_names_round_trip(name, attack):
    assert parse_attack(name) == attack
    assert attack.name == name


@pytest.mark.parametrize("name", ["apgd", "apgd-kl", "apgd-100", "APGD-CE", "apgd-ce-0", "apgd-t-10x0"])
def test_other_names_are_refused(name):
    with pytest.raises(SettingError, match=r"attacks|attack\.(steps|restarts)"):
        parse_attack(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"restarts": 0},
        {"eot": 0},
        {"rho": 0},
        {"rho": 1.1},
        {"rho": float("nan")},
        {"loss": "mse"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"attack.{next(iter(wrong))}"):
        APGD(**wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"restarts": 0}, {"rho": -1}, {"targets": 0}])
def test_impossible_settings_of_the_targeted_attack_are_refused(wrong):
    with pytest.raises(SettingError, match=f"attack.{next(iter(wrong))}"):
        TargetedAPGD(**wrong)
