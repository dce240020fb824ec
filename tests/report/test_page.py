from __future__ import annotations

import os
import re

import pytest
from page_tools import Page, read

from softdefend.core.errors import SettingError
from softdefend.report.page import write_report


@pytest.fixture
def full(make_run, make_evaluation) -> list:
    best, last = make_evaluation(0.9, 0.5), make_evaluation(0.92, 0.4)
    return [
        make_run("A", 0, best=best, last=last, examples=True),
        make_run("B", 0, best=make_evaluation(0.8, 0.6), last=make_evaluation(0.81, 0.58)),
        make_run("B", 1, best=make_evaluation(0.82, 0.62), last=make_evaluation(0.83, 0.54)),
    ]


def test_the_page_needs_nothing_but_itself(full, tmp_path) -> None:
    page = read(full, tmp_path)
    sources = [*page.values("src"), *page.values("href"), *page.values("srcset")]
    assert len(sources) == 12  # six figures, two examples of three pictures
    assert all(
        source.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,")) for source in sources
    )
    assert not {"script", "link", "iframe", "object"} & set(page.text)
    assert "url(" not in page.text["style"][0]
    assert "@import" not in page.text["style"][0]
    assert "width=device-width, initial-scale=1" in page.values("content")
    assert "prefers-color-scheme: dark" in page.text["style"][0]


def test_pictures_have_words(full, tmp_path) -> None:
    page = read(full, tmp_path)
    alts = page.values("alt")
    assert len(alts) == page.attributes.count(("img", "alt", "")) + 12
    assert any("Robust accuracy by epoch" in alt for alt in alts)


def test_comparison_table(full, tmp_path) -> None:
    rows = read(full, tmp_path).rows
    assert ["recipe", "seeds", "clean accuracy, %", "accuracy under PGD-20, %"] in rows
    assert [
        "A", "1",
        "90.00[85.00, 94.00]", "92.00[87.00, 96.00]", "−2.00",
        "50.00[45.00, 54.00]", "40.00[35.00, 44.00]", "+10.00",
    ] in rows  # fmt: skip
    # B: 60 and 62, 58 and 54; differences 2 and 8
    assert [
        "B", "2",
        "81.00 ± 1.41", "82.00 ± 1.41", "−1.00 ± 0.00",
        "61.00 ± 1.41", "56.00 ± 2.83", "+5.00 ± 4.24",
    ] in rows  # fmt: skip


def test_what_stands_below_the_table(full, tmp_path) -> None:
    page = read(full, tmp_path)
    assert page.text["h1"] == ["Robust training report"]
    assert any("B has the highest accuracy under PGD-20, 56.00%" in text for text in page.text["p"])
    assert any("wilson 95%" in text and "100 test images" in text for text in page.text["p"])
    assert page.text["h2"] == [
        "Best, last and their difference",
        "Learning curves",
        "Robust accuracy against ε",
        "Accuracy by class",
        "Example images",
        "Details",
    ]
    assert ["cat", "90.0", "25.0", "90.0", "25.0"] in page.rows
    cost = ["A", "0", "best", "2", "PGD-20", "50 of 100", "50.00", "45.00 to 54.00", "2,000", "1,900", "3.2"]
    assert cost in page.rows
    runs = [row for row in page.rows if row[:2] == ["A", full[0].folder.name]]
    assert runs[0][2:7] == ["0", "4", "3.0", "–", "abc1234"]
    assert any("split_seed: 1" in text for text in page.text["pre"])


def test_the_curve_says_what_it_was_measured_with(full, make_run, make_evaluation, tmp_path) -> None:
    (note,) = [text for text in read(full, tmp_path).text["p"] if "PGD-20 on" in text]
    assert note.startswith("PGD-20 on the first 100 test images. Bands: ")
    best = make_evaluation(0.9, 0.5)
    best["eps_curve"] = [{**row, "n": 1000} for row in best["eps_curve"]]
    (note,) = [
        text for text in read([*full, make_run("C", best=best)], tmp_path).text["p"] if "PGD-20 on" in text
    ]
    assert note.startswith("PGD-20 on the first 100 or 1,000 test images. ")


def test_examples_say_in_words_what_happened(full, tmp_path) -> None:
    page = read(full, tmp_path)
    captions = [text for text in page.text["figcaption"] if "clean" in text or "adversarial" in text]
    examples = [text for text in captions if "✓" in text or "✗" in text]
    assert examples == [
        "cleancat 90%✓ correct",
        "adversarialdog 55%✗ wrong",
        "cleandog 80%✓ correct",
        "adversarialdog 65%✓ correct",
    ]
    # the largest change is 0.1, and 0.5 / 0.1 = 5 makes it fill the range around gray
    assert any("magnified 5 times" in text and "0.1000" in text for text in page.text["p"])


EVIL = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>&lt;"


