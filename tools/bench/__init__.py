"""Measurements behind the numbers in README.md and docs/results.md: one driver, one small file per study.

Run ``python -m tools.bench all --out results``; every study prints its environment, seeds and a Markdown table and
saves JSON. Speed claims are ratios measured side by side in one run.
"""
