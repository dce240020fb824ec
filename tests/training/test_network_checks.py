"""Batches of one image, and TorchScript networks: trained as any others, or refused before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softdefend import ADR, AWP, DAJAT, EMA, KD, PGDAT, SGLR, SWA, TRADES, Consistency, Hard, OptimSettings
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import Extra, Split, from_tensors
from softdefend.training import SaveSettings
from softdefend.weights import Plain
from tiny import K, tiny_net


def single_values() -> nn.Module:
    """Batch normalization over one value of each channel and image."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, K))


@pytest.fixture
def seventeen():
    """17 training images: the last batch of 16 has one."""
    images = torch.rand(33, 1, 6, 6, generator=stream(0, "seventeen"))
    return from_tensors(images, torch.arange(33) % K, validation=8, test_fraction=0.25)


def optim(size=16, drop_last=False):
    return OptimSettings(epochs=2, batch_size=size, lr=0.05, drop_last=drop_last)


@pytest.mark.parametrize("objective", [PGDAT(), TRADES(), DAJAT()], ids=["pgd-at", "trades", "dajat"])
def test_a_last_batch_of_one_is_refused_before_the_folder_is_made(
    make_trainer, seventeen, tmp_path, objective
):
    net = single_values()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(SettingError) as caught:
        make_trainer(Hard(), objective, net=net, data=seventeen, optim=optim())
    said = str(caught.value)
    assert said.startswith("optim.drop_last: got false with 17 images in batches of 16, the last of one: ")
    assert said.endswith("; accepted: true, or another optim.batch_size")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net[2].training


def test_batches_of_one_are_refused(make_trainer):
    with pytest.raises(SettingError, match=r"^optim\.batch_size: got 1: .*; accepted: 2 or more$"):
        make_trainer(Hard(), PGDAT(), net=single_values(), optim=optim(1, drop_last=True))


def test_uneven_parts_of_which_one_is_a_single_image_are_refused(make_trainer):
    settings = OptimSettings(epochs=1, batch_size=5, lr=0.05, accumulate=4)  # parts of 2, 2 and 1
    with pytest.raises(SettingError, match=r"^optim\.accumulate: got 4: .*; accepted: fewer parts$"):
        make_trainer(Hard(), PGDAT(), net=single_values(), optim=settings)


def test_with_extra_images_all_batches_are_of_one_size(make_trainer, seventeen):
    more = Split(torch.rand(9, 1, 6, 6, generator=stream(0, "more")), torch.arange(9) % K)
    data = replace(seventeen, extra=Extra(more, 0.5))
    trainer = make_trainer(Hard(), PGDAT(), net=single_values(), data=data, optim=optim())
    trainer.fit()
    assert trainer.state.epoch == 2


@pytest.mark.parametrize(
    ("label", "objective", "net", "settings"),
    [
        (Hard(), PGDAT(), single_values, optim(drop_last=True)),
        (Hard(), PGDAT(), single_values, optim(size=15)),  # the last batch has two
        (Hard(), PGDAT(), tiny_net, optim()),  # its layers see 36 values of an image
        (Hard(), Consistency(), single_values, optim()),  # two views of the one image
        (SGLR(start=0.0, clean_bn="eval"), Consistency(), single_values, optim()),
    ],
    ids=["dropped", "two", "spatial", "views", "clean in eval mode"],
)
def test_what_can_be_trained_is(make_trainer, seventeen, label, objective, net, settings):
    trainer = make_trainer(label, objective, net=net(), data=seventeen, optim=settings)
    trainer.fit()
    assert trainer.state.epoch == 2


def test_a_label_rule_that_looks_at_the_first_view_alone_sees_one_image(make_trainer, seventeen):
    with pytest.raises(SettingError, match=r"optim\.drop_last"):
        make_trainer(SGLR(start=0.0), Consistency(), net=single_values(), data=seventeen, optim=optim())


# --- TorchScript --------------------------------------------------------------------------------------------


def without_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, K))


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, K))


def scripted(net: nn.Module) -> nn.Module:
    with torch.jit.optimized_execution(False):
        return torch.jit.script(net)


WEIGHT_RULES = [Plain, EMA, lambda: SWA(start=0.0), AWP, lambda: AWP(average=EMA())]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("weight", WEIGHT_RULES)
@pytest.mark.parametrize("label", [Hard, ADR, lambda: KD(robust=without_statistics())])
def test_a_scripted_network_is_trained_as_the_module_that_it_was_made_from(make_trainer, label, weight):
    saved = []
    for folder, wrap in (("module", lambda net: net), ("script", scripted)):
        settings = {"optim": optim(drop_last=True), "save": SaveSettings()}
        trainer = make_trainer(label(), PGDAT(), weight(), folder, net=wrap(without_statistics()), **settings)
        trainer.fit()
        saved.append([load_file(trainer.folder.path / f"{which}.safetensors") for which in ("best", "last")])
    for module, script in zip(*saved, strict=True):
        for name, value in module.items():
            torch.testing.assert_close(script[name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("weight", [Plain, EMA, lambda: SWA(start=0.0, bn="copy")])
def test_scripted_batch_normalization_is_trained_where_nothing_is_asked_of_it(make_trainer, weight):
    saved = []
    for folder, wrap in (("module", lambda net: net), ("script", scripted)):
        trainer = make_trainer(Hard(), PGDAT(), weight(), folder, net=wrap(with_statistics()))
        trainer.fit()
        saved.append(load_file(trainer.folder.path / "last.safetensors"))
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("label", "weight", "attack_bn", "said"),
    [
        (Hard, AWP, "eval", "net: got a TorchScript network .* with AWP"),
        (Hard, Plain, "batch", "net: got a TorchScript network .* with attack_bn batch"),
        (lambda: SGLR(clean_bn="batch"), Plain, "eval", "net: got .* with label.clean_bn batch"),
        (Hard, SWA, "eval", "weight.bn: got reestimate; accepted: copy"),
        (Hard, lambda: AWP(average=SWA()), "eval", "weight.bn: got reestimate"),
    ],
)
def test_what_scripted_batch_normalization_cannot_do_is_refused(
    make_trainer, tmp_path, label, weight, attack_bn, said
):
    with pytest.raises(SettingError, match=said):
        make_trainer(label(), PGDAT(), weight(), net=scripted(with_statistics()), attack_bn=attack_bn)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_made_in_train_mode_is_refused(make_trainer, tmp_path):
    """In evaluation mode it would go on normalizing by the batch."""
    net = torch.jit.trace(with_statistics(), torch.rand(2, 1, 6, 6))
    before = [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(SettingError, match="traced in train mode"):
        make_trainer(Hard(), PGDAT(), net=net)
    assert all(torch.equal(now, then) for now, then in zip(net.buffers(), before, strict=True))
    assert not (tmp_path / "run").exists()
