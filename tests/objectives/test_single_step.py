import numpy as np
import pytest
import torch
from torch import nn

from softdefend.attacks import FGSM, PGD, cross_entropy
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.labels import Hard
from softdefend.objectives import FGSMRS, NFGSM, PGDAT
from softdefend.training import OptimSettings

LINF, L2 = ThreatModel("linf", "8/255"), ThreatModel("l2", "128/255")
EPS = 8 / 255
IMAGE = torch.rand(16, 3, 4, 4, generator=stream(0, "x"))
IMAGE[:4] = IMAGE[:4].round()  # corners of the box
LABEL = torch.arange(16) % 5


class Linear(nn.Module):
    """A linear network that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(48, 5)
        with torch.no_grad():
            self.map.weight.copy_(torch.randn(5, 48, generator=stream(0, "w")))
            self.map.bias.copy_(torch.linspace(-1, 1, 5))
        self.shown = []

    def forward(self, image):
        self.shown.append(image.detach().clone())
        return self.map(image.flatten(1))


def attacked(objective, threat=LINF, configured=None, image=IMAGE, seed=3):
    net = Linear()
    attack = objective.training_attack(configured or PGD(steps=10, step_size="2/255"), threat)
    result = attack(net, image, LABEL, threat, generator=torch.Generator().manual_seed(seed))
    return net, result.detach()


def direction(net, at):
    """Sign of the gradient of cross-entropy of a linear network, by hand in float64."""
    w, b = net.map.weight.detach().double().numpy(), net.map.bias.detach().double().numpy()
    x = at.double().flatten(1).numpy()
    z = x @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.sign((p - np.eye(5)[LABEL]) @ w).reshape(at.shape)


def test_n_fgsm_against_the_papers_algorithm_in_numpy():
    """Noise in [-2 eps, 2 eps] cut to the box, a step of eps from there, cut to the box, no projection."""
    net, result = attacked(NFGSM())
    noise = (2 * torch.rand(IMAGE.shape, generator=torch.Generator().manual_seed(3)) - 1).double().numpy()
    noisy = np.clip(IMAGE.double().numpy() + 2 * EPS * noise, 0, 1)
    np.testing.assert_allclose(net.shown[0], noisy, atol=1e-6)
    expected = np.clip(noisy + EPS * direction(net, net.shown[0]), 0, 1)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(("noise", "alpha"), [(2.0, 1.0), (1.0, 0.5), (3.0, 2.0)])
def test_n_fgsm_leaves_the_ball_but_neither_its_own_bound_nor_the_box(noise, alpha):
    _, result = attacked(NFGSM(noise, alpha))
    farthest = (result - IMAGE).abs().max().item()
    assert EPS * 1.2 < farthest <= (noise + alpha) * EPS + 1e-6
    assert result.min() >= 0
    assert result.max() <= 1


def test_the_noise_is_uniform_up_to_its_bound():
    gray = torch.full((16, 3, 4, 4), 0.5)
    net, _ = attacked(NFGSM(), image=gray)
    drawn = (net.shown[0] - 0.5).flatten() / (2 * EPS)
    assert drawn.abs().max() <= 1 + 1e-6
    counts = torch.histc(drawn, 4, -1, 1)
    assert (counts - 192).abs().max() < 5 * np.sqrt(768 * 0.25 * 0.75)  # five standard deviations


def test_n_fgsm_in_l2_keeps_the_bounds_of_the_norm():
    gray = torch.full((16, 3, 4, 4), 0.5)  # far from the border of the box, which shortens steps
    net, result = attacked(NFGSM(), threat=L2, image=gray)
    eps = float(L2.eps)
    noise = torch.linalg.vector_norm((net.shown[0] - gray).flatten(1), dim=1)
    step = torch.linalg.vector_norm((result - net.shown[0]).flatten(1), dim=1)
    assert (noise <= 2 * eps + 1e-5).all()
    assert noise.max() > 1.8 * eps
    torch.testing.assert_close(step, torch.full((16,), eps))


def test_without_noise_n_fgsm_is_fgsm():
    _, result = attacked(NFGSM(noise=0.0))
    net = Linear()
    torch.testing.assert_close(result, FGSM()(net, IMAGE, LABEL, LINF).detach())


def test_fgsm_rs_against_the_papers_algorithm_in_numpy():
    net, result = attacked(FGSMRS())
    noise = (2 * torch.rand(IMAGE.shape, generator=torch.Generator().manual_seed(3)) - 1).double().numpy()
    clean = IMAGE.double().numpy()
    start = np.clip(clean + EPS * noise, 0, 1)
    np.testing.assert_allclose(net.shown[0], start, atol=1e-6)
    moved = start + 10 / 255 * direction(net, net.shown[0])
    expected = np.clip(np.clip(moved, clean - EPS, clean + EPS), 0, 1)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_fgsm_rs_stays_in_the_threat_model(threat):
    _, result = attacked(FGSMRS(), threat=threat)
    assert (threat.distance(IMAGE, result) <= float(threat.eps) + 1e-6).all()
    assert result.min() >= 0
    assert result.max() <= 1


def test_a_configured_start_wins_so_that_plain_fgsm_can_be_had():
    _, result = attacked(FGSMRS(alpha=1.0), configured=PGD(steps=10, start="none"))
    torch.testing.assert_close(result, FGSM()(Linear(), IMAGE, LABEL, LINF).detach())


@pytest.mark.parametrize("objective", [NFGSM(), FGSMRS()])
def test_one_forward_and_one_gradient_whatever_steps_are_configured(objective):
    configured = PGD(steps=7, step_size="1/255", restarts=3, keep="best")
    net, _ = attacked(objective, configured=configured)
    assert len(net.shown) == 1
    assert objective.attack_units(7) == 2
    assert objective.units(7) == 5
    assert PGDAT().units(10) == 23


@pytest.mark.parametrize("objective", [NFGSM(), FGSMRS()])
def test_the_step_climbs_the_loss_it_is_given(objective):
    """Towards the label instead of away from it: every moved pixel the other way."""
    away, towards = Linear(), Linear()
    attack = objective.training_attack(PGD(start="none"), LINF)
    gray = torch.full((16, 3, 4, 4), 0.5)
    results = [
        attack(net, gray, LABEL, LINF, loss=loss, generator=torch.Generator().manual_seed(0)).detach()
        for net, loss in ((away, None), (towards, lambda z: -cross_entropy(z, LABEL)))
    ]
    start = away.shown[0]
    torch.testing.assert_close(results[0] - start, start - results[1])


@pytest.mark.parametrize("objective", [NFGSM(), FGSMRS()])
@pytest.mark.parametrize(("mode", "per_step"), [("eval", 1), ("train", 2), ("batch", 1)])
def test_statistics_move_with_the_update_and_with_a_train_mode_attack(
    make_trainer, objective, mode, per_step
):
    trainer = make_trainer(Hard(), objective, optim=OptimSettings(epochs=1, batch_size=16))
    object.__setattr__(trainer.recipe, "attack_bn", mode)
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3 * per_step


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NFGSM(noise=-1.0), "noise"),
        (lambda: NFGSM(alpha=0.0), "alpha"),
        (lambda: FGSMRS(alpha=float("inf")), "alpha"),
    ],
)
def test_impossible_settings_are_refused(make, name):
    with pytest.raises(SettingError, match=rf"objective\.{name}"):
        make()
