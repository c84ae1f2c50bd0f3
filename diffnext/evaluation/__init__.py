"""Samples for benchmarks: prompts in, files in the layout that the benchmark's scorer reads."""
