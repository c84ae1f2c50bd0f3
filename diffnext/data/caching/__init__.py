"""Record datasets from pictures and clips; the call is ``building.build_cache``."""
