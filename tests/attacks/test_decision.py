"""Attacks by decisions alone: exact distances on linear networks, budgets, independence, resume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensemble_tools import rugged
from softdefend.attacks import HopSkipJump, SurFree
from softdefend.attacks.decision import DecisionAttack
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Evaluator
from softdefend.evaluation.resume import StateFile
from tiny import Killed

CPU = torch.device("cpu")
N = 16
IMAGE = 0.3 + 0.4 * torch.rand(N, 1, 4, 4, generator=stream(0, "image"))
CASES = [("hop-skip-jump", "l2"), ("hop-skip-jump", "linf"), ("surfree", "l2")]
each = pytest.mark.parametrize(("name", "norm"), CASES)


def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(2, 16, generator=stream(1, "weight")))
    net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net.eval()


def exact(net: nn.Sequential, norm: str) -> Tensor:
    across = net[1].weight[1] - net[1].weight[0]
    gap = net(IMAGE).diff(dim=1).flatten().abs()
    return gap / (across.norm() if norm == "l2" else across.abs().sum())


class Decides(nn.Module):
    """A network that names a class and nothing more, and counts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked, self.outside = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        self.outside += int(((x < 0) | (x > 1)).sum())
        with torch.no_grad():
            logits = self.net(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


@each
@pytest.mark.parametrize(("queries", "ratio"), [(500, 1.45), (1500, 1.12)])
def test_a_linear_networks_boundary_is_found(name, norm, queries, ratio):
    """In the inside of the box, the exact distance is known."""
    net, attack = linear(), parse_attack(f"{name}-{queries}")
    net = Decides(net)
    label = net(IMAGE).argmax(1)
    found, distance = attack.minimal(net, IMAGE, label, norm, generator=stream(0, "attack"))
    wanted = exact(net.net, norm)
    torch.testing.assert_close(distance, ThreatModel(norm, Budget("1")).distance(IMAGE, found))
    assert (net(found).argmax(1) != label).all()
    assert (distance >= wanted * (1 - 1e-5)).all()
    assert (distance <= wanted * ratio + 1e-4).all()
    assert net.outside == 0


@each
def test_no_image_asks_more_than_its_budget_and_every_query_is_counted(name, norm):
    net = Decides(rugged((1, 5, 5)).float())
    image = torch.rand(20, 1, 5, 5, generator=stream(0, "x"))
    label = net.net(image).argmax(1)
    label[:3] = (label[:3] + 1) % 5  # wrong without an attack
    data, threat = Resident(split(image, label), CPU), ThreatModel(norm, Budget("0.1"))
    attack = parse_attack(f"{name}-150")
    evaluator = Evaluator(net, data, threat, batch_size=7)
    evaluator([])
    clean, net.asked = net.asked, 0
    result = evaluator([attack])
    (trial,) = result.attacks[attack.name].trials.values()
    assert trial.total_forwards == int(trial.forwards.sum())
    assert trial.total_backwards == 0
    assert net.asked - clean == trial.total_forwards  # the queries, and one judgement of each image
    assert trial.forwards[:3].tolist() == [1, 1, 1]
    robust = result.attacks[attack.name].robust
    fooled = ~robust & (torch.arange(20) >= 3)
    assert 1 <= int(fooled.sum()) < 17
    assert int(trial.forwards.max()) == 151
    assert (trial.forwards[robust] == 151).all()
    assert (trial.forwards[fooled] < 151).any()


@each
def test_called_with_a_threat_nothing_leaves_it_and_an_image_is_left_once_it_is_there(name, norm):
    net = linear()
    label, wanted = net(IMAGE).argmax(1), exact(net, norm)
    threat = ThreatModel(norm, Budget(1.3 * float(wanted.median())))
    adversarial = parse_attack(f"{name}-800")(net, IMAGE, label, threat, generator=stream(0, "attack"))
    fooled = net(adversarial).argmax(1) != label
    assert (threat.distance(IMAGE, adversarial) <= threat.eps).all()
    assert torch.equal(adversarial[~fooled], IMAGE[~fooled])
    assert torch.equal(fooled[wanted > threat.eps], torch.zeros_like(fooled[wanted > threat.eps]))
    assert fooled[wanted < 0.8 * threat.eps].all()
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


@each
def test_nothing_is_spent_on_values_that_may_not_change(name, norm):
    """Twelve free values of 192: the exact distance is that of a network of them alone."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(2, 192, generator=stream(2, "weight")))
    net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    image = 0.4 + 0.2 * torch.rand(24, 3, 8, 8, generator=stream(3, "image"))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 3:5] = True
    across = (net[1].weight[1] - net[1].weight[0]).view(3, 8, 8)[:, mask].flatten()
    gap = net(image).diff(dim=1).flatten()
    wanted = gap.abs() / (across.norm() if norm == "l2" else across.abs().sum())
    inside = wanted * (across.abs().max() / across.norm() if norm == "l2" else 1) < 0.4  # of the box
    threat = ThreatModel(norm, Budget(float(wanted[inside].median())))
    attack = parse_attack(f"{name}-1000")
    label = (gap > 0).long()
    adversarial = attack(net, image, label, threat, mask=mask, generator=stream(0, "attack"))
    fooled = net(adversarial).argmax(1) != label
    near = inside & (wanted < 0.85 * threat.eps)
    assert 3 <= int(near.sum()) < int(inside.sum())
    assert fooled[near].all()
    assert not fooled[wanted > threat.eps].any()
    assert torch.equal(adversarial[..., ~mask], image[..., ~mask])


@each
def test_verdicts_depend_on_the_image_and_the_seed_alone(name, norm):
    net = rugged((1, 5, 5)).float()
    image = torch.rand(15, 1, 5, 5, generator=stream(0, "x"))
    data, threat = Resident(split(image, net(image).argmax(1)), CPU), ThreatModel(norm, Budget("0.08"))
    attack, order = parse_attack(f"{name}-120"), torch.randperm(15, generator=stream(0, "order"))

    def found(index: Tensor, **settings: int) -> list[tuple]:
        result = Evaluator(net, data, threat, **settings)([attack], index=index)
        record = result.attacks[attack.name]
        (trial,) = record.trials.values()
        rows = zip(index.tolist(), record.prediction.tolist(), trial.forwards.tolist(), strict=True)
        return sorted(rows)

    whole = found(torch.arange(15), batch_size=15)
    assert found(order, batch_size=4, microbatch=3) == whole
    assert found(torch.arange(15), batch_size=2, microbatch=8) == whole
    part = order[:5]
    assert found(part, batch_size=5) == sorted(row for row in whole if row[0] in part.tolist())
    assert found(torch.arange(15), batch_size=15, seed=1) != whole


@each
def test_killed_at_every_save_it_ends_in_the_same_records(name, norm, tmp_path, monkeypatch):
    net = Decides(rugged((1, 5, 5)).float())
    image = torch.rand(8, 1, 5, 5, generator=stream(0, "x"))
    data = Resident(split(image, net.net(image).argmax(1)), CPU)
    attack = HopSkipJump(150, probes=20) if name == "hop-skip-jump" else SurFree(60)
    evaluator = Evaluator(net, data, ThreatModel(norm, Budget("0.01")), batch_size=4, microbatch=8)
    whole = evaluator([attack]).attacks[attack.name]
    save, kills, net.asked = StateFile.save, 0, 0

    def deadly(self, state):
        save(self, state)
        raise Killed

    monkeypatch.setattr(StateFile, "save", deadly)
    while True:
        try:
            again = evaluator([attack], state=StateFile(tmp_path / "state", {}, every=0)).attacks[attack.name]
            break
        except Killed:
            kills += 1
    assert kills > 5
    for one, other in zip(whole.trials.values(), again.trials.values(), strict=True):
        for key, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[key])


def test_a_network_that_names_one_class_only_is_not_fooled():
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(3)[0].expand(len(x), 3)

    for attack in (HopSkipJump(200), SurFree(200)):
        found, distance = attack.minimal(Sure(), IMAGE, torch.zeros(N).long(), "l2")
        assert distance.isinf().all()
        assert torch.equal(found, IMAGE)


def test_what_does_not_fit_is_refused():
    for make in (lambda: SurFree(0), lambda: HopSkipJump(queries=0)):
        with pytest.raises(SettingError, match=r"attack\.queries"):
            make()
    with pytest.raises(SettingError, match=r"attack\.probes"):
        HopSkipJump(probes=0)
    with pytest.raises(SettingError, match=r"threat\.norm: got linf.*l2 under surfree"):
        SurFree().check(ThreatModel("linf"))
    assert issubclass(SurFree, DecisionAttack)
