"""Every preset with every protocol, in a file of their own: a file's tests stay in one process."""

from __future__ import annotations

import pytest

from softdefend.experiments.config import packaged, resolve

pytestmark = pytest.mark.slow  # together


@pytest.mark.parametrize("preset", packaged("preset"))
@pytest.mark.parametrize("protocol", packaged("config"))
def test_every_preset_resolves_with_every_protocol(protocol, preset):
    experiment = resolve(["--config", protocol, "--preset", preset])
    assert experiment.name == preset
