"""Square against the reference's table, closed forms on linear networks, and a naive reading of its draws."""

import itertools

import pytest
import torch
from torch import nn

from softdefend.attacks import Square, cross_entropy, margin
from softdefend.attacks.names import parse_attack
from softdefend.attacks.square import _Numbers
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel


def rugged(shape, k=5, seed=0):
    """An untrained network with many small regions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 64), nn.ReLU(), nn.Linear(64, k)
        )
    net[1].weight.data.mul_(4)
    return net.requires_grad_(False)


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=stream(seed, "x"))


class Counted:
    def __init__(self, net):
        self.net, self.batches = net, []

    def __call__(self, image):
        assert not torch.is_grad_enabled()
        assert not image.requires_grad
        self.batches.append(len(image))
        return self.net(image)


# The first query of each period, and the sides on 32x32 pixels: sqrt(0.8 / 2^k * 1024), rounded.
SCHEDULE = [
    (0, 29, 29),
    (11, 20, 21),
    (51, 14, 15),
    (201, 10, 11),
    (501, 7, 7),
    (1001, 5, 5),
    (2001, 4, 5),
    (4001, 3, 3),
    (6001, 2, 3),
    (8001, 1, 3),
]


def test_windows_shrink_by_the_table():
    attack = Square()
    for (query, linf, l2), (end, *_) in zip(SCHEDULE, [*SCHEDULE[1:], (10_000,)], strict=True):
        for at in (query, end - 1):
            assert attack.side(at, 32, 32) == linf
            assert attack.side(at, 32, 32, "l2") == l2


def test_windows_fit_images_that_are_not_square():
    attack = Square(p_init=1.0)
    assert attack.side(0, 4, 100) == 4
    assert attack.side(0, 100, 3, "l2") == 3
    assert attack.side(9000, 4, 4) == 1
    assert attack.side(0, 2, 7, "l2") == 2


def linear(slope):
    """Two classes whose margin falls along ``slope``; the bias holds label 0 right, so no search ends."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(slope.numel(), 2)).requires_grad_(False)
    net[1].weight.copy_(torch.stack([-slope.flatten(), slope.flatten()]) / 2)
    net[1].bias.copy_(torch.tensor([100.0, 0.0]))
    return net


@pytest.mark.parametrize("sign", [1, -1])
def test_linf_reaches_the_closed_form_optimum(sign):
    slope = torch.randn(5, 5, generator=stream(0, "w"))
    slope[-1] = slope[:, -1] = 0  # no small window lands there
    net, image, label = linear(slope), 0.4 + 0.2 * images(6, (1, 5, 5)), torch.zeros(6, dtype=torch.int64)
    adversarial = Square(queries=1500)(
        net,
        image,
        label,
        ThreatModel("linf", Budget(0.1)),
        loss=lambda logits: sign * margin(logits, label),
        generator=stream(0, "s"),
    )
    reached = margin(net(adversarial), label) - margin(net(image), label)
    best = torch.full((6,), sign * 0.1 * slope.abs().sum().item())
    torch.testing.assert_close(reached, best, atol=1e-4, rtol=0)


