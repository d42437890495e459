"""The functions of the package: ``prune`` and its stages."""
