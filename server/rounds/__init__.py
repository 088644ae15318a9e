"""The rounds: sampling, dispatch, admission, aggregation and checkpoints."""
