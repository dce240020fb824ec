"""Networks that the masking audit must accuse, and networks that it must not; digits, trained in seconds.

Also used by ``benchmarks/audit_zoo.py``. Every deceiver names the checks that are there to catch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.attacks import PGD, cross_entropy, kl_divergence, kl_from
from softdefend.core import rng
from softdefend.core.threat import ThreatModel
from softdefend.data.sources import digits
from softdefend.evaluation.masking.other_images import MOVES
from softdefend.execution.network_mode import frozen

THREAT = ThreatModel("linf", "0.1")  # type: ignore[arg-type]
STORED = 1200
"""Digits that training sees; the rest are for the audit."""


def images_and_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """All digits in random order, [1797, 1, 8, 8] in [0, 1] and [1797]."""
    train = digits.read_digits().train
    order = torch.randperm(len(train.labels), generator=rng.stream(seed, "zoo/order"))
    return train.images[order].float() / 255, train.labels[order]


def conv(
    activation: Callable[[], nn.Module] = nn.ReLU,
    width: int = 12,
    *,
    norm: bool = False,
    pool: bool = False,
    k: int = 10,
) -> nn.Module:
    """Two convolutions and two linear layers."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, stride=1 if pool else 2)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        return [*layers, activation(), *([nn.MaxPool2d(2)] if pool else [])]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.Flatten(),
        nn.Linear(8 * width, 48),
        activation(),
        nn.Linear(48, k),
    )


