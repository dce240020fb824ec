from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.models import NAMES, NetSettings, Normalize, build, check_logits

QUICK = ["small_cnn", "resnet18", "preact_resnet18"]


def make(name: str, channels: int = 3, classes: int = 10, **more: Any) -> nn.Module:
    settings = NetSettings(name=name, **more)
    return build(
        settings, num_classes=classes, in_channels=channels, mean=[0.4] * channels, std=[0.3] * channels
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("preact_resnet18", 11_172_170),
        ("wrn28_10", 36_479_194),
        ("wrn34_10", 46_160_474),
    ],
)
def test_normalization_adds_no_parameters(name: str, count: int, monkeypatch) -> None:
    monkeypatch.setattr("softdefend.models.wide_resnet.init_weights", lambda net: None)  # seconds of drawing
    net = make(name)
    assert sum(p.numel() for p in net.parameters()) == count
    assert isinstance(next(iter(net.children())), Normalize)


def test_names_are_all_built_in() -> None:
    assert set(NAMES) == {"small_cnn", "resnet18", "preact_resnet18", "wrn28_10", "wrn34_10"}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (32, 32)), (3, (64, 48)), (4, (9, 13))])
def test_any_size_and_any_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    net = make(name, channels, classes=7)
    check_logits(net, (channels, *size), 7, "cpu")
    assert net.training


def test_wide_network_on_digits_sized_images() -> None:
    check_logits(make("wrn28_10", channels=1), (1, 8, 8), 10, "cpu")


@pytest.mark.parametrize("name", QUICK)
def test_a_fresh_network_knows_nothing_yet(name: str) -> None:
    torch.manual_seed(0)
    net = make(name)
    image, label = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    loss = F.cross_entropy(net(image), label).item()
    assert abs(loss - math.log(10)) < 0.5


@pytest.mark.parametrize("name", QUICK)
def test_gradients_reach_the_pixels_and_every_weight(name: str) -> None:
    net = make(name)
    image = torch.rand(4, 3, 16, 16, requires_grad=True)
    F.cross_entropy(net(image), torch.tensor([0, 1, 2, 3])).backward()
    assert image.grad is not None
    assert (image.grad != 0).float().mean() > 0.9
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_weights_and_statistics_survive_a_round_trip(name: str) -> None:
    net, other = make(name), make(name)
    net(torch.rand(4, 3, 16, 16))  # moves the BatchNorm statistics
    other.load_state_dict(net.state_dict())
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(net.eval()(image), other.eval()(image))


@pytest.mark.parametrize("name", QUICK)
def test_same_seed_same_weights(name: str) -> None:
    torch.manual_seed(3)
    first = make(name).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[key]) for key, value in make(name).state_dict().items())


@pytest.mark.parametrize("name", QUICK)
def test_layout_and_lower_precision_change_only_rounding(name: str) -> None:
    torch.manual_seed(0)
    net = make(name).eval()
    image = torch.rand(4, 3, 16, 16)
    expected = net(image)
    last = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(image.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", QUICK)
def test_forward_is_one_graph_without_python_branches_on_data(name: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    net = make(name).eval()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for _ in range(2):
        image = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(compiled(image), net(image))
    assert len(graphs) == 1


def test_width_of_the_small_network() -> None:
    assert make("small_cnn").net.linear.in_features == 64
    assert make("small_cnn", width=5).net.linear.in_features == 10


@pytest.mark.parametrize("init", ["own", "kaiming"])
@pytest.mark.parametrize("name", QUICK)
def test_convolutions_start_as_asked(name: str, init: str) -> None:
    """Torch's uniform draw has variance 1 / (3 fan-in), Kaiming's fan-out draw 2 / fan-out."""
    torch.manual_seed(0)
    for layer in make(name, init=init).modules():
        if isinstance(layer, nn.Conv2d):
            area = layer.weight[0, 0].numel()
            by_kaiming = init == "kaiming" or name == "small_cnn"
            expected = 2 / (area * layer.out_channels) if by_kaiming else 1 / (3 * area * layer.in_channels)
            # The smallest layer has 864 weights: its variance is known to 5%.
            assert layer.weight.var().item() == pytest.approx(expected, rel=0.2)


def test_networks_of_timm_are_normalized_too_and_ones_own_take_pixels(monkeypatch) -> None:
    timm = SimpleNamespace(create_model=lambda name, **kw: nn.Conv2d(kw["in_chans"], kw["num_classes"], 1))
    monkeypatch.setitem(sys.modules, "timm", timm)
    net = make("timm:anything", channels=2, classes=6)
    assert isinstance(net[0], Normalize)
    assert net(torch.rand(1, 2, 4, 4)).shape == (1, 6, 4, 4)
    assert isinstance(make("torch.nn:Flatten"), nn.Flatten)


@pytest.mark.parametrize("name", ["small_cnn", "timm:anything", "torch.nn:Flatten"])
@pytest.mark.parametrize("wanted", [None, True, False])
def test_normalization_stands_in_front_where_the_setting_says_so(name, wanted, monkeypatch) -> None:
    timm = SimpleNamespace(create_model=lambda name, **kw: nn.Flatten())
    monkeypatch.setitem(sys.modules, "timm", timm)
    made = make(name, normalize=wanted)
    in_front = any(isinstance(module, Normalize) for module in made.modules())
    assert in_front == (name != "torch.nn:Flatten" if wanted is None else wanted)
    assert NetSettings(name, normalize=wanted).normalizes == in_front
    bare = made.net if in_front else made
    assert type(bare).__name__ == ("SmallCNN" if name == "small_cnn" else "Flatten")


def fake_timm(asked: list[dict[str, Any]], *, fixed: bool = False, known: bool = True) -> SimpleNamespace:
    """timm with one network; ``asked`` gets the keywords of each call."""

    def create_model(name: str, **keywords: Any) -> nn.Module:
        asked.append({"name": name, **keywords})
        net = nn.Sequential(nn.Flatten(), nn.LazyLinear(keywords["num_classes"]))
        if known:
            net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return net

    def get_pretrained_cfg(name: str) -> object:
        if name.endswith(".no_such_tag"):
            raise RuntimeError("Invalid pretrained tag (no_such_tag)")
        return SimpleNamespace(fixed_input_size=fixed) if known else None

    return SimpleNamespace(create_model=create_model, get_pretrained_cfg=get_pretrained_cfg)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("vit", False), ("vit.", False), ("vit.tag", True), ("vit.a.b", True), ("hf-hub:owner/vit", True)],
)
def test_a_tag_asks_for_pretrained_weights_and_their_normalization(name, weights, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "timm", fake_timm(asked))
    for needed in (True, False):
        net = build(
            NetSettings(f"timm:{name}"),
            num_classes=5,
            in_channels=3,
            mean=[0.7] * 3,
            std=[0.8] * 3,
            pretrained=needed,
        )
        assert asked.pop() == {
            "name": name,
            "pretrained": weights and needed,
            "num_classes": 5,
            "in_chans": 3,
        }
        mean = [0.1, 0.2, 0.3] if weights else [0.7] * 3
        std = [0.4, 0.5, 0.6] if weights else [0.8] * 3
        torch.testing.assert_close(net[0].mean.flatten(), torch.tensor(mean))
        torch.testing.assert_close(net[0].std.flatten(), torch.tensor(std))


