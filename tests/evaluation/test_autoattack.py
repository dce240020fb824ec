"""Ensembles against a plain loop over batches, and against AutoAttack's reference implementation.

Set SOFTDEFEND_AUTOATTACK to the root of a checkout of github.com/fra31/auto-attack for the latter.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensemble_tools import Images, one_after_the_other, rugged, sample
from softdefend.attacks import APGD, FAB, PGD, Square, TargetedAPGD, margin
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import DataSettings, load
from softdefend.evaluation import Ensemble, Evaluator, expand
from softdefend.evaluation.autoattack import ENSEMBLES, parse
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import SeededRandomness
from softdefend.models.resnet import BasicBlock, ResNet18
from softdefend.models.small_cnn import SmallCNN

SHAPE = (2, 6, 6)
MEMBERS = (
    APGD(steps=8),
    APGD(steps=6, restarts=2, loss="dlr"),
    TargetedAPGD(steps=6, targets=3),
    FAB(steps=6, restarts=2, targeted=False),
    FAB(steps=8, targets=3),
    Square(queries=40),
)
THREATS = {
    "linf": ThreatModel("linf", Budget("0.01")),
    "l2": ThreatModel("l2", Budget("0.07")),
    "l1": ThreatModel("l1", Budget("0.3")),
}
norms = pytest.mark.parametrize("norm", list(THREATS))


def evaluate(net, data, threat, attacks, **options):
    return Evaluator(net, data, threat, **options)(attacks)


def flags(result, name):
    """Robust flags after each member, rebuilt from what is recorded for each."""
    robust = result.clean_prediction == result.label
    after = {"clean": robust}
    for member, trial in result.attacks[name].trials.items():
        robust = robust & ~(trial.attacked & (trial.prediction != result.label))
        after[member] = robust
    return after


# --- what runs ----------------------------------------------------------------------------------------------


def test_the_versions_are_the_references():
    """``set_version`` of fra31/auto-attack at a392200, with the constructors' defaults it leaves alone."""
    standard, plus, rand = (ENSEMBLES[f"autoattack{suffix}"] for suffix in ("", "-plus", "-rand"))
    assert [m.name for m in standard] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert standard == (
        APGD(steps=100, restarts=1, loss="ce", rho=0.75, eot=1),
        TargetedAPGD(steps=100, restarts=1, targets=9, rho=0.75),
        FAB(steps=100, restarts=1, targets=9, targeted=True, alpha_max=0.1, eta=1.05, beta=0.9),
        Square(queries=5000, p_init=0.8),
    )
    assert plus == (
        APGD(steps=100, restarts=5, loss="ce"),
        APGD(steps=100, restarts=5, loss="dlr"),
        FAB(steps=100, restarts=5, targeted=False),
        Square(queries=5000),
        TargetedAPGD(steps=100, restarts=1, targets=9),
        FAB(steps=100, restarts=1, targets=9),
    )
    assert rand == (APGD(loss="ce", eot=20), APGD(loss="dlr", eot=20))


@pytest.mark.parametrize(("name", "meant"), [("pdg-20", "pgd"), ("autoatack", "autoattack")])
def test_an_unknown_name_is_answered_with_the_nearest_one(name, meant):
    with pytest.raises(SettingError, match=rf"autoattack-rand; did you mean {meant}\?$"):
        parse(name)


def test_a_wrong_count_is_not_answered_with_other_names():
    with pytest.raises(SettingError, match=r"attack\.restarts: got 0; accepted: a whole number >= 1$"):
        parse("pgd-20x0")


