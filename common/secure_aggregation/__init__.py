"""Secure aggregation: a coordinator that follows the protocol learns only the weighted sum of the updates."""
