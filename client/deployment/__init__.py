"""The processes of a deployed site: trainer and SuperNode, their supervision, checks and status."""
