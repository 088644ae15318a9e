"""Supervised processes and their health."""
