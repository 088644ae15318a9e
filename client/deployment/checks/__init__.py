"""The checks of ``colora client --check``."""
