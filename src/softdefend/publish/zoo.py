"""A list of published models with digest, figures and audit, and their evaluation anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.files import parse_json, write_atomic
from softdefend.core.hints import check_type
from softdefend.core.threat import Budget, Norm, ThreatModel
from softdefend.core.yaml_files import read_yaml
from softdefend.data import DataBundle, DataSettings, fingerprint, load
from softdefend.evaluation import EvaluateSettings, Requests
from softdefend.evaluation.checkpoint import result_name
from softdefend.evaluation.settings import Size
from softdefend.experiments.evaluate import evaluate_network, outside_threat
from softdefend.publish.download import locate
from softdefend.publish.folder import AUDIT, open_network, read_published
from softdefend.publish.network import WEIGHTS, check_digest, read_config
from softdefend.report.tables import attack_label

PACKAGED = Path(str(resources.files("softdefend") / "publish" / "zoo.yaml"))
"""The list that comes with the package."""

_AS_EVALUATED = ("size", "subset", "batch_size", "precision", "seed")
"""Settings of the published evaluation that its figures depend on, beside the attacks."""


@dataclass(frozen=True)
class Entry:
    """A published model.

    Attributes:
        source: ``owner/name`` on the hub, or a folder; a relative one is beside the list.
        sha256: of the file of weights.
        network, data, norm, eps: what it is, and what it withstands.
        n: test images of the figures.
        clean: accuracy in per cent.
        robust: accuracy under each attack in per cent.
        audit: the verdict of the audit for gradient masking; None without one.
        revision: on the hub.
    """

    source: str
    sha256: str
    network: str
    data: str
    norm: str
    eps: str
    n: int
    clean: float
    robust: dict[str, float]
    audit: str | None = None
    revision: str | None = None

    @property
    def worst(self) -> float:
        """The lowest accuracy under any attack."""
        return min(self.robust.values())


def read_zoo(path: Path) -> dict[str, Entry]:
    """The models of a list by name.

    Raises:
        SettingError: no such file, or one that is no such list.
    """
    models = read_yaml(path).get("models")
    if not isinstance(models, dict):
        raise SettingError(str(path), "no models", "a mapping models: of names to entries")
    return {str(name): _entry(f"{path}: {name}", content) for name, content in models.items()}


def _entry(where: str, content: object) -> Entry:
    if not isinstance(content, Mapping):
        raise SettingError(where, f"a {type(content).__name__}", "an entry, as softdefend zoo add writes it")
    known = {field.name for field in fields(Entry)}
    for name in content:
        if name not in known:
            accepted = ", ".join(sorted(known)) + did_you_mean(str(name), known)
            raise SettingError(f"{where}: {name}", "an unknown field", accepted)
    needed = known - {"audit", "revision"}
    if missing := sorted(needed - content.keys()):
        raise SettingError(where, f"no {', '.join(missing)}", f"{', '.join(sorted(needed))}")
    kinds = {"n": int, "clean": float, "audit": str | None, "revision": str | None}
    given = {
        name: check_type(f"{where}: {name}", value, kinds.get(name, str))
        for name, value in content.items()
        if name != "robust"
    }
    rates = content["robust"]
    if not isinstance(rates, Mapping) or not rates:
        raise SettingError(f"{where}: robust", rates, "accuracies by attack")
    robust = {str(a): check_type(f"{where}: robust.{a}", rate, float) for a, rate in rates.items()}
    return Entry(robust=robust, **given)


def find(name: str, path: Path) -> Entry:
    """The entry of a list.

    Raises:
        SettingError: an unknown name.
    """
    models = read_zoo(path)
    if name not in models:
        known = ", ".join(models) or f"a model of {path}, which has none yet; --list FILE reads another"
        raise SettingError("name", repr(name), known + did_you_mean(name, models))
    return models[name]


def make_entry(source: str, *, revision: str | None = None) -> Entry:
    """An entry from what a published model says of itself.

    Raises:
        SettingError: no such model, or one that softdefend did not publish.
    """
    folder = locate(source, revision=revision, setting="source")
    config, evaluation = read_config(folder), read_published(folder)
    check_digest(folder / WEIGHTS, str(config.get("sha256")))
    try:
        return Entry(
            source=source,
            sha256=file_digest(folder / WEIGHTS),
            network=str(config["net"]["name"]),
            data=str(evaluation["name_of_data"]),
            norm=str(evaluation["norm"]),
            eps=str(evaluation["eps"]),
            n=int(evaluation["n"]),
            clean=_percent(evaluation["clean"]),
            robust={name: _percent(rate) for name, rate in evaluation["attacks"].items()},
            audit=_verdict(folder),
            revision=revision,
        )
    except (KeyError, TypeError, ValueError) as error:
        given = f"a model without {error}"
        raise SettingError("source", f"{source}, {given}", "a model that softdefend push wrote") from error


def add(name: str, source: str, path: Path, *, revision: str | None = None) -> Entry:
    """Write an entry into a list of one's own, in place of one of the same name.

    Raises:
        SettingError: a model that is none, or a list that is none.
    """
    if Path(source).is_dir():
        source = os.path.relpath(source, path.parent or ".")
        made = make_entry(str(path.parent / source))
    else:
        made = make_entry(source, revision=revision)
    content = read_yaml(path) if path.is_file() else {"models": {}}
    if path.is_file():
        read_zoo(path)
    made = replace(made, source=source)
    content["models"][name] = {key: value for key, value in asdict(made).items() if value is not None}
    write_atomic(path, yaml.safe_dump(content, sort_keys=False).encode())
    return made


@dataclass(frozen=True)
class Compared:
    """One figure, published and measured anew, in per cent; of an audit the verdicts."""

    name: str
    published: float | str
    found: float | str

    def agrees(self, tolerance: float) -> bool:
        """Whether both are the same, accuracies within so many points."""
        if isinstance(self.published, str) or isinstance(self.found, str):
            return self.published == self.found
        return abs(self.published - self.found) <= tolerance


def verify(
    name: str,
    path: Path,
    output: Path,
    *,
    data: str | None = None,
    audit: Size = 0,
    device: str = "auto",
    progress: bool = True,
) -> list[Compared]:
    """Evaluate a model of a list as it was evaluated when it was published.

    Args:
        name: of the model.
        path: of the list.
        output: the result folder.
        data: where the data are; where the model says it if None.
        audit: images on which it is audited again; 0 for no audit.
        device: auto, cpu, cuda or cuda:N.
        progress: show bars.

    Returns:
        Clean accuracy and that under each attack, published and found; with ``audit`` the verdicts.

    Raises:
        SettingError: an unknown name, weights with another digest, or other test images.
    """
    entry = find(name, path)
    here = path.parent / entry.source
    source = here if here.is_dir() else entry.source
    folder = locate(source, revision=entry.revision, setting=f"{name}: source")
    check_digest(folder / WEIGHTS, entry.sha256)
    published, net = read_published(folder), open_network(folder)
    bundle = _data(folder, name, data)
    _check_test_data(bundle, published)
    as_evaluated = published.get("settings") or {}
    threat = ThreatModel(cast(Norm, entry.norm), Budget(entry.eps))
    result = evaluate_network(
        net,
        bundle,
        output,
        threat=threat,
        settings=EvaluateSettings(
            attacks=tuple(entry.robust),
            curve_size=0,
            examples=0,
            **{key: as_evaluated[key] for key in _AS_EVALUATED if key in as_evaluated},
        ),
        requests=Requests(audit=audit),
        device=device,
        origin={"model": f"zoo:{name}", "weights": entry.sha256},
        architecture=entry.network,
        progress=progress,
    )
    rows = [Compared("clean", entry.clean, _percent(result["clean"]))]
    for attack, rate in entry.robust.items():
        rows.append(Compared(attack_label(attack), rate, _percent(result["attacks"][attack])))
    if audit:
        name = result_name("last", outside_threat(output), threat)
        found = parse_json((output / "evaluation" / f"{name}-audit.json").read_bytes())["verdict"]
        rows.append(Compared("audit", entry.audit or "none", found))
    return rows


def _data(folder: Path, name: str, source: str | None) -> DataBundle:
    """The data of a model, of which only the test images are used."""
    known = read_config(folder).get("data")
    if not isinstance(known, Mapping) or not (source or known.get("source")):
        raise SettingError("--data", f"nothing, and {name} does not say where its data are", "their place")
    try:
        settings = DataSettings(**{**known, "source": source or known["source"], "validation": 1})
    except TypeError as error:
        raise SettingError(f"{name}: data", error, "what softdefend push wrote") from error
    return load(settings)


def _check_test_data(bundle: DataBundle, published: Mapping[str, Any]) -> None:
    found, known = fingerprint(bundle.test), str(published.get("test_data"))
    if found != known:
        given = f"test images {found[:12]}, where the figures are of {known[:12]}"
        raise SettingError("--data", given, "the data that the model was evaluated on")


def _percent(rate: Mapping[str, Any]) -> float:
    return round(100 * float(rate["rate"]), 2)


def _verdict(folder: Path) -> str | None:
    path = folder / AUDIT
    if not path.is_file():
        return None
    try:
        return str(parse_json(path.read_bytes())["verdict"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(str(path), "no audit", "what softdefend push wrote") from error
