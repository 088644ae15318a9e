"""Keys, certificates and site files."""
