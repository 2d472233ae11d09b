"""``check``: what every strategy and every conversion would make of a model."""
