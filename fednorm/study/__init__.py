"""Runs, their records, and grids of runs."""
