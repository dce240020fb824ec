"""One checkpoint under evaluation: its weights are read once, and its test images uploaded once."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.identity import RunIdentity, check_weights
from softdefend.core.processes import ALONE, Processes
from softdefend.core.store import ResultStore
from softdefend.core.threat import ThreatModel
from softdefend.core.weight_files import load_weights, weights_digest
from softdefend.data import Batch, DataBundle, Resident, SubsetOrder, fingerprint, subset
from softdefend.evaluation.external import identity
from softdefend.evaluation.mask import mask_digest
from softdefend.evaluation.preflight import preflight
from softdefend.evaluation.settings import Size, count_of

_log = logging.getLogger(__name__)
_PREFLIGHT_IMAGES = 1024
"""Images that preflight is shown: a whole test set in float32 may not fit the device."""
_IDENTITY_IMAGES = 64
"""Images by which a network from outside is recognized; they need a gradient."""


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint and what it is evaluated on come from. Nothing of it is loaded yet.

    Args:
        net: gets the weights ``folder/{which}.safetensors``.
        bundle: of which the test images are used.
        folder: results go to ``folder/evaluation``.
        which: the checkpoint.
        trained: the threat of the training, whose results carry the checkpoint's bare name; of a network from
            outside that of its first evaluation.
        threat: what the network is attacked under.
        architecture: what the network is called in other people's tables.
        origin: where a network from outside comes from. None for one trained here, which its run's
            configuration builds.
        run: the run that has to have written the weights; any may have when None.
        additional_data: whether the network has seen more images than the training set; None if not known.
        progress: show bars.
        targeted: classes to be reached, whose results have names of their own.
        mask: values that attacks may change, see :class:`~softdefend.evaluation.evaluate.Evaluator`; its
            results have names of their own too.
        processes: those that evaluate together; the first one writes.
    """

    net: nn.Module
    bundle: DataBundle
    folder: Path
    which: str
    trained: ThreatModel
    threat: ThreatModel
    architecture: str
    origin: str | None = None
    run: RunIdentity | None = None
    additional_data: bool | None = None
    progress: bool = False
    targeted: str | None = None
    mask: Tensor | None = None
    processes: Processes = ALONE

    @property
    def under_trained_threat(self) -> bool:
        """Whether the network is attacked as it was trained: under that threat, towards any class, in all
        pixels."""
        return self.targeted is None and self.mask is None and _same(self.threat, self.trained)

    @property
    def name(self) -> str:
        """Of the result files: under another threat than the trained one, towards chosen classes, or in some
        pixels alone, they lie beside the run's own."""
        end = "" if self.targeted is None else f"-targeted-{self.targeted}"
        end += "" if self.mask is None else f"-mask-{mask_digest(self.mask)[:8]}"
        return result_name(self.which, self.trained, self.threat) + end


def result_name(which: str, trained: ThreatModel, threat: ThreatModel) -> str:
    """Of the result files of a checkpoint under a threat, towards any class.

    Args:
        which: the checkpoint.
        trained: the threat of the training, whose results carry the checkpoint's bare name.
        threat: of the evaluation.
    """
    if _same(threat, trained):
        return which
    return f"{which}-{threat.norm}-{re.sub(r'[^0-9.e]+', '_', str(threat.eps))}"


def _same(one: ThreatModel, other: ThreatModel) -> bool:
    return (one.norm, float(one.eps)) == (other.norm, float(other.eps))


