"""Geometry: how sharp is the loss in the weights, and how linear in the image?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdefend.analysis.figures import Curve, course_plot, line_plot, surface_plot
from softdefend.analysis.landscape import (
    hessian_product,
    input_gradients,
    largest_eigenvalue,
    local_linearity,
    mean_loss,
    parameters_of,
    surface,
)
from softdefend.analysis.part import PARTS, NetworkPart
from softdefend.analysis.probe import attack_images, draw_positions, per_sample_loss
from softdefend.analysis.results import PartResults, number
from softdefend.analysis.runs import AnalyzedNetwork
from softdefend.core.rng import stream
from softdefend.execution.network_mode import tf32
from softdefend.report.content import Block, Paragraph, Section, Table, figures
from softdefend.report.figures import Plot


@PARTS.register("geometry")
class Geometry(NetworkPart):
    """Loss surface, largest Hessian eigenvalue, input gradients and local linearity, on training images with
    their given labels, as attacked in training."""

    needs = ("probe", "points", "span", "eigen_steps", "linearity_steps", "batch_size", "seed")
    order = 50

    def measure(self, network: AnalyzedNetwork) -> dict[str, Any]:
        settings, run, net = self.settings, network.run, network.net
        seed, batch_size = settings.seed, settings.batch_size
        index = draw_positions(run.train.n, settings.probe, seed, "probe")
        batch = run.train.take(index.to(run.device))
        adversarial = attack_images(
            net, run.train, index, run.training_attack, run.threat, seed=seed, batch_size=batch_size
        )
        l1, l2 = input_gradients(net, batch.image, batch.label, batch_size)
        gaps = self._linearity_gaps(network, batch.image, batch.label)
        parameters = parameters_of(net)
        result: dict[str, Any] = {
            "probe": len(index),
            "loss": {
                kind: mean_loss(net, parameters, image, batch.label, batch_size)
                for kind, image in (("clean", batch.image), ("adversarial", adversarial))
            },
            "input_gradient": {"l1": _spread(l1), "l2": _spread(l2)},
            "linearity_gap": _spread(gaps),
            "surface": None,
            "eigenvalue": None,
        }
        if settings.points:
            result["surface"] = surface(
                net,
                adversarial,
                batch.label,
                points=settings.points,
                span=settings.span,
                batch_size=batch_size,
                seed=seed,
            )
        if settings.eigen_steps:
            product, size = hessian_product(net, adversarial, batch.label, batch_size)
            start = stream(seed, "analyse/eigenvector")
            top = largest_eigenvalue(product, size, start, steps=settings.eigen_steps, tolerance=1e-3)
            result["eigenvalue"] = {"value": top.value, "steps": top.steps, "residual": top.residual}
        return result

    def _linearity_gaps(self, network: AnalyzedNetwork, image: Tensor, label: Tensor) -> Tensor:
        settings, gaps = self.settings, []
        with tf32(False):
            images, labels = (torch.split(part, settings.batch_size) for part in (image, label))
            for number_of_batch, (x, t) in enumerate(zip(images, labels, strict=True)):
                generator = stream(settings.seed, "analyse/linearity", step=number_of_batch, device=x.device)

                def loss(candidate: Tensor, t: Tensor = t) -> Tensor:
                    return per_sample_loss(network.net(candidate).float(), t)

                threat, steps = network.run.threat, settings.linearity_steps
                gaps.append(local_linearity(loss, x, threat, steps=steps, generator=generator))
        return torch.cat(gaps)

    def section(self, results: PartResults) -> Section:
        """Slices and contours of the loss surface, and a table of the other measures."""
        line = line_plot(
            "Loss along the first direction",
            _slices(results),
            results.color,
            xlabel="distance in filter norms",
            ylabel="adversarial loss",
        )
        eigenvalue = course_plot(
            results,
            "Largest Hessian eigenvalue by epoch",
            "eigenvalue",
            {"": lambda result: (result["eigenvalue"] or {}).get("value")},
        )
        note = (
            f"{results.first['probe']} training images with their given labels. The eigenvalue is of the "
            "Hessian of the adversarial loss in the weights; its residual is |Hv − λv| / |λ|. Input "
            "gradients and linearity gap are means over clean images. Surfaces: adversarial images fixed, "
            "directions filter-normalized."
        )
        plots = figures(line, eigenvalue, *_surfaces(results))
        return Section("Geometry", [*plots, _table(results), Paragraph(note)])


def _spread(values: Tensor) -> dict[str, float]:
    values = values.double().cpu()
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "p95": float(values.quantile(0.95)),
    }


def _slices(results: PartResults) -> list[Curve]:
    """The loss along the first direction. Of a run's checkpoints only the final one is drawn: more would be a
    tangle."""
    final, curves = list(results.final()), []
    for one in results.measurements:
        grid = one.result["surface"]
        if grid is not None and (one in final or not one.is_checkpoint):
            middle = len(grid["axis"]) // 2
            curves.append(
                Curve(one.run, one.short_label, grid["axis"], [row[middle] for row in grid["loss"]])
            )
    return curves


def _surfaces(results: PartResults) -> list[Plot]:
    return [
        surface_plot(
            f"Loss surface, {one.run}, {one.label}", grid["axis"], grid["loss"], results.color[one.run]
        )
        for one in results.final()
        if (grid := one.result["surface"]) is not None
    ]


def _table(results: PartResults) -> Block:
    rows = []
    for one in results.measurements:
        result, top = one.result, one.result["eigenvalue"] or {}
        rows.append(
            [
                one.run,
                one.label,
                *(number(result["loss"][kind]) for kind in ("clean", "adversarial")),
                number(top.get("value"), 2),
                number(top.get("residual")),
                number(result["input_gradient"]["l1"]["mean"], 2),
                number(result["input_gradient"]["l2"]["mean"]),
                number(result["linearity_gap"]["mean"]),
            ]
        )
    head = ["run", "weights", "clean loss", "adversarial loss", "largest eigenvalue", "its residual"]
    head += ["input gradient, ℓ₁", "input gradient, ℓ₂", "linearity gap"]
    return Table("Geometry", head, rows)
