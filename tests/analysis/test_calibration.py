from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import brier_score_loss, log_loss

from softdefend.analysis import calibration, human_labels
from softdefend.analysis.runs import open_runs
from softdefend.core.errors import SettingError

BINS = 7


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probability = (2 * torch.randn(200, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return probability, torch.randint(0, 4, (200,), generator=generator)


def test_ece_and_reliability_are_those_of_a_loop_over_bins(rows):
    probability, label = rows
    confidence, said = probability.numpy().max(axis=1), probability.numpy().argmax(axis=1)
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        members = (confidence > low) & (confidence <= low + 1 / BINS)
        if members.any():
            right = (said == label.numpy())[members].mean()
            expected += members.mean() * abs(confidence[members].mean() - right)
    assert calibration.expected_calibration_error(probability, label, BINS) == pytest.approx(
        expected, abs=1e-6
    )
    bars = calibration.reliability(probability, label, BINS)
    again = sum(bar["count"] * abs(bar["confidence"] - bar["accuracy"]) for bar in bars) / len(label)
    assert again == pytest.approx(expected, abs=1e-9)


def test_adaptive_bins_hold_equally_many(rows):
    probability, label = rows
    order = np.argsort(probability.numpy().max(axis=1), kind="stable")
    expected = 0.0
    for part in np.array_split(order, BINS):
        confidence = probability.numpy()[part].max(axis=1).mean()
        accuracy = (probability.numpy()[part].argmax(axis=1) == label.numpy()[part]).mean()
        expected += len(part) / 200 * abs(confidence - accuracy)
    assert calibration.adaptive_calibration_error(probability, label, BINS) == pytest.approx(expected)


def test_a_network_that_is_as_right_as_it_is_sure_is_calibrated():
    probability = torch.tensor([[0.75, 0.25]] * 8)
    label = torch.tensor([0, 0, 0, 1] * 2)
    assert calibration.expected_calibration_error(probability, label, 10) == pytest.approx(0, abs=1e-7)
    assert calibration.adaptive_calibration_error(probability, label, 2) == pytest.approx(0, abs=1e-7)


def test_the_order_of_equal_confidences_changes_nothing():
    """A constant prediction that is right as often as it says, images in the order of their classes."""
    probability = torch.tensor([[0.55, 0.45]] * 1000)
    label = (torch.arange(1000) >= 550).long()
    assert calibration.adaptive_calibration_error(probability, label, 15) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("top", [1.0, 0.6, 1 + 1e-6])
def test_bars_and_error_have_the_same_bins_on_their_edges(top):
    """Confidences on an edge of a bin, or above one by rounding."""
    confidence = torch.tensor([top] * 5 + [0.97] * 5 + [0.4] * 2)
    probability = torch.stack([confidence, 1 - confidence], dim=1)
    probability[-2:] = torch.tensor([0.2, 0.8])
    label = torch.tensor([0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
    bars = calibration.reliability(probability, label, 5)
    assert sum(bar["count"] for bar in bars) == 12
    again = sum(bar["count"] * abs(bar["confidence"] - bar["accuracy"]) for bar in bars) / 12
    assert calibration.expected_calibration_error(probability, label, 5) == pytest.approx(again, abs=2e-6)


def test_nll_is_sklearns_and_brier_its_two_class_value_for_both_classes(rows):
    probability, label = rows
    ours = calibration.negative_log_likelihood(probability, label)
    assert ours == pytest.approx(log_loss(label.numpy(), probability.numpy()))
    two = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]], dtype=torch.float64)
    theirs = 2 * brier_score_loss([1, 1, 0], two[:, 1].numpy())
    assert calibration.brier(two, torch.tensor([1, 1, 0])) == pytest.approx(theirs)


def test_entropy_and_divergence_are_scipys(rows):
    p, q = rows[0][:100], rows[0][100:]
    p[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(calibration.entropy(p), stats.entropy(p.numpy(), axis=1), atol=1e-12)
    np.testing.assert_allclose(
        calibration.divergence(p, q), stats.entropy(p.numpy(), q.numpy(), axis=1), atol=1e-9
    )


def test_total_variation_is_the_mass_that_must_move():
    a, b = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert calibration.total_variation(a, b).item() == pytest.approx(0.3)
    assert calibration.total_variation(a, a).item() == 0


def test_agreement_with_people_counts_ties_for_us():
    human = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    ours = torch.tensor([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]], dtype=torch.float64)
    found = calibration.compare_with_people(ours, human)
    assert found["agreement"] == pytest.approx(2 / 3)
    theirs = stats.spearmanr(
        stats.entropy(ours.numpy(), axis=1), stats.entropy(human.numpy(), axis=1)
    ).statistic
    assert found["entropy_rank_correlation"] == pytest.approx(theirs)


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """Three annotators of the digits: one right, one of them always one too high, one always right."""
    label = load_digits().target
    path = tmp_path / "votes.npz"
    np.savez(path, a=label, b=(label + 1) % 10, c=label, short=label[:50], floats=label / 2)
    return path


def test_votes_in_the_sources_order_reach_the_training_images(refined, votes):
    (run,) = open_runs([str(refined)], torch.device("cpu"))
    people = human_labels.read_human_labels(run, str(votes), ("a", "b", "c"), None)
    truth = run.bundle.train.clean_labels
    expected = (2 * torch.eye(10)[truth] + torch.eye(10)[(truth + 1) % 10]) / 3
    torch.testing.assert_close(people.train.float(), expected)


def test_three_votes_agree_with_cifar_10ns_own_aggregate():
    """CIFAR-10N's aggregate label is the majority of its three random ones, where there is one."""
    folder = Path(os.environ.get("SOFTDEFEND_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "cifar10-jpeg" / "cifar10n.npz"
    if not path.is_file():
        pytest.skip(f"no real data: {path} does not exist (set SOFTDEFEND_DATA)")
    keys = ("random_label1", "random_label2", "random_label3")
    arrays = human_labels._arrays("--train_votes", str(path), (*keys, "aggre_label"))
    labels = [human_labels._votes(str(path), key, arrays[key], 50_000, 10) for key in keys]
    human = human_labels.distribution(labels, 10)
    torch.testing.assert_close(human.sum(dim=1), torch.ones(50_000, dtype=torch.float64))
    majority = human.amax(dim=1) > 0.5
    assert majority.double().mean() > 0.9
    assert np.array_equal(human.argmax(dim=1)[majority], arrays["aggre_label"][majority.numpy()])


def test_counts_become_shares_of_the_test_images(refined, tmp_path):
    (run,) = open_runs([str(refined)], torch.device("cpu"))
    counts = np.random.default_rng(0).integers(1, 9, (len(run.bundle.test), 10))
    np.savez(tmp_path / "counts.npz", counts=counts)
    people = human_labels.read_human_labels(run, None, (), str(tmp_path / "counts.npz"))
    np.testing.assert_allclose(people.test, counts / counts.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("keys", "given"),
    [(("a", "nope"), "without nope"), (("short",), "short int64"), (("floats",), "float64")],
)
def test_votes_that_do_not_fit_are_refused(refined, votes, keys, given):
    (run,) = open_runs([str(refined)], torch.device("cpu"))
    with pytest.raises(SettingError, match="--train_votes") as caught:
        human_labels.read_human_labels(run, str(votes), keys, None)
    assert given in str(caught.value)


def test_files_that_are_no_votes_are_refused(refined, tmp_path):
    (run,) = open_runs([str(refined)], torch.device("cpu"))
    with pytest.raises(SettingError, match=r"an existing \.npz file"):
        human_labels.read_human_labels(run, None, (), str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(SettingError, match="plain integer arrays"):
        human_labels.read_human_labels(run, None, (), str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", counts=np.ones((5, 10), np.int64))
    with pytest.raises(SettingError, match="a vote in each row"):
        human_labels.read_human_labels(run, None, (), str(tmp_path / "other.npz"))
