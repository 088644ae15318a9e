"""The method table: the role of each parameter group, per method. No other module depends on a method's name.

A parameter group is all parameters of one kind. A role says who trains a group and whether it is sent. The code that
attaches, trains, sends, stores and exports parameters reads the roles, so that a new method is one more row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Role(Enum):
    """Who trains a parameter group, and whether it leaves the site."""

    SHARED = "shared"  # trained at the sites and aggregated by the coordinator
    PERSONAL = "personal"  # trained at the site and never sent
    FROZEN = "frozen"  # the same seeded values at every site, neither trained nor sent
    ABSENT = "absent"  # not part of the model


SHARED, PERSONAL, FROZEN, ABSENT = Role.SHARED, Role.PERSONAL, Role.FROZEN, Role.ABSENT
GROUPS = ("A", "B", "core", "scale", "private", "head")
PRIVATE = "private."  # prefix of the parameter names of a private adapter


@dataclass(frozen=True)
class Method:
    """A row of the method table: the role of every parameter group."""

    A: Role
    B: Role
    core: Role
    head: Role
    private: Role = ABSENT  # private adapter beside the shared one; set by the recipe, not by the table
    scale: Role = ABSENT  # scales s_i of MultiLoRA, whose A and B hold n modules side by side

    def role(self, key: str) -> Role:
        """Return the role of a parameter by its name (see ``group_of``)."""
        return getattr(self, group_of(key))

    def having(self, values: Mapping[str, T], *roles: Role) -> dict[str, T]:
        """Return the entries of ``values`` (parameter name → any value) whose group has one of ``roles``."""
        return {key: value for key, value in values.items() if self.role(key) in roles}

    @property
    def shares(self) -> bool:
        """Whether any group is shared."""
        return any(getattr(self, group) is SHARED for group in GROUPS)

    @property
    def averages_products(self) -> bool:
        """Whether A and B are averaged separately, so that mean(B)·mean(A) differs from mean(BA)."""
        return self.A is SHARED and self.B is SHARED


METHODS: dict[str, Method] = {
    "local": Method(PERSONAL, PERSONAL, ABSENT, PERSONAL),  # no federation
    "fedit": Method(SHARED, SHARED, ABSENT, PERSONAL),  # FedIT, arXiv 2305.05644: plain FedAvg of LoRA
    "ffa": Method(FROZEN, SHARED, ABSENT, PERSONAL),  # FFA-LoRA, arXiv 2403.12313
    "fedsa": Method(SHARED, PERSONAL, ABSENT, PERSONAL),  # FedSA-LoRA, arXiv 2410.01463
    "fed-alora": Method(PERSONAL, SHARED, ABSENT, PERSONAL),  # Fed-ALoRA: B shared, A personal
    "colora": Method(SHARED, SHARED, PERSONAL, PERSONAL),  # CoLoRA, arXiv 2602.07218 (reconstructed)
    "multilora": Method(SHARED, SHARED, ABSENT, PERSONAL, scale=SHARED),  # MultiLoRA, arXiv 2311.11501, averaged
}

ALSO_CALLED: dict[str, str] = {  # what other tools call a method → its name here, for the suggestion in an error
    **dict.fromkeys(("fedavg", "fed-avg", "fedlora", "fed-it", "lora"), "fedit"),
    **dict.fromkeys(("ffa-lora", "ffalora"), "ffa"),
    **dict.fromkeys(("fedsa-lora", "fedsalora", "fed-sa"), "fedsa"),
    **dict.fromkeys(("fedalora", "alora"), "fed-alora"),
    **dict.fromkeys(("alone", "local-only", "none"), "local"),
}

PRIVATE_KINDS: dict[str, bool] = {  # kind of a private adapter → whether it has MultiLoRA modules
    "none": False,
    "lora": False,
    "multilora": True,
}

_GROUP_OF_LEAF = {"lora_A": "A", "lora_B": "B", "lora_core": "core", "lora_scale": "scale"}


def group_of(key: str) -> str:
    """Return the parameter group of a parameter name.

    ``encoder.layer.0.attention.self.query.lora_A.weight`` → ``A``; ``….lora_core`` → ``core``;
    ``private.encoder.….lora_A.weight`` → ``private``; ``head.classifier.weight`` → ``head``. Raises KeyError for
    any other name.
    """
    if key.startswith(PRIVATE):
        return "private"
    if key.startswith("head."):
        return "head"
    for leaf in reversed(key.split(".")):
        if leaf in _GROUP_OF_LEAF:
            return _GROUP_OF_LEAF[leaf]
    raise KeyError(f"{key!r} belongs to no parameter group")