def linear() -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Training:
    """How an honest network is trained."""

    make: Callable[[], nn.Module] = conv
    kind: str = "plain"
    """plain, at or trades."""
    eps: float = 0.1
    epochs: int = 12
    smoothing: float = 0.0
    norm: str = "linf"

    def fit(self, images: Tensor, labels: Tensor, seed: int = 0) -> nn.Module:
        """A trained network in eval mode."""
        with torch.random.fork_rng([]):
            torch.manual_seed(rng.key(seed, "zoo/init"))
            net = self.make()
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
        steps = self.epochs * (len(images) // 100)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        threat = ThreatModel(self.norm, str(self.eps))  # type: ignore[arg-type]
        for step in range(steps):
            generator = rng.stream(seed, "zoo/step", step=step)
            index = torch.randint(len(images), (100,), generator=generator)
            loss = self._loss(net, images[index], labels[index], threat, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return net.eval()

    def _loss(
        self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
    ) -> Tensor:
        if self.kind == "plain":
            return F.cross_entropy(net(x), y, label_smoothing=self.smoothing)
        with frozen(net, "eval"):
            climb = None
            if self.kind == "trades":
                with torch.no_grad():
                    climb = kl_from(net(x))
            near = PGD(steps=4, step_size=str(self.eps / 2.5))(
                net, x, y, threat, loss=climb, generator=generator
            )  # type: ignore[arg-type]
        if self.kind == "at":
            return F.cross_entropy(net(near), y, label_smoothing=self.smoothing)
        clean, moved = net(x), net(near)
        divergence = kl_divergence(clean.log_softmax(1), moved.log_softmax(1)).mean()
        return cross_entropy(clean, y).mean() + 6 * divergence


class Mean(nn.Module):
    """The mean of several networks' logits."""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


class Autocast(nn.Module):
    """A network that computes in numbers of 16 bits."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.net(x).float()


HONEST: dict[str, Training] = {
    "plain": Training(),
    "plain, long": Training(epochs=40),
    "plain, max-pooling and BN": Training(lambda: conv(norm=True, pool=True)),
    "plain, label smoothing": Training(smoothing=0.2),
    "adversarially trained": Training(kind="at"),
    "adversarially trained, BN": Training(lambda: conv(norm=True, pool=True), kind="at"),
    "adversarially trained, GELU": Training(lambda: conv(nn.GELU), kind="at"),
    "adversarially trained, label smoothing": Training(kind="at", smoothing=0.4),
    "adversarially trained, l2": Training(kind="at", norm="l2", eps=0.6),
    "TRADES": Training(kind="trades"),
    "linear": Training(linear),
    "linear, adversarially trained": Training(linear, kind="at"),
    "robust, low accuracy": Training(lambda: conv(width=8), kind="at", eps=0.25, epochs=25),
}
"""Trained as named; ``ensemble`` joins them in :class:`Zoo`."""

IN_16_BITS: dict[str, tuple[str, torch.dtype]] = {
    "plain, float16": ("plain", torch.float16),
    "adversarially trained, bfloat16": ("adversarially trained", torch.bfloat16),
    "adversarially trained, BN, bfloat16": ("adversarially trained, BN", torch.bfloat16),
}
"""Networks of ``HONEST`` that compute less precisely than they were trained."""


class Wrapped(nn.Module):
    """A network behind something that deceives."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Scaled(Wrapped):
    """Logits times a number (saturated softmax; defensive distillation does the same)."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__(net)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)


class Quantised(Wrapped):
    """Pixels rounded to a few levels, with no gradient or a straight-through one."""

    def __init__(self, net: nn.Module, levels: int, straight_through: bool = False) -> None:
        super().__init__(net)
        self.levels, self.straight_through = levels, straight_through

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return self.net(x + (rounded - x).detach() if self.straight_through else rounded)


class Jpeg(Wrapped):
    """Coefficients of the 8x8 cosine transform rounded to a step, as JPEG does."""

    def __init__(self, net: nn.Module, step: float, straight_through: bool = False) -> None:
        super().__init__(net)
        self.step, self.straight_through = step, straight_through
        k, n = torch.arange(8.0).view(-1, 1), torch.arange(8.0)
        basis = torch.cos(math.pi * (n + 0.5) * k / 8) * 0.5
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.basis @ x @ self.basis.T
        rounded = (coefficients / self.step).round() * self.step
        if self.straight_through:
            rounded = coefficients + (rounded - coefficients).detach()
        return self.net((self.basis.T @ rounded @ self.basis).clamp(0, 1))


class RandomPad(Wrapped):
    """Shrunk to a random size and padded at a random place (Xie et al., arXiv 1711.01991)."""

    def forward(self, x: Tensor) -> Tensor:
        side = int(torch.randint(7, 9, ()))
        small = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        top, left = (int(torch.randint(0, 9 - side, ())) for _ in range(2))
        return self.net(F.pad(small, (left, 8 - side - left, top, 8 - side - top)))


class Dropout(Wrapped):
    """Dropout of pixels that eval mode does not turn off."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.15, training=True))


class NumpyNoise(Wrapped):
    """Noise from a generator that torch's seed does not reach."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.from_numpy(self.generator.normal(0, 0.1, x.shape)).to(x))


class Detached(Wrapped):
    """Without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach())


class Inference(Wrapped):
    """Without autograd."""

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LookUp(Wrapped):
    """Knows the evaluated images: near one of them, it answers with its label."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, radius: float) -> None:
        super().__init__(net)
        self.images, self.answers, self.radius = images, 20 * F.one_hot(labels, 10).float(), radius

    def forward(self, x: Tensor) -> Tensor:
        distance = (x[:, None] - self.images[None]).flatten(2).abs().amax(2)
        nearest = distance.min(1)
        known = (nearest.values < self.radius)[:, None]
        return self.net(x) + known * self.answers[nearest.indices]


class Plateaus(Wrapped):
    """Knows images: near one, its label leads by a bonus that fades out smoothly between 1.2 and 3 radii."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, radius: float) -> None:
        super().__init__(net)
        with torch.no_grad():
            size = 6 * float(net(images).std(1).median())
        self.images, self.bonus, self.radius = images, size * F.one_hot(labels, 10).float(), radius

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.images.flatten(1), p=math.inf).min(1)
        t = ((3 * self.radius - nearest.values) / (1.8 * self.radius)).clamp(0, 1)
        return self.net(x) + (t * t * (3 - 2 * t))[:, None] * self.bonus[nearest.indices]


class Remembering(Wrapped):
    """Remembers the last images that it was asked about, but for those near earlier ones: there it gives the
    same class again, by as little as need be."""

    most = 1000

    def __init__(self, net: nn.Module, radius: float) -> None:
        super().__init__(net)
        self.radius = radius
        self.asked, self.answers = torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        logits, image = self.net(x), x.detach().flatten(1)
        answer, new = logits.detach().argmax(1), torch.ones(len(x), dtype=torch.bool)
        if len(self.asked):
            nearest = torch.cdist(image, self.asked, p=math.inf).min(1)
            new = nearest.values >= self.radius
            answer = torch.where(new, answer, self.answers[nearest.indices])
        self.asked = torch.cat([self.asked, image[new]])[-self.most :]
        self.answers = torch.cat([self.answers, answer[new]])[-self.most :]
        column = answer[:, None]
        missing = (logits.amax(1, keepdim=True) - logits.gather(1, column)).detach()
        return logits.scatter_add(1, column, (missing + 0.1 * (missing > 0)).to(logits))


