"""Running a site: the trainer and the SuperNode."""
