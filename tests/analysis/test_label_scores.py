from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from cleanlab.rank import get_label_quality_scores

from softdefend.analysis import label_scores as scores

BELIEF = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.05, 0.9], [0.4, 0.35, 0.25]])
GIVEN = torch.tensor([0, 2, 0, 1])


def test_scores_by_hand():
    expected = {
        "self-confidence": [0.7, 0.3, 0.05, 0.35],
        "margin": [0.5, -0.3, -0.85, -0.05],
        "log-odds": np.log([0.7 / 0.2, 0.3 / 0.6, 0.05 / 0.9, 0.35 / 0.4]),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scores.SCORES[name](BELIEF, GIVEN), values, rtol=1e-5)


def test_the_balanced_margin_takes_from_each_class_what_it_is_usually_given():
    level = np.array([(0.7 + 0.05) / 2, 0.35, 0.3])
    rest = BELIEF.numpy() - level
    own = rest[np.arange(4), GIVEN]
    rest[np.arange(4), GIVEN] = -np.inf
    np.testing.assert_allclose(scores.balanced_margin(BELIEF, GIVEN), own - rest.max(axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "adjusted"),
    [
        ("self-confidence", "self_confidence", False),
        ("margin", "normalized_margin", False),
        ("balanced-margin", "normalized_margin", True),
    ],
)
def test_scores_rank_as_cleanlabs_do(ours, theirs, adjusted):
    generator = torch.Generator().manual_seed(0)
    belief = torch.randn(60, 4, generator=generator, dtype=torch.float64).softmax(dim=1)
    given = torch.arange(60) % 4
    score = get_label_quality_scores(given.numpy(), belief.numpy(), method=theirs, adjust_pred_probs=adjusted)
    np.testing.assert_array_equal(scores.SCORES[ours](belief, given).argsort(), np.argsort(score))


def test_a_class_without_samples_does_not_stand_above_the_others():
    belief = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.45, 0.55], [0.4, 0.6]])
    given = torch.tensor([0, 0, 1, 1])
    wider = torch.cat([belief - 0.005, torch.full((4, 1), 0.01)], dim=1)
    torch.testing.assert_close(scores.balanced_margin(wider, given), scores.balanced_margin(belief, given))


def test_the_most_suspicious_come_first_and_ties_keep_their_order():
    assert scores.ranking(torch.tensor([0.5, 0.1, 0.5, 0.1])).tolist() == [1, 3, 0, 2]


def test_detection_counts_pairs_and_the_first_k():
    score, wrong = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([True, False, True, False, False])
    found = scores.detection(score, wrong, at=[1, 4, 99])
    assert found["auroc"] == pytest.approx(5 / 6)  # of six pairs one is in the wrong order
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert found["precision_at"] == {"1": 1.0, "2": 0.5, "4": 0.5}
    line = scores.precision_recall(score, wrong, points=3)
    assert line == {"recall": [0.0, 0.5, 1.0], "precision": [1.0, 1.0, pytest.approx(2 / 3)]}


def test_without_wrong_labels_there_is_nothing_to_detect():
    score, wrong = np.array([0.1, 0.2]), np.array([False, False])
    assert scores.detection(score, wrong, at=[1]) == {
        "auroc": None,
        "average_precision": None,
        "precision_at": {},
    }
    assert scores.precision_recall(score, wrong) is None


def test_precision_at_low_recall_is_that_of_the_first_samples():
    wrong = np.array([False, False, True, True])
    curve = scores.precision_recall(np.array([0.1, 0.2, 0.3, 0.4]), wrong)
    assert curve["precision"][0] == 0.5  # not one: the first two are right


def test_a_set_is_judged_by_its_hits():
    flagged, wrong = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert scores.flagged_quality(flagged, wrong) == {
        "size": 2,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
    }
    nothing = scores.flagged_quality(np.zeros(2, bool), np.zeros(2, bool))
    assert nothing == {"size": 0, "precision": None, "recall": None, "f1": None}


def test_the_table_has_one_line_a_sample_from_the_most_suspicious_on():
    truth, classes = torch.tensor([0, 1, 2, 1]), ("cat", "dog", "a, b")
    score = scores.margin(BELIEF, GIVEN)
    rows = scores.audit_rows(BELIEF, GIVEN, score, torch.tensor([5, 6, 7, 9]), classes, truth)
    read = list(csv.DictReader(io.StringIO(scores.as_csv(rows))))
    assert [line["index"] for line in read] == ["2", "1", "3", "0"]
    first = read[0]
    assert (first["source_position"], first["given"], first["believed"]) == ("7", "cat", "a, b")
    assert (first["true"], first["wrong"], first["confidence"]) == ("a, b", "1", "0.9")
    assert [line["wrong"] for line in read] == ["1", "1", "0", "0"]


def test_confident_learning_finds_planted_errors():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    belief = (4 * torch.eye(3)[truth] + torch.randn(300, 3, generator=generator)).softmax(dim=1)
    given = truth.clone()
    given[:30] = (truth[:30] + 1) % 3
    wrong = (given != truth).numpy()
    for one in (
        *scores.confident_learning(belief, given, "memory"),
        *scores.own_rankings(belief, given, "memory"),
    ):
        assert scores.detection(one.score, wrong, at=[])["auroc"] > 0.98, one.name
        assert scores.flagged_quality(one.flagged, wrong)["f1"] > 0.8, one.name
