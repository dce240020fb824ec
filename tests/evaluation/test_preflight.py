"""Everything that makes an evaluation meaningless is refused in one line; what is merely odd is not."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.preflight import difference, preflight, preflight_training

THREAT = ThreatModel("linf", "8/255")
IMAGES = torch.rand(20, 3, 4, 4, generator=stream(0, "x"))
LABELS = torch.arange(20) % 5


class Net(nn.Module):
    """A small network whose logits pass through a function."""

    def __init__(self, change=lambda z: z) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(16, 5),
            )
        self.change = change
        self.eval()

    def forward(self, image: Tensor) -> object:
        return self.change(self.layers(image))


def refused(net=None, images=IMAGES, labels=LABELS, threat=THREAT, **settings) -> str:
    """The complaint, which has to be one line."""
    with pytest.raises(SettingError) as caught:
        preflight(Net() if net is None else net, images, labels, threat, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_honest_network_passes():
    preflight(Net(), IMAGES, LABELS, THREAT)
    preflight(Net(), IMAGES, LABELS, ThreatModel("l2", "128/255"), classes=5)
    preflight(Net(), IMAGES[:1], LABELS[:1], THREAT)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.detach(),  # for the audit to judge
        lambda z: z.bfloat16(),
        lambda z: 1e4 * z,
        lambda z: torch.full_like(z, 0.5),  # in [0, 1], but rows do not sum to one
        lambda z: z.log_softmax(1),
        lambda z: ((z.softmax(1) + z.roll(1, 1).softmax(1)) / 2).log(),  # averaged probabilities
    ],
)
def test_what_is_odd_but_usable_passes(change):
    preflight(Net(change), IMAGES, LABELS, THREAT)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((IMAGES * 255).to(torch.uint8), ("uint8 images", ".float() / 255")),
        (IMAGES.double(), ("float64 images",)),
        (IMAGES * 255, ("divide them by 255",)),
        ((IMAGES - 0.5) / 0.25, ("pixels from -", "normalization belongs into the network")),
        (IMAGES * 1.2, ("to 1.", "normalization")),
        (IMAGES / 255, ("divided by 255 only once",)),
        (IMAGES.where(IMAGES < 0.9, torch.nan), ("NaN",)),
        (IMAGES.where(IMAGES < 0.9, torch.inf), ("infinite",)),
        (IMAGES[0], ("shape [3, 4, 4]",)),
        (IMAGES[:0], ("shape [0, 3, 4, 4]",)),
        ([1, 2], ("got list",)),
    ],
)
def test_pixels(images, words):
    message = refused(images=images, labels=LABELS[: len(images)])
    assert message.startswith("images: got ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("shift", [-5e-7, 5e-7])
def test_rounding_beyond_the_box_is_no_fault(shift):
    preflight(Net(), IMAGES.clamp(0, 1) + shift * (IMAGES.round() * 2 - 1).abs(), LABELS, THREAT)


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (LABELS.float(), "float32 labels"),
        (LABELS.int(), "int32 labels"),
        (LABELS[:-1], "shape [19]"),
        (nn.functional.one_hot(LABELS), "shape [20, 5]"),
        (LABELS - 1, "label -1"),
        (LABELS + 1, "label 5; accepted: labels below 5"),
        (LABELS.tolist(), "got list"),
    ],
)
def test_labels(labels, word):
    message = refused(labels=labels)
    assert message.startswith("labels: got ")
    assert word in message


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("linf", "1"),
        ("linf", "0.5"),
        ("linf", str(8 / 255 / 255)),
        ("l2", "8"),
        ("l2", str(0.5 / 255 / 255)),
        ("l1", "24"),
        ("l1", "0.0003"),
    ],
)
def test_eps_of_another_unit(norm, eps):
    assert refused(threat=ThreatModel(norm, eps)).startswith(
        f"threat.eps: got {eps}; accepted: a value in [0.1/255"
    )


def test_in_l0_eps_is_below_half_the_values():
    assert refused(threat=ThreatModel("l0", 24)) == (
        "threat.eps: got 24; accepted: a number of values below 24, half those of an image"
    )
    preflight(Net(), IMAGES, LABELS, ThreatModel("l0", 23))


def test_the_largest_eps_is_where_everything_can_turn_grey():
    """sqrt(48) / 2 = 3.46: an l2 ball of that radius around any image holds uniform gray."""
    preflight(Net(), IMAGES, LABELS, ThreatModel("l2", "3.4"))
    assert "3.464" in refused(threat=ThreatModel("l2", "3.5"))


def test_a_network_in_train_mode_is_named():
    assert "in train mode" in refused(Net().train())
    for kind in (nn.BatchNorm2d, nn.Dropout):
        net = Net()
        for module in net.modules():
            if isinstance(module, kind):
                module.train()
        message = refused(net)
        assert kind.__name__ in message
        assert "net.eval()" in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda z: z.softmax(1), "returns probabilities"),
        (lambda z: z.softmax(1).bfloat16(), "returns probabilities"),
        (lambda z: (20 * z).sigmoid(), "outputs all lie in [0, 1]"),
        (lambda z: z * torch.nan, "NaN or infinity"),
        (lambda z: z / 0.0, "NaN or infinity"),
        (lambda z: (z, z), "returns tuple"),
        (lambda z: z.argmax(1), "returns torch.int64"),
        (lambda z: z[:1], "shape [1, 5]"),
        (lambda z: z[:, :1], "shape [20, 1]"),
        (lambda z: z[..., None], "shape [20, 5, 1]"),
        (lambda z: z @ z, "fails on a forward pass"),
        (lambda z: z.to_sparse(), "returns a sparse tensor"),
        (lambda z: z.to("meta"), "returns a tensor on the meta device"),
        (lambda z: torch.nested.nested_tensor(list(z), layout=torch.jagged), "returns a nested tensor"),
        (lambda z: sys.exit(3), "fails on a forward pass (SystemExit: 3)"),
    ],
)
def test_outputs(change, word):
    message = refused(Net(change))
    assert message.startswith("net: got ")
    assert word in message


class InPlace(Net):
    """Normalizes its input where it stands."""

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.sub_(0.5))


def test_a_network_that_changes_its_input():
    before = IMAGES.clone()
    assert "writes into the images" in refused(InPlace())
    assert torch.equal(IMAGES, before)


def test_a_network_that_writes_the_same_values_into_its_input():
    """In an attack the image requires a gradient, and torch refuses to write into it."""
    assert float(IMAGES.min()) >= 0
    assert "writes into the images" in refused(nn.Sequential(nn.ReLU(inplace=True), Net()).eval())


def test_class_counts():
    assert refused(classes=10) == "classes: got 10; accepted: 5, as many as the network has outputs"
    assert "labels below 4" in refused(Net(lambda z: z[:, :4]))


def test_a_network_on_another_device():
    message = refused(Net().to("meta"))
    assert "on meta" in message
    assert "on cpu" in message
    assert "labels on meta" in refused(labels=LABELS.to("meta"))


class Noisy(Net):
    """Draws from torch's generator at every forward."""

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image + 0.1 * torch.rand(image.shape))


