"""Experiments on published protocols: not part of the package."""
