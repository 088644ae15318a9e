"""The exit codes of the commands, besides 0."""

UNHEALTHY = 1  # status: something needs a person; doctor: a file is damaged
BAD_INPUT = 2
STOPPED = 130  # by Ctrl-C or another signal
