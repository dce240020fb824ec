"""The runs that are analyzed, opened for reading only: one network for each set of saved weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import PGD, Attack, cross_entropy
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.core.threat import ThreatModel
from softdefend.data import DataBundle, DataSettings, Resident, fingerprint, load
from softdefend.data.holdout import complement, draw_by_class
from softdefend.data.sources import read
from softdefend.evaluation import load_weights
from softdefend.execution.network_mode import frozen, tf32
from softdefend.experiments.config import Experiment
from softdefend.experiments.pipeline import make_net, open_run
from softdefend.labels.memory import LabelMemory
from softdefend.report import RunRecord, read_run
from softdefend.report.runs import group_runs
from softdefend.training import checkpoint

WHICH = ("best", "last", "checkpoints", "archived")


@dataclass(frozen=True, eq=False)
class Opened:
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
        """The attack of the training, climbing cross-entropy from a uniform start: one measure for runs of
        different objectives."""
        configured = self.experiment.recipe.attack
        start = "uniform" if configured.start == "auto" else configured.start
        return replace(configured, loss="ce", start=start)

    @cached_property
    def identity(self) -> list[str | None]:
        """What tells the run's data from others: training and validation, test, and the labels before noise,
        which say what is wrong (None where there was none)."""
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

    def about(self, net: nn.Module | None = None) -> RunInfo:
        """What the run's rules are set up with."""
        return RunInfo(self.bundle.train.labels, self.k, self.experiment.optim.epochs, net)


@dataclass(frozen=True)
class Weights:
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
class Subject:
    """One network of one run.

    Attributes:
        run: the run.
        weights: where the network came from.
        net: in eval mode, on the run's device, parameters frozen.
        epoch: epochs trained, or None where the file does not say.
        memory: [n, k] float32 on the CPU: what the label rule, or an objective with a memory, believed of the
            training images at that epoch, rows summing to one; None where neither keeps one, or none was
            saved with these weights.
        refines: whether the memory is the label rule's, which trains towards it.
    """

    run: Opened
    weights: Weights
    net: nn.Module
    epoch: int | None
    memory: Tensor | None = field(default=None, repr=False)
    refines: bool = False

    def targets(self, index: Tensor) -> Tensor | None:
        """What the label rule trains towards on the samples ``index`` [m], [m, k]; None without its memory.

        A rule with a share ``r`` mixes the memory with the given label.
        """
        if self.memory is None or not self.refines:
            return None
        r = float(getattr(self.run.experiment.recipe.label, "r", 1.0))
        given = nn.functional.one_hot(self.run.bundle.train.labels[index], self.run.k).float()
        return r * self.memory[index] + (1 - r) * given


def open_runs(folders: Sequence[str], device: torch.device) -> list[Opened]:
    """Open run folders; runs of the same data settings share their images.

    Raises:
        SettingError: no run there, or one whose data or network cannot be built again.
    """
    records = [read_run(Path(folder)) for folder in dict.fromkeys(folders)]
    bundles: dict[DataSettings, DataBundle] = {}
    opened = []
    for record, name in zip(records, names(records), strict=True):
        experiment = open_run(record.folder)
        if experiment.data not in bundles:
            bundles[experiment.data] = load(experiment.data)
        opened.append(Opened(name, record, experiment, bundles[experiment.data], device))
    return opened


