"""The loop: the rate and the validations that a row speaks of, small batches, and whose checkpoint it is."""

from __future__ import annotations

import math
import os

import pytest

from softdefend.attacks import PGD
from softdefend.labels import Hard
from softdefend.objectives import PGDAT
from softdefend.training import OptimSettings, SaveSettings, Schedule, ValidateSettings
from softdefend.training.checkpoint import CheckpointError
from softdefend.training.folder import _same_file
from tiny import Killed


def test_a_rows_rate_is_that_of_its_last_step(make_trainer):
    optim = OptimSettings(epochs=2, batch_size=16, lr=0.1, schedule=Schedule("cosine"))
    trainer, rows = make_trainer(Hard(), PGDAT(), optim=optim), []
    trainer.fit(on_epoch=rows.append)
    expected = [0.05 * (1 + math.cos(math.pi * done / 6)) for done in (2, 5)]  # three steps an epoch
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_the_last_epoch_is_validated_whatever_the_interval(make_trainer):
    settings, rows = ValidateSettings(attack=PGD(steps=1), every=2), []
    make_trainer(Hard(), PGDAT(), validate=settings).fit(on_epoch=rows.append)
    assert [row["val_robust"] is None for row in rows] == [True, False, False]


@pytest.mark.parametrize("size", [1, 2, 47])
def test_no_pass_over_the_images_leaves_one_alone(make_trainer, size):
    trainer = make_trainer(Hard(), PGDAT(), optim=OptimSettings(epochs=1, batch_size=size))
    sizes = [len(image) for image in trainer._training_images()]
    assert sum(sizes) == 48
    assert min(sizes) > 1


def test_a_checkpoint_of_another_seed_is_refused_also_where_the_configuration_was_changed(make_trainer):
    first = make_trainer(Hard(), PGDAT(), seed=0)
    first.fit()
    first.folder.close()
    path = first.folder.path / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1", 1))
    with pytest.raises(CheckpointError, match="another seed"):
        make_trainer(Hard(), PGDAT(), seed=1).fit()


def test_a_continued_run_remembers_the_loss_of_its_first_step(make_trainer):
    trainer = make_trainer(Hard(), PGDAT(), save=SaveSettings())

    def stop(row):
        raise Killed

    with pytest.raises(Killed):
        trainer.fit(on_epoch=stop)
    trainer.folder.close()
    again = make_trainer(Hard(), PGDAT(), save=SaveSettings())
    again.fit()
    assert again.state.first_loss == trainer.state.first_loss


def test_weights_that_are_there_keep_their_date(make_trainer):
    trainer = make_trainer(Hard(), PGDAT())
    trainer.fit()
    trainer.folder.close()
    path = trainer.folder.path / "last.safetensors"
    os.utime(path, (1, 1))
    make_trainer(Hard(), PGDAT()).fit()  # nothing left to train
    assert path.stat().st_mtime == 1


def test_a_place_that_is_not_there_is_no_place(tmp_path):
    there, gone = str(tmp_path), str(tmp_path / "gone")
    assert _same_file(there, f"{there}/.")
    assert not _same_file(gone, f"{there}/./gone")
