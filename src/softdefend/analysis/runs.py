"""The runs that are analyzed, opened for reading only: one network for each set of saved weights."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import PGD
from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.identity import RunIdentity, check_weights
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.core.threat import ThreatModel
from softdefend.data import DataBundle, DataSettings, Resident, fingerprint, load
from softdefend.data.holdout import complement, draw_by_class
from softdefend.data.sources import read
from softdefend.evaluation import load_weights
from softdefend.experiments.config import Experiment
from softdefend.experiments.evaluate import open_run, run_identity
from softdefend.experiments.network import make_net
from softdefend.labels.memory import LabelMemory
from softdefend.report.runs import RunRecord, group_runs, read_run
from softdefend.training import checkpoint
from softdefend.training.start import load_start

WHICH = ("best", "last", "checkpoints", "archived")


@dataclass(frozen=True, eq=False)
class AnalyzedRun:
    """A run folder, its configuration and its data, in memory.

    Attributes:
        name: what tables and figures call the run.
        record: what the folder says.
        experiment: the resolved configuration.
        bundle: the data of the run.
        device: where networks and images go.
    """

    name: str
    record: RunRecord
    experiment: Experiment
    bundle: DataBundle
    device: torch.device

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.record.folder

    @property
    def k(self) -> int:
        """Number of classes."""
        return len(self.bundle.classes)

    @property
    def threat(self) -> ThreatModel:
        """The threat of the training."""
        return self.experiment.recipe.threat

    @property
    def training_attack(self) -> PGD:
        """The attack of the training, with cross-entropy as its loss and, where the objective chooses the
        start, a uniform one. Runs of different objectives are then held against one measure."""
        configured = self.experiment.recipe.attack
        start = "uniform" if configured.start == "auto" else configured.start
        return replace(configured, loss="ce", start=start)

    @cached_property
    def identity(self) -> RunIdentity:
        """What the run's weights and checkpoints carry."""
        return run_identity(self.experiment, self.bundle)

    @cached_property
    def data_digests(self) -> list[str | None]:
        """Digests of the run's data: training and validation, test, and the labels before noise (None where
        there was none)."""
        clean = self.bundle.train.clean_labels
        digest = None if clean is None else hashlib.sha256(clean.numpy().tobytes()).hexdigest()
        return [self.bundle.fingerprint, fingerprint(self.bundle.test), digest]

    @cached_property
    def train(self) -> Resident:
        """The training images on the device."""
        return Resident(self.bundle.train, self.device)

    @cached_property
    def test(self) -> Resident:
        """The test images on the device."""
        return Resident(self.bundle.test, self.device)

    def rule_info(self, net: nn.Module | None = None) -> RunInfo:
        """What the run's rules are set up with."""
        return RunInfo(self.bundle.train.labels, self.k, self.experiment.optim.epochs, net)


@dataclass(frozen=True)
class SavedWeights:
    """A file that holds weights.

    Attributes:
        name: ``best``, ``last``, or a checkpoint's name, such as ``step-000000120``.
        path: the file.
        sha256: of its bytes.
    """

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True, eq=False)
class AnalyzedNetwork:
    """One network of one run.

    Attributes:
        run: the run.
        weights: where the network came from.
        net: in eval mode, on the run's device, parameters frozen.
        epoch: epochs trained, or None where the file does not say.
        memory: [n, k] float32 on the CPU, rows summing to one: the probabilities that the label rule, or an
            objective with a memory, had stored for the training images at that epoch. None where neither
            has a memory, or none was saved with these weights.
        refines: whether the memory is the label rule's, which trains towards it.
    """

    run: AnalyzedRun
    weights: SavedWeights
    net: nn.Module
    epoch: int | None
    memory: Tensor | None = field(default=None, repr=False)
    refines: bool = False

    def targets(self, index: Tensor) -> Tensor | None:
        """The targets [m, k] of the label rule on the samples ``index`` [m]; None without its memory.

        A rule with a share ``r`` mixes the memory with the given label.
        """
        if self.memory is None or not self.refines:
            return None
        r = float(getattr(self.run.experiment.recipe.label, "r", 1.0))
        given = nn.functional.one_hot(self.run.bundle.train.labels[index], self.run.k).float()
        return r * self.memory[index] + (1 - r) * given


