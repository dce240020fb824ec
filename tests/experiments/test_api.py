"""The ten-line use from Python: any module, any tensors in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import softdefend as sd
from softdefend.attacks import Attack
from softdefend.core.rng import stream
from softdefend.data import AugmentSettings
from softdefend.execution.randomness import SeededRandomness
from softdefend.labels import SoftTerm, Supervision
from softdefend.training import RuntimeSettings, ValidateSettings
from softdefend.training.plain import plain

K = 3
THREAT = sd.ThreatModel("linf", "0.06")
QUICK = {
    "threat": THREAT,
    "attack": sd.PGD(steps=2),
    "optim": sd.OptimSettings(epochs=3, batch_size=16, lr=0.05),
    "augment": AugmentSettings("crop-flip", pad=1),
    "validate": ValidateSettings(attack=sd.PGD(steps=2)),
    "runtime": RuntimeSettings(device="cpu", threads=1),
    "progress": False,
}


def pictures(channels: int = 5, height: int = 7, width: int = 9, n: int = 90) -> tuple[Tensor, Tensor]:
    """Float images, no multiples of 1/255, of three classes that differ in brightness by a little."""
    labels = torch.arange(n) % K
    noise = torch.rand(n, channels, height, width, generator=stream(0, "pictures"))
    return 0.3 * noise + 0.15 * labels.view(-1, 1, 1, 1) + 0.1, labels


def network(channels: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, K),
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A trained network, its data, and the record and folder of its run."""
    folder, net, data = tmp_path_factory.mktemp("api") / "run", network(), pictures()
    settings = {**QUICK, "optim": sd.OptimSettings(epochs=8, batch_size=8, lr=0.1)}
    record = sd.train(net, data, folder=folder, label=sd.SGLR(start=0.5), name="mine", **settings)
    return net, data, record, folder


def test_training_learns_and_leaves_the_last_weights_in_the_network(trained):
    net, (images, labels), record, folder = trained
    result = sd.evaluate(net, images, labels, threat=THREAT, attacks=[sd.FGSM(), sd.PGD(steps=20)])
    assert result.clean.rate > 0.8
    assert result.robust("pgd-20").count <= result.robust("fgsm").count <= result.clean.count
    assert result.robust("pgd-20").rate > 1 / K
    last = load_file(folder / "last.safetensors")
    assert last.keys() == net.state_dict().keys()
    assert all(torch.equal(last[name], value) for name, value in net.state_dict().items())
    assert (record.name, record.folder, len(record.metrics)) == ("mine", folder, 8)
    assert [row["phase"] for row in record.metrics] == ["hard"] * 3 + ["refined"] * 5
    assert "pgd-20" in str(result)


def test_the_recipe_is_in_the_folder(trained):
    config = yaml.safe_load((trained[3] / "config.yaml").read_text())
    assert config["threat"] == {"norm": "linf", "eps": "0.06"}
    assert config["label"]["class_path"].endswith("SGLR")
    assert config["label"]["init_args"]["start"] == 0.5
    assert config["optim"]["epochs"] == 8
    assert config["attack"]["init_args"]["steps"] == 2


@pytest.mark.parametrize("shape", [(1, 6, 11), (5, 12, 4), (3, 8, 8)], ids=str)
@pytest.mark.parametrize(
    "recipe", [(sd.Hard, sd.PGDAT), (sd.Smooth, sd.TRADES)], ids=["hard-at", "smooth-trades"]
)
def test_any_images_train(shape, recipe, tmp_path):
    label, objective = (kind() for kind in recipe)
    images, labels = pictures(*shape, n=60)
    assert images.dtype == torch.float32
    assert not torch.allclose((images * 255).round(), images * 255, atol=1e-2)
    net = network(shape[0])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    record = sd.train(
        net, (images, labels), folder=tmp_path / "run", label=label, objective=objective, **QUICK
    )
    assert len(record.metrics) == 3
    assert not torch.equal(before["0.weight"], net.state_dict()["0.weight"])
    assert sd.evaluate(net, images, labels, threat=THREAT).clean.n == 60


def test_bytes_and_floats_are_the_same_images(tmp_path):
    levels = torch.randint(0, 256, (60, 1, 6, 6), dtype=torch.uint8, generator=stream(0, "levels"))
    labels = torch.arange(60) % K
    nets = [network(1), network(1)]
    for i, images in enumerate((levels, levels.double() / 255)):
        sd.train(nets[i], (images, labels.to(torch.int16)), folder=tmp_path / str(i), **QUICK)
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_averaged_network_is_written_and_the_given_one_holds_the_plain_weights(tmp_path):
    net = network()
    sd.train(net, pictures(), folder=tmp_path / "run", weight=sd.EMA(0.9), **QUICK)
    written = load_file(tmp_path / "run" / "last.safetensors")
    assert not torch.equal(written["0.weight"], net.state_dict()["0.weight"])


