"""What the commands do when everything is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from cli_tools import SMALL, contents, done, pictures, write_parquet
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from killed_runs import assert_same_files
from softdefend import __version__
from softdefend.cli.main import COMMANDS, main
from softdefend.experiments.config import packaged, resolve
from softdefend.training.plain import plain_config

FILES = {
    ".lock",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "timing.jsonl",
    "best.safetensors",
    "last.safetensors",
    "checkpoints/step-000000008.ckpt",
    "checkpoints/step-000000016.ckpt",
    "evaluation/best.json",
    "evaluation/best.parquet",
    "evaluation/best-gallery.safetensors",
    "evaluation/best-examples.safetensors",
    "evaluation/last.json",
    "evaluation/last.parquet",
    "evaluation/last-gallery.safetensors",
    "evaluation/last-examples.safetensors",
    "report.html",
}


def evaluation(folder: Path, name: str) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = json.loads((folder / "evaluation" / f"{name}.json").read_text())
    return content


# --- train --------------------------------------------------------------------------------------------------


def test_a_run_folder_is_complete(finished: Path) -> None:
    assert contents(finished).keys() == FILES
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["threat"] == {"norm": "linf", "eps": "4/255"}
    assert config["optim"]["epochs"] == 2
    assert config["label"]["class_path"] == "softdefend.Hard"
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["softdefend"] == __version__
    assert environment["seed"] == 0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 8), (2, 16)]
    assert all(0 <= row["val_robust"] <= row["val_clean"] <= 1 for row in rows)
    assert len((finished / "timing.jsonl").read_text().splitlines()) == 2
    best = max(rows, key=lambda row: row["val_robust"])  # of equals the first
    for which, epoch in (("best", best["epoch"]), ("last", 2)):
        with safe_open(finished / f"{which}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["softdefend"])["epoch"] == epoch
        assert evaluation(finished, which)["epoch"] == epoch
    assert "run" in (finished / "report.html").read_text()


def test_training_again_changes_nothing(
    run_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*.safetensors")}
    times |= {path: path.stat().st_mtime_ns for path in run_folder.rglob("evaluation/*")}
    out = done(["train", *SMALL, "--folder", str(run_folder)], capsys)
    assert "epoch 1/2" not in out
    assert "last (epoch 2): clean" in out
    before, after = contents(finished), contents(run_folder)
    assert {name for name in before if before[name] != after[name]} <= {"config.yaml", "report.html"}
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_killed_run_is_continued(
    run_folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    max((run_folder / "checkpoints").iterdir()).unlink()
    (run_folder / "last.safetensors").unlink()
    out = done(["train", *SMALL, "--folder", str(run_folder)], capsys)
    assert "epoch 1/2" not in out
    assert "epoch 2/2" in out
    assert_same_files(run_folder, finished)


def test_what_does_not_change_a_result_may_change(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--save.keep", "3", "--evaluate.attacks", "[fgsm]", "--progress", "true"]
    words += ["--data.cache", str(run_folder / "cache")]
    (run_folder / "environment.json").write_text("{")  # damaged: nothing can be read from it, nothing is lost
    out = done(["train", *SMALL, *words, "--folder", str(run_folder)], capsys)
    assert "fgsm" in out
    assert "torch" in json.loads((run_folder / "environment.json").read_text())
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["save"]["keep"] == 3


def test_training_starts_from_another_seed(tmp_path: Path, finished: Path) -> None:
    assert main(["train", *SMALL, "--seed", "1", "--folder", str(tmp_path / "run")]) == 0
    ours, theirs = load_file(tmp_path / "run" / "last.safetensors"), load_file(finished / "last.safetensors")
    assert any(not ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["seed"] == 1


def test_the_default_folder_has_name_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--optim.epochs", "1", "--seed", "3"]
    done(["train", "--preset", "sglr-paper", *small], capsys)
    config = yaml.safe_load((tmp_path / "runs/sglr-paper-seed3/config.yaml").read_text())
    assert config["label"]["class_path"] == "softdefend.SGLR"
    assert config["label"]["init_args"]["r"] == 0.7


def test_a_run_on_parquet_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    write_parquet(data / "train-00000-of-00002.parquet", pictures(40), [0, 1] * 20)
    write_parquet(data / "train-00001-of-00002.parquet", pictures(40, seed=1), [0, 1] * 20)
    write_parquet(data / "test-00000-of-00001.parquet", pictures(30, seed=2), [0, 1] * 15)
    words = ["--data.source", str(data), "--data.validation", "16", "--evaluate.size", "null"]
    words += ["--optim.epochs", "4", "--folder", str(folder)]
    done(["train", *SMALL, *words], capsys)
    last = evaluation(folder, "last")
    assert last["n"] == 30
    assert last["clean"]["rate"] > 0.9  # the two classes differ by half of the gray levels
    records = pq.read_table(folder / "evaluation/last.parquet")
    assert records.column("label").to_pylist() == [0, 1] * 15


# --- evaluate -----------------------------------------------------------------------------------------------


def test_records_agree_with_the_counts(finished: Path) -> None:
    digits = load_digits()
    for which in ("best", "last"):
        result, table = evaluation(finished, which), pq.read_table(finished / f"evaluation/{which}.parquet")
        column = {name: np.asarray(table.column(name)) for name in table.column_names}
        right = column["clean_prediction"] == column["label"]
        robust = right & (column["pgd-20/prediction"] == column["label"])
        assert len(right) == result["n"] == 64
        assert set(column["label"]) <= set(digits.target)
        assert result["clean"]["count"] == right.sum()
        assert result["attacks"]["pgd-20"]["count"] == robust.sum() == column["pgd-20/robust"].sum()
        assert result["worst"]["count"] == robust.sum()
        assert column["pgd-20/distance"].max() <= 4 / 255 + 1e-6
        classes = {row["class"]: row for row in result["per_class"]}
        for label in set(column["label"]):
            members = column["label"] == label
            assert classes[str(label)]["n"] == members.sum()
            assert classes[str(label)]["robust"] == pytest.approx(robust[members].mean())
        curve = [(point["eps"], point["n"]) for point in result["eps_curve"]]
        assert curve[:4] == [("0", 16), ("1/255", 16), ("2/255", 16), ("3/255", 16)]


def test_other_attacks_replace_the_evaluation(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "evaluate",
        str(run_folder),
        "--which",
        "last",
        "--attacks",
        "fgsm",
        "pgd-3x2-margin",
        "--size",
        "20",
    ]
    before = contents(run_folder)
    out = done(words, capsys)
    last = evaluation(run_folder, "last")
    assert list(last["attacks"]) == ["fgsm", "pgd-3x2-margin"]
    assert last["n"] == 20
    assert last["attacks"]["fgsm"]["forwards"] == 2 * 20  # one step, one count
    assert last["attacks"]["pgd-3x2-margin"]["forwards"] == 2 * (3 + 1) * 20 + 20
    assert last["attacks"]["pgd-3x2-margin"]["backwards"] == 2 * 3 * 20
    assert f"fgsm {100 * last['attacks']['fgsm']['rate']:.1f}%" in out
    changed = {name for name, content in contents(run_folder).items() if content != before.get(name)}
    examples = "evaluation/last-examples.safetensors"
    files = {f"evaluation/last{ending}" for ending in (".json", ".parquet", "-gallery.safetensors")}
    kept = {f"evaluation/earlier/last-1{ending}" for ending in (".json", ".parquet")}
    assert changed - {examples} == {*files, *kept, "report.html"}
    for name in kept:  # what was there before may have cost hours
        assert contents(run_folder)[name] == before[name.replace("earlier/last-1", "last")]
    assert "FGSM" in (run_folder / "report.html").read_text()
    time = (run_folder / "evaluation/last.json").stat().st_mtime_ns
    first = [line for line in out.splitlines() if "evaluated before" not in line]
    again = [first[0], "last: as evaluated before, on 20 images; nothing is attacked anew", *first[1:]]
    assert done(words, capsys).splitlines() == again  # what is there already is not done again
    assert (run_folder / "evaluation/last.json").stat().st_mtime_ns == time


def test_another_threat_has_a_file_of_its_own(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run_folder)
    out = done(["evaluate", str(run_folder), "--eps", "8/255"], capsys)
    assert "best-linf-8_255 (epoch" in out
    done(["evaluate", str(run_folder), "--norm", "l2", "--eps", "0.25", "--which", "last"], capsys)
    after = contents(run_folder)
    names = ("best-linf-8_255", "last-linf-8_255", "last-l2-0.25")
    added = {f"evaluation/{name}.{kind}" for name in names for kind in ("json", "parquet")}
    assert after.keys() - before.keys() == added
    # the run's own figures stay, and so does its report but for when it was made
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}
    stronger, own = evaluation(run_folder, "last-linf-8_255"), evaluation(run_folder, "last")
    assert stronger["eps"] == "8/255"
    assert stronger["clean"] == own["clean"]
    assert stronger["attacks"]["pgd-20"]["count"] <= own["attacks"]["pgd-20"]["count"]
    assert evaluation(run_folder, "last-l2-0.25")["norm"] == "l2"


def test_the_trained_threat_in_other_words_is_no_other_threat(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(["evaluate", str(run_folder), "--eps", "8/510", "--norm", "linf", "--which", "last"], capsys)
    assert contents(run_folder).keys() == FILES


def test_several_runs_are_evaluated(
    run_folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = done(["evaluate", str(run_folder), str(finished), "--which", "last"], capsys)
    lines = out.splitlines()
    half = len(lines) // 2
    assert [lines[0], lines[half]] == [str(run_folder), str(finished)]
    assert lines[1:half] == lines[half + 1 :]
    assert "as evaluated before" in lines[1]
    assert "images attacked" in lines[2]  # what each attack cost


# --- compare and report -------------------------------------------------------------------------------------


def test_compare_keeps_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "all"
    presets, seeds = ["pgd-at", "sglr-reference"], ["0", "1"]
    words = ["compare", *SMALL, "--presets", *presets, "--folder", str(folder), "--optim.epochs", "1"]
    words += ["--evaluate.curve_size", "0", "--evaluate.attacks", "[fgsm]"]
    done([*words, "--seeds", "0"], capsys)
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(weights) == 2 * 6  # with the pictures of the evaluation
    out = done([*words, "--seeds", *seeds], capsys)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert out.count("epoch 1/1") == 2
    table = out[out.index("recipe") :]
    for preset in presets:
        (row,) = [line for line in table.splitlines() if line.startswith(f"{preset} ")]
        assert row.split()[1] == "2"  # seeds
        runs = [evaluation(folder / f"{preset}-seed{seed}", "last") for seed in seeds]
        assert f"{50 * sum(run['clean']['rate'] for run in runs):.2f}" in row
    assert str(folder / "report.html") in out
    page = (folder / "report.html").read_text()
    assert all(preset in page for preset in presets)


def test_report_of_several_runs(
    run_folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace("name: run\n", "name: another\n").replace("0.05", "0.06"))
    page = tmp_path / "new" / "page.html"
    words = ["report", str(run_folder), str(finished), "--output", str(page), "--title", "Two of a kind"]
    out = done(words, capsys)
    assert str(page) in out
    assert "Two of a kind" in page.read_text()
    assert all(name in page.read_text() for name in ("another", "run"))
    markdown = done([*words, "--markdown", "true"], capsys).splitlines()
    clean = 100 * evaluation(finished, "best")["clean"]["rate"]
    for name in ("another", "run"):
        assert [line for line in markdown if line.startswith(f"| {name} | 1 | {clean:.2f} |")]


# --- data ---------------------------------------------------------------------------------------------------


def test_data_is_prepared_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = done(["data", "prepare", "--data.validation", "100", "--data.test_fraction", "0.5"], capsys)
    assert out == "digits: 799 train, 100 validation, 898 test\n"
    path = write_parquet(tmp_path / "mine.parquet", pictures(40), [0, 1] * 20)
    words = ["--data.source", str(path), "--data.validation", "8", "--data.test_fraction", "0.25"]
    described = done(["data", "describe", *words], capsys)
    facts = dict(line.split("  ", 1) for line in described.splitlines() if "  " in line)
    assert facts["train"].strip() == "22 images"
    assert facts["test"].strip() == "10 images"
    assert facts["image"].strip().startswith("1x8x8 ")
    assert described.splitlines()[-1].split() == ["1", "11", "4", "5"]


# --- configuration, help and completion ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "preset"),
    [
        *(("digits_demo", preset) for preset in packaged("preset")),
        *((p, "trades-sglr") for p in packaged("config")),
    ],
)
def test_printed_configuration_feeds_back(
    protocol: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", protocol, "--preset", preset, "--seed", "7", "--optim.lr", "0.03"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *words, "--print_config"])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.err == ""
    path = tmp_path / "printed.yaml"
    path.write_text(printed.out)
    assert yaml.safe_load(printed.out)["optim"]["lr"] == 0.03
    ours, again = resolve(words), resolve(["--config", str(path)])
    settings = plain_config(ours)
    assert plain_config(again) == settings == plain_config(resolve(settings))
    assert (again.seed, again.name, again.optim) == (7, ours.name, ours.optim)
    assert type(again.recipe.label) is type(ours.recipe.label)
    assert vars(again.recipe.label) == vars(ours.recipe.label)


def test_presets_win_over_protocols_and_words_over_both(tmp_path: Path) -> None:
    protocol, preset = tmp_path / "protocol.yaml", tmp_path / "preset.yaml"
    protocol.write_text("seed: 1\nname: a\noptim: {lr: 0.1, epochs: 3}\nlabel: {class_path: SGLR}")
    preset.write_text("seed: 2\nname: b\nlabel: {class_path: Smooth, init_args: {smoothing: 0.3}}")
    files = [f"--preset={preset}", "--config", str(protocol)]  # in whichever order
    made = resolve(["--seed", "3", *files])
    assert (made.seed, made.name, made.optim.lr, made.optim.epochs) == (3, "b", 0.1, 3)
    settings = {"smoothing": 0.3, "convention": "others", "attack_label": "hard"}
    assert plain_config(made)["label"]["init_args"] == settings
    assert plain_config(resolve([*files, "--label", "Hard"]))["label"]["class_path"] == "softdefend.Hard"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    said = capsys.readouterr()
    text = " ".join(said.out.split())
    assert ended.value.code == 0
    assert said.err == ""
    if command in ("compare", "distill", "reproduce", "bench"):
        assert "see 'softdefend train --help'" in text
    if command == "train":
        assert all(flag in text for flag in ("--config CONFIG", "--preset PRESET", "--optim.schedule.kind"))
    if command in ("train", "compare"):
        unbroken = "".join(text.split())  # lines may break in names
        assert all(preset in unbroken for preset in packaged("preset"))
    if not command:
        assert all(f"{name} {summary}" in text for name, summary in COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"softdefend {__version__}\n"


@pytest.mark.parametrize("words", [["--print_completion", "bash"], ["--print_completion=zsh"]])
def test_shell_completion(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    script = capsys.readouterr().out
    assert ended.value.code == 0
    for word in (*COMMANDS, "--optim.epochs", "--presets", "--which"):
        assert word in script


def test_as_a_program(tmp_path: Path) -> None:
    """The module's entry point: exit code 2, one line, nothing on standard output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "softdefend", "train", "--threat.eps", "8"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "softdefend: error: threat.eps: got 8; accepted: a value in (0, 1] in pixel units of [0, 1], "
        "such as 8/255\n"
    )


def test_interruption_and_divergence_have_their_own_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from softdefend.experiments import pipeline

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ["train", *SMALL, "--folder", str(tmp_path / "run"), "--optim.lr", "1e30"]
    assert main(words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softdefend: stopped: training diverged in epoch 1, step ")
    monkeypatch.setattr(pipeline, "train", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err.startswith("softdefend: interrupted; the same command continues")
