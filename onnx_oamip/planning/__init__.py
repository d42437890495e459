"""From scores to widths: sensitivities, the budget program, allocation and search."""
