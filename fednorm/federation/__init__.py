"""Federated runs: the norm plan, Flower apps, strategies' common base, and our in-process runtime."""
