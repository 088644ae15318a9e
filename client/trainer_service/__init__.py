"""The trainer process, its gRPC service, and the ClientApp's client of it."""
