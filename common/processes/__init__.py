"""Supervised child processes and their health."""