def test_a_second_call_continues_the_run(tmp_path):
    data = pictures()
    first, again = network(), network()
    sd.train(first, data, folder=tmp_path / "run", **QUICK)
    content = (tmp_path / "run/metrics.jsonl").read_bytes()
    sd.train(again, data, folder=tmp_path / "run", **QUICK)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == content
    ours, theirs = first.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_starts_from_the_weights_of_another(trained, tmp_path, kind):
    _, data, _, folder = trained
    tiny_steps = {**QUICK, "optim": sd.OptimSettings(epochs=1, batch_size=16, lr=1e-9, momentum=0.0)}
    net = network()
    record = sd.train(net, data, folder=tmp_path / "run", init_from=kind(folder), **tiny_steps)
    best = load_file(folder / "best.safetensors")
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), best[name])
    assert record.config["init_from"] == str(folder)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"label": sd.SGLR}, r"label: got the class SGLR; accepted: an object of it, as SGLR\(\)"),
        ({"label": "SGLR"}, r"label: got 'SGLR'; accepted: an object of LabelRule: ADR\(\), "),
        ({"label": sd.TRADES()}, r"label: got a TRADES; accepted: an object of LabelRule"),
        ({"objective": sd.EMA()}, r"objective: got a EMA; accepted: an object of Objective: .*PGDAT\(\)"),
        ({"weight": sd.EMA}, r"weight: got the class EMA"),
        ({"attack": "pgd-10"}, r"attack: got 'pgd-10'; accepted: an object of PGD$"),
        ({"threat": "linf"}, r"threat: got 'linf'; accepted: an object of ThreatModel$"),
        ({"optim": {"epochs": 3}}, r"optim: got a dict; accepted: an object of OptimSettings$"),
        ({"net": nn.Identity}, r"net: got the class Identity"),
        ({"data": torch.zeros(3, 1, 4, 4)}, r"data: got a Tensor; accepted: a DataBundle, or a pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_argument_of_another_kind_is_refused_by_name(tmp_path, given, named):
    arguments = {"net": network(), "data": pictures(), "folder": tmp_path / "run", **QUICK, **given}
    with pytest.raises(sd.SettingError, match=named) as refusal:
        sd.train(**arguments)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


class Mixed(sd.Smooth):
    """A user's rule, with arguments of many kinds."""

    def __init__(self, classes=(0, 1), shares=None, spread=None, **settings):
        super().__init__(**settings)
        self.classes, self.shares, self.spread = classes, shares, spread


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"classes": [0, 1]}, {"classes": [0, 2]}, r"label\.init_args\.classes: got \[0, 2\]"),
        ({"classes": (0, 1)}, {"classes": (1, 0)}, r"label\.init_args\.classes"),
        ({"shares": {0: 0.5, 1: [1]}}, {"shares": {0: 0.5, 1: [2]}}, r"label\.init_args\.shares\.1"),
        ({"shares": {1, 2}}, {"shares": {1, 3}}, r"label\.init_args\.shares"),
        ({"spread": torch.ones(2)}, {"spread": torch.zeros(2)}, r"label\.init_args\.spread"),
        ({"spread": THREAT}, {"spread": sd.ThreatModel("l2", "0.5")}, r"label\.init_args\.spread\.eps"),
        ({"smoothing": 0.1}, {"smoothing": 0.2}, r"label\.init_args\.smoothing: got 0\.2"),
    ],
    ids=str,
)
def test_a_rule_of_ones_own_is_not_continued_with_other_arguments(tmp_path, before, after, named):
    data, settings = pictures(n=40), {**QUICK, "optim": sd.OptimSettings(epochs=1, batch_size=16)}
    for _ in range(2):
        sd.train(network(), data, folder=tmp_path / "run", label=Mixed(**before), **settings)
    with pytest.raises(sd.SettingError, match=named):
        sd.train(network(), data, folder=tmp_path / "run", label=Mixed(**after), **settings)


