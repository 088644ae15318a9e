"""Simulations of a federation on one machine. This package may import both the client and the server."""
