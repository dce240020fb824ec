from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
from torch import nn

from softdefend.analysis import information_estimates as information
from softdefend.analysis.landscape import parameters_of


def gaussians(n: int, d: int, rho: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs whose coordinates are correlated one by one, and their mutual information."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, d))
    b = rho * a + math.sqrt(1 - rho**2) * rng.standard_normal((n, d))
    return a, b, -0.5 * d * math.log(1 - rho**2)


def mixture(n: int, mu: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """t = +mu or -mu plus noise in the first of two coordinates, the sign, and I(t; sign) by quadrature."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    t = rng.standard_normal((n, 2))
    t[:, 0] += np.where(y == 1, mu, -mu)

    def integrand(x: float) -> float:
        both = 0.5 * (norm.pdf(x, mu) + norm.pdf(x, -mu))
        return -both * math.log(both)

    entropy = quad(integrand, -mu - 12, mu + 12)[0]
    return t, y, entropy - 0.5 * math.log(2 * math.pi * math.e)


@pytest.mark.parametrize(("d", "rho"), [(1, 0.0), (1, 0.9), (3, 0.6)])
def test_neighbors_find_the_information_of_gaussians(d, rho):
    a, b, exact = gaussians(2000, d, rho)
    assert information.neighbor_information(a, b) == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize(("d", "rho"), [(1, 0.9), (3, 0.6)])
def test_the_contrastive_bound_comes_near_and_stays_below(d, rho):
    a, b, exact = gaussians(4000, d, rho)
    found = information.contrastive_information(a, b, seed=0)
    assert 0.75 * exact < found < exact + 0.05


def test_the_contrastive_bound_finds_nothing_where_there_is_nothing():
    a, b, _ = gaussians(1000, 2, 0.0)
    assert abs(information.contrastive_information(a, b, seed=0)) < 0.1


def test_the_contrastive_bound_never_exceeds_the_logarithm_of_its_batch():
    a = np.random.default_rng(0).standard_normal((400, 2))
    found = information.contrastive_information(a, a, seed=0, batch=16)
    assert math.log(16) * 0.6 < found <= math.log(16)


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_both_label_estimates_find_the_information_of_a_mixture(mu):
    t, y, exact = mixture(3000, mu)
    assert information.label_information_neighbors(t, y) == pytest.approx(exact, abs=0.05)
    # the posterior is logistic, so the bound is tight but for the samples
    assert information.label_information_bound(t, y, seed=0) == pytest.approx(exact, abs=0.04)


def test_the_label_bound_bears_more_features_than_samples():
    t, y, exact = mixture(400, 1.5)
    noise = np.random.default_rng(1).standard_normal((400, 500))
    found = information.label_information_bound(np.hstack([t, noise]), y, seed=0)
    assert 0 < found < exact + 0.04
    nothing = information.label_information_bound(noise, y, seed=0)
    assert -0.1 < nothing < 0.05


def test_the_label_bound_says_nothing_of_many_classes_that_have_nothing_to_do_with_it():
    rng = np.random.default_rng(0)
    t, y = rng.standard_normal((600, 2)), rng.integers(0, 400, 600)  # most are not seen in the half that fits
    assert information.label_information_bound(t, y, seed=0) < 0


def test_the_label_bound_stays_below_where_the_classifier_is_too_simple():
    rng = np.random.default_rng(0)
    t = rng.uniform(-1, 1, (2000, 1))
    y = (np.abs(t[:, 0]) > 0.5).astype(np.int64)  # known for certain, but not to a linear classifier
    assert information.label_information_bound(t, y, seed=0) < 0.1
    assert information.label_information_neighbors(t, y) == pytest.approx(math.log(2), abs=0.06)


def test_one_feature_gives_what_scikit_learn_gives():
    t, y, _ = mixture(500, 1.0)
    theirs = mutual_info_classif(t[:, :1], y, n_neighbors=3, random_state=0)[0]
    assert information.label_information_neighbors(t[:, :1], y, 3) == pytest.approx(theirs, abs=1e-3)
    a, b, _ = gaussians(500, 1, 0.7)
    theirs = mutual_info_regression(a, b[:, 0], n_neighbors=3, random_state=0)[0]
    scaled = [v / v.std() for v in (a, b)]
    assert information.neighbor_information(*scaled, 3) == pytest.approx(theirs, abs=2e-2)


def test_points_that_coincide_count_as_scikit_learn_counts_them():
    """As features of dead ReLUs do: every class in one place knows its label."""
    y = np.arange(500) % 5
    places = y[:, None].astype(float)
    theirs = mutual_info_classif(places, y, n_neighbors=3, discrete_features=False, random_state=0)[0]
    assert theirs == pytest.approx(math.log(5), abs=0.02)
    assert information.label_information_neighbors(places, y, 3) == pytest.approx(theirs, abs=0.02)
    assert information.neighbor_information(places, places, 3) == pytest.approx(math.log(5), abs=0.1)


def test_the_entropy_of_labels_is_that_of_their_shares():
    assert information.label_entropy(np.array([0, 0, 2, 2])) == pytest.approx(math.log(2))


def test_principal_components_have_unit_variance_and_no_more_than_there_are():
    values = np.random.default_rng(0).standard_normal((50, 3)) * [1, 10, 100]
    found = information.reduced(values, 8)
    np.testing.assert_allclose(found.T @ found / 49, np.eye(3), atol=1e-9)


def test_rounding_is_no_component():
    """Rank two in float32: whitening would make six more of the digits that are lost."""
    draws = np.random.default_rng(0)
    values = (draws.standard_normal((200, 2)) @ draws.standard_normal((2, 20))).astype(np.float32)
    assert information.reduced(values.astype(np.float64), 8).shape == (200, 2)
    assert information.reduced(np.ones((20, 3)), 8).shape == (20, 1)


def test_the_error_of_the_weights_information_is_that_of_drawing_without_replacement():
    """Against the spread over many draws of 30 of 40 values."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for draw in range(4000):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(draw))[:30]
        found.append(information._half(values[order], 40))
    means, errors = zip(*found, strict=True)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert information._half(values, 40)[1] == 0


def test_information_in_weights_is_the_quadratic_form_of_the_fisher_matrix():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    image = torch.rand(12, 1, 2, 2, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 3, (12,), generator=generator)
    before = {name: torch.zeros_like(p) for name, p in parameters_of(net).items()}
    found = information.information_in_weights(net, before, image, label, n=500, batch_size=5)

    x = torch.cat([image.flatten(1), torch.ones(12, 1)], dim=1)  # the bias is one more weight
    step = torch.cat([net[1].weight, net[1].bias[:, None]], dim=1).detach().flatten()
    p = net(image).softmax(dim=1).detach()
    empirical = torch.zeros(15, 15, dtype=torch.float64)
    model = torch.zeros_like(empirical)
    for i in range(12):
        score = torch.outer(torch.eye(3)[label[i]] - p[i], x[i]).flatten()
        empirical += torch.outer(score, score) / 12
        model += torch.kron(torch.diag(p[i]) - torch.outer(p[i], p[i]), torch.outer(x[i], x[i])) / 12
    assert found.empirical == pytest.approx(250 * float(step @ empirical @ step), rel=1e-5)
    assert found.model == pytest.approx(250 * float(step @ model @ step), rel=1e-5)


def test_a_network_that_has_not_moved_stores_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    image, label = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    found = information.information_in_weights(net, parameters_of(net), image, label, n=5, batch_size=5)
    assert (found.empirical, found.model) == (0, 0)
