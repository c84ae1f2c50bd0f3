"""What ``diffnext benchmark`` measures, and the processes that measure it."""

from pathlib import Path

PLAIN = "plain"  # a baseline: NOVA as its specification words it
NONE = "none"
REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "reference_nova.py"  # in a checkout
