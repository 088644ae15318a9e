"""The two apps of a hostile coordinator, which try to take everything from a site (see ``test_hostile.py``)."""
