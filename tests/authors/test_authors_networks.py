"""Our networks beside those of published code: the same weights from the same seed, the same logits."""

from __future__ import annotations

import pytest
import torch

from beside import load, needs
from softdefend.models import NetSettings, build
from softdefend.models.wide_resnet import WideResNet

PIXELS = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
"""None of these normalizes."""


def ours(name, **more):
    return lambda: build(NetSettings(name, **more), num_classes=10, in_channels=3, **PIXELS)


@pytest.mark.parametrize(
    ("repository", "path", "theirs", "mine"),
    [
        pytest.param(*case, marks=needs(case[0]), id=name)
        for name, case in {
            "TRADES' ResNet-18": ("TRADES", "models/resnet.py", lambda m: m.ResNet18(), ours("resnet18")),
            "MART's ResNet-18": ("MART", "resnet.py", lambda m: m.ResNet18(), ours("resnet18")),
            "SGLR's ResNet-18": (
                "SGLS",
                "models/resnet.py",
                lambda m: m.resnet18(10),
                ours("resnet18", init="kaiming"),
            ),
            "SAT's ResNet-18": (
                "self-adaptive-training",
                "models/resnet.py",
                lambda m: m.resnet18(10),
                ours("resnet18", init="kaiming"),
            ),
            "AWP's PreActResNet-18": (
                "AWP",
                "AT_AWP/preactresnet.py",
                lambda m: m.PreActResNet18(),
                ours("preact_resnet18"),
            ),
            "SGLR's Wide ResNet, small": (
                "SGLS",
                "models/wideresnet.py",
                lambda m: m.WideResNet(depth=16, widen_factor=2),
                lambda: WideResNet(10, 3, depth=16, widen=2),
            ),
        }.items()
    ],
)
def test_same_seed_same_weights_same_logits(repository, path, theirs, mine, monkeypatch):
    module = load(repository, path, monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rival = theirs(module)
        torch.manual_seed(0)
        net = mine()
    expected = rival.state_dict()
    found = {name: value for name, value in net.state_dict().items() if not name.startswith("normalize")}
    for (name, value), (rival_name, other) in zip(found.items(), expected.items(), strict=True):
        assert torch.equal(value, other), f"{name} and {rival_name}"
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    for training in (True, False):
        logits = (some.double().train(training)(image) for some in (net, rival))
        torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
