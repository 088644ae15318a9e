"""The coordinator: rounds, reporting and deployment."""
