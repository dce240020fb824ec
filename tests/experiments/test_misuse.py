"""Misuses of the Python API, each one line that names what is wrong, before anything is written."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor

import softdefend as sd
from softdefend.attacks import Transfer
from softdefend.data import AugmentSettings, DataBundle, Split
from softdefend.evaluation import Ensemble, EvaluateSettings, Requests
from softdefend.experiments.evaluate import evaluate_network
from softdefend.models import NetSettings
from softdefend.training import RuntimeSettings, SaveSettings, ValidateSettings

K = 3
N = 24
IMAGES = torch.rand(N, 2, 5, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % K
QUICK = {
    "attack": sd.PGD(steps=1),
    "optim": sd.OptimSettings(epochs=1, batch_size=8, lr=0.01),
    "augment": AugmentSettings("none"),
    "validate": ValidateSettings(attack=sd.PGD(steps=1)),
    "runtime": RuntimeSettings(device="cpu", threads=1),
    "progress": False,
}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*first, nn.Linear(4, K))


def masked(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MaskedTensor(tensor, torch.ones_like(tensor, dtype=torch.bool))


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


class Returns(nn.Module):
    """A network that returns what a function makes of good logits."""

    def __init__(self, change, before=lambda x: x) -> None:
        super().__init__()
        self.net, self.change, self.before = network(), change, before

    def forward(self, image: Tensor) -> object:
        return self.change(self.net(self.before(image)))


class Auxiliary(Returns):
    """Something else in train mode."""

    def forward(self, image: Tensor) -> object:
        logits = self.net(image)
        return self.change(logits) if self.training else logits


class ExtraState(Returns):
    """State that no file of weights can hold."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def of_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def with_parameter(change) -> nn.Module:
    net = network()
    with warnings.catch_warnings():  # that masked tensors are a prototype
        warnings.simplefilter("ignore")
        net[5].weight = nn.Parameter(change(net[5].weight.detach()))
    return net


def frozen_script() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(network().eval()))


