"""The base of label rules, objectives and weight rules: what training calls, and when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from softdefend.core.hints import with_checked_arguments
from softdefend.core.processes import ALONE, Processes


@dataclass(frozen=True)
class RunInfo:
    """What a rule may know about the run before it starts."""

    labels: Tensor
    """[n] int64 on the device: the training labels as given, by index."""
    k: int
    """Number of classes."""
    epochs: int
    """Length of the run."""
    net: nn.Module | None = None
    """The network that is trained, on its device, with its first weights."""
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    """Training precision, for forwards of a rule's own networks."""
    processes: Processes = ALONE
    """Those that train together. Each calls a rule with its share of a batch; what a rule keeps has to be the
    same in all of them."""

    def forward(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """``net`` in training precision: images [b, c, h, w] to logits [b, k] float32."""

        def logits(image: Tensor) -> Tensor:
            with self.autocast():
                out: Tensor = net(image)
            return out.float()

        return logits


class Rule:
    """Base of the three kinds of rules.

    A step is captured as a CUDA graph once per phase. Within a phase a rule therefore does the same tensor
    operations at every step, reads nothing back to the host and has no branch that depends on data. What
    changes over epochs is either the ``phase`` or a tensor on the device that :meth:`advance` writes.
    """

    setting: ClassVar[str] = "rule"
    """The setting that chooses a rule of this kind, which messages begin with."""

    source: ClassVar[str] = ""
    """Where the rule was published, such as ``Zhang et al., ICML 2019, arXiv 1901.08573``."""

    mixes: ClassVar[bool] = True
    """Whether the rule can train on images that CutMix has mixed. It cannot if it remembers single images, or
    treats an image by its one label."""

    remembers: ClassVar[bool] = False
    """Whether the rule keeps something for every training sample, by its index. Extra images have none: a
    label rule that remembers is asked about the others only; the target of the extra ones is the given
    label."""

    def __init_subclass__(cls) -> None:
        """Let the class's constructor refuse values of other types than its hints."""
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = with_checked_arguments(cls.__init__, cls.setting)  # type: ignore[method-assign]

    def setup(self, run: RunInfo) -> None:
        """Called once before training, and before :meth:`load_state_dict` on a resume."""

    def phase(self, epoch: int) -> str:
        """Name of what the rule does in ``epoch`` (zero-based)."""
        return "fixed"

    def advance(self, epoch: float) -> None:
        """Called by the host before every step with the position in the run, in epochs. It must depend on
        nothing else, so that a resumed run needs no history."""

    def after_step(self) -> None:
        """Called by the host after every update of the network."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a crash: tensors, numbers, strings and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, in place."""
