"""Everything that is asked about one network, in files beside each other."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from softdefend.attacks import PGD, Transfer
from softdefend.core import rng
from softdefend.core.digest import checksum, file_digest
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.threat import ThreatModel
from softdefend.core.weight_files import load_weights
from softdefend.data import Batch, DataBundle, Resident, fingerprint
from softdefend.evaluation.autoattack import averages_draws, parse
from softdefend.evaluation.corruptions import CORRUPTIONS, evaluate_corruptions
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.exchange import check_standard, log_lines, read_known, robustbench
from softdefend.evaluation.gallery import write_gallery
from softdefend.evaluation.masking import CHECKS, audit
from softdefend.evaluation.preflight import own_random_numbers, preflight
from softdefend.evaluation.run import (
    EvaluateSettings,
    cost_lines,
    evaluate_checkpoint,
    telling,
    write_examples,
)
from softdefend.evaluation.table import Table, read_table
from softdefend.execution.network_mode import tf32

Say = Callable[[str], None]

_LOOKED_AT = 1024
"""Images that preflight is shown: a whole test set in float32 may not fit the device."""
_PROBED = 64
"""Images by which a network from outside is known again; they need a gradient."""


@dataclass(frozen=True)
class Extras:
    """What is done beside attacking.

    Args:
        audit: images on which signs of gradient masking are looked for; 0 for no audit.
        corruptions: whether accuracy under common corruptions is measured.
        surrogates: networks by name whose adversarial images are tried on the evaluated one.
        robustbench: file for RobustBench's ``model_info`` JSON.
        log: file for AutoAttack's log lines.
    """

    audit: int = 0
    corruptions: bool = False
    surrogates: dict[str, nn.Module] = field(default_factory=dict)
    robustbench: Path | None = None
    log: Path | None = None


@dataclass(frozen=True)
class Subject:
    """One checkpoint: a network for its weights, the data, and the folder where both weights and results lie.

    Args:
        net: gets the weights ``folder/{which}.safetensors``.
        bundle: of which the test images are used.
        folder: results go to ``folder/evaluation``.
        which: the checkpoint.
        trained: the threat of the training, whose results carry the checkpoint's bare name.
        threat: what the network is attacked under.
        architecture: what the network is called in other people's tables.
        progress: show bars.
    """

    net: nn.Module
    bundle: DataBundle
    folder: Path
    which: str
    trained: ThreatModel
    threat: ThreatModel
    architecture: str
    progress: bool = False

    @property
    def name(self) -> str:
        """Of the result files: under another threat than the trained one they lie beside the run's own."""
        if (self.threat.norm, float(self.threat.eps)) == (self.trained.norm, float(self.trained.eps)):
            return self.which
        return f"{self.which}-{self.threat.norm}-{re.sub(r'[^0-9.e]+', '_', str(self.threat.eps))}"

    def file(self, ending: str) -> Path:
        """``evaluation/NAME`` with an ending, such as ``-audit.json``."""
        return self.folder / "evaluation" / f"{self.name}{ending}"


def behavior(net: nn.Module, images: Tensor, labels: Tensor) -> str:
    """What a network does: its code may have changed where weights and printed structure have not.

    Classes of some images; logits and their gradient there and a little way off, by their size and by a few
    random projections, which know of signs and directions. As coarse as the rounding of another machine
    demands.

    Args:
        net: images [b, c, h, w] to logits [b, k], in eval mode, on their device.
        images, labels: a few.
    """
    aside = 0.05 * torch.randn(images.shape, generator=rng.stream(0, "behaviour/aside")).to(images)
    with own_random_numbers(images.device), tf32(False), torch.enable_grad():
        point = torch.cat([images, (images + aside).clamp(0, 1)]).requires_grad_(True)
        logits = net(point).float()
        slope = "none"
        if logits.requires_grad:
            loss = torch.nn.functional.cross_entropy(logits, labels.repeat(2), reduction="sum")
            with contextlib.suppress(RuntimeError):  # of the network's own backward
                (grad,) = torch.autograd.grad(loss, point, allow_unused=True)
                slope = "none" if grad is None else _sketch(grad)
    classes = hashlib.sha256(str(logits.argmax(1).tolist()).encode()).hexdigest()
    size = _sketch(logits.detach() - logits.detach().mean())
    return f"logits {size}, gradient {slope}, classes {classes[:16]}"


