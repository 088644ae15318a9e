"""A site: its data, its trainer, its personal state."""
