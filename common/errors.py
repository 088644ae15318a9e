"""The error family. Every error is one line of text that says what is wrong and, where possible, what to do.

ColoraError
├── ConfigError (ValueError)      a recipe, an option or a site file
├── AssetError (RuntimeError)     a model or data set from a package registry
├── ModelError (ValueError)       the base model, or an adapter that does not fit
├── DataError (ValueError)        a site's rows
├── StateError (RuntimeError)     files on disk: run folders, checkpoints, personal state
│   └── DamagedError              a file that was whole and is not any more
├── RefusedError (ValueError)     a request that a site refuses, or a reply that the coordinator refuses
├── ReferenceMissingError (RuntimeError)  a difference to a shared adapter that this site does not have
└── QuorumError (RuntimeError)    too few sites or admitted replies
"""

from __future__ import annotations

import re

from .foreign_text import MAX_TEXT, clean

_PUBLIC = re.compile(r"(?!.*\brow \d)[A-Za-z_][A-Za-z0-9_.+ \[\]-]*")  # keys and names of arrays, but no paths
MAX_LINE = 4000  # characters of an error: a message may quote a plan, a file or another program
MAX_MESSAGE = 600  # characters of a refusal's sentence, which may quote several texts of the other side


class ColoraError(Exception):
    """Base class: an error about one field, with the site, what was expected and what was found.

    The text is ``message``, one sentence, followed by ``hint``, which says what to do. Without a message the text is
    "FIELD: expected EXPECTED, found FOUND". ``found``, ``message`` and ``hint`` can contain a site's data, so only
    ``public`` may leave a site.
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
        return clean(" ".join(f"{where}{message}".split()), MAX_LINE)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.field, self.expected, self.found, self._rest())

    def _rest(self) -> dict[str, str | None]:
        return {"site": self.site, "message": self.message, "hint": self.hint}

    def public(self) -> str:
        """Return the error type and the field, the only parts that the coordinator receives.

        A field that names a file or a row is left out.
        """
        return f"{type(self).__name__}: {clean(self.field)}" if _PUBLIC.fullmatch(self.field) else type(self).__name__

    def at_site(self, site: str) -> ColoraError:
        """Return the same error with a site's name, unless it has one already."""
        return type(self)(self.field, self.expected, self.found, **{**self._rest(), "site": self.site or site})


def reason_in_words(reason: str, site: str | None) -> str:
    """Return why a site was left out as a clause, without the site's name. A public text becomes a sentence."""
    reason = reason.removeprefix(f"site {site}: ")
    kind, _, field = reason.partition(": ")
    cause = _BUDGET if reason in _OVER_BUDGET else _CAUSES.get(kind)
    if not cause or (field and not _PUBLIC.fullmatch(field)):
        return reason
    return f"{cause}{f' ({field})' if field else ''}; the log of the site has the details"


def _rebuild(
    kind: type[ColoraError], field: str, expected: str, found: str, rest: dict[str, str | None]
) -> ColoraError:
    return kind(field, expected, found, **rest)


class ConfigError(ColoraError, ValueError):
    """A recipe, a command-line option or a site file is wrong."""


class AssetError(ColoraError, RuntimeError):
    """A packaged model or data set cannot be downloaded, or its hash is wrong."""


class ModelError(ColoraError, ValueError):
    """The base model cannot be loaded, or the adapter does not fit it."""


class DataError(ColoraError, ValueError):
    """A site's rows are missing or malformed."""


class StateError(ColoraError, RuntimeError):
    """A run folder, checkpoint or personal state is missing, belongs to another run, or cannot be written."""


class DamagedError(StateError):
    """A state, a checkpoint or another file of colora is damaged: it is cut, or its bytes have changed."""


class RefusedError(ColoraError, ValueError):
    """A request or reply is refused. Field, found value and site may be of the other side's choice, so they are cut."""

    def __init__(self, field: str, expected: str, found: object, **texts: str | None) -> None:
        limits = {"site": MAX_TEXT, "message": MAX_MESSAGE}
        cut = {name: clean(text, limits[name]) if text and name in limits else text for name, text in texts.items()}
        super().__init__(clean(field), expected, clean(found), **cut)


class ReferenceMissingError(ColoraError, RuntimeError):
    """A site does not have the shared adapter that a difference was made for, so it needs the whole one."""


class QuorumError(ColoraError, RuntimeError):
    """Too few sites or admitted replies to continue."""


_OVER_BUDGET = ("RefusedError: privacy.epsilon", "RefusedError: allow.max_epsilon")
_BUDGET = "the round would spend more than the privacy budget of the site"
_CAUSES = {  # of the errors whose public text a site sends
    "ConfigError": "the site has an error in its site file",
    "AssetError": "the site could not get a packaged model or data set",
    "ModelError": "the site has an error with its base model",
    "DataError": "the site has an error in its data",
    "StateError": "the site could not read or write its state",
    "DamagedError": "the site found a damaged file",
    "RefusedError": "the site refused the request",
    "ReferenceMissingError": "the site lacks the adapter that the difference was made for",
}
