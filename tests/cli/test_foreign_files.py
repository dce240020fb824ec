"""Files of another run in a run folder, damaged ones, and files that never end: one line, or done without."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import SMALL, contents, pictures, write_parquet

from softdefend.cli.main import main
from softdefend.core.weight_files import read_metadata
from softdefend.training import checkpoint

Refused = Callable[..., str]
TRAIN = ["train", *SMALL]
ATTACK = ["--attacks", "fgsm", "--size", "20"]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports go to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same network under another threat."""
    folder = tmp_path_factory.mktemp("other") / "run"
    assert main([*TRAIN, "--threat.eps", "3/255", "--folder", str(folder)]) == 0
    return folder


def test_weights_and_checkpoints_say_whose_they_are(finished: Path, other: Path) -> None:
    found = []
    for run in (finished, other):
        for name, epoch in (("best", None), ("last", 2)):
            known = read_metadata(run / f"{name}.safetensors")
            assert known["checkpoint"] == name
            assert known["step"] == 8 * known["epoch"]
            assert epoch in (None, known["epoch"])
            found.append(known["run"])
        for path in (run / "checkpoints").iterdir():
            state = checkpoint.load(path)
            assert f"step-{state['step']:09d}.ckpt" == path.name
            assert (state["settings"], state["fingerprint"]) == (
                known["run"]["settings"],
                known["run"]["data"],
            )
            assert state["metrics"].count("\n") == state["epoch"]
    assert found[0] == found[1] != found[2] == found[3]
    assert found[0]["data"] == found[2]["data"]


@pytest.mark.parametrize("which", ["best", "last"])
def test_weights_of_another_run_are_not_taken_for_this_ones(
    which: str, run_folder: Path, other: Path, refused: Refused, tmp_path: Path
) -> None:
    path = run_folder / f"{which}.safetensors"
    shutil.copy(other / path.name, path)
    before = contents(run_folder)
    said = str(path), "weights of another run", f"the run in {run_folder} wrote"
    refused(["evaluate", str(run_folder), "--which", which], *said)
    refused([*TRAIN, "--folder", str(run_folder)], *said)
    assert contents(run_folder) == before
    shutil.rmtree(run_folder / "evaluation")
    refused(["analyze", str(run_folder), "--which", which, "--output", str(tmp_path / "analysis")], *said)
    assert not (tmp_path / "analysis").exists()
    shutil.copytree(other / "evaluation", run_folder / "evaluation", dirs_exist_ok=True)
    refused(["evaluate", str(run_folder), "--which", which], *said)  # nor is the other's evaluation found


def test_best_and_last_are_not_taken_for_each_other(run_folder: Path, refused: Refused) -> None:
    path = run_folder / "last.safetensors"
    shutil.copy(run_folder / "best.safetensors", path)
    refused(
        ["evaluate", str(run_folder), "--which", "last", *ATTACK], str(path), "the weights 'best'", "'last'"
    )


def test_weights_of_other_data_are_not_evaluated(refused: Refused, tmp_path: Path) -> None:
    """The same settings and the same test images, other training images."""
    for name, changed in (("one", []), ("two", [5])):
        images = pictures(60)
        for at in changed:
            images[at] = pictures(1, seed=9)[0]
        write_parquet(tmp_path / name / "data" / "train-0.parquet", images[:40], [0, 1] * 20)
        write_parquet(tmp_path / name / "data" / "test-0.parquet", images[40:], [0, 1] * 10)
        words = [*TRAIN, "--data.source", str(tmp_path / name / "data"), "--data.train_size", "30"]
        words += ["--data.validation", "4", "--optim.epochs", "1", "--evaluate.size", "20"]
        assert main([*words, "--folder", str(tmp_path / name / "run")]) == 0
    shutil.copy(tmp_path / "one" / "run" / "last.safetensors", tmp_path / "two" / "run")
    path = tmp_path / "two" / "run" / "last.safetensors"
    words = ["evaluate", str(path.parent), "--which", "last", *ATTACK]
    refused(words, "data", f"where {path} was trained on", "the data that the run was trained with")


def test_surrogates_and_teachers_are_of_the_run_that_they_are_said_to_be_of(
    run_folder: Path, finished: Path, other: Path, refused: Refused, tmp_path: Path
) -> None:
    path = run_folder / "best.safetensors"
    shutil.copy(other / path.name, path)
    words = ["evaluate", str(finished), "--which", "last", *ATTACK, "--transfer", str(run_folder)]
    refused(words, "--transfer", f"{path}: weights of another run")
    words = [
        *TRAIN,
        "--label",
        "KD",
        "--label.robust",
        str(run_folder),
        "--folder",
        str(tmp_path / "student"),
    ]
    refused(words, "label.robust", f"{path}: weights of another run")


def test_an_evaluation_of_another_run_is_not_reported(
    run_folder: Path, other: Path, refused: Refused
) -> None:
    path = run_folder / "evaluation" / "best.json"
    shutil.copy(other / "evaluation" / "best.json", path)
    refused(
        ["report", str(run_folder)], str(path), "an evaluation of another run's weights", "evaluate makes"
    )
    assert main(["evaluate", str(run_folder), "--which", "best"]) == 0
    assert main(["report", str(run_folder)]) == 0


