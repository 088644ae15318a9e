"""Errors while a model is read, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError

from ..errors import ModelError

READING = (OSError, ValueError, ImportError, UnpicklingError, SafetensorError)  # what Transformers raises
OWN_CODE = "trust_remote_code"  # in the text of Transformers where a model needs code of its own


@contextmanager
def model_errors_of(field: str, expected: str, source: str) -> Iterator[None]:
    """Turn errors while a model is read into a ModelError of ``field``."""
    try:
        yield
    except ModelError as error:
        message = error.message if error.field == field or not error.message else f"{field}: {error.message}"
        raise ModelError(field, error.expected, error.found, message=message, hint=error.hint) from None
    except READING as error:
        raise unreadable(field, expected, source, error) from None


def unreadable(field: str, expected: str, source: str, error: Exception) -> ModelError:
    """Return the error for a model that Transformers could not read."""
    if OWN_CODE in str(error):
        return own_code(field, source)
    message = f"{source!r} cannot be loaded as {expected}: {error}."
    return ModelError(field, expected, f"{source} ({error})", message=message, hint=f"Check {field}.")


def own_code(field: str, source: str) -> ModelError:
    """Return the error for a model that needs Python code from its own repository."""
    message = f"{source!r} needs Python code of its own repository, which colora never runs."
    expected = "a model whose code is in Transformers"
    hint = "Choose a model whose architecture and tokenizer are part of Transformers."
    return ModelError(field, expected, "a model with code of its own", message=message, hint=hint)
