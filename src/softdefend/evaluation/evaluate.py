"""Evaluation that trusts nobody: it projects, re-runs and counts for itself, sample by sample, in fp32."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.attacks import Attack
from softdefend.attacks.draws import Draws
from softdefend.attacks.oracle import Journal, Oracle
from softdefend.data import Resident
from softdefend.errors import SettingError
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.records import AttackRecord as AttackRecord
from softdefend.evaluation.records import Evaluation as Evaluation
from softdefend.evaluation.records import Rate as Rate
from softdefend.evaluation.records import Trial, versions
from softdefend.evaluation.resume import Saved, StateFile
from softdefend.modes import attacked, tf32
from softdefend.threat import ThreatModel

Precision = Literal["exact", "fast"]
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
        precision: ``exact`` searches in fp32 without TF32. ``fast`` searches in bf16 (PGD, APGD, FAB and
            Square; others as in ``exact``): a success counts once an fp32 forward has confirmed it, before
            that the search goes on. The final count is fp32 in both.

    Raises:
        SettingError: a batch below one image, or an unknown precision.
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
    ) -> None:
        physical = batch_size if physical_batch is None else physical_batch
        for name, size in (("batch_size", batch_size), ("physical_batch", physical)):
            if size < 1:
                raise SettingError(f"evaluate.{name}", size, "a whole number >= 1")
        if precision not in ("exact", "fast"):
            raise SettingError("evaluate.precision", repr(precision), "exact or fast")
        self.net, self.data, self.threat, self.batch_size, self.seed = net, data, threat, batch_size, seed
        self.physical_batch, self.precision = physical, precision

    def __call__(
        self,
        attacks: Sequence[Attack | Ensemble],
        *,
        limit: int | None = None,
        progress: bool = False,
        state: StateFile | None = None,
    ) -> Evaluation:
        """Clean accuracy, then each attack on every sample.

        Args:
            attacks: in order; two of the same name are refused. Of an ensemble each member attacks only the
                samples that are still right.
            limit: only the first so many samples.
            progress: show a bar.
            state: where to continue from and to note what is done.

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
        run = _Run(state, self.physical_batch)
        with self._standing():
            label = self.data.labels[:n].cpu()
            logits = run.tensors.get("clean")
            if logits is None:
                everything = torch.arange(n, device=self._device)
                logits = run.tensors["clean"] = run.fitting(partial(self._clean, everything)).cpu()
                run.save()
            clean = logits.argmax(1)
            result = Evaluation(self.threat, label, clean)
            for number, attack in enumerate(attacks):
                ensemble = isinstance(attack, Ensemble)
                left = clean == label if ensemble else torch.ones_like(label, dtype=torch.bool)
                trials = {}
                for place, member in enumerate(attack.members if isinstance(attack, Ensemble) else [attack]):
                    trial = self._trial(member, f"{number}.{place}", left, logits, run, progress)
                    trials[member.name] = trial
                    left = left & (trial.prediction == label)
                result.attacks[attack.name] = AttackRecord.of(trials, label, clean, ensemble)
        result.how.update(
            precision=self.precision,
            seed=self.seed,
            batch_size=self.batch_size,
            physical_batch=run.physical,
            versions=versions(self._device),
        )
        return result

    @property
    def _device(self) -> torch.device:
        return self.data.labels.device

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        """The network as every forward here wants it, and put back."""
        channels_last = self.precision == "fast" and self._device.type == "cuda"
        with attacked(self.net, "eval"), tf32(False):
            if channels_last:
                self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            try:
                yield
            finally:
                if channels_last:
                    self.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _fast(self, image: Tensor) -> Tensor:
        """Logits in bf16 where torch deems it safe; the image itself stays float32."""
        if image.device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, torch.bfloat16):
            logits: Tensor = self.net(image)
        return logits

    @torch.no_grad()
    def _clean(self, index: Tensor, most: int) -> Tensor:
        """Clean logits of some samples, [m, k]."""
        return torch.cat([self.net(self.data.take(part).image) for part in torch.split(index, most)])

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
                run.group = len(group)
                found = run.fitting(partial(self._group, attack, group, done, logits, run))
                index, done = torch.cat(group), done + len(group)
                prediction, distance, forwards, backwards, loose = found
                trial.prediction[index], trial.distance[index] = prediction, distance
                if not any(loose):
                    trial.forwards[index], trial.backwards[index] = forwards, backwards
                trial.total_forwards += int(forwards.sum()) + loose[0]
                trial.total_backwards += int(backwards.sum()) + loose[1]
                run.close(key, done)
                bar.update(len(index))
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
        oracle = self._oracle(len(index), logits[index].to(self._device), most)
        draws = Draws.seeded(batches, self.seed, attack.name, first)
        journal = _Notes(run, oracle, self._device)
        adversarial, image = self._perturb(attack, index, oracle, draws, journal)
        with torch.no_grad():
            prediction = oracle.exact_at()(adversarial).argmax(1)
        forwards, backwards, loose = oracle.counts()
        distance = self.threat.distance(image, adversarial)
        return prediction.cpu(), distance.cpu().to(torch.float32), forwards, backwards, loose

    def show(self, attack: Attack, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [m, c, h, w], their adversarial images, and both predictions as probabilities [m, k]."""
        with self._standing():
            clean = self._clean(index, self.physical_batch)
            oracle = self._oracle(len(index), clean, self.physical_batch)
            draws = Draws.seeded([index.cpu()], self.seed, attack.name)
            adversarial, image = self._perturb(attack, index, oracle, draws, Journal())
            with torch.no_grad():
                return image, adversarial, clean.softmax(1), oracle.exact_at()(adversarial).softmax(1)

    def _oracle(self, n: int, clean: Tensor, most: int) -> Oracle:
        if self.precision == "exact":
            return Oracle(self.net, n, clean=clean, most=most)
        return Oracle(self._fast, n, exact=self.net, clean=clean, most=most)

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

    def __init__(self, file: StateFile | None, physical: int) -> None:
        self._file = file
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
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


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
