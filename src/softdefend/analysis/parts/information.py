"""Information: what the weights store of the training set, what a representation keeps of image and label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softdefend.analysis.figures import course_plot, dot_plot
from softdefend.analysis.gradient_norms import last_layer
from softdefend.analysis.information_estimates import information_in_weights, mutual_information
from softdefend.analysis.landscape import parameters_of
from softdefend.analysis.part import PARTS, NetworkPart
from softdefend.analysis.probe import attack_images, draw_positions
from softdefend.analysis.results import PartResults, folded_table, number
from softdefend.analysis.runs import AnalyzedNetwork, AnalyzedRun, initial_network
from softdefend.core.errors import SettingError
from softdefend.report.content import Block, Paragraph, Section, figures
from softdefend.report.figures import Plot

_ESTIMATES = {
    "label_bound": "I(T; Y), classifier bound",
    "label_neighbors": "I(T; Y), neighbors",
    "input_bound": "I(X; T), InfoNCE bound",
    "input_neighbors": "I(X; T), neighbors",
}


@PARTS.register("information")
class Information(NetworkPart):
    """Information in the weights, and in the last hidden representation, on clean images and on images
    attacked as in training."""

    needs = ("probe", "test", "components", "neighbors", "contrast_steps", "batch_size", "seed")
    order = 40

    def inputs(self, run: AnalyzedRun) -> dict[str, Any]:
        # The first weights are a function of the run's seed.
        return super().inputs(run) | {"initial": run.experiment.seed}

    def measure(self, network: AnalyzedNetwork) -> dict[str, Any]:
        settings, run, net = self.settings, network.run, network.net
        before = parameters_of(initial_network(run))
        result: dict[str, Any] = {"weights": {}, "representation": {}, "training_images": run.train.n}
        # As many of both: what neighbors find depends on how many there are.
        count = min(settings.probe, settings.test, run.train.n, run.test.n)
        if settings.neighbors >= count:
            accepted = f"fewer than the {count} images that are measured"
            raise SettingError("--neighbors", settings.neighbors, accepted)
        for split, data, name in (("train", run.train, "probe"), ("test", run.test, "test")):
            index = draw_positions(data.n, count, settings.seed, name)
            batch = data.take(index.to(run.device))
            adversarial = attack_images(
                net,
                data,
                index,
                run.training_attack,
                run.threat,
                seed=settings.seed,
                batch_size=settings.batch_size,
            )
            for kind, image in (("clean", batch.image), ("adversarial", adversarial)):
                result["representation"][f"{split}, {kind}"] = mutual_information(
                    image,
                    last_layer(net, image, settings.batch_size).features,
                    batch.label,
                    components=settings.components,
                    neighbors=settings.neighbors,
                    contrast_steps=settings.contrast_steps,
                    seed=settings.seed,
                )
                if split == "train":
                    stored = information_in_weights(
                        net, before, image, batch.label, data.n, settings.batch_size
                    )
                    result["weights"][kind] = dict(vars(stored))
        return result

    def section(self, results: PartResults) -> Section:
        """Information in the weights, estimates of mutual information, and both by epoch."""
        note = (
            "All in nats. T is what enters the last linear layer. The classifier and InfoNCE bounds are "
            "lower bounds; the neighbor-based estimates err towards zero, and far so for I(X; T), which is "
            "unbounded for a deterministic network. Compare runs, do not read single values. Y is the label "
            "as given on training images, and the true one on test images."
        )
        title = "Mutual information, adversarial images"
        plots = figures(
            _weights_plot(results),
            dot_plot(title, _adversarial_estimates(results), results.color, xlabel="nats"),
            *_information_by_epoch(results),
        )
        return Section("Information", [*plots, Paragraph(note), _estimates_table(results)])


def _weights_plot(results: PartResults) -> Plot | None:
    dots, errors = [], {}
    for one in results.measurements:
        for kind, stored in one.result["weights"].items():
            row = f"{one.short_label}, {kind}"
            empirical, model = ((row, one.run, f"{name} Fisher") for name in ("empirical", "model"))
            dots += [(*empirical, stored["empirical"]), (*model, stored["model"])]
            if stored["empirical_error"] is not None:
                errors[empirical] = stored["empirical_error"]
    xlabel = "n/2 (w − w₀)ᵀ F (w − w₀), nats"
    return dot_plot("Information in the weights", dots, results.color, xlabel=xlabel, errors=errors)


def _adversarial_estimates(results: PartResults) -> list[tuple[str, str, str, float]]:
    return [
        (words, one.run, images, values[name])
        for one in results.final()
        for images, values in one.result["representation"].items()
        for name, words in _ESTIMATES.items()
        if images.endswith("adversarial") and values[name] is not None
    ]


def _estimates_table(results: PartResults) -> Block:
    rows = [
        [one.run, one.label, images, *(number(values[name]) for name in ("label_entropy", *_ESTIMATES))]
        for one in results.measurements
        for images, values in one.result["representation"].items()
    ]
    head = ["run", "weights", "images", "H(Y)", *_ESTIMATES.values()]
    return folded_table("Mutual information", head, rows)


def _information_by_epoch(results: PartResults) -> list[Plot | None]:
    def stored(kind: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["weights"].get(kind, {}).get("empirical")

    images = next(name for name in results.first["representation"] if name.endswith("adversarial"))

    def estimate(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["representation"].get(images, {}).get(name)

    def plot(symbol: str, names: Sequence[str]) -> Plot | None:
        kinds = {_ESTIMATES[name].partition(", ")[2]: estimate(name) for name in names}
        return course_plot(results, f"{symbol} by epoch, {images}", "nats", kinds)

    # Training was on adversarial images; their Fisher matrix need not rank runs as that of clean ones does.
    kinds = {f"{kind} training images": stored(kind) for kind in results.first["weights"]}
    title = "Information in the weights by epoch"
    return [
        course_plot(results, title, "nats, empirical Fisher", kinds),
        plot("I(T; Y)", ("label_bound", "label_neighbors")),
        plot("I(X; T)", ("input_bound", "input_neighbors")),
    ]
