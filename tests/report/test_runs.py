from __future__ import annotations

import numpy as np
import pytest

from softdefend.core.errors import SettingError
from softdefend.report.runs import group_runs, read_run, setting


def test_a_whole_folder_is_read(make_run, make_evaluation) -> None:
    run = make_run("SGLR", 7, best=make_evaluation(0.9, 0.5), last=make_evaluation(0.8, 0.4), examples=True)
    assert (run.name, run.seed) == ("SGLR", 7)
    assert [row["epoch"] for row in run.metrics] == [1, 2, 3, 4]
    assert run.evaluations["last"]["attacks"]["pgd-20"]["rate"] == 0.4
    assert run.environment["torch"] == "2.13.0"
    assert [row["seconds"] for row in run.timing] == [2.0, 4.0]
    assert run.examples is not None
    assert run.examples.classes == ("cat", "dog")
    assert run.examples.adversarial.shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(run.examples.adversarial_prediction, [1, 1])
    assert setting(run, "threat.eps") == "8/255"
    assert setting(run, "threat.eps.nothing") is None
    assert setting(run, "nothing.at.all") is None


def test_a_run_that_is_still_going(make_run) -> None:
    run = make_run()
    path = run.folder / "metrics.jsonl"
    whole = path.read_text()
    for cut in (1, 5, 40):
        path.write_text(whole[:-cut])
        epochs = [row["epoch"] for row in read_run(run.folder).metrics]
        assert epochs == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])  # cut 1 takes the newline only
    assert (run.evaluations, run.examples) == ({}, None)


def test_only_a_configuration_is_enough(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    run = read_run(tmp_path)
    assert (run.name, run.seed, run.metrics, run.environment, run.timing) == (tmp_path.name, 3, [], {}, [])


def test_the_last_row_of_an_epoch_counts_and_epochs_are_in_order(make_run, make_row) -> None:
    run = make_run(metrics=[make_row(2, loss=9.0), make_row(1), make_row(2, loss=1.5)])
    assert [(row["epoch"], row["loss"]) for row in run.metrics] == [(1, 2.0), (2, 1.5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [1", "unreadable YAML"),
        ("config.yaml", "- 1", "a list; accepted: a YAML mapping"),
        ("config.yaml", "seed: one", "seed: got one"),
        ("environment.json", "{", "unreadable JSON"),
        ("environment.json", "[]", "a list"),
        ("environment.json", "[" * 20_000, "nested too deeply"),
        ("config.yaml", "x: [[[[[[", "unreadable YAML"),
        ("config.yaml", "a: &a [*a]", "unreadable YAML"),
        ("metrics.jsonl", '{"epoch": 1\n{"epoch": 2}\n', "metrics.jsonl line 1"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl line 1"),
        ("metrics.jsonl", '{"epoch": "one"}\n', "epoch 'one'"),
        (
            "metrics.jsonl",
            '{"epoch": 1, "val_robust": [1]}\n',
            "val_robust .* in epoch 1; .* a number or null",
        ),
        ("metrics.jsonl", "[" * 20_000 + "\n{}\n", "nested too deeply"),
        ("evaluation/best.json", '{"clean": ', "unreadable JSON"),
        ("evaluation/best.json", "{}", "without attacks"),
        ("evaluation/best.json", '{"attacks": {}, "clean": {"rate": null}}', "clean: got"),
        ("evaluation/best.json", '{"attacks": {"a": {}}, "clean": {"rate": 1}}', "a: got"),
        (
            "evaluation/last.json",
            '{"attacks": {}, "clean": {"rate": 1}, "eps_curve": [{}]}',
            "eps_curve: got",
        ),
        ("evaluation/last.json", '{"attacks": {}, "clean": {"rate": 1}, "per_class": 3}', "per_class: got 3"),
        ("evaluation/last-examples.safetensors", "nothing", "unreadable examples"),
    ],
)
def test_files_that_cannot_be_understood(make_run, name: str, content: str, message: str) -> None:
    folder = make_run().folder
    (folder / name).write_text(content)
    with pytest.raises(SettingError, match=message) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        b"x",
        b"[]",
        b"3",
        b"{}",
        b"\xff\xfe",
        b'{"seconds": 1}',
        b'{"epoch": [1], "seconds": 1}',
        b'{"epoch": 1, "seconds": "b"}',
        b'{"epoch": 1, "seconds": NaN}',
        b'{"epoch": 1, "seconds": 1e999}',
        b"[" * 20_000,
        b'{"epoch": 2, "sec',
        b"",
    ],
)
def test_rows_of_times_that_are_damaged_are_left_out(make_run, row: bytes) -> None:
    path = make_run().folder / "timing.jsonl"
    path.write_bytes(b"\n".join([row, *path.read_bytes().splitlines(), row]))
    assert [one["seconds"] for one in read_run(path.parent).timing] == [2.0, 4.0]
    path.write_bytes(row)
    assert read_run(path.parent).timing == []
    path.unlink()
    path.mkdir()
    assert read_run(path.parent).timing == []


def test_examples_of_the_best_checkpoint_are_shown_where_the_last_has_none(make_run) -> None:
    run = make_run(examples=True)
    assert run.examples.checkpoint == "last"
    place = run.folder / "evaluation"
    (place / "last-examples.safetensors").rename(place / "best-examples.safetensors")
    assert read_run(run.folder).examples.checkpoint == "best"


def test_example_tensors_that_do_not_fit_each_other(make_run, make_examples) -> None:
    folder = make_run().folder
    make_examples(folder, label=np.array([0, 1, 1]))
    with pytest.raises(SettingError, match="tensors of shape"):
        read_run(folder)
    make_examples(folder, adversarial=np.zeros((2, 1, 4, 5), np.float32))
    with pytest.raises(SettingError, match="tensors of shape"):
        read_run(folder)


def test_other_folders_are_refused(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=r"run folder: got .*accepted: a run folder"):
            read_run(folder)


def test_seeds_of_one_recipe_are_one_group(make_run) -> None:
    runs = [make_run("A", 1), make_run("B", 0), make_run("A", 0), make_run("A", 1)]
    groups = group_runs([*runs, runs[0]])
    assert [(group.label, group.seeds, len(group.runs)) for group in groups] == [
        ("A", (0, 1), 3),
        ("B", (0,), 1),
    ]


def test_one_name_for_different_settings_is_two_recipes(make_run) -> None:
    runs = [
        make_run("A", 0),
        make_run("A", 1, threat={"norm": "linf", "eps": "4/255"}),
        make_run("A", 1, label={"class_path": "SGLR", "init_args": {"alpha": 0.9}}),
    ]
    assert [group.label for group in group_runs(runs)] == [
        "A (label Hard, threat.eps 8/255)",
        "A (label Hard, threat.eps 4/255)",
        "A (label SGLR, label.alpha 0.9, threat.eps 8/255)",
    ]
