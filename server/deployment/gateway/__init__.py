"""The only public port: Flower's Fleet API."""