@pytest.mark.parametrize(("k", "targets"), [(2, 1), (3, 2), (10, 9), (100, 9)])
def test_targets_are_at_most_the_wrong_classes(k, targets):
    members = expand("autoattack", k)
    assert [m.targets for m in members if isinstance(m, TargetedAPGD | FAB)] == [targets] * 2
    assert [m.name for m in members] == ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_names_are_read_beside_those_of_single_attacks():
    assert parse("autoattack-rand") == Ensemble("autoattack-rand", ENSEMBLES["autoattack-rand"])
    assert parse("autoattack", 4).members[1].targets == 3
    assert parse("pgd-20") == PGD(steps=20)
    with pytest.raises(SettingError, match=r"attacks: got 'autoattacks'; accepted: fgsm.*or autoattack,"):
        parse("autoattacks")
    with pytest.raises(SettingError, match="at least 2 classes"):
        expand("autoattack", 1)
    with pytest.raises(SettingError, match="autoattack-plus"):
        expand("pgd-20", 10)


@pytest.mark.parametrize("members", [(), (PGD(steps=2), PGD(steps=2, start="none"))])
def test_impossible_ensembles_are_refused(members):
    with pytest.raises(SettingError, match="members of mine"):
        Ensemble("mine", members)


@norms
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("version", ["autoattack", "autoattack-plus", "autoattack-rand"])
def test_few_classes_are_attacked_too(k, norm, version):
    """The reference stops with an IndexError there. Members of full length, on few images."""
    net = rugged((1, 4, 4), k)
    data, threat = (
        sample(net, 12, (1, 4, 4)),
        ThreatModel(norm, Budget({"linf": 0.05, "l2": 0.2, "l1": 0.7}[norm])),
    )
    members = tuple(Square(queries=30) if isinstance(m, Square) else m for m in expand(version, k))
    result = evaluate(net, data, threat, [Ensemble(version, members)])
    assert 0 < result.robust(version).count < result.clean.count


# --- the loop -----------------------------------------------------------------------------------------------


@norms
def test_members_see_only_who_is_left_whatever_is_computed_at_once(norm):
    """Flags after each member equal a plain loop, for microbatches below, at and above the batch;
    so do the counts of forwards and gradients for each image."""
    net, threat = rugged(SHAPE), THREATS[norm]
    data, ensemble = sample(net, 60, SHAPE), Ensemble("all", MEMBERS)
    wanted = one_after_the_other(net, data, threat, list(MEMBERS), 17, 5)
    counts = None
    for microbatch in (4, 17, 40, 500):
        result = evaluate(net, data, threat, [ensemble], batch_size=17, seed=5, microbatch=microbatch)
        found = flags(result, "all")
        assert list(found) == list(wanted)
        for name, robust in wanted.items():
            assert torch.equal(found[name], robust), (name, microbatch)
        trials = result.attacks["all"].trials
        assert torch.equal(result.attacks["all"].robust, wanted[MEMBERS[-1].name])
        each = torch.stack([torch.stack([t.forwards, t.backwards]) for t in trials.values()])
        assert counts is None or torch.equal(counts, each)
        counts = each
    falls = [int(flag.sum()) for flag in wanted.values()]
    assert falls[0] > falls[1] > falls[-1] > 5


def test_another_logical_batch_is_another_draw():
    net, threat = rugged(SHAPE), THREATS["l2"]
    data = sample(net, 60, SHAPE)
    attacks = [APGD(steps=2, restarts=4)]
    distances = [
        evaluate(net, data, threat, attacks, batch_size=b).attacks["apgd-ce-2x4"].distance for b in (20, 60)
    ]
    assert not torch.equal(*distances)


@norms
@pytest.mark.parametrize("attack", MEMBERS, ids=lambda m: m.name)
def test_alone_an_attack_is_what_it_is_in_its_batch(attack, norm):
    """On all images, also those wrong from the start; a microbatch cuts through batches."""
    net, threat = rugged(SHAPE), THREATS[norm]
    data = sample(net, 50, SHAPE)
    robust = []
    for rows in torch.arange(50).split(18):
        image, label, own = data.image[rows], data.labels[rows], torch.Generator().manual_seed(2)
        robust.append(net(attack(net, image, label, threat, generator=own).detach()).argmax(1) == label)
    for microbatch in (7, 36, 400):
        result = evaluate(net, data, threat, [attack], batch_size=18, seed=2, microbatch=microbatch)
        assert torch.equal(result.attacks[attack.name].robust, torch.cat(robust))


