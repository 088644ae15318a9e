"""Provisioning: keys, certificates and site files for a coordinator and its sites."""
