"""Evaluations whose steps are captured, and without. A capture here runs its function again."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from ensemble_tools import rugged, sample
from softdefend.attacks import APGD, FAB, PGD, Square, TargetedAPGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation import Ensemble, EvaluateSettings, Evaluator
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import SeededRandomness
from softdefend.execution.search_network import (
    SearchNetwork,
    _check_equal,
    _compiled,
    _narrow,
    _optional,
)
from softdefend.execution.step_graphs import StepGraphs
from softdefend.models.resnet import BasicBlock
from softdefend.models.small_cnn import SmallCNN

SHAPE = (2, 6, 6)
MEMBERS = (
    PGD(steps=3, restarts=2, loss="kl"),
    PGD(steps=4, keep="best"),
    APGD(steps=20),
    APGD(steps=12, restarts=2, loss="dlr", eot=2),
    TargetedAPGD(steps=12, targets=3),
    FAB(steps=12, restarts=2, targeted=False),
    FAB(steps=12, targets=3),
    Square(queries=100),
)
THREATS = {
    "linf": ThreatModel("linf", Budget("0.02")),
    "l2": ThreatModel("l2", Budget("0.1")),
    "l1": ThreatModel("l1", 0.4),
}


def again(run):
    run()
    run()
    return run


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("norm", list(THREATS))
def test_captured_and_filled_searches_find_and_count_the_same(norm, precision):
    """In float64, in which filling up a batch rounds nothing that matters; for microbatches above and
    below the batches."""
    net = rugged(SHAPE)
    data, ensemble = sample(net, 60, SHAPE), Ensemble("all", MEMBERS)

    def trials(microbatch, graphs):
        options = {"batch_size": 17, "seed": 5, "microbatch": microbatch, "precision": precision}
        evaluator = Evaluator(net, data, THREATS[norm], **options)
        evaluator.search_network.step_graphs = graphs
        return evaluator([ensemble]).attacks["all"].trials

    wanted = trials(500, None)
    assert 0 < sum(int((t.attacked & (t.prediction != data.labels)).sum()) for t in wanted.values()) < 45
    for microbatch in (500, 20):
        graphs = StepGraphs(again)
        found = trials(microbatch, graphs)
        assert graphs.seconds > 0
        for name, trial in wanted.items():
            assert torch.equal(found[name].prediction, trial.prediction), name
            assert torch.equal(found[name].forwards, trial.forwards), name
            assert torch.equal(found[name].backwards, trial.backwards), name
            torch.testing.assert_close(found[name].distance, trial.distance, atol=1e-6, rtol=0)


def test_a_success_that_the_search_does_not_see_is_found_at_its_end():
    """A search whose logits favour the true class by a little claims too few."""
    net, threat = rugged(SHAPE), THREATS["linf"]
    image = torch.rand(300, *SHAPE, generator=stream(0, "x")).double()
    label = net(image).argmax(1)
    image = image[label == label[0]]
    label, favour = label[label == label[0]], 0.3 * nn.functional.one_hot(label[0], 5)
    model = CountingModel(lambda x: net(x) + favour, len(image), exact=net, clean_logits=net(image))
    context = AttackContext(model, SeededRandomness([torch.arange(len(image))], 0, "a"))
    found = APGD(steps=1).run_batches(model, image, label, threat, context)
    wrong = net(found).argmax(1) != label
    claimed = (net(found) + favour).argmax(1) != label
    assert (wrong & ~claimed).sum() > 1
    assert (model.counts().forwards[~wrong] == 3).all()  # start, step, and the look in full precision


class Tight(nn.Module):
    """Has memory for so many images."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, image):
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(image)


def test_graphs_are_given_up_where_memory_runs_out_and_after_each_attack():
    net, threat = rugged(SHAPE), THREATS["linf"]
    data, attacks = sample(net, 60, SHAPE), [Ensemble("two", (APGD(steps=30), Square(queries=40)))]
    wanted = Evaluator(net, data, threat, batch_size=30)(attacks)
    evaluator, released = Evaluator(Tight(net, 16), data, threat, batch_size=30, microbatch=60), []
    graphs = evaluator.search_network.step_graphs = StepGraphs(again)
    release = graphs.release
    graphs.release = lambda: released.append(len(graphs._graphs)) or release()
    found = evaluator(attacks)
    assert found.how["microbatch"] == 15
    *short, first, second = released
    assert len(short) == 2
    assert first > 0
    assert second > 0  # after each attack too: the next has no use for them
    assert not graphs._graphs
    for name, trial in wanted.attacks["two"].trials.items():
        assert torch.equal(found.attacks["two"].trials[name].prediction, trial.prediction)


def test_other_threats_share_what_was_prepared():
    net = rugged(SHAPE)
    evaluator = Evaluator(net, sample(net, 20, SHAPE), THREATS["linf"])
    other = evaluator.under(THREATS["l2"])
    assert other.search_network is evaluator.search_network
    assert (evaluator.threat, other.threat) == (THREATS["linf"], THREATS["l2"])


