"""Reporting: the event log, the run folder, summaries and terminal output."""
