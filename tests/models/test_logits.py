from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.models.logits import check_logits


class Returns(nn.Module):
    """A network that returns what a function makes of good logits."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(3 * 4 * 4, 5), change

    def forward(self, image: Tensor) -> object:
        return self.change(self.linear(image.flatten(1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z,
        lambda z: z.log_softmax(1),  # a shift of the logits: as good as they are
        lambda z: z.bfloat16(),
        lambda z: torch.zeros_like(z),
        lambda z: torch.full_like(z, 0.5),  # in [0, 1], but rows do not sum to one
    ],
)
def test_logits_pass(change) -> None:
    check_logits(Returns(change), (3, 4, 4), 5, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.softmax(1), "returns probabilities"),
        (lambda z: z.softmax(1).bfloat16().float(), "returns probabilities"),
        (lambda z: z[:, :4], r"shape \[2, 4\]"),
        (lambda z: z[:1], r"shape \[1, 5\]"),
        (lambda z: z[:, :, None], r"shape \[2, 5, 1\]"),
        (lambda z: z * float("nan"), "NaN or infinity"),
        (lambda z: z + float("inf"), "NaN or infinity"),
        (lambda z: z.long(), "int64"),
        (lambda z: (z, z), "tuple"),
    ],
)
def test_other_outputs_are_refused(change, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_logits(Returns(change), (3, 4, 4), 5, "cpu")


def test_network_for_another_image_size_is_refused_in_one_line() -> None:
    with pytest.raises(SettingError, match=r"fails on a forward pass .*\[2, 1, 4, 4\] to .*logits") as caught:
        check_logits(Returns(lambda z: z), (1, 4, 4), 5, "cpu")
    assert "\n" not in str(caught.value)


def test_network_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 5))
    net.train()
    net[1].eval()  # a user may freeze one layer
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_logits(net, (1, 4, 4), 5, "cpu")
    assert [module.training for module in net] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_mode_is_restored_after_a_refusal_too() -> None:
    net = Returns(lambda z: z).train()
    with pytest.raises(SettingError):
        check_logits(net, (1, 4, 4), 5, "cpu")
    assert net.training


def test_the_forward_runs_in_eval_mode() -> None:
    modes: list[bool] = []
    net = Returns(lambda z: modes.append(net.training) or z)
    check_logits(net, (3, 4, 4), 5, "cpu")
    assert modes == [False]


def test_number_of_classes_may_be_left_to_the_network() -> None:
    net = Returns(lambda z: z)
    check_logits(net, (3, 4, 4), None, "cpu", least=5)
    with pytest.raises(SettingError, match=r"shape \[2, 5\]; .*logits \[2, 6 or more\]"):
        check_logits(net, (3, 4, 4), None, "cpu", least=6)
