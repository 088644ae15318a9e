"""Bounds of a coordinator's plan at a site: of every number, of module names, of round numbers, and of disk space.

The bounds here hold in any case and are far above ordinary plans. ``[allow]`` sets lower ones (``policy.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...common.config.schema import Plan, to_dict
from ...common.config.site_schema import SiteSettings
from ...common.errors import RefusedError
from ...common.protocol.limits import MAX_ROUND
from ...common.protocol.types import TrainRequest
from .policy import MAX_RANK, MAX_STEPS

_RANK, _STEPS, _BATCH, _TOKENS, _RATE = MAX_RANK, MAX_STEPS, 65_536, 131_072, 1e6
BOUNDS: Mapping[str, float] = {  # by key of the plan, without list indices
    "rounds": MAX_ROUND - 1,  # the finalization is one more
    "seed": 2**63 - 1,
    "model.max_length": _TOKENS,
    **{f"{table}.{key}": _RANK for table in ("adapter", "private") for key in ("rank", "modules", "dropout")},
    **{f"{table}.alpha": 1e6 for table in ("adapter", "private")},
    "adapter.rank_pattern": _RANK,
    "adapter.alpha_pattern": 1e6,
    "adapter.layers_to_transform": 10_000,
    **{f"train.{key}": _STEPS for key in ("steps", "personal_steps", "shared_steps", "final_steps", "phase.steps")},
    "train.epochs": 10_000,
    "train.label_smoothing": 1,
    "train.warmup_ratio": 1,
    "train.warmup_steps": 10**12,  # only read by the schedule
    **{f"train.{key}": _BATCH for key in ("batch_size", "micro_batch")},
    **{f"train.{key}": _RATE for key in ("lr", "core_lr", "head_lr", "private_lr", "weight_decay")},
    **{f"train.{key}": 1e12 for key in ("max_grad_norm", "max_update_norm")},
    **{f"privacy.{key}": 1e6 for key in ("epsilon", "noise_multiplier", "max_grad_norm")},
    "privacy.delta": 1,
    "privacy.min_sites": 1000,
    **{f"communication.{key}": 8 for key in ("update_bits", "broadcast_bits")},
    "evaluation.every": MAX_ROUND,
    "evaluation.batch_size": _BATCH,
    "evaluation.max_new_tokens": 16_384,
    "transfer.seeds": 10_000,
    "transfer.samples": 1_000_000,
    "transfer.generator.max_calls": 1_000_000,
    "transfer.generator.batch_size": 4096,
    "transfer.generator.max_new_tokens": 16_384,
    "transfer.generator.temperature": 1e6,
    "transfer.generator.top_k": 10**7,
    "transfer.generator.top_p": 1,
    "transfer.generator.tuning_steps": _STEPS,
    "transfer.generator.tuning_lr": _RATE,
    "transfer.discriminator.rank": _RANK,
    "transfer.discriminator.lr": _RATE,
    "transfer.discriminator.steps": _STEPS,
    "transfer.distillation.epochs": 10_000,
    "transfer.distillation.lr": _RATE,
}
LOWEST: Mapping[str, float] = {  # far below what protects anything, and what an accountant can compute with
    "privacy.epsilon": 1e-3,
    "privacy.noise_multiplier": 1e-3,
    "privacy.max_grad_norm": 1e-6,  # smaller gradients and their noise would be rounded to zero
    "privacy.delta": 1e-100,
}
ROUNDS: Mapping[str, Callable[[int], tuple[int, int]]] = {  # rounds of the plan → first and last round of a request
    "trial": lambda rounds: (0, 0),
    "initialize": lambda rounds: (0, 0),
    "train": lambda rounds: (1, rounds),
    "validate": lambda rounds: (2, rounds + 1),
    "finalize": lambda rounds: (1, rounds + 1),
}
BY_LAYER = ("adapter.rank_pattern", "adapter.alpha_pattern")  # tables whose keys are names of layers
UNKNOWN = 1e6  # of a key that the table lacks; a test finds such keys
ALLOWED = {  # keys of ``[allow]`` that bound one number each; ``policy.py`` has those that bound several together
    "rounds": "max_rounds",
    "train.batch_size": "max_batch_size",
    "train.micro_batch": "max_batch_size",
    "evaluation.batch_size": "max_batch_size",
    "evaluation.max_new_tokens": "max_new_tokens",
    "transfer.samples": "max_samples",
    "transfer.generator.max_calls": "max_calls",
    "transfer.generator.batch_size": "max_batch_size",
    "transfer.generator.max_new_tokens": "max_new_tokens",
    "transfer.distillation.epochs": "max_epochs",
}
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,31}")  # a module's name or the end of one
MAX_MODULES, MAX_PHASES, MAX_NAME = 256, 100, 200
# Names in a site's state folder that are not federations; file systems may ignore case.
RESERVED = frozenset(("flower", "logs", "node.json", "services.json", "audit.jsonl", "trainer.sock", "site.secret"))
RESERVED_ENDINGS = (".lock", ".sock", ".json", ".jsonl", ".log", ".toml")


def check_bounds(plan: Plan, site: SiteSettings) -> None:
    """Raise RefusedError for the first number, module name or federation name of a plan that a site never accepts."""
    for key, value in numbers(to_dict(plan)):
        bound = BOUNDS.get(key, UNKNOWN)
        if abs(value) > bound:
            raise RefusedError(key, f"at most {bound:g}", value, site=site.name)
        if value < LOWEST.get(key, value):
            raise RefusedError(key, f"at least {LOWEST[key]:g}", value, site=site.name)
        allowed = getattr(site.allow, ALLOWED[key]) if key in ALLOWED else None
        if allowed is not None and value > allowed:
            raise RefusedError(key, f"at most {allowed} (allow.{ALLOWED[key]})", value, site=site.name)
    if len(plan.train.phase) > MAX_PHASES:
        raise RefusedError("train.phase", f"at most {MAX_PHASES} phases", len(plan.train.phase), site=site.name)
    adapter = plan.adapter
    _check_modules("adapter.target_modules", adapter.target_modules, site)
    _check_modules("adapter.exclude_modules", adapter.exclude_modules, site)
    _check_modules("adapter.rank_pattern", tuple(adapter.rank_pattern or ()), site)
    _check_modules("adapter.alpha_pattern", tuple(adapter.alpha_pattern or ()), site)
    _check_modules("private.target_modules", plan.private.target_modules, site)
    _check_modules("transfer.discriminator.target_modules", plan.transfer.discriminator.target_modules, site)
    for key, name in (("name", plan.name), ("transfer.source_federation", plan.transfer.source_federation or "")):
        if name.lower() in RESERVED or name.lower().endswith(RESERVED_ENDINGS):
            raise RefusedError(key, "a name that the state folder does not use itself", name, site=site.name)


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield (key, number) for all numbers in plain settings.

    Items of a list have the key of the list, and values by layer the key of their table.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, path if path in BY_LAYER else f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def check_request(plan: Plan, request: TrainRequest, site: SiteSettings) -> None:
    """Raise RefusedError for a round that the plan does not have, each of which would write a state file."""
    first, last = ROUNDS[request.kind](plan.rounds)
    if not first <= request.round <= last:
        raise RefusedError("round", f"{first} to {last}", request.round, site=site.name)


def check_disk(folder: Path, site: SiteSettings) -> None:
    """Raise RefusedError if a federation's state folder has reached ``allow.max_disk`` (in GB of 10⁹ bytes)."""
    size = sum(map(_size, folder.rglob("*")))
    if size > site.allow.max_disk * 1e9:
        found = f"{size / 1e9:.3g} GB in its state folder"
        raise RefusedError("allow.max_disk", f"at most {site.allow.max_disk:g} GB", found, site=site.name)


def _size(path: Path) -> int:
    """The size of a file in bytes; 0 for anything else, and for a file that another process has just deleted."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _check_modules(key: str, modules: tuple[str, ...] | str | None, site: SiteSettings) -> None:
    """A regular expression from outside could run for ever, so only names and their endings are accepted."""
    names = (modules,) if isinstance(modules, str) else modules or ()
    if len(names) > MAX_MODULES:
        raise RefusedError(key, f"at most {MAX_MODULES} names", len(names), site=site.name)
    for name in names:
        if len(name) > MAX_NAME or not (name == "all-linear" or MODULE_NAME.fullmatch(name)):
            raise RefusedError(
                key,
                "names of modules or their endings",
                name,
                site=site.name,
                message=f"{key} has {name!r}, which is not the name of a module or the end of one.",
                hint="A deployed site accepts no regular expressions. List the name endings.",
            )
