"""Settings of the base model, the adapters and the federated method."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from ..errors import ConfigError
from ..foreign_text import clean
from ..methods import ABSENT, GROUPS, METHODS, PRIVATE_KINDS, Method, Role
from .diagnostics import suggest_method
from .field_types import STRICT, Count, Positive, PositiveFloat, Precision, PrivateKind, Probability, Revision


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The frozen base model."""

    source: str
    """A Hugging Face hub id, a local folder, or ``asset:NAME`` for a packaged model."""

    revision: Revision | None = None
    """Branch, tag or commit of a hub repository: at most 100 letters, digits, ``_`` and ``-``, with single ``.`` or
    ``/`` between them. Unset: the default branch."""

    max_length: Positive = 256
    """Maximum length of one example in tokens. Longer texts are truncated, and the site reports how many."""

    precision: Precision = "fp32"
    """Precision of the base model's weights. ``int8`` and ``int4`` need bitsandbytes. Adapters and heads stay fp32."""

    device: str = "auto"
    """Torch device of a simulation. ``auto`` takes a GPU if there is one. A deployed site names its device in its site
    file."""


@dataclass(frozen=True, config=STRICT)
class AdapterSettings:
    """The shared LoRA adapter: ΔW = s · B Λ A with s = alpha/rank, or alpha/√rank with ``rslora``."""

    rank: Positive = 8
    """Rank of the adapter; of each module, where the method has MultiLoRA modules."""

    alpha: PositiveFloat = 16.0
    """Numerator of the scaling factor s."""

    dropout: Probability = 0.0
    """Dropout probability on the input of A during training."""

    target_modules: tuple[str, ...] | str | None = None
    """Linear layers that get an adapter: a list of name endings, one regular expression over whole names, or
    ``all-linear``. Unset: PEFT's default for the model's type, or ``all-linear`` where PEFT has none."""

    exclude_modules: tuple[str, ...] | str | None = None
    """Target modules that get no adapter, written as ``target_modules`` are. Unset: none."""

    layers_to_transform: tuple[Count, ...] | Count | None = None
    """Numbers of the blocks whose target modules get an adapter: the first number in a layer's name. Unset: all."""

    rank_pattern: dict[str, Positive] | None = None
    """Ranks of single layers, by name ending or regular expression. Unset: ``rank`` everywhere."""

    alpha_pattern: dict[str, PositiveFloat] | None = None
    """Values of ``alpha`` for single layers, by name ending or regular expression. Unset: ``alpha`` everywhere."""

    core: Literal["full", "diagonal", "residual"] = "full"
    """Form of the core Λ, where the method has one: an r × r matrix, r diagonal values, or I plus an r × r matrix."""

    init: Literal["kaiming", "gaussian", "orthogonal", "spectral"] = "kaiming"
    """Initial values, at which the adapter changes nothing. ``kaiming`` and ``gaussian``: A uniform or normal, B zero,
    cores the identity, as in PEFT. ``orthogonal``: A and B are random with BA = 0, for even ranks. ``spectral``: A and
    B are the subspaces that the sites' gradients have in common, and the cores are zero. It needs shared A and B and a
    core. On regression tasks it helped together with ``server.weights = "benefit"``."""

    rslora: bool = False
    """Scale by alpha/√rank (rank-stabilized LoRA) instead of alpha/rank."""

    modules: Positive = 3
    """Number of MultiLoRA modules, where the method has them; ignored otherwise."""


@dataclass(frozen=True, config=STRICT)
class PrivateSettings:
    """A private adapter beside the shared one, possible with every method. It never leaves its site.

    ``private = "lora"`` is short for a table with that ``kind`` and the defaults below.
    """

    kind: PrivateKind
    """``none``, ``lora`` (s · B A), or ``multilora`` (s · Σ_i s_i ⊙ B_i A_i)."""

    rank: Positive = 4
    """Rank of the adapter; of each module of ``multilora``."""

    alpha: PositiveFloat = 8.0
    """Numerator of the scaling factor s = alpha/rank."""

    dropout: Probability = 0.0
    """Dropout probability on the input of A during training."""

    target_modules: tuple[str, ...] | str | None = None
    """Linear layers that get a private adapter. Unset: those of the shared adapter."""

    rslora: bool = False
    """Scale by alpha/√rank instead of alpha/rank."""

    modules: Positive = 3
    """Number of modules of ``multilora``; ignored otherwise."""

    @property
    def present(self) -> bool:
        """Whether there is a private adapter."""
        return self.kind != "none"

    @property
    def slices(self) -> int:
        """Number of modules side by side: n of MultiLoRA, else 1."""
        return self.modules if PRIVATE_KINDS[self.kind] else 1

    @property
    def total_rank(self) -> int:
        """Rank of all modules together, n·r; 0 without a private adapter."""
        return self.rank * self.slices if self.present else 0


def _by_kind(value: object) -> object:
    """Accept ``private = "multilora"`` as a table with that kind, and lists where strict mode wants tuples."""
    if isinstance(value, str):
        return {"kind": value}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value


Private = Annotated[PrivateSettings, BeforeValidator(_by_kind)]


@dataclass(frozen=True, config=STRICT)
class MethodSettings:
    """The federated method, and roles of parameter groups that differ from the method table."""

    name: str = "colora"
    """A row of the method table: which parameter groups are shared, personal, frozen or absent."""

    A: Literal["shared", "personal", "frozen"] | None = None
    """Role of the matrices A. Unset: as in the method table."""

    B: Literal["shared", "personal"] | None = None
    """Role of the matrices B. Unset: as in the method table."""

    core: Literal["personal", "absent"] | None = None
    """Role of the cores. Unset: as in the method table. ``personal`` needs a method with cores."""

    head: Literal["shared", "personal"] | None = None
    """Role of the task heads. Unset: as in the method table. A shared head needs one label set at all sites."""

    def row(self) -> Method:
        """Return the table's row with this recipe's changes.

        Raises ConfigError for an unknown method, and for a group that the method does not have.
        """
        row = METHODS.get(self.name)
        if row is None:
            raise ConfigError(
                "method.name",
                f"one of {', '.join(METHODS)}",
                repr(clean(self.name)),
                message=f"method.name: there is no method {clean(self.name)!r}.",
                hint=f"{suggest_method(self.name)}The methods are {', '.join(METHODS)}.",
            )
        changed = {g: Role(v) for g in GROUPS if (v := getattr(self, g, None)) is not None}
        for group, role in changed.items():
            if getattr(row, group) is ABSENT is not role:
                raise self._missing_group(group, role)
        return dataclasses.replace(row, **changed)

    def _missing_group(self, group: str, role: Role) -> ConfigError:
        others = [name for name, row in METHODS.items() if getattr(row, group) is not ABSENT]
        return ConfigError(
            f"method.{group}",
            ABSENT.value,
            role.value,
            message=f"The method {self.name!r} has no {group}, so method.{group} cannot be {role.value!r}.",
            hint=f"Remove method.{group}, or choose a method that has one: {', '.join(others)}.",
        )