NO_NETWORKS = {
    "class": lambda: nn.Identity,
    "state dict": lambda: network().state_dict(),
    "text": lambda: "resnet18",
    "none": lambda: None,
    "number": lambda: 3,
    "list": lambda: [network()],
    "meta": lambda: network().to("meta"),
    "inference mode": of_inference_mode,
    "sparse parameter": lambda: with_parameter(lambda w: w.to_sparse()),
    "masked parameter": lambda: with_parameter(masked),
    "meta parameter": lambda: with_parameter(lambda w: w.to("meta")),
    "float64": lambda: network().double(),
    "module without forward": lambda: nn.ModuleList([network()]),
    "sparse output": lambda: Returns(lambda z: z.to_sparse()),
    "meta output": lambda: Returns(lambda z: z.to("meta")),
    "nested output": lambda: Returns(nested),
    "masked output": lambda: Returns(lambda z: masked(z.detach())),
    "complex output": lambda: Returns(lambda z: z.to(torch.complex64)),
    "array": lambda: Returns(lambda z: z.detach().numpy()),
    "tuple": lambda: Returns(lambda z: (z, z)),
    "dictionary": lambda: Returns(lambda z: {"logits": z}),
    "other classes": lambda: Returns(lambda z: z[:, :2]),
    "softmax": lambda: Returns(lambda z: z.softmax(1)),
    "not a number": lambda: Returns(lambda z: z * torch.nan),
    "exit": lambda: Returns(lambda z: sys.exit(0)),
    "error": lambda: Returns(lambda z: z[0, 99]),
    "written input": lambda: Returns(lambda z: z, before=lambda x: x.mul_(0.5)),
    "in-place relu": lambda: nn.Sequential(nn.ReLU(inplace=True), network()),
    "no gradient": lambda: Returns(lambda z: z.detach()),
    "no gradient in the image": lambda: Returns(lambda z: z, before=lambda x: x.detach()),
}
ONLY_TRAINING = {
    "function": lambda: lambda x: x.mean((2, 3)),
    "method": lambda: network().forward,
    "frozen TorchScript": frozen_script,
    "extra state": lambda: ExtraState(lambda z: z),
    "auxiliary outputs": lambda: Auxiliary(lambda z: (z, z)),
    "auxiliary dictionary": lambda: Auxiliary(lambda z: {"out": z}),
    "probabilities in train mode": lambda: Auxiliary(lambda z: z.softmax(1)),
    "detached in train mode": lambda: Auxiliary(lambda z: z.detach()),
    "nothing to train": lambda: network().requires_grad_(False),
    "sigmoid": lambda: Returns(torch.sigmoid),
}
NO_IMAGES = {
    "meta": IMAGES.to("meta"),
    "sparse": IMAGES.to_sparse(),
    "nested": nested(IMAGES),
    "masked": masked(IMAGES),
    "mkldnn": IMAGES.to_mkldnn(),
    "complex": IMAGES.to(torch.complex64),
    "bool": IMAGES > 0.5,
    "int64": (255 * IMAGES).long(),
    "array": IMAGES.numpy(),
    "list": IMAGES.tolist(),
    "none": None,
    "one channel less": IMAGES[:, 0],
    "empty": IMAGES[:0],
    "normalized": (IMAGES - 0.5) / 0.25,
    "up to 255": 255 * IMAGES,
    "divided twice": IMAGES / 255,
    "not a number": IMAGES.where(IMAGES < 0.9, torch.nan),
}
NO_LABELS = {
    "meta": LABELS.to("meta"),
    "sparse": LABELS.to_sparse(),
    "masked": masked(LABELS),
    "float": LABELS.float(),
    "bool": LABELS > 0,
    "array": LABELS.numpy(),
    "list": LABELS.tolist(),
    "none": None,
    "text": "labels",
    "one-hot": nn.functional.one_hot(LABELS),
    "fewer": LABELS[:-1],
    "negative": LABELS - 1,
}
NO_SEEDS = {
    "float": 1.5,
    "text": "0",
    "truth": True,
    "array": np.array([1]),
    "NumPy's float": np.float64(3),
    "tensor": torch.tensor(3),
    "nan": float("nan"),
    "list": [0],
    "65 bits": 2**64,
    "far below": -(2**70),
    "thousands of digits": 10**5000,
}


def message_of(call, setting: str | None) -> str:
    with pytest.raises(sd.SettingError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    assert setting is None or caught.value.setting.rpartition(".")[2] == setting
    return message


def refused_training(tmp_path: Path, setting: str | None, **changes: object) -> str:
    arguments = {"net": network, "data": (IMAGES, LABELS), "folder": tmp_path / "run", **QUICK, **changes}
    net = arguments.pop("net")
    net = net() if net is network else net
    message = message_of(lambda: sd.train(net, arguments.pop("data"), **arguments), setting)
    assert not (tmp_path / "run").exists()
    return message


def refused_evaluation(setting: str | None, **changes: object) -> str:
    arguments = {"images": IMAGES, "labels": LABELS, "attacks": ["fgsm"], "device": "cpu", **changes}
    net = arguments.pop("net", None) if "net" in arguments else network()
    given = arguments.pop("images"), arguments.pop("labels")
    return message_of(lambda: sd.evaluate(net, *given, **arguments), setting)


@pytest.mark.parametrize("kind", [*NO_NETWORKS, *ONLY_TRAINING])
def test_what_is_no_network_is_not_trained(kind, tmp_path):
    refused_training(tmp_path, "net", net={**NO_NETWORKS, **ONLY_TRAINING}[kind]())


@pytest.mark.parametrize("kind", NO_NETWORKS)
def test_what_is_no_network_is_not_evaluated(kind):
    refused_evaluation("net", net=NO_NETWORKS[kind]())


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_are_no_images_are_neither_trained_nor_evaluated(kind, tmp_path):
    images = NO_IMAGES[kind]
    refused_training(tmp_path, "images", data=(images, LABELS))
    refused_evaluation("images", images=images)


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_are_no_labels_are_neither_trained_nor_evaluated(kind, tmp_path):
    labels = NO_LABELS[kind]
    refused_training(tmp_path, "labels", data=(IMAGES, labels))
    refused_evaluation("labels", labels=labels)


def test_labels_beyond_the_outputs_are_refused(tmp_path):
    for by in (1, 10**6):
        refused_training(tmp_path, None, data=(IMAGES, LABELS + by))
        refused_evaluation("net", labels=LABELS + by)


@pytest.mark.parametrize("kind", NO_SEEDS)
def test_what_is_no_seed_is_refused(kind, tmp_path):
    refused_training(tmp_path, "seed", seed=NO_SEEDS[kind])
    refused_evaluation("seed", seed=NO_SEEDS[kind])


def test_no_seed_is_the_default_in_training_and_refused_in_an_evaluation():
    refused_evaluation("seed", seed=None)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, np.uint64])
