"""What would make an evaluation meaningless, refused in one line before hours are spent on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.threat import EXAMPLES, ThreatModel, diameter
from softdefend.execution.network_mode import frozen, tf32
from softdefend.models.logits import check_values, describe_error, logits_of

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
_FEW = 8
"""Images shown in train mode."""
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
    trained: bool = True,
) -> None:
    """Refuse what no evaluation can use: wrong units, modes, shapes, probabilities for logits, a moving net.

    Whether the gradient can be trusted is asked by :func:`softdefend.evaluation.masking.audit` alone.
    Cost: one forward of the first 256 images and one of a single image, three and a few images more where
    determinism is assumed. The network, its statistics and torch's random state are left as they were, and
    nothing is remembered from one call to the next.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], in eval mode, on the device of ``images``.
        images: [n, c, h, w] float32 in [0, 1], n >= 1.
        labels: [n] int64 in [0, k).
        threat: the perturbations allowed.
        classes: k where it is known; the network decides when None.
        assumes_determinism: refuse a network whose logits differ between two forwards of the same images, or
            with the other images of their batch.
        trained: whether the network has been trained. One with fresh weights has a sigmoid at its end if its
            outputs stay in [0, 1] whatever the weights; that costs a few more forwards where they lie there.

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
        logits = _untouched_logits(net, shown)
        _check_mode(net)  # a forward may have switched a layer
        _check_logits(logits, labels, classes)
        _check_range(net, shown, logits, trained)
        _logits(net, shown[:1])  # the last batch of an attack may hold one image
        if assumes_determinism:
            _check_repeats(net, shown, logits)
            _check_company(net, shown, logits)


def preflight_training(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    classes: int,
    assumes_determinism: bool = True,
    attacked_in_training: bool = True,
) -> None:
    """Refuse before the first step what an evaluation of the trained network would refuse, in the same words,
    and what training itself cannot use in train mode.

    Modes, parameters, statistics and torch's random state are left as they were. Cost: that of
    :func:`preflight`, and one forward and backward of a few images.

    Args:
        net, images, labels, threat, classes, assumes_determinism: as :func:`preflight` has them, but for the
            mode of the network, which may be any.
        attacked_in_training: whether training needs the gradient in the image.

    Raises:
        SettingError: as :func:`preflight`; a network that returns something else in train mode, or whose
            logits have no gradient.
    """
    with frozen(net, "eval"):
        preflight(
            net,
            images,
            labels,
            threat,
            classes=classes,
            assumes_determinism=assumes_determinism,
            trained=False,
        )
    with tf32(False), own_random_numbers(images.device):
        _check_train_mode(net, images, labels, classes, attacked_in_training)


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
    _check_brightness(high)


def check_pixels(images: Tensor) -> None:
    """Refuse stored images [n, c, h, w], uint8 or float32 in [0, 1], that were divided by 255 twice.

    Raises:
        SettingError: none of their pixels is above 1/255.
    """
    _check_brightness(float(images.amax()) / (255 if images.dtype == torch.uint8 else 1))


def _check_brightness(highest: float) -> None:
    if highest <= 1 / 255 + 1e-6:
        accepted = "images [n, c, h, w] float32 in [0, 1], divided by 255 only once, or uint8 from 0 to 255"
        raise SettingError("images", f"no pixel above {highest:.4g}", accepted)


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
    """Between a tenth of a gray level and where every image can be made the same gray one; in l0 below half
    the values, with which many an image can be made another.

    Args:
        threat: the perturbations.
        values: of an image, c h w.

    Raises:
        SettingError: outside.
    """
    half, example = diameter(threat.norm, values) / 2, EXAMPLES[threat.norm]
    if not SMALLEST_EPS <= threat.eps < half:
        accepted = f"a value in [0.1/255, {half:.4g}) in pixel units of [0, 1], such as {example}"
        if threat.norm == "l0":
            accepted = f"a number of values below {half:.4g}, half those of an image"
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


def _logits(net: nn.Module, images: Tensor, accepted: str = "") -> Tensor:
    accepted = (
        accepted
        or f"a network that maps images {list(images.shape)} to floating point logits [{len(images)}, k]"
    )
    logits = logits_of(net, images, accepted)
    if logits.shape[1] < 2:
        raise SettingError("net", f"a network that returns shape {list(logits.shape)}", accepted + ", k >= 2")
    return logits


def _untouched_logits(net: nn.Module, images: Tensor) -> Tensor:
    """The logits of a network that does not write into the images, not even the values that were there: in an
    attack they require a gradient."""
    before, version = images.clone(), _version(images)
    logits = _logits(net, images)
    if _version(images) != version or not torch.equal(images, before):
        given = "a network that writes into the images it is given"
        raise SettingError("net", given, "a network that leaves them alone (no in-place operation first)")
    return logits


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _check_logits(logits: Tensor, labels: Tensor, classes: int | None) -> None:
    k, largest = logits.shape[1], int(labels.amax())
    if classes is not None and k != classes:
        raise SettingError("classes", classes, f"{k}, as many as the network has outputs")
    if largest >= k:
        raise SettingError("labels", f"label {largest}", f"labels below {k}, as the network has {k} outputs")
    check_values(logits)


