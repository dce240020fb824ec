"""FAB against closed-form distances on linear networks, and its projection against SciPy's solvers."""

import minimal_tools
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from softdefend.attacks import FAB, cross_entropy
from softdefend.attacks.fab import to_hyperplane
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel

NORMS = ["linf", "l2"]


def rugged(shape, k=5, scale=1.0):
    """An untrained network with curved boundaries, in single precision."""
    return minimal_tools.rugged(shape, k, scale).float()


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=stream(seed, "x"))


@pytest.mark.parametrize("attack", [FAB(), FAB(targeted=False)], ids=lambda a: a.name)
@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("norm", NORMS)
def test_finds_the_closed_form_distance_of_a_linear_network(norm, k, attack):
    """The nearest of the hyperplanes between the label and the other classes; the box does not bind."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, k)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(k, 48, generator=stream(k, "w")))
    net[1].bias.zero_()
    image = 0.45 + 0.1 * images(20, (3, 4, 4))
    logits = net(image)
    label = logits.argmax(1)
    gap = logits.gather(1, label[:, None]) - logits
    slope = net[1].weight[label][:, None] - net[1].weight
    dual = slope.abs().sum(2) if norm == "linf" else slope.norm(dim=2)
    exact = (gap / dual).nan_to_num(torch.inf).scatter(1, label[:, None], torch.inf).amin(1)

    closest, distance = attack.minimal(net, image, label, norm)
    assert (distance >= exact * (1 - 1e-4)).all()
    torch.testing.assert_close(distance, exact, rtol=0.01, atol=1e-6)
    torch.testing.assert_close(distance, ThreatModel(norm).distance(image, closest))
    assert (net(closest).argmax(1) != label).all()

    ranked = exact.sort().values
    wide = (ranked[6:15] / ranked[5:14]).argmax()
    eps = (ranked[5:15][wide] * 1.02).item()  # the overshoot costs half a percent
    assert eps < ranked[5:15][wide + 1]
    adversarial = attack(net, image, label, ThreatModel(norm, Budget(eps)))
    near = exact <= eps
    assert torch.equal(net(adversarial).argmax(1) != label, near)
    assert torch.equal(adversarial[~near], image[~near])


def hyperplanes(seed, d=7):
    """Points, slopes and gaps: some zero slopes, pixels on the border, gaps that the box cannot close."""
    g = np.random.default_rng(seed)
    point = np.clip(g.uniform(-0.3, 1.3, d), 0, 1)
    slope = g.normal(size=d) * 10 ** g.uniform(-2, 2) * (g.random(d) > 0.2)
    lowest = np.minimum(-slope * point, slope * (1 - point)).sum()
    highest = np.maximum(-slope * point, slope * (1 - point)).sum()
    gap = -g.uniform(1.3 * lowest, 1.3 * highest)
    return point, slope, gap, lowest <= -gap <= highest


def scipy_distance(point, slope, gap, norm):
    """Shortest shift with slope @ shift = -gap inside the box."""
    bounds = list(zip(-point, 1 - point, strict=True))
    d = len(point)
    if norm == "linf":
        eye, one = np.eye(d), -np.ones((d, 1))
        solved = linprog(
            [0] * d + [1],
            A_ub=np.block([[eye, one], [-eye, one]]),
            b_ub=np.zeros(2 * d),
            A_eq=[[*slope, 0]],
            b_eq=[-gap],
            bounds=[*bounds, (0, None)],
        )
        assert solved.success
        return solved.fun
    size = np.abs(slope).max()
    solved = minimize(
        lambda z: z @ z,
        np.zeros(d),
        jac=lambda z: 2 * z,
        bounds=bounds,
        constraints={"type": "eq", "fun": lambda z: (slope @ z + gap) / size, "jac": lambda z: slope / size},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    return np.sqrt(solved.fun)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_against_scipy(norm):
    solved = 0
    for seed in range(150):
        point, slope, gap, feasible = hyperplanes(seed)
        given = (torch.tensor(x, dtype=torch.float64)[None] for x in (point, slope, gap))
        shift = to_hyperplane(*given, norm)[0].numpy()
        assert (point + shift >= -1e-12).all()
        assert (point + shift <= 1 + 1e-12).all()
        if feasible:
            solved += 1
            assert slope @ shift == pytest.approx(-gap, rel=1e-9, abs=1e-9)
            length = np.abs(shift).max() if norm == "linf" else np.linalg.norm(shift)
            assert length == pytest.approx(scipy_distance(point, slope, gap, norm), rel=1e-5, abs=1e-6)
        else:
            corner = np.where(slope * np.sign(gap) > 0, -point, 1 - point)
            np.testing.assert_allclose(shift, np.where(slope == 0, 0, corner), atol=1e-12)
    assert 50 < solved < 140


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_of_extremes_is_finite(norm, dtype):
    """No slope, slopes of every magnitude, no gap, a gap beyond every box."""
    magnitudes = torch.logspace(-40, 0, 41, dtype=dtype)
    slope = torch.stack(
        [torch.zeros(41, dtype=dtype), magnitudes, -magnitudes, magnitudes * 1e-6, magnitudes * 1e30]
    )
    for point in (0.0, 0.3, 1.0):
        for gap in (0.0, 1e-30, -1.0, 1e30):
            start = torch.full_like(slope, point)
            shift = to_hyperplane(start, slope, slope.new_full((5,), gap), norm)
            assert shift.isfinite().all()
            assert (shift[0] == 0).all()
            assert (start + shift >= -1e-6).all()
            assert (start + shift <= 1 + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_size_of_logits_does_not_matter(norm):
    image = images(20, (1, 6, 6))
    label = rugged((1, 6, 6))(image).argmax(1)
    attack = FAB(steps=20, targets=2)
    plain = attack.minimal(rugged((1, 6, 6)), image, label, norm)[1]
    tiny = attack.minimal(rugged((1, 6, 6), scale=1e-20), image, label, norm)[1]
    torch.testing.assert_close(tiny, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (3, 5, 9)])
@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 1e-4), ("linf", 0.05), ("linf", 1.0), ("l2", 0.3), ("l2", 20)]
)
def test_stays_in_the_ball_and_the_box(shape, norm, eps):
    net, image, threat = (
        rugged(shape, k=3),
        images(9, shape).round(decimals=1),
        ThreatModel(norm, Budget(eps)),
    )
    adversarial = FAB(steps=15)(net, image, net(image).argmax(1), threat)
    assert adversarial.shape == image.shape
    assert adversarial.dtype == image.dtype
    assert (threat.distance(image, adversarial) <= threat.eps).all()
    assert (adversarial >= 0).all()
    assert (adversarial <= 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_breaks_the_same_images_for_less(norm):
    """Also what other images are in the batch, and in which order, changes nothing."""
    net, image = rugged((1, 6, 6)).double(), images(40, (1, 6, 6)).double()
    label, eps = net(image).argmax(1), 0.02 if norm == "linf" else 0.1
    seen = []

    def counted(x):
        seen.append(len(x))
        return net(x)

    attack = FAB(steps=30, targets=4)
    _, distance = attack.minimal(counted, image, label, norm)
    whole, near = sum(seen), distance <= eps
    assert 5 < near.sum() < 35
    seen.clear()
    order = torch.randperm(40, generator=stream(0, "o"))
    adversarial = attack(counted, image[order], label[order], ThreatModel(norm, Budget(eps)))
    assert torch.equal(net(adversarial).argmax(1) != label[order], near[order])
    assert sum(seen) < whole - 4 * 30 * near.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_targets_never_move_the_closest_away(norm):
    net, image = rugged((1, 6, 6)).double(), images(30, (1, 6, 6)).double()
    label = net(image).argmax(1)
    found = [
        FAB(steps=s, targets=t).minimal(net, image, label, norm)[1] for s, t in ((5, 1), (40, 1), (40, 4))
    ]
    assert (found[1] <= found[0]).all()
    assert (found[2] <= found[1]).all()
    assert (found[2] < found[0]).any()


def test_images_that_are_wrong_and_images_that_cannot_be():
    image = images(6, (1, 3, 3))
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).requires_grad_(False)
    net[1].bias.copy_(torch.tensor([1e3, 0, 0]))
    closest, distance = FAB(steps=5).minimal(net, image, torch.tensor([0, 0, 0, 1, 2, 1]), "l2")
    assert torch.equal(closest, image)
    assert distance.tolist() == [torch.inf] * 3 + [0] * 3
    assert torch.equal(FAB(steps=5)(net, image, torch.tensor([0, 0, 0, 1, 2, 1]), ThreatModel()), image)


def test_parameters_get_no_gradient_and_probabilities_name_the_class():
    net, image = rugged((1, 6, 6)).requires_grad_(True), images(10, (1, 6, 6))
    label, attack = net(image).argmax(1), FAB(steps=5)
    hard = attack(net, image, label, ThreatModel())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not hard.requires_grad
    assert torch.equal(attack(net, image, 0.9 * nn.functional.one_hot(label, 5) + 0.02, ThreatModel()), hard)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [True, False])
def test_restarts_begin_half_of_eps_away_and_never_find_less(norm, targeted):
    net, image = rugged((1, 6, 6)).double(), images(30, (1, 6, 6)).double().clamp(0.2, 0.8)
    label, eps = net(image).argmax(1), 0.015 if norm == "linf" else 0.08
    threat, seen = ThreatModel(norm, Budget(eps)), []

    def watched(x):
        seen.append(x.detach().clone())
        return net(x)

    def fooled(attack, forward=net):
        found = attack(forward, image, label, threat, generator=stream(0, "f"))
        assert (threat.distance(image, found) <= eps).all()
        return net(found).argmax(1) != label

    once = fooled(FAB(steps=4, targets=1, targeted=targeted))
    often = fooled(FAB(steps=4, targets=1, targeted=targeted, restarts=6))
    assert (often >= once).all()
    fooled(FAB(steps=1, targets=1, targeted=targeted, restarts=2), watched)
    # clean, the first search's two forwards, and then the second's start for those who were left
    start = seen[3]
    nearest = torch.stack([(image - x).flatten(1).abs().amax(1).argmin() for x in start])
    assert len(nearest.unique()) == len(start) > 20
    lengths = threat.distance(image[nearest], start)
    torch.testing.assert_close(lengths, torch.full_like(lengths, eps / 2))
    assert 0.4 < (start > image[nearest]).double().mean() < 0.6


@pytest.mark.parametrize("norm", NORMS)
def test_untargeted_search_steps_to_the_closest_boundary_of_all(norm):
    """Against the gradients of all differences of logits, one by one."""
    net, image = rugged((1, 6, 6)).double(), images(80, (1, 6, 6)).double()
    label, seen, free = net(image).argmax(1), [], 0

    def watched(x):
        seen.append(x.detach().clone())
        return net(x)

    FAB(steps=1, targeted=False, alpha_max=0, eta=1)(watched, image, label, ThreatModel(norm, Budget(1e-6)))
    for x, y, moved in zip(image, label, seen[2], strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda p: net(p[None])[0], x).flatten(1)
        others = [i for i in range(5) if i != y]
        gaps = torch.stack([net(x[None])[0, i] - net(x[None])[0, y] for i in others])
        slopes = torch.stack([jacobian[i] - jacobian[y] for i in others])
        shortest = gaps.abs() / (slopes.norm(dim=1) if norm == "l2" else slopes.abs().sum(1))
        shift, nearest = (moved - x).flatten(), shortest.argmin()
        if bool((moved > 0).all() & (moved < 1).all()):  # the box does not bind
            size = shift.norm() if norm == "l2" else shift.abs().max()
            assert size.item() == pytest.approx(shortest.min().item(), rel=1e-6)
            assert (slopes[nearest] @ shift).item() == pytest.approx(-gaps[nearest].item(), rel=1e-6)
            free += 1
    assert free > 10


@pytest.mark.parametrize("name", ["fab-t", "fab-t-20", "fab", "fab-50", "fab-100x5", "fab-t-30x2"])
def test_names_round_trip(name):
    assert parse_attack(name).name == name


def test_a_given_loss_is_refused():
    net, image = rugged((1, 6, 6)), images(2, (1, 6, 6))
    label = net(image).argmax(1)
    with pytest.raises(SettingError, match=r"attack\.loss"):
        FAB()(net, image, label, ThreatModel(), loss=lambda logits: cross_entropy(logits, label))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"targets": 0},
        {"restarts": 0},
        {"alpha_max": 1.1},
        {"eta": 0.9},
        {"beta": 1.0},
        {"beta": float("nan")},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"attack\.{next(iter(wrong))}"):
        FAB(**wrong)


@pytest.mark.parametrize("norm", NORMS)
def test_of_ten_classes_the_last_is_a_target_too(norm):
    """The class of the lowest logit has the nearest boundary by far."""
    weight, image = 0.01 * torch.eye(10, 16), torch.full((1, 1, 4, 4), 0.5)
    weight[9] = 100 * torch.linspace(-1, 1, 16)
    bias = -torch.arange(10.0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).requires_grad_(False)
    net[1].weight.copy_(weight)
    net[1].bias.copy_(bias)
    assert net(image).argsort(descending=True)[0, -1] == 9
    given = net, image, torch.zeros(1, dtype=torch.int64), ThreatModel(norm, Budget(0.1))
    assert net(FAB()(*given)).argmax() == 9
    assert torch.equal(FAB(targets=8)(*given), image)
