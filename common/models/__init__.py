"""Base models: loading, sources, precision and saved adapters."""
