"""Same verdict as AutoAttack's reference implementation, image by image, run from a local checkout of it.

Set SOFTDEFEND_AUTOATTACK to the root of a checkout of github.com/fra31/auto-attack.
"""

import os

import pytest
import torch
from torch import nn

from softdefend.attacks import FAB, PGD, Square, cross_entropy, margin
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import DataSettings, Resident, load
from softdefend.execution.network_mode import frozen
from softdefend.models.small_cnn import SmallCNN

CHECKOUT = os.environ.get("SOFTDEFEND_AUTOATTACK")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="SOFTDEFEND_AUTOATTACK names no checkout of fra31/auto-attack"),
]
NETS = ["robust", "plain", "untrained"]
QUERIES = 300
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Residual(nn.Module):
    """A stem, one residual block and a linear layer, without training."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8))
        self.linear = nn.Linear(512, 10)

    def forward(self, image):
        kept = self.stem(image).relu()
        return self.linear((kept + self.outer(self.inner(kept).relu())).relu().flatten(1))


def trained(data, threat):
    """A small CNN after 8 epochs on digits, against PGD-3 where a threat is given."""
    net, draws = SmallCNN(10, 1, width=8), stream(0, "order")
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(8):
        for index in torch.randperm(data.n, generator=draws).split(64):
            batch = data.take(index)
            image = batch.image
            if threat is not None:
                with frozen(net, "eval"):
                    image = PGD(steps=3)(net, image, batch.label, threat, generator=draws)
            optimizer.zero_grad()
            cross_entropy(net(image), batch.label).mean().backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cases():
    """A network, 100 images and labels, and a threat; the untrained one is right by definition."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bundle = load(DataSettings(validation=100, train_size=800))
    data, test = Resident(bundle.train, "cpu"), Resident(bundle.test, "cpu")
    batch = test.take(torch.arange(100))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = {
            ("linf", "robust"): trained(data, ThreatModel("linf", Budget(0.15))),
            ("l2", "robust"): trained(data, ThreatModel("l2", Budget(0.8))),
            ("l1", "robust"): trained(data, ThreatModel("l1", Budget(2))),
            "plain": trained(data, None),
            "untrained": Residual().requires_grad_(False),
        }

    def case(norm, name):
        net = nets[(norm, name) if name == "robust" else name].float()
        label = net(batch.image).argmax(1) if name == "untrained" else batch.label
        # Near the median of the distances, so that about half of them fall.
        distance = FAB(steps=10, targets=2).minimal(net, batch.image, label, norm)[1]
        return net, batch.image, label, ThreatModel(norm, Budget(1.2 * distance.median().item()))

    yield case
    torch.set_num_threads(threads)


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT)
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    return SquareAttack, FABAttack_PT


class Counted:
    def __init__(self, net):
        self.net, self.forwards = net, 0

    def __call__(self, image):
        self.forwards += len(image)
        return self.net(image)


def compare(name, net, image, label, theirs, ours):
    """Equal flags, and both verdicts seen; a difference is reported with the margins behind it."""
    flags = [net(x).argmax(1) != label for x in (theirs, ours)]
    margins = [margin(net(x), label) for x in (theirs, ours)]
    differ = (flags[0] != flags[1]).nonzero().flatten().tolist()
    assert not differ, {i: (margins[0][i].item(), margins[1][i].item()) for i in differ}
    new = (flags[0] & (net(image).argmax(1) == label)).sum().item()
    print(f"{name}: {len(label)} images, all flags equal, {new} fooled by both")
    assert len(label) * 0.05 <= new <= len(label) * 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square(cases, reference, monkeypatch, norm, name, dtype):
    net, image, label, threat = cases(norm, name)
    net, image = net.to(dtype), image.to(dtype)
    theirs, ours = Counted(net), Counted(net)
    attack = reference[0](
        theirs,
        norm=NORMS[norm],
        n_queries=QUERIES,
        eps=float(threat.eps),
        seed=11,
        resc_schedule=False,
        device="cpu",
    )
    found = Square(queries=QUERIES)(ours, image, label, threat, generator=torch.Generator().manual_seed(11))
    # The reference's projection casts to float32.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))
    with torch.random.fork_rng():
        expected = attack.perturb(image, label)
    compare(f"square {norm} {name} {dtype}", net, image, label, expected, found)
    # Images that fell wait for the end of their block.
    assert ours.forwards <= 1.05 * theirs.forwards


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab(cases, reference, monkeypatch, norm, name, dtype):
    net, image, label, threat = cases(norm, name)
    net, image, label = net.to(dtype), image[:20].to(dtype), label[:20]
    theirs, ours = Counted(net), Counted(net)
    attack = reference[1](
        theirs,
        norm=NORMS[norm],
        eps=float(threat.eps),
        n_iter=100,
        targeted=True,
        n_target_classes=9,
        seed=0,
        device="cpu",
    )
    found = FAB()(ours, image, label, threat)
    # The reference casts to float32 by Tensor.float and by the default type.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            expected = attack.perturb(image, label)
            attack.target_class = 2
            expected_closest = attack.attack_single_run(image, label, is_targeted=True)
    finally:
        torch.set_default_dtype(torch.float32)
    compare(f"fab-t {norm} {name} {dtype}", net, image, label, expected, found)
    assert ours.forwards < theirs.forwards
    if dtype == torch.float64:
        closest, distance = FAB(targets=1).minimal(net, image, label, norm)
        torch.testing.assert_close(closest, expected_closest, atol=1e-7, rtol=0)
        assert distance.isfinite().all()
