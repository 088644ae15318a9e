"""A site's rows."""
