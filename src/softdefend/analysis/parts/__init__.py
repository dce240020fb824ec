"""The parts of an analysis, one a file."""
