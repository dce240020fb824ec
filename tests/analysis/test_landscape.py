from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from softdefend.analysis import landscape
from softdefend.core.threat import Budget, ThreatModel


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 81 parameters with batch normalization and a smooth activation, and a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 3)
        )
        net(torch.rand(32, 1, 4, 4))
        image, label = torch.rand(10, 1, 4, 4), torch.randint(0, 3, (10,))
    return net.eval().double(), image.double(), label


def exact_hessian(net: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    parameters = landscape.parameters_of(net)
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        weights = {name: part.view_as(p) for (name, p), part in parts}
        return F.cross_entropy(functional_call(net, weights, (image,)), label)

    return hessian(loss)(torch.cat([p.flatten() for p in parameters.values()]))


@pytest.mark.parametrize("batch_size", [3, 10])
def test_products_are_those_of_the_exact_hessian(small, batch_size):
    net, image, label = small
    product, size = landscape.hessian_product(net, image, label, batch_size)
    v = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(product(v), exact_hessian(net, image, label) @ v)


def test_the_largest_eigenvalue_is_the_exact_ones(small):
    net, image, label = small
    product, size = landscape.hessian_product(net, image, label, 4)
    start = torch.Generator().manual_seed(0)
    found = landscape.largest_eigenvalue(product, size, start, steps=300, tolerance=1e-5)
    exact = torch.linalg.eigvalsh(exact_hessian(net, image, label))[-1].item()
    assert found.value == pytest.approx(exact, rel=1e-4)
    assert found.residual < 1e-4


@pytest.mark.parametrize("values", [[-9.0, -1.0, 2.0, 1.0], [-9.0, -4.0, -1.0, -3.0], [5.0, -4.0, 0.0, 1.0]])
def test_a_larger_negative_eigenvalue_does_not_stand_for_the_largest(values):
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    matrix = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    found = landscape.largest_eigenvalue(
        lambda v: matrix @ v.double(), 4, generator, steps=500, tolerance=1e-8
    )
    assert found.value == pytest.approx(max(values), abs=1e-5)


def test_a_direction_has_the_length_of_every_filter_and_leaves_biases(small):
    parameters = landscape.parameters_of(small[0])
    direction = landscape.filter_normalized(parameters, torch.Generator().manual_seed(0))
    for name, p in parameters.items():
        if p.ndim < 2:
            assert not direction[name].any()
        for ours, theirs in zip(direction[name], p, strict=True) if p.ndim > 1 else ():
            torch.testing.assert_close(ours.norm(), theirs.norm())


def test_the_surface_is_the_loss_of_moved_weights(small):
    net, image, label = small
    found = landscape.surface(net, image, label, points=3, span=0.5, batch_size=4, seed=0)
    assert found["axis"] == [-0.5, 0.0, 0.5]
    assert found["loss"][1][1] == pytest.approx(F.cross_entropy(net(image), label).item())
    from softdefend.core.rng import stream

    generator = stream(0, "analyse/directions")
    parameters = landscape.parameters_of(net)
    first, second = (landscape.filter_normalized(parameters, generator) for _ in range(2))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p += 0.5 * first[name] - 0.5 * second[name]
    assert found["loss"][2][0] == pytest.approx(F.cross_entropy(net(image), label).item())


def test_input_gradients_are_those_of_a_linear_classifier():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    image, label = torch.rand(6, 1, 3, 3, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    gradient = (net(image).softmax(dim=1) - F.one_hot(label, 4)) @ net[1].weight
    l1, l2 = landscape.input_gradients(net, image, label, batch_size=4)
    torch.testing.assert_close(l1, gradient.abs().sum(dim=1).detach())
    torch.testing.assert_close(l2, gradient.norm(dim=1).detach())


def gap(loss, norm: str, eps: str, image: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel(norm, Budget(eps))
    return landscape.local_linearity(loss, image, threat, steps=20, generator=generator)


def test_a_linear_loss_has_no_gap_and_a_parabola_its_second_order_term():
    image = torch.full((2, 1, 2, 3), 0.5)
    torch.testing.assert_close(
        gap(lambda x: 3 * x.flatten(1).sum(dim=1), "linf", "0.1", image), torch.zeros(2)
    )

    def parabola(x: Tensor) -> Tensor:
        return 2 * (x - 0.3).flatten(1).square().sum(dim=1)

    # 2 |d|^2 is largest in the corners of the cube, and anywhere on the sphere
    torch.testing.assert_close(gap(parabola, "linf", "0.1", image), torch.full((2,), 2 * 6 * 0.01))
    torch.testing.assert_close(gap(parabola, "l2", "0.1", image), torch.full((2,), 2 * 0.01))


def test_a_parameter_that_is_not_used_has_no_curvature():
    net = nn.Linear(3, 2).requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(2), requires_grad=False)
    image, label = torch.rand(4, 3, 1, 1), torch.tensor([0, 1, 0, 1])
    flat = nn.Sequential(nn.Flatten(), net)
    product, size = landscape.hessian_product(flat, image, label, 2)
    v = torch.arange(1.0, size + 1)
    place = [name for name, _ in flat.named_parameters()].index("1.unused")
    parts = torch.split(product(v), [p.numel() for p in flat.parameters()])
    assert torch.equal(parts[place], torch.zeros(2))
    assert all(part.abs().sum() > 0 for i, part in enumerate(parts) if i != place)
