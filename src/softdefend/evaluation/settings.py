"""What can be asked of an evaluation, and the checks that come before anything runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from softdefend.attacks.losses import OwnLoss, own_loss
from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields, check_type
from softdefend.core.threat import ThreatModel
from softdefend.data import SubsetOrder
from softdefend.evaluation.autoattack import Ensemble, check_list, parse
from softdefend.evaluation.robustbench import check_standard, read_known
from softdefend.evaluation.targets import by_number, check_target_or_name, check_targeted
from softdefend.execution.search_network import Precision, check_precision

Size = int | Literal["all"]
"""How many images of a data set."""


def count_of(size: Size | None, full: int) -> int:
    """How many of ``full`` images a size means; None is all."""
    return full if size is None or size == "all" else min(size, full)


def check_size(setting: str, size: Size | None, least: int) -> None:
    """Refuse a number of images below ``least``.

    Raises:
        SettingError: such a number.
    """
    if size is not None and size != "all" and size < least:
        raise SettingError(setting, size, f"a whole number >= {least}, or all")


@dataclass(frozen=True)
class EvaluateSettings:
    """The evaluation of a finished run on its test images."""

    attacks: tuple[str, ...] = ("pgd-20",)
    """Names of attacks, such as pgd-20, pgd-50x10 (ten restarts) or autoattack; docs/attacks.md lists all."""
    size: Size | None = None
    """Test images used, at most; all of them when all or null."""
    subset: SubsetOrder = "stratified"
    """Which they are where they are not all, for the curve and the audit too: stratified (each class has its
    share, the same images for every network, 100 of them among 200) or first (the first of the data, as
    RobustBench and AutoAttack take them)."""
    curve_size: Size = 1000
    """Test images for the curve of robust accuracy against eps; 0 leaves it out."""
    examples: int = 8
    """Example images kept for the report; 0 for none."""
    batch_size: int = 500
    """Images of a batch, which draws its own random numbers (AutoAttack's reference code: 250)."""
    microbatch: int | None = None
    """Images computed at once; found from the free memory when null. Changes no result."""
    precision: Precision = "exact"
    """exact (searches in torch's default precision: fp32, with TF32 in convolutions on a GPU), strict (fp32
    without TF32) or fast (bf16). A success counts once strict fp32 confirms it."""
    compile: bool | None = None
    """Compile the network and capture the attacks' steps; null: on a GPU, capture from 256 images on and
    compile from 2,500."""
    seed: int = 0
    """Of the attacks' random numbers."""
    targeted: str | None = None
    """The class that each image is to be taken for, and nothing less counts as success: next (after the
    label), random (each image's own draw), least-likely (on the clean image), or a class by number or name,
    whose images are then left out. Any wrong class when null."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluate")
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if self.size == "all":
            object.__setattr__(self, "size", None)
        for name in self.attacks:
            parse(name)
        check_precision(self.precision)
        if self.targeted is not None:
            check_target_or_name(self.targeted)
        if self.subset not in get_args(SubsetOrder):
            raise SettingError("evaluate.subset", repr(self.subset), " or ".join(get_args(SubsetOrder)))
        check_size("evaluate.size", self.size, 1)
        check_size("evaluate.curve_size", self.curve_size, 0)
        for name, value, least in (
            ("examples", self.examples, 0),
            ("batch_size", self.batch_size, 1),
            ("microbatch", 1 if self.microbatch is None else self.microbatch, 1),
        ):
            if value < least:
                raise SettingError(f"evaluate.{name}", value, f"a whole number >= {least}")
        if not 0 <= self.seed < 2**63:
            raise SettingError("evaluate.seed", self.seed, "a whole number from 0 to 2^63 - 1")

    def with_classes(self, classes: Sequence[str]) -> EvaluateSettings:
        """The same, with the class to be reached by its number.

        Raises:
            SettingError: there is no class of its name.
        """
        return self if self.targeted is None else replace(self, targeted=by_number(self.targeted, classes))

    def images(self, full: int) -> dict[str, Any]:
        """What tells the test images used from others, of ``full`` images: nothing where they are all."""
        count = count_of(self.size, full)
        return {"size": None} if count == full else {"size": count, "subset": self.subset}


@dataclass(frozen=True)
class Requests:
    """What is asked of an evaluation beside the attacks.

    Args:
        audit: images on which signs of gradient masking are looked for; all, or 0 for no audit.
        corruptions: whether accuracy under common corruptions is measured.
        surrogates: networks by name. Adversarial images made on them are tried on the evaluated network.
        robustbench: file for RobustBench's ``model_info`` JSON.
        log: file for AutoAttack's log lines.
        optimality: names of attacks whose closest wrong images are compared.
        optimality_size: images that they are compared on.
        adversarial: whether the adversarial images of every attack are saved.
        union: whether the kept evaluations under all threats are intersected, sample by sample.
        mask: values that attacks may change, bool [h, w], [c, h, w], or one for each test image,
            [n, c, h, w].
    """

    audit: Size = 0
    corruptions: bool = False
    adversarial: bool = False
    surrogates: dict[str, nn.Module] = field(default_factory=dict)
    robustbench: Path | None = None
    log: Path | None = None
    optimality: tuple[str, ...] = ()
    optimality_size: Size = 200
    union: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self, "requests")
        check_size("requests.audit", self.audit, 0)
        for name in ("robustbench", "log"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))
        check_type("requests.surrogates", self.surrogates, dict)
        for name, net in self.surrogates.items():
            check_type(f"surrogates.{name}", net, nn.Module)


def check_attacks(settings: EvaluateSettings, threat: ThreatModel, k: int, device: torch.device) -> None:
    """Refuse attacks that an evaluation would refuse once it runs.

    Args:
        settings: the attacks, and whether the network is compiled.
        threat: what the network is attacked under.
        k: classes.
        device: of the evaluation.

    Raises:
        SettingError: two attacks share a name, one is not made for the threat or for k classes, or compiling
            is asked for on a CPU.
    """
    attacks = [parse(name, max(2, k)) for name in settings.attacks]
    check_list(attacks, threat, targeted=settings.targeted is not None)
    if settings.targeted is not None:
        check_targeted(settings.targeted, k)
    for loss in own_losses(settings.attacks).values():
        loss.check(max(2, k))
    if settings.compile and device.type != "cuda":
        raise SettingError("evaluate.compile", "true on a CPU", "false or null, or a CUDA device")


def own_losses(names: Sequence[str]) -> dict[str, OwnLoss]:
    """The losses of the user's that attacks of these names climb, by ``package.module:function``."""
    parsed = [parse(name) for name in names]
    members = [
        one for attack in parsed for one in (attack.members if isinstance(attack, Ensemble) else [attack])
    ]
    return {loss.path: loss for member in members if (loss := own_loss(member)) is not None}


def check_requests(settings: EvaluateSettings, requests: Requests, full: int) -> None:
    """Refuse what would only fail after hours: files that cannot be written, or not be filled.

    Args:
        settings, requests: what is asked.
        full: images of the test set.

    Raises:
        SettingError: a directory, or a path below a file; see
            :func:`~softdefend.evaluation.robustbench.check_standard`.
    """
    for flag, path in (("--robustbench", requests.robustbench), ("--log", requests.log)):
        if path is not None:
            check_writable(flag, path)
    names = ("robustbench", "log", "audit", "optimality", "surrogates", "union")
    if any(getattr(requests, name) for name in names):
        flags = "--robustbench, --log, --audit, --optimality, --transfer or --union"
        if settings.targeted is not None:
            accepted = f"null with {flags}, which are about any wrong class"
            raise SettingError("evaluate.targeted", settings.targeted, accepted)
        if requests.mask is not None:
            accepted = f"none with {flags}, which are about all pixels"
            raise SettingError("--mask", "a mask", accepted)
    if requests.robustbench:
        if requests.robustbench.suffix == ".md":
            accepted = "a name with .json; the text of the issue gets .md"
            raise SettingError("--robustbench", requests.robustbench, accepted)
        check_standard(settings.attacks, count_of(settings.size, full), full, settings.precision)
        read_known(requests.robustbench)


def check_writable(setting: str, path: Path) -> None:
    """Refuse a path at which no file can be written.

    Args:
        setting: what the user knows it by.
        path: of the file.

    Raises:
        SettingError: a directory, a path below a file, or one that the system cannot have.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name too long, a link to itself
        raise SettingError(setting, f"{path} ({error.strerror})", "a file to write") from error
    if os.path.isdir(path):
        raise SettingError(setting, f"{path}, a directory", "a file to write")
    above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not os.path.isdir(above):
        raise SettingError(setting, f"{path}, below the file {above}", "a file to write, in a directory")
