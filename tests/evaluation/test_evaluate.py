"""The evaluator against hand counts, cheating attacks and a naive PGD."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from softdefend.attacks import APGD, CWL2, FAB, FGSM, FMN, PGD, Attack, CWLinf, DeepFool, Square, TargetedAPGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Ensemble, EvaluateSettings, Evaluator, Rate
from softdefend.evaluation.accuracy import scaled
from softdefend.execution.microbatch import CPU_MICROBATCH, _forward_and_gradient, fitting_microbatch
from softdefend.experiments.evaluate import evaluate_network

THREAT = ThreatModel("linf", Budget("0.1"))


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 3, 3)
    )
    net.train()
    image = torch.rand(23, 2, 4, 5, generator=stream(0, "x"))
    net(image)
    with torch.no_grad():
        label = net.eval()(image).argmax(1)
    label[::4] = (label[::4] + 1) % 3
    return net.train(), split(image, label)


@pytest.mark.parametrize("z", [(0, 10), (10, 10), (3, 10), (455, 1000), (1, 1)])
def test_intervals_are_wilsons(z):
    count, n = z
    flags = torch.arange(n) < count
    rate, p, q = Rate.of(flags), count / n, 1.959963984540054
    center, half = (p + q * q / (2 * n)), q * math.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    np.testing.assert_allclose(
        [rate.low, rate.high],
        [(center - half) / (1 + q * q / n), (center + half) / (1 + q * q / n)],
        atol=1e-12,
    )
    assert (rate.count, rate.n, rate.rate) == (count, n, p)


def test_counts_equal_a_pgd_written_by_hand(case):
    net, data = case
    result = Evaluator(net, Resident(data, "cpu"), THREAT, batch_size=7)([PGD(steps=6, start="none")])
    net.eval()
    x, y = data.images, data.labels
    adversarial = x.clone()
    for _ in range(6):
        adversarial.requires_grad_(True)
        (slope,) = torch.autograd.grad(
            nn.functional.cross_entropy(net(adversarial), y, reduction="sum"), adversarial
        )
        adversarial = (adversarial.detach() + 0.025 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    with torch.no_grad():
        clean, attacked = net(x).argmax(1), net(adversarial).argmax(1)
    record = result.attacks["pgd-6"]
    assert torch.equal(result.clean_prediction, clean)
    assert torch.equal(record.prediction, attacked)
    assert torch.equal(record.robust, (clean == y) & (attacked == y))
    torch.testing.assert_close(record.distance, (adversarial - x).abs().flatten(1).amax(1))
    assert (record.forwards, record.backwards) == (23 * 7, 23 * 6)
    assert 0 < result.robust("pgd-6").count < result.clean.count < 23


def test_the_network_is_put_back(case):
    net, data = case
    before = {k: v.clone() for k, v in net.state_dict().items()}
    Evaluator(net, Resident(data, "cpu"), THREAT)([FGSM()])
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Cheat(Attack):
    """Returns whatever it is given to return."""

    norms = ("linf", "l2", "l1")

    def __init__(self, make):
        object.__setattr__(self, "make", make)

    @property
    def name(self):
        return "cheat"

    def run(self, net, image, label, threat, context):
        return self.make(image)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 0.5,
        lambda x: 5 * torch.ones_like(x),
        lambda x: x * math.nan,
        lambda x: x - math.inf,
        lambda x: x.double() - 0.3,
    ],
    ids=["far", "out of the box", "nan", "infinite", "float64"],
)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_cheating_attack_is_projected_and_counted_honestly(case, make, norm):
    net, data = case
    threat = ThreatModel(norm, Budget("0.1"))
    resident = Resident(data, "cpu")
    evaluator = Evaluator(net, resident, threat)
    record = evaluator([Cheat(make)]).attacks["cheat"]
    assert (record.distance <= 0.1 + 1e-6).all()
    wanted = make(data.images)
    wanted = torch.where(wanted.isfinite(), wanted, data.images).float()
    with torch.no_grad():
        inside = threat.project(data.images, wanted)
        assert torch.equal(record.prediction, net.eval()(inside).argmax(1))
    if not make(data.images).isfinite().any():
        assert record.distance.max() < 1e-6


def test_the_worst_case_is_the_intersection_of_all_attacks(case):
    net, data = case
    result = Evaluator(net, Resident(data, "cpu"), THREAT)(
        [FGSM(), PGD(steps=10), PGD(steps=10, loss="margin")]
    )
    each = torch.stack([record.robust for record in result.attacks.values()])
    assert torch.equal(result.worst, each.all(0))
    summary = result.to_dict()
    assert summary["worst"]["count"] == int(each.all(0).sum())
    assert summary["attacks"]["fgsm"]["n"] == 23
    assert all(isinstance(summary["clean"][key], float) for key in ("rate", "low", "high"))


def test_the_same_seed_repeats_and_another_does_not(case):
    net, data = case
    runs = [
        Evaluator(net, Resident(data, "cpu"), THREAT, seed=seed)([PGD(steps=1, step_size=Budget(1e-9))])
        for seed in (0, 0, 1)
    ]
    distances = [run.attacks["pgd-1"].distance for run in runs]
    assert torch.equal(distances[0], distances[1])
    assert not torch.equal(distances[0], distances[2])


def test_two_attacks_of_one_name_are_refused(case):
    net, data = case
    with pytest.raises(SettingError, match=r"evaluate\.attacks: got pgd-5, pgd-5"):
        Evaluator(net, Resident(data, "cpu"), THREAT)([PGD(steps=5), PGD(steps=5, start="none")])


@pytest.mark.parametrize("in_an_ensemble", [False, True])
@pytest.mark.parametrize(("last", "norm"), [(CWL2(), "linf"), (CWLinf(), "l2")])
def test_an_attack_for_another_norm_is_refused_before_anything_runs(case, last, norm, in_an_ensemble):
    class Untouchable(nn.Module):
        def forward(self, image):
            raise AssertionError("the network was asked")

    attacks = (FGSM(), last)
    planned = [Ensemble("both", attacks)] if in_an_ensemble else list(attacks)
    with pytest.raises(SettingError, match=r"threat\.norm: got"):
        Evaluator(Untouchable(), Resident(case[1], "cpu"), ThreatModel(norm, Budget("8/255")))(planned)


@pytest.mark.parametrize("attack", [FAB(steps=5), FMN(steps=5), DeepFool(steps=5), CWL2(rounds=2, steps=5)])
def test_what_is_not_random_needs_neither_seed_nor_batch(case, attack):
    """In double precision, in which sums do not depend on the size of a batch as far as verdicts go."""
    net, data = case
    threat, resident = ThreatModel("l2", Budget(0.3)), Resident(data, "cpu")
    first, second = (
        Evaluator(Doubled(net), resident, threat, seed=seed, batch_size=size)([attack]).attacks[attack.name]
        for seed, size in ((0, 23), (5, 4))
    )
    assert torch.equal(first.prediction, second.prediction)
    assert torch.allclose(first.distance, second.distance, atol=1e-5)


class Doubled(nn.Module):
    """The network in double precision behind float32 images: double logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).double()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(image.double())
        return logits


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"curve_size": -1},
        {"examples": -1},
        {"batch_size": 0},
        {"microbatch": 0},
        {"precision": "bf16"},
    ],
)
def test_impossible_settings_are_refused(case, wrong):
    name = next(iter(wrong))
    with pytest.raises(SettingError, match=f"evaluate.{name}"):
        EvaluateSettings(**wrong)
    if name in ("batch_size", "microbatch", "precision"):
        net, data = case
        with pytest.raises(SettingError, match=f"evaluate.{name}"):
            Evaluator(net, Resident(data, "cpu"), THREAT, **wrong)


