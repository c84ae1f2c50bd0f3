"""Samples for benchmarks: prompts in, files in the layout that the benchmark's scorer reads."""

SEED = 1337  # the seeds of all samples are derived from it
