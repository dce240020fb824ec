"""Constants and helpers that several test rooms share."""

K = 4
"""Classes of the small data set in conftest.py."""


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would be too slow."""
