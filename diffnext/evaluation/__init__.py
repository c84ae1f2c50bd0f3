"""Samples for benchmarks: prompts in, files in the layout that the benchmark's scorer reads."""

SEED = 1337  # from which those of all samples are derived
