"""Many sites on one machine; the only room that may import both client and server."""
