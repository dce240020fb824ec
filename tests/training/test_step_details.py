"""The step: one bad row is enough to refuse; the network is left as training left it."""

from __future__ import annotations

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.labels import SGLR, Hard, Predictions, Supervision
from softdefend.objectives import PGDAT
from softdefend.training import OptimSettings
from softdefend.training.target_checks import check_rows


@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_one_row_that_does_not_sum_to_one_is_enough(row, factor):
    rows = torch.full((6, 4), 0.25)
    rows[row] *= factor
    said = Supervision(torch.zeros(6).long(), rows)
    with pytest.raises(SettingError, match=rf"a row that sums to {factor:g}"):
        check_rows(Hard(), said, Predictions(torch.zeros(6, 4)))


@pytest.mark.parametrize("mode", ["train", "batch", "eval"])
def test_a_clean_forward_of_a_rule_leaves_the_network_in_training_mode(make_trainer, mode):
    trainer = make_trainer(
        SGLR(start=0.0, clean_bn=mode), PGDAT(), optim=OptimSettings(epochs=1, batch_size=16)
    )
    after = []
    advance = trainer.recipe.weight.after_step
    trainer.recipe.weight.after_step = lambda: (
        after.append((all(m.training for m in trainer.net.modules()), trainer.net[1].track_running_stats))
        or advance()
    )
    trainer.fit()
    assert after == 3 * [(True, True)]
