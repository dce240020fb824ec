"""A torchvision that does not fit torch fails on import; nothing here needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from softdefend.cli.main import COMMANDS, load, main
for name in COMMANDS:
    load(name)
assert main(["methods"]) == 0
main(["--version"])
"""


def test_no_command_imports_a_torchvision_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    (tmp_path / "torchvision-0.99.dist-info").mkdir()
    (tmp_path / "torchvision-0.99.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    # A process of its own, since this one has imported what it needs.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("softdefend ")
