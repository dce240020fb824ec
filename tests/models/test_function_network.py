"""What may be given as a network, and what may not."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.models.network import FunctionNetwork, as_network, check_parameters, check_state

MODULE_OF_THE_FILE = nn.Linear(2, 3)


def by_a_global(image: Tensor) -> Tensor:
    return MODULE_OF_THE_FILE(image)


def calls_another(image: Tensor) -> Tensor:
    return by_a_global(image)


class Caller:
    def __init__(self, net: nn.Module) -> None:
        self.parts = [net]

    def __call__(self, image: Tensor) -> Tensor:
        return self.parts[0](image)


def closure(net: nn.Module):
    return lambda image: net(image)


def test_a_module_is_itself_and_its_forward_too():
    net = nn.Linear(2, 3)
    assert as_network(net) is net
    assert as_network(net.forward) is net
    assert as_network(net.__call__) is net


@pytest.mark.parametrize(
    "wrap",
    [
        closure,
        Caller,
        lambda net: Caller(net).__call__,
        lambda net: functools.partial(lambda other, image: other(image), net),
        lambda net: functools.partial(lambda image, other: other(image), other=net),
        lambda net: functools.partial(Caller(net)),
    ],
    ids=["closure", "object", "method", "partial", "keyword", "partial of an object"],
)
def test_modules_that_a_function_keeps_become_the_networks_own(wrap):
    net, image = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), torch.rand(4, 2)
    made = as_network(wrap(net))
    assert isinstance(made, FunctionNetwork)
    assert {id(p) for p in made.parameters()} == {id(p) for p in net.parameters()}
    made.eval()
    assert not net.training
    assert torch.equal(made(image), net(image))


def test_modules_of_the_file_are_found_through_what_is_called():
    for function in (by_a_global, calls_another):
        assert [id(p) for p in as_network(function).parameters()] == [
            id(p) for p in MODULE_OF_THE_FILE.parameters()
        ]


def test_a_function_without_modules_is_a_network_too():
    made = as_network(torch.square)
    assert list(made.parameters()) == []
    assert torch.equal(made(torch.tensor([3.0])), torch.tensor([9.0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Linear, r"the class Linear; accepted: an object of it, as Linear\(\)"),
        (nn.Linear(2, 2).state_dict(), "OrderedDict, perhaps of weights; .*load_state_dict"),
        ("resnet18", "'resnet18'; accepted: a torch.nn.Module, or a function"),
        (None, "None; accepted"),
        (SimpleNamespace(), "a SimpleNamespace; accepted"),
    ],
    ids=["class", "weights", "text", "none", "object"],
)
def test_other_things_are_refused(given, words):
    with pytest.raises(SettingError, match=f"net: got (a )?{words}"):
        as_network(given)


def test_parameters_and_buffers_must_be_plain():
    for name in ("weight", "bias"):
        net = nn.Linear(2, 3)
        setattr(net, name, nn.Parameter(getattr(net, name).detach().to("meta")))
        with pytest.raises(SettingError, match=f"whose {name} is a tensor on the meta device"):
            check_parameters(net)
    net = nn.BatchNorm1d(2)
    with torch.inference_mode():
        net.running_mean = torch.zeros(2)
    with pytest.raises(SettingError, match="whose running_mean was made in inference mode"):
        check_parameters(net)
    check_parameters(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)))


def test_frozen_torchscript_has_no_mode():
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 3))).eval())
    for net, words in ((frozen, "got frozen TorchScript"), (nn.Sequential(frozen), "whose 0 is frozen")):
        with pytest.raises(SettingError, match=words):
            check_parameters(net)
    check_parameters(as_network(frozen))


def test_state_must_be_tensors():
    class Counted(nn.Linear):
        extra: object = {"calls": 1}

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    net = Counted(2, 2)
    with pytest.raises(SettingError, match="whose state has _extra_state, a dict"):
        check_state(net)
    net.extra = torch.tensor(1)
    check_state(net)
