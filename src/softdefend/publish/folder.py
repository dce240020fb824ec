"""The folder of a published model: what is written into it, and read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.files import parse_json, write_atomic
from softdefend.core.identity import check_weights
from softdefend.core.weight_files import load_weights
from softdefend.core.yaml_files import flatten
from softdefend.data import DataBundle, load
from softdefend.experiments.config import Experiment
from softdefend.experiments.evaluate import open_run, run_identity
from softdefend.experiments.network import make_net
from softdefend.models.factory import is_own
from softdefend.publish.card import CURVE, Card, card_text, curve_picture
from softdefend.publish.network import (
    CONFIG,
    WEIGHTS,
    RobustClassifier,
    check_digest,
    load_published,
    read_config,
)
from softdefend.report import RunRecord, read_run

TRAINING = "training.yaml"
EVALUATION = "evaluation.json"
AUDIT = "audit.json"

_TEST_DATA = (
    *("name", "image_column", "label_column", "channels", "sixteen_bit", "skip_damaged"),
    *("test_fraction", "split_seed"),
)
"""Data settings that the test images depend on, but for their source."""
_RATIO = re.compile(r"[-+.\de]+/[-+.\de]+")


@dataclass(frozen=True)
class Publication:
    """A checkpoint of a finished run, with everything that is published of it.

    Attributes:
        experiment: the run's configuration.
        run: what its folder says.
        which: best or last.
        bundle: the run's data.
    """

    experiment: Experiment
    run: RunRecord
    which: str
    bundle: DataBundle

    @property
    def weights(self) -> Path:
        """The file of weights."""
        return self.experiment.folder / f"{self.which}.safetensors"

    @property
    def evaluation(self) -> dict[str, Any]:
        """What stands in the evaluation's file."""
        return self.run.evaluations[self.which]


def open_publication(folder: Path, which: str) -> Publication:
    """A checkpoint that can be published.

    Raises:
        SettingError: no run, weights that are missing or not the run's, or no evaluation of them.
    """
    experiment = open_run(folder)
    run = read_run(folder)
    if which not in run.evaluations:
        accepted = f"an evaluated run: softdefend evaluate {folder} --which {which} first"
        raise SettingError("run", f"{folder} without evaluation/{which}.json", accepted)
    bundle = load(experiment.data)
    made = Publication(experiment, run, which, bundle)
    metadata = load_weights(make_net(experiment, bundle), made.weights)
    check_weights(made.weights, metadata, which, run_identity(experiment, bundle))
    check_digest(made.weights, str(made.evaluation.get("weights")))
    return made


def write_published(made: Publication, folder: Path, address: str, license: str | None) -> list[Path]:
    """Write all files of a published model; return their paths.

    Args:
        made: what is published.
        folder: where; files of another name there stay.
        address: ``owner/name`` by which people will load it.
        license: of the weights, as the hub spells it.

    Raises:
        SettingError: a file that cannot be written, or weights that do not come back from it bit for bit.
    """
    experiment, which = made.experiment, made.which
    source = {WEIGHTS: made.weights, EVALUATION: experiment.folder / "evaluation" / f"{which}.json"}
    if made.run.details[which].audit is not None:
        source[AUDIT] = experiment.folder / "evaluation" / f"{which}-audit.json"
    contents = {name: path.read_bytes() for name, path in source.items()}
    contents[CONFIG] = _json(configuration(made))
    contents[TRAINING] = yaml.safe_dump(public(made.run.config), sort_keys=False).encode()
    if (curve := curve_picture(made.run)) is not None:
        contents[CURVE] = curve
    card = Card(made.run, which, experiment, made.bundle, address, license, curve=curve is not None)
    contents["README.md"] = card_text(card).encode()
    for name, content in contents.items():
        write_atomic(folder / name, content)
    for name in {AUDIT, CURVE} - contents.keys():
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    _check_round_trip(made, folder)
    return [folder / name for name in contents]


def configuration(made: Publication) -> dict[str, Any]:
    """What ``config.json`` says: the network as :class:`RobustClassifier` takes it, and what it is for."""
    shape = list(made.bundle.test.images.shape[1:])
    data = asdict(made.experiment.data)
    known = {name: data[name] for name in _TEST_DATA}
    if is_public(data["source"]):
        known["source"] = data["source"]
    threat = made.experiment.recipe.threat
    return {
        "library_name": "softdefend",
        "net": {**asdict(made.experiment.net), "pretrained": None},
        "num_classes": len(made.bundle.classes),
        "in_channels": shape[0],
        "image_size": shape[1:],
        "classes": list(made.bundle.classes),
        "threat": {"norm": threat.norm, "eps": str(threat.eps)},
        "data": known,
        "sha256": file_digest(made.weights),
    }


def is_public(source: str) -> bool:
    """Whether a source of data is the same on every machine."""
    return source == "digits" or source.startswith("hf:")


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without the paths of the machine that it ran on."""
    kept = {key: value for key, value in flatten(config).items() if not _is_path(value)}
    tree: dict[str, Any] = {}
    for key, value in kept.items():
        *above, last = key.split(".")
        place = tree
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "/" in value and not (is_public(value) or _RATIO.fullmatch(value))


def read_published(folder: Path) -> dict[str, Any]:
    """The evaluation of a published model.

    Raises:
        SettingError: there is none, or it is no JSON object.
    """
    path = folder / EVALUATION
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingError(str(path), "no evaluation", "a folder that softdefend push wrote") from error
    if not isinstance(content, dict):
        raise SettingError(str(path), f"a {type(content).__name__}", "an evaluation")
    return content


def open_network(folder: Path, net: torch.nn.Module | None = None) -> torch.nn.Module:
    """The network of a published model with its weights, in eval mode on the CPU.

    Args:
        folder: of the model.
        net: takes the weights; needed where the network is neither built in nor timm's.

    Raises:
        SettingError: a file is missing or was altered, or the network does not fit.
    """
    config = read_config(folder)
    if net is None:
        names = ("net", "num_classes", "in_channels", "image_size")
        given = {name: config[name] for name in names if name in config}
        for name, kind in (("net", dict), ("num_classes", int)):
            if not isinstance(given.get(name), kind):
                accepted = f"a {kind.__name__}, as softdefend push writes it"
                raise SettingError(f"{folder / CONFIG}: {name}", given.get(name), accepted)
        net = RobustClassifier(**given)
    return load_published(net, folder)


def _check_round_trip(made: Publication, folder: Path) -> None:
    """Read what was written as its users will."""
    if is_own(made.experiment.net.name):
        return  # its users bring the network
    net, back = make_net(made.experiment, made.bundle), open_network(folder)
    load_weights(net, made.weights)
    expected = net.state_dict().values()
    for (name, value), other in zip(back.state_dict().items(), expected, strict=True):
        if not torch.equal(value, other):
            raise SettingError(str(folder / WEIGHTS), f"another {name}", "the weights of the run")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
