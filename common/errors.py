"""One family of errors; every one is a single line that a person can act on.

ColoraError
├── RecipeError (ValueError)      a recipe, an option or a site file
├── AssetError (RuntimeError)     a model or data set that installs from a package
├── ModelError (ValueError)       the base model, or an adapter that does not fit it
├── DataError (ValueError)        a site's rows
├── StateError (RuntimeError)     what lies on disk: run folders, checkpoints, personal state
├── RefusedError (ValueError)     a message that may not count: an order at a site, a reply at the coordinator
└── QuorumError (RuntimeError)    too few admitted replies
"""

from __future__ import annotations


class ColoraError(Exception):
    """Base of the family: names the site, the field, what was expected and what was found.

    ``found`` may quote a site's own data, so only :meth:`public` may leave a site.
    """

    def __init__(self, field: str, expected: str, found: object, *, site: str | None = None) -> None:
        self.field, self.expected, self.found, self.site = field, expected, str(found), site
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"site {self.site}: " if self.site else ""
        return " ".join(f"{where}{self.field}: expected {self.expected}, found {self.found}".split())

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.field, self.expected, self.found, self.site)

    def public(self) -> str:
        """What the coordinator may be told: the kind of error and the field, nothing that was found."""
        return f"{type(self).__name__}: {self.field}"

    def at_site(self, site: str) -> ColoraError:
        """The same error, naming the site it happened at."""
        return type(self)(self.field, self.expected, self.found, site=self.site or site)


def _rebuild(kind: type[ColoraError], field: str, expected: str, found: str, site: str | None) -> ColoraError:
    return kind(field, expected, found, site=site)


class ConfigError(ColoraError, ValueError):
    """A recipe, a command-line option or a site file is wrong."""


class AssetError(ColoraError, RuntimeError):
    """A packaged model or data set cannot be had, or is not what its hash says."""


class ModelError(ColoraError, ValueError):
    """The base model is not there, or the adapter does not fit it."""


class DataError(ColoraError, ValueError):
    """A site's rows cannot be used."""


class StateError(ColoraError, RuntimeError):
    """A run folder, checkpoint or personal state is missing, foreign or cannot be written."""


class RefusedError(ColoraError, ValueError):
    """A message that may not count."""


class QuorumError(ColoraError, RuntimeError):
    """Too few sites, or too few admitted replies, to go on."""