class Checkpoint:
    """A checkpoint on a device. Each part is loaded when it is first needed, and then kept.

    The network is checked by :func:`~softdefend.evaluation.preflight.preflight` before anybody gets it.

    Args:
        source: where everything comes from.
        device: where the network and the test images go.
        assumes_determinism: refuse a network whose logits move when it is loaded.
    """

    def __init__(
        self, source: CheckpointSource, device: torch.device, *, assumes_determinism: bool = True
    ) -> None:
        self.source, self.device = source, device
        self.store = ResultStore(source.folder / "evaluation")
        self._path = source.folder / f"{source.which}.safetensors"
        self._assumes_determinism = assumes_determinism

    @property
    def net(self) -> nn.Module:
        """The network with its weights, in eval mode on the device.

        Raises:
            SettingError: see :attr:`metadata`.
        """
        _ = self.metadata
        return self.source.net

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Of the weights file. The weights are then in the network.

        Raises:
            SettingError: weights that do not fit, of another run or trained beside other test images, or a
                network that cannot be evaluated.
        """
        metadata = load_weights(self.source.net, self._path)
        if self.source.run is not None:
            check_weights(self._path, metadata, self.source.which, self.source.run)
        trained_beside = metadata.get("test_data", self.test_data)
        if trained_beside != self.test_data:
            given = f"test images {self.test_data[:12]}, trained beside test images {trained_beside[:12]}"
            raise SettingError("data", given, "the data that the run was trained with")
        self.source.net.to(self.device).eval()
        self._preflight()
        return metadata

    @cached_property
    def test_data(self) -> str:
        """Digest of the test images and labels."""
        return fingerprint(self.source.bundle.test)

    @cached_property
    def data(self) -> Resident:
        """The test images on the device."""
        return Resident(self.source.bundle.test, self.device)

    def subset(self, size: Size | None, how: SubsetOrder = "stratified") -> Tensor:
        """Positions of ``size`` test images, fewer where there are fewer; see
        :func:`~softdefend.data.subset`."""
        labels = self.source.bundle.test.labels
        return subset(labels, count_of(size, len(labels)), how)

    def test_images(self, size: Size, how: SubsetOrder = "stratified") -> Batch:
        """These test images on the device."""
        return self.data.take(self.subset(size, how).to(self.device))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Digests of the weights, of the test data and of the run, and what else tells a network from outside
        from others with the same weights. Every result file holds them.

        Raises:
            SettingError: no weights; for a network from outside see also :attr:`metadata`.
        """
        known: dict[str, Any] = {"weights": weights_digest(self._path), "test_data": self.test_data}
        if self.source.run is not None:
            known |= {"run": self.source.run.settings, "training_data": self.source.run.data}
        if self.source.origin is not None:
            shown = self.test_images(_IDENTITY_IMAGES)
            known["network"] = identity(self.net, self.source.origin, shown.image, shown.label)
        return known

    def inputs(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a result is a function of, for the result store.

        Args:
            settings: those that the result depends on.
        """
        threat = {"norm": self.source.threat.norm, "eps": str(self.source.threat.eps)}
        return {**self.facts, "threat": threat, "settings": settings}

    def set_aside(self, name: str, inputs: dict[str, Any]) -> Path | None:
        """Copy a result that another is about to replace, and its table, to ``earlier/``.

        Of a run only where both are about the same weights, data and threat: older weights are those of a
        training that has gone on. A folder of networks from outside keeps everything.

        Args:
            name: of the result.
            inputs: of the one to come.

        Returns:
            The copy; None where there is none.
        """
        store = self.store
        if self.source.origin is None and store.find(name, inputs, ignoring=("settings",)) is None:
            return None
        kept = store.set_aside(name, store.path(name, ".parquet"))
        if kept is not None:
            _log.info(f"{name}: what was evaluated before is kept as {kept}")
        return kept

    def require_determinism(self) -> None:
        """Refuse a network that moves, unless that was looked at when it was loaded.

        Raises:
            SettingError: see :attr:`metadata`.
        """
        _ = self.metadata
        if not self._assumes_determinism:
            self._assumes_determinism = True
            self._preflight()

    def _preflight(self) -> None:
        shown = self.test_images(_PREFLIGHT_IMAGES)
        preflight(
            self.source.net,
            shown.image,
            shown.label,
            self.source.threat,
            classes=len(self.source.bundle.classes),
            assumes_determinism=self._assumes_determinism,
        )
