"""The audit accuses every deceiver, by the check made for it, and no honest network."""

from __future__ import annotations

import copy
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo as zoo_
from torch import Tensor, nn

from softdefend.attacks import PGD, margin
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation.masking import CHECKS, Audit, audit, boundary, other_images, surface
from softdefend.evaluation.masking.finding import Check
from softdefend.evaluation.masking.probe import Probe, random_signs
from softdefend.evaluation.masking.rounding import MOST, least_precision, measure_rounding

pytestmark = pytest.mark.slow  # together: some fifty audits, and as many networks trained
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def zoo() -> zoo_.Zoo:
    """64 digits, and every network trained at most once."""
    return zoo_.Zoo(64)


def audited(
    zoo: zoo_.Zoo, net: nn.Module, surrogate: nn.Module | None = None, n: int = 64, **settings
) -> Audit:
    settings = {"fresh": zoo.fresh, **settings}
    return audit(net, zoo.images[:n], zoo.labels[:n], zoo_.THREAT, surrogate=surrogate, **settings)


@pytest.mark.parametrize("name", zoo_.HONEST_NAMES)
def test_an_honest_network_is_not_accused(zoo, name):
    result = audited(zoo, zoo.honest(name), zoo.plain)
    assert result.verdict == "no sign of masking", str(result)
    assert result.suspicious == ()


@pytest.mark.parametrize("name", zoo_.DECEIVERS)
def test_a_deceiver_is_caught_by_the_checks_made_for_it(zoo, name):
    deceiver = zoo_.DECEIVERS[name]
    result = audited(zoo, zoo.deceiver(name), zoo.surrogate if deceiver.surrogate else None)
    assert result.verdict == "suspicious"
    assert set(deceiver.caught_by) <= set(result.suspicious), str(result)


def test_every_check_is_there_to_catch_somebody():
    caught = {check for deceiver in zoo_.DECEIVERS.values() for check in deceiver.caught_by}
    assert {check.name for check in CHECKS} - caught == set()
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_deceivers_would_have_fooled_an_evaluation_with_pgd(zoo):
    """Otherwise there would be nothing to catch: PGD-20 sees a multiple of the plain network's robustness."""

    def robust(net: nn.Module) -> float:
        probe = Probe(net, zoo.images, zoo.labels, zoo_.THREAT, 250, 0)
        return 1 - float(probe.fooled(probe.attacked(PGD(steps=20))).float().mean())

    honest = robust(zoo.plain)
    for name in ("quantisation", "JPEG", "detached", "gradient turned round", "waves", "NaN gradient"):
        assert robust(zoo.deceiver(name)) > honest + 0.15, name


def test_the_network_and_all_random_state_are_put_back(zoo):
    net = zoo_.conv(norm=True, pool=True).train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    audited(zoo, zoo_.Dropout(net), n=16)
    assert [module.training for module in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_seed_repeats_whatever_the_global_random_state(zoo):
    net = zoo.deceiver("dropout at test time")
    results = []
    for global_seed in (0, 1):
        with torch.random.fork_rng([]):
            torch.manual_seed(global_seed)
            results.append(audited(zoo, net, n=16, seed=3))
    assert results[0] == results[1]
    assert audited(zoo, net, n=16, seed=4) != results[0]


def test_no_sticky_state_from_one_network_to_the_next(zoo):
    audited(zoo, zoo.deceiver("purifies by gradient"), n=16)
    assert audited(zoo, zoo.plain, n=16).verdict == "no sign of masking"


def test_results_as_text_and_as_json(zoo):
    result = audited(zoo, zoo.deceiver("detached"), n=16)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["verdict"] == "suspicious"
    assert [row["check"] for row in content["findings"]] == [f.check for f in result.findings]
    assert all(row["figure"] is None or isinstance(row["figure"], int | float) for row in content["findings"])
    assert all(row["threshold"] and row["reference"] and row["explanation"] for row in content["findings"])
    text = str(result)
    for finding in result.findings:
        assert finding.check in text
    assert "gradient path: The output has no gradient" in text
    assert max(len(line) for line in text.splitlines()) <= 110
    with pytest.raises(KeyError):
        result.finding("no such check")


def stripes(n: int, shape: tuple[int, ...], k: int) -> tuple[Tensor, Tensor]:
    """Images of ``k`` classes, each with its own row a little brighter."""
    labels = torch.arange(n) % k
    images = 0.3 + 0.4 * torch.rand(n, *shape, generator=stream(0, "stripes"))
    for number, label in enumerate(labels.tolist()):
        images[number, :, label] += 0.25
    return images, labels


@pytest.mark.parametrize(
    ("shape", "k", "norm", "eps"),
    [
        ((1, 8, 8), 2, "linf", "8/255"),
        ((1, 8, 8), 3, "l2", "0.5"),
        ((3, 32, 32), 4, "linf", "8/255"),
        ((2, 10, 7), 4, "l2", "128/255"),
    ],
)
def test_other_images_and_class_counts(shape, k, norm, eps):
    threat = ThreatModel(norm, eps)
    images, labels = stripes(12, shape, k)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU(), nn.Flatten())
        net = net.append(nn.Linear(4 * shape[1] * shape[2], k))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert audit(net.eval(), images, labels, threat).verdict == "no sign of masking"
    bad = zoo_.Detached(zoo_.Scaled(net, 1e5)).eval()
    assert {"gradient path", "large logits"} <= set(audit(bad, images, labels, threat).suspicious)


