"""Continual runs: streams of experiences, learners' common base, buffers, metrics."""
