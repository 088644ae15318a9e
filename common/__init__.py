"""What both sides agree on: settings, the method table, adapters, tasks, training and the wire."""
