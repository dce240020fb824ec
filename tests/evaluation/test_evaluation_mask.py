"""Evaluations in which only some values may change."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import softdefend as sd
from softdefend.attacks import FGSM
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Ensemble, Evaluator
from softdefend.evaluation.mask import check_mask, read_mask

N, SHAPE = 23, (2, 5, 6)
PIXELS = torch.zeros(5, 6, dtype=torch.bool)
PIXELS[1:4, 2:] = True
EACH = torch.rand(N, *SHAPE, generator=stream(1, "m")) < 0.5
ATTACKS = ("pgd-5", "pgd-2x2", "apgd-ce-10", "apgd-t-6", "fab-t-5", "fmn-10", "square-30", "hop-skip-jump-80")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(60, 16), nn.Tanh(), nn.Linear(16, 4))


NET = network()
IMAGE = torch.rand(N, *SHAPE, generator=stream(0, "x"))
LABEL = NET(IMAGE).argmax(1)
LABEL[::6] = (LABEL[::6] + 1) % 4
INDEX = torch.randperm(N, generator=stream(0, "i"))[:20]


@pytest.mark.parametrize("mask", [PIXELS, EACH[3], EACH], ids=["pixels", "values", "each"])
def test_only_what_may_change_changes_whatever_the_batches(mask):
    data, threat = Resident(split(IMAGE, LABEL), "cpu"), ThreatModel("linf", "0.4")
    members = tuple(parse_attack(name) for name in ATTACKS)
    attacks = [*members, Ensemble("all", members[2:5]), FGSM()]
    evaluator = Evaluator(NET, data, threat, batch_size=7, microbatch=5, mask=mask, keep_images=True)
    result = evaluator(attacks, index=INDEX)
    own = mask[INDEX] if mask.ndim == 4 else mask.expand(20, *SHAPE)
    share = float(own.float().mean())
    assert result.to_dict()["may_change"] == pytest.approx(share)
    assert f"{100 * share:.1f}% of the values may change" in str(result)
    for record in result.attacks.values():
        made = torch.where(record.attacked.view(-1, 1, 1, 1), record.adversarial, IMAGE[INDEX])
        assert torch.equal(made[~own], IMAGE[INDEX][~own])
        assert not torch.equal(made[own], IMAGE[INDEX][own])
        right = (NET(made).argmax(1) == LABEL[INDEX]) & (NET(IMAGE[INDEX]).argmax(1) == LABEL[INDEX])
        assert torch.equal(record.robust, right)
    step = FGSM()(NET, IMAGE[INDEX], LABEL[INDEX], threat, mask=own)
    assert torch.equal(result.attacks["fgsm"].prediction, NET(step).argmax(1))


def test_python_takes_a_mask_and_finds_less_with_it():
    small = {"threat": ThreatModel("linf", "0.2"), "attacks": ["pgd-10"], "device": "cpu"}
    free, masked = (sd.evaluate(NET, IMAGE, LABEL, mask=mask, **small) for mask in (None, PIXELS))
    assert int(free.worst.sum()) < int(masked.worst.sum())
    with pytest.raises(SettingError, match=r"^evaluate\.mask: got float32 \[5, 6\]"):
        sd.evaluate(NET, IMAGE, LABEL, mask=PIXELS.float(), **small)


def test_files_of_three_kinds_say_the_same(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS.numpy())
    np.save(tmp_path / "b.npy", PIXELS.to(torch.int64).numpy())
    save_file({"any": PIXELS.to(torch.uint8)}, tmp_path / "c.safetensors")
    save_file({"mask": PIXELS, "other": torch.zeros(2)}, tmp_path / "d.safetensors")
    gray = np.where(PIXELS, np.arange(1, 31, dtype=np.uint8).reshape(5, 6), 0).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "e.png")
    blue = np.zeros((5, 6, 3), np.uint8)
    blue[..., 2] = np.where(PIXELS, 1, 0)  # its gray is black
    Image.fromarray(blue).save(tmp_path / "f.png")
    for path in tmp_path.iterdir():
        assert torch.equal(read_mask(path), PIXELS), path


def test_files_that_are_no_mask_are_refused(tmp_path):
    np.save(tmp_path / "two.npy", np.full((5, 6), 2))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    (tmp_path / "short.npy").write_bytes(buffer.getvalue())
    save_file({"a": PIXELS, "b": PIXELS.clone()}, tmp_path / "several.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    for name in ("bad.npy", "bad.safetensors", "bad.png", "bad.txt"):
        (tmp_path / name).write_bytes(b"no mask")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.npy", tmp_path]:
        with pytest.raises(SettingError) as caught:
            read_mask(path)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.setting == "--mask"
        assert ("several tensors" in str(caught.value)) == (path.name == "several.safetensors")


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (torch.ones(6, 5, dtype=torch.bool), r"bool \[6, 5\]"),
        (torch.ones(22, *SHAPE, dtype=torch.bool), r"bool \[22, 2, 5, 6\].*\[23, 2, 5, 6\]"),
        (torch.zeros(5, 6, dtype=torch.bool), "without a value that may change"),
    ],
    ids=["turned", "fewer", "nothing"],
)
def test_a_mask_that_does_not_fit_is_refused(mask, word):
    with pytest.raises(SettingError, match=f"^--mask: got .*{word}"):
        check_mask(mask, N, SHAPE)
