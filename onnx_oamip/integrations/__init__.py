"""Integrations with other programs: Olive and MLflow."""
