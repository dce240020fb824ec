"""Evaluation that trusts nobody: it projects, re-runs and counts for itself, sample by sample, in fp32."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.attacks import Attack
from softdefend.core.environment import versions
from softdefend.core.errors import SettingError
from softdefend.core.goals import to_reach
from softdefend.core.processes import ALONE, Processes
from softdefend.core.threat import ThreatModel
from softdefend.data import Resident
from softdefend.evaluation.autoattack import Ensemble, check_list
from softdefend.evaluation.mask import check_mask
from softdefend.evaluation.records import AttackRecord as AttackRecord
from softdefend.evaluation.records import Evaluation as Evaluation
from softdefend.evaluation.records import Rate as Rate
from softdefend.evaluation.records import Trial, hits
from softdefend.evaluation.resume import Saved, StateFile
from softdefend.evaluation.shares import Shares, carry_over
from softdefend.evaluation.targets import check_targeted, choose_targets
from softdefend.execution.context import AttackContext, SavedProgress
from softdefend.execution.counting import CountingModel, Counts, Mask
from softdefend.execution.randomness import SeededRandomness
from softdefend.execution.search_network import CAPTURE_FROM, COMPILE_FROM, Precision, SearchNetwork

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Evaluator:
    """Measures one network on one split, in eval mode, fp32, with frozen parameters.

    A *batch* owns random numbers, a *microbatch* is what is computed at once. What a verdict
    depends on beside the network and the image (up to the rounding of the network's own sums, which may
    change with the size of a microbatch):

    * FGSM, FAB without restarts, FMN, DeepFool, CW in l2: nothing.
    * PGD, CW in l-inf, HopSkipJump, SurFree: the image's position in the data, and the seed.
    * APGD, Square, FAB with restarts: the seed, and the batch, which is ``batch_size`` images that
      follow each other in the call (in an ensemble: of those still robust); the place in it and how many of
      its images are still right. With the same seed and batch size these are the random numbers, and so the
      verdicts, of AutoAttack's reference code.
    * Other attacks: their batch.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], on the device of ``data``.
        data: the split.
        threat: the set the adversary may use; every result is projected into it again.
        batch_size: images of a batch.
        seed: of every random draw.
        microbatch: images computed at once, as many as ``batch_size`` when None; halved where memory runs
            out.
        precision: of the searches of PGD, APGD, FAB and Square. ``exact`` is what torch computes in unless
            told otherwise, and AutoAttack's reference code with it: fp32 with TF32 in the convolutions of a
            GPU. ``fast`` is bf16. In both a success counts once an fp32 forward without TF32 has confirmed
            it, before that the search goes on. ``strict`` is fp32 without TF32; on a CPU ``exact`` is the
            same. Clean predictions, the final count and all other attacks' forwards are strict in each.
        mask: values that attacks may change, bool [h, w], [c, h, w], or one for each image of the data,
            [n, c, h, w]; all when None. Steps are then not captured.
        keep_images: keep what the attacks made, in :attr:`AttackRecord.adversarial`, in the CPU's memory.
        targeted: classes to reach, see :func:`~softdefend.evaluation.targets.choose_targets`: an image that
            is right as it is counts as robust unless it is taken for its target. Images of a class that all
            are to reach are left out.
        compile: compile the searching network and capture the steps of searches, on a GPU; when None,
            capture from 256 images on, and compile too from 2,500. Changes rounding, nothing else. A copy
            follows changes of the network's weights, not of its structure.
        processes: those that evaluate together, each some of the batches. All of them get the result, which
            on a CPU is byte for byte that of one process.

    Raises:
        SettingError: a batch below one image, an unknown precision, compiling asked for on a CPU, or a mask
            that does not fit the images.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Resident,
        threat: ThreatModel,
        *,
        batch_size: int = 500,
        seed: int = 0,
        microbatch: int | None = None,
        precision: Precision = "exact",
        compile: bool | None = False,
        targeted: str | None = None,
        mask: Tensor | None = None,
        keep_images: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        if targeted is not None:
            check_targeted(targeted)
        if mask is not None:
            check_mask(mask, data.n, data.image_shape, "evaluate.mask")
        microbatch = batch_size if microbatch is None else microbatch
        for name, size in (("batch_size", batch_size), ("microbatch", microbatch)):
            if size < 1:
                raise SettingError(f"evaluate.{name}", size, "a whole number >= 1")
        self.search_network = SearchNetwork(net, data.labels.device, precision)
        if compile and data.labels.device.type != "cuda":
            raise SettingError("evaluate.compile", "true on a CPU", "false or null, or a CUDA device")
        self.data, self.threat, self.batch_size, self.seed = data, threat, batch_size, seed
        self.microbatch, self.compile, self.targeted = microbatch, compile, targeted
        self.keep_images, self.mask = keep_images, mask
        self.processes = processes

    def __call__(
        self,
        attacks: Sequence[Attack | Ensemble],
        *,
        index: Tensor | None = None,
        progress: bool = False,
        state: StateFile | None = None,
        log_costs: bool = False,
    ) -> Evaluation:
        """Clean accuracy, then each attack on every sample.

        Args:
            attacks: in order; two of the same name are refused. Of an ensemble each member attacks only the
                samples that are still right.
            index: positions [n] int64 of the samples in the data, in the order in which batches take them;
                all of them when None.
            progress: show a bar.
            state: where to continue from and to save what is done.
            log_costs: log after each attack, and after each member of an ensemble, what it found and cost.

        Raises:
            SettingError: two attacks share a name, or one is not made for the threat model, before anything
                runs; not even one image fits into memory.
        """
        check_list(attacks, self.threat, targeted=self.targeted is not None)
        index = torch.arange(self.data.n) if index is None else index.cpu()
        # What is computed at once changes the rounding of sums: on a CPU it is what one process computes.
        unit = max(1, self.microbatch // self.batch_size) if self._device.type == "cpu" else 1
        shares = Shares(self.processes, self.batch_size, unit)
        run = _Run(state, self.microbatch, self.search_network, shares)
        with self.search_network.search_mode():
            self._prepare(index, run)
            logits, label = self._clean_logits(index, run), self.data.labels.cpu()[index]
            asked = len(index)
            index, logits, label, target = self._targets(index, logits, label)
            result = Evaluation(self.threat, label, answers(logits, label), index, target=target)
            for number, attack in enumerate(attacks):
                self._measure(attack, str(number), logits, result, run, progress, log_costs)
        if self.targeted is not None:
            result.how.update(targeted=self.targeted, left_out=asked - len(index))
        if self.mask is not None:
            free = self.mask if self.mask.ndim < 4 else self.mask[index.to(self.mask.device)]
            result.how["may_change"] = float(free.float().mean())
        result.how.update(
            precision=self.search_network.precision,
            compiled=self.search_network.compiled,
            captured=self.search_network.step_graphs is not None,
            seed=self.seed,
            batch_size=self.batch_size,
            microbatch=run.microbatch,
            versions=versions(self._device),
        )
        return result

    def under(self, threat: ThreatModel) -> Evaluator:
        """The same evaluator for another threat model; what is compiled is shared."""
        other = copy.copy(self)
        other.threat = threat
        return other

    def show(self, attack: Attack, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [m, c, h, w], their adversarial images, and both predictions as probabilities [m, k]."""
        with self.search_network.search_mode():
            clean = self._forward(index, self.microbatch)
            mask = self._mask(index)
            net = self.search_network.counting_model(len(index), clean, self.microbatch, mask)
            context = AttackContext(net, SeededRandomness([index.cpu()], self.seed, attack.name))
            adversarial, image = self._perturb(attack, index, context, self.data.labels[index])
            with torch.no_grad():
                return image, adversarial, clean.softmax(1), net.exact()(adversarial).softmax(1)

    @property
    def _device(self) -> torch.device:
        return self.data.labels.device

    def _prepare(self, index: Tensor, run: _Run) -> None:
        """Capture and compile, or fuse kernels, where an evaluation of so many images does."""

        def images(index: Tensor) -> Tensor:
            return self.data.take(index.to(self._device)).image

        prepares, compiles = self.compile, self.compile
        if self.compile is None:
            prepares = self._device.type == "cuda" and len(index) >= CAPTURE_FROM
            compiles = len(index) >= COMPILE_FROM
        if prepares:
            prepare = partial(self.search_network.prepare, compile=bool(compiles))
            run.within_memory(lambda microbatch: prepare(images(index[:microbatch])))
        elif self.search_network.precision == "fast":
            run.within_memory(lambda microbatch: self.search_network.fuse(images(index[:microbatch])))

    def _clean_logits(self, index: Tensor, run: _Run) -> Tensor:
        """Of these samples, [n, k] on the CPU; those of the state file where it holds them."""
        logits = run.tensors.get("clean")
        if logits is None:
            parts = torch.split(index.to(self._device), run.microbatch)
            own = [
                run.within_memory(partial(self._forward, part)).cpu() for part in self.processes.deal(parts)
            ]
            logits = run.tensors["clean"] = torch.cat(self.processes.collect(own, len(parts)))
            run.save()
        return logits

    def _targets(
        self, index: Tensor, logits: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The images that have a class to reach, and which; everything on the CPU."""
        if self.targeted is None:
            return index, logits, label, None
        target = choose_targets(self.targeted, label, logits, index, self.seed)
        has = target != label
        if not bool(has.any()):
            given = f"{self.targeted}, the class of every image"
            raise SettingError("evaluate.targeted", given, "a class that some images do not have")
        return index[has], logits[has], label[has], target[has]

    @torch.no_grad()
    def _forward(self, index: Tensor, microbatch: int) -> Tensor:
        """Clean logits of some samples, [m, k]."""
        parts = torch.split(index, microbatch)
        return torch.cat([self.search_network.strict(self.data.take(part).image) for part in parts])

    def _measure(
        self,
        attack: Attack | Ensemble,
        key: str,
        logits: Tensor,
        result: Evaluation,
        run: _Run,
        progress: bool,
        log_costs: bool,
    ) -> None:
        """One attack, or the members of an ensemble one after the other, into ``result``."""
        label, clean, ensemble = result.label, result.clean_prediction, isinstance(attack, Ensemble)
        goal = label if result.target is None else to_reach(result.target)
        left = clean == label if ensemble else torch.ones_like(label, dtype=torch.bool)
        if ensemble and result.target is not None:
            left = left & (clean != result.target)
        trials: dict[str, Trial] = {}
        norm = self.threat.norm
        for place, member in enumerate(attack.under(norm) if isinstance(attack, Ensemble) else [attack]):
            trial = trials[member.name] = self._trial(
                member, f"{key}.{place}", result.index, left, (logits, goal), run, progress
            )
            result.attacks[attack.name] = AttackRecord.of(trials, label, clean, ensemble, result.target)
            if log_costs:
                _log.info(cost_line(result.members(attack.name)[-1]))
            left = left & ~hits(trial.prediction, label, result.target)

    def _trial(
        self,
        attack: Attack,
        key: str,
        index: Tensor,
        left: Tensor,
        known: tuple[Tensor, Tensor],
        run: _Run,
        progress: bool,
    ) -> Trial:
        """One attack on the samples flagged in ``left`` [n], batches in groups that fill a microbatch."""
        trial, done = run.open(key, left)
        batches = run.own_batches(key)
        images = sum(len(rows) for _, rows in batches)
        with tqdm(total=images, desc=attack.name, leave=False, disable=None if progress else True) as bar:
            bar.update(sum(len(rows) for _, rows in batches[:done]))
            while done < len(batches):
                count = run.group or max(1, run.microbatch // self.batch_size)
                group = batches[done : done + count]
                run.group, preparing = len(group), self.search_network.seconds
                rows = torch.cat([rows for _, rows in group])
                attacked = [(number, index[rows]) for number, rows in group]
                found = run.within_memory(
                    partial(self._attack_group, attack, attacked, [each[rows] for each in known], run)
                )
                run.exclude(self.search_network.seconds - preparing)
                done += len(group)
                found.write(trial, rows)
                run.close_group(key, done)
                bar.update(len(rows))
        # The next attack takes other steps: what was captured for each would add up.
        self.search_network.release_graphs()
        return run.of_all_processes(key)

    def _attack_group(
        self,
        attack: Attack,
        batches: Sequence[tuple[int, Tensor]],
        known: Sequence[Tensor],
        run: _Run,
        microbatch: int,
    ) -> _Found:
        """Attack several batches at once: their numbers, their positions in the data, and the clean logits
        [m, k] and the goals [m] there."""
        numbers, parts = [number for number, _ in batches], [part for _, part in batches]
        logits, goal = known
        index = torch.cat(parts)
        mask = self._mask(index)
        net = self.search_network.counting_model(len(index), logits.to(self._device), microbatch, mask)
        random = SeededRandomness(parts, self.seed, attack.name, numbers)
        context = AttackContext(net, random, progress=_AttackProgress(run, net, self._device))
        adversarial, image = self._perturb(attack, index, context, goal)
        # Before the network sees them, which may write into what it is given.
        distance = self.threat.distance(image, adversarial)
        with torch.no_grad():
            prediction = answers(net.exact()(adversarial), self.data.labels[index.to(self._device)])
        kept = adversarial.cpu().to(torch.float32) if self.keep_images else None
        return _Found(prediction.cpu(), distance.cpu().to(torch.float32), net.counts(), kept)

    def _mask(self, index: Tensor) -> Mask | None:
        """What the network is shown of some samples."""
        if self.mask is None:
            return None
        image = self.data.take(index.to(self._device)).image
        free = self.mask if self.mask.ndim < 4 else self.mask[index.to(self.mask.device)]
        return Mask(free.to(self._device).expand(image.shape), image)

    def _perturb(
        self, attack: Attack, index: Tensor, context: AttackContext, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adversarial and clean images of some samples; an attack's NaN counts as no change."""
        batch = self.data.take(index.to(self._device))
        image = batch.image.clone()  # the attack's own: it may write into what it is given
        adversarial = attack.run_batches(
            context.net, image, goal.to(image.device), self.threat, context
        ).detach()
        adversarial = torch.where(adversarial.isfinite(), adversarial.to(batch.image.dtype), batch.image)
        if context.net.mask is not None:
            adversarial = context.net.mask(adversarial, None)
        return self.threat.project(batch.image, adversarial), batch.image


class _Found(NamedTuple):
    """What an attack did to m samples, on the CPU."""

    prediction: Tensor
    """[m] int64."""
    distance: Tensor
    """[m] float32."""
    counts: Counts
    adversarial: Tensor | None
    """[m, c, h, w] float32, where images are kept."""

    def write(self, trial: Trial, index: Tensor) -> None:
        """Into the rows of these samples [m]; no counts where some are of samples that are not known."""
        forwards, backwards, unassigned = self.counts
        if self.adversarial is not None:
            if trial.adversarial is None:
                trial.adversarial = torch.zeros(len(trial.attacked), *self.adversarial.shape[1:])
            trial.adversarial[index] = self.adversarial
        trial.prediction[index], trial.distance[index] = self.prediction, self.distance
        if not any(unassigned):
            trial.forwards[index], trial.backwards[index] = forwards, backwards
        trial.total_forwards += int(forwards.sum()) + unassigned[0]
        trial.total_backwards += int(backwards.sum()) + unassigned[1]


class _Run:
    """How far an evaluation is: what goes into its state file, and how much fits into memory. Of several
    processes each has a file of its own, with what it has done itself."""

    def __init__(
        self, file: StateFile | None, microbatch: int, search_network: SearchNetwork, shares: Shares
    ) -> None:
        self._search_network, self._shares = search_network, shares
        rank = shares.processes.rank
        self._file = file if file is None or rank == 0 else file.of_process(rank)
        self.tensors: dict[str, Tensor] = {}
        self.stage: dict[str, Tensor] = {}
        """Where a killed evaluation left the attack on its group."""
        self.group = 0
        """Batches that are being attacked; 0 between groups."""
        self._trials: dict[str, Trial] = {}
        self._done: dict[str, int] = {}
        self._carried: dict[str, Tensor] = {}
        """Batches [batches] bool that other processes had finished before this session."""
        self._session = ""
        self._open, self._since = "", time.perf_counter()
        self.microbatch = microbatch
        if file is not None:
            self._load(file)

    def _load(self, file: StateFile) -> None:
        """Take back what was saved; by another number of processes, or not by all, as work of the first."""
        processes = self._shares.processes
        saved = processes.from_first(file.load_all)
        if len(saved) == processes.size and None not in saved:
            own = saved[processes.rank]
            assert own is not None
            self._session, self._shares = own[1]["session"], replace(self._shares, unit=own[1]["unit"])
            self._restore(*own)
            return
        self._session = processes.from_first(lambda: uuid.uuid4().hex)
        if saved and saved[0] is not None:
            self._restore(*carry_over(saved, self._shares))

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        # Groups are units of work and stay; how much of one is computed at once may shrink.
        self.microbatch, self.group = min(self.microbatch, values["microbatch"]), values["group"]
        for key, plain in values["trials"].items():
            self._done[key] = plain.pop("done")
            if (carried := tensors.get(f"{key}/carried")) is not None:
                self._carried[key] = carried
            trial = Trial.of(tensors[f"{key}/attacked"])
            for name, value in ({n: tensors[f"{key}/{n}"] for n in trial.tensors()} | plain).items():
                setattr(trial, name, value)
            trial.adversarial = tensors.get(f"{key}/adversarial")
            self._trials[key] = trial
        stage = {n.removeprefix("stage/"): t for n, t in tensors.items() if n.startswith("stage/")}
        self.stage = stage if self.microbatch == values["microbatch"] else {}
        self.tensors = {"clean": tensors["clean"]}

    def open(self, key: str, attacked: Tensor) -> tuple[Trial, int]:
        """A trial, new or as it was left, and how many of its batches are done."""
        self._open, self._since = key, time.perf_counter()
        trial = self._trials.setdefault(key, Trial.of(attacked))
        return trial, self._done.setdefault(key, 0)

    def own_batches(self, key: str) -> list[tuple[int, Tensor]]:
        """Numbers and rows of the batches of a trial that this process attacks."""
        return self._shares.own(self._trials[key].attacked, self._carried.get(key))

    def of_all_processes(self, key: str) -> Trial:
        """A trial that all have finished, with what each found."""
        return self._shares.merge(self._trials[key], self._carried.get(key))

    def close_group(self, key: str, done: int) -> None:
        """A group is finished."""
        self._done[key], self.stage, self.group = done, {}, 0
        self.save()

    def save(self, stage: Callable[[], dict[str, Tensor]] = dict) -> None:
        """Save what is done, if it is time; ``stage()`` is how far the attack on the current group is."""
        if self._open:
            now = time.perf_counter()
            self._trials[self._open].seconds += now - self._since
            self._since = now
        if self._file is not None:
            self._file.save(lambda: self._state(stage()))

    def exclude(self, seconds: float) -> None:
        """Do not count these towards the open trial."""
        self._since += seconds

    def _state(self, stage: dict[str, Tensor]) -> Saved:
        tensors, trials = dict(self.tensors), {}
        for key, trial in self._trials.items():
            tensors |= {f"{key}/{name}": tensor for name, tensor in trial.tensors().items()}
            trials[key] = {
                "done": self._done[key],
                "total_forwards": trial.total_forwards,
                "total_backwards": trial.total_backwards,
                "seconds": trial.seconds,
            }
        tensors |= {f"stage/{name}": tensor for name, tensor in stage.items()}
        tensors |= {f"{key}/carried": carried for key, carried in self._carried.items()}
        values = {"microbatch": self.microbatch, "group": self.group, "trials": trials}
        values |= {"session": self._session, "unit": self._shares.unit}
        return tensors, {**values, "processes": self._shares.processes.size}

    def within_memory(self, work: Callable[[int], T]) -> T:
        """``work`` with a microbatch that fits into memory.

        Raises:
            SettingError: one image is too many.
        """
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return work(self.microbatch)
            if self.microbatch == 1:
                raise SettingError(
                    "evaluate.microbatch",
                    "1 image at once, and out of memory",
                    "a smaller network or a smaller evaluate.batch_size",
                )
            self.microbatch //= 2
            self.stage = {}
            self._search_network.release_graphs()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _AttackProgress(SavedProgress):
    """What an attack saves goes into the evaluation's state, with the counts so far."""

    def __init__(self, run: _Run, net: CountingModel, device: torch.device) -> None:
        self.run, self.net, self.device = run, net, device

    def load(self) -> dict[str, Tensor]:
        """See :meth:`SavedProgress.load`; tensors on the evaluation's device."""
        if not self.run.stage:
            return {}
        stage = {name: tensor.to(self.device) for name, tensor in self.run.stage.items()}
        self.net.add_counts(stage.pop("forwards").cpu(), stage.pop("backwards").cpu())
        return stage

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """See :meth:`SavedProgress.save`."""
        self.run.save(lambda: {**state(), **self._counts()})

    def _counts(self) -> dict[str, Tensor]:
        forwards, backwards, _ = self.net.counts()
        return {"forwards": forwards, "backwards": backwards}


def answers(logits: Tensor, label: Tensor) -> Tensor:
    """The predicted classes, [m] int64; where the logits are not all finite, one that is not the label.

    A network that answers NaN has not recognised the image, whichever index ``argmax`` then finds.

    Args:
        logits: [m, k].
        label: [m] int64, on their device.
    """
    predicted = logits.argmax(1)
    lucky = ~logits.isfinite().all(1) & (predicted == label)
    return torch.where(lucky, (label + 1) % logits.shape[1], predicted)


def cost_line(row: Mapping[str, Any]) -> str:
    """What an attack found and cost in one line, from a row of :meth:`Evaluation.members`."""
    return (
        f"  {row['name']}: {row['attacked']} of {row['n']} images attacked, {row['count']} robust after it; "
        f"{row['forwards']:,} forwards, {row['backwards']:,} gradients, {row['seconds']:.1f} s"
    )
