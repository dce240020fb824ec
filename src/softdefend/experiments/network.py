"""The network of an experiment."""

from __future__ import annotations

import torch
from torch import nn

from softdefend.core import rng
from softdefend.data import DataBundle, channel_stats
from softdefend.experiments.config import Experiment
from softdefend.models import build, check_logits


def make_net(experiment: Experiment, bundle: DataBundle) -> nn.Module:
    """The experiment's network with fresh weights, a function of its seed."""
    mean, std = channel_stats(bundle.train)
    shape = tuple(bundle.train.images.shape[1:])
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        torch.manual_seed(rng.key(experiment.seed, "init"))
        net = build(experiment.net, num_classes=len(bundle.classes), in_channels=shape[0], mean=mean, std=std)
    check_logits(net, shape, len(bundle.classes), "cpu")
    return net
