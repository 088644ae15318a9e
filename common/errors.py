"""One family of errors; every one is a single line that a person can act on.

ColoraError
├── ConfigError (ValueError)      a recipe, an option or a site file
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

    The text is ``message``, a sentence, followed by ``hint``, which says what to do. Without a message the text is
    "FIELD: expected EXPECTED, found FOUND". ``found``, ``message`` and ``hint`` may quote a site's own data, so only
    :meth:`public` may leave a site.
    """

    def __init__(
        self,
        field: str,
        expected: str,
        found: object,
        *,
        site: str | None = None,
        message: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.field, self.expected, self.found, self.site = field, expected, str(found), site
        self.message, self.hint = message, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"site {self.site}: " if self.site else ""
        message = self.message or f"{self.field}: expected {self.expected}, found {self.found}"
        if self.hint:
            message = f"{message.rstrip('.')}. {self.hint}"
        return " ".join(f"{where}{message}".split())

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.field, self.expected, self.found, self._rest())

    def _rest(self) -> dict[str, str | None]:
        return {"site": self.site, "message": self.message, "hint": self.hint}

    def public(self) -> str:
        """The error type and the field: all that the coordinator receives."""
        return f"{type(self).__name__}: {self.field}"

    def at_site(self, site: str) -> ColoraError:
        """Return the same error with the site's name, unless it has one."""
        return type(self)(self.field, self.expected, self.found, **{**self._rest(), "site": self.site or site})


def _rebuild(
    kind: type[ColoraError], field: str, expected: str, found: str, rest: dict[str, str | None]
) -> ColoraError:
    return kind(field, expected, found, **rest)


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
