"""Label quality: how sure, how right and how human are targets and predictions?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softdefend.analysis.calibration import compare_with_people, quality
from softdefend.analysis.figures import Curve, course_plot, line_plot
from softdefend.analysis.human_labels import HumanLabels, check_exists, read_human_labels
from softdefend.analysis.part import PARTS, NetworkPart
from softdefend.analysis.probe import attack_images, draw_positions, logits_of
from softdefend.analysis.results import PartResults, folded_table, number, percent
from softdefend.analysis.runs import AnalyzedNetwork, AnalyzedRun
from softdefend.attacks import PGD
from softdefend.core.digest import file_digest
from softdefend.report.content import Block, Paragraph, Section, figures
from softdefend.report.figures import Plot

_QUALITY = ("accuracy", "confidence", "entropy", "ece", "adaptive_ece", "brier", "nll")
_SHARES = ("accuracy", "confidence", "ece", "adaptive_ece")


@PARTS.register("labels")
class LabelQuality(NetworkPart):
    """Predictions on test images, clean and under PGD at the trained threat, and the label memory on training
    images; compared with human labels where there are some."""

    needs = ("test", "steps", "bins", "batch_size", "seed")
    order = 30

    def prepare(self, runs: Sequence[AnalyzedRun]) -> None:
        """Refuse files of votes that are not there: a stored result would answer for them."""
        check_exists("--train_votes", self.request.train_votes)
        check_exists("--test_votes", self.request.test_votes)

    def inputs(self, run: AnalyzedRun) -> dict[str, Any]:
        request = self.request
        votes = [path and file_digest(Path(path)) for path in (request.train_votes, request.test_votes)]
        return super().inputs(run) | {"votes": [*votes, request.train_keys]}

    def measure(self, network: AnalyzedNetwork) -> dict[str, Any]:
        settings, request = self.settings, self.request
        run, net = network.run, network.net
        people = read_human_labels(run, request.train_votes, request.train_keys, request.test_votes)
        index = draw_positions(run.test.n, settings.test, settings.seed, "test")
        batch = run.test.take(index.to(run.device))
        adversarial = attack_images(
            net,
            run.test,
            index,
            PGD(steps=settings.steps),
            run.threat,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        result: dict[str, Any] = {
            "attack": f"pgd-{settings.steps}",
            "predictions": {},
            "people": {},
            "targets": None,
        }
        for kind, image in (("clean", batch.image), ("adversarial", adversarial)):
            probability = logits_of(net, image, settings.batch_size).double().softmax(dim=1).cpu()
            result["predictions"][kind] = quality(probability, batch.label.cpu(), settings.bins)
            if people.test is not None:
                distance = compare_with_people(probability, people.test[index])
                result["people"][f"{kind} predictions, test"] = distance
        if network.memory is not None:
            result["targets"], distances = _measure_targets(network, people, settings.bins)
            result["people"] |= distances
        return result

    def section(self, results: PartResults) -> Section:
        """Reliability diagrams and tables of calibration and of distances to human labels."""
        reliability = line_plot(
            "Reliability",
            _reliability_curves(results),
            results.color,
            xlabel="confidence",
            ylabel="accuracy",
            diagonal=True,
            markers=True,
        )
        note = f"Adversarial: {results.first['attack']} at the trained threat, against the true label."
        blocks = [*figures(reliability, *_quality_by_epoch(results)), Paragraph(note)]
        return Section("Label quality", [*blocks, _quality_table(results), *_people_table(results)])


def _measure_targets(
    network: AnalyzedNetwork, people: HumanLabels, bins: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quality of label memory and training targets, and their distances to human labels."""
    run, memory = network.run, network.memory
    assert memory is not None
    train = run.bundle.train
    targets = network.targets(torch.arange(len(train)))
    given = nn.functional.one_hot(train.labels, run.k).double()
    rows = {"memory": memory} | ({} if targets is None else {"targets": targets})
    truth = train.labels if train.clean_labels is None else train.clean_labels
    result = {
        "judged_by": "given labels" if train.clean_labels is None else "clean labels",
        **{name: quality(table, truth, bins) for name, table in rows.items()},
    }
    if people.train is None:
        return result, {}
    rows = {"given labels": given, **rows}
    return result, {
        f"{name}, training": compare_with_people(table, people.train) for name, table in rows.items()
    }


def _quality_table(results: PartResults) -> Block:
    rows = []
    for one in results.measurements:
        targets = one.result["targets"] or {}
        measured = {f"predictions, {kind} test": q for kind, q in one.result["predictions"].items()}
        measured |= {f"{name}, training": q for name, q in targets.items() if isinstance(q, Mapping)}
        for what, values in measured.items():
            texts = [(percent if name in _SHARES else number)(values[name]) for name in _QUALITY]
            rows.append([one.run, one.label, what, *texts])
    head = ["run", "weights", "what", "accuracy, %", "confidence, %", "entropy, nats", "ECE, %"]
    head += ["adaptive ECE, %", "Brier", "NLL, nats"]
    return folded_table("Calibration", head, rows)


def _people_table(results: PartResults) -> list[Block]:
    rows = [
        [
            one.run,
            one.label,
            what,
            *(number(distance[name]) for name in ("kl", "total_variation")),
            percent(distance["agreement"]),
            number(distance["entropy_rank_correlation"]),
        ]
        for one in results.measurements
        for what, distance in one.result["people"].items()
    ]
    head = ["run", "weights", "what", "KL(people ‖ ours), nats", "total variation", "top-1 agreement, %"]
    head += ["entropy rank correlation"]
    return [folded_table("Distance to human labels", head, rows)] if rows else []


def _reliability_curves(results: PartResults) -> list[Curve]:
    curves = []
    for one in results.final():
        for kind in ("clean", "adversarial"):
            bars = one.result["predictions"][kind]["reliability"]
            points = ([bar[name] for bar in bars] for name in ("confidence", "accuracy"))
            curves.append(Curve(one.run, f"{kind} test images", *points))
    return curves


def _quality_by_epoch(results: PartResults) -> list[Plot | None]:
    def of_targets(key: str, factor: float) -> Callable[[Mapping[str, Any]], float | None]:
        def value(result: Mapping[str, Any]) -> float | None:
            values = (result["targets"] or {}).get("targets")
            return factor * values[key] if isinstance(values, Mapping) else None

        return value

    def of_predictions(kind: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: 100 * float(result["predictions"][kind]["ece"])

    return [
        course_plot(results, "Entropy of the targets by epoch", "nats", {"": of_targets("entropy", 1)}),
        course_plot(results, "ECE of the targets by epoch", "%", {"": of_targets("ece", 100)}),
        course_plot(
            results,
            "ECE of the predictions by epoch",
            "%",
            {f"{kind} test images": of_predictions(kind) for kind in ("clean", "adversarial")},
        ),
    ]
