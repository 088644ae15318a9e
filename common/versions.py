"""Versions of the software that can change a result."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("colora", "flwr", "torch", "transformers", "peft", "tokenizers", "numpy")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages, without importing them. Absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