def test_integers_of_numpy_are_integers(integer, tmp_path):
    settings = {
        **QUICK,
        "optim": sd.OptimSettings(epochs=integer(1), batch_size=integer(8), lr=np.float32(0.5)),
    }
    record = sd.train(network(), (IMAGES, LABELS), folder=tmp_path / "run", seed=integer(3), **settings)
    assert record.config["seed"] == 3
    assert record.config["optim"]["batch_size"] == 8
    assert record.config["optim"]["lr"] == 0.5
    attacks, threat = ["pgd-2"], sd.ThreatModel("linf", "0.1")
    one, other = (
        sd.evaluate(network(), IMAGES, LABELS, threat=threat, attacks=attacks, seed=seed, batch_size=size)
        for seed, size in ((3, 8), (integer(3), integer(8)))
    )
    assert torch.equal(one.attacks["pgd-2"].prediction, other.attacks["pgd-2"].prediction)
    assert other.how["seed"] == 3
    assert type(other.how["seed"]) is int


@pytest.mark.parametrize(
    "folder",
    [None, 3, 2.5, "", b"run", ["run"], "a\0b", "\ud800", True, torch.tensor(1)],
    ids=ascii,
)
def test_what_is_no_folder_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_training(tmp_path, "folder", folder=folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attack", sd.FGSM()),
        ("attack", sd.PGD),
        ("attack", "pgd-10"),
        ("label", sd.PGDAT()),
        ("objective", sd.TRADES),
        ("weight", 0.99),
        ("threat", "linf"),
        ("threat", 8 / 255),
        ("optim", {"epochs": 3}),
        ("augment", "flip"),
        ("runtime", "cpu"),
        ("save", SaveSettings),
        ("name", 3),
        ("name", Path("x")),
        ("attack_bn", "sometimes"),
        ("attack_bn", ["eval"]),
        ("epochs", 3),
        ("lr", 0.1),
        ("data", "digits"),
        ("data", None),
        ("data", (IMAGES,)),
        ("data", {"images": IMAGES, "labels": LABELS}),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_setting_of_another_kind_is_refused(setting, value, tmp_path):
    refused_training(tmp_path, setting, **{setting: value})


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: sd.OptimSettings(epochs="3"), "optim.epochs"),
        (lambda: sd.OptimSettings(epochs=2.5), "optim.epochs"),
        (lambda: sd.OptimSettings(epochs=None), "optim.epochs"),
        (lambda: sd.OptimSettings(epochs=True), "optim.epochs"),
        (lambda: sd.OptimSettings(epochs=2**64), "optim.epochs"),
        (lambda: sd.OptimSettings(batch_size=10**30), "optim.batch_size"),
        (lambda: sd.OptimSettings(batch_size=torch.tensor(8)), "optim.batch_size"),
        (lambda: sd.OptimSettings(lr="0.1"), "optim.lr"),
        (lambda: sd.OptimSettings(lr=10**400), "optim.lr"),
        (lambda: sd.OptimSettings(lr=torch.tensor(0.1)), "optim.lr"),
        (lambda: sd.OptimSettings(drop_last=1), "optim.drop_last"),
        (lambda: sd.OptimSettings(schedule="cosine"), "optim.schedule"),
        (lambda: sd.Schedule(milestones=0.5), "schedule.milestones"),
        (lambda: sd.Schedule(milestones=["0.5"]), "schedule.milestones"),
        (lambda: sd.Schedule(kind=3), "schedule.kind"),
        (lambda: ValidateSettings(batch_size=2**64), "validate.batch_size"),
        (lambda: ValidateSettings(attack="pgd-10"), "validate.attack"),
        (lambda: ValidateSettings(alarm=None), "validate.alarm"),
        (lambda: SaveSettings(keep="2"), "save.keep"),
        (lambda: RuntimeSettings(threads=1.5), "runtime.threads"),
        (lambda: RuntimeSettings(device=torch.device("cpu")), "runtime.device"),
        (lambda: RuntimeSettings(compile="yes"), "runtime.compile"),
        (lambda: AugmentSettings(pad="4"), "augment.pad"),
        (lambda: AugmentSettings(kind=None), "augment.kind"),
        (lambda: NetSettings(width=2.5), "net.width"),
        (lambda: NetSettings(normalize="no"), "net.normalize"),
        (lambda: NetSettings(name=nn.Identity), "net.name"),
        (lambda: EvaluateSettings(attacks="fgsm"), "evaluate.attacks"),
        (lambda: EvaluateSettings(attacks=[sd.FGSM()]), "evaluate.attacks"),
        (lambda: EvaluateSettings(batch_size=2**64), "evaluate.batch_size"),
        (lambda: EvaluateSettings(seed=1.0), "evaluate.seed"),
        (lambda: sd.ThreatModel(norm=["linf"]), "threat.norm"),
        (lambda: sd.ThreatModel(eps=None), "budget"),
        (lambda: sd.PGD(steps=2.5), "attack.steps"),
        (lambda: sd.PGD(steps="10"), "attack.steps"),
        (lambda: sd.PGD(steps=10**7), "attack.steps"),
        (lambda: sd.PGD(restarts=None), "attack.restarts"),
        (lambda: sd.PGD(step_size=[1]), "attack.step_size"),
        (lambda: sd.FGSM(loss="mse"), "attack.loss"),
        (lambda: sd.FGSM(loss=nn.CrossEntropyLoss()), "attack.loss"),
    ],
    ids=lambda value: "" if callable(value) else value,
)
def test_settings_check_their_types(make, setting):
    with pytest.raises(sd.SettingError) as caught:
        make()
    assert caught.value.setting == setting
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("threat", "linf"),
        ("threat", 0.03),
        ("threat", sd.ThreatModel),
        ("threat", {"norm": "linf"}),
        ("attacks", "pgd-20"),
        ("attacks", None),
        ("attacks", 3),
        ("attacks", sd.FGSM()),
        ("attacks", [sd.FGSM]),
        ("attacks", [None]),
        ("attacks", [["fgsm"]]),
        ("attacks", ["fgsm", sd.FGSM()]),
        ("attacks", ["no-such-attack"]),
        ("attacks", Ensemble("two", (sd.FGSM(), sd.PGD()))),
        ("batch_size", None),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", "5"),
        ("batch_size", True),
        ("batch_size", 2**64),
        ("batch_size", torch.tensor(5)),
        ("microbatch", 0),
        ("microbatch", 2.5),
        ("microbatch", "5"),
        ("microbatch", 2**64),
        ("precision", None),
        ("precision", "fp16"),
        ("compile", "yes"),
        ("compile", True),
        ("device", None),
        ("device", 3),
        ("device", "gpu"),
        ("device", torch.device("meta")),
    ],
    ids=str,
)
def test_an_evaluation_checks_its_arguments(setting, value):
    refused_evaluation(setting, **{setting: value})