class Watched(nn.Module):
    """Remembers how many images it saw, with and without gradient, and in what precision it computed."""

    def __init__(self, inner, most=None):
        super().__init__()
        self.inner, self.most, self.sizes, self.gradients, self.types = inner, most, [], 0, set()

    def forward(self, image):
        if self.most is not None and len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(image))
        self.gradients += len(image) * image.requires_grad
        logits = self.inner(image)
        self.types.add(logits.dtype)
        return logits


EVERY = [
    FGSM(),
    PGD(steps=4, restarts=2, loss="kl"),
    APGD(steps=6),
    TargetedAPGD(steps=5, targets=2),
    FAB(steps=5),
    FAB(steps=5, targeted=False),
    Square(queries=20),
]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("attack", EVERY, ids=lambda a: a.name)
def test_every_forward_and_gradient_is_counted_for_its_image(case, attack, precision):
    net, data = case
    net = Watched(net)
    evaluator = Evaluator(net, Resident(data, "cpu"), THREAT, batch_size=9, microbatch=6, precision=precision)
    record = evaluator([attack]).attacks[attack.name]
    (trial,) = record.trials.values()
    assert max(net.sizes) <= 6
    assert (
        record.forwards == int(trial.forwards.sum()) == sum(net.sizes) - 23
    )  # the clean pass is not the attack's
    per_forward = 3 if attack == FAB(steps=5, targeted=False) else 1  # a gradient for every class
    assert record.backwards == int(trial.backwards.sum()) == per_forward * net.gradients
    assert (trial.forwards >= 1).all()
    searches = precision == "fast" and not isinstance(attack, FGSM)
    assert net.types == ({torch.float32, torch.bfloat16} if searches else {torch.float32})


