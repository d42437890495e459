"""Files that one command writes and another reads: models, plans, scores, keep-maps, and the cache."""
