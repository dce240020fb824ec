"""AWP on PGD-AT and TRADES beside the authors' published code (csdongxian/AWP)."""

from __future__ import annotations

import ast
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beside import EPOCHS, K, assert_same_network, definitions, excerpt, load, needs, ours, same, sgd, theirs
from softdefend import AWP, PGD, PGDAT, SGLR, TRADES, Hard
from softdefend.labels import Predictions
from softdefend.models import NetSettings, build
from tiny import about

pytestmark = needs("AWP")

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SCRIPT = "AT_AWP/train_cifar10.py"
PGD_AT = ("AdvWeightPerturb", "AT_AWP/utils_awp.py", 0.01)
IN_TRADES = ("TradesAWP", "trades_AWP/utils_awp.py", 0.1)


def adversary(which, net, gamma, monkeypatch):
    """Theirs, with a proxy of its own and the rate that their scripts give it."""
    kind, path, rate = which
    proxy = copy.deepcopy(net)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=rate)
    return getattr(load("AWP", path, monkeypatch), kind)(net, proxy, optimizer, gamma)


def assert_same_weights(trainer, net, optimizer):
    """Parameters and momentum; running statistics are another matter."""
    mine = trainer.optimizer
    for (name, found), expected in zip(trainer.net.named_parameters(), net.parameters(), strict=True):
        same(name, found, expected, **EXACT)
        momenta = (mine.state[found], optimizer.state[expected])
        same(f"momentum of {name}", *(state["momentum_buffer"] for state in momenta), **EXACT)


def batch_loop(module, *, logs):
    """Their loop over the training batches; with ``logs``, where clean images are forwarded, too."""
    loops = (node for node in ast.walk(module) if isinstance(node, ast.For))
    found = next(node for node in loops if "train_batches" in ast.unparse(node.iter))
    (log,) = (n for n, part in enumerate(found.body) if ast.unparse(part).startswith("output = "))
    if not logs:
        del found.body[log:]
    return [found]


@pytest.mark.parametrize("plain", [0, 2])
@pytest.mark.parametrize("gamma", [0.01, 0.2])
@pytest.mark.parametrize("attack_bn", ["train", "eval"])
def test_pgd_at_ends_in_the_authors_weights(tmp_path, monkeypatch, exact_network, attack_bn, gamma, plain):
    """Their loop over batches as it stands, attack in train mode: no weight depends on running statistics,
    which their last forward of the attack and the one for the log move besides. Without these, and attacked
    in eval mode, the statistics are the same as well."""
    trainer = ours(tmp_path / "run", Hard(), PGDAT(), AWP(gamma, plain / EPOCHS), attack_bn=attack_bn)
    net = exact_network()
    optimizer = sgd(net, trainer)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())  # no random start
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    names = {
        "torch": torch,
        "F": F,
        "normalize": lambda image: image,  # in ours, the network's business
        "lower_limit": 0,
        "upper_limit": 1,
    }
    attack = definitions("AWP", SCRIPT, "attack_pgd", "clamp", **names)["attack_pgd"]

    def in_eval_mode(model, *given):
        model.eval()
        return attack(model, *given)

    pgd = {"attack": "pgd", "attack_iters": 5, "restarts": 1, "norm": "l_inf"}
    names |= {
        "args": SimpleNamespace(eval=False, mixup=False, l1=0, awp_warmup=plain, **pgd),
        "attack_pgd": attack if attack_bn == "train" else in_eval_mode,
        "epsilon": 8 / 255,
        "pgd_alpha": 2 / 255,
        "model": net,
        "opt": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "awp_adversary": adversary(PGD_AT, net, gamma, monkeypatch),
        "lr_schedule": lambda _: optimizer.param_groups[0]["lr"],
        **dict.fromkeys(("train_loss", "train_acc", "train_robust_loss", "train_robust_acc", "train_n"), 0),
    }
    code = excerpt("AWP", SCRIPT, partial(batch_loop, logs=attack_bn == "train"))

    def step(batch, epoch):
        given = {"input": batch.image, "target": batch.label}
        exec(code, names | {"train_batches": [given], "epoch": epoch - 1})  # theirs counts from zero

    theirs(trainer, optimizer, step)
    assert_same_weights(trainer, net, optimizer)
    if attack_bn == "eval":
        assert_same_network(trainer, net, **EXACT)


class AsPublished(TRADES):
    """The update's forwards as the code has them: adversarial images, clean ones, and these once more. It
    gives the same logits, but running statistics see them, and the attack reads those."""

    def predict(self, net, image, adversarial):
        attacked, clean = net(adversarial), net(image)
        net(image)
        return Predictions(attacked, clean)


@pytest.mark.parametrize("plain", [0, 2])
@pytest.mark.parametrize("gamma", [0.005, 0.1])
def test_trades_ends_in_the_authors_weights_and_statistics(
    tmp_path, monkeypatch, exact_network, echo, gamma, plain
):
    """Their function for an epoch, a batch at a time: the first look leaves running statistics alone."""
    attack = PGD(steps=5, step_size="2/255", start="gaussian")
    trainer = ours(tmp_path / "run", Hard(), AsPublished(), AWP(gamma, plain / EPOCHS), attack=attack)
    echo()
    net = exact_network()
    optimizer = sgd(net, trainer)
    shown = {"val": 0.0, "avg": 0.0, "elapsed_td": "", "eta_td": ""}
    nothing = SimpleNamespace(update=lambda *_: None, next=lambda: None, finish=lambda: None, **shown)
    names = {
        "torch": torch,
        "F": F,
        "device": "cpu",
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        # Theirs counts epochs from one here.
        "args": SimpleNamespace(num_steps=5, norm="l_inf", beta=6.0, awp_warmup=plain + 1),
        "time": SimpleNamespace(time=lambda: 0.0),
        "print": lambda *_: None,
        "AverageMeter": lambda: nothing,
        "Bar": lambda *_, **__: nothing,
        "accuracy": lambda *_, **__: (torch.zeros(()), torch.zeros(())),
    }
    file = "trades_AWP/train_trades_cifar.py"
    train = definitions("AWP", file, "perturb_input", "train", **names)["train"]
    rule = adversary(IN_TRADES, net, gamma, monkeypatch)
    theirs(
        trainer,
        optimizer,
        lambda batch, epoch: train(net, [(batch.image, batch.label)], optimizer, epoch, rule),
    )
    assert_same_weights(trainer, net, optimizer)
    assert_same_network(trainer, net, **EXACT)


