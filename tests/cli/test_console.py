"""What the package logs, as lines of a terminal; and the program's end where nobody reads them."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softdefend.cli import main as entry
from softdefend.cli.console import log_to_console

LOG = logging.getLogger("softdefend.somewhere")


def test_messages_go_to_the_stream_of_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_console():
        LOG.debug("hidden")
        LOG.info("epoch %d", 3)
        LOG.warning("odd: %s", "100%")
        LOG.error("worse")
    said = capsys.readouterr()
    assert said.out == "epoch 3\n"
    assert said.err == "warning: odd: 100%\nwarning: worse\n"


def test_nothing_of_it_stays(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("softdefend")
    before = logger.level, logger.propagate, list(logger.handlers)
    with pytest.raises(KeyError), log_to_console():
        raise KeyError
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    LOG.warning("for others")
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == ["for others"]


def test_a_command_logs_to_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "run", lambda words: LOG.info("%s", words))
    assert entry.main(["a", "b"]) == 0
    assert capsys.readouterr().out == "['a', 'b']\n"


SCRIPT = """
import logging, sys
from softdefend.cli import main as entry
def talk(words):
    for number in range(100_000):
        {speak}
entry.run = talk
sys.exit(entry.main([]))
"""


@pytest.mark.parametrize("speak", ["print(number)", "logging.getLogger('softdefend').info(number)"])
def test_a_reader_that_has_gone_ends_the_program(speak: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(speak=speak))
    started = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert started.stdout is not None
    assert started.stderr is not None
    assert started.stdout.readline() == b"0\n"
    started.stdout.close()
    assert started.stderr.read() == b""
    started.stderr.close()
    assert started.wait() == entry.EXIT_BROKEN_PIPE


def test_a_fault_of_the_parser_library_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> None:
        raise argparse.ArgumentError(None, "something\nnobody foresaw")

    monkeypatch.setattr(entry, "run", fail)
    assert entry.main([]) == 2
    assert capsys.readouterr().err == (
        "softdefend: error: command line: got something nobody foresaw; accepted: what --help shows\n"
    )
