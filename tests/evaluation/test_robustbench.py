"""RobustBench's ``model_info`` against the form of published files, and its figures against naive counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from table_tools import N, count_naively, make_result, make_table

from softdefend.core.errors import SettingError
from softdefend.evaluation.robustbench import STANDARD, check_standard, issue_text, model_info, read_known

# RobustBench/robustbench at 78fcc9e, model_info/cifar10/L2/Rice2020Overfitting.json
PUBLISHED = {
    "link": "https://arxiv.org/abs/2002.11569",
    "name": "Overfitting in adversarially robust deep learning",
    "authors": "Leslie Rice, Eric Wong, J. Zico Kolter",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ICML 2020",
    "architecture": "PreActResNet-18",
    "eps": "0.5",
    "clean_acc": "88.67",
    "reported": "71.6",
    "autoattack_acc": "67.68",
    "unreliable": False,
}


def test_the_fields_are_those_of_published_files():
    table = make_table()
    content = model_info(make_result(table), table, full=N, architecture="resnet18", unreliable=False)
    assert set(content) == {*PUBLISHED, "footnote"}  # 131 of 236 published files have a footnote
    assert content["clean_acc"] == percent(table.right.mean())
    assert content["autoattack_acc"] == percent(count_naively(table, STANDARD) / N)
    assert (content["dataset"], content["eps"], content["architecture"]) == ("cifar10", "8/255", "ResNet-18")
    for field in ("clean_acc", "autoattack_acc", "eps", "name", "authors", "link", "venue"):
        assert type(content[field]) is type(PUBLISHED[field]), field
    assert content["number_forward_passes"] == 1
    assert content["unreliable"] is False
    json.dumps(content, allow_nan=False)


def percent(rate: float) -> str:
    return str(round(100 * float(rate), 2))


def sort_key(content: dict[str, Any]) -> float:
    """How RobustBench's leaderboard reads a file: the first of these that is there, as a number."""
    return next(float(content[field]) for field in ("external", "autoattack_acc") if field in content)


def test_what_beats_the_ensemble_is_external():
    table = make_table((*STANDARD, "pgd-50x10"))
    content = model_info(make_result(table), table, full=N)
    assert content["autoattack_acc"] == percent(count_naively(table, STANDARD) / N)
    assert content["external"] == percent(count_naively(table, (*STANDARD, "pgd-50x10")) / N)
    assert float(content["external"]) < float(content["autoattack_acc"])
    assert sort_key(content) == float(content["external"])
    alone = make_table()
    content = model_info(make_result(alone), alone, full=N)
    assert "external" not in content
    assert "unreliable" not in content
    assert sort_key(content) == float(content["autoattack_acc"])


def test_images_made_elsewhere_that_do_more_are_external():
    table = make_table()
    result = make_result(table)
    worst = result["worst"]["count"]
    content = model_info(result, table, full=N, transferred=worst - 1)
    assert content["external"] == percent((worst - 1) / N)
    same = model_info(result, table, full=N)
    assert model_info(result, table, full=N, transferred=N) == same


def test_what_people_wrote_into_the_file_is_kept(tmp_path):
    path = tmp_path / "mine.json"
    assert read_known(path) == {}
    path.write_text(json.dumps(PUBLISHED))
    table = make_table()
    result = make_result(table, eps="0.5", norm="l2", name_of_data="digits")
    content = model_info(result, table, full=N, architecture="small_cnn", known=read_known(path))
    for field in ("link", "name", "authors", "additional_data", "venue", "architecture", "reported"):
        assert content[field] == PUBLISHED[field]
    assert content["eps"] == "0.5"
    assert content["dataset"] == "digits"
    assert content["clean_acc"] == percent(table.right.mean())
    for wrong in ("{", "[1]"):
        path.write_text(wrong)
        with pytest.raises(SettingError, match="--robustbench"):
            read_known(path)


@pytest.mark.parametrize("changed", [None, "clean_acc", "autoattack_acc", "eps"])
def test_verdicts_on_other_figures_are_dropped(changed):
    """They are kept beside the same figures, however these are written: as text, or eps as a number."""
    table = make_table()
    known = {k: str(v) for k, v in model_info(make_result(table), table, full=N).items()}
    known |= {"eps": 8 / 255, "external": 12.5, "unreliable": True, "name": "mine"}
    if changed:
        known[changed] = "0.25"
    content = model_info(make_result(table), table, full=N, known=known)
    assert {"external", "unreliable"} & content.keys() == (set() if changed else {"external", "unreliable"})
    assert content["name"] == "mine"
    again = model_info(make_result(table), table, full=N, known=known, unreliable=False)
    assert again["unreliable"] is False


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"attacks": ("pgd-20",)}, "an evaluation with pgd-20"),
        ({"attacks": STANDARD[:3]}, "an evaluation with apgd-ce, apgd-t, fab-t"),
        ({"attacks": ("autoattack-rand",)}, "an evaluation with autoattack-rand"),
        ({"n": 39}, "an evaluation on 39 of 40 images"),
        ({"precision": "fast"}, "an evaluation with precision fast"),
    ],
    ids=str,
)
def test_other_evaluations_may_not_be_called_autoattack(change, given):
    good = {"attacks": STANDARD, "n": 40, "full": 40, "precision": "exact"}
    check_standard(**good)
    check_standard(**{**good, "attacks": ("autoattack", "fgsm")})
    with pytest.raises(SettingError, match=f"^--robustbench: got {given}; accepted: --attacks autoattack on"):
        check_standard(**{**good, **change})


def test_the_text_of_the_issue_has_the_figures_of_the_file():
    table = make_table((*STANDARD, "pgd-50x10"))
    result = make_result(table)
    content = model_info(result, table, full=N, architecture="wrn34_10", additional_data=False)
    content |= {"name": "A title", "authors": "A, B"}
    text = issue_text(content, result)
    for line in (
        "- **Paper Title**: A title",
        "- **Architecture**: WideResNet-34-10",
        "- **Threat Model**: Linf",
        "- **eps**: 8/255",
        f"- **Clean accuracy**: {content['clean_acc']}%",
        f"- **Robust accuracy**: {content['external']}%",
        "- **Additional data**: false",
        "- **Checkpoint and code**:",
    ):
        assert line in text.splitlines(), line
    unknown = model_info(result, table, full=N)
    assert "- **Additional data**: \n" in issue_text(unknown, result)
    assert "None" not in issue_text(unknown, result)