def names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run that no other has: the recipe, then its seed, then its folder where needed."""
    recipe = {run.folder.resolve(): group.label for group in group_runs(records) for run in group.runs}
    short = [recipe[record.folder.resolve()] for record in records]
    seeded = [f"{name}, seed {record.seed}" for name, record in zip(short, records, strict=True)]
    placed = [f"{name} ({record.folder})" for name, record in zip(seeded, records, strict=True)]
    first = [b if short.count(a) > 1 else a for a, b in zip(short, seeded, strict=True)]
    return [b if first.count(a) > 1 else a for a, b in zip(first, placed, strict=True)]


def weights_of(folder: Path, which: Sequence[str]) -> list[Weights]:
    """The weights that a run folder holds now, in the order of ``which``.

    ``last`` of a run that is still going is its newest checkpoint; ``checkpoints`` are all that are kept,
    ``archived`` those of every ``save.archive``-th epoch.

    Raises:
        SettingError: an unknown name in ``which``, or ``archived`` of a run without ``save.archive``.
    """
    kept = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    found: list[tuple[str, Path]] = []
    for name in which:
        if name not in WHICH:
            raise SettingError("--which", repr(name), " or ".join(WHICH))
        if name in ("checkpoints", "archived"):
            stride = _archived_every(folder) if name == "archived" else 1
            found += [(path.stem, path) for path in kept if checkpoint.step_of(path) % stride == 0]
        elif (path := folder / f"{name}.safetensors").is_file():
            found.append((name, path))
        elif name == "last" and kept:
            found.append((name, kept[-1]))
    return [weights for name, path in found if (weights := _hashed(name, path))]


def _archived_every(folder: Path) -> int:
    """Steps between the checkpoints that a run keeps for good."""
    epochs = open_run(folder).save.archive
    if epochs is None:
        raise SettingError(
            "--which", f"'archived' with {folder}", "runs trained with save.archive, or checkpoints"
        )
    rows = read_run(folder).metrics
    return int(epochs * rows[0]["step"] / rows[0]["epoch"]) if rows else 1


def _hashed(name: str, path: Path) -> Weights | None:
    try:
        return Weights(name, path, hashlib.sha256(path.read_bytes()).hexdigest())
    except FileNotFoundError:  # a run that is still going lets its oldest checkpoint go
        return None


def open_subject(run: Opened, weights: Weights) -> Subject:
    """The network that predicts (the average where the weight rule keeps one), with the label memory that
    was saved with it.

    Raises:
        SettingError: a file that is gone, damaged, or of another network.
    """
    net = make_net(run.experiment, run.bundle)
    state: dict[str, Any] | None = None
    if weights.path.suffix == ".ckpt":
        state = checkpoint.load(weights.path)
        net, epoch = _predicting(run, net, state), state["epoch"]
    else:
        epoch = load_weights(net, weights.path).get("epoch")
        if weights.name == "last":
            newest = newest_state(run.folder)
            matches = newest is not None and (newest["epoch"], newest["done"]) == (epoch, 0)
            state = newest if matches else None
    net = net.to(run.device).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    memory, refines = beliefs(run, state) if state else (None, False)
    return Subject(run, weights, net, epoch, memory, refines)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's content on the CPU, or None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return checkpoint.CheckpointFolder(folder / "checkpoints").load()


def _predicting(run: Opened, net: nn.Module, state: dict[str, Any]) -> nn.Module:
    rule = copy.deepcopy(run.experiment.weight)
    try:
        net.load_state_dict(state["net"])
        rule.setup(run.about(net))
        rule.load_state_dict(state["weight"])
    except (KeyError, RuntimeError) as error:
        raise SettingError(
            str(run.folder), "a checkpoint of another network or recipe", "a run that trained as it says"
        ) from error
    return rule.prediction


def beliefs(run: Opened, state: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """Rows [n, k] of the memory in a checkpoint, summing to one, and whether the label rule trains on them.

    The label rule's memory goes before an objective's. A row that has not been filled yet is the one-hot
    given label. (None, False) where there is none.
    """
    labels = run.bundle.train.labels
    for part in ("label", "objective"):
        saved = state.get(part) or {}
        if not any(str(name).startswith("memory") for name in saved):
            continue
        rule = copy.deepcopy(getattr(run.experiment.recipe, part))
        rule.setup(run.about())
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


def initial(run: Opened) -> nn.Module:
    """The network as it was before training, on the CPU: a function of the run's seed."""
    return make_net(run.experiment, run.bundle)


def source_positions(run: Opened) -> Tensor:
    """Where each training image stands in the data source, [n] int64.

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
    if len(at) != len(train) or not torch.equal(raw.train.images[at], train.images):
        raise SettingError(
            "data.source", f"{settings.source}, not what the run had", "the source as it was in training"
        )
    return at


def draw(n: int, count: int, seed: int, name: str) -> Tensor:
    """``count`` of n positions (all, where there are fewer), ascending, [m] int64: the same for every run of
    the same size."""
    order = torch.randperm(n, generator=stream(seed, f"analyse/{name}"))
    return order[:count].sort().values


def batches(index: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Numbered pieces of ``index`` [m] of at most ``size``."""
    yield from enumerate(torch.split(index, size))


def attack_images(
    net: nn.Module,
    data: Resident,
    index: Tensor,
    attack: Attack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Adversarial images [m, c, h, w] of the samples ``index`` [m], against their given labels.

    In eval mode and float32; the result is projected once more.
    """
    found = []
    with frozen(net, "eval"), tf32(False):
        for number, part in batches(index.to(data.labels.device), batch_size):
            batch = data.take(part)
            generator = stream(seed, f"analyse/{attack.name}", step=number, device=batch.image.device)
            adversarial = attack(net, batch.image, batch.label, threat, generator=generator).detach()
            found.append(threat.project(batch.image, adversarial))
    return torch.cat(found)


@torch.no_grad()
def logits_of(net: nn.Module, image: Tensor, batch_size: int) -> Tensor:
    """Logits [m, k] float32 of images [m, c, h, w], piece by piece."""
    with tf32(False):
        return torch.cat([net(part).float() for part in torch.split(image, batch_size)])


def per_sample_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy [b] with labels [b] or probabilities [b, k]: what all parts mean by the loss."""
    return cross_entropy(logits, target)
