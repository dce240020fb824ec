"""Projections and steps against closed forms and SciPy, for arbitrary images."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from softdefend.core.errors import SettingError
from softdefend.core.projections import l1_correction
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel, diameter

EPS = {"linf": "8/255", "l2": "128/255", "l1": "2", "l0": "3"}


def images(seed: int, n: int = 3, spread: float = 0.0) -> torch.Tensor:
    noise = torch.rand(n, 2, 3, 4, generator=stream(seed, "test"))
    return noise + spread * torch.randn(noise.shape, generator=stream(seed, "spread"))


@pytest.mark.parametrize("text", ["8/255", "0.031", "1", "0", "12.5/255"])
def test_a_budget_prints_as_it_was_written(text):
    above, _, below = text.partition("/")
    assert float(Budget(text)) == float(above) / float(below or 1)
    assert str(Budget(text)) == str(Budget(Budget(text))) == text


@pytest.mark.parametrize("text", ["eight", "8/0", "-1/255", "1/2/3", "nan", "inf", "", True])
def test_a_budget_that_is_no_length_is_refused(text):
    with pytest.raises(SettingError, match="budget: got"):
        Budget(text)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("linf", "8"),
        ("linf", "0"),
        ("linf", "1.01"),
        ("l2", "128"),
        ("l1", "3060"),
        ("l0", "2.5"),
        ("l0", "0"),
        ("l3", "1"),
    ],
)
def test_a_threat_in_the_wrong_unit_is_refused(norm, eps):
    with pytest.raises(SettingError, match=r"threat\.(eps|norm): got"):
        ThreatModel(norm, Budget(eps))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 10), eps=st.floats(1e-4, 1.0))
@settings(max_examples=60, deadline=None)
def test_projection_stays_in_ball_and_box_and_is_idempotent(norm, seed, spread, eps):
    eps = {"l1": 10 * eps, "l0": math.ceil(20 * eps)}.get(norm, eps)
    threat = ThreatModel(norm, Budget(eps))
    image = images(seed)
    projected = threat.project(image, images(seed + 1, spread=spread))
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (threat.distance(image, projected) <= eps * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(threat.project(image, projected), projected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_point_inside_is_left_alone(norm):
    threat = ThreatModel(norm, Budget("0.4"))
    image = images(0) * 0.5 + 0.25
    inside = image + 0.01 * torch.randn(image.shape, generator=stream(1, "x"))
    torch.testing.assert_close(threat.project(image, inside), inside)


@pytest.mark.parametrize("seed", range(5))
def test_linf_projection_is_the_nearest_point_that_scipy_finds(seed):
    """min |z - v|^2 subject to |z - x| <= eps and 0 <= z <= 1, solved as a bounded problem."""
    threat = ThreatModel("linf", Budget("0.1"))
    x, v = images(seed, 1), images(seed + 50, 1, spread=0.5)
    bounds = [(max(0.0, p - 0.1), min(1.0, p + 0.1)) for p in x.double().flatten().tolist()]
    goal = v.double().flatten().numpy()
    found = minimize(
        lambda z: ((z - goal) ** 2).sum(), x.double().flatten().numpy(), bounds=bounds, tol=1e-12
    )
    np.testing.assert_allclose(threat.project(x, v).flatten().numpy(), found.x, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_l2_projection_is_the_nearest_point_that_scipy_finds_where_the_box_does_not_bind(seed):
    threat = ThreatModel("l2", Budget("0.2"))
    x = images(seed, 1) * 0.2 + 0.4
    v = x + torch.randn(x.shape, generator=stream(seed, "v"))
    start, goal = x.double().flatten().numpy(), v.double().flatten().numpy()
    ball = {"type": "ineq", "fun": lambda z: 0.2**2 - ((z - start) ** 2).sum()}
    found = minimize(lambda z: ((z - goal) ** 2).sum(), start, constraints=[ball], method="SLSQP", tol=1e-14)
    np.testing.assert_allclose(threat.project(x, v).flatten().numpy(), found.x, atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_is_the_steepest_of_its_length(norm):
    """No direction of the same length has a larger inner product with the gradient (dual norm)."""
    threat = ThreatModel(norm, Budget(EPS[norm]))
    image, grad = images(0), torch.randn(3, 2, 3, 4, generator=stream(2, "g"))
    delta = threat.ascend(image, grad, 0.3) - image
    length = delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.full((3,), 0.3))
    dual = grad.flatten(1).abs().sum(1) if norm == "linf" else grad.flatten(1).norm(dim=1)
    torch.testing.assert_close((delta * grad).flatten(1).sum(1), 0.3 * dual)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_gradient_does_not_move_the_image(norm):
    threat = ThreatModel(norm, Budget(EPS[norm]))
    image = images(0)
    assert torch.equal(threat.ascend(image, torch.zeros_like(image), 0.1), image)


def test_random_starts_fill_the_ball_uniformly():
    """l-inf: coordinates uniform on [-eps, eps]. l2: radius^d uniform on [0, eps^d]."""
    image = torch.full((4000, 1, 2, 2), 0.5)
    delta = ThreatModel("linf", Budget(0.1)).random_start(image, stream(0, "a")) - image
    assert abs(delta.mean()) < 0.002
    assert abs(delta.std() - 0.1 / 3**0.5) < 0.001
    assert delta.abs().max() <= 0.1 + 1e-6
    radius = (
        (ThreatModel("l2", Budget(0.1)).random_start(image, stream(0, "a")) - image).flatten(1).norm(dim=1)
    )
    volume = (radius / 0.1) ** 4
    assert abs(volume.mean() - 0.5) < 0.02
    assert abs(volume.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_repeat_with_their_generator(norm):
    threat, image = ThreatModel(norm, Budget(EPS[norm])), images(0)
    first = threat.random_start(image, stream(3, "a"))
    assert torch.equal(first, threat.random_start(image, stream(3, "a")))
    assert not torch.equal(first, threat.random_start(image, stream(3, "b")))


@pytest.mark.parametrize("seed", range(12))
def test_l1_projection_is_the_nearest_point_that_bisection_finds(seed):
    """Naive: halve until one length, by which all changes are shortened and which the box may exceed, is
    right; pixels at 0 and 1 among them, points far out and close by."""
    eps, spread = (0.01, 1.0, 4.0, 30.0)[seed % 4], (0.1, 1.0, 5.0)[seed % 3]
    x = (1.6 * images(seed, 1).double() - 0.3).clamp(0, 1)
    u = spread * torch.randn(x.shape, generator=stream(seed, "v"), dtype=torch.float64)
    room = torch.where(u > 0, 1 - x, x)
    low, high = 0.0, float(u.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        too_long = float(torch.minimum((u.abs() - middle).clamp_min(0), room).sum()) > eps
        low, high = (middle, high) if too_long else (low, middle)
    nearest = x + u.sign() * torch.minimum((u.abs() - high).clamp_min(0), room)
    torch.testing.assert_close(ThreatModel("l1", eps).project(x, x + u), nearest, atol=1e-9, rtol=0)


def test_l1_projection_takes_a_radius_for_each_image():
    x, u = images(3), torch.randn(3, 2, 3, 4, generator=stream(1, "u"))
    radius = torch.tensor([0.1, 2.0, torch.inf])
    moved = x + u + l1_correction(x, u, radius)
    for i, eps in enumerate([0.1, 2.0, 900.0]):
        alone = ThreatModel("l1", eps).project(x[i : i + 1], (x + u)[i : i + 1])
        torch.testing.assert_close(moved[i : i + 1], alone)


@pytest.mark.parametrize("seed", range(6))
def test_l0_projection_is_the_nearest_of_all_choices_of_values(seed):
    x = images(seed, 1)[:, :1, :2, :3]
    v = x + torch.randn(x.shape, generator=stream(seed, "v"))
    found = ThreatModel("l0", 2).project(x, v)
    candidates = []
    for chosen in combinations(range(6), 2):
        z = x.flatten().clone()
        z[list(chosen)] = v.flatten()[list(chosen)].clamp(0, 1)
        candidates.append(float((z - v.flatten()).norm()))
    assert float((found - v).norm()) == pytest.approx(min(candidates), abs=1e-6)
    assert int((found != x).sum()) == 2


def test_a_step_in_l1_goes_to_the_steepest_values_that_have_room():
    threat = ThreatModel("l1", "2")
    image = torch.full((1, 1, 1, 4), 0.5)
    image[..., 0] = 1
    grad = torch.tensor([9.0, 1, -3, 2]).view(1, 1, 1, 4)
    short, long = (threat.ascend(image, grad, size) - image for size in (0.5, 1.5))
    assert short.flatten().tolist() == [0, 0, -0.5, 0]
    assert long.flatten().tolist() == [0, 0, -0.75, 0.75]


def test_random_starts_in_l1_fill_the_ball_uniformly():
    """radius^d is uniform on [0, eps^d], and the values are as often positive as negative, each alike."""
    image = torch.full((4000, 1, 2, 2), 0.5)
    delta = (ThreatModel("l1", 0.4).random_start(image, stream(0, "a")) - image).flatten(1)
    volume = (delta.abs().sum(1) / 0.4) ** 4
    assert abs(volume.mean() - 0.5) < 0.02
    assert abs(volume.std() - 12**-0.5) < 0.02
    # Uniform in the l1 ball of radius one, |x_i| has the mean 1 / (d + 1).
    assert ((delta.abs().mean(0) / 0.4 - 1 / 5).abs() < 0.01).all()
    assert (delta.mean(0).abs() < 0.01).all()


def test_nothing_starts_or_climbs_in_l0():
    threat, image = ThreatModel("l0", 3), images(0)
    for work in (lambda: threat.random_start(image), lambda: threat.ascend(image, image, 1.0)):
        with pytest.raises(SettingError, match=r"threat\.norm: got l0"):
            work()


@pytest.mark.parametrize(("norm", "far"), [("linf", 1.0), ("l2", 24**0.5), ("l1", 24.0), ("l0", 24.0)])
def test_the_largest_distance_is_that_of_black_and_white(norm, far):
    black = torch.zeros(1, 2, 3, 4)
    assert float(ThreatModel(norm, 1).distance(black, 1 - black)) == pytest.approx(far)
    assert diameter(norm, 24) == pytest.approx(far)