def test_an_argument_that_a_rule_does_not_keep_is_refused(tmp_path):
    class Forgetful(sd.Hard):
        def __init__(self, strength: float = 1.0) -> None:
            self.other = strength

    class Computed(Forgetful):
        @property
        def strength(self) -> float:
            return self.other

    given = r"label\.strength: got an argument that Forgetful does not keep; accepted: .* under its own name"
    with pytest.raises(sd.SettingError, match=given):
        sd.train(network(), pictures(), folder=tmp_path / "run", label=Forgetful(), **QUICK)
    assert not (tmp_path / "run").exists()
    assert plain(Computed(2.0))["init_args"] == {"strength": 2.0}
    averaged = plain(sd.AWP(average=sd.EMA(0.5)))["init_args"]["average"]
    settings = {"decay": 0.5, "start": 0.0, "warmup": True, "bn": "copy"}
    assert averaged == {"class_path": "softdefend.EMA", "init_args": settings}


def test_networks_among_a_rules_arguments_are_left_to_its_state(tmp_path):
    recorded = plain(sd.KD(standard=network(), robust="there", temperature=3.0))["init_args"]
    assert (recorded["robust"], recorded["temperature"]) == ("there", 3.0)
    assert "standard" not in recorded


class Returns(sd.Hard):
    """A label rule that returns what it should not."""

    def __init__(self, change):
        self.change = change

    def target(self, batch, predictions, phase):
        return self.change(self.one_hot(batch.label), batch.label)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows, label: label, r"a target \[16\] of int64; accepted: \[b, k\] = \[16, 3\] of floating"),
        (lambda rows, label: rows.long(), r"a target \[16, 3\] of int64"),
        (lambda rows, label: rows[:, :2], r"a target \[16, 2\] of float32"),
        (lambda rows, label: 2 * rows, r"a target with a row that sums to 2; .* rows summing to one"),
        (lambda rows, label: rows + 0.1, r"a target with a row that sums to 1\.3"),
        (lambda rows, label: 1.5 * rows - 0.5 * rows.roll(1, 1), r"a target with an entry of -0\.5"),
        (lambda rows, label: rows.log(), r"a target that is not finite"),
    ],
    ids=["labels", "integers", "fewer classes", "twice", "unnormalized", "negative", "logarithms"],
)
def test_targets_that_are_no_distributions_do_not_train(tmp_path, change, named):
    with pytest.raises(sd.SettingError, match=r"label: got Returns, which returned " + named):
        sd.train(network(), pictures(), folder=tmp_path / "run", label=Returns(change), **QUICK)


def test_parts_of_the_label_loss_that_are_no_distributions_do_not_train(tmp_path):
    class Terms(sd.Hard):
        def supervise(self, batch, adversarial, predictions, phase):
            hard = self.one_hot(batch.label)
            return Supervision(
                batch.label, hard, self.weight, (SoftTerm(hard, 0.5), SoftTerm(self.term, 0.5))
            )

    for weight, term, named in (
        (None, torch.zeros(16), r"a term 1 with a target \[16\] of float32"),
        (None, torch.zeros(16, K), r"a row that sums to 0"),
        (
            torch.ones(16, 1),
            torch.full((16, K), 1 / K),
            r"sample weights \[16, 1\]; accepted: \[b\] = \[16\]",
        ),
    ):
        rule = Terms()
        rule.weight, rule.term = weight, term
        with pytest.raises(sd.SettingError, match=named):
            sd.train(network(), pictures(), folder=tmp_path / "run", label=rule, **QUICK)


# --- evaluate -----------------------------------------------------------------------------------------------


