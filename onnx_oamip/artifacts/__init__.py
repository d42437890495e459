"""Files between commands: scores, plans, keep-maps, the cache and the pruned model."""