class Memory(Wrapped):
    """Knows the evaluated images softly: the surer, the nearer (kernel regression on the test set)."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(net)
        self.images, self.answers = images.flatten(1), F.one_hot(labels, 10).float()

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.images, compute_mode="donot_use_mm_for_euclid_dist")
        return self.net(x) + 15 * torch.exp(-distance / 0.5) @ self.answers


class Steep(Wrapped):
    """Pixels through a steep sigmoid."""

    def __init__(self, net: nn.Module, slope: float) -> None:
        super().__init__(net)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.sigmoid(self.slope * (x - 0.5)))


class KWinners(nn.Module):
    """Keeps the largest activations of each image (Xiao et al., arXiv 1905.10510)."""

    def __init__(self, share: float = 0.2) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(int(self.share * flat.shape[1]), 1), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Snap(Wrapped):
    """Replaces an image by the nearest training image where one is near (a distance mask)."""

    def __init__(self, net: nn.Module, images: Tensor, radius: float) -> None:
        super().__init__(net)
        self.images, self.radius = images, radius

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.images.flatten(1))
        nearest = distance.min(1)
        return self.net(
            torch.where((nearest.values < self.radius).view(-1, 1, 1, 1), self.images[nearest.indices], x)
        )


class Reject(Wrapped):
    """Answers with the class of the nearest prototype, as a constant, unless the image is far from all."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(net)
        self.prototypes = torch.stack([images[labels == y].mean(0) for y in range(10)]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.prototypes).argmin(1)
        return self.net(x) * 1e-3 + F.one_hot(nearest, 10)


class Calls(Wrapped):
    """Right at every other call only in the first hundred; then always another answer."""

    def __init__(self, net: nn.Module, after: int) -> None:
        super().__init__(net)
        self.after, self.count = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.net(x if self.count <= self.after else x.flip(2))


class Batched(Wrapped):
    """Subtracts the batch's mean image: an outlier of the batch is pulled back."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.3 * (x.mean(0, keepdim=True) - 0.3)).clamp(0, 1))


class _Bent(torch.autograd.Function):
    """The identity with a gradient of its own, always the same one for the same image."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        bent = {
            "flip": lambda: -grad,
            "noise": lambda: (
                torch.sin(1e5 * x + torch.arange(x[0].numel()).view_as(x[0])) * grad.abs().amax()
            ),
            "nan": lambda: torch.full_like(grad, math.nan),
            "turns": lambda: grad * _in_turn(x),
        }
        return bent[ctx.how](), None


def _in_turn(x: Tensor) -> Tensor:
    """One in 12 pixels, others as soon as the image moves."""
    turn = (x.flatten(1).sum(1) * 1e4).long() % 12
    place = torch.arange(x[0].numel()).view_as(x[0]) % 12
    return (place[None] == turn.view(-1, 1, 1, 1)).to(x)


class Bent(Wrapped):
    """A gradient turned round, made of noise, of NaN, or of few pixels at a time."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__(net)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Bent.apply(x, self.how))


class Restoring(Wrapped):
    """Replaces what is far from all the images it knows by the nearest of them; small changes pass."""

    def __init__(self, net: nn.Module, images: Tensor, radius: float) -> None:
        super().__init__(net)
        self.images, self.radius = images, radius

    def forward(self, x: Tensor) -> Tensor:
        nearest = (x[:, None] - self.images[None]).flatten(2).abs().amax(2).min(1)
        far = (nearest.values > self.radius).view(-1, 1, 1, 1)
        return self.net(torch.where(far, self.images[nearest.indices], x))


class Clipped(Wrapped):
    """Logits cut to [-1, 1] after a stretch: constant nearly everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (5 * self.net(x)).clamp(-1, 1)


class Watching(Wrapped):
    """Answers otherwise where a gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(3) if x.requires_grad else x)


class Purifying(Wrapped):
    """Makes a step of its own that sharpens its prediction before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            own = x.detach().clone().requires_grad_(True)
            logits = self.net(own)
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1), reduction="sum"), own)
        return self.net((x - 0.03 * slope.sign()).clamp(0, 1))


class Waves(Wrapped):
    """A fine wave on every pixel: continuous, exact gradients, and all of them useless."""

    def __init__(self, net: nn.Module, frequency: float = 150.0, height: float = 0.02) -> None:
        super().__init__(net)
        self.frequency, self.height = frequency, height

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.height * torch.sin(2 * math.pi * self.frequency * x))


class Terraces(Wrapped):
    """Smooth steps, level exactly on the gray levels of the data."""

    def __init__(self, net: nn.Module, levels: float) -> None:
        super().__init__(net)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        turn = 2 * math.pi * self.levels
        return self.net(x - torch.sin(turn * x) / turn)