def test_evaluate_puts_every_module_and_parameter_back(trained):
    net, (images, labels) = network(), trained[1]
    net.train()
    net[1].eval()  # frozen batch normalization, as in fine-tuning
    net[0].weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    frozen = [parameter.requires_grad for parameter in net.parameters()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sd.evaluate(net, images, labels, threat=THREAT, attacks=[sd.FGSM(), sd.PGD(steps=2)])
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == frozen
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_evaluate_puts_the_network_back_after_an_error(trained):
    @dataclass(frozen=True)
    class Broken(Attack):
        name = "broken"

        def run(self, *_: object, **__: object) -> Tensor:
            raise RuntimeError("half way")

    net = network().train()
    with pytest.raises(RuntimeError, match="half way"):
        sd.evaluate(net, *trained[1], attacks=[Broken()])
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def slope(net: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Gradient of each image's own cross-entropy, one image at a time."""
    rows = []
    for one, wanted in zip(image, label, strict=True):
        one = one[None].clone().requires_grad_(True)
        F.cross_entropy(net(one), wanted[None]).backward()
        rows.append(one.grad)
    net.zero_grad(set_to_none=True)
    return torch.cat(rows)


@pytest.fixture
def unsure(trained):
    """The trained network and images in evaluation mode, harder than those it was trained on."""
    net, (images, labels) = trained[0].eval(), trained[1]
    shift = 0.2 * torch.randn(len(images), 1, 1, 1, generator=stream(0, "harder"))
    return net, (images + shift).clamp(0, 1), labels


def test_fgsm_equals_one_step_by_hand(unsure):
    net, images, labels = unsure
    result = sd.evaluate(net, images, labels, threat=THREAT, attacks=[sd.FGSM()], batch_size=32)
    adversarial = (images + 0.06 * slope(net, images, labels).sign()).clamp(0, 1)
    with torch.no_grad():
        clean, attacked = net(images).argmax(1), net(adversarial).argmax(1)
    assert torch.equal(result.attacks["fgsm"].prediction, attacked)
    right = (clean == labels) & (attacked == labels)
    assert result.robust("fgsm").count == int(right.sum())
    assert 0 < result.robust("fgsm").count < result.clean.count == int((clean == labels).sum())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_counts_equal_a_loop_by_hand(unsure, norm):
    net, images, labels = unsure
    eps, seed = 0.06 if norm == "linf" else 0.8, 5
    threat, attack = sd.ThreatModel(norm, str(eps)), sd.PGD(steps=4)
    result = sd.evaluate(net, images, labels, threat=threat, attacks=[attack], batch_size=32, seed=seed)
    x, y, everyone, d = images, labels, torch.arange(len(images)), images[0].numel()
    draws = SeededRandomness([everyone], seed, "pgd-4")  # the same start, everything else by hand
    if norm == "linf":
        shift = eps * (2 * draws.uniform(everyone, d, 0) - 1)
    else:
        noise = draws.normal(everyone, d, 0)
        shift = noise / noise.norm(dim=1, keepdim=True) * eps * draws.uniform(everyone, 1, 1) ** (1 / d)
    z = (x + shift.view_as(x)).clamp(0, 1)
    for _ in range(4):
        g = slope(net, z, y)
        if norm == "linf":
            z = (z + eps / 4 * g.sign()).clamp(x - eps, x + eps)
        else:
            z = z + eps / 4 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            length = (z - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            z = x + (z - x) * (eps / length).clamp(max=1)
        z = z.clamp(0, 1)
    with torch.no_grad():
        clean, attacked = net(images).argmax(1), net(z).argmax(1)
    assert torch.equal(result.attacks["pgd-4"].prediction, attacked)
    assert result.robust("pgd-4").count == int(((clean == labels) & (attacked == labels)).sum())
    assert 0 < result.robust("pgd-4").count < result.clean.count


def test_rates_carry_wilsons_interval(unsure):
    net, images, labels = unsure
    result = sd.evaluate(net, images, labels, threat=THREAT)
    for rate in (result.clean, result.robust("pgd-20")):
        n, p, z = rate.n, Fraction(rate.count, rate.n), Fraction(1.959963984540054)
        # The interval's ends solve (p - q)^2 = z^2 q (1 - q) / n.
        a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
        root = math.sqrt(b * b - 4 * a * c)
        ends = [(-float(b) + sign * root) / (2 * float(a)) for sign in (-1, 1)]
        assert [rate.low, rate.high] == pytest.approx(ends, abs=1e-12)


@dataclass(frozen=True)
class Cheat(Attack):
    """Returns, or writes into what it was given, images that no adversary may show."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    def run(self, net, image, label, threat, context):
        if self.kind == "far away":
            return 1 - image
        if self.kind == "out of range":
            return image + 1e6 * (image.mean() - image).sign()
        if self.kind == "nan":
            return image * torch.nan
        if self.kind == "some nan":
            return torch.where(image > image.mean(), torch.nan, image)
        if self.kind == "half precision":
            return image.bfloat16()
        if self.kind == "writes into the image":
            return image.zero_().add_(0.5)
        if self.kind == "gradient attached":
            return image.requires_grad_(True) * 1
        label.fill_(0)  # "writes into the labels"
        return image


@pytest.mark.parametrize(
    "kind",
    [
        "far away",
        "out of range",
        "nan",
        "some nan",
        "half precision",
        "writes into the image",
        "gradient attached",
        "writes into the labels",
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_cheating_attack_gains_nothing(unsure, norm, kind):
    net, images, labels = unsure
    eps = 0.06 if norm == "linf" else 0.8
    given = images.clone(), labels.clone()
    threat = sd.ThreatModel(norm, str(eps))
    result = sd.evaluate(net, images, labels, threat=threat, attacks=[Cheat(kind)])
    record = result.attacks[kind]
    assert torch.equal(images, given[0])
    assert torch.equal(labels, given[1])
    assert float(record.distance.max()) <= eps * (1 + 1e-5)
    assert not record.distance.requires_grad
    if kind in ("far away", "out of range", "writes into the image"):
        wanted = {
            "far away": 1 - images,
            "out of range": images + 1e6 * (images.mean() - images).sign(),
            "writes into the image": torch.full_like(images, 0.5),
        }[kind]
        delta = wanted - images
        if norm == "linf":
            allowed = images + delta.clamp(-eps, eps)
        else:
            allowed = images + delta * (eps / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
        shown = allowed.clamp(0, 1)
    else:
        shown = images.bfloat16().float() if kind == "half precision" else images
    with torch.no_grad():
        clean, attacked = net(images).argmax(1), net(shown).argmax(1)
    assert torch.equal(result.clean_prediction, clean)
    assert torch.equal(record.prediction, attacked)
    assert result.robust(kind).count == int(((clean == labels) & (attacked == labels)).sum())


def test_attacks_may_be_named_and_autoattack_is_no_stronger_than_its_members(unsure):
    net, images, labels = unsure
    threat = sd.ThreatModel("linf", "0.06")
    result = sd.evaluate(net, images, labels, threat=threat, attacks=["pgd-4", "autoattack"])
    names = [member["name"] for member in result.members("autoattack")]
    assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]
    alone = sd.evaluate(net, images, labels, threat=threat, attacks=["apgd-ce"])
    assert not (result.attacks["autoattack"].robust & ~alone.attacks["apgd-ce"].robust).any()
    with pytest.raises(sd.SettingError, match="pgd-x"):
        sd.evaluate(net, images, labels, attacks=["pgd-x"])


class Changed(nn.Module):
    """A network with something done to its images and its logits."""

    def __init__(self, net, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = net, before or (lambda x: x), after or (lambda z: z)

    def forward(self, x):
        return self.after(self.net(self.before(x)))


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (lambda x: x.mul_(0.9), None, "writes into the images"),
        (lambda x: nn.functional.dropout(x, 0.3, training=True), None, "equal forwards"),
        (None, lambda z: (50 * z).sigmoid(), "lie in \\[0, 1\\]"),
        (None, lambda z: z.softmax(1), "probabilities"),
    ],
)
def test_what_no_attack_can_measure_is_refused_before_it_runs(unsure, before, after, word):
    net, images, labels = unsure
    net = Changed(net, before, after).train()
    with pytest.raises(sd.SettingError, match=word):
        sd.evaluate(net, images, labels, threat=THREAT, attacks=["square-1"])
    assert net.training


def test_a_network_that_draws_is_evaluated_by_an_attack_that_averages(unsure):
    net, images, labels = unsure
    drawing = Changed(net, lambda x: x + 0.01 * torch.randn_like(x))
    result = sd.evaluate(drawing, images[:20], labels[:20], threat=THREAT, attacks=["apgd-ce-2-eot3"])
    assert result.clean.n == 20


class Failing(Changed):
    """Answers ``value`` for some classes where the first pixel has moved a little from the middle."""

    def __init__(self, net, value, classes):
        super().__init__(net)
        self.value, self.classes = value, classes

    def forward(self, x):
        moved = (x[:, 0, 0, 0] - 0.5).abs()
        hit = ((moved > 0.005) & (moved < 0.02))[:, None] & self.classes
        logits = self.net(x)
        return torch.where(hit, torch.full_like(logits, self.value), logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_image_whose_logits_are_not_finite_is_no_robust_one(unsure, value, everywhere):
    """Whichever class argmax finds: among NaN the first, of one infinite logit that one."""
    net, images, labels = unsure
    images = images.clone()
    images[:, 0, 0, 0] = 0.5
    with torch.no_grad():
        logits = net(images)
    labels = logits.argmax(1)
    classes = torch.ones(logits.shape[1], dtype=torch.bool)
    if not everywhere:
        classes[1:] = False
    step = sd.PGD(steps=1, step_size="0.0123", start="none")
    result = sd.evaluate(Failing(net, value, classes), images, labels, threat=THREAT, attacks=[step])
    assert result.clean.count == len(images)
    moved = result.attacks[step.name].distance > 0.01
    assert int(moved.sum()) == len(images)
    assert result.robust(step.name).count == 0
    assert int((labels == 0).sum()) > 0  # argmax would have found these right