def test_pretrained_weights_of_other_channels_or_without_statistics_get_those_of_the_data(
    monkeypatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm([]))
    torch.testing.assert_close(make("timm:vit.tag", channels=2)[0].mean.flatten(), torch.tensor([0.4, 0.4]))
    monkeypatch.setitem(sys.modules, "timm", fake_timm([], known=False))
    torch.testing.assert_close(make("timm:vit.tag")[0].mean.flatten(), torch.tensor([0.4] * 3))
    bare = make("timm:vit.tag", normalize=False)
    assert not any(isinstance(module, Normalize) for module in bare.modules())


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("size", [None, (6, 9)])
def test_a_network_made_for_one_size_is_made_for_the_datas(fixed, size, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "timm", fake_timm(asked, fixed=fixed))
    settings = {"num_classes": 5, "in_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    build(NetSettings("timm:vit"), image_size=size, **settings)
    assert asked[0].get("img_size") == (size if fixed else None)


def test_weights_that_timm_cannot_get_are_one_line(monkeypatch) -> None:
    def create_model(name: str, **keywords: Any) -> nn.Module:
        raise OSError("no connection\nto anywhere")

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    with pytest.raises(
        SettingError, match=r"net.name: got timm:vit.tag \(OSError: no connection to"
    ) as caught:
        make("timm:vit.tag")
    assert "NAME without .TAG has fresh weights" in str(caught.value)
    monkeypatch.setitem(sys.modules, "timm", fake_timm([]))
    with pytest.raises(SettingError, match="Invalid pretrained tag"):
        make("timm:vit.no_such_tag")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NetSettings("resnet19"), "net.name: got resnet19; accepted: small_cnn, resnet18, .*timm:NAME"),
        (NetSettings(""), "net.name"),
        (NetSettings("small_cnn", width=0), "net.width: got 0"),
        (NetSettings("resnet18", width=64), "net.width: got 64 with net.name resnet18"),
        (NetSettings("timm:x", width=64), "net.width"),
        (NetSettings("resnet18", init="he"), "net.init: got 'he'; accepted: own or kaiming"),
        (NetSettings("timm:x", init="kaiming"), "net.init: got kaiming with net.name timm:x; accepted: own"),
    ],
)
def test_unusable_settings_are_refused(settings: NetSettings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build(settings, num_classes=10, in_channels=1, mean=[0.5], std=[1.0])


@pytest.mark.parametrize(
    ("classes", "channels", "mean", "message"),
    [
        (1, 1, [0.5], "num_classes: got 1"),
        (10, 0, [], "in_channels: got 0"),
        (10, 3, [0.5], "1 means for images with 3 channels"),
    ],
)
def test_unusable_shapes_are_refused(classes: int, channels: int, mean: list[float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build(NetSettings("small_cnn"), num_classes=classes, in_channels=channels, mean=mean, std=[1.0])
