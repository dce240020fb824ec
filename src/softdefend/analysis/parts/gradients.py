"""Gradient norms and memorisation: which samples does the training loss still pull at?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.analysis.figures import Curve, course_plot, dot_plot, line_plot
from softdefend.analysis.gradient_norms import (
    last_layer,
    last_layer_norms,
    memorisation,
    spread,
    whole_network_norms,
)
from softdefend.analysis.part import PARTS, NetworkPart
from softdefend.analysis.probe import attack_images, draw_positions, predict_training_images
from softdefend.analysis.request import AnalysisRequest
from softdefend.analysis.results import PartResults, folded_table, number, percent
from softdefend.analysis.runs import (
    AnalyzedNetwork,
    AnalyzedRun,
    SavedWeights,
    find_weights,
    open_network,
    open_runs,
)
from softdefend.core.errors import SettingError
from softdefend.report.content import Block, Paragraph, Section, Table, figures
from softdefend.report.figures import Plot

_LONGEST_OPEN_TABLE = 12


@dataclass(frozen=True)
class LabelJudgement:
    """Which labels of the training set are taken to be wrong.

    Attributes:
        source: in words.
        wrong: [n] bool, or None where there is no way to tell.
        truth: [n] int64, where the clean labels are known.
    """

    source: str
    wrong: Tensor | None
    truth: Tensor | None


@PARTS.register("gradients")
class Gradients(NetworkPart):
    """Gradient norms on a fixed probe set of training images, clean and as attacked in training.

    Targets are the given labels and, where the weights came with a label memory, also the refined ones.
    Labels are judged by the clean labels where the run has them, else by a reference network.
    """

    needs = ("probe", "whole", "batch_size", "seed")
    order = 20

    def __init__(self, name: str, request: AnalysisRequest) -> None:
        super().__init__(name, request)
        self._reference: tuple[AnalyzedRun, SavedWeights] | None = None
        self._predictions: dict[str, Tensor] = {}

    def prepare(self, runs: Sequence[AnalyzedRun]) -> None:
        """Open the reference run.

        Raises:
            SettingError: it is no run, or has no best checkpoint.
        """
        folder = self.request.reference
        if folder is None:
            return
        opened = {os.path.realpath(run.folder): run for run in runs}
        run = opened.get(os.path.realpath(folder)) or open_runs([folder], runs[0].device)[0]
        weights = find_weights(run.folder, ["best"])
        if not weights:
            raise SettingError("--reference", folder, "a run with a best checkpoint")
        self._reference = run, weights[0]

    def inputs(self, run: AnalyzedRun) -> dict[str, Any]:
        reference = self._reference[1].sha256 if self._reference else None
        return super().inputs(run) | {"reference": reference}

    def measure(self, network: AnalyzedNetwork) -> dict[str, Any]:
        settings, run, net = self.settings, network.run, network.net
        judgement = self._judge_labels(run)
        index = draw_positions(run.train.n, settings.probe, settings.seed, "probe")
        batch = run.train.take(index.to(run.device))
        adversarial = attack_images(
            net,
            run.train,
            index,
            run.training_attack,
            run.threat,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        wrong = None if judgement.wrong is None else judgement.wrong[index]
        targets = {"given": nn.functional.one_hot(batch.label, run.k).float()}
        if (refined := network.targets(index)) is not None:
            targets["refined"] = refined.to(run.device)
        result: dict[str, Any] = {
            "probe": len(index),
            "judged_by": judgement.source,
            "last_layer": {},
            "whole_network": {},
            "memorisation": {},
        }
        for kind, image in (("clean", batch.image), ("adversarial", adversarial)):
            features = last_layer(net, image, settings.batch_size)
            result["last_layer"][kind] = {
                name: spread(last_layer_norms(features, target).cpu(), wrong)
                for name, target in targets.items()
            }
            if wrong is not None:
                truth = None if judgement.truth is None else judgement.truth[index]
                prediction = features.logits.argmax(dim=1).cpu()
                result["memorisation"][kind] = memorisation(prediction, batch.label.cpu(), wrong, truth)
        if settings.whole:
            # Spread over the probe set, which is in the order of the data: that may be class after class.
            few = min(settings.whole, len(index))
            rows = torch.arange(few) * len(index) // few
            result["whole_network"]["adversarial"] = {
                name: spread(
                    whole_network_norms(net, adversarial[rows], target[rows], settings.chunk).cpu(),
                    None if wrong is None else wrong[rows],
                )
                for name, target in targets.items()
            }
        return result

    def _judge_labels(self, run: AnalyzedRun) -> LabelJudgement:
        train = run.bundle.train
        if train.clean_labels is not None:
            return LabelJudgement("clean labels", train.labels != train.clean_labels, train.clean_labels)
        if self._reference is None:
            return LabelJudgement("unknown", None, None)
        disagrees = train.labels != self._predict_by_reference(run, *self._reference)
        return LabelJudgement(f"disagreement with {self.request.reference}", disagrees, None)

    def _predict_by_reference(
        self, run: AnalyzedRun, reference: AnalyzedRun, weights: SavedWeights
    ) -> Tensor:
        """The reference network's predictions on the run's training images, [n]."""
        images = (one.bundle.train.images.shape[1:] for one in (reference, run))
        if len(set(images)) > 1 or reference.k != run.k:
            raise SettingError(
                "--reference", reference.folder, "a run on images and classes of the same kind"
            )
        fingerprint = run.bundle.fingerprint
        if fingerprint not in self._predictions:
            net = open_network(reference, weights).net
            probability = predict_training_images(net, run.train, self.settings.batch_size)
            self._predictions[fingerprint] = probability.argmax(dim=1)
        return self._predictions[fingerprint]

    def section(self, results: PartResults) -> Section:
        """Norms and their distribution, and how many wrong labels the networks repeat."""
        judged = " and ".join(dict.fromkeys(one.result["judged_by"] for one in results.measurements))
        note = (
            f"Labels judged by: {judged}. Norms of the gradient of each sample's cross-entropy, in eval "
            f"mode, {results.first['probe']} training images. Refined labels are the label memory's."
        )
        plots = figures(
            line_plot(
                "Distribution of last-layer gradient norms",
                _distributions(results),
                results.color,
                xlabel="gradient norm, adversarial images",
                ylabel="samples below (%)",
                logarithmic=True,
            ),
            dot_plot(
                "Gradient carried by wrong labels",
                _shares_of_wrong(results),
                results.color,
                xlabel="share of the gradient (%)",
            ),
            *_norms_by_epoch(results),
        )
        blocks = [*plots, *_memorisation_blocks(results), Paragraph(note), _norms_table(results)]
        return Section("Gradient norms and memorisation", blocks)


def _distributions(results: PartResults) -> list[Curve]:
    curves = []
    for one in results.final():
        given = one.result["last_layer"]["adversarial"]["given"]
        kinds = {"right": "labels taken as right", "wrong": "wrong labels"}
        known = {words: given.get(f"{kind}_quantiles") for kind, words in kinds.items()}
        split = {words: quantiles for words, quantiles in known.items() if quantiles}
        for words, quantiles in (split or {"": given["quantiles"]}).items():
            share = [100 * i / (len(quantiles) - 1) for i in range(len(quantiles))]
            curves.append(Curve(one.run, words, quantiles, share))
    return curves


def _shares_of_wrong(results: PartResults) -> list[tuple[str, str, str, float]]:
    return [
        (one.short_label, one.run, f"{target} labels", 100 * norms["share_of_wrong"])
        for one in results.measurements
        for target, norms in one.result["last_layer"]["adversarial"].items()
        if norms.get("share_of_wrong") is not None
    ]


def _norms_table(results: PartResults) -> Block:
    rows = [
        [
            one.run,
            one.label,
            layer,
            kind,
            target,
            number(norms["mean"]),
            *(number(norms.get(name)) for name in ("right_mean", "wrong_mean")),
            *(percent(norms.get(name)) for name in ("fraction_wrong", "share_of_wrong")),
        ]
        for one in results.measurements
        for layer, images in (("last layer", "last_layer"), ("whole network", "whole_network"))
        for kind, targets in one.result[images].items()
        for target, norms in targets.items()
    ]
    head = ["run", "weights", "of", "images", "labels", "mean norm", "right", "wrong"]
    head += ["% of samples wrong", "% of gradient from wrong"]
    return folded_table("Gradient norms", head, rows)


def _norms_by_epoch(results: PartResults) -> list[Plot | None]:
    def norm(targets: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["last_layer"]["adversarial"].get(targets, {}).get(key)

    def fitted(result: Mapping[str, Any]) -> float | None:
        share = result["memorisation"].get("clean", {}).get("fitted")
        return None if share is None else 100 * share

    known = any(norm("given", "wrong_mean")(one.result) is not None for one in results.measurements)
    words = {"right_mean": "labels taken as right", "wrong_mean": "wrong labels"} if known else {"mean": ""}
    courses = [
        course_plot(
            results,
            f"Gradient norm towards the {targets} labels by epoch",
            "mean norm, last layer",
            {name: norm(targets, key) for key, name in words.items()},
        )
        for targets in ("given", "refined")
    ]
    title = "Wrong labels fitted by epoch"
    return [*courses, course_plot(results, title, "wrong labels repeated (%)", {"": fitted})]


def _memorisation_blocks(results: PartResults) -> list[Block]:
    rows = [
        [
            one.run,
            one.label,
            kind,
            str(memory["wrong"]),
            percent(memory["fitted"]),
            percent(memory.get("recovered")),
        ]
        for one in results.measurements
        for kind, memory in one.result["memorisation"].items()
    ]
    if not rows:
        return [
            Paragraph(
                "Nothing is known of which labels are wrong: give --reference, or data with clean labels."
            )
        ]
    head = ["run", "weights", "images", "wrong labels", "% fitted", "% recovered"]
    note = "Fitted: the network repeats the wrong label. Recovered: it says the true class."
    table = Table if len(rows) <= _LONGEST_OPEN_TABLE else folded_table
    return [table("Wrong labels in the probe set", head, rows), Paragraph(note)]
