"""Recipes and site files: schema, loading and error messages."""
