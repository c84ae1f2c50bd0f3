"""What ``benchmark.py`` measures, and the processes that measure it."""

PLAIN = "plain"  # a baseline: NOVA as its specification words it
NONE = "none"
