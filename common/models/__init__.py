"""Base models and saved models: sources, loading, precision, and model files on disk."""