def test_no_robustness_is_nothing_to_mask(zoo):
    """Every image falls: comparisons have nothing to compare, and say so."""
    result = audit(zoo.plain, zoo.images, zoo.labels, ThreatModel("linf", "0.4"))
    assert result.verdict == "no sign of masking"
    assert result.finding("convergence").verdict == "not measured"
    assert result.finding("black box").figure == 0


class Constant(nn.Module):
    """One answer to everything: robust, truly, and worthless."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.eye(10)[3].expand(len(image), 10)


def test_a_constant_network_and_one_that_is_always_wrong_are_not_attacked(zoo):
    result = audited(zoo, Constant())
    assert result.finding("black box").verdict == "not measured"
    assert "does not depend on the image" in result.finding("jumps").explanation
    result = audit(zoo.plain, zoo.images[:8], (zoo.plain(zoo.images[:8]).argmax(1) + 1) % 10, zoo_.THREAT)
    assert result.verdict == "no sign of masking"
    assert "No image is classified correctly" in result.finding("black box").explanation


def test_one_image_and_small_batches(zoo):
    right = (zoo.plain(zoo.images).argmax(1) == zoo.labels).nonzero()[0]
    one = audit(zoo.plain, zoo.images[right], zoo.labels[right], zoo_.THREAT)
    assert one.finding("batch dependence").verdict == "not measured"
    assert one.verdict == "no sign of masking"
    assert audit(zoo.plain, zoo.images[:7], zoo.labels[:7], zoo_.THREAT, batch_size=3).verdict == one.verdict


def test_impossible_arguments_are_refused(zoo):
    with pytest.raises(SettingError, match=r"audit\.batch_size"):
        audited(zoo, zoo.plain, batch_size=0)
    with pytest.raises(SettingError, match=r"audit\.images"):
        audit(zoo.plain, zoo.images, zoo.labels[:3], zoo_.THREAT)
    with pytest.raises(SettingError, match=r"audit\.images"):
        audit(zoo.plain, zoo.images[:0], zoo.labels[:0], zoo_.THREAT)


class TorchFunc(zoo_.Wrapped):
    """A gradient of its own by torch.func, which refuses to be watched."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.01 * torch.func.grad(lambda z: self.net(z).logsumexp(1).sum())(x).sign())


class BackwardByMethod(zoo_.Wrapped):
    """A gradient of its own by Tensor.backward on the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        own = torch.ones((), requires_grad=True)
        with torch.enable_grad():
            (self.net(x.detach()) * own).pow(2).sum().backward()
        return self.net(x) + 0 * own.grad


@pytest.mark.parametrize("kind", [TorchFunc, BackwardByMethod])
def test_a_backward_pass_in_the_forward_is_seen_however_it_is_called(zoo, kind):
    assert "gradient in the forward" in audited(zoo, kind(zoo.plain).eval(), n=8).suspicious


class Function(nn.Module):
    """Two logits, plus and minus a function of the image."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        value = self.function(image)
        return torch.stack([value, -value], 1)


def probe(function, images: Tensor, threat: ThreatModel = zoo_.THREAT) -> Probe:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Probe(Function(function), images, labels, threat, 250, 0)


MIDDLE = 0.4 + 0.2 * torch.rand(12, 1, 3, 3, generator=stream(0, "middle"))


