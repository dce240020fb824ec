"""``softdefend evaluate --union``: who is robust in every threat that a run was evaluated under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from softdefend.cli.main import main


def test_the_union_is_counted_image_by_image(run_folder: Path, capsys, refused) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--curve_size", "0"]
    assert main([*words, "--norm", "l2", "--eps", "1.5", "--targeted", "next"]) == 0
    files = sorted((run_folder / "evaluation").iterdir())
    refused([*words, "--union"], "--union", "linf 4/255 alone", "--norm l2")
    assert sorted((run_folder / "evaluation").iterdir()) == files
    capsys.readouterr()
    assert main([*words, "--norm", "l2", "--eps", "0.25", "--attacks", "pgd-3", "fgsm", "--union"]) == 0
    said = capsys.readouterr().out.splitlines()

    linf, l2 = (pq.read_table(run_folder / "evaluation" / f"last{end}.parquet") for end in ("", "-l2-0.25"))
    kept = [linf["pgd-20/robust"], l2["pgd-3/robust"], l2["fgsm/robust"]]
    robust = np.all([column.to_numpy() for column in kept], axis=0)
    assert 0 < robust.sum() < linf["pgd-20/robust"].to_numpy().sum()
    place = next(number for number, line in enumerate(said) if "robust in each threat and in all" in line)
    assert "64 images" in said[place]
    assert [line.split()[0] for line in said[place + 1 : place + 4]] == ["linf", "l2", "union"]
    assert f"{100 * robust.mean():.1f}%" in said[place + 3]

    fewer = [*words, "--norm", "l2", "--eps", "0.25", "--attacks", "pgd-4", "--size", "60", "--union"]
    made = (run_folder / "evaluation" / "last-l2-0.25.json").read_bytes()
    refused(fewer, "--union", "other images under l2 0.25 than under linf 4/255", "same images")
    assert (run_folder / "evaluation" / "last-l2-0.25.json").read_bytes() == made  # refused first
    refused([*fewer, "--which", "best", "last"], "--union", "other images under l2 0.25", "same images")
    more = [*words, "--norm", "l2", "l1", "--eps", "0.25", "1", "--attacks", "pgd-3", "--union"]
    assert main(more) == 0  # l2 is kept
    assert "as evaluated before" in capsys.readouterr().out
    (run_folder / "evaluation" / "last.parquet").unlink()
    refused(fewer, f"{run_folder}/evaluation/last.parquet", "no table", "last.json")


def test_what_has_no_union_is_refused_first(run_folder: Path, refused) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--union", "--targeted", "next"]
    before = sorted((run_folder / "evaluation").iterdir())
    refused(words, "evaluate.targeted", "next", "--union")
    outside = ["evaluate", "--model", "small_cnn", "--weights", "w.pt", "--output", "out", "--union"]
    refused(outside, "--union", "without a run", "run folders")
    assert sorted((run_folder / "evaluation").iterdir()) == before


def test_several_norms_in_one_call(run_folder: Path, capsys, refused) -> None:
    words = ["evaluate", str(run_folder), "--which", "last", "--curve_size", "0", "--attacks", "pgd-2"]
    for radii, given in ((["0.25"], "1 radii for 2 norms"), ([], "nothing beside --norm l2")):
        refused([*words, "--norm", "linf", "l2", *(["--eps", *radii] if radii else [])], "--eps", given)
    targeted = ["--union", "--targeted", "next"]
    both = ["--norm", "l2", "l1", "--eps", "0.25", "1"]
    refused([*words, *both, *targeted], "evaluate.targeted", "next", "--union")
    refused([*words, "--norm", "l2", "l0", "--eps", "0.25", "3"], "threat.norm", "l0", "under pgd-2")
    refused([*words, "--norm", "l2", "l0", "--eps", "0.25", "3", "--audit"], "threat.norm", "l0", "")
    assert not list((run_folder / "evaluation").glob("*-l2-*"))
    capsys.readouterr()
    assert main([*words, *both, "--union"]) == 0
    said = capsys.readouterr().out
    assert said.count("robust in each threat and in all") == 1
    tables = [
        pq.read_table(run_folder / "evaluation" / f"last{end}.parquet") for end in ("", "-l2-0.25", "-l1-1")
    ]
    names = ("pgd-20/robust", "pgd-2/robust", "pgd-2/robust")
    robust = [table[name].to_numpy() for table, name in zip(tables, names, strict=True)]
    union = next(line for line in said.splitlines() if line.startswith("  union"))
    assert union.split()[1] == f"{100 * np.all(robust, axis=0).mean():.1f}%"
    outside = ["evaluate", "--model", "small_cnn", "--weights", "w.pt", "--output", "out"]
    refused([*outside, *both], "--norm", "l2 l1", "one threat")