def test_records_of_an_ensemble():
    net, threat = rugged(SHAPE), THREATS["linf"]
    data = sample(net, 60, SHAPE)
    result = evaluate(net, data, threat, [PGD(steps=3), Ensemble("all", MEMBERS)], batch_size=25)
    record, summary = result.attacks["all"], result.to_dict()["attacks"]
    assert "members" not in summary["pgd-3"]
    members = summary["all"]["members"]
    assert [m["name"] for m in members] == [m.name for m in MEMBERS]
    left = result.clean.count
    for member, trial in zip(members, record.trials.values(), strict=True):
        assert member["attacked"] == left == int(trial.attacked.sum())
        left -= member["fooled"]
        assert (member["count"], member["n"]) == (left, 60)
        assert member["rate"] == left / 60
        assert member["low"] < member["rate"] < member["high"]
        assert (trial.forwards[trial.attacked] > 0).all()
        assert (trial.forwards[~trial.attacked] == -1).all()
        assert int(trial.forwards.clamp_min(0).sum()) == member["forwards"]
        assert int(trial.backwards.clamp_min(0).sum()) == member["backwards"]
    assert summary["all"]["count"] == left
    assert summary["all"]["forwards"] == sum(m["forwards"] for m in members)
    assert (record.prediction == result.label)[record.robust].all()
    assert (record.prediction != result.label)[~record.robust].all()
    assert (record.distance <= float(threat.eps) + 1e-6).all()
    wrong = result.clean_prediction != result.label
    assert (record.distance[wrong] == 0).all()
    for line in ("all", "  apgd-ce-8", "  square-40", "clean"):
        assert any(row.startswith(f"{line} ") for row in str(result).splitlines())


