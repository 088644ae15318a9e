"""What a hostile coordinator ships: its two apps try to take everything from a site (see ``test_hostile.py``)."""
