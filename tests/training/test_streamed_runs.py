"""Runs on images that are not on the device: the numbers of a run on the device, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from killed_runs import train_whole_and_killed
from softdefend import EMA, PGDAT, SGLR, OptimSettings
from softdefend.data import AugmentSettings, DataBundle, DataSettings, load
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train
from tiny import tiny_net


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """90 gray images of 8x8 pixels, of four classes that a stripe tells."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(90):
        picture = draw.integers(0, 80, (8, 8), dtype=np.uint8)
        picture[2 * (i % 4)] += 120
        path = root / f"class{i % 4}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    return root


@pytest.fixture
def data(photos, tmp_path):
    def make(residence: str, **more) -> DataBundle:
        place = {"cache": str(tmp_path / "cache"), "validation": 10, "workers": 0}
        return load(DataSettings(str(photos), residence=residence, **place, **more))

    return make


@pytest.fixture
def start(make_trainer):
    def make(bundle: DataBundle, folder: str, kind: str = "crop-flip", parts: int = 1):
        return make_trainer(
            SGLR(start=0),
            PGDAT(),
            EMA(),
            folder,
            net=tiny_net(),
            data=bundle,
            optim=OptimSettings(epochs=2, batch_size=16, lr=0.1, drop_last=False, accumulate=parts),
            augment=AugmentSettings(kind, pad=1, scale=(0.4, 1.0), jitter=0.2),
        )

    return make


@pytest.mark.parametrize(("residence", "parts"), [("host", 1), ("stream", 1), ("stream", 3)])
def test_a_run_has_the_numbers_of_images_on_the_device(data, start, residence, parts):
    """Also where its batches are computed in parts."""
    runs = [start(data(where), where, parts=parts) for where in ("device", residence)]
    for run in runs:
        run.fit()
    one, other = (run.net.state_dict() for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert runs[0].state.metrics == runs[1].state.metrics


def test_a_killed_run_goes_on_with_the_batches_that_were_to_come(data, start):
    """Random parts of the images; killed within an epoch and at its end."""
    bundle = data("stream", image_size=8)
    whole, _ = train_whole_and_killed(lambda folder: start(bundle, folder, "resized-crop-flip"), (2, 3))
    rows = [json.loads(line) for line in (whole.folder.path / "timing.jsonl").read_text().splitlines()]
    assert 0 < rows[0]["waited"] < rows[0]["seconds"]
    assert rows[0]["images_per_second"] == pytest.approx(len(bundle.train) / rows[0]["seconds"])


def test_a_streamed_run_is_trained_evaluated_and_reported(photos, tmp_path):
    """From the command line's words to the page; images of 8x8 pixels are seen as 6x6."""
    run = tmp_path / "run"
    words = [
        *(f"--data.source={photos}", "--data.residence=stream", f"--data.cache={tmp_path}/cache"),
        *(
            "--data.validation=10",
            "--data.workers=0",
            "--data.image_size=6",
            "--augment.kind=resized-crop-flip",
        ),
        *("--net.name=small_cnn", "--net.width=4", "--optim.epochs=1", "--optim.batch_size=16"),
        *("--attack.steps=1", "--validate.attack.steps=1", "--evaluate.attacks=[fgsm]", "--progress=false"),
        *(f"--folder={run}", "--runtime.device=cpu"),
    ]
    train(resolve(words))
    result = json.loads((run / "evaluation" / "last.json").read_text())
    assert result["clean"]["n"] == 18
    assert (run / "report.html").is_file()
    train(resolve(words))  # finished: nothing to do, and nothing is refused
