"""Other programs: Olive and MLflow."""