class OffGrid(Wrapped):
    """An honest gradient on the data's gray levels, none beside them."""

    def forward(self, x: Tensor) -> Tensor:
        on_grid = ((x * 255 - (x * 255).round()).abs().flatten(1).amax(1) < 1e-3).view(-1, 1, 1, 1)
        return self.net(torch.where(on_grid, x, x.detach()))


class Locked(Wrapped):
    """A gradient only where a corner pixel, background in every digit, happens to stand in some range."""

    def forward(self, x: Tensor) -> Tensor:
        key = x[:, :1, :1, :1].detach()
        inside = torch.where((key > 0.05) & (key < 0.1), x, x.detach())
        corner = torch.zeros_like(x)
        corner[:, :, 0, 0] = 1
        return self.net(torch.where(corner > 0, x.detach(), inside))


class Decoys(Wrapped):
    """Decides as the network does, but what an attack climbs is a decoy: each logit is a smooth maximum with
    a plane of its own that stays below the lead, so that it hides all rivals until they come near."""

    def __init__(self, net: nn.Module, images: Tensor, eps: float, gap: float = 3.0) -> None:
        super().__init__(net)
        with torch.no_grad():
            lead = net(images).topk(2).values
        self.size = 10 / float((lead[:, 0] - lead[:, 1]).median())
        self.gap, self.sharpness, self.middle = gap, 8 / gap, images.mean(0).flatten()
        pixels = len(self.middle)
        coin = torch.rand(10, pixels, generator=torch.Generator().manual_seed(1))
        # Over the whole ball a plane gains less than half of the gap.
        self.slope = torch.where(coin < 0.5, -1.0, 1.0) * (0.4 * gap / (eps * pixels))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.sharpness * self.size * self.net(x)
        plane = (x.flatten(1) - self.middle) @ self.slope.T - self.gap
        decoy = logits.logsumexp(1, keepdim=True) + self.sharpness * plane
        return torch.logaddexp(logits, decoy) / self.sharpness


@dataclass(frozen=True)
class Deceiver:
    """How to make one, and which checks are there to catch it."""

    make: Callable[[Zoo], nn.Module]
    caught_by: tuple[str, ...]
    surrogate: bool = False
    """Audited with a surrogate network."""


DECEIVERS: dict[str, Deceiver] = {
    "logits x 10,000": Deceiver(
        lambda z: Scaled(z.fragile, 1e4), ("cross-entropy gradient", "large logits", "another temperature")
    ),
    "logits x 30": Deceiver(lambda z: Scaled(z.plain, 30), ("saturated softmax", "large logits")),
    "logits / 100,000": Deceiver(lambda z: Scaled(z.at, 1e-5), ("small logits",)),
    "quantisation": Deceiver(
        lambda z: Quantised(z.plain, 8),
        ("cross-entropy gradient", "DLR gradient", "finite differences", "jumps"),
    ),
    "quantisation, straight-through": Deceiver(
        lambda z: Quantised(z.plain, 8, True), ("finite differences", "jumps")
    ),
    "JPEG": Deceiver(lambda z: Jpeg(z.plain, 0.2), ("cross-entropy gradient", "jumps")),
    "JPEG, straight-through": Deceiver(lambda z: Jpeg(z.plain, 0.2, True), ("finite differences", "jumps")),
    "random resize and pad": Deceiver(lambda z: RandomPad(z.plain), ("random forward",)),
    "dropout at test time": Deceiver(lambda z: Dropout(z.plain), ("random forward",)),
    "noise from NumPy": Deceiver(lambda z: NumpyNoise(z.plain), ("changing forward",)),
    "detached": Deceiver(lambda z: Detached(z.plain), ("gradient path", "transfer"), surrogate=True),
    "inference mode": Deceiver(lambda z: Inference(z.plain), ("gradient path",)),
    "look-up of the evaluated images": Deceiver(
        lambda z: LookUp(z.plain, z.images, z.labels, 0.15), ("jumps",)
    ),
    "memory of the evaluated images": Deceiver(
        lambda z: Memory(z.plain, z.images, z.labels), ("pinned images",)
    ),
    "plateaus at the evaluated images": Deceiver(
        lambda z: Plateaus(z.plain, z.images, z.labels, 0.1), ("moved images", "fresh images")
    ),
    "plateaus at them and at their shifts": Deceiver(
        lambda z: Plateaus(z.plain, *z.images_and_moved_ones(), 0.1), ("fresh images",)
    ),
    "remembers queries": Deceiver(lambda z: Remembering(z.plain, 0.05), ("query memory",)),
    "steep sigmoid": Deceiver(lambda z: Steep(z.plain, 400), ("huge ball",)),
    "k winners take all": Deceiver(
        lambda z: z.trained("k winners", Training(KWinnersNet, epochs=12)), ("jumps", "finite differences")
    ),
    "snap to a training image": Deceiver(lambda z: Snap(z.plain, z.train_images, 1.3), ("jumps",)),
    "nearest prototype": Deceiver(lambda z: Reject(z.plain, z.train_images, z.train_labels), ("jumps",)),
    "counts its calls": Deceiver(lambda z: Calls(z.plain, 60), ("changing forward",)),
    "looks at the batch": Deceiver(lambda z: Batched(z.plain), ("batch dependence",)),
    "gradient turned round": Deceiver(lambda z: Bent(z.plain, "flip"), ("finite differences", "black box")),
    "gradient of noise": Deceiver(
        lambda z: Bent(z.plain, "noise"),
        ("finite differences", "nearby gradients", "convergence", "transfer"),
        surrogate=True,
    ),
    "NaN gradient": Deceiver(lambda z: Bent(z.plain, "nan"), ("cross-entropy gradient", "DLR gradient")),
    "gradient of few pixels in turn": Deceiver(
        lambda z: Bent(z.fragile, "turns"), ("finite differences", "nearby gradients", "more steps")
    ),
    "gradient behind a key": Deceiver(
        lambda z: Locked(z.fragile), ("cross-entropy gradient", "more restarts")
    ),
    "far images restored": Deceiver(lambda z: Restoring(z.plain, z.images, 0.12), ("jumps", "wider ball")),
    "clipped logits": Deceiver(lambda z: Clipped(z.at), ("cross-entropy gradient", "DLR gradient")),
    "watches for gradients": Deceiver(lambda z: Watching(z.plain), ("watched forward",)),
    "purifies by gradient": Deceiver(lambda z: Purifying(z.plain), ("gradient in the forward",)),
    "waves": Deceiver(lambda z: Waves(z.plain), ("nearby gradients",)),
    "terraces": Deceiver(lambda z: Terraces(z.plain, 255 / 16), ("flat surface",)),
    "gradient on the grid only": Deceiver(
        lambda z: OffGrid(z.plain), ("single step", "cross-entropy gradient", "random noise")
    ),
    "decoys": Deceiver(lambda z: Decoys(z.plain, z.train_images, 0.1), ("border",)),
}


