"""Benchmarks of fednorm itself: how fast it is, side by side with what a user would run instead."""