@pytest.mark.parametrize("kind", ["error", "exit", "tuple", "other classes", "inference mode", "softmax"])
def test_a_surrogate_is_looked_at_before_anything_is_attacked(kind, tmp_path):
    surrogate = NO_NETWORKS[kind]()
    transfer = Transfer(surrogate, sd.PGD(steps=1))
    for attacks in ([transfer], [Ensemble("both", (sd.FGSM(), transfer))]):
        refused_evaluation("surrogate", attacks=attacks)
    requests = Requests(surrogates={"other": surrogate})
    call = functools.partial(
        evaluate_network, network(), (IMAGES, LABELS), tmp_path / "r", requests=requests, device="cpu"
    )
    message_of(call, "other")
    assert not (tmp_path / "r").exists()


def test_a_bundle_of_tensors_without_values_is_refused(tmp_path):
    for images in (IMAGES.to("meta"), IMAGES.to_sparse(), masked(IMAGES)):
        with pytest.raises(sd.SettingError, match="images"):
            Split(images, LABELS)
    part = Split(IMAGES, LABELS)
    bundle = DataBundle("mine", part, part, part, ("a", "b"), "0" * 64)
    refused_training(tmp_path, "net", data=bundle)


def test_a_call_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        assert "inference_mode" in refused_training(tmp_path, None, net=network())
        assert "inference_mode" in refused_evaluation(None)


