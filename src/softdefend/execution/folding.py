"""A network's copy for evaluation mode in which convolutions have taken in the normalization behind them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from softdefend.execution.batch_norm import class_of

_KNOWN = ("torch.nn.", "softdefend.models.")
"""Where classes of layers come from whose evaluation-mode forward is known to be the same at every call."""


class Pair(NamedTuple):
    """A convolution and the normalization of its output, which nothing else uses."""

    name: str
    """Of the convolution in the network."""
    conv: nn.Conv2d
    norm: nn.BatchNorm2d


class FoldedCopy:
    """A copy of a network that computes the same in evaluation mode, up to rounding, with fewer layers.

    Nothing is folded in networks with layers of other packages, with hooks, or with a forward that
    :mod:`torch.fx` cannot follow: the copy is then a plain one.

    Args:
        net: in evaluation mode; it may change, :meth:`refresh` takes that over.
        fold: whether to; a plain copy otherwise.

    Attributes:
        net: the copy.
        pairs: what was folded.
    """

    def __init__(self, net: nn.Module, *, fold: bool = True) -> None:
        self._source = net
        self.net: nn.Module = copy.deepcopy(net).eval()
        self.pairs: list[Pair] = []
        if fold and _is_known(net):
            try:
                self._fold(fx.symbolic_trace(self.net))
            except (fx.proxy.TraceError, TypeError, ValueError):
                self.pairs = []
        for pair in self.pairs:
            conv = self.net.get_submodule(pair.name)
            assert isinstance(conv, nn.Conv2d)
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), requires_grad=False)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the network's weights and statistics as they are now, in place."""
        folded = {pair.name for pair in self.pairs}
        source = {**dict(self._source.named_parameters()), **dict(self._source.named_buffers())}
        for name, own in (*self.net.named_parameters(), *self.net.named_buffers()):
            if name.rpartition(".")[0] not in folded:
                own.copy_(source[name])
        for name, conv, norm in self.pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            mine = self.net.get_submodule(name)
            assert isinstance(mine, nn.Conv2d)
            assert mine.bias is not None
            mine.weight.copy_(weight)
            mine.bias.copy_(bias)

    def _fold(self, traced: fx.GraphModule) -> None:
        layers = dict(self._source.named_modules())
        calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        for node in list(traced.graph.nodes):
            before = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
                continue
            conv, norm = layers[str(before.target)], layers[str(node.target)]
            single = calls.count(before.target) == 1 and calls.count(node.target) == 1
            # Synchronized normalization is plain in evaluation mode.
            if type(conv) is nn.Conv2d and class_of(norm) is nn.BatchNorm2d and single:
                if norm.running_mean is None:
                    continue
                self.pairs.append(Pair(str(before.target), conv, norm))
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
        traced.delete_all_unused_submodules()
        traced.recompile()
        self.net = traced


def _is_known(net: nn.Module) -> bool:
    """Whether every layer is of a known class, without hooks or computed weights."""
    for module in net.modules():
        if not (type(module).__module__ + ".").startswith(_KNOWN):
            return False
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
            return False
    return True