def test_memory_that_runs_out_halves_what_is_computed_at_once(case):
    net, data = case
    attacks = [PGD(steps=2), Ensemble("two", (APGD(steps=5), Square(queries=10)))]
    wanted = Evaluator(net, Resident(data, "cpu"), THREAT, batch_size=8)(attacks)
    tight = Evaluator(Watched(net, most=3), Resident(data, "cpu"), THREAT, batch_size=8, microbatch=23)
    found = tight(attacks)
    assert found.how["microbatch"] == 2  # 23, 11, 5, 2
    for name in wanted.attacks:
        assert torch.equal(found.attacks[name].robust, wanted.attacks[name].robust)
        assert found.attacks[name].forwards == wanted.attacks[name].forwards
    with pytest.raises(SettingError, match=r"evaluate\.microbatch: got 1 image at once"):
        Evaluator(Watched(net, most=0), Resident(data, "cpu"), THREAT)(attacks)


class Half(Attack):
    """Asks for some of its images only, so that nobody can say which."""

    name = "half"

    def run(self, net, image, label, threat, context):
        net(image[: len(image) // 2])
        return image + 0.01 * torch.rand(image.shape, generator=context.generator)


def test_an_attack_from_elsewhere_sees_its_batch_whatever_fits(case):
    """Its totals are right, and where a count cannot be put down to an image there is none."""
    net, data = case
    results = [
        Evaluator(net, Resident(data, "cpu"), THREAT, batch_size=10, microbatch=p)([Half()])
        for p in (3, 10, 40)
    ]
    for result in results:
        record = result.attacks["half"]
        assert torch.equal(record.distance, results[0].attacks["half"].distance)
        assert record.forwards == 23 + 5 + 5 + 1
        assert (record.trials["half"].forwards == -1).all()
    table = pq.read_table(pa.BufferReader(results[0].to_parquet()))
    assert table.column("half/forwards").null_count == 23
    assert table.column("half/robust").null_count == 0


def test_the_table_of_an_ensemble(case):
    net, data = case
    members = (APGD(steps=3), FAB(steps=3), Square(queries=5))
    result = Evaluator(net, Resident(data, "cpu"), THREAT)([FGSM(), Ensemble("mine", members)])
    table = pq.read_table(pa.BufferReader(result.to_parquet()))
    column = {name: table.column(name).to_pylist() for name in table.column_names}
    right = [p == y for p, y in zip(column["clean_prediction"], column["label"], strict=True)]
    assert column["fgsm/forwards"] == [2] * 23
    assert column["fgsm/backwards"] == [1] * 23
    left = list(right)
    for name in ("apgd-ce-3", "fab-t-3", "square-5"):
        fooled = column[f"mine/{name}/fooled"]
        assert [x is not None for x in fooled] == left
        assert [x is not None for x in column[f"mine/{name}/forwards"]] == left
        left = [before and not now for before, now in zip(left, fooled, strict=True)]
    assert column["mine/robust"] == left
    assert sum(left) < sum(right)
    for row in range(23):
        each = [column[f"mine/{m.name}/forwards"][row] or 0 for m in members]
        assert column["mine/forwards"][row] == sum(each)


def test_what_was_used_is_written_down(case):
    net, data = case
    summary = Evaluator(
        net, Resident(data, "cpu"), THREAT, batch_size=7, microbatch=5, seed=3, precision="fast"
    )([FGSM()]).to_dict()
    assert summary["precision"] == "fast"
    assert (summary["batch_size"], summary["microbatch"], summary["seed"]) == (7, 5, 3)
    assert summary["versions"]["torch"] == torch.__version__
    json.dumps(summary, allow_nan=False)


def test_on_a_cpu_the_microbatch_is_a_constant(case):
    net, data = case
    assert fitting_microbatch(net, data.images[:1]) == CPU_MICROBATCH


def test_the_curve_ends_where_a_threat_model_does(tmp_path):
    """Twice an l2 radius of 11 would be beyond the largest, 20."""
    images = torch.rand(4, 3, 32, 32, generator=stream(0, "x"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    wishes = EvaluateSettings(attacks=("fgsm",), curve_size=4)
    threat = ThreatModel("l2", Budget("11"))
    found = evaluate_network(
        net,
        (images, torch.tensor([0, 1, 2, 0])),
        tmp_path,
        threat=threat,
        settings=wishes,
        device="cpu",
    )
    radii = [point["value"] for point in found["eps_curve"]]
    assert 11 in radii
    assert max(radii) <= 20


@pytest.mark.parametrize("k", [2, 10])
def test_the_network_says_how_many_classes_tensors_have(tmp_path, k):
    """Three images may miss the highest of ten classes; a label beyond the classes is refused."""
    images, labels = torch.rand(3, 1, 4, 4, generator=stream(0, "x")), torch.tensor([0, 1, 0])
    net, wishes = (
        nn.Sequential(nn.Flatten(), nn.Linear(16, k)),
        EvaluateSettings(attacks=("fgsm",), curve_size=0),
    )
    with torch.no_grad():
        right = int((net(images).argmax(1) == labels).sum())
    found = evaluate_network(net, (images, labels), tmp_path / "a", settings=wishes, device="cpu")
    assert found["clean"]["count"] == right
    with pytest.raises(SettingError, match=rf"net: .*shape \[2, {k}\]; .*logits \[2, {k + 1} or more\]"):
        evaluate_network(net, (images, labels * k), tmp_path / "b", settings=wishes, device="cpu")


def test_the_look_that_measures_memory_needs_no_gradient():
    image = torch.rand(2, 1, 2, 2, requires_grad=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for forward in (net, lambda x: net(x).detach(), lambda x: net(x.detach())):
        _forward_and_gradient(forward, image)
    assert image.grad is None
    assert all(parameter.grad is None for parameter in net.parameters())


def test_examples_are_the_images_that_were_counted(case):
    """The numbers of PGD belong to an image's position, so a few of them alone are attacked the same."""
    net, data = case
    evaluator, attack = Evaluator(net, Resident(data, "cpu"), THREAT), PGD(steps=3)
    result, index = evaluator([attack]), torch.tensor([20, 3, 11])
    image, adversarial, clean, attacked = evaluator.show(attack, index)
    torch.testing.assert_close(THREAT.distance(image, adversarial), result.attacks["pgd-3"].distance[index])
    assert torch.equal(clean.argmax(1), result.clean_prediction[index])
    assert torch.equal(attacked.argmax(1), result.attacks["pgd-3"].prediction[index])


def test_multiples_of_eps_are_written_as_eps_is():
    assert [str(scaled(Budget("8/255"), f)) for f in (0.25, 1.0, 1.25)] == ["2/255", "8/255", "10/255"]
    assert str(scaled(Budget("0.1"), 0.5)) == "0.05"