def figure(result) -> float:
    return result.figure


def test_finite_differences_are_the_cosine_of_claimed_and_true_slope():
    """The slope is a, autograd is told b: over many random directions the correlation is cos(a, b)."""
    a, b = torch.rand(9, generator=stream(1, "a")), torch.rand(9, generator=stream(2, "b"))

    def lying(x: Tensor) -> Tensor:
        claimed = x.flatten(1) @ b
        return claimed + (x.flatten(1) @ a - claimed).detach() + 1

    cosine = float(nn.functional.cosine_similarity(a, b, dim=0))
    assert cosine < 0.9
    assert figure(surface._finite(probe(lying, MIDDLE))) == pytest.approx(cosine, abs=0.12)
    assert figure(surface._finite(probe(lambda x: x.flatten(1) @ a + 1, MIDDLE))) == pytest.approx(
        1, abs=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scripted", [False, True])
def test_rounding_is_about_how_far_a_network_is_from_itself_in_double_precision(zoo, dtype, scripted):
    """The judge is the same network in float64; its distance is one draw of the rounding."""
    net = copy.deepcopy(zoo.at).to(dtype)
    cast = Cast(net, dtype)
    images = zoo.images.to(dtype).float()  # which the cast leaves as they are
    exact = copy.deepcopy(net).double()(images.double())
    apart = (cast(images).double() - exact).square().mean(1).sqrt() / exact.abs().amax(1)
    asked = torch.jit.trace(cast, images) if scripted else cast
    probe = Probe(asked, images, zoo.labels, zoo_.THREAT, 250, 0)
    assert least_precision(probe) == torch.finfo(dtype).eps
    with torch.no_grad():
        assert float(measure_rounding(probe, images).median() / apart.median()) == pytest.approx(1, abs=0.6)


class Cast(zoo_.Wrapped):
    """A network in other numbers."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(net)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype)).float()


def test_only_so_much_is_rounding_as_the_numbers_explain(zoo):
    """A forward that a last place moves by a tenth of its size is chaos, not rounding."""
    wild = probe(lambda x: 1 + 0.1 * torch.sin(1e9 * x.flatten(1)[:, 0]), MIDDLE)
    most = MOST * torch.finfo(torch.float32).eps
    assert float(measure_rounding(wild, MIDDLE).max()) == pytest.approx(most)


@pytest.mark.parametrize("name", ["k winners take all", "gradient turned round", "snap to a training image"])
def test_what_deceives_in_16_bits_is_caught_all_the_same(zoo, name):
    coarse = zoo_.Autocast(zoo.deceiver(name), torch.bfloat16).eval()
    assert set(zoo_.DECEIVERS[name].caught_by) <= set(audited(zoo, coarse).suspicious)


def test_a_jump_keeps_its_size_and_a_slope_does_not():
    end = MIDDLE + 0.3
    step = probe(lambda x: (x.mean((1, 2, 3)) > 0.6).float(), MIDDLE)
    torch.testing.assert_close(surface.jump(step, MIDDLE, end), torch.ones(12))
    both = probe(lambda x: x.mean((1, 2, 3)) + 0.1 * (x.mean((1, 2, 3)) > 0.6), MIDDLE)
    torch.testing.assert_close(surface.jump(both, MIDDLE, end), torch.ones(12), atol=0.01, rtol=0)
    steep = probe(lambda x: torch.sigmoid(60 * (x.mean((1, 2, 3)) - 0.6)), MIDDLE)
    torch.testing.assert_close(surface.jump(steep, MIDDLE, end), torch.full((12,), 1 / 32), atol=0.01, rtol=0)
    kink = probe(lambda x: (x.mean((1, 2, 3)) - 0.6).clamp_min(0), MIDDLE)
    assert float(surface.jump(kink, MIDDLE, end).max()) < 0.05
    level = probe(lambda x: 1 + 0 * x.mean((1, 2, 3)), MIDDLE)
    assert torch.equal(surface.jump(level, MIDDLE, end), torch.zeros(12))


def test_flatness_is_the_ratio_of_slopes():
    """x^2 along one axis from its vertex: the slope to reach r is r, so the ratio is that of the reaches."""
    at = torch.full((4, 1, 1, 1), 0.5)
    found = figure(surface._flat(probe(lambda x: -((x.flatten(1)[:, 0] - 0.5) ** 2), at)))
    assert found == pytest.approx(1 / 20, rel=1e-3)
    assert figure(surface._flat(probe(lambda x: 1 + x.mean((1, 2, 3)), at))) == pytest.approx(1, rel=1e-3)


def test_pinned_is_one_at_a_peak_and_none_on_a_slope():
    at = torch.full((4, 1, 2, 2), 0.5)
    assert figure(surface._pinned(probe(lambda x: 1 - (x - 0.5).abs().sum((1, 2, 3)), at))) == 1
    assert figure(surface._pinned(probe(lambda x: 1 + x.sum((1, 2, 3)), at))) == 0


@pytest.mark.parametrize("threat", [zoo_.THREAT, ThreatModel("l2", Budget(0.3))], ids=["linf", "l2"])
def test_the_lead_that_is_lost_is_that_of_a_linear_function(threat):
    slope = torch.linspace(-1, 1, 9)
    here = probe(lambda x: 1 + x.flatten(1) @ slope / 2, MIDDLE, threat)
    dual = slope.abs().sum() if threat.norm == "linf" else slope.norm()
    # the lead is twice the function
    wanted = float(threat.eps) * dual / 2 / (1 + MIDDLE.flatten(1) @ slope / 2)
    torch.testing.assert_close(other_images.lead_lost(here), wanted)


def test_images_are_moved_by_one_pixel_and_keep_their_border():
    image = torch.rand(2, 3, 5, 4, generator=stream(0, "move"))
    for name, shifts, axis in (("down", 1, 2), ("up", -1, 2), ("right", 1, 3), ("left", -1, 3)):
        moved, rolled = other_images.MOVES[name](image), image.roll(shifts, axis)
        border = 0 if shifts > 0 else -1
        rolled.select(axis, border).copy_(image.select(axis, border))
        assert torch.equal(moved, rolled), name
    assert torch.equal(other_images.MOVES["mirrored"](image), image.flip(3))


def test_the_figure_of_fresh_images_is_the_ratio_of_the_shares_of_the_lead_that_are_lost(zoo):
    """A function of slope 0.01 at the given images and 0.1 elsewhere, in every pixel."""
    given, other = zoo.images.clamp(0.2, 0.8), zoo.fresh[0].clamp(0.2, 0.8)

    def slopes(x: Tensor) -> Tensor:
        near = (x[:, None] - given).flatten(2).abs().amax(2).amin(1) < 0.11
        return torch.where(near, 0.01, 0.1)

    def function(x: Tensor) -> Tensor:
        return 5 + slopes(x.detach()) * x.flatten(1).sum(1)

    lost = [slopes(x) * 64 * 0.1 / function(x) for x in (given, other)]
    moved, fresh = other_images.check_other_images(probe(function, given), probe(function, other))
    assert figure(fresh) == pytest.approx(float(lost[1].median() / lost[0].median()), rel=1e-3)
    assert moved.verdict == fresh.verdict == "suspicious"


def test_a_network_of_no_memory_answers_alike_in_any_order_and_others_say_why_not(zoo):
    assert audited(zoo, zoo.plain, n=8).finding("query memory").figure == 0
    assert audited(zoo, zoo.deceiver("remembers queries"), n=8).suspicious == ("query memory",)

    class NoCopy(Counted):
        def __deepcopy__(self, memo: object) -> object:
            raise TypeError("no copies")

    finding = audited(zoo, NoCopy(zoo.plain).eval(), n=8).finding("query memory")
    assert finding.verdict == "not measured"
    assert "no copies" in finding.explanation


def test_a_softmax_that_rounds_to_one_is_seen_though_logits_are_not_huge(zoo):
    """PGD-20 keeps more than ten times as much as it should, as it does with the logits as they were."""
    threat, small = ThreatModel("linf", "0.2"), zoo_.Scaled(zoo.plain, 10).eval()

    def kept(net: nn.Module) -> float:
        probe = Probe(net, zoo.images, zoo.labels, threat, 250, 0)
        return 1 - float(probe.fooled(probe.attacked(PGD(steps=20))).float().mean())

    assert kept(zoo.plain) < 0.02 < 0.05 < kept(small)
    assert audit(small, zoo.images, zoo.labels, threat).suspicious == ("saturated softmax",)


@pytest.mark.parametrize("threat", [zoo_.THREAT, ThreatModel("l2", Budget(0.3))], ids=["linf", "l2"])
def test_convergence_is_nought_at_the_best_point_one_at_the_worst_and_a_half_at_the_image(threat):
    """On a linear function, in the middle of the box: FOSC by hand."""
    slope = torch.linspace(-1, 1, 9)
    here = probe(lambda x: 1 + x.flatten(1) @ slope, MIDDLE, threat)
    grad = here.gradient(lambda z, y: margin(z, y), MIDDLE)
    for side, value in ((1, 0.0), (0, 0.5), (-1, 1.0)):
        point = threat.project(MIDDLE, threat.ascend(MIDDLE, grad, side * float(threat.eps)))
        assert figure(surface.convergence(here, point)) == pytest.approx(value, abs=1e-5)


def test_convergence_in_linf_is_wangs_formula_over_its_range():
    """eps |g|_1 - <x - x0, g>, from nought to 2 eps |g|_1, where the box does not bind."""
    here = probe(lambda x: 1 + x.square().flatten(1).sum(1), MIDDLE)
    point = zoo_.THREAT.project(MIDDLE, MIDDLE + 0.1 * random_signs(here, "anywhere"))
    grad = here.gradient(nn.functional.cross_entropy, point).flatten(1)
    fosc = 0.1 * grad.abs().sum(1) - ((point - MIDDLE).flatten(1) * grad).sum(1)
    wanted = (fosc / (0.2 * grad.abs().sum(1))).mean()
    assert figure(surface.convergence(here, point)) == pytest.approx(float(wanted), rel=1e-4)


def two_classes(net: nn.Module, images: Tensor, threat: ThreatModel) -> tuple[Probe, Probe]:
    """The images of class 0, and all of them, labelled as the network does."""
    every = Probe(net, images, net(images).argmax(1), threat, 7, 0)
    return every.only(every.labels == 0), every


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_walk_finds_the_boundary_of_a_linear_network_exactly_where_it_is(norm):
    weight = torch.randn(12, generator=stream(0, "slope"))
    net = Plane(weight)
    images = 0.3 + 0.4 * torch.rand(60, 1, 3, 4, generator=stream(0, "images"))
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    away = net(images)[:, 0] / dual
    eps = float(away[away > 0].median())
    probe, every = two_classes(net, images, ThreatModel(norm, Budget(eps * 1.001)))
    assert boundary.walk_boundary(probe, every).tolist() == (away[away > 0] <= eps).tolist()


class Plane(nn.Module):
    """Two classes that a plane through the middle of the box parts."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        height = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([height, -height], 1)


class Ball(nn.Module):
    """Class 0 inside a ball of radius 0.6 about the middle of the box, class 1 outside."""

    def forward(self, x: Tensor) -> Tensor:
        height = 0.36 - (x.flatten(1) - 0.5).square().sum(1)
        return torch.stack([height, -height], 1)


def test_the_walk_follows_a_boundary_that_is_curved():
    images = torch.rand(200, 1, 2, 3, generator=stream(0, "images"))
    depth = 0.6 - (images - 0.5).flatten(1).norm(dim=1)
    reached = []
    for eps in (0.95, 1.05):
        shares = []
        for row in (depth > 0.05).nonzero().flatten().tolist():
            threat = ThreatModel("l2", Budget(float(depth[row]) * eps))
            probe, every = two_classes(Ball(), images, threat)
            place = (every.labels == 0).nonzero().flatten().tolist().index(row)
            shares.append(boundary.walk_boundary(probe.only(torch.tensor([place])), every).item())
        reached.append(sum(shares) / len(shares))
    assert reached[0] == 0
    assert reached[1] > 0.9


def test_without_an_image_of_another_class_there_is_nowhere_to_begin():
    images = torch.rand(9, 1, 3, 4, generator=stream(0, "images"))
    probe, _ = two_classes(Plane(torch.ones(12)), images, ThreatModel("linf", Budget(1.0)))
    assert 0 < len(probe) < 9
    assert not boundary.walk_boundary(probe, probe).any()


def test_zero_and_broken_gradients_are_counted_per_image():
    """Half of the images sit where the function is cut off."""
    images = torch.linspace(0.2, 0.8, 40).view(40, 1, 1, 1)
    low = probe(lambda x: 1 + (x.flatten(1)[:, 0] - 0.5).clamp_min(0), images, ThreatModel("linf", "0.001"))
    assert figure(surface._lost(surface.CE, lambda z, y: margin(z, y), low)) == 0.5
    root = probe(lambda x: 1 + (x.flatten(1)[:, 0] - 0.5).clamp_min(0).sqrt(), images, low.threat)
    assert figure(surface._lost(surface.CE, lambda z, y: margin(z, y), root)) == 0.5


def test_chance_is_allowed_for_and_a_limit_is_a_limit():
    share = Check("a", 0.01, "above", "r", "m", share=True)
    for n in (1, 10, 100, 1000):
        for count in range(min(n, 40) + 1):
            less = sum(math.comb(n, i) * 0.01**i * 0.99 ** (n - i) for i in range(count))
            verdict = "suspicious" if 1 - less < 0.01 - 1e-12 else "fine" if n > 1 else "not measured"
            assert share.of_flags(torch.arange(n) < count).verdict == verdict, (count, n)
    alone = Check("c", 0.25, "above", "r", "m", share=True)
    verdicts = [alone.of_flags(torch.ones(n, dtype=torch.bool)).verdict for n in (3, 4)]
    assert verdicts == ["not measured", "suspicious"]  # 0.25^3 = 0.016, 0.25^4 = 0.004
    below = Check("b", 0.5, "below", "r", "m")
    assert [below.of(value).verdict for value in (0.4, 0.5, 0.6)] == ["suspicious", "fine", "fine"]
    broken = below.of(float("nan"))
    assert (broken.figure, broken.verdict) == (None, "suspicious")


@pytest.fixture
def script(monkeypatch) -> dict[str, Any]:
    """The names of benchmarks/audit_zoo.py, which imports what the benchmarks share."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return runpy.run_path(str(ROOT / "benchmarks" / "audit_zoo.py"))


@pytest.fixture
def content(script) -> dict[str, Any]:
    """The result file of benchmarks/audit_zoo.py."""
    return json.loads((script["RESULTS"] / "audit_zoo.json").read_text())


def test_the_document_shows_what_the_result_file_says(script, content):
    document = (ROOT / "docs" / "audit.md").read_text()
    for table in script["TABLES"]:
        assert table(content) in document, table.__name__
    for check in CHECKS:
        assert check.name in document


def test_in_the_result_file_every_deceiver_is_caught_and_no_honest_network_accused(content):
    rows = content["honest"] + [row for row in content["cifar"] if row["kind"] == "honest"]
    assert [(row["name"], row["seed"], row["suspicious"]) for row in rows if row["suspicious"]] == []
    assert {row["name"] for row in content["honest"]} == set(zoo_.HONEST_NAMES)
    assert {row["name"] for row in content["deceivers"]} == set(zoo_.DECEIVERS)
    assert all(row["verdict"] == "suspicious" for row in content["deceivers"])


def test_every_limit_keeps_its_distance_from_the_worst_honest_figure(content):
    seeds = content["seeds"]["thresholds chosen on"]
    rows = [row for row in content["honest"] if row["seed"] in seeds]
    rows += [row for row in content["cifar"] if row["kind"] == "honest"]
    for check in CHECKS:
        figures = [row["figures"][check.name] for row in rows if row["figures"][check.name] is not None]
        if check.suspicious == "above":
            assert max(figures) <= check.limit / 2, check.name
        else:
            assert min(figures) >= check.limit * 6 / 5, check.name


class Counted(zoo_.Wrapped):
    """Counts the images that it and its copies see, and those whose gradient is asked for."""

    forwards = backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.forwards += len(x)
        Counted.backwards += len(x) * x.requires_grad
        return self.net(x)


def test_the_cost_is_what_the_document_says(zoo):
    document = (ROOT / "docs" / "audit.md").read_text()
    stated = re.search(
        r"(\d+) forwards and (\d+) gradients an image .* eps 0\.02,[^;]*;\s+(\d+)\s+and (\d+)", document
    )
    measured = []
    for eps in ("0.02", "0.3"):
        Counted.forwards = Counted.backwards = 0
        net = Counted(zoo.at).eval()
        audit(net, zoo.images, zoo.labels, ThreatModel("linf", eps), surrogate=zoo.surrogate)
        measured += [Counted.forwards / 64, Counted.backwards / 64]
    assert [float(number) for number in stated.groups()] == pytest.approx(measured, rel=0.05)
