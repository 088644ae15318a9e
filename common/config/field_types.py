"""Field types and the validation mode that all settings share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from ..methods import PRIVATE_KINDS

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a site or a federation, and so of a folder
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$", max_length=100)]
if TYPE_CHECKING:
    PrivateKind = str
else:
    PrivateKind = Literal[tuple(PRIVATE_KINDS)]
Group = Literal["A", "B", "core", "scale", "private", "head"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
