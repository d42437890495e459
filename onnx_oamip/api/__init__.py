"""The verbs of the package: prune and its stages."""
