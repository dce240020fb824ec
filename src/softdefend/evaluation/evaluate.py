"""Evaluation that trusts nobody: it projects, re-runs and counts for itself, sample by sample, in fp32."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.attacks import Attack
from softdefend.core.environment import versions
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.data import Resident
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.records import AttackRecord as AttackRecord
from softdefend.evaluation.records import Evaluation as Evaluation
from softdefend.evaluation.records import Rate as Rate
from softdefend.evaluation.records import Trial
from softdefend.evaluation.resume import Saved, StateFile
from softdefend.execution.counting import Journal, Oracle
from softdefend.execution.randomness import Draws
from softdefend.execution.search_network import WORTHWHILE, Precision, Searching

T = TypeVar("T")


class Evaluator:
    """Measures one network on one split, in eval mode, fp32, with frozen parameters.

    A *logical* batch owns random numbers, a *physical* batch is what is computed at once. What a verdict
    depends on beside the network and the image (up to the rounding of the network's own sums, which may
    change with the size of a physical batch):

    * FGSM, FAB without restarts, FMN, DeepFool, CW in l2: nothing.
    * PGD, CW in l-inf: the image's position in the data, and the seed.
    * APGD, Square, FAB with restarts: the seed, and the logical batch, which is ``batch_size`` images that
      follow each other in the data (in an ensemble: of those still robust); the place in it and how many of
      its images are still right. With the same seed and batch size these are the random numbers, and so the
      verdicts, of AutoAttack's reference code.
    * Other attacks: their logical batch.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], on the device of ``data``.
        data: the split.
        threat: the set the adversary may use; every result is projected into it again.
        batch_size: images of a logical batch.
        seed: of every random draw.
        physical_batch: images computed at once, as many as ``batch_size`` when None; halved where memory runs
            out.
        precision: of the searches of PGD, APGD, FAB and Square. ``exact`` is what torch computes in unless
            told otherwise, and AutoAttack's reference code with it: fp32 with TF32 in the convolutions of a
            GPU. ``fast`` is bf16. In both a success counts once an fp32 forward without TF32 has confirmed
            it, before that the search goes on. ``strict`` is fp32 without TF32; on a CPU ``exact`` is the
            same. Clean predictions, the final count and all other attacks' forwards are strict in each.
        compile: compile the searching network and capture the steps of searches, on a GPU; from
            256 images on when None. Changes rounding, nothing else. A compiled copy follows changes of the
            network's weights, not of its structure.

    Raises:
        SettingError: a batch below one image, an unknown precision, or compiling asked for on a CPU.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Resident,
        threat: ThreatModel,
        *,
        batch_size: int = 500,
        seed: int = 0,
        physical_batch: int | None = None,
        precision: Precision = "exact",
        compile: bool | None = False,
    ) -> None:
        physical = batch_size if physical_batch is None else physical_batch
        for name, size in (("batch_size", batch_size), ("physical_batch", physical)):
            if size < 1:
                raise SettingError(f"evaluate.{name}", size, "a whole number >= 1")
        self.searching = Searching(net, data.labels.device, precision)
        if compile and data.labels.device.type != "cuda":
            raise SettingError("evaluate.compile", "true on a CPU", "false or null, or a CUDA device")
        self.data, self.threat, self.batch_size, self.seed = data, threat, batch_size, seed
        self.physical_batch, self.compile = physical, compile

    def __call__(
        self,
        attacks: Sequence[Attack | Ensemble],
        *,
        limit: int | None = None,
        progress: bool = False,
        state: StateFile | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Evaluation:
        """Clean accuracy, then each attack on every sample.

        Args:
            attacks: in order; two of the same name are refused. Of an ensemble each member attacks only the
                samples that are still right.
            limit: only the first so many samples.
            progress: show a bar.
            state: where to continue from and to note what is done.
            say: is told after each attack, and after each member of an ensemble, what it found and cost.

        Raises:
            SettingError: two attacks share a name, or one is not made for the threat model, before anything
                runs; not even one image fits into memory.
        """
        names = [attack.name for attack in attacks]
        if len(set(names)) < len(names):
            raise SettingError("evaluate.attacks", ", ".join(names), "attacks with different names")
        for attack in attacks:
            attack.check(self.threat)
        n = min(self.data.n, limit or self.data.n)
        run = _Run(state, self.physical_batch, self.searching)
        with self.searching.standing():
            if self._compiles(n):
                run.fitting(lambda most: self.searching.compile(self._first(min(n, most))))
            elif self.searching.precision == "fast":
                run.fitting(lambda most: self.searching.fuse(self._first(min(n, most))))
            label = self.data.labels[:n].cpu()
            logits = run.tensors.get("clean")
            if logits is None:
                everything = torch.arange(n, device=self._device)
                logits = run.tensors["clean"] = run.fitting(partial(self._clean, everything)).cpu()
                run.save()
            clean = answers(logits, label)
            result = Evaluation(self.threat, label, clean)
            for number, attack in enumerate(attacks):
                ensemble = isinstance(attack, Ensemble)
                left = clean == label if ensemble else torch.ones_like(label, dtype=torch.bool)
                trials = {}
                for place, member in enumerate(attack.members if isinstance(attack, Ensemble) else [attack]):
                    trial = self._trial(member, f"{number}.{place}", left, logits, run, progress)
                    trials[member.name] = trial
                    result.attacks[attack.name] = AttackRecord.of(trials, label, clean, ensemble)
                    if say is not None:
                        say(cost_line(result.members(attack.name)[-1]))
                    left = left & (trial.prediction == label)
        result.how.update(
            precision=self.searching.precision,
            compiled=self.searching.recorder is not None,
            seed=self.seed,
            batch_size=self.batch_size,
            physical_batch=run.physical,
            versions=versions(self._device),
        )
        return result

    def under(self, threat: ThreatModel) -> Evaluator:
        """The same evaluator for another threat model; what is compiled is shared."""
        other = copy.copy(self)
        other.threat = threat
        return other

    @property
    def _device(self) -> torch.device:
        return self.data.labels.device

    def _compiles(self, n: int) -> bool:
        """Whether an evaluation of n images compiles."""
        if self.compile is None:
            return self._device.type == "cuda" and n >= WORTHWHILE
        return self.compile

    def _first(self, count: int) -> Tensor:
        return self.data.take(torch.arange(count, device=self._device)).image

    @torch.no_grad()
    def _clean(self, index: Tensor, most: int) -> Tensor:
        """Clean logits of some samples, [m, k]."""
        parts = torch.split(index, most)
        return torch.cat([self.searching.strict(self.data.take(part).image) for part in parts])

    def _trial(
        self, attack: Attack, key: str, left: Tensor, logits: Tensor, run: _Run, progress: bool
    ) -> Trial:
        """One attack on the samples flagged in ``left`` [n]."""
        trial, done = run.open(key, left)
        rows = left.nonzero().squeeze(1)
        batches = torch.split(rows, self.batch_size) if len(rows) else ()
        with tqdm(total=len(rows), desc=attack.name, leave=False, disable=None if progress else True) as bar:
            bar.update(sum(len(batch) for batch in batches[:done]))
            while done < len(batches):
                count = run.group or max(1, run.physical // self.batch_size)
                group = batches[done : done + count]
                run.group, preparing = len(group), self.searching.seconds
                found = run.fitting(partial(self._group, attack, group, done, logits, run))
                run.leave_out(self.searching.seconds - preparing)
                index, done = torch.cat(group), done + len(group)
                prediction, distance, forwards, backwards, loose = found
                trial.prediction[index], trial.distance[index] = prediction, distance
                if not any(loose):
                    trial.forwards[index], trial.backwards[index] = forwards, backwards
                trial.total_forwards += int(forwards.sum()) + loose[0]
                trial.total_backwards += int(backwards.sum()) + loose[1]
                run.close(key, done)
                bar.update(len(index))
        # The next attack takes other steps: what was captured for each would add up.
        self.searching.forget()
        return trial

    def _group(
        self,
        attack: Attack,
        batches: Sequence[Tensor],
        first: int,
        logits: Tensor,
        run: _Run,
        most: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """Attack several logical batches at once: predictions, distances, forwards, backwards, on the CPU,
        and what could not be told apart by sample."""
        index = torch.cat(list(batches))
        oracle = self.searching.oracle(len(index), logits[index].to(self._device), most)
        draws = Draws.seeded(batches, self.seed, attack.name, first)
        journal = _Notes(run, oracle, self._device)
        adversarial, image = self._perturb(attack, index, oracle, draws, journal)
        # Before the network sees them, which may write into what it is given.
        distance = self.threat.distance(image, adversarial)
        with torch.no_grad():
            prediction = answers(oracle.exact_at()(adversarial), self.data.labels[index.to(self._device)])
        forwards, backwards, loose = oracle.counts()
        return prediction.cpu(), distance.cpu().to(torch.float32), forwards, backwards, loose

    def show(self, attack: Attack, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [m, c, h, w], their adversarial images, and both predictions as probabilities [m, k]."""
        with self.searching.standing():
            clean = self._clean(index, self.physical_batch)
            oracle = self.searching.oracle(len(index), clean, self.physical_batch)
            draws = Draws.seeded([index.cpu()], self.seed, attack.name)
            adversarial, image = self._perturb(attack, index, oracle, draws, Journal())
            with torch.no_grad():
                return image, adversarial, clean.softmax(1), oracle.exact_at()(adversarial).softmax(1)

    def _perturb(
        self, attack: Attack, index: Tensor, oracle: Oracle, draws: Draws, journal: Journal
    ) -> tuple[Tensor, Tensor]:
        """Adversarial and clean images of some samples; an attack's NaN counts as no change."""
        batch = self.data.take(index.to(self._device))
        image = batch.image.clone()  # the attack's own: it may write into what it is given
        adversarial = attack.search(
            oracle, image, batch.label, self.threat, draws=draws, journal=journal
        ).detach()
        adversarial = torch.where(adversarial.isfinite(), adversarial.to(batch.image.dtype), batch.image)
        return self.threat.project(batch.image, adversarial), batch.image


class _Run:
    """How far an evaluation is: what goes into its state file, and how much fits into memory."""

    def __init__(self, file: StateFile | None, physical: int, searching: Searching) -> None:
        self._file, self._searching = file, searching
        self.tensors: dict[str, Tensor] = {}
        self.stage: dict[str, Tensor] = {}
        """Where a killed evaluation left the attack on its group."""
        self.group = 0
        """Logical batches that are being attacked; 0 between groups."""
        self._trials: dict[str, Trial] = {}
        self._done: dict[str, int] = {}
        self._open, self._since = "", time.perf_counter()
        self.physical = physical
        saved = None if file is None else file.load()
        if saved is not None:
            self._restore(*saved)

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        # Groups are units of work and stay; how much of one is computed at once may shrink.
        self.physical, self.group = min(self.physical, values["physical"]), values["group"]
        for key, plain in values["trials"].items():
            self._done[key] = plain.pop("done")
            trial = Trial.of(tensors[f"{key}/attacked"])
            for name, value in ({n: tensors[f"{key}/{n}"] for n in trial.tensors()} | plain).items():
                setattr(trial, name, value)
            self._trials[key] = trial
        stage = {n.removeprefix("stage/"): t for n, t in tensors.items() if n.startswith("stage/")}
        self.stage = stage if self.physical == values["physical"] else {}
        self.tensors = {"clean": tensors["clean"]}

    def open(self, key: str, attacked: Tensor) -> tuple[Trial, int]:
        """A trial, new or as it was left, and how many of its logical batches are done."""
        self._open, self._since = key, time.perf_counter()
        trial = self._trials.setdefault(key, Trial.of(attacked))
        return trial, self._done.setdefault(key, 0)

    def close(self, key: str, done: int) -> None:
        """A group is finished."""
        self._done[key], self.stage, self.group = done, {}, 0
        self.save()

    def save(self, stage: Callable[[], dict[str, Tensor]] = dict) -> None:
        """Note what is done, if it is time; ``stage()`` is how far the attack on the current group is."""
        if self._open:
            now = time.perf_counter()
            self._trials[self._open].seconds += now - self._since
            self._since = now
        if self._file is not None:
            self._file.save(lambda: self._state(stage()))

    def leave_out(self, seconds: float) -> None:
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
        return tensors, {"physical": self.physical, "group": self.group, "trials": trials}

    def fitting(self, work: Callable[[int], T]) -> T:
        """``work`` with as many images at once as fit into memory.

        Raises:
            SettingError: one image is too many.
        """
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return work(self.physical)
            if self.physical == 1:
                raise SettingError(
                    "evaluate.physical_batch",
                    "1 image at once, and out of memory",
                    "a smaller network or a smaller evaluate.batch_size",
                )
            self.physical //= 2
            self.stage = {}
            self._searching.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


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


class _Notes(Journal):
    """An attack's journal: what it saves goes into the evaluation's state, with the counts so far."""

    def __init__(self, run: _Run, oracle: Oracle, device: torch.device) -> None:
        self.run, self.oracle, self.device = run, oracle, device

    def load(self) -> dict[str, Tensor]:
        """See :meth:`Journal.load`; tensors on the evaluation's device."""
        if not self.run.stage:
            return {}
        stage = {name: tensor.to(self.device) for name, tensor in self.run.stage.items()}
        self.oracle.add_counts(stage.pop("forwards").cpu(), stage.pop("backwards").cpu())
        return stage

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """See :meth:`Journal.save`."""
        self.run.save(lambda: {**state(), **self._counts()})

    def _counts(self) -> dict[str, Tensor]:
        forwards, backwards, _ = self.oracle.counts()
        return {"forwards": forwards, "backwards": backwards}
