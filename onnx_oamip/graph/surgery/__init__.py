"""Graph rewriting: removal of units, and scales that depend on widths."""
