"""The Markdown tables of README and docs, from the JSON files beside this script.

    python benchmarks/tables.py

A test compares them with what the documents show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = Path(__file__).parent.parent / "src/softdefend/configs/protocols"


def read(name: str) -> dict[str, Any]:
    """One result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def table(head: str, rows: Iterable[str]) -> str:
    """A table from its header line and its other lines."""
    return "\n".join([head, "| --- " * (head.count("|") - 1) + "|", *rows])


def short_schedule() -> str:
    """ResNet-18 on 36 epochs: clean and PGD-20 at best and last, and what a prototype reached."""
    head = "| recipe | clean best | clean last | PGD-20 best | PGD-20 last | difference | prototype, last |"
    lines = []
    for run in read("short_schedule")["runs"]:
        best, last, expected = run["best"], run["last"], run["expected_last"]
        lines.append(
            f"| {run['recipe']} | {figures(run)} | {best['pgd-20'] - last['pgd-20']:+.1f} "
            f"| {expected['clean']:.1f} / {expected['pgd-20']:.1f} |"
        )
    return table(head, lines)


def table1(wide: bool = True) -> str:
    """The paper's table 1: clean, PGD-20 and AutoAttack at best and last, hours, and what the authors report.

    Args:
        wide: with clean accuracy at best and the published figures.
    """
    head = "| recipe | clean last | PGD-20 best | last | diff. | AutoAttack best | last | diff. | hours |"
    if wide:
        head = "| recipe | clean best | last | PGD-20 best | last | diff. | AutoAttack best | last | diff. "
        head += "| hours | published, last: clean / AutoAttack |"
    lines = []
    for row in read("table1")["rows"]:
        best, last = row["best"], row["last"]
        cells = [row["recipe"], *([f"{best['clean']:.1f}"] if wide else []), f"{last['clean']:.1f}"]
        for name in ("pgd-20", "autoattack"):
            cells += [f"{best[name]:.1f}", f"{last[name]:.1f}", f"{best[name] - last[name]:+.1f}"]
        cells.append(f"{row['hours']:.2f}")
        if wide:
            known = row.get("published_last")
            cells.append(f"{known['clean']:.1f} / {known['autoattack']:.1f}" if known else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return table(head, lines)


def norms() -> str:
    """Training in one norm and in several: clean, each norm and their union, and what the union gains."""
    head = "| recipe | epochs | clean | l-inf | l2 | l1 | union | union, against PGD-AT in l-inf |"
    lines = []
    for row in read("norms")["rows"]:
        cells = [row["recipe"].replace("linf", "l-inf"), row["epochs"]]
        cells += [f"{row[name]:.1f}" for name in ("clean", "linf", "l2", "l1", "union")]
        gain = row.get("beyond_linf", {}).get("union")
        cells.append(f"{gain['difference']:+.1f} ± {gain['error']:.1f}" if gain else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return table(head, lines)


def settings() -> str:
    """PGD-AT and SGLR in other settings than table 1: best, last and their difference."""
    head = "| setting | recipe | epochs | clean best | last |"
    measures = {"pgd-20": "PGD-20", "autoattack": "AutoAttack"}
    head += "".join(f" {shown} best | last | diff. |" for shown in measures.values())
    head += " PGD-100, last | CW, last | Square, last | transfer |"
    lines = []
    for row in read("settings")["rows"]:
        best, last = row["best"], row["last"]
        cells = [row["setting"], row["recipe"], row["epochs"], f"{best['clean']:.1f}", f"{last['clean']:.1f}"]
        for name in measures:
            cells += [f"{best[name]:.1f}", f"{last[name]:.1f}", f"{best[name] - last[name]:+.1f}"]
        others = ("pgd-100", "pgd-30-margin", "square", "transfer")
        cells += [f"{last[name]:.1f}" if name in last else "–" for name in others]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return table(head, lines)


def setting_differences() -> str:
    """What SGLR's last checkpoint has beyond PGD-AT's, image by image."""
    measures = {"clean": "clean", "pgd-20": "PGD-20", "autoattack": "AutoAttack"}
    lines = []
    for pair in read("settings")["pairs"]:
        cells = [pair["reference"].removesuffix(" pgd-at")]
        for name in measures:
            one = pair["differences"][name]
            p = "p < 0.001" if one["p"] < 0.001 else f"p {one['p']:.3f}"
            cells.append(f"{100 * one['difference']:+.1f} ± {100 * one['error']:.1f}, {p}")
        lines.append("| " + " | ".join(cells) + " |")
    return table("| setting | " + " | ".join(measures.values()) + " |", lines)


def beyond() -> str:
    """SGLR + AWP + EMA: what each candidate reached on validation images, and how long it stood at chance."""
    head = "| settings | validation clean | robust, PGD-10 | epochs at chance | |"
    content, lines = read("beyond"), []
    for row in content["candidates"]:
        chance = sum(epoch["train_robust"] < 0.13 for epoch in row["curve"])
        chosen = "**chosen**" if row["name"] == content["choice"] else ""
        lines.append(
            f"| {row['name']} | {row['val_clean']:.1f} | {row['val_robust']:.1f} | {chance} | {chosen} |"
        )
    return table(head, lines)


def beyond_full() -> str:
    """Last checkpoints of the full runs beyond the paper, beside those of table 1 on the same protocol."""
    head = "| recipe, last checkpoint | clean | PGD-20 | AutoAttack | hours |"
    known = {row["recipe"]: row["last"] | {"hours": row["hours"]} for row in read("table1")["rows"]}
    rows = {name: known[name] for name in ("PGD-AT", "PGD-AT + SGLR")}
    rows |= {full_name(row["settings"]): row for row in read("beyond")["full"]}
    lines = []
    for name, row in rows.items():
        cells = (row[key] for key in ("clean", "pgd-20", "autoattack"))
        shown = " | ".join("–" if cell is None else f"{cell:.1f}" for cell in cells)
        lines.append(f"| {name} | {shown} | {row['hours']:.2f} |")
    return table(head, lines)


def full_name(settings: str) -> str:
    """What a full run beyond the paper is called in tables and figures."""
    return f"{'' if settings.startswith('without SGLR') else 'SGLR + '}AWP + EMA, {settings}"


def controls() -> str:
    """PGD-AT on 36 epochs with one thing changed at a time: clean and PGD-20 at best and last."""
    lines = [f"| {row['name']} | {row['data']} | {figures(row)} |" for row in read("controls")["runs"]]
    return table("| what differs | data | clean best | last | PGD-20 best | last |", lines)


def recipes() -> str:
    """Last checkpoints of every preset on 30 epochs, the strongest first, and seconds an epoch on a GPU."""
    alone = {row["recipe"]: f"{row['seconds_per_epoch']:.1f}" for row in read("preset_step")["rows"]}
    runs = sorted(read("recipes")["runs"], key=lambda run: -run["last"]["pgd-20"])
    lines = (
        f"| {run['recipe']} | {run['last']['clean']:.1f} | {run['last']['pgd-20']:.1f} "
        f"| {alone.get(run['recipe'], '–')} |"
        for run in runs
    )
    return table("| preset, last checkpoint | clean | PGD-20 | seconds an epoch |", lines)


def figures(run: dict[str, Any]) -> str:
    """Cells of a run: clean and PGD-20, each at best and last."""
    cells = (f"{run[which][attack]:.1f}" for attack in ("clean", "pgd-20") for which in ("best", "last"))
    return " | ".join(cells)


def first_steps() -> str:
    """Loss of the first steps: its highest value, when, and the mean of the last ten."""
    content, lines = read("first_steps"), []
    head = "| start | first step | highest | at step | mean of the last ten |"
    for variant, losses in content["losses"].items():
        highest = max(losses)
        lines.append(
            f"| {variant} | {losses[0]:.2f} | {highest:.2f} | {losses.index(highest) + 1} of {len(losses)} "
            f"| {sum(losses[-10:]) / 10:.2f} |"
        )
    return table(head, lines)


def sixty_epochs() -> str:
    """ResNet-18 on 60 epochs, on given and on human wrong labels: clean and PGD-20 at best and last."""
    head = "| recipe | training labels | clean best | clean last | PGD-20 best | PGD-20 last | difference |"
    lines = []
    for run in read("analysis_runs")["runs"]:
        if run["attack"] == "none" or run["epochs"] < 60:
            continue
        best, last = run["best"], run["last"]
        labels = "given" if run["labels"] == "given" else f"CIFAR-10N, {run['labels']}"
        lines.append(
            f"| {run['recipe']} | {labels} | {figures(run)} | {best['pgd-20'] - last['pgd-20']:+.1f} |"
        )
    return table(head, lines)


def audits() -> str:
    """How well wrong labels are found, by run: the default ranking on the memory against cleanlab's."""
    head = (
        "| run | wrong labels | AUROC: memory, default | memory, cleanlab self-confidence "
        "| prediction, cleanlab margin | prediction, cleanlab self-confidence "
        "| average precision, memory | precision at 1,000 |"
    )
    lines = []
    for run in read("analysis_runs")["runs"]:
        if "audit" not in run:
            continue
        audit = run["audit"]
        rows = {row["name"]: row for row in audit["comparison"]}
        own = rows["balanced-margin (memory)"]
        theirs = [
            rows[f"cleanlab {kind}, adjusted ({source})"]["auroc"]
            for kind, source in (
                ("self confidence", "memory"),
                ("normalized margin", "prediction"),
                ("self confidence", "prediction"),
            )
        ]
        cells = [run["run"], f"{audit['wrong']:,} of {audit['samples']:,}", f"{own['auroc']:.4f}"]
        cells += [f"{auroc:.4f}" for auroc in theirs]
        cells += [f"{own['average_precision']:.4f}", f"{own['precision_at']['1000']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return table(head, lines)


def analysis() -> str:
    """What each measure says of the four runs at epochs 20 and 60."""
    content = read("analysis")
    runs, epochs = list(content["runs"]), (20, 60)

    def values(part: str, *path: str, factor: float = 1.0, digits: int = 2) -> list[str]:
        """One cell for each run: both epochs, a dash where there is nothing."""
        cells = []
        for run in runs:
            texts = []
            for epoch in epochs:
                one = next(
                    found["result"]
                    for found in content[part]
                    if (found["run"], found["epoch"]) == (run, epoch) and found["weights"] != "best"
                )
                for key in path:
                    one = one.get(key) if one else None
                texts.append("–" if one is None else f"{factor * one:.{digits}f}")
            cells.append(" → ".join(texts) if set(texts) != {"–"} else "–")
        return cells

    layer = ("last_layer", "adversarial")
    share, per_cent = "share_of_wrong", {"factor": 100.0, "digits": 1}
    predicted, people = ("predictions", "adversarial"), "people"
    million = {"factor": 1e-6, "digits": 0}
    rows = {
        "gradient norm, given labels": values("gradients", *layer, "given", "mean"),
        "… of wrong or disputed labels": values("gradients", *layer, "given", "wrong_mean"),
        "… of the others": values("gradients", *layer, "given", "right_mean"),
        "gradient norm, refined labels": values("gradients", *layer, "refined", "mean"),
        "wrong or disputed, % of the 512 images": values(
            "gradients", *layer, "given", "fraction_wrong", **per_cent
        ),
        "… of the gradient towards given labels, %": values("gradients", *layer, "given", share, **per_cent),
        "… of that towards refined labels, %": values("gradients", *layer, "refined", share, **per_cent),
        "wrong or disputed labels repeated, clean images, %": values(
            "gradients", "memorisation", "clean", "fitted", **per_cent
        ),
        "… attacked images, %": values("gradients", "memorisation", "adversarial", "fitted", **per_cent),
        "ECE, clean test images, %": values("labels", "predictions", "clean", "ece", **per_cent),
        "ECE, attacked test images, %": values("labels", *predicted, "ece", **per_cent),
        "total variation people / given label, training": values(
            "labels", people, "given labels, training", "total_variation"
        ),
        "… people / refined label": values("labels", people, "targets, training", "total_variation"),
        "first choice of the refined label is people's, %": values(
            "labels", people, "targets, training", "agreement", **per_cent
        ),
        "information in weights, attacked images, empirical, Mnat": values(
            "information", "weights", "adversarial", "empirical", **million
        ),
        "… its standard error": values("information", "weights", "adversarial", "empirical_error", **million),
        "… attacked images, model": values("information", "weights", "adversarial", "model", **million),
        "… clean images, empirical": values("information", "weights", "clean", "empirical", **million),
        "… clean images, model": values("information", "weights", "clean", "model", **million),
        "I(T; Y) neighbors, training images, attacked": values(
            "information", "representation", "train, adversarial", "label_neighbors"
        ),
        "largest Hessian eigenvalue, attacked images": values("geometry", "eigenvalue", "value", digits=0),
        "input gradient, l1, clean images": values("geometry", "input_gradient", "l1", "mean", digits=1),
    }
    head = "| measure, epoch 20 → 60 | " + " | ".join(runs) + " |"
    return table(head, ("| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()))


def analyze_digits() -> str:
    """The worked example of docs/analysis.md: what the commands say of two short runs."""
    runs = read("analyze_digits")["runs"].values()

    def cells(words: Callable[[dict[str, Any]], str]) -> str:
        return " | ".join(map(words, runs))

    def share(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda run: "–" if run[name] is None else f"{100 * run[name]:.1f}%"

    def number(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda run: "–" if run[name] is None else f"{run[name]:.{digits}f}"

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "gradient from wrong labels, given labels": share("share_of_wrong_given"),
        "the same, refined labels": share("share_of_wrong_refined"),
        "mean gradient norm, given labels": number("norm_given", 2),
        "mean gradient norm, refined labels": number("norm_refined", 2),
        "wrong labels fitted, clean images": share("fitted_clean"),
        "ECE, clean and PGD-20 test images": lambda run: (
            f"{share('ece_clean')(run)} and {share('ece_adversarial')(run)}"
        ),
        "information in the weights, nats": lambda run: f"{run['nats']:,.0f} ± {run['nats_error']:,.0f}",
        "largest Hessian eigenvalue": number("eigenvalue", 1),
        "linearity gap": number("linearity_gap", 3),
    }
    head = "| | " + " | ".join(read("analyze_digits")["runs"]) + " |"
    return table(head, (f"| {name} | {cells(words)} |" for name, words in rows.items()))


def digits_audit() -> str:
    """The worked example's label audit: the rankings of the memory."""
    lines = (
        f"| {row['name']} | {row['auroc']:.4f} | {row['average_precision']:.4f} "
        f"| {row['precision_at']['100']:.2f} |"
        for row in read("analyze_digits")["audit"]
        if row["name"].endswith("(memory)")
    )
    return table("| ranking | AUROC | average precision | precision at 100 |", lines)


def demo(name: str = "demo_seeds") -> str:
    """Digits: PGD-20 at best and last for every seed and recipe."""
    results = read(name)
    head = (
        "| seed | PGD-AT best | last | difference | SGLR best | last | difference | SGLR − PGD-AT at last |"
    )
    lines = []
    for run in results["runs"]:
        cells = [str(run["seed"])]
        for preset in ("pgd-at", "sglr-reference"):
            row = run[preset]
            cells += [f"{row[which]['pgd-20']:.1f}" for which in ("best", "last")]
            cells.append(f"{row['best_minus_last']:+.1f}")
        lines.append("| " + " | ".join([*cells, f"{run['last_gain_pgd-20']:+.1f}"]) + " |")
    drop = results["mean_best_minus_last"]
    at, sglr = (results["mean_last_pgd-20"][preset] for preset in ("pgd-at", "sglr-reference"))
    lines.append(
        f"| mean | | {at:.1f} | {drop['pgd-at']:+.1f} | | {sglr:.1f} | {drop['sglr-reference']:+.1f} "
        f"| {results['mean_last_gain_pgd-20']:+.1f} |"
    )
    return table(head, lines)


def train_step(name: str = "train_step") -> str:
    """Milliseconds of a training step, against the machine's ceiling and the reference code (no TRADES)."""
    results = read(name)
    head = (
        "| network | recipe | batch | times the reference | ms a step | reference, ms | s an epoch | "
        f"share of {results['ceiling_tflops']:.0f} TFLOP/s |"
    )
    lines = []
    for row in (row for row in results["rows"] if "ratio" in row):
        lines.append(
            f"| {row['net']} | {row['recipe']} | {row['batch_size']} | {row['ratio']:.2f} "
            f"| {row['ms']:.2f} | {row['reference_ms']:.1f} | {row['seconds_per_epoch']:.2f} "
            f"| {100 * row['ceiling_share']:.0f}% |"
        )
    return table(head, lines)


def scaling() -> str:
    """Training steps on one and several GPUs, beside what the cost model predicts for several."""
    rows = [row for row in read("scaling")["steps"] if not row["settings"]]
    predicted = {_work(row): row for row in read("scaling_model")["rows"]}
    lines = []
    for row in (row for row in rows if row["processes"] > 1):
        one = next(other for other in rows if _work(other) == (*_work(row)[:-1], 1))
        cells = [row["net"], row["recipe"], row["batch_size"], row["processes"], f"{one['ms']:.2f}"]
        cells += [f"{row['ms']:.2f}", f"{row['images_per_second']:.0f}", f"**{row['times_one']:.2f}**"]
        cells += [f"{predicted[_work(row)]['times_one']:.2f}", f"{100 * row['messages_share']:.1f}%"]
        cells.append(f"{100 * row['memory_share']:.2f}%" if "memory_share" in row else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    head = "| network | recipe | batch | GPUs | one GPU, ms | ms a step | images a second | times one GPU "
    return table(head + "| predicted | messages | of label memory |", lines)


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["net"], row["recipe"], row["batch_size"], row["processes"]


def timm_step() -> str:
    """Milliseconds of a step of timm's networks, compiled and captured against eager."""
    head = (
        "| network | ms a step | eager, ms | times the eager step | images a second "
        "| share of the ceiling, TFLOP/s | set-up, s | made later |"
    )
    measured = [(row, found) for found in map(read, ("timm_step", "timm_vit")) for row in found["rows"]]
    lines = []
    for row, results in measured:
        lines.append(
            f"| {row['net']} | {row['ms']:.1f} | {row['eager_ms']:.1f} | {row['eager_ratio']:.2f} "
            f"| {1e3 * row['batch_size'] / row['ms']:.0f} "
            f"| {100 * row['ceiling_share']:.0f}% of {results['ceiling_tflops']:.0f} "
            f"| {row['setup_seconds']:.0f} | {row['recompiled_after_warmup']} |"
        )
    return table(head, lines)


def protocol_costs() -> str:
    """Hours of the large protocols, from measured steps."""
    timm = {row["net"]: row for row in read("timm_step")["rows"]}
    rows = [row for row in read("train_step")["rows"] if row["recipe"] == "pgd-at"]
    steps = {(row["net"], row["batch_size"]): row for row in rows}
    larger = 4 * 2  # Tiny-ImageNet has four times the pixels and twice the images of CIFAR-10
    measured = {  # protocol: preset, seconds of an epoch, attack steps with which these were measured
        "imagenet_resnet50": ("pgd-at", timm["timm:resnet50"]["seconds_per_epoch"], 3),
        "imagenet_convnext_tiny": ("pgd-at-ema", timm["timm:convnext_tiny"]["seconds_per_epoch"], 3),
        "tinyimagenet_resnet18": ("pgd-at", larger * steps["resnet18", 128]["seconds_per_epoch"], 10),
        "cifar10_wrn34_10": ("pgd-at", steps["wrn34_10", 128]["seconds_per_epoch"], 10),
    }
    lines = []
    for protocol, (preset, seconds, attack_steps) in measured.items():
        settings = yaml.safe_load((PROTOCOLS / f"{protocol}.yaml").read_text())
        epochs, own_steps = settings["optim"]["epochs"], settings["attack"]["init_args"]["steps"]
        # Forward and backward to the image in each step of the attack, and the update.
        hours = seconds * epochs / 3600 * (2 * own_steps + 3) / (2 * attack_steps + 3)
        many = f"{hours / 64:.2f}" if protocol.startswith("imagenet") else "too small a batch"
        lines.append(f"| `{protocol}` | {preset} | {epochs} | {hours:.1f} | {hours / 8:.2f} | {many} |")
    return table("| protocol | preset | epochs | 1 GPU, hours | 8 GPUs | 64 GPUs |", lines)


def ema_costs() -> tuple[float, float]:
    """Milliseconds that EMA adds to a step: least and most, of presets that are measured with and without."""
    ms = {row["recipe"]: row["ms"] for row in read("preset_step")["rows"]}
    pairs = [(name.removesuffix("-ema"), name) for name in ms if name.endswith("-ema")]
    added = [ms[averaged] - ms[plain] for plain, averaged in pairs if plain in ms]
    return min(added), max(added)


def autoattack(name: str = "autoattack") -> str:
    """Seconds of AutoAttack standard, ours and the authors', and on how many images verdicts differ."""
    head = (
        "| network | mode | times the reference | seconds (set-up) | reference, s "
        "| robust, ours / reference | left robust what it broke |"
    )
    lines = []
    for shown, network in read(name)["networks"].items():
        reference = network["reference"]
        for mode in ("exact", "fast"):
            own = network[mode]
            lines.append(
                f"| {shown} | {mode} | {network['times_faster_than_reference'][mode]:.2f} "
                f"| {own['seconds']:.1f} ({own['setup_seconds']:.1f}) | {reference['seconds']:.1f} "
                f"| {own['robust']} / {reference['robust']} "
                f"| {network['images_of_other_verdict'][mode]['left_robust']} |"
            )
    return table(head, lines)


def autoattack_rates() -> str:
    """Floating-point operations a second of AutoAttack's parts on the robust ResNet-18; a gradient counts as
    two forwards."""
    trained, ceiling = read("train_step")["rows"], read("train_step_128")["ceiling_tflops"]
    step = next(row for row in trained if (row["net"], row["recipe"]) == ("resnet18", "pgd-at"))
    forward = step["tflop"] / 23 / step["batch_size"]  # PGD-10 training is 23 forwards' work
    network = read("autoattack")["networks"]["robust-resnet18"]
    members = network["exact"]["members"]
    lines = []
    for mode in ("exact", "fast"):
        work = [forward * (row["forwards"] + 2 * row["backwards"]) for row in network[mode]["members"]]
        spent = [row["seconds"] for row in network[mode]["members"]]
        cells = [f"{tflop / seconds:.0f}" for tflop, seconds in zip(work, spent, strict=True)]
        aim = sum(work) / (network["reference"]["seconds"] / {"exact": 4, "fast": 9}[mode])
        cells += [f"{sum(work) / sum(spent):.0f}", f"{aim:.0f}"]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    names = " | ".join(row["name"] for row in members)
    head = f"| mode | {names} | all | needed for the aim |"
    return f"{table(head, lines)}\n\nTFLOP/s; a bf16 matrix product reaches {ceiling:.0f}."


def set_up() -> str:
    """Seconds before the first step of a new process, and around AutoAttack's search."""
    content = read("set_up")
    lines = []
    for state in ("cold", "warm"):
        at = content["training"][state]
        cells = [f"{at[name]:.1f}" for name in ("imported", "prepared", "first_step")]
        cells += [f"{content[mode][state]['set_up']:.1f}" for mode in ("exact", "fast")]
        lines.append(f"| {state} | " + " | ".join(cells) + " |")
    head = "| compiled code | imported | ready | first step made | AutoAttack exact, set-up | fast, set-up |"
    return table(head, lines)


def streaming() -> str:
    """Images a second that the loader alone decodes."""
    lines = [
        f"| {row['workers']} | {row['images_per_second']:.0f} | {row['per_core']:.0f} |"
        for row in read("streaming")["loader"]
    ]
    return table("| processes | images a second | of each |", lines)


def label_memory() -> str:
    """The label memory at ImageNet-1k's size, by storage: megabytes, microseconds on CPU and GPU, errors."""
    head = (
        "| storage | MB | read and write of 256 rows, µs | on a GPU, µs | largest error of an entry "
        "| mean distance of a row |"
    )
    on_gpu = {row["storage"]: row["update_us"] for row in read("label_memory_gpu")["rows"]}
    lines = []
    for row in read("label_memory")["rows"]:
        lines.append(
            f"| {row['storage']} | {row['megabytes']:.0f} | {row['update_us']:.0f} "
            f"| {on_gpu[row['storage']]:.0f} | {row['largest_error']:.4f} | {row['mean_row_distance']:.4f} |"
        )
    return table(head, lines)


def parallel_runs() -> str:
    """Runs in parallel on one GPU: wall time, epochs, and how many times as fast as one by one."""
    content, lines = read("parallel_runs"), []
    for row in content["rows"]:
        ratio = content["times_as_fast"][str(row["parallel"])]
        lines.append(
            f"| {row['parallel']} | {row['seconds_per_epoch']:.2f} | {ratio['epochs']:.2f} "
            f"| {row['wall_seconds']:.0f} | {ratio['wall']:.2f} |"
        )
    head = "| runs at once | s an epoch of each | times the epochs "
    head += "| four whole runs of 4 epochs, s | times as fast |"
    return table(head, lines)


def paths() -> str:
    """The captured path against the eager one in bf16: means of the seeds, their difference and its error."""
    content, lines = read("paths"), []
    for measure, found in content["differences"].items():
        each = {
            path: [run[measure] for run in content["runs"] if run["path"] == path]
            for path in ("captured", "eager")
        }
        cells = (" / ".join(f"{value:.1f}" for value in values) for values in each.values())
        lines.append(
            f"| {measure} | {' | '.join(cells)} | {found['captured_minus_eager']:+.1f} "
            f"| {found['standard_error']:.1f} |"
        )
    head = "| accuracy | captured, seeds 0 / 1 / 2 | eager | mean difference | its standard error |"
    return table(head, lines)


def cpu_epoch() -> str:
    """Seconds of an epoch of the demo on a CPU."""
    head = "| threads | precision | channels_last | s an epoch | without validation |"
    lines = []
    for row in read("cpu_epoch")["rows"]:
        lines.append(
            f"| {row['threads']} | {row['precision']} | {'yes' if row['channels_last'] else 'no'} "
            f"| {row['seconds']:.2f} | {row['seconds_without_validation']:.2f} |"
        )
    return table(head, lines)


if __name__ == "__main__":
    training = (
        table1(),
        table1(wide=False),
        settings(),
        setting_differences(),
        controls(),
        recipes(),
        beyond(),
        beyond_full(),
        first_steps(),
        short_schedule(),
        sixty_epochs(),
        analysis(),
        analyze_digits(),
        digits_audit(),
        audits(),
        norms(),
        demo(),
        demo("demo_seeds_clean"),
    )
    speed = (
        train_step(),
        train_step("train_step_128"),
        timm_step(),
        protocol_costs(),
        scaling(),
        paths(),
        parallel_runs(),
        autoattack(),
        autoattack("autoattack_tiny"),
        autoattack_rates(),
        set_up(),
        streaming(),
        label_memory(),
        cpu_epoch(),
    )
    print(*training, *speed, sep="\n\n")
