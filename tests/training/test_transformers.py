"""Vision transformers and ConvNeXt: networks of attention and LayerNorm train with every rule."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import softdefend
from softdefend import PGDAT, Hard, OptimSettings, Plain
from softdefend.core.errors import SettingError
from softdefend.data import AugmentSettings
from softdefend.models import NetSettings, build
from softdefend.training import RuntimeSettings, SaveSettings
from softdefend.training.config import RULES
from tiny import K, tiny_net

ONCE = SaveSettings()


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(seen)
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A vision transformer for gray images of 6x6 pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 3, stride=3)
        self.cls, self.position = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, 5, width)),
        )
        self.blocks = nn.Sequential(Layer(width), Layer(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, K)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def tiny_vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyViT()


def rule(name: str):
    if name == "KD":
        return softdefend.KD(standard=tiny_net(seed=1), robust=tiny_net(seed=2))
    return getattr(softdefend, name)()


RECIPES = [
    *((name, "PGDAT", "Plain") for name in RULES["label"].names()),
    *(("Hard", name, "Plain") for name in RULES["objective"].names() if name != "PGDAT"),
    *(("Hard", "PGDAT", name) for name in RULES["weight"].names() if name != "Plain"),
]
ADAMW = OptimSettings(
    epochs=2, batch_size=16, name="adamw", lr=2e-3, weight_decay=0.05, decay_all=False, clip=1.0
)


def rows_of(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("label", "objective", "weight"), RECIPES)
def test_a_transformer_trains_with_every_rule(make_trainer, label, objective, weight):
    """Every weight moves, but for those that a rule leaves alone, and all figures are finite."""
    net = tiny_vit()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    rules = rule(label), rule(objective), rule(weight)
    trainer = make_trainer(*rules, net=net, optim=ADAMW, save=ONCE)
    trainer.fit()
    assert all(math.isfinite(row["loss"]) for row in rows_of(trainer))
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_transformer_learns(make_trainer):
    optim = OptimSettings(epochs=12, batch_size=16, name="adamw", lr=1e-2, weight_decay=0.0)
    plain = AugmentSettings("none")
    trainer = make_trainer(Hard(), PGDAT(), net=tiny_vit(), optim=optim, augment=plain, save=ONCE)
    trainer.fit()
    first, *_, last = (row["loss"] for row in rows_of(trainer))
    assert last < 0.8 * first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_recomputation_and_clipping_go_together(make_trainer, precision):
    """A transformer's layers are computed again, in batches of two parts; without dropout the bits of fp32
    are nearly those of a plain run."""
    runs = []
    for folder, parts, recompute in (("plain", 1, False), ("small", 2, True)):
        net = tiny_vit()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optim = OptimSettings(epochs=2, batch_size=16, name="sgd", lr=0.05, accumulate=parts, clip=1.0)
        runtime = RuntimeSettings(device="cpu", threads=1, recompute=recompute, precision=precision)
        run = make_trainer(Hard(), PGDAT(), Plain(), folder, net=net, optim=optim, runtime=runtime, save=ONCE)
        run.fit()
        runs.append(run)
    near = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.1, "atol": 0.02}
    for one, other in zip(*(run.net.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_timms_networks_train(make_trainer, name):
    """Where timm is installed."""
    try:
        importlib.import_module("timm")
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    images, labels = torch.rand(96, 3, 32, 32), torch.arange(96) % K
    data = softdefend.data.from_tensors(images, labels, validation=16, test_fraction=1 / 3)
    settings = NetSettings(f"timm:{name}")
    net = build(settings, num_classes=K, in_channels=3, mean=[0.5] * 3, std=[0.2] * 3, image_size=(32, 32))
    runtime = RuntimeSettings(device="cpu", threads=1, recompute=True)
    optim = OptimSettings(epochs=1, batch_size=16, name="adamw", lr=1e-3, decay_all=False)
    trainer = make_trainer(Hard(), PGDAT(), net=net, data=data, optim=optim, runtime=runtime, save=ONCE)
    trainer.fit()
    assert math.isfinite(rows_of(trainer)[0]["loss"])
    with pytest.raises(SettingError, match="timm"):
        build(NetSettings("timm:no_such"), num_classes=K, in_channels=3, mean=[0.5] * 3, std=[0.2] * 3)