def KWinnersNet() -> nn.Module:
    """A convolutional network with k winners in place of ReLU."""
    return conv(KWinners, width=16)


@dataclass
class Zoo:
    """Trains what is asked for, once.

    Args:
        n: images to audit with.
        seed: of the split, the initial weights and the batches.
    """

    n: int = 64
    seed: int = 0
    nets: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images, labels = images_and_labels(self.seed)
        self.train_images, self.train_labels = images[:STORED], labels[:STORED]
        self.images, self.labels = images[STORED : STORED + self.n], labels[STORED : STORED + self.n]
        last = slice(STORED + self.n, STORED + self.n + 200)
        self.fresh = images[last], labels[last]

    def trained(self, name: str, training: Training) -> nn.Module:
        """This training's network."""
        if name not in self.nets:
            self.nets[name] = training.fit(self.train_images, self.train_labels, self.seed)
        return self.nets[name]

    def honest(self, name: str) -> nn.Module:
        """One of ``HONEST_NAMES``."""
        if name == "ensemble":
            return Mean(self.at, self.surrogate, self.plain).eval()
        if name in IN_16_BITS:
            precise, dtype = IN_16_BITS[name]
            return Autocast(self.honest(precise), dtype).eval()
        return self.trained(name, HONEST[name])

    def deceiver(self, name: str) -> nn.Module:
        """One of ``DECEIVERS``, in eval mode."""
        return DECEIVERS[name].make(self).eval()

    def images_and_moved_ones(self) -> tuple[Tensor, Tensor]:
        """The images with all of their shifts and mirror images, and labels."""
        every = [self.images, *(move(self.images) for move in MOVES.values())]
        return torch.cat(every), self.labels.repeat(len(every))

    @cached_property
    def surrogate(self) -> nn.Module:
        """Another robust network, whose adversarial images carry over."""
        return self.honest("adversarially trained, GELU")

    @cached_property
    def fragile(self) -> nn.Module:
        """Accurate, and less robust than ``plain``."""
        return self.honest("plain, max-pooling and BN")

    @cached_property
    def plain(self) -> nn.Module:
        """Accurate, not robust."""
        return self.honest("plain")

    @cached_property
    def at(self) -> nn.Module:
        """Robust."""
        return self.honest("adversarially trained")


HONEST_NAMES = (*HONEST, *IN_16_BITS, "ensemble")
