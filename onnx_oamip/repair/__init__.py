"""Compensation of removed units: least-squares reconstruction of the layers behind them."""
