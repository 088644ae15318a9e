"""A plain Flower app, in which every message loads the model."""
