"""Clients that learn on streams of their own: a federation over experiences, the third kind of run."""