def test_a_checkpoint_under_another_name_is_not_believed(
    run_folder: Path, refused: Refused, tmp_path: Path
) -> None:
    older, newest = sorted((run_folder / "checkpoints").iterdir())
    renamed = older.rename(older.with_name("step-000000099.ckpt"))
    words = [*TRAIN, "--folder", str(run_folder)]
    given, accepted = "a checkpoint of step 8 under another name", f"--resume {newest}"
    refused(words, str(renamed), given, "the checkpoint of step 99", accepted)
    newest.unlink()
    analyze = ["analyze", str(run_folder), "--which", "checkpoints", "--output", str(tmp_path / "analysis")]
    refused(analyze, str(renamed), given)


def test_a_checkpoint_of_another_run_is_not_continued(
    run_folder: Path, other: Path, refused: Refused
) -> None:
    newest = max((run_folder / "checkpoints").iterdir())
    shutil.copy(other / "checkpoints" / newest.name, newest)
    words = [*TRAIN, "--folder", str(run_folder)]
    refused(words, str(run_folder), "a checkpoint of other settings", "the settings it began with")
    refused([*words, "--resume", str(newest)], "resume", f"{newest}, of another run", f"--init_from {newest}")


# --- --resume and --init_from -------------------------------------------------------------------------------


def test_resuming_into_a_new_folder_is_refused_and_init_from_named(
    finished: Path, refused: Refused, tmp_path: Path
) -> None:
    source = min((finished / "checkpoints").iterdir())
    words = [*TRAIN, "--optim.epochs", "3", "--folder", str(tmp_path / "new")]
    # Nothing is read before: there are no such data.
    refused([*words, "--resume", str(source), "--data.source", "/no/data"], "resume", str(source))
    short = [*TRAIN, "--optim.epochs", "1", "--folder", str(tmp_path / "new"), "--data.source", "/no/data"]
    refused([*short, "--init_from", str(source)], "optim.epochs", "1", "more than the 1 that")
    rest = refused(
        [*words, "--resume", str(source)], "resume", f"{source}, and no run in", "of the run in the"
    )
    assert not (tmp_path / "new").exists()
    offered = rest.split("; ")[1].split()[:2]
    for _ in range(2):  # the second time nothing is left to do
        assert main([*words, *offered]) == 0
        rows = [json.loads(row) for row in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [2, 3]


@pytest.mark.parametrize("flag", ["--resume", "--init_from"])
@pytest.mark.parametrize("place", ["/dev/zero", "PIPE", "FOLDER/nowhere"])
def test_what_never_ends_is_not_read(
    flag: str, place: str, run_folder: Path, refused: Refused, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = place.replace("PIPE", str(tmp_path / "pipe")).replace("FOLDER", str(tmp_path))
    folder = run_folder if flag == "--resume" else tmp_path / "new"
    refused([*TRAIN, "--folder", str(folder), flag, path], flag.removeprefix("--"), path)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_a_pipe_is_one_line(run_folder: Path, refused: Refused, tmp_path: Path) -> None:
    newest = max((run_folder / "checkpoints").iterdir())
    pipe = newest.with_name("step-000000099.ckpt")
    os.mkfifo(pipe)
    refused([*TRAIN, "--folder", str(run_folder)], str(pipe), "no regular file", f"--resume {newest}")
    analyze = ["analyze", str(run_folder), "--which", "checkpoints", "--output", str(tmp_path / "analysis")]
    refused(analyze, str(pipe), "no regular file")


# --- damaged files ------------------------------------------------------------------------------------------

DEEP = b"[" * 3_000
BROKEN = {
    "open brackets": b"x: [[[[[[",
    "depth": b"x: " + DEEP,
    "a value in itself": b"x: &a [*a]",
    "no text": b"\xff\xfe\x00",
    "digits": b"a: " + b"1" * 10_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_damaged_configuration_is_one_line(content: bytes, run_folder: Path, refused: Refused) -> None:
    path = run_folder / "config.yaml"
    path.write_bytes(content)
    for words in (
        ["report", str(run_folder)],
        ["evaluate", str(run_folder)],
        [*TRAIN, "--folder", str(run_folder)],
    ):
        refused(words, str(path), "unreadable YAML")


def test_damaged_files_that_only_inform_do_not_stop_a_run(run_folder: Path, refused: Refused) -> None:
    environment, times = run_folder / "environment.json", run_folder / "timing.jsonl"
    environment.write_bytes(DEEP)
    refused(["report", str(run_folder)], str(environment), "unreadable JSON")
    times.write_bytes(b"x\n[]\n{}\n\xff\n" + DEEP + b"\n" + times.read_bytes() + b'{"epoch": 2, "sec')
    assert main([*TRAIN, "--folder", str(run_folder)]) == 0
    assert json.loads(environment.read_text())["seed"] == 0


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timing.jsonl", "environment.json", "config.yaml", ".lock"]
)
def test_a_pipe_in_the_place_of_a_file_is_one_line(name: str, run_folder: Path, refused: Refused) -> None:
    (run_folder / name).unlink()
    os.mkfifo(run_folder / name)
    refused([*TRAIN, "--folder", str(run_folder)], "folder", f"{run_folder / name} (no regular file)")


def test_a_measure_that_is_no_number_is_one_line(run_folder: Path, refused: Refused) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"val_robust": ', '"val_robust": [1], "was": '))
    refused(["report", str(run_folder)], str(path), "val_robust [1] in epoch 1", "a number or null")
