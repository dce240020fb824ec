"""What the package logs, as lines of a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from softdefend.execution.launched import place_of_this_process

HELP = {"-h", "--help"}
"""Words that ask any command for help."""


class ConsoleHandler(logging.Handler):
    """Bare messages on standard output; from WARNING on ``warning: MESSAGE`` on standard error.

    A stream that cannot be written to raises, as ``print`` does: the command line ends when nobody reads its
    output any more.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record to the streams that ``sys`` has at this moment."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)


@contextmanager
def log_to_console() -> Iterator[None]:
    """Show what the package logs from INFO on, here and nowhere else; afterwards as before. Of several
    processes only the first shows it."""
    logger = logging.getLogger("softdefend")
    before = logger.level, logger.propagate
    handler = ConsoleHandler()
    logger.addHandler(handler)
    place = place_of_this_process()
    logger.setLevel(logging.INFO if place is None or place.rank == 0 else logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