def _sketch(values: Tensor) -> str:
    """The length of a tensor, and its share along four random directions, each about one in size."""
    flat = values.detach().double().cpu().flatten()
    length = float(flat.norm())
    draws = torch.randn(4, len(flat), generator=rng.stream(0, "behaviour/sketch"), dtype=torch.float64)
    shares = (draws @ flat / max(length, 1e-300)).tolist()
    return f"{length:.2g} along " + " ".join(f"{share:.1f}" for share in shares)


def _alike(kept: object, now: object) -> bool:
    """Equal; of a network, in what both say of it: older results know less."""
    if isinstance(kept, dict) and isinstance(now, dict):
        return all(kept[name] == now[name] for name in kept.keys() & now.keys())
    return kept == now


def _complete(ending: str, content: Mapping[str, Any]) -> bool:
    """Whether an evaluation's file has what is read of it; of another's, the reader judges itself."""
    if ending != ".json":
        return True
    try:
        cost_lines(content)
        rates = [content["clean"]["rate"], *(row["rate"] for row in content["attacks"].values())]
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return all(isinstance(value, int | float) for value in (*rates, content.get("n"))) and "epoch" in content


def check_wishes(settings: EvaluateSettings, extras: Extras, full: int) -> None:
    """Refuse what would only fail after hours: an exchange file that this evaluation cannot fill or write.

    Args:
        settings, extras: what is asked.
        full: images of the test set.

    Raises:
        SettingError: a directory, or a path below a file; see
            :func:`~softdefend.evaluation.exchange.check_standard`.
    """
    for flag, path in (("--robustbench", extras.robustbench), ("--log", extras.log)):
        if path is not None:
            _check_writable(flag, path)
    if extras.robustbench:
        precision = str(getattr(settings, "precision", "exact"))
        check_standard(settings.attacks, min(settings.size or full, full), full, precision)
        read_known(extras.robustbench)


def _check_writable(flag: str, path: Path) -> None:
    if path.is_dir():
        raise SettingError(flag, f"{path}, a directory", "a file to write")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise SettingError(flag, f"{path}, below the file {above}", "a file to write, in a directory")


def examine(
    subject: Subject, settings: EvaluateSettings, extras: Extras, *, device: torch.device, say: Say = print
) -> dict[str, Any]:
    """Attack the network and do the extras, unless the same results already lie in its folder.

    Before anything runs, :func:`~softdefend.evaluation.preflight.preflight` refuses what cannot be evaluated.
    An audit comes before a network whose logits move is refused: it says so among its findings.

    Returns:
        What stands in ``evaluation/{name}.json``.

    Raises:
        SettingError: weights, data or a network that do not fit, or an exchange file that the evaluation
            cannot fill.
    """
    return _Examination(subject, settings, extras, device, say).run()


