"""Rewriting a graph: removal of units, and attributes that follow."""
