"""The rounds of a federation: registration, sampling, dispatch, admission, aggregation and checkpoints."""
