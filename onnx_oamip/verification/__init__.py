"""Checks of a pruned model against its original, and measured latency."""
