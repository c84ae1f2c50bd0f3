"""The configuration of a run: every key (schema), reading it (load), what it names (targets)."""
