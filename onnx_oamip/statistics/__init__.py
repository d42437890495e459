"""Statistics of the calibration samples, collected on request."""
