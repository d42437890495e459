"""Foundations without knowledge of models: errors, records, settings, files, progress."""