def test_an_ensemble_with_nothing_left_to_attack():
    net, threat = rugged(SHAPE), THREATS["linf"]
    data = sample(net, 20, SHAPE)
    data.labels = (net(data.image).argmax(1) + 1) % 5
    result = evaluate(net, data, threat, [Ensemble("all", MEMBERS)])
    assert result.robust("all").count == 0
    assert [m["attacked"] for m in result.to_dict()["attacks"]["all"]["members"]] == [0] * len(MEMBERS)
    assert result.attacks["all"].forwards == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["linf", "l2", "l1"]),
    st.floats(1e-3, 1.0),
    st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7)),
    st.integers(2, 6),
    st.integers(1, 9),
    st.sampled_from(["exact", "fast"]),
)
def test_no_image_leaves_the_ball_or_the_box(norm, eps, shape, k, microbatch, precision):
    """What the attacks themselves return, before the evaluator projects it."""
    net, threat, seen = rugged(shape, k).float(), ThreatModel(norm, Budget(eps)), []
    image = (1.4 * torch.rand(9, *shape, generator=stream(k, "x")) - 0.2).clamp(0, 1)
    data = Images(image, net(image).argmax(1))
    evaluator = Evaluator(net, data, threat, batch_size=4, microbatch=microbatch, precision=precision)
    members = (APGD(steps=3, restarts=2), TargetedAPGD(steps=3), FAB(steps=3), Square(queries=9))
    perturb = Evaluator._perturb

    def perturbed(self, attack, index, context, goal):
        image, label = data.take(index).image, data.take(index).label
        found = attack.run_batches(
            context.net, image, label, threat, AttackContext(context.net, context.random)
        )
        assert found.min() >= 0
        assert found.max() <= 1
        assert (threat.distance(data.take(index).image, found) <= eps * (1 + 1e-5) + 1e-6).all()
        seen.append(len(found))
        return perturb(self, attack, index, context, goal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_perturb", perturbed)
        evaluator([Ensemble("all", members)])
    assert seen


# --- fast precision -----------------------------------------------------------------------------------------


class Coarse(nn.Module):
    """A network that bf16 changes a lot: small differences of large numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.shift = inner, nn.Linear(5, 5)
        self.shift.weight.data.copy_(torch.eye(5))
        self.shift.bias.data.fill_(30.0)

    def forward(self, image):
        return self.shift(self.inner(image))


@norms
@pytest.mark.parametrize("attack", MEMBERS, ids=lambda m: m.name)
def test_no_success_counts_before_full_precision_has_confirmed_it(attack, norm):
    """Whatever a search in bf16 claims: a search ends early only for images that are wrong in fp32."""
    net = Coarse(rugged(SHAPE).float()).eval().requires_grad_(False)
    data = sample(net, 60, SHAPE)
    exact, fast = (
        evaluate(net, data, THREATS[norm], [attack], precision=p).attacks[attack.name]
        for p in ("exact", "fast")
    )
    trial = fast.trials[attack.name]
    right = net(data.image).argmax(1) == data.labels
    survived = fast.robust & right
    # A claim that is refuted costs a forward and ends nothing: whoever is robust was searched in full.
    full = exact.trials[attack.name].forwards[exact.robust & right].min()
    assert survived.any()
    assert (trial.forwards[survived] >= full).all()
    other = exact.trials[attack.name]
    assert not (torch.equal(fast.distance, exact.distance) and torch.equal(trial.forwards, other.forwards))
    assert abs(int(fast.robust.sum()) - int(exact.robust.sum())) <= 12


def test_refuted_claims_are_attacked_on():
    """A search that sees everything wrong is refuted in every packing, and still runs to its end."""
    net = rugged(SHAPE)
    data, calls = sample(net, 10, SHAPE), []

    def wrong(image):
        calls.append(len(image))
        return -net(image)

    right = net(data.image).argmax(1) == data.labels
    image, label = data.image[right], data.labels[right]
    threat = ThreatModel("linf", Budget("1e-6"))
    for attack, searches in ((APGD(steps=20), 21), (FAB(steps=20, targets=1), 40), (Square(queries=20), 21)):
        calls.clear()
        model = CountingModel(wrong, len(image), exact=net, clean_logits=net(image))
        context = AttackContext(model, SeededRandomness([torch.arange(len(image))], 0, "a"))
        found = attack.run_batches(model, image, label, threat, context)
        assert (net(found).argmax(1) == label).all()
        assert calls == [len(image)] * searches


# --- the reference ------------------------------------------------------------------------------------------

CHECKOUT = os.environ.get("SOFTDEFEND_AUTOATTACK")
needs_reference = pytest.mark.skipif(
    not CHECKOUT, reason="SOFTDEFEND_AUTOATTACK names no checkout of fra31/auto-attack"
)
N, BATCH, SEED = 120, 45, 7
NETS = ("robust", "plain", "cnn")
SHORT = (
    APGD(steps=25),
    TargetedAPGD(steps=25, targets=4),
    FAB(steps=25, targets=4),
    Square(queries=200),
)
PLUS = (
    APGD(steps=12, restarts=3),
    APGD(steps=12, restarts=3, loss="dlr"),
    FAB(steps=12, restarts=3, targeted=False),
    Square(queries=60),
    TargetedAPGD(steps=12, targets=3),
    FAB(steps=12, targets=3),
)
BLACK_BOX_FIRST = (Square(queries=150), FAB(steps=15, targets=3))


class Residual(nn.Module):
    """A stem, two residual blocks with batch normalization and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(16 * 16, 10)
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))

    def forward(self, image):
        return self.head(self.blocks(self.stem(image)).flatten(1))


