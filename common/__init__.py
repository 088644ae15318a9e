"""Code that coordinator and sites share: settings, the method table, adapters, tasks, training and messages."""
