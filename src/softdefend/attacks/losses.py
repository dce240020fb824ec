"""What an attack climbs: one number per sample, larger meaning worse for the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.functions import describe_raised, find_function
from softdefend.core.goals import classes_of, reaches

AttackLoss = Callable[[Tensor], Tensor]
"""Maps logits [b, k] to a loss [b]."""
LOSS_NAMES = ("ce", "margin", "kl", "match")
FROM_CLEAN = ("kl", "match")
"""Those that measure from the clean logits."""

_NO_GAP = 1e-12
"""Keeps a ratio of logits finite where they are all equal; the reference's value."""


def hard_label(target: Tensor) -> Tensor:
    """Labels [b] int64, from labels or from probabilities [b, k], of which the largest names the class. A
    goal to reach (:mod:`softdefend.core.goals`) stays what it is."""
    return target if target.ndim == 1 else target.argmax(dim=1)


def check_classes(logits: Tensor) -> None:
    """Refuse logits [b, k] that leave nothing to confuse; looks at shapes only, reads nothing from a device.

    Raises:
        SettingError: k < 2.
    """
    if logits.shape[1] < 2:
        given = f"a network that returns shape {list(logits.shape)}"
        raise SettingError("net", given, "logits of two or more classes")


def check_target(logits: Tensor, target: Tensor) -> None:
    """Refuse logits [b, k] with k < 2, and a target of other images; looks at shapes only.

    Raises:
        SettingError: a target that is neither [b] nor [b, k].
    """
    check_classes(logits)
    if target.shape not in (logits.shape[:1], logits.shape):
        b, k = logits.shape
        given = f"shape {list(target.shape)} for logits {[b, k]}"
        raise SettingError("target", given, f"labels [{b}], or probabilities {[b, k]}")


def check_differentiable(logits: Tensor) -> None:
    """Refuse logits, or what was made of them, that no gradient in the image can come from; looks at a flag
    of the host, reads nothing from a device.

    Raises:
        SettingError: no path of gradients leads from ``logits`` back.
    """
    if not logits.requires_grad:
        raise _no_gradient()


def image_gradient(value: Tensor, image: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Gradient [b, c, h, w] of the sum of ``value`` [b] in ``image``, as it is: it may hold NaN.

    The sum, not the mean: a sample's gradient must not depend on its batch.

    Args:
        value: made of the logits of ``image``.
        image: [b, c, h, w], a leaf that requires its gradient.
        keep_graph: another gradient will be asked of the same forward.

    Raises:
        SettingError: no path of gradients leads from ``value`` to ``image``.
    """
    check_differentiable(value)
    # None where the only gradients are those of the network's parameters.
    grad: Tensor | None
    (grad,) = torch.autograd.grad(value.sum(), image, retain_graph=keep_graph, allow_unused=True)
    if grad is None:
        raise _no_gradient()
    return grad


def _no_gradient() -> SettingError:
    given = "a network whose logits have no gradient in the image"
    return SettingError("net", given, "a differentiable network; the attack square needs no gradient")


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample, [b]; of a class to be reached its negative.

    Args:
        logits: [b, k], k >= 2.
        target: labels [b] int64, probabilities [b, k], or a goal (:mod:`softdefend.core.goals`).

    Raises:
        SettingError: k < 2, or a target of other images.
    """
    check_target(logits, target)
    if reaches(target):
        return -F.cross_entropy(logits, classes_of(target), reduction="none")
    return F.cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Best wrong logit minus the true one, [b]: positive where the network is wrong (Carlini & Wagner,
    arXiv 1608.04644, f6 without its clamp); of a class to be reached its logit minus the best other one.

    Args:
        logits: [b, k], k >= 2.
        target: labels [b] int64, or probabilities [b, k], of which the largest names the class; or a goal
            (:mod:`softdefend.core.goals`).

    Raises:
        SettingError: k < 2, or a target of other images.
    """
    check_target(logits, target)
    if reaches(target):
        return -margin(logits, classes_of(target))
    label = hard_label(target)
    true = F.one_hot(label, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits.masked_fill(~true, 0).sum(dim=1)


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    """Difference-of-logits ratio of each sample, [b]: the margin over the gap between the largest and the
    third logit, so that it does not change when logits are scaled or shifted (Croce & Hein, arXiv
    2003.01690, eq. 6). Positive where the network is wrong. With two classes there is no third logit: the
    bare :func:`margin`.

    Args:
        logits: [b, k], k >= 2.
        target: labels [b] int64, or probabilities [b, k], of which the largest names the class.

    Raises:
        SettingError: k < 2, or a target of other images.
    """
    check_target(logits, target)
    if logits.shape[1] < 3:
        return margin(logits, target)
    label = hard_label(target)
    top, order = logits.topk(3, dim=1)
    other = torch.where(order[:, 0] == label, top[:, 1], top[:, 0])
    true = logits.gather(1, label[:, None]).squeeze(1)
    return (other - true) / (top[:, 0] - top[:, 2] + _NO_GAP)


def targeted_dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Difference-of-logits ratio towards one wrong class, [b]: that class's logit minus the true one, over
    the gap between the largest logit and the mean of the third and fourth (Croce & Hein, arXiv 2003.01690,
    eq. 7). With fewer than four classes there is no fourth logit: the bare difference.

    Args:
        logits: [b, k], k >= 2.
        label: [b] int64.
        target: the class to reach, [b] int64.

    Raises:
        SettingError: k < 2, or labels or targets of other images.
    """
    for one in (label, target):
        check_target(logits, one)
    pair = logits.gather(1, torch.stack([target, label], dim=1))
    difference = pair[:, 0] - pair[:, 1]
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _NO_GAP)