def train(net, images, labels, threat):
    """Ten epochs, against PGD-4 where a threat is given."""
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(10):
        for rows in torch.randperm(len(images), generator=stream(0, "order", epoch)).split(64):
            image, label = images[rows], labels[rows]
            if threat is not None:
                image = PGD(steps=4)(net, image, label, threat, generator=stream(0, "pgd", epoch))
            optimizer.zero_grad()
            F.cross_entropy(net(image), label).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    """An adversarially trained residual network, a plainly trained one, and an adversarially trained CNN."""
    data = load(DataSettings(source="digits"))
    images, labels = data.train.images.float() / 255, data.train.labels
    test = Images(data.test.images[:N].float() / 255, data.test.labels[:N])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hard = ThreatModel("linf", Budget("0.1"))
        nets = {
            "robust": train(Residual(), images, labels, hard),
            "plain": train(Residual(), images, labels, None),
            "cnn": train(SmallCNN(10, 1, 8), images, labels, hard),
        }
    return nets, test


def reference(net, data, threat, members, patch, batch=BATCH):
    """Robust flags [n] after each member of the checkout's ensemble, and the forwards it made."""
    patch.syspath_prepend(CHECKOUT)
    from autoattack import AutoAttack, checks

    for check in ("check_randomized", "check_range_output", "check_dynamic", "check_n_classes"):
        patch.setattr(checks, check, lambda *a, **k: 10)  # one of them replaces the process's tracer
    calls = []

    def forward(image):
        calls.append(len(image))
        return net(image)

    made = AutoAttack(
        forward,
        norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm],
        eps=float(threat.eps),
        seed=SEED,
        verbose=False,
        version="custom",
        device="cpu",
        attacks_to_run=[],
    )
    robust = net(data.image).argmax(1) == data.labels
    after, cost, kinds = {"clean": robust}, {}, {APGD: made.apgd, TargetedAPGD: made.apgd_targeted}
    for member in members:
        theirs = {**kinds, FAB: made.fab, Square: made.square}[type(member)]
        if isinstance(member, Square):
            name, theirs.n_queries = "square", member.queries
        else:
            theirs.n_iter, theirs.n_restarts = member.steps, member.restarts
            theirs.n_iter_orig = member.steps
        if isinstance(member, APGD | TargetedAPGD):
            shares = {"n_iter_2": 0.22, "n_iter_min": 0.06, "size_decr": 0.03}
            for field, share in shares.items():
                setattr(theirs, field, max(int(share * member.steps), 1))
            theirs.use_largereps = threat.norm == "l1"
            name = "apgd-t" if isinstance(member, TargetedAPGD) else f"apgd-{member.loss}"
        if isinstance(member, FAB):
            name = "fab-t" if member.targeted else "fab"
        if hasattr(member, "targets"):
            theirs.n_target_classes = member.targets
        # Its loop takes who is left from its own flags, and starts with a clean pass: one member at a time
        # on those still right is the same, for it forms its batches from them.
        left = robust.nonzero().squeeze(1)
        made.attacks_to_run = [name]
        calls.clear()
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = made.run_standard_evaluation(data.image[left], data.labels[left], bs=batch)
        cost[member.name] = sum(calls)
        robust = robust.clone()
        robust[left] = net(image).argmax(1) == data.labels[left]
        after[member.name] = robust
    return after, cost


def doubled(net, data):
    return copy.deepcopy(net).double(), Images(data.image.double(), data.labels)


def threat_of(net, data, norm):
    """Near the median distance of the images, so that about half of them fall."""
    distance = FAB(steps=10, targets=2).minimal(net, data.image, data.labels, norm)[1]
    reached = distance[(distance > 0) & distance.isfinite()]
    return ThreatModel(norm, Budget(round(1.1 * reached.median().item(), 4)))