def test_hostile_names_stay_text(make_run, make_evaluation, tmp_path) -> None:
    table = [{"class": EVIL, "clean": 0.5, "robust": 0.25}]
    hostile = make_evaluation(0.9, 0.5, name_of_data=EVIL, per_class=table, split=EVIL, interval=EVIL)
    hostile["attacks"] = {EVIL: hostile["attacks"]["pgd-20"]}
    run = make_run(EVIL, best=hostile, last=hostile, net={"name": EVIL}, threat={"norm": EVIL, "eps": EVIL})
    page = read([run], tmp_path, title=EVIL)
    assert "script" not in page.text
    assert all(source.startswith("data:") for source in page.values("src"))
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert page.text["h1"] == [EVIL]
    assert EVIL in page.text["title"][0]
    assert any(row[0] == EVIL for row in page.rows)


def test_a_run_without_an_evaluation(make_run, make_row, tmp_path) -> None:
    run = make_run(metrics=[make_row(1, test_robust=None, test_clean=None)])
    page = read([run], tmp_path)
    assert page.text["h2"] == ["Best, last and their difference", "Learning curves", "Details"]
    assert "No checkpoint has been evaluated yet." in page.text["p"]
    assert any("The test set was not monitored" in text for text in page.text["p"])


def test_a_run_that_has_only_begun(make_run, tmp_path) -> None:
    page = read([make_run(metrics=[])], tmp_path)
    assert "No epoch has been finished yet." in page.text["p"]


def test_a_run_that_never_looked_at_held_out_images(make_run, make_row, tmp_path) -> None:
    nothing = dict.fromkeys(("test_robust", "test_clean", "val_robust", "val_clean"))
    page = read([make_run(metrics=[make_row(1, **nothing)])], tmp_path)
    assert any("No robust accuracy on held-out images" in text for text in page.text["p"])


def test_an_evaluation_with_the_least_it_can_have(make_run, tmp_path) -> None:
    least = {"clean": {"rate": 0.9}, "attacks": {"fgsm": {"rate": 0.5}}}
    page = read([make_run(last=least)], tmp_path)
    assert page.text["h2"] == ["Best, last and their difference", "Learning curves", "Details"]
    assert ["PGD-AT", "1", "–", "90.00", "–", "–", "50.00", "–"] in page.rows
    assert ["PGD-AT", "0", "last", "–", "FGSM", "– of –", "50.00", "–", "–", "–", "–"] in page.rows


def test_many_recipes_get_figures_of_their_own(make_run, make_evaluation, tmp_path) -> None:
    each = {"best": make_evaluation(0.9, 0.5), "last": make_evaluation(0.9, 0.4), "examples": True}
    runs = [make_run(f"R{i}", **each) for i in range(10)]
    path = write_report(runs, tmp_path / "report.html")
    captions = Page(path.read_text(encoding="utf-8")).text["figcaption"]
    for title in ("Robust accuracy on test images", "Robust accuracy on training images"):
        assert title in captions
    for which in ("best", "last"):
        assert f"Robust accuracy of the {which} checkpoint" in captions
    assert path.stat().st_size < 3_000_000


def test_written_whole_or_not_at_all(full, tmp_path, monkeypatch) -> None:
    path = write_report(full[:1], tmp_path / "deep" / "down" / "report.html")
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(SettingError, match="No space left on device"):
        write_report(full, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.usefixtures("every_figure_drawn")
def test_same_runs_same_page(full, tmp_path) -> None:
    first = write_report(full, tmp_path / "a.html").read_bytes()
    assert write_report(full, tmp_path / "b.html").read_bytes() == first


def test_no_runs(tmp_path) -> None:
    with pytest.raises(SettingError, match="runs: got none"):
        write_report([], tmp_path / "report.html")


def test_title_of_ones_own(full, tmp_path) -> None:
    page = read(full, tmp_path, title="My study")
    assert page.text["h1"] == ["My study"]
    assert re.match("My study: digits", page.text["title"][0])


def test_what_training_noted_is_said_below_the_curves_and_of_no_other_run(make_run, tmp_path) -> None:
    runs = [make_run(name, 0) for name in "ABC"]
    first, *_, third, last = runs[0].metrics
    first |= {"hints": ["guessing"], "catastrophic_overfitting": False}
    third["hints"] = ["uniform"]
    last |= {"hints": ["uniform"], "catastrophic_overfitting": True}
    runs[2].metrics[0]["hints"] = "uniform"  # not a list: no mark
    notes = [text for text in read(runs, tmp_path).text["p"] if text.startswith("Note: ")]
    assert [note.split(",")[0] for note in notes] == ["Note: A"] * 3
    assert "in epoch 1" in notes[0]
    assert "2 of 4 epochs, first in epoch 3" in notes[1]
    assert "(catastrophic overfitting) after 1 of 4 epochs, first after epoch 4" in notes[2]