def kl_from(clean_logits: Tensor) -> AttackLoss:
    """KL(p(x) || p(x')) of each sample against clean logits [b, k], k >= 2 (TRADES, arXiv 1901.08573, eq. 3).

    Raises:
        SettingError: k < 2; in the loss, logits of other images or classes.
    """
    _check_reference(clean_logits)
    log_clean = F.log_softmax(clean_logits.detach(), dim=1)

    def loss(logits: Tensor) -> Tensor:
        _check_alike(logits, log_clean, "measure from")
        return kl_divergence(log_clean, F.log_softmax(logits, dim=1))

    return loss


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, [b], from log-probabilities [b, k]; differentiable in both."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def match_logits(wanted: Tensor) -> AttackLoss:
    """Minus the squared Euclidean distance of each sample's logits from ``wanted`` [b, k], or [1, k] for all:
    an image whose logits are those of another class's image has its class (Tramer et al., arXiv 2002.08347,
    section 4).

    Raises:
        SettingError: k < 2; in the loss, logits of other images or classes than ``wanted``.
    """
    _check_reference(wanted)
    wanted = wanted.detach()

    def loss(logits: Tensor) -> Tensor:
        _check_alike(logits, wanted, "match")
        return -(logits - wanted).square().sum(dim=1)

    return loss


def _check_reference(reference: Any) -> None:
    """Refuse what logits cannot be compared with.

    Raises:
        SettingError: no floating point numbers [b, k] with k >= 2.
    """
    if not isinstance(reference, Tensor) or reference.ndim != 2 or not reference.is_floating_point():
        raise SettingError(
            "attack.loss", f"{described(reference)} as logits", "floating point numbers [b, k]"
        )
    check_classes(reference)


def _check_alike(logits: Tensor, reference: Tensor, verb: str) -> None:
    """Refuse logits that are not of the images, or have not the classes, of ``reference``; of one image it is
    for all."""
    (b, k), (rows, classes) = logits.shape, reference.shape
    if classes != k:
        raise SettingError("attack.loss", f"{classes} logits to {verb}", f"the network's {k} classes")
    if rows not in (1, b):
        raise SettingError("attack.loss", f"logits of {rows} images to {verb}", f"those of the {b} images")


