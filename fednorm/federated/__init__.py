"""Federated runs: Flower apps, strategies' common base, and our in-process runtime."""
