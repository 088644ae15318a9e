"""The training loop and gradient accumulation."""