def described(value: Any) -> str:
    """A value that somebody gave, or that a function returned, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {list(value.shape)}".removeprefix("torch.")


def _check_values(value: Any, rows: int, who: str) -> Tensor:
    """What a user's loss returned for so many images.

    Raises:
        SettingError: something else than one floating point number for each.
    """
    if not isinstance(value, Tensor) or value.shape != (rows,) or not value.is_floating_point():
        accepted = "one floating point number for each image, shape [b]"
        raise SettingError("attack.loss", f"{who}, which returned {described(value)}", accepted)
    return value


def checked_loss(loss: Any) -> AttackLoss:
    """A caller's loss, refused where it is not a loss.

    Raises:
        SettingError: it is no function; in the loss, it returned something else than [b].
    """
    if not callable(loss):
        raise SettingError("attack.loss", described(loss), "a function of logits [b, k] that returns [b]")
    return lambda logits: _check_values(loss(logits), len(logits), "a function")


def exchanged(clean_logits: Tensor, target: Tensor) -> Tensor:
    """Clean logits [b, k] with the true class and the likeliest wrong one exchanged: what ``match`` wants.

    Args:
        clean_logits: [b, k], k >= 2.
        target: labels [b] int64, or probabilities [b, k].

    Raises:
        SettingError: k < 2, or a target of other images.
    """
    check_target(clean_logits, target)
    true = hard_label(target)[:, None]
    wrong = clean_logits.scatter(1, true, -torch.inf).argmax(dim=1, keepdim=True)
    pair = torch.cat([true, wrong], dim=1)
    return clean_logits.scatter(1, pair, clean_logits.gather(1, pair.flip(1)))


@dataclass(frozen=True)
class OwnLoss:
    """A loss of the user's: a function of logits [b, k] and labels [b] that returns [b], larger meaning worse
    for the network."""

    path: str
    """``package.module:function``."""
    function: Callable[[Tensor, Tensor], Any]

    @classmethod
    def find(cls, path: str) -> OwnLoss:
        """By its name.

        Raises:
            SettingError: no such function.
        """
        return cls(path, find_function("attack.loss", path))

    def of(self, target: Tensor) -> AttackLoss:
        """The loss for these labels [b], or probabilities [b, k], of which the largest names the class."""
        label = hard_label(target)

        def loss(logits: Tensor) -> Tensor:
            return _check_values(self.function(logits, label), len(label), self.path)

        return loss

    def digest(self) -> str:
        """Of the file that the function is written in; empty where there is none."""
        path = Path(getattr(inspect.getmodule(self.function), "__file__", None) or "")
        return file_digest(path) if path.is_file() else ""

    def check(self, k: int) -> None:
        """Refuse a function that cannot be called with logits [3, k] and labels [3].

        Raises:
            SettingError: it raises, or returns something else than [3].
        """
        try:
            self.of(torch.arange(3) % k)(torch.zeros(3, k))
        except SettingError:
            raise
        except Exception as error:
            given = f"{self.path}, which raised {describe_raised(error)}"
            raise SettingError("attack.loss", given, "a function of logits [b, k] and labels [b]") from error


def own_loss(attack: object) -> OwnLoss | None:
    """The loss of the user's that an attack's settings name, or None."""
    name = getattr(attack, "loss", None)
    return OwnLoss.find(name) if isinstance(name, str) and ":" in name else None


def check_loss(name: str) -> None:
    """Refuse the name of no loss.

    Raises:
        SettingError: neither one of :data:`LOSS_NAMES` nor ``package.module:function`` of a function that
            there is.
    """
    if ":" in name:
        OwnLoss.find(name)
    elif name not in LOSS_NAMES:
        accepted = " or ".join([*LOSS_NAMES, "package.module:function"])
        raise SettingError("attack.loss", repr(name), accepted)


def named(name: str | OwnLoss, target: Tensor, clean_logits: Tensor | None = None) -> AttackLoss:
    """The attack loss called ``name``.

    Args:
        name: one of :data:`LOSS_NAMES`, or a loss of the user's.
        target: labels [b] int64, or probabilities [b, k].
        clean_logits: [b, k], the prediction that ``kl`` and ``match`` measure from.

    Raises:
        SettingError: unknown name.
    """
    if isinstance(name, OwnLoss):
        return name.of(target)
    if name == "ce":
        return lambda logits: cross_entropy(logits, target)
    if name == "margin":
        return lambda logits: margin(logits, target)
    if name == "kl" and clean_logits is not None:
        return kl_from(clean_logits)
    if name == "match" and clean_logits is not None:
        return match_logits(exchanged(clean_logits, target))
    raise SettingError("attack.loss", repr(name), " or ".join(LOSS_NAMES))