def same_in_float64(net, data, threat, members, patch, batch, microbatches):
    """Equal flags after each member, for fewer forwards. Casts to float32 go to float64, and so do the random
    numbers of both."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        net, data = doubled(net, data)
        wanted, cost = reference(net, data, threat, members, patch, batch)
        ensemble = [Ensemble("aa", members)]
        results = [
            evaluate(net, data, threat, ensemble, batch_size=batch, seed=SEED, microbatch=p)
            for p in microbatches
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for result, size in zip(results, microbatches, strict=True):
        found = flags(result, "aa")
        for name, robust in wanted.items():
            assert torch.equal(found[name], robust), (name, size)
    falls = {name: int(robust.sum()) for name, robust in wanted.items()}
    ours = {name: trial.total_forwards for name, trial in results[0].attacks["aa"].trials.items()}
    print(f"{threat.norm} eps {threat.eps}: {data.n} images, equal flags, {falls}")
    print(f"forwards {ours}, the reference {cost}")
    assert falls["clean"] > falls[members[0].name] > 0
    assert all(ours[name] < cost[name] for name in ours if cost[name])


@needs_reference
@pytest.mark.slow
@norms
@pytest.mark.parametrize("case", NETS)
@pytest.mark.parametrize("members", [SHORT, PLUS, BLACK_BOX_FIRST], ids=["standard", "plus", "square"])
def test_in_float64_flags_after_each_member_are_the_references(trained, monkeypatch, case, norm, members):
    nets, test = trained
    threat = threat_of(nets[case], test, norm)
    same_in_float64(nets[case], test, threat, members, monkeypatch, BATCH, (20, 300))


def nearly_same_in_float32(net, data, threat, members, patch, batch, microbatches):
    """At most one image apart after each member; says how far it was from the boundary."""
    wanted, _ = reference(net, data, threat, members, patch, batch)
    for size in microbatches:
        ensemble = [Ensemble("aa", members)]
        result = evaluate(net, data, threat, ensemble, batch_size=batch, seed=SEED, microbatch=size)
        found = flags(result, "aa")
        for name, robust in wanted.items():
            for i in (found[name] != robust).nonzero().flatten().tolist():
                gap = margin(net(data.image[i : i + 1]), data.labels[i : i + 1]).item()
                print(f"{threat.norm} {name}, microbatch {size}: image {i}, clean margin {gap:.3g}")
            assert (found[name] != robust).sum() <= 1
        print(f"{threat.norm} eps {threat.eps}: {data.n} images", {k: int(v.sum()) for k, v in found.items()})
        last = members[-1].name
        assert abs(int(found[last].sum()) - int(wanted[last].sum())) <= 1


@needs_reference
@pytest.mark.slow
@norms
@pytest.mark.parametrize("case", NETS)
def test_in_float32_flags_differ_at_most_on_the_border(trained, monkeypatch, case, norm):
    nets, test = trained
    threat = threat_of(nets[case], test, norm)
    nearly_same_in_float32(nets[case], test, threat, SHORT, monkeypatch, BATCH, (20, 300))


@needs_reference
def test_in_l1_the_standard_version_has_the_references_settings(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT)
    from autoattack import AutoAttack

    made = AutoAttack(lambda x: x, norm="L1", eps=12, version="standard", device="cpu", verbose=False)
    ce, targeted, fab, square = parse("autoattack").under("l1")
    assert (ce.restarts, ce.steps, ce.loss) == (made.apgd.n_restarts, made.apgd.n_iter, "ce")
    assert (ce.multi_eps, targeted.multi_eps) == (made.apgd.use_largereps, made.apgd_targeted.use_largereps)
    assert (targeted.targets, targeted.restarts) == (
        made.apgd_targeted.n_target_classes,
        made.apgd_targeted.n_restarts,
    )
    assert (fab.targets, fab.restarts, fab.steps) == (
        made.fab.n_target_classes,
        made.fab.n_restarts,
        made.fab.n_iter,
    )
    assert square.queries == made.square.n_queries
    assert made.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("version", ["autoattack-plus", "autoattack-rand"])
def test_versions_that_l1_does_not_have_are_refused(version):
    with pytest.raises(SettingError, match=rf"threat\.norm: got l1; .*{version}; l1 has autoattack"):
        parse(version).check(THREATS["l1"])
    parse("autoattack").check(THREATS["l1"])
    with pytest.raises(SettingError, match=r"threat\.norm: got l0"):
        parse("autoattack").check(ThreatModel("l0", 3))


@needs_reference
@pytest.mark.slow
@norms
def test_at_full_length_the_standard_version_is_the_references(trained, monkeypatch, norm):
    nets, test = trained
    test = Images(test.image[:24], test.labels[:24])
    threat = threat_of(nets["robust"], test, norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        net, data = doubled(nets["robust"], test)
        wanted, cost = reference(net, data, threat, parse("autoattack").under(norm), monkeypatch)
        result = evaluate(net, data, threat, [parse("autoattack")], batch_size=BATCH, seed=SEED)
    finally:
        torch.set_default_dtype(torch.float32)
    found = flags(result, "autoattack")
    print({name: int(robust.sum()) for name, robust in wanted.items()}, cost)
    print({m["name"]: m["forwards"] for m in result.members("autoattack")})
    assert all(torch.equal(found[name], robust) for name, robust in wanted.items())


# --- the reference on ResNet-18 -----------------------------------------------------------------------------

DATA = (
    Path(os.environ.get("SOFTDEFEND_DATA") or Path(__file__).parents[3] / "shared" / "data") / "cifar10-jpeg"
)
needs_cifar = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} does not exist")
DEEP = (APGD(steps=10), TargetedAPGD(steps=8, targets=3), FAB(steps=8, targets=3), Square(queries=60))
DEEP_CASES = [("robust", "linf"), ("robust", "l2"), ("plain", "linf"), ("cnn", "linf"), ("cnn", "l2")]


def train_deep(net, images, labels, steps, robustly):
    """Against FGSM from a random start where asked; in bfloat16, which halves the minutes."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    attack, threat = PGD(steps=1, step_size=Budget("8/255")), ThreatModel("linf", Budget("8/255"))
    for step in range(steps):
        generator = stream(0, "step", step=step)
        rows = torch.randint(0, len(images), (64,), generator=generator)
        image, label = images[rows], labels[rows]
        image = torch.where(torch.rand(64, 1, 1, 1, generator=generator) < 0.5, image.flip(3), image)
        with torch.autocast("cpu", torch.bfloat16):
            if robustly:
                net.eval()
                image = attack(net, image, label, threat, generator=generator)
            logits = net.train()(image)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), label).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def deep():
    """ResNet-18 on CIFAR-10 at 16x16 pixels, adversarially and plainly trained, and a small CNN; for each the
    first 40 test images that it gets right and 5 that it does not."""
    bundle = load(DataSettings(source=str(DATA), train_size=2000))
    images, test = (F.avg_pool2d(s.images[:2000].float() / 255, 2) for s in (bundle.train, bundle.test))
    labels, truth = bundle.train.labels, bundle.test.labels[:2000]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fast = torch.channels_last
        nets = {
            "robust": train_deep(ResNet18(10, 3).to(memory_format=fast), images, labels, 240, True),
            "plain": train_deep(ResNet18(10, 3).to(memory_format=fast), images, labels, 120, False),
            "cnn": train_deep(SmallCNN(10, 3, 16), images, labels, 240, True),
        }
    cases = {}
    for name, net in nets.items():
        right = net(test[:500]).argmax(1) == truth[:500]
        rows = torch.cat([right.nonzero()[:40], (~right).nonzero()[:5]]).squeeze(1).sort().values
        cases[name] = net, Images(test[rows], truth[rows])
    return cases


@needs_reference
@needs_cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("case", "norm"), DEEP_CASES)
def test_on_resnet_18_flags_are_the_references(deep, monkeypatch, case, norm):
    net, data = deep[case]
    same_in_float64(net, data, threat_of(net, data, norm), DEEP, monkeypatch, 18, (45,))


@needs_reference
@needs_cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("case", "norm"), DEEP_CASES[:3])
def test_on_resnet_18_in_float32_flags_differ_at_most_on_the_border(deep, monkeypatch, case, norm):
    """Weakest member first, so that each has images of its own to break."""
    net, data = deep[case]
    nearly_same_in_float32(net, data, threat_of(net, data, norm), DEEP[::-1], monkeypatch, 18, (7, 45))