def _check_range(net: nn.Module, images: Tensor, logits: Tensor, trained: bool) -> None:
    if not _in_unit_range(logits):
        return
    if float(logits.amax()) >= NEARLY_ONE if trained else _stays_in_unit_range(net, images):
        accepted = (
            "logits: leave out the network's last sigmoid, under which the attacks' gradients fade; cosines "
            "need a factor, such as the 10 they were trained with"
        )
        raise SettingError("net", "a network whose outputs all lie in [0, 1]", accepted)


def _in_unit_range(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _stays_in_unit_range(net: nn.Module, images: Tensor) -> bool:
    """Whether outputs lie in [0, 1] with large weights of either sign too, layer by layer from the last."""
    for module in reversed(list(net.modules())):
        weights = [weight for weight in module.parameters(recurse=False) if weight.is_floating_point()]
        kept = [weight.clone() for weight in weights]
        try:
            for sign in (-1, 1) if weights else ():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(sign * (1 + 100 * value.abs()))
                logits = _logits(net, images)
                if not _in_unit_range(logits[logits.isfinite()]):
                    return False
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    return True


def check_determinism(net: nn.Module, images: Tensor) -> None:
    """Refuse a network whose logits differ between equal forwards, or with the other images of a batch.

    Args:
        net: in eval mode, on the device of ``images``.
        images: [n, c, h, w] float32 in [0, 1], n >= 1.

    Raises:
        SettingError: such a network.
    """
    with torch.no_grad(), tf32(False), own_random_numbers(images.device):
        logits = _logits(net, images)
        _check_repeats(net, images, logits)
        _check_company(net, images, logits)


def _check_repeats(net: nn.Module, images: Tensor, logits: Tensor) -> None:
    furthest = max(float(difference(logits, _logits(net, images)).max()) for _ in range(2))
    if not furthest <= SAME:
        given = f"a network whose logits differ by {furthest:.2g} of their size between equal forwards"
        accepted = (
            f"a deterministic network (differences up to {SAME:g} of the logits), or attacks that average "
            "over its random numbers, such as apgd-ce-eot20 and autoattack-rand"
        )
        raise SettingError("net", given, accepted)


def _check_company(net: nn.Module, images: Tensor, logits: Tensor) -> None:
    # The statistics of eight images are nearly those of all; those of one are not.
    few = {1, min(8, (len(images) + 1) // 2)}
    apart = max(float(difference(logits[:n], _logits(net, images[:n])).max()) for n in few)
    if not apart <= COMPANY:
        given = f"a network whose logits differ by {apart:.2g} of their size in another batch"
        accepted = (
            "one that sees each image by itself: batch normalization by running statistics "
            "(track_running_stats=True, in eval mode), for example"
        )
        raise SettingError("net", given, accepted)


def _check_train_mode(
    net: nn.Module, images: Tensor, labels: Tensor, classes: int, attacked_in_training: bool
) -> None:
    n = min(max(len(images), 2), _FEW)  # of a single image batch normalization has no statistics
    at = torch.arange(n, device=images.device) % len(images)
    shown = images[at].requires_grad_(True)
    accepted = (
        f"a network that maps images {list(shown.shape)} to floating point logits [{n}, {classes}] in train "
        "mode as in eval mode: one tensor, without auxiliary outputs"
    )
    with _train_mode(net), torch.enable_grad():
        try:
            logits = _logits(net, shown, accepted)
            _check_logits(logits, labels[at], classes)
        except SettingError as error:
            given = error.given if error.setting == "net" else f"a network with {logits.shape[1]} outputs"
            raise SettingError("net", f"{given}, in train mode", error.accepted) from error
        _check_gradients(net, shown, logits, attacked_in_training)


def _check_gradients(net: nn.Module, images: Tensor, logits: Tensor, attacked_in_training: bool) -> None:
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not learned:
        return  # the optimizer's to refuse
    found: list[Tensor | None] = [None] * (1 + len(learned))
    if logits.requires_grad:
        try:
            found = list(torch.autograd.grad(logits.sum(), [images, *learned], allow_unused=True))
        except (Exception, SystemExit) as error:  # of the network's own backward
            given = f"a network that fails on a backward pass ({describe_error(error)})"
            raise SettingError("net", given, "a differentiable network") from error
    if all(gradient is None for gradient in found[1:]):
        given = "a network whose logits have no gradient in its parameters"
        raise SettingError("net", given, "a differentiable network (no .detach(), no torch.no_grad() in it)")
    if found[0] is None and attacked_in_training:
        given = "a network whose logits have no gradient in the image"
        accepted = "a differentiable network, from the image on: training attacks it by that gradient"
        raise SettingError("net", given, accepted)


@contextlib.contextmanager
def _train_mode(net: nn.Module) -> Iterator[None]:
    """Train mode; modes and buffers, such as running statistics, are put back after."""
    modes = [(module, module.training) for module in net.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in net.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    net.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                if not isinstance(module, torch.jit.ScriptModule):
                    setattr(module, name, buffer)  # a forward may have put another one in its place


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
