"""Secure aggregation: a coordinator learns the weighted sum of the sites' updates and no single one of them."""
