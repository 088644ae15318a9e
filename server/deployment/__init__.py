"""Deployment of the coordinator: SuperLink, gateway, ServerApp, their supervisor and their status."""