def test_strict_and_exact_are_the_same_on_a_cpu():
    net = rugged(SHAPE).float()
    data, attacks = sample(net, 40, SHAPE), [Ensemble("two", (APGD(steps=12), FAB(steps=6)))]
    one, other = (
        Evaluator(net, data, THREATS["l2"], precision=p)(attacks).attacks["two"] for p in ("exact", "strict")
    )
    assert torch.equal(one.distance, other.distance)
    assert (one.forwards, one.backwards) == (other.forwards, other.backwards)


def test_what_cannot_be_asked_is_refused():
    net = rugged(SHAPE)
    with pytest.raises(
        SettingError, match=r"evaluate\.precision: got 'tf32'; accepted: exact, strict or fast"
    ):
        Evaluator(net, sample(net, 4, SHAPE), THREATS["l2"], precision="tf32")
    with pytest.raises(SettingError, match=r"evaluate\.precision"):
        EvaluateSettings(precision="tf32")
    with pytest.raises(SettingError, match=r"evaluate\.compile: got true on a CPU"):
        Evaluator(net, sample(net, 4, SHAPE), THREATS["l2"], compile=True)


def test_a_cpu_compiles_nothing_unless_told_to():
    net = rugged(SHAPE)
    data = sample(net, 300, SHAPE)
    result = Evaluator(net, data, THREATS["l2"], compile=None)([PGD(steps=1)])
    assert result.how["compiled"] is result.how["captured"] is False


# --- weights in bfloat16 ------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 16, 2)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, image):
        return self.head(self.hidden(self.block(self.stem(image)).mean((2, 3))).relu())


def moved(net):
    """Statistics away from where they start."""
    net.train()
    for step in range(3):
        net(torch.rand(32, 3, 8, 8, generator=stream(0, "x", step=step)))
    return net.eval().requires_grad_(False)


def test_weights_cast_once_compute_what_autocast_computes():
    """But for the last layer, which is float32; norms and statistics stay float32 too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = moved(Deep())
    narrow, features = copy.deepcopy(net), []
    _narrow(narrow)
    kinds = {name: parameter.dtype for name, parameter in narrow.named_parameters()}
    wide = [name for name, kind in kinds.items() if kind == torch.float32]
    assert all("bn" in name or "head" in name or "shortcut.1" in name for name in wide)
    assert {kinds[f"{layer}.weight"] for layer in ("stem", "hidden", "block.conv2")} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in narrow.named_buffers() if "num_batches" not in n)
    net.head.register_forward_hook(lambda module, given, logits: features.append(given[0]))
    image = torch.rand(9, 3, 8, 8, generator=stream(0, "image"))
    with torch.autocast("cpu", torch.bfloat16):
        net(image)
        logits = narrow(image)
    assert logits.dtype == torch.float32
    wanted = features[0].float() @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-5)


def test_other_logits_are_not_taken_for_the_same():
    logits = torch.randn(50, 10, generator=stream(0, "x"))
    _check_equal(logits * (1 + 2**-9 * torch.randn(50, 10, generator=stream(1, "x"))), logits)
    for other in (logits.flip(0), 1.1 * logits, logits[:5], logits * torch.nan):
        with pytest.raises(RuntimeError, match="its logits are then others"):
            _check_equal(other, logits)


def test_only_lack_of_memory_is_more_than_a_warning():
    with pytest.warns(RuntimeWarning, match=r"^slower: one two$"), _optional("slower"):
        raise ValueError("one\n  two")
    with pytest.raises(torch.OutOfMemoryError), _optional("slower"):
        raise torch.OutOfMemoryError


@pytest.mark.slow
def test_one_program_serves_all_batches():
    """Compiled on the CPU: logits and gradients of every batch size, without a second compilation."""
    import torch._dynamo

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = moved(SmallCNN(4, 3, 4))
        image = torch.rand(64, 3, 8, 8, generator=stream(0, "x"))
        forward = _compiled(net, image, net(image))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in (1, 2, 16, 63, 200):
                given = torch.rand(count, 3, 8, 8, generator=stream(count, "x")).requires_grad_(True)
                with torch.no_grad():
                    torch.testing.assert_close(forward(given.detach()), net(given), atol=1e-5, rtol=1e-4)
                for k in range(2):
                    (found,) = torch.autograd.grad(forward(given)[:, k].sum(), given)
                    (wanted,) = torch.autograd.grad(net(given)[:, k].sum(), given)
                    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_folded_search_follows_the_networks_weights():
    """In double precision, where folding rounds nothing that shows."""
    torch.manual_seed(0)
    net = SmallCNN(num_classes=4, in_channels=2, width=4).double().eval()
    image = torch.rand(3, *SHAPE, dtype=torch.float64)
    search = SearchNetwork(net, torch.device("cpu"), "strict")
    with search.search_mode(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # there is no CUDA whose autocast could be off
        search._adapt(image, net(image))
    assert search._copy is not None
    assert search._copy.pairs
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(torch.rand_like(tensor, dtype=torch.float64).to(tensor.dtype))
    with search.search_mode(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(search._plain(image), net(image), atol=1e-9, rtol=1e-9)
