"""Calibration and evaluation samples, and the readers of their formats."""
