"""Requests and replies between coordinator and sites, and their encoding."""
