"""Networks that a step of training would fail on, or silently train in another way than it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.data import Resident
from softdefend.execution.engine import Engine
from softdefend.execution.network_mode import frozen
from softdefend.training.config import Recipe
from softdefend.training.optim import OptimSettings


def check_smallest_batch(
    net: nn.Module, data: Resident, recipe: Recipe, optim: OptimSettings, engine: Engine
) -> None:
    """Refuse batches of one image that the network cannot be trained on: batch normalization needs more
    values than one of each channel.

    Raises:
        SettingError: it is tried, and fails; the network is left as it was.
    """
    left = 0 if optim.drop_last or data.has_extra else data.n % optim.batch_size
    size = engine.processes.size
    smallest = {batch: batch // optim.parts(batch) for batch in (optim.batch_size, left) if batch}
    alone = size in smallest.values()
    if not alone or not _sees_single_images(recipe, optim.epochs):
        return
    image = torch.zeros(1, *data.image_shape, device=engine.device)
    try:
        with _unchanged(net), frozen(net, "train"), torch.no_grad(), engine.autocast():
            net(image)
    except Exception as error:  # a network's own code may fail in any way
        why = "on one image the network cannot be trained " + f"({error})".replace("\n", " ")[:200]
        if smallest[optim.batch_size] == size < optim.batch_size:
            raise SettingError("optim.accumulate", f"{optim.accumulate}: {why}", "fewer parts") from error
        if optim.batch_size == size:
            raise SettingError("optim.batch_size", f"{size}: {why}", f"{2 * size} or more") from error
        last = "the last of one" if size == 1 else f"the last of one in each of {size} processes"
        given = f"false with {data.n} images in batches of {optim.batch_size}, {last}: {why}"
        raise SettingError("optim.drop_last", given, "true, or another optim.batch_size") from error


def check_script(net: nn.Module, data: Resident, recipe: Recipe, epochs: int) -> None:
    """Refuse a TorchScript network whose batch normalization does not stand as the recipe asks: its constants
    cannot be changed.

    Raises:
        SettingError: naming what cannot be done.
    """
    modules = [module for module in net.modules() if isinstance(module, torch.jit.ScriptModule)]
    if not any(getattr(module, "running_mean", None) is not None for module in modules):
        return
    phases = {recipe.label.phase(epoch) for epoch in range(epochs)}
    clean = any(map(recipe.label.needs_clean, phases)) and recipe.label.clean_bn == "batch"
    uses = {"attack_bn batch": recipe.attack_bn == "batch", "label.clean_bn batch": clean}
    uses[f"{type(recipe.weight).__name__}, which looks at a batch twice"] = recipe.weight.passes > 1
    for use, asked in uses.items():
        if asked:
            raise _unfit(f"whose batch normalization cannot leave its statistics alone, with {use}")
    image = torch.zeros(2, *data.image_shape, device=data.labels.device)
    with _unchanged(net) as before, frozen(net, "eval"), torch.no_grad():
        net(image)
        moved = any(not torch.equal(now, then) for now, then in zip(net.buffers(), before, strict=True))
    if moved:
        raise _unfit("traced in train mode, whose batch normalization has no evaluation mode")


def draws_numbers(net: nn.Module, data: Resident, engine: Engine) -> bool:
    """Whether a forward in training mode draws random numbers, as dropout does."""

    def state() -> Tensor:
        return torch.cuda.get_rng_state(engine.device) if image.is_cuda else torch.get_rng_state()

    image = torch.zeros(2, *data.image_shape, device=engine.device)
    with _unchanged(net), frozen(net, "train"), torch.no_grad(), engine.autocast():
        before = state()
        net(image)
        return not torch.equal(before, state())


def _unfit(what: str) -> SettingError:
    return SettingError("net", f"a TorchScript network {what}", "the torch.nn.Module that it was made from")


def _sees_single_images(recipe: Recipe, epochs: int) -> bool:
    """Whether a forward in training mode is made of one image where a batch has one: with several views in
    one forward only the label rule's."""
    label, objective = recipe.label, recipe.objective
    phases = {label.phase(epoch) for epoch in range(epochs)}
    clean = label.clean_bn != "eval" and any(map(label.needs_clean, phases))
    return objective.views == 1 or not objective.joins_views or clean


@contextlib.contextmanager
def _unchanged(net: nn.Module) -> Iterator[list[Tensor]]:
    """Put buffers and torch's random state back as they were; gives copies of the buffers."""
    before = [buffer.clone() for buffer in net.buffers()]
    devices = {buffer.device for buffer in (*net.buffers(), *net.parameters()) if buffer.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield before
        finally:
            with torch.no_grad():
                for buffer, value in zip(net.buffers(), before, strict=True):
                    buffer.copy_(value)