def open_runs(folders: Sequence[str], device: torch.device) -> list[AnalyzedRun]:
    """Open run folders; runs of the same data settings share their images.

    Raises:
        SettingError: no run there, or one whose data or network cannot be built again.
    """
    records = [read_run(Path(folder)) for folder in dict.fromkeys(folders)]
    bundles: dict[DataSettings, DataBundle] = {}
    opened = []
    for record, name in zip(records, unique_names(records), strict=True):
        experiment = open_run(record.folder)
        if experiment.data not in bundles:
            bundles[experiment.data] = load(experiment.data)
        opened.append(AnalyzedRun(name, record, experiment, bundles[experiment.data], device))
    return opened


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Give each run a name of its own: the recipe, with the seed and the folder where they are needed."""
    recipe = {
        os.path.realpath(run.folder): group.label for group in group_runs(records) for run in group.runs
    }
    short = [recipe[os.path.realpath(record.folder)] for record in records]
    seeded = [f"{name}, seed {record.seed}" for name, record in zip(short, records, strict=True)]
    placed = [f"{name} ({record.folder})" for name, record in zip(seeded, records, strict=True)]
    first = [b if short.count(a) > 1 else a for a, b in zip(short, seeded, strict=True)]
    return [b if first.count(a) > 1 else a for a, b in zip(first, placed, strict=True)]


def find_weights(folder: Path, which: Sequence[str]) -> list[SavedWeights]:
    """Find the weights that a run folder holds now, in the order of ``which``.

    ``last`` of a run that is still going is its newest checkpoint. ``checkpoints`` are all checkpoints,
    ``archived`` those of every ``save.archive``-th epoch.

    Raises:
        SettingError: an unknown name in ``which``, or ``archived`` of a run without ``save.archive``.
    """
    checkpoints = checkpoint_paths(folder)
    files: list[tuple[str, Path]] = []
    for name in which:
        if name not in WHICH:
            raise SettingError("--which", repr(name), " or ".join(WHICH))
        if name in ("checkpoints", "archived"):
            stride = _archived_every(folder) if name == "archived" else 1
            files += [(path.stem, path) for path in checkpoints if checkpoint.step_of(path) % stride == 0]
        elif (path := folder / f"{name}.safetensors").is_file():
            files.append((name, path))
        elif name == "last" and checkpoints:
            files.append((name, checkpoints[-1]))
    return [weights for name, path in files if (weights := _hashed(name, path))]


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints that a run folder holds now, the newest last."""
    return checkpoint.CheckpointFolder(folder / "checkpoints").paths()


def _archived_every(folder: Path) -> int:
    """Steps between the checkpoints that a run keeps for good."""
    epochs = open_run(folder).save.archive
    if epochs is None:
        raise SettingError(
            "--which", f"'archived' with {folder}", "runs trained with save.archive, or checkpoints"
        )
    rows = read_run(folder).metrics
    return int(epochs * rows[0]["step"] / rows[0]["epoch"]) if rows else 1


def _hashed(name: str, path: Path) -> SavedWeights | None:
    try:
        return SavedWeights(name, path, file_digest(path))
    except FileNotFoundError:  # a run that is still going deletes its oldest checkpoint
        return None
    except OSError as error:
        raise SettingError(str(path), error.strerror, "weights or a checkpoint of the run") from error


def open_network(run: AnalyzedRun, weights: SavedWeights) -> AnalyzedNetwork:
    """Open the network that predicts: the average where the weight rule has one. The label memory that was
    saved with it comes along.

    Raises:
        SettingError: a file that is gone, damaged, or of another network.
    """
    net = make_net(run.experiment, run.bundle)
    state: dict[str, Any] | None = None
    if weights.path.suffix == ".ckpt":
        state = checkpoint.load(weights.path)
        _check_state(run, weights.path, state)
        net, epoch = _predicting_network(run, net, state), state["epoch"]
    else:
        metadata = load_weights(net, weights.path)
        check_weights(weights.path, metadata, weights.name, run.identity)
        epoch = metadata.get("epoch")
        if weights.name == "last":
            newest = newest_state(run.folder)
            matches = newest is not None and (newest["epoch"], newest["done"]) == (epoch, 0)
            state = newest if matches else None
    net = net.to(run.device).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    memory, refines = read_memory(run, state) if state else (None, False)
    return AnalyzedNetwork(run, weights, net, epoch, memory, refines)