class _Examination:
    def __init__(
        self, subject: Subject, settings: EvaluateSettings, extras: Extras, device: torch.device, say: Say
    ) -> None:
        self.subject, self.settings, self.extras, self.device, self.say = (
            subject,
            settings,
            extras,
            device,
            say,
        )
        threat = subject.threat
        self.identity = {
            **json.loads(json.dumps(asdict(settings))),
            "norm": threat.norm,
            "eps": str(threat.eps),
        }

    def run(self) -> dict[str, Any]:
        check_wishes(self.settings, self.extras, len(self.subject.bundle.test))
        _check_writable("evaluation", self.subject.file(".json"))
        for name in self.settings.attacks:
            parse(name, max(2, len(self.subject.bundle.classes))).check(self.subject.threat)
        extras = self.extras
        suspicious = None
        if extras.audit:
            surrogate = next(iter(self.surrogates.items()), None)
            checks = {check.name: check.threshold for check in CHECKS}
            asked = {"images": extras.audit, "surrogate": surrogate, "checks": checks}
            found = self._kept("-audit.json", asked, self._audit)
            suspicious = found["verdict"] == "suspicious"
        result = self._attacked()
        transferred = None
        if extras.surrogates:
            transferred = self._kept("-transfer.json", {"surrogates": self.surrogates}, self._transfer)
            self._compare(result, transferred)
        if extras.corruptions:
            self._kept("-corruptions.json", {"corruptions": list(CORRUPTIONS)}, self._corruptions)
        if extras.robustbench:
            self._robustbench(result, extras.robustbench, suspicious, transferred)
        if extras.log:
            lines = log_lines(result, self._table())
            write_atomic(extras.log, ("\n".join(lines) + "\n").encode())
            self.say(f"log: {extras.log}")
        return result

    def _attacked(self) -> dict[str, Any]:
        subject = self.subject
        result = self._existing(".json", self.identity) or self._covering()
        if result is None:
            _ = self.epoch  # loads and checks the network
            if self.extras.audit and self._deterministic:
                self._preflight(assumes_determinism=True)
            result = evaluate_checkpoint(
                subject.net,
                subject.bundle,
                subject.threat,
                subject.folder,
                subject.which,
                self.settings,
                self.identity,
                name=subject.name,
                device=self.device,
                data_name=subject.bundle.name,
                network=self.network,
                progress=subject.progress,
                say=self.say,
                before_writing=self._put_aside,
            )
        else:
            self.say(
                f"{subject.name}: as evaluated before, on {result['n']} images; nothing is attacked anew"
            )
            for line in cost_lines(result):
                self.say(line)
        self._pictures()
        figures = [f"{name} {100 * figure['rate']:.1f}%" for name, figure in result["attacks"].items()]
        epoch = "" if result["epoch"] is None else f" (epoch {result['epoch']})"
        clean = f"clean {100 * result['clean']['rate']:.1f}%"
        self.say(f"{subject.name}{epoch}: " + "  ".join([clean, *figures]))
        return result

    @cached_property
    def epoch(self) -> int | None:
        """Of the weights, which are loaded and checked with the first question."""
        subject = self.subject
        metadata = load_weights(subject.net, subject.folder / f"{subject.which}.safetensors")
        subject.net.to(self.device).eval()
        self._preflight(assumes_determinism=self._deterministic and not self.extras.audit)
        epoch: int | None = metadata.get("epoch")
        return epoch

    @property
    def _deterministic(self) -> bool:
        """Whether no attack averages over a network's random draws."""
        return not averages_draws(self.settings.attacks)

    def _preflight(self, *, assumes_determinism: bool) -> None:
        subject, looked_at = self.subject, self._test_images(_LOOKED_AT)
        preflight(
            subject.net,
            looked_at.image,
            looked_at.label,
            subject.threat,
            classes=len(subject.bundle.classes),
            assumes_determinism=assumes_determinism,
        )

    @cached_property
    def network(self) -> dict[str, str] | None:
        """What tells a network from outside from others of the same weights; None for one trained here, which
        its run's configuration builds."""
        path = self.subject.folder / "config.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if not isinstance(config, dict) or "outside" not in config:
            return None
        # Addresses of functions change from process to process.
        structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.subject.net))
        known = {
            "origin": str((config["outside"] or {}).get("model", type(self.subject.net).__qualname__)),
            "structure": hashlib.sha256(structure.encode()).hexdigest(),
        }
        if (self.subject.folder / f"{self.subject.which}.safetensors").is_file():
            _ = self.epoch  # loads and checks the network
            shown = self._test_images(_PROBED)
            known["behavior"] = behavior(self.subject.net, shown.image, shown.label)
        return known

    @cached_property
    def about(self) -> dict[str, Any]:
        """The weights and the test data as they now are, and the threat."""
        weights = self.subject.folder / f"{self.subject.which}.safetensors"
        return {
            "weights": file_digest(weights) if weights.is_file() else None,
            "test_data": fingerprint(self.subject.bundle.test),
            **({"network": self.network} if self.network else {}),
            "norm": self.identity["norm"],
            "eps": self.identity["eps"],
        }

    @cached_property
    def resident(self) -> Resident:
        return Resident(self.subject.bundle.test, self.device)

    @cached_property
    def surrogates(self) -> dict[str, str]:
        """By name the checksum of the weights: the same file may hold others next time."""
        return {
            name: checksum((key, value.cpu()) for key, value in net.state_dict().items())
            for name, net in self.extras.surrogates.items()
        }

    @property
    def at_once(self) -> int:
        """Images of a forward that belongs to no attack; no part of any result."""
        return self.settings.physical_batch or self.settings.batch_size

    def _test_images(self, most: int) -> Batch:
        return self.resident.take(torch.arange(min(most, self.resident.n), device=self.device))

    def _kept(self, ending: str, more: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``make``, or its file where the same weights have been asked the same before."""
        identity = {**self.identity, **more}
        result = self._existing(ending, identity)
        if result is None:
            head = {"which": self.subject.which, "epoch": self.epoch, "split": "test", "settings": identity}
            result = {**head, **self.about, **make()}
            write_atomic(self.subject.file(ending), json.dumps(result, indent=1).encode())
        self.say(_spoken(ending, result))
        return result

    def _existing(self, ending: str, identity: dict[str, Any]) -> dict[str, Any] | None:
        """A result about the weights, the data and the network as they now are, or None."""
        content = self._of_these_weights(ending)
        same = content is not None and telling(content["settings"]) == telling(identity)
        return content if same else None

    def _of_these_weights(self, ending: str) -> dict[str, Any] | None:
        """A result about weights, data and network as they now are, whatever was asked; or None."""
        try:
            content = json.loads(self.subject.file(ending).read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(content, dict) and isinstance(content.get("settings"), dict)
        if not known or self.about["weights"] is None:
            return None
        same = all(_alike(content.get(name), value) for name, value in self.about.items())
        return content if same and _complete(ending, content) else None

    def _covering(self) -> dict[str, Any] | None:
        """A result that has all that is asked for and more: further attacks, or more images."""
        content = self._of_these_weights(".json")
        if content is None:
            return None
        free = ("attacks", "size", "curve_size")
        known, asked = ({**telling(settings)} for settings in (content["settings"], self.identity))
        same = all(known.get(name) == value for name, value in asked.items() if name not in free)
        wanted = min(self.settings.size or len(self.subject.bundle.test), len(self.subject.bundle.test))
        most = content.get("n", 0) >= wanted and known.get("curve_size", 0) >= asked.get("curve_size", 0)
        more = set(asked["attacks"]) <= set(content.get("attacks", {}))
        return content if same and more and most else None

    def _put_aside(self) -> None:
        """Keep an evaluation of these very weights whose place this one will take: it may have cost hours."""
        if self._of_these_weights(".json") is None:
            return
        subject = self.subject
        content, earlier = subject.file(".json").read_bytes(), subject.folder / "evaluation" / "earlier"
        for number in itertools.count(1):
            place = earlier / f"{subject.name}-{number}.json"
            if not place.exists():
                break
            if place.read_bytes() == content:  # kept by a call that was killed
                return
        earlier.mkdir(exist_ok=True)
        if subject.file(".parquet").is_file():
            write_atomic(place.with_suffix(".parquet"), subject.file(".parquet").read_bytes())
        write_atomic(place, content)
        self.say(f"{subject.name}: what was evaluated before is kept as {place}")

    def _pictures(self) -> None:
        """Gallery and examples as they are asked for, where they are not there already: another number of
        them needs no new evaluation, and one killed before its gallery gets it with the next call.

        For the run's own threat only: the report shows no other.
        """
        subject, settings = self.subject, self.settings
        table = self._table()
        if table is None or subject.name != subject.which:
            return
        count, gallery = settings.examples, subject.file("-gallery.safetensors")
        examples = subject.folder / "evaluation" / "examples.safetensors"
        about = {name: value for name, value in self.about.items() if isinstance(value, str)}
        if _asked(gallery, about) != count:
            gallery.unlink(missing_ok=True)
            if count:
                _ = self.epoch  # loads the weights
                write_gallery(
                    subject.net,
                    self.resident,
                    table,
                    gallery,
                    eps=float(subject.threat.eps),
                    count=count,
                    classes=subject.bundle.classes,
                    batch_size=self.at_once,
                    about=about,
                )
        if subject.which == "last" and _images(examples) != min(count, len(table.label)):
            examples.unlink(missing_ok=True)
            if count:
                _ = self.epoch
                write_examples(
                    subject.net,
                    self.resident,
                    subject.threat,
                    settings,
                    subject.folder,
                    subject.bundle.classes,
                    physical=self.at_once,
                )

    def _table(self) -> Table | None:
        return read_table(self.subject.file(".parquet"))

    def _transfer(self) -> dict[str, Any]:
        subject, settings = self.subject, self.settings
        for net in self.extras.surrogates.values():
            net.to(self.device)
        attacks = [
            Transfer(net, PGD(steps=20, loss="margin"), source)
            for source, net in self.extras.surrogates.items()
        ]
        evaluator = Evaluator(
            subject.net, self.resident, subject.threat, batch_size=settings.batch_size, seed=settings.seed
        )
        return evaluator(attacks, limit=settings.size, progress=subject.progress).to_dict()

    def _audit(self) -> dict[str, Any]:
        shown = self._test_images(self.extras.audit)
        surrogate = next(iter(self.extras.surrogates.values()), None)
        found = audit(
            self.subject.net,
            shown.image,
            shown.label,
            self.subject.threat,
            seed=self.settings.seed,
            surrogate=None if surrogate is None else surrogate.to(self.device),
            progress=self.subject.progress,
        )
        return {"n": len(shown.label), **found.to_dict(), "text": str(found)}

    def _corruptions(self) -> dict[str, Any]:
        return evaluate_corruptions(
            self.subject.net,
            self.subject.bundle.test,
            device=self.device,
            limit=self.settings.size,
            batch_size=self.at_once,
            seed=self.settings.seed,
            progress=self.subject.progress,
        )

    def _compare(self, result: dict[str, Any], transferred: dict[str, Any]) -> None:
        """Say it where images made elsewhere do more than attacks on the network itself. A kept result may be
        of more images than were asked for now."""
        own, other = result["worst"], transferred["worst"]
        if result["n"] == transferred["n"] and other["count"] < own["count"]:
            self.say(
                f"images made against other networks leave {100 * other['rate']:.1f}% robust, all attacks on "
                f"this one {100 * own['rate']:.1f}%: its gradients mislead, or the attacks were too weak"
            )

    def _robustbench(
        self,
        result: dict[str, Any],
        path: Path,
        suspicious: bool | None,
        transferred: dict[str, Any] | None,
    ) -> None:
        content = robustbench(
            result,
            self._table(),
            full=len(self.subject.bundle.test),
            architecture=self.subject.architecture,
            unreliable=suspicious,
            transferred=None if transferred is None else transferred["worst"]["count"],
            known=read_known(path),
        )
        write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
        self.say(f"RobustBench model_info: {path}")


def _images(path: Path) -> int:
    """How many images a file holds; 0 where there is none to be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(file.get_slice("image").get_shape()[0])
    except (OSError, SafetensorError):
        return 0


def _asked(path: Path, about: Mapping[str, str]) -> int:
    """How many images a gallery was asked to hold; 0 where there is none, or one about something else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        same = all(metadata.get(name) == value for name, value in about.items())
        return int(metadata["asked"]) if same else 0
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0


def _spoken(ending: str, result: dict[str, Any]) -> str:
    if ending == "-audit.json":
        return f"audit on {result['n']} images:\n{result['text']}"
    if ending == "-transfer.json":
        figures = [f"{name} {100 * rate['rate']:.1f}%" for name, rate in result["attacks"].items()]
        return "  ".join(figures)
    return corruption_table(result)


def corruption_table(result: dict[str, Any]) -> str:
    """Accuracy in per cent by corruption and severity as aligned text."""
    table = result["corruptions"]
    width = max(len(name) for name in (*table, "corruption"))
    lines = [f"{'corruption':<{width}}" + "".join(f"{severity:>7}" for severity in range(1, 6)) + "   mean"]
    lines += [
        f"{name:<{width}}"
        + "".join(f"{100 * rate['rate']:7.1f}" for rate in row["severities"])
        + f"{100 * row['mean']:7.1f}"
        for name, row in table.items()
    ]
    return "\n".join([*lines, f"{'mean':<{width}}{'':35}{100 * result['mean']:7.1f}"])


def surrogate_names(paths: Sequence[str]) -> list[str]:
    """What surrogates are called: the names of their run folders or weight files.

    Raises:
        SettingError: two have one name.
    """
    names = [Path(path).resolve().name.removesuffix(".safetensors") for path in paths]
    if len(set(names)) < len(names):
        raise SettingError("--transfer", ", ".join(paths), "surrogates with different names")
    return names
