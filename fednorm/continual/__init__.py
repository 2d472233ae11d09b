"""Continual learning: streams of experiences, and what is measured on them."""