class Counting(Net):
    """Another answer at every call."""

    calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(image) + self.calls


@pytest.mark.parametrize("kind", [Noisy, Counting])
def test_a_moving_network_is_refused_unless_announced(kind):
    assert "between equal forwards" in refused(kind())
    preflight(kind(), IMAGES, LABELS, THREAT, assumes_determinism=False)


def test_nothing_is_remembered_between_networks():
    """A shared reference tool accuses every network after the first guilty one."""
    refused(Noisy())
    preflight(Net(), IMAGES, LABELS, THREAT)


def test_nothing_is_left_changed():
    net, state = Noisy(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def tracer(*_):
        return None

    old = sys.gettrace()
    sys.settrace(tracer)
    try:
        preflight(net, IMAGES, LABELS, THREAT, assumes_determinism=False)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(old)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_difference_is_the_relative_distance_of_rows():
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(
        difference(one, other), torch.tensor([0.0, 5**0.5 / 2, 0.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("hidden", ["by a constant", "by a class that is never meant"])
def test_nothing_in_the_logits_hides_a_difference_that_softmax_sees(hidden):
    """Beside 1e6 the distance of both is a millionth of their length."""
    one = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    other = torch.tensor([[3.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    bare = difference(one, other)
    assert bare[0] > 0.2
    if hidden == "by a constant":
        found = difference(one + 1e6, other + 1e6)
    else:
        found = difference(*(torch.cat([rows, torch.full((2, 1), -1e6)], 1) for rows in (one, other)))
    assert found[0] > 0.03
    assert found[1] == bare[1] == 0


class Company(Net):
    """Batch normalization without running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False).eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(self.norm(image))


class Switched(Net):
    """Puts a layer into train mode when it is used."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(self.norm.train()(image))


class Functional(Net):
    """The batch's statistics without a layer that would say so."""

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(F.batch_norm(image, None, None, training=True))


def test_a_layer_that_the_forward_switches_to_train_mode():
    assert "norm (BatchNorm2d) in train mode" in refused(Switched().eval())


def test_one_image_alone_shows_statistics_that_eight_images_share_with_all():
    assert "in another batch" in refused(Functional())


def test_a_network_that_fails_on_one_image_is_refused_in_one_line():
    squeezed = Net(lambda logits: logits.squeeze())
    for announced in (True, False):  # an attack that averages has a last batch too
        assert "returns shape [5]" in refused(squeezed, assumes_determinism=announced)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    assert "more than 1 value per channel" in refused(alone, assumes_determinism=False)


def test_a_network_that_looks_at_the_batch_is_refused_unless_announced():
    darker = IMAGES * torch.linspace(0.1, 1, len(IMAGES)).view(-1, 1, 1, 1)
    assert "in another batch" in refused(Company(), darker)
    preflight(Company(), darker, LABELS, THREAT, assumes_determinism=False)
    preflight(Net(), darker, LABELS, THREAT)


# --- before training ----------------------------------------------------------------------------------------


class Train(Net):
    """Something else in train mode than in eval mode."""

    def __init__(self, change):
        super().__init__()
        self.in_train_mode = change

    def forward(self, image: Tensor) -> object:
        logits = self.layers(image)
        return self.in_train_mode(logits) if self.training else logits


class Behind(Net):
    """Something done to the image first."""

    def __init__(self, before):
        super().__init__()
        self.before = before

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(self.before(image))


def refused_in_training(net, images=IMAGES, **settings) -> str:
    with pytest.raises(SettingError) as caught:
        preflight_training(net, images, LABELS, THREAT, classes=5, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("net", "images"),
    [
        (Net(lambda z: z.softmax(1)), IMAGES),
        (InPlace(), IMAGES),
        (Net(lambda z: z[0]), IMAGES),
        (Noisy(), IMAGES),
        (Company(), IMAGES * torch.linspace(0.1, 1, 20).view(-1, 1, 1, 1)),
        (Net(), IMAGES / 255),
        (Net(lambda z: sys.exit(3)), IMAGES),
    ],
    ids=["softmax", "in place", "shape", "noise", "batch statistics", "divided twice", "exit"],
)
def test_training_is_refused_in_the_words_of_the_evaluation(net, images):
    assert refused_in_training(net, images) == refused(net, images)


def test_a_sigmoid_is_seen_before_its_outputs_are_sure_of_anything():
    fresh = Net(torch.sigmoid)
    assert fresh(IMAGES).detach().max() < 0.9
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    message = refused_in_training(fresh)
    assert message == refused(Net(lambda z: (20 * z).sigmoid()))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def head(weight: Tensor, change=lambda z: z) -> nn.Module:
    """Brightness and darkness of an image, weighed."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 5, bias=False)
            self.linear.weight = nn.Parameter(weight.clone())

        def forward(self, image):
            bright = image.mean((1, 2, 3))
            return change(self.linear(torch.stack([bright, 1 - bright], 1)))

    return Head()


@pytest.mark.parametrize(
    "net",
    [
        head(torch.full((5, 2), 0.5)),  # logits that lie in [0, 1] by chance
        head(torch.zeros(5, 2)),  # a last layer that starts at zero
        head(torch.full((5, 2), 0.1), F.relu),
        head(torch.full((5, 2), 0.1), lambda z: F.normalize(z, dim=1)),
        Net(lambda z: z.log_softmax(1)),
    ],
    ids=["by chance", "zero", "relu", "cosines", "log-probabilities"],
)
def test_outputs_that_may_leave_the_unit_range_are_no_sigmoid(net):
    preflight_training(net, IMAGES, LABELS, THREAT, classes=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: (z, z), "returns tuple, in train mode"),
        (lambda z: {"out": z, "aux": z}, "returns dict, in train mode"),
        (lambda z: None, "returns NoneType, in train mode"),
        (lambda z: z.softmax(1), "returns probabilities, in train mode"),
        (lambda z: z[:, :4], "a network with 4 outputs, in train mode"),
        (lambda z: z * torch.nan, "NaN or infinity, in train mode"),
        (lambda z: z @ z, "fails on a forward pass"),
        (lambda z: z.detach(), "no gradient in its parameters"),
    ],
)
def test_train_mode_is_tried_too(change, words):
    net = Train(change)
    preflight(net, IMAGES, LABELS, THREAT)
    message = refused_in_training(net)
    assert message.startswith("net: got a network")
    assert words in message
    assert not net.training


def test_a_gradient_in_the_image_is_needed_where_training_attacks():
    net = Behind(lambda image: image.detach())
    assert "no gradient in the image" in refused_in_training(net)
    preflight_training(net, IMAGES, LABELS, THREAT, classes=5, attacked_in_training=False)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_training_leaves_everything_as_it_was(count):
    class Replacing(Net):
        """Puts another tensor in the place of a buffer."""

        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, image):
            if self.training:
                self.seen = self.seen + len(image)
            return self.layers(image)

    net = Replacing().train()
    net.layers[1].eval()
    buffer, state = net.seen, torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    preflight_training(net, IMAGES[:count], LABELS[:count], THREAT, classes=5)
    assert [module.training for module in net.modules()] == modes
    assert net.seen is buffer
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
