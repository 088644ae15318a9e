"""The trainer process, which serves gRPC to the ClientApp."""