def test_training_without_gradients_around_it_is_training(tmp_path):
    nets = network(), network()
    sd.train(nets[0], (IMAGES, LABELS), folder=tmp_path / "with", **QUICK)
    with torch.no_grad():
        sd.train(nets[1], (IMAGES, LABELS), folder=tmp_path / "without", **QUICK)
    ours, theirs = (net.state_dict() for net in nets)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_from_outside_is_checked_as_well(tmp_path):
    for kind in ("class", "state dict", "none", "inference mode", "sparse parameter", "exit"):
        call = functools.partial(
            evaluate_network, NO_NETWORKS[kind](), (IMAGES, LABELS), tmp_path / "results", device="cpu"
        )
        message_of(call, "net")
        assert not (tmp_path / "results").exists()
    call = functools.partial(
        evaluate_network, ExtraState(lambda z: z), (IMAGES, LABELS), tmp_path / "results", device="cpu"
    )
    message_of(call, "net")
    assert not (tmp_path / "results").exists()


# --- what is accepted ---------------------------------------------------------------------------------------

THREAT = sd.ThreatModel("linf", "0.05")


def predictions(net: object) -> Tensor:
    result = sd.evaluate(net, IMAGES, LABELS, threat=THREAT, attacks=["pgd-3", "fgsm"], device="cpu")
    return torch.stack([result.clean_prediction, *(record.prediction for record in result.attacks.values())])


class Holder:
    """An object that is called like a function."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, image: Tensor) -> Tensor:
        return self.net(image)

    def look(self, image: Tensor) -> Tensor:
        return self.net(image)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: lambda image: net(image),
        lambda net: net.forward,
        lambda net: net.__call__,
        lambda net: functools.partial(lambda other, image: other(image), net),
        Holder,
        lambda net: Holder(net).look,
        lambda net: torch.jit.script(net),
        lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
        lambda net: torch.jit.trace(net.eval(), IMAGES[:2]),
    ],
    ids=["function", "forward", "call", "partial", "object", "method", "script", "frozen script", "trace"],
)
def test_functions_and_torchscript_are_evaluated_as_the_network_behind_them(wrap):
    """In eval mode too: batch statistics would give other predictions."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, K)).train()
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean):
            tensor.normal_(generator=generator)
    wanted = predictions(net)
    assert net.training
    assert torch.equal(predictions(wrap(net)), wanted)
    assert len(wanted.unique()) > 1


