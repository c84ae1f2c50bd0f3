"""The NOVA transformer and its task-independent base."""
