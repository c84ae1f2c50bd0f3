"""Record datasets, transforms and loaders."""
