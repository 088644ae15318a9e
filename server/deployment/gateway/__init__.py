"""The gateway: the coordinator's public port, which forwards only SuperNode calls to the SuperLink."""
