"""A plain Flower app: every message loads the model."""
