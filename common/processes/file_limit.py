"""The number of files and connections that a process may have open."""

from __future__ import annotations

import resource


def raise_file_limit() -> int:
    """Raise this process's limit of open files to what the system allows, and return it. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS reports a higher limit than it grants
        return soft
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
