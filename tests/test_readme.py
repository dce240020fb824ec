"""What README shows works as it stands."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from softdefend.cli.main import COMMANDS
from softdefend.experiments.config import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "softdefend"]


def test_the_python_example_runs_and_shows_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert "pgd-20" in capsys.readouterr().out
    assert (tmp_path / "runs/mine/last.safetensors").is_file()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_names_a_real_command_and_its_settings_resolve(words):
    assert words[0] in COMMANDS
    if words[0] == "train":
        resolve(words[1:])


def test_the_two_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_ci_runs_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")


def test_the_demo_takes_as_long_as_its_benchmark_found():
    seconds = round(json.loads((ROOT / "benchmarks/results/demo_time.json").read_text())["seconds"])
    assert f"takes {seconds} s on 2 cores" in (ROOT / "docs" / "speed.md").read_text()


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_results_table_is_what_the_result_files_say():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    runs = (ROOT / "docs" / "runs.md").read_text()
    assert tables["table1"](wide=False) in README
    demos = tables["demo"](), tables["demo"]("demo_seeds_clean")
    studies = (
        "table1",
        "controls",
        "recipes",
        "beyond",
        "beyond_full",
        "first_steps",
        "norms",
        "settings",
        "setting_differences",
    )
    trained = [tables[name]() for name in (*studies, "short_schedule", "sixty_epochs", "analysis", "audits")]
    for table in (*trained, *demos):
        assert table in runs
    for name in ("analyze_digits", "digits_audit"):
        assert tables[name]() in (ROOT / "docs" / "analysis.md").read_text()
    speed = (ROOT / "docs" / "speed.md").read_text()
    assert tables["train_step"]("train_step_128") in speed
    assert tables["autoattack"]("autoattack_tiny") in speed
    assert "EMA added {:.1f} to {:.1f} ms to a step".format(*tables["ema_costs"]()) in speed
    for name in ("streaming", "protocol_costs"):
        assert tables[name]() in (ROOT / "docs" / "large_data.md").read_text()
    assert tables["scaling"]() in (ROOT / "docs" / "scale.md").read_text()
    for name in (
        "train_step",
        "timm_step",
        "paths",
        "parallel_runs",
        "autoattack",
        "autoattack_rates",
        "set_up",
        "label_memory",
        "cpu_epoch",
    ):
        assert tables[name]() in speed


def test_the_share_of_waiting_for_streamed_images_is_the_measured_one():
    (row,) = json.loads((ROOT / "benchmarks/results/streaming.json").read_text())["training"]
    streamed, kept = (round(1000 * row[name]) for name in ("seconds_streamed", "seconds_kept"))
    said = " ".join((ROOT / "docs" / "large_data.md").read_text().split())
    assert f"takes {streamed} ms, with a batch that stays {kept} ms" in said
    assert f"the GPU waits for {100 * row['share_waiting']:.0f}% of the time" in said
