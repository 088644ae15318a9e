"""The coordinator: strategy, aggregation, admission, checkpoints."""
