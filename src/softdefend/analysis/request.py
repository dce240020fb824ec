"""What an analysis is to contain, and how much is measured for it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from softdefend.analysis.runs import WHICH
from softdefend.core.errors import SettingError


@dataclass(frozen=True)
class AnalyzeSettings:
    """How much is measured, and on what.

    Raises:
        SettingError: a number outside its range.
    """

    probe: int = 1000
    """Training images that gradients, information and geometry are measured on; drawn, the same in all runs
    of one size."""
    whole: int = 128
    """Of these, images whose gradient is taken over the whole network; 0 for none."""
    chunk: int = 16
    """Such gradients in memory together, each as large as the network."""
    test: int = 1000
    """Test images."""
    steps: int = 20
    """Steps of PGD on the test images."""
    bins: int = 15
    """Bins of calibration errors and reliability diagrams."""
    components: int = 8
    """Principal components of images and representations in the estimates of mutual information."""
    neighbors: int = 3
    """Neighbors in these estimates."""
    contrast_steps: int = 300
    """Training steps of the contrastive bound's critic."""
    points: int = 11
    """Points of each axis of the loss surface, odd; 0 for no surface."""
    span: float = 1.0
    """The surface reaches so far from the network, in units of its filters' norms."""
    eigen_steps: int = 50
    """Hessian-vector products for the largest eigenvalue, at most, in each of two rounds; 0 for none."""
    linearity_steps: int = 10
    """Steps of the search for the largest departure from linearity."""
    batch_size: int = 250
    """Images in a batch. Random starts are drawn per batch, so it is part of the result."""
    seed: int = 0
    """Of all random draws."""

    def __post_init__(self) -> None:
        least = {"probe": 16, "test": 16, "whole": 0, "points": 0, "eigen_steps": 0, "seed": 0}
        for one in fields(self):
            value, low = getattr(self, one.name), least.get(one.name, 1)
            if one.name == "span":
                if not 0 < value < float("inf"):
                    raise SettingError("--span", value, "a positive number")
            elif value < low:
                raise SettingError(f"--{one.name}", value, f"a whole number >= {low}")
        if self.points and self.points % 2 == 0:
            raise SettingError(
                "--points", self.points, "an odd number, so that the network is one of them, or 0"
            )


@dataclass(frozen=True)
class AnalysisRequest:
    """What an analysis is to contain.

    Attributes:
        parts: names of parts; None for all.
        which: weights of each run: ``best``, ``last``, ``checkpoints`` (all that the run holds) or
            ``archived`` (those of ``save.archive``).
        settings: how much is measured.
        reference: a run whose best network judges labels where clean ones are not known.
        train_votes: .npz of human labels of the training images.
        train_keys: its arrays, one for each annotator, as CIFAR-10N names them.
        test_votes: .npz with counts [n, k] for the test images, as CIFAR-10H has them.

    Raises:
        SettingError: a name in ``which`` that is not known.
    """

    parts: tuple[str, ...] | None = None
    which: tuple[str, ...] = ("best", "last")
    settings: AnalyzeSettings = field(default_factory=AnalyzeSettings)
    reference: str | None = None
    train_votes: str | None = None
    train_keys: tuple[str, ...] = ("random_label1", "random_label2", "random_label3")
    test_votes: str | None = None

    def __post_init__(self) -> None:
        for name in self.which:
            if name not in WHICH:
                raise SettingError("--which", repr(name), " or ".join(WHICH))
