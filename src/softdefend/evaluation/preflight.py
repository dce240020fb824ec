"""What would make an evaluation meaningless, refused in one line before hours are spent on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.network_mode import tf32

LOOK = 256
"""Images that are shown to the network; pixels and labels are all checked."""
SAME = 1e-4
"""Largest relative difference of two outputs that still count as equal: the tolerance of AutoAttack's check,
and far above what the order of sums does to float32."""
COMPANY = 0.05
"""Largest relative difference that another batch may make: bfloat16 in other kernels makes a hundredth."""
NEARLY_ONE = 0.9
"""What some output of a trained network with a sigmoid at its end reaches; the logits of an untrained one,
which may by chance be positive throughout, do not."""
SMALLEST_EPS = 0.1 / 255
"""A tenth of a gray level: below it eps has most likely been divided by 255 twice."""


def preflight(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    classes: int | None = None,
    assumes_determinism: bool = True,
) -> None:
    """Refuse what no evaluation can use: wrong units, modes, shapes, probabilities for logits, a moving net.

    Whether the gradient can be trusted is asked by :func:`softdefend.evaluation.masking.audit` alone.
    Cost: one forward of the first 256 images, three and a few images more where determinism is assumed. The
    network, its statistics and torch's random state are left as they were, and nothing is remembered from
    one call to the next.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], in eval mode, on the device of ``images``.
        images: [n, c, h, w] float32 in [0, 1], n >= 1.
        labels: [n] int64 in [0, k).
        threat: the perturbations allowed.
        classes: k where it is known; the network decides when None.
        assumes_determinism: refuse a network whose logits differ between two forwards of the same images, or
            with the other images of their batch.

    Raises:
        SettingError: naming what does not fit (``images``, ``labels``, ``threat.eps``, ``net``, ``classes``).
    """
    _check_images(images)
    _check_labels(labels, images)
    check_eps(threat, images[0].numel())
    _check_device(net, images)
    _check_mode(net)
    shown = images[:LOOK].clone()
    with torch.no_grad(), tf32(False), own_random_numbers(images.device):
        logits = _first_logits(net, shown)
        _check_mode(net)  # a forward may have switched a layer
        if not torch.equal(shown, images[:LOOK]):
            given = "a network that writes into the images it is given"
            raise SettingError("net", given, "a network that leaves them alone (no in-place operation first)")
        _check_logits(logits, labels, classes)
        if assumes_determinism:
            _check_repeats(net, shown, logits)
            _check_company(net, shown, logits)


def _check_images(images: Tensor) -> None:
    accepted = "images [n, c, h, w] float32 in [0, 1]"
    if not isinstance(images, Tensor):
        raise SettingError("images", type(images).__name__, accepted)
    if images.dtype != torch.float32:
        given = f"{images.dtype} images".removeprefix("torch.")
        raise SettingError("images", given, accepted + " (uint8 pixels: .float() / 255)")
    if images.ndim != 4 or images.numel() == 0:
        raise SettingError("images", f"shape {list(images.shape)}", accepted)
    low, high = float(images.amin()), float(images.amax())
    if not bool(images.isfinite().all()):
        raise SettingError("images", "NaN or infinite pixels", accepted)
    if low < -1e-6 or high > 1 + 1e-6:
        hint = (
            "divide them by 255"
            if low >= 0 and high > 2
            else "normalization belongs into the network (softdefend.normalize), or eps has another unit"
        )
        raise SettingError("images", f"pixels from {low:.4g} to {high:.4g}", f"{accepted}; {hint}")
    if high <= 1 / 255 + 1e-6:
        raise SettingError("images", f"no pixel above {high:.4g}", accepted + ", divided by 255 only once")


def _check_labels(labels: Tensor, images: Tensor) -> None:
    accepted = f"labels [{len(images)}] int64, one class number for each image"
    if not isinstance(labels, Tensor):
        raise SettingError("labels", type(labels).__name__, accepted)
    if labels.shape != images.shape[:1]:
        raise SettingError("labels", f"shape {list(labels.shape)}", accepted)
    if labels.dtype != torch.int64:
        raise SettingError("labels", f"{labels.dtype} labels".removeprefix("torch."), accepted)
    if labels.device != images.device:
        raise SettingError(
            "labels", f"labels on {labels.device}", f"labels on {images.device}, as the images"
        )
    if int(labels.amin()) < 0:
        raise SettingError("labels", f"label {int(labels.amin())}", "class numbers from 0")


def check_eps(threat: ThreatModel, values: int) -> None:
    """Between a tenth of a gray level and where every image can be made the same gray one.

    Args:
        threat: the perturbations.
        values: of an image, c h w.

    Raises:
        SettingError: outside.
    """
    side = 1.0 if threat.norm == "linf" else values**0.5
    example = "8/255" if threat.norm == "linf" else "128/255"
    if not SMALLEST_EPS <= threat.eps < side / 2:
        accepted = f"a value in [0.1/255, {side / 2:.4g}) in pixel units of [0, 1], such as {example}"
        raise SettingError("threat.eps", threat.eps, accepted)


def _check_device(net: nn.Module, images: Tensor) -> None:
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.device != images.device:
            given = f"a network with {name} on {tensor.device}"
            raise SettingError("net", given, f"a network on {images.device}, as the images")


def _check_mode(net: nn.Module) -> None:
    training = [(name, module) for name, module in net.named_modules() if module.training]
    if training:
        name, module = training[-1]  # the innermost: a BatchNorm or dropout rather than what holds it
        given = f"{name or 'the network'} ({type(module).__name__}) in train mode"
        raise SettingError("net", given, "a network in eval mode: net.eval()")


def _first_logits(net: nn.Module, images: Tensor) -> Tensor:
    accepted = f"a network that maps images {list(images.shape)} to floating point logits [{len(images)}, k]"
    try:
        logits = net(images)
    except Exception as error:  # a network's own code may fail in any way
        raise SettingError("net", f"a network that fails on a forward pass ({error})", accepted) from error
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError("net", f"a network that returns {given}", accepted)
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise SettingError("net", f"a network that returns shape {list(logits.shape)}", accepted + ", k >= 2")
    return logits.float()


def _check_logits(logits: Tensor, labels: Tensor, classes: int | None) -> None:
    k, largest = logits.shape[1], int(labels.amax())
    if classes is not None and k != classes:
        raise SettingError("classes", classes, f"{k}, as many as the network has outputs")
    if largest >= k:
        raise SettingError("labels", f"label {largest}", f"labels below {k}, as the network has {k} outputs")
    if not bool(logits.isfinite().all()):
        raise SettingError("net", "a network that returns NaN or infinity", "finite logits")
    accepted = "logits: leave out the network's last softmax (or log-softmax), the losses apply it"
    # Wide enough for a softmax taken in bfloat16.
    if bool(((logits >= 0) & (logits <= 1)).all() and ((logits.sum(1) - 1).abs() < 1e-2).all()):
        raise SettingError("net", "a network that returns probabilities", accepted)
    if bool((logits >= 0).all() and (logits <= 1).all()) and float(logits.amax()) >= NEARLY_ONE:
        accepted = "logits: leave out the network's last sigmoid, under which the attacks' gradients fade; "
        accepted += "cosines need a factor, such as the 10 they were trained with"
        raise SettingError("net", "a network whose outputs all lie in [0, 1]", accepted)
    if bool((logits <= 0).all() and (logits.logsumexp(1).abs() < 1e-2).all()):
        raise SettingError("net", "a network that returns log-probabilities", accepted)


def _check_repeats(net: nn.Module, images: Tensor, logits: Tensor) -> None:
    furthest = max(float(difference(logits, net(images).float()).max()) for _ in range(2))
    if not furthest <= SAME:
        given = f"a network whose logits differ by {furthest:.2g} of their size between equal forwards"
        accepted = (
            f"a deterministic network (differences up to {SAME:g} of the logits); for a random one say so, "
            "and average over its draws"
        )
        raise SettingError("net", given, accepted)


def _check_company(net: nn.Module, images: Tensor, logits: Tensor) -> None:
    # The statistics of eight images are nearly those of all; those of one are not.
    few = {1, min(8, (len(images) + 1) // 2)}
    apart = max(float(difference(logits[:n], _first_logits(net, images[:n])).max()) for n in few)
    if not apart <= COMPANY:
        given = f"a network whose logits differ by {apart:.2g} of their size in another batch"
        accepted = (
            "one that sees each image by itself: batch normalization by running statistics, for example"
        )
        raise SettingError("net", given, accepted)


def usual_lead(logits: Tensor) -> Tensor:
    """How far the other classes lie behind the first, [b] float64, of logits [b, k], k >= 2: the median."""
    return _behind(logits).sort(1).values[:, 1:].median(1).values


def _behind(logits: Tensor) -> Tensor:
    values = logits.double()
    return values.amax(1, keepdim=True) - values


def _leads(logits: Tensor) -> Tensor:
    """How far each class lies behind the first, [b, k] float64, at most ten times the :func:`usual_lead`.

    Softmax, margins and classes know no more of the logits than this: a constant in all of them, or in a
    class that is never meant, hides nothing here.
    """
    return torch.minimum(_behind(logits), 10 * usual_lead(logits)[:, None])


def difference(logits: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of two outputs [b, k] relative to the longer one, [b] in [0, 2]: of the logits or of
    their distances to the first class, whichever is more.

    An image on a border has no distances to speak of: at least the batch's median length counts for these.
    """
    one, other = _leads(logits), _leads(others)
    usual = torch.maximum(one.norm(dim=1), other.norm(dim=1)).median()
    return torch.maximum(_apart(one, other, usual), _apart(logits.double(), others.double()))


def _apart(one: Tensor, other: Tensor, least: Tensor | float = 0.0) -> Tensor:
    length = torch.maximum(one.norm(dim=1), other.norm(dim=1)).clamp_min(least)
    apart: Tensor = torch.linalg.vector_norm(one - other, dim=1)
    return apart / length.clamp_min(torch.finfo(torch.float64).tiny)


@contextlib.contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """A random network draws from a stream of ours; torch's own generators are put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(rng.key(0, "preflight"))
        yield