@pytest.mark.parametrize("gamma", [0.01, 0.1])
def test_with_refined_labels_the_authors_rule_perturbs_alike(tmp_path, monkeypatch, exact_network, gamma):
    """SGLR + AWP, which nobody has published: their rule, given labels refined by hand from what is predicted
    at the weights that are trained. They are the same in both looks."""
    trainer = ours(tmp_path / "run", SGLR(start=0.0), PGDAT(), AWP(gamma))
    net = exact_network()
    optimizer = sgd(net, trainer)
    rule = adversary(PGD_AT, net, gamma, monkeypatch)
    memory = F.one_hot(trainer.train_data.labels, K).double()

    def step(batch, epoch):
        net.eval()
        attacked = trainer.recipe.attack(net, batch.image, batch.label, trainer.recipe.threat)
        with torch.no_grad():
            believed = copy.deepcopy(net).train()(attacked).softmax(1)
            clean = net.train()(batch.image).softmax(1)
        guide = 0.2 * clean + 0.8 * believed
        memory[batch.index] = 0.9 * memory[batch.index] + 0.1 * guide
        target = memory[batch.index]
        awp = rule.calc_awp(attacked, target)
        rule.perturb(awp)
        optimizer.zero_grad()
        F.cross_entropy(net(attacked), target).backward()
        optimizer.step()
        rule.restore(awp)

    theirs(trainer, optimizer, step)
    # The memory of ours is in float32.
    assert_same_network(trainer, net, rtol=1e-4, atol=1e-5)


def full_size(name, monkeypatch):
    """A network with shortcuts of convolutions, in training mode: one of ours, or theirs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "theirs":
            return load("AWP", "AT_AWP/preactresnet.py", monkeypatch).PreActResNet18().train()
        scale = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        return build(NetSettings(name), num_classes=10, in_channels=3, **scale).train()


def perturbations(net, gamma, monkeypatch):
    """What both add to each weight tensor for the same images, by name; tensors that neither moves are left
    out. With them the weights' norms."""
    generator = torch.Generator().manual_seed(0)
    image, label = torch.rand(4, 3, 32, 32, generator=generator), torch.arange(4)
    image = image.to(next(net.parameters()).dtype)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}

    def added():
        moves = {name: (w.detach() - before[name]).double() for name, w in net.named_parameters()}
        return {name: move for name, move in moves.items() if move.any()}

    rule = AWP(gamma)
    rule.setup(about(net))
    with rule.perturbed(F.cross_entropy(net(image), label)):
        mine = added()
    rival = adversary(PGD_AT, net, gamma, monkeypatch)
    rival.perturb(rival.calc_awp(image, label))
    yours = added()
    with torch.no_grad():
        torch._foreach_copy_(list(net.parameters()), list(before.values()))
    return mine, yours, {name: weight.double().norm() for name, weight in before.items()}


@pytest.mark.parametrize("name", ["resnet18", "theirs"])
def test_both_perturb_the_same_tensors_of_a_full_network_by_the_same(monkeypatch, name):
    """Twenty convolutions, shortcuts among them, and the last layer, each by gamma of its norm."""
    net = full_size(name, monkeypatch).double()
    mine, yours, norms = perturbations(net, 0.01, monkeypatch)
    assert list(mine) == list(yours) == [n for n, weight in net.named_parameters() if weight.ndim > 1]
    assert len(mine) == 21
    for layer, move in mine.items():
        same(layer, move, yours[layer], rtol=1e-6, atol=1e-9)
        assert move.norm().item() == pytest.approx(0.01 * norms[layer].item(), rel=1e-9)


@pytest.mark.parametrize(("last", "lost"), [(1.0, False), (1e-6, True)])
def test_where_gradients_vanish_theirs_loses_the_direction_to_rounding_and_keeps_the_length(
    monkeypatch, last, lost
):
    """A known difference, in float32: theirs is what two nearby weights differ by. A last layer near zero
    leaves all others hardly any gradient."""
    net = full_size("resnet18", monkeypatch)
    with torch.no_grad():
        list(net.modules())[-1].weight.mul_(last)
    mine, yours, norms = perturbations(net, 0.01, monkeypatch)
    exact, _, _ = perturbations(net.double(), 0.01, monkeypatch)

    def worst(found):
        return min(
            F.cosine_similarity(found[layer].ravel(), exact[layer].ravel(), 0).item() for layer in exact
        )

    assert worst(mine) > 0.9999
    assert (worst(yours) < 0.5) if lost else (worst(yours) > 0.9999)
    for layer, norm in norms.items():
        if layer in exact:
            assert mine[layer].norm().item() == pytest.approx(0.01 * norm.item(), rel=1e-4)
            assert yours[layer].norm().item() == pytest.approx(0.01 * norm.item(), rel=1e-2)