def _check_state(run: AnalyzedRun, path: Path, state: Mapping[str, Any]) -> None:
    if (state.get("settings"), state.get("fingerprint")) != run.identity:
        accepted = f"one that the run in {run.folder} wrote"
        raise SettingError(str(path), "a checkpoint of another run", accepted)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's content on the CPU, or None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return checkpoint.CheckpointFolder(folder / "checkpoints").load()


def _predicting_network(run: AnalyzedRun, net: nn.Module, state: dict[str, Any]) -> nn.Module:
    rule = copy.deepcopy(run.experiment.recipe.weight)
    try:
        net.load_state_dict(state["net"])
        rule.setup(run.rule_info(net))
        rule.load_state_dict(state["weight"])
    except (KeyError, RuntimeError) as error:
        raise SettingError(
            str(run.folder), "a checkpoint of another network or recipe", "a run that trained as it says"
        ) from error
    return rule.prediction


def read_memory(run: AnalyzedRun, state: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """Read the memory in a checkpoint: rows [n, k] summing to one, and whether the label rule trains on them.

    The label rule's memory goes before an objective's. A row that has not been filled yet is the one-hot
    given label. (None, False) where there is none.
    """
    labels = run.bundle.train.labels
    for part in ("label", "objective"):
        saved = state.get(part) or {}
        if not any(str(name).startswith("memory") for name in saved):
            continue
        rule = copy.deepcopy(getattr(run.experiment.recipe, part))
        rule.setup(run.rule_info())
        rule.load_state_dict(saved)
        for table in vars(rule).values():
            if isinstance(table, LabelMemory):
                return _filled(table.read(torch.arange(len(labels))), labels), part == "label"
            if isinstance(table, Tensor) and table.shape == (len(labels), run.k):
                return _filled(table.float(), labels), part == "label"
    return None, False


def _filled(rows: Tensor, labels: Tensor) -> Tensor:
    rows = rows.clamp_min(0)
    total = rows.sum(dim=1, keepdim=True)
    given = nn.functional.one_hot(labels, rows.shape[1]).float()
    return torch.where(total > 0, rows / total.clamp_min(1e-12), given)


def initial_network(run: AnalyzedRun) -> nn.Module:
    """Build the network as it was before training, on the CPU. It is a function of the run's seed, and of the
    file that it started from.

    Raises:
        SettingError: that file is no longer there.
    """
    net = make_net(run.experiment, run.bundle, pretrained=run.experiment.init_from is None)
    load_start(net, run.experiment)
    return net


def source_positions(run: AnalyzedRun) -> Tensor:
    """Find where each training image stands in the data source, [n] int64.

    The draws of :func:`softdefend.data.load` are made again and the images compared.

    Raises:
        SettingError: the source is no longer what the run was trained on.
    """
    settings, train = run.experiment.data, run.bundle.train
    raw, seed = read(settings), settings.split_seed
    labels, n = raw.train.labels, len(raw.train)
    pool = torch.arange(n)
    if raw.test is None:
        count = min(max(1, round(settings.test_fraction * n)), n - 1)
        pool = complement(draw_by_class(labels, count, stream(seed, "test")), n)
    held_out = draw_by_class(labels[pool], settings.validation, stream(seed, "split"))
    at = pool[complement(held_out, len(pool))]
    if settings.train_size is not None:
        at = at[draw_by_class(labels[at], settings.train_size, stream(seed, "subset"))]
    if len(at) != len(train) or not torch.equal(raw.train.subset(at).identity, train.identity):
        raise SettingError(
            "data.source", f"{settings.source}, not what the run had", "the source as it was in training"
        )
    return at
