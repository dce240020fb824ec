"""One call does what is asked in its order, and refuses first what would fail last."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from checkpoint_tools import CPU, QUICK, make_source

from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation import Requests, checkpoint, evaluate_checkpoint
from softdefend.evaluation.corruptions import corruption_table
from softdefend.evaluation.surrogates import transfer_text
from tiny import tiny_net

FULL = replace(QUICK, attacks=("autoattack",), examples=0)


def everything(tmp_path):
    return Requests(
        audit=8,
        corruptions=True,
        surrogates={"other": tiny_net(seed=1).eval()},
        robustbench=tmp_path / "info.json",
        log=tmp_path / "aa.log",
    )


def test_everything_is_done_in_order_and_found_again(bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="softdefend")
    source, requests = make_source(tmp_path, bundle), everything(tmp_path)
    result = evaluate_checkpoint(source, FULL, requests, device=CPU)
    lines = list(caplog.messages)
    folder = tmp_path / "evaluation"
    transferred, damaged = (
        json.loads((folder / f"last-{n}.json").read_text()) for n in ("transfer", "corruptions")
    )
    info = json.loads(requests.robustbench.read_text())
    assert lines[0].startswith("audit on 8 images:\n")
    assert [line.split(":")[0].strip() for line in lines[1:5]] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert lines[5].startswith("last (epoch 3): clean ")
    assert lines[6] == transfer_text(transferred)
    assert corruption_table(damaged) in lines[7:9]
    assert lines[-2:] == [f"RobustBench model_info: {requests.robustbench}", f"log: {requests.log}"]
    assert info["autoattack_acc"] == str(round(100 * result["attacks"]["autoattack"]["rate"], 2))
    assert info["architecture"] == "tiny"
    assert info["unreliable"] == (
        json.loads((folder / "last-audit.json").read_text())["verdict"] == "suspicious"
    )
    assert requests.log.read_text().startswith("using standard version")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    caplog.clear()
    assert evaluate_checkpoint(source, FULL, requests, device=CPU) == result
    again = [line for line in caplog.messages if "as evaluated before, on 32 images" not in line]
    assert again == lines
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_only_what_is_asked_is_done(bundle, tmp_path):
    evaluate_checkpoint(make_source(tmp_path, bundle), QUICK, device=CPU)
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {
        "last.json",
        "last.parquet",
        "last-gallery.safetensors",
        "last-examples.safetensors",
    }


@pytest.mark.parametrize(
    ("settings", "requests", "said"),
    [
        (QUICK, {"log": "."}, "--log: got .*, a directory; accepted: a file to write"),
        (QUICK, {"log": "last.safetensors/x"}, "--log: got .*, below the file"),
        (QUICK, {"robustbench": "info.json"}, "--robustbench: got an evaluation with fgsm, pgd-3"),
        (replace(FULL, size=31), {"robustbench": "i"}, "--robustbench: got an evaluation on 31 of 32 images"),
        (replace(FULL, precision="fast"), {"robustbench": "i"}, "--robustbench: .* precision fast"),
        (FULL, {"robustbench": "last.safetensors"}, "--robustbench: got .*, which is no JSON"),
        (replace(QUICK, attacks=("cw-l2",)), {}, "cw-l2"),
    ],
    ids=str,
)
def test_what_would_fail_at_the_end_is_refused_before_anything_runs(
    bundle, tmp_path, monkeypatch, settings, requests, said
):
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("loaded"))
    paths = {name: tmp_path / path for name, path in requests.items()}
    with pytest.raises(SettingError, match=said):
        evaluate_checkpoint(make_source(tmp_path, bundle), settings, Requests(audit=4, **paths), device=CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"last.safetensors"}


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_robustbench_has_no_table_for_these_norms(bundle, tmp_path, norm):
    source = replace(make_source(tmp_path, bundle), threat=ThreatModel(norm, 3))
    settings = replace(FULL, attacks=("autoattack",))
    with pytest.raises(SettingError, match=f"{norm}; accepted: linf or l2"):
        evaluate_checkpoint(source, settings, Requests(robustbench=tmp_path / "i.json"), device=CPU)


def test_a_file_in_the_place_of_the_folder_is_refused(bundle, tmp_path):
    (tmp_path / "evaluation").write_text("")
    with pytest.raises(SettingError, match=r"^evaluation: got .*, below the file"):
        evaluate_checkpoint(make_source(tmp_path, bundle), QUICK, device=CPU)


def test_threats_have_files_of_their_own(bundle, tmp_path):
    for eps in ("0.1", "0.05"):
        source = make_source(tmp_path, bundle, threat=ThreatModel("linf", Budget(eps)))
        evaluate_checkpoint(source, QUICK, Requests(audit=4), device=CPU)
    names = {path.name for path in (tmp_path / "evaluation").glob("*.json")}
    assert names == {"last.json", "last-audit.json", "last-linf-0.05.json", "last-linf-0.05-audit.json"}