def test_a_function_without_a_network_is_evaluated():
    matrix = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    found = predictions(lambda image: image.flatten(1) @ matrix)
    assert torch.equal(found[0], (IMAGES.flatten(1) @ matrix).argmax(1))


@pytest.mark.parametrize("kind", ["attack_bn", "AWP", "clean_bn"])
def test_torchscript_is_not_trained_where_its_statistics_would_move(kind, tmp_path):
    settings = {
        "attack_bn": {"attack_bn": "batch"},
        "AWP": {"weight": sd.AWP()},
        "clean_bn": {"label": sd.SGLR(clean_bn="batch")},
    }[kind]
    assert "TorchScript" in refused_training(tmp_path, "net", net=torch.jit.script(network()), **settings)


def test_torchscript_is_trained_as_the_network_it_was_made_from(tmp_path):
    nets = network(), torch.jit.script(network())
    for number, net in enumerate(nets):
        sd.train(net, (IMAGES, LABELS), folder=tmp_path / str(number), **QUICK)
    ours, theirs = (net.state_dict() for net in nets)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


OUTSIDE = {
    "folder that is a number": ({"folder": 3}, "folder"),
    "folder with a NUL": ({"folder": "a\0b"}, "folder"),
    "data that are one tensor": ({"data": IMAGES}, "data"),
    "data without labels": ({"data": (IMAGES,)}, "data"),
    "threat by its name": ({"threat": "linf"}, "threat"),
    "class of threats": ({"threat": sd.ThreatModel}, "threat"),
    "settings by name": ({"settings": "pgd-20"}, "settings"),
    "requests that are a number": ({"requests": 3}, "requests"),
    "origin that is text": ({"origin": "a"}, "origin"),
    "origin that is no plain value": ({"origin": {"model": torch.zeros(2)}}, "origin"),
}


@pytest.mark.parametrize(("given", "setting"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_an_evaluation_with_a_folder_checks_its_arguments(given, setting, tmp_path):
    arguments = {"folder": tmp_path / "r", "data": (IMAGES, LABELS), **given}
    data, folder = arguments.pop("data"), arguments.pop("folder")
    with pytest.raises(sd.SettingError, match=rf"\A{setting}: got [^\n]*; accepted: "):
        evaluate_network(network(), data, folder, device="cpu", **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audit", "x"),
        ("audit", 1.5),
        ("audit", -1),
        ("corruptions", 1),
        ("robustbench", 3),
        ("log", b"l"),
        ("surrogates", [network()]),
    ],
    ids=["audit-text", "audit-float", "audit-negative", "corruptions", "robustbench", "log", "surrogates"],
)
def test_requests_check_their_types(name, value):
    with pytest.raises(sd.SettingError, match=rf"\Arequests\.{name}: got [^\n]*; accepted: "):
        Requests(**{name: value})
    assert Requests(log="l").log == Path("l")


@pytest.mark.parametrize("value", [0.5, None, "a", ["a"], [None]], ids=str)
def test_statistics_that_are_no_numbers_are_one_line(value):
    with pytest.raises(
        sd.SettingError, match=r"\Anormalization mean: got a \w+, no list of numbers; accepted"
    ):
        sd.normalize(network(), value, [0.5])


def test_statistics_may_be_tensors_and_a_network_must_be_one():
    mean, std = [0.25, 0.5], [0.5, 0.125]
    behind = sd.normalize(network(), torch.tensor(mean), np.array(std))
    assert torch.equal(behind(IMAGES[:2]), sd.normalize(network(), mean, std)(IMAGES[:2]))
    with pytest.raises(sd.SettingError, match=r"\Anet: got None; accepted: an object of Module"):
        sd.normalize(None, mean, std)