def test_l2_gets_most_of_the_closed_form_optimum_and_never_more():
    """Windows are smooth bumps that change one at a time; a random direction would gain a twelfth of it."""
    slope = torch.tensor([[1.0, -2.0], [-1.0, 3.0]]).repeat_interleave(6, 0).repeat_interleave(6, 1)
    net, image, label = linear(slope), 0.4 + 0.2 * images(6, (1, 12, 12)), torch.zeros(6, dtype=torch.int64)
    threat = ThreatModel("l2", Budget(0.3))
    adversarial = Square(queries=1500)(net, image, label, threat, generator=stream(0, "s"))
    gain = (margin(net(adversarial), label) - margin(net(image), label)) / (0.3 * slope.norm())
    assert (gain <= 1 + 1e-4).all()
    assert (gain > 0.6).all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 4, 4), (3, 5, 9), (2, 13, 6), (1, 3, 20), (1, 20, 2), (3, 12, 12)]
)
@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 1e-4), ("linf", 0.1), ("linf", 1.0), ("l2", 0.5), ("l2", 20)]
)
def test_stays_in_the_ball_and_the_box(shape, norm, eps):
    net, image, threat = rugged(shape), images(7, shape).round(decimals=1), ThreatModel(norm, Budget(eps))
    adversarial = Square(queries=60)(net, image, net(image).argmax(1), threat, generator=stream(0, "s"))
    assert adversarial.shape == image.shape
    assert adversarial.dtype == image.dtype
    assert (threat.distance(image, adversarial) <= eps * (1 + 1e-6) + 1e-7).all()
    assert (adversarial >= 0).all()
    assert (adversarial <= 1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_queries_never_lower_the_margin(norm):
    net, image = rugged((3, 8, 8)), images(40, (3, 8, 8))
    label, threat = net(image).argmax(1), ThreatModel(norm, Budget(0.02 if norm == "linf" else 0.2))
    reached = [
        margin(net(Square(queries=q)(net, image, label, threat, generator=stream(3, "s"))), label)
        for q in (0, 1, 7, 30, 100, 400)
    ]
    for before, after in itertools.pairwise(reached):
        assert (after >= before - 1e-5).all()
    assert 0 < (reached[0] > 0).sum() < (reached[-1] > 0).sum() < 40


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_without_gradients_falls_alike(norm):
    net, image = rugged((1, 6, 6)), images(30, (1, 6, 6))

    def broken(image):
        assert not torch.is_grad_enabled()
        return net(image.detach()).detach()

    attack, threat, label = Square(queries=80), ThreatModel(norm, Budget(0.1)), net(image).argmax(1)
    found = attack(broken, image, label, threat, generator=stream(0, "s"))
    assert torch.equal(found, attack(net, image, label, threat, generator=stream(0, "s")))
    assert (net(found).argmax(1) != label).any()


def test_linf_does_not_feel_what_else_is_in_the_batch():
    """Places and colors belong to the query and stripes to the position, so other pixels do not matter."""
    net, threat, attack = rugged((3, 8, 8)).double(), ThreatModel("linf", Budget(0.02)), Square(queries=200)
    one, other = images(20, (3, 8, 8), seed=1).double(), images(20, (3, 8, 8), seed=2).double()
    other[5:9] = one[5:9]
    first, second = (
        attack(net, x, net(x).argmax(1), threat, generator=stream(0, "s"))[5:9] for x in (one, other)
    )
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


def test_rows_that_fell_are_dropped_and_rows_wrong_before_are_left_alone():
    """Half the images are wrong from the start; the first stripes fool all but four of the others."""
    label = torch.arange(20) % 2
    image = torch.full((20, 1, 4, 4), 0.5)

    def forward(x):
        height = (x - 0.5).abs().flatten(1).amax(1) - 0.05
        height[height.shape[0] - 4 :] = -1
        return torch.stack([-height, height], dim=1)

    counted = Counted(forward)
    adversarial = Square(queries=30)(counted, image, label, ThreatModel("linf", Budget(0.1)))
    assert counted.batches == [20, 10] + [4] * 30
    assert torch.equal(adversarial[1::2], image[1::2])
    assert (adversarial[0:12:2] != image[0:12:2]).flatten(1).any(1).all()


def test_nothing_to_attack_costs_one_forward():
    net = Counted(rugged((1, 4, 4)))
    image = images(5, (1, 4, 4))
    wrong = (net.net(image).argmax(1) + 1) % 5
    assert torch.equal(Square()(net, image, wrong, ThreatModel()), image)
    assert net.batches == [5]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_blocks_of_numbers_are_the_stream_of_single_draws(norm, monkeypatch):
    """Packing every query, as the reference does, changes nothing: not even which numbers an image gets."""
    net, image = rugged((3, 8, 8)).double(), images(40, (3, 8, 8)).double()
    label, threat = net(image).argmax(1), ThreatModel(norm, Budget(0.02 if norm == "linf" else 0.2))
    attack = Square(queries=150)
    found = attack(net, image, label, threat, generator=torch.Generator().manual_seed(7))
    fooled = (net(found).argmax(1) != label).sum()
    assert 0 < fooled < 40
    monkeypatch.setattr("softdefend.attacks.square.steps_until_packing", lambda done, most: 1)
    single = attack(net, image, label, threat, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, single, atol=1e-12, rtol=0)


def test_numbers_come_in_the_order_of_the_generator():
    """Against drawing one by one, stream by stream and image by image, skipping the images that are done."""
    stream_of = torch.tensor([0, 0, 0, 1, 1, 2])
    among = torch.tensor([True, False, True, True, True, False])
    naive = [torch.Generator().manual_seed(3) for _ in range(3)]
    numbers = _Numbers(torch.Generator().manual_seed(3), 3, torch.device("cpu"))
    for _ in range(3):
        numbers.reserve(40)
        for count in (1, 5):
            for row, own in zip(numbers.next(count), naive, strict=True):
                assert row.tolist() == [torch.rand(1, generator=own).item() for _ in range(count)]
        rows = numbers.next_rows(stream_of, among, 2)
        for flagged, number, row in zip(among, stream_of.tolist(), rows, strict=True):
            if flagged:
                assert row.tolist() == torch.rand(2, generator=naive[number]).tolist()
        numbers = _Numbers.resumed(torch.Generator().manual_seed(3), numbers.state(), torch.device("cpu"))


def test_a_given_loss_decides_and_probabilities_name_the_class():
    net, image = rugged((1, 6, 6)), images(30, (1, 6, 6))
    label, threat = net(image).argmax(1), ThreatModel("linf", Budget(0.01))

    def attack(target, loss=None):
        return Square(queries=80)(net, image, target, threat, loss=loss, generator=stream(0, "s"))

    soft = 0.9 * nn.functional.one_hot(label, 5) + 0.02
    assert torch.equal(attack(soft), attack(label))
    by_margin = attack(label)
    by_entropy = attack(label, lambda logits: cross_entropy(logits, label))
    right = (net(by_margin).argmax(1) == label) & (net(by_entropy).argmax(1) == label)
    assert right.any()
    assert (
        cross_entropy(net(by_entropy), label)[right].sum() > cross_entropy(net(by_margin), label)[right].sum()
    )
    assert margin(net(by_entropy), label)[right].sum() < margin(net(by_margin), label)[right].sum()


@pytest.mark.parametrize("name", ["square", "square-300"])
def test_names_round_trip(name):
    assert parse_attack(name).name == name


@pytest.mark.parametrize("wrong", [{"queries": -1}, {"p_init": 0.0}, {"p_init": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=rf"attack\.{next(iter(wrong))}"):
        Square(**wrong)


def test_a_tie_that_the_true_class_wins_is_no_reason_to_stop():
    """Logits in steps: of two equal ones argmax takes the first, and for label 0 that is the right answer."""
    net = rugged((1, 6, 6), k=3)
    image = images(300, (1, 6, 6))

    def stepped(x):
        return (2 * net(x)).round() / 2

    label = stepped(image).argmax(1)
    threat = ThreatModel("linf", Budget("0.15"))

    def reached(queries):
        generator = stream(0, "square")
        adversarial = Square(queries=queries)(stepped, image, label, threat, generator=generator)
        return stepped(adversarial)

    early, late = reached(10), reached(200)
    tied = (margin(early, label) == 0) & (early.argmax(1) == label)
    assert int(tied.sum()) > 5
    assert bool((late.argmax(1) != label)[tied].any())
