"""PEFT's names for the keys of ``[adapter]`` and ``[private]``, replaced by colora's when a file is read.

A LoRA recipe for PEFT can be copied. A table that has both names of one key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
INIT = "init_lora_weights"
INITS: dict[Any, str] = {True: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal"}
# Initial values of PEFT that do not fit, with the reason.
BASE_CHANGES = "it subtracts a part of the base model's weights, which must stay the same at all sites"
NEEDS_DATA = "it is computed from data, and every site has different data"
REFUSED_INITS: dict[Any, str] = {
    False: "the untrained adapter would change the output, and the base model could not be evaluated",
    "pissa": BASE_CHANGES,
    "olora": BASE_CHANGES,
    "loftq": BASE_CHANGES,
    "mica": "it freezes B, which the method table decides (method.B)",
    "corda": NEEDS_DATA,
    "eva": NEEDS_DATA,
    "lora_ga": NEEDS_DATA,
}
DORA = "it scales the columns of the adapted weight, and no product B Λ A can express that"


def in_own_words(table: Any, path: str) -> Any:
    """Return an ``[adapter]`` or ``[private]`` table with colora's names of its keys; anything else unchanged.

    ``path`` names the table in errors. Raises ConfigError for a key that is there under both names, and for a setting
    of PEFT that does not fit, with the reason.
    """
    if not isinstance(table, Mapping):
        return table
    own = {key: value for key, value in table.items() if key not in (*NAMES, INIT, "use_dora")}
    for theirs, ours in NAMES.items():
        if theirs in table:
            _check_once(table, theirs, ours, path)
            own[ours] = table[theirs]
    if INIT in table:
        _check_once(table, INIT, "init", path)
        own["init"] = _init(table[INIT], path)
    if table.get("use_dora", False) is not False:
        message = f"{path}.use_dora is not possible: {DORA}."
        raise ConfigError(f"{path}.use_dora", "false", table["use_dora"], message=message, hint="Remove it.")
    return own


def _init(value: Any, path: str) -> str:
    kind = value if isinstance(value, bool) else str(value).lower()
    if kind in INITS:
        return INITS[kind]
    field, known = f"{path}.{INIT}", "true, 'gaussian' or 'orthogonal'"
    written = str(value).lower() if isinstance(value, bool) else repr(value)
    reason = REFUSED_INITS.get("pissa" if str(kind).startswith("pissa") else kind)
    message = (
        f"{field} = {written} is not possible: {reason}." if reason else f"{field} must be {known}, not {written}."
    )
    raise ConfigError(field, known, written, message=message, hint=f"Use {known}." if reason else None)


def _check_once(table: Mapping[str, Any], theirs: str, ours: str, path: str) -> None:
    if ours in table:
        message = f"{path} has both {ours} and {theirs}, which are two names of one key."
        raise ConfigError(
            f"{path}.{theirs}", f"{ours} or {theirs}", "both", message=message, hint="Remove one of them."
        )
