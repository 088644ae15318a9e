"""A site's rows: reading, parsing and selecting."""
