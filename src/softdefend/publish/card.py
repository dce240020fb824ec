"""A model card written from a run: what the model is, how robust, and how it was made."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from softdefend.core.version import VERSION
from softdefend.data import DataBundle
from softdefend.evaluation.union import of_same_images, rate_in_union
from softdefend.experiments.catalog import weight_name
from softdefend.experiments.config import Experiment
from softdefend.models.factory import is_own
from softdefend.report import RunRecord
from softdefend.report.figures import Series, colors, epoch_plot, norm_label
from softdefend.report.runs import group_runs
from softdefend.report.tables import attack_label

CURVE = "training_curve.png"

_ON_THE_HUB = {"cifar-10-batches-py": "uoft-cs/cifar10", "cifar-100-python": "uoft-cs/cifar100"}
"""Data sets by the name of their folder."""
_MOST_CLASSES = 20
_NO_LICENSE = "The owner of the weights has stated no license."


@dataclass(frozen=True)
class Card:
    """What a card is written from.

    Attributes:
        run: what the run's folder says.
        which: the checkpoint, best or last.
        experiment: the run's configuration.
        bundle: its data.
        address: ``owner/name``.
        license: of the weights, as the hub spells it; None if nobody has said.
        curve: whether the picture of the training lies beside the card.
    """

    run: RunRecord
    which: str
    experiment: Experiment
    bundle: DataBundle
    address: str
    license: str | None
    curve: bool

    @property
    def evaluation(self) -> dict[str, Any]:
        """Of the checkpoint."""
        return self.run.evaluations[self.which]

    @property
    def data_name(self) -> str:
        """What the data are called."""
        return str(self.evaluation.get("name_of_data", self.bundle.name))

    @property
    def rates(self) -> dict[str, Mapping[str, Any]]:
        """Accuracies by what the images went through, the worst case last if there were several attacks."""
        attacks: dict[str, Mapping[str, Any]] = self.evaluation["attacks"]
        worst = {"worst": self.evaluation["worst"]} if len(attacks) > 1 else {}
        return {"clean": self.evaluation["clean"], **attacks, **worst}


def card_text(card: Card) -> str:
    """The card: front matter that the hub reads, then Markdown."""
    return f"---\n{front_matter(card).to_yaml()}\n---\n\n{_body(card)}"


def front_matter(card: Card) -> ModelCardData:
    """What the hub reads: library, tags, data sets, metrics and results."""
    source = card.experiment.data.source
    named = "/".join(source[3:].split("/")[:2]) if source.startswith("hf:") else None
    hub = _ON_THE_HUB.get(card.data_name, named)
    threat = card.experiment.recipe.threat
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub or card.data_name,
            dataset_name=card.data_name,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="clean accuracy" if name == "clean" else f"accuracy under {attack_label(name)}",
            metric_value=round(float(rate["rate"]), 4),
            metric_args=None if name == "clean" else {"norm": threat.norm, "eps": str(threat.eps)},
        )
        for name, rate in card.rates.items()
    ]
    return ModelCardData(
        license=card.license,
        library_name="softdefend",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "adversarial-training", "pytorch", threat.norm],
        datasets=[hub] if hub else None,
        metrics=["accuracy"],
        model_name=card.address.partition("/")[2],
        eval_results=results,
    )


@cache
def _templates() -> Environment:
    """Markdown, so that nothing is escaped; a name that is not given is an error."""
    return Environment(
        loader=PackageLoader("softdefend.publish"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _body(card: Card) -> str:
    experiment, bundle, attacks = card.experiment, card.bundle, card.evaluation["attacks"]
    shape, threat = bundle.test.images.shape, experiment.recipe.threat
    return (
        _templates()
        .get_template("card.md.j2")
        .render(
            title=card.address.partition("/")[2],
            about=_about(card),
            address=card.address,
            net_argument=", net=my_net" if is_own(experiment.net.name) else "",
            network=experiment.net.name,
            channels=shape[1],
            size=f"{shape[2]} x {shape[3]}",
            classes=_listed(bundle.classes),
            images=f"{card.evaluation['n']:,} of {len(bundle.test):,}",
            data=card.data_name,
            threat=_words(threat),
            rows=[_row(name, rate) for name, rate in card.rates.items()],
            threats=_threats(card),
            autoattack=any("autoattack" in name for name in attacks),
            selection=_selection(card),
            audit=_audit(card),
            training=_training(card),
            papers=list(dict.fromkeys(rule.source for rule in experiment.recipe.rules if rule.source)),
            curve=CURVE if card.curve else "",
            license=f"Weights: {card.license}." if card.license else _NO_LICENSE,
            version=VERSION,
        )
    )


def _about(card: Card) -> str:
    threat = _words(card.experiment.recipe.threat)
    return f"{card.experiment.net.name} on {card.data_name}, trained against {threat}: {_recipe(card)}."


def _words(threat: Any) -> str:
    return f"{norm_label(threat.norm)} perturbations of {threat.eps}"


def _recipe(card: Card) -> str:
    label, objective, weight = card.experiment.recipe.rules
    return f"{type(objective).__name__} with {type(label).__name__} labels and {weight_name(weight)} weights"


def _listed(classes: tuple[str, ...]) -> str:
    more = len(classes) - _MOST_CLASSES
    return ", ".join(classes[:_MOST_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _row(name: str, rate: Mapping[str, Any]) -> dict[str, str]:
    return _cells({"clean": "clean", "worst": "worst of all"}.get(name) or attack_label(name), rate)


def _cells(name: str, rate: Mapping[str, Any]) -> dict[str, str]:
    low, high = (f"{100 * float(rate[end]):.2f}" for end in ("low", "high"))
    return {"name": name, "rate": f"{100 * float(rate['rate']):.2f}", "interval": f"{low} to {high}"}


def _threats(card: Card) -> list[dict[str, str]]:
    """Worst cases under every threat that the checkpoint was evaluated under, and in their union; none where
    that is its own alone."""
    kept = card.run.details[card.which].threats
    rows, same = [], bool(kept) and of_same_images(kept)
    for one in kept:
        attacks = ", ".join(attack_label(name) for name in one.result["attacks"])
        count = "" if same else f", {one.result['n']} images"
        rows.append(_cells(f"{_words(one.threat)}: {attacks}{count}", one.result["worst"]))
    if same:
        rows.append(_cells("all of these, image by image", asdict(rate_in_union(kept))))
    return rows


def _selection(card: Card) -> str:
    """Which checkpoint this is, and how the other one does."""
    what = {
        "best": "This is the best checkpoint, selected on held-out training images.",
        "last": "This is the last checkpoint.",
    }[card.which]
    other = next((one for one in card.run.evaluations if one != card.which), None)
    if other is None:
        return what
    clean, robust = (_against(card, other, measure) for measure in ("clean", "worst"))
    return f"{what} The {other} one has {clean} clean and {robust} in the worst case of its attacks."


def _against(card: Card, other: str, measure: str) -> str:
    """The other checkpoint's accuracy, and by how much the published one's is higher."""
    ours, theirs = (float(card.run.evaluations[one][measure]["rate"]) for one in (card.which, other))
    return f"{100 * theirs:.2f} (difference {100 * (ours - theirs):+.2f})"


def _audit(card: Card) -> str:
    audit = card.run.details[card.which].audit
    if audit is None:
        return "It was not audited for gradient masking."
    return f"Audit for gradient masking: **{audit['verdict']}**. {audit['summary']}".rstrip()


def _training(card: Card) -> str:
    experiment, optim = card.experiment, card.experiment.optim
    machine, wrong = card.run.environment, experiment.data.noise_rate
    where = ""
    if {"device", "torch"} <= machine.keys():
        where = f" on {machine['device']} with torch {machine['torch']}"
    noise = f", {100 * wrong:g}% of the labels wrong" if wrong else ""
    return (
        f"{optim.epochs} epochs on {len(card.bundle.train):,} images of {card.data_name}{noise}, "
        f"seed {experiment.seed}, by softdefend {VERSION}{where}."
    )


def curve_picture(run: RunRecord) -> bytes | None:
    """Robust accuracy by epoch as a PNG; None where the run has recorded none."""
    groups = group_runs([run])
    series = [Series("val_robust", "held-out images"), Series("train_robust", "training images")]
    plot = epoch_plot("Robust accuracy", groups, colors(groups), series, "%")
    if plot is None:
        return None
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
