"""The list of published models: two small ones in local folders, verified by evaluating them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hub_server import Hub
from softdefend import SettingError
from softdefend.cli.main import main
from softdefend.publish.zoo import PACKAGED, read_zoo

CPU = ["--device", "cpu", "--progress", "false"]


@pytest.fixture(scope="session")
def made(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two published models and a list of them; to be copied."""
    place = tmp_path_factory.mktemp("zoo")
    for which in ("best", "last"):
        folder = place / which
        words = ["--dry_run", "--which", which, "--output", str(folder)]
        assert main(["push", str(evaluated), f"me/{which}", *words]) == 0
        assert main(["zoo", "add", which, str(folder), "--list", str(place / "zoo.yaml")]) == 0
    return place


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    """A list with two models, published to folders beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "zoo.yaml"


def test_the_packages_list_can_be_read_and_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_zoo(PACKAGED) == {}
    assert main(["zoo"]) == 0
    assert "no models are published yet" in capsys.readouterr().out


def test_an_entry_has_the_figures_and_the_digest(
    zoo: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((evaluated / "evaluation" / "best.json").read_text())
    content = yaml.safe_load(zoo.read_text())["models"]
    assert list(content) == ["best", "last"]
    assert content["best"]["sha256"] == result["weights"]
    assert content["best"]["clean"] == round(100 * result["clean"]["rate"], 2)
    assert content["best"]["robust"] == {
        name: round(100 * rate["rate"], 2) for name, rate in result["attacks"].items()
    }
    assert (content["best"]["norm"], content["best"]["eps"], content["best"]["n"]) == ("linf", "4/255", 359)
    assert content["best"]["source"] == "best"  # beside the list, wherever both are
    capsys.readouterr()
    assert main(["zoo", "list", "--list", str(zoo)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "best", "last"]
    assert f"{100 * result['clean']['rate']:.2f}" in lines[1]


def test_both_models_are_verified(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("best", "last"):
        capsys.readouterr()
        assert main(["zoo", "verify", name, "--list", str(zoo), "--tolerance", "0", *CPU]) == 0
        said = capsys.readouterr().out
        assert "clean: published" in said
        assert "PGD-20: published" in said
        assert "differs" not in said
        assert (tmp_path / "zoo" / name / "report.html").is_file()


def test_a_list_that_moves_with_its_folders_still_works(zoo: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("best", "zoo.yaml"):
        shutil.move(tmp_path / name, moved / name)
    words = ["--list", str(moved / "zoo.yaml"), "--output", str(tmp_path / "out"), *CPU]
    assert main(["zoo", "verify", "best", *words]) == 0


def test_a_model_of_the_hub_is_verified(zoo: Path, tmp_path: Path, hub: Hub) -> None:
    hub.files["me/digits"] = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}
    shutil.rmtree(tmp_path / "best")
    assert main(["zoo", "add", "ours", "me/digits", "--list", str(zoo)]) == 0
    words = ["--list", str(zoo), "--output", str(tmp_path / "out"), *CPU]
    assert main(["zoo", "verify", "ours", *words]) == 0


def change(zoo: Path, **changes: object) -> None:
    content = yaml.safe_load(zoo.read_text())
    content["models"]["best"] |= changes
    zoo.write_text(yaml.safe_dump(content))


def test_figures_that_are_not_found_again_are_refused(refused, zoo: Path, tmp_path: Path) -> None:
    true = read_zoo(zoo)["best"].robust["pgd-20"]
    change(zoo, robust={"pgd-20": true + 3})
    words = ["zoo", "verify", "best", "--list", str(zoo), "--output", str(tmp_path / "out"), *CPU]
    refused(words, "name", f"whose PGD-20 is {true} here and {true + 3} in the list", "within 0.5 points")
    assert main([*words, "--tolerance", "3.5"]) == 0


def test_the_audit_is_compared_too(refused, zoo: Path, tmp_path: Path) -> None:
    change(zoo, audit="never heard of")
    words = ["zoo", "verify", "best", "--list", str(zoo), "--output", str(tmp_path / "out"), *CPU]
    given = "whose audit is "
    refused([*words, "--audit", "--audit_size", "4"], "name", given, "figures within")


@pytest.mark.parametrize(
    ("changes", "setting", "given"),
    [
        ({"sha256": "0" * 64}, "best/model.safetensors", "sha256 "),
        ({"source": "missing"}, "best: source", "'missing'"),
        ({"epsilon": "1"}, "zoo.yaml: best: epsilon", "an unknown field"),
        ({"n": "many"}, "zoo.yaml: best: n", "'many'"),
        ({"robust": []}, "zoo.yaml: best: robust", "[]"),
        ({"robust": {"nothing": 3.0}}, "attacks", "nothing"),
        ({"eps": "8"}, "threat.eps", "8"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_one_line(
    changes: dict, setting: str, given: str, zoo: Path, tmp_path: Path, capsys
) -> None:
    change(zoo, **changes)
    words = ["--list", str(zoo), "--output", str(tmp_path / "out"), *CPU]
    capsys.readouterr()
    assert main(["zoo", "verify", "best", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said, _, accepted = line.partition("; accepted: ")
    assert f"{setting}: got " in said
    assert given in said
    assert accepted
    assert not (tmp_path / "out" / "evaluation").exists()


def test_other_data_are_refused(refused, zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "best" / "config.json"
    config = json.loads(path.read_text())
    words = ["zoo", "verify", "best", "--list", str(zoo), "--output", str(tmp_path / "out"), *CPU]
    path.write_text(json.dumps({**config, "data": {**config["data"], "split_seed": 9}}))
    refused(words, "--data", "test images", "the data that the model was evaluated on")
    path.write_text(json.dumps({**config, "data": {"test_fraction": 0.2}}))
    refused(words, "--data", "best does not say where its data are", "their place")
    assert main([*words, "--data", "digits"]) == 0


@pytest.mark.parametrize(
    ("words", "setting", "given", "accepted"),
    [
        (["verify"], "name", "nothing", "the name of a model"),
        (["verify", "nobody"], "name", "'nobody'", "--list FILE"),
        (["add", "x"], "source", "nothing", "owner/name or a folder"),
        (["add", "x", "y"], "--list", "nothing", "a file"),
        (["show"], "action", "'show'", "list, verify, add"),
        (["list", "a", "b"], "source", "b", "it with add only"),
        (["list", "--tolerance", "-1"], "--tolerance", "-1", "0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_words_that_do_not_fit_are_refused(words, setting, given, accepted, refused) -> None:
    refused(["zoo", *words], setting, given, accepted)


@pytest.mark.parametrize("text", ["models: 3\n", "{}\n", "models: {a: 3}\n", "models: {a: {n: 1}}\n"])
def test_a_file_that_is_no_list_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(SettingError, match=r"zoo\.yaml"):
        read_zoo(tmp_path / "zoo.yaml")


def test_a_folder_that_was_not_published_is_not_added(refused, tmp_path: Path) -> None:
    words = ["zoo", "add", "x", str(tmp_path), "--list", str(tmp_path / "zoo.yaml")]
    refused(words, str(tmp_path / "." / "config.json"), "no such file", "softdefend push wrote")
    assert not (tmp_path / "zoo.yaml").exists()
