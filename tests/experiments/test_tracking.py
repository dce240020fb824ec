"""A run of the command line gives its trackers curves, tables and report, once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train

SMALL = """
    --data.train_size 64 --data.validation 32 --optim.epochs 2 --optim.batch_size 16 --optim.lr 0.05
    --net.name small_cnn --net.width 4 --augment.kind none --threat.eps 4/255 --attack.steps 1
    --validate.attack.steps 1 --evaluate.size 32 --evaluate.curve_size 0 --evaluate.attacks [fgsm]
    --progress false --runtime.device cpu --runtime.threads 1 --save.trackers [csv,tensorboard]
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_results_reach_the_trackers_once(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    experiment = resolve([*SMALL.split(), "--folder", str(folder)])
    train(experiment)
    with open(folder / "evaluation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["checkpoint"], line["attack"]) for line in lines] == [
        (which, name) for which in ("best", "last") for name in ("clean", "fgsm", "worst")
    ]
    reader = events.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    for line in lines:
        result = json.loads((folder / "evaluation" / f"{line['checkpoint']}.json").read_text())
        one = {**result, **result["attacks"]}[line["attack"]]
        for name, key in (("accuracy", "rate"), ("low", "low"), ("high", "high")):
            assert float(line[name]) == one[key]
        assert (int(line["images"]), int(line["epoch"])) == (result["n"], result["epoch"])
        (event,) = reader.Scalars(f"test/{line['checkpoint']}/{line['attack']}")
        assert (event.step, event.value) == (2, pytest.approx(one["rate"]))
    assert {"curves/Robust accuracy", "curves/Training loss"} <= set(reader.Tags()["images"])
    (image,) = reader.Images("curves/Training loss")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > image.height > 100
    report = reader.Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert Path(report).samefile(folder / "report.html")

    def written() -> dict[Path, int]:
        places = [*folder.glob("tensorboard/*"), *folder.glob("*.csv"), folder / "trackers.json"]
        return {path: path.stat().st_mtime_ns for path in places}

    before = written()
    train(experiment)
    assert written() == before
