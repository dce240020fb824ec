"""Runs and sets of runs: configuration, the training pipeline, comparisons, studies, benchmarks."""
