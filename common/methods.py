"""The method table: what happens to each parameter group. Nothing else knows a method's name.

A parameter group is a set of parameters of one kind; a role says who owns it. Attach, split, send, store,
freeze and export all read the row and never the name, so a new method is one more row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Role(Enum):
    """Who owns a parameter group."""

    SHARED = "shared"  # trained at the sites, averaged by the coordinator
    PERSONAL = "personal"  # trained at the site, never leaves it
    FROZEN = "frozen"  # the same seeded values everywhere, never trained, never sent
    ABSENT = "absent"  # not part of the model


SHARED, PERSONAL, FROZEN, ABSENT = Role.SHARED, Role.PERSONAL, Role.FROZEN, Role.ABSENT
GROUPS = ("A", "B", "core", "scale", "private", "head")
PRIVATE = "private."  # begins the name of every parameter of a private adapter


@dataclass(frozen=True)
class Method:
    """A row: the role of every parameter group."""

    A: Role
    B: Role
    core: Role
    head: Role
    private: Role = ABSENT  # an adapter of the site's own beside the shared one (settings: ``private``)
    scale: Role = ABSENT  # MultiLoRA's s: A and B then are n modules side by side

    def role(self, key: str) -> Role:
        """The role of the parameter called ``key`` (see :func:`group_of`)."""
        return getattr(self, group_of(key))

    def having(self, values: Mapping[str, T], *roles: Role) -> dict[str, T]:
        """The entries of ``values`` (parameter name → anything) whose group has one of ``roles``."""
        return {key: value for key, value in values.items() if self.role(key) in roles}

    @property
    def shares(self) -> bool:
        """Whether anything is sent at all."""
        return any(getattr(self, group) is SHARED for group in GROUPS)

    @property
    def averages_products(self) -> bool:
        """Whether A and B are averaged apart, so that mean(B)·mean(A) differs from mean(BA)."""
        return self.A is SHARED and self.B is SHARED


METHODS: dict[str, Method] = {
    "local": Method(PERSONAL, PERSONAL, ABSENT, PERSONAL),  # each site alone
    "fedit": Method(SHARED, SHARED, ABSENT, PERSONAL),  # FedIT, arXiv 2305.05644: plain FedAvg of LoRA
    "ffa": Method(FROZEN, SHARED, ABSENT, PERSONAL),  # FFA-LoRA, arXiv 2403.12313
    "fedsa": Method(SHARED, PERSONAL, ABSENT, PERSONAL),  # FedSA-LoRA, arXiv 2410.01463
    "fed-alora": Method(PERSONAL, SHARED, ABSENT, PERSONAL),  # Fed-ALoRA: B shared, A personal
    "colora": Method(SHARED, SHARED, PERSONAL, PERSONAL),  # CoLoRA, arXiv 2602.07218 (reconstructed)
    "multilora": Method(SHARED, SHARED, ABSENT, PERSONAL, scale=SHARED),  # MultiLoRA, arXiv 2311.11501, averaged
}

PRIVATE_KINDS: dict[str, bool] = {  # of a private adapter: whether it has MultiLoRA's modules
    "none": False,
    "lora": False,
    "multilora": True,
}

_GROUP_OF_LEAF = {"lora_A": "A", "lora_B": "B", "lora_core": "core", "lora_scale": "scale"}


def group_of(key: str) -> str:
    """The parameter group of a parameter name.

    ``encoder.layer.0.attention.self.query.lora_A.weight`` → ``A``; ``….lora_core`` → ``core``;
    ``private.encoder.….lora_A.weight`` → ``private``; ``head.classifier.weight`` → ``head``. Raises KeyError for a name
    that belongs to no group.
    """
    if key.startswith(PRIVATE):
        return "private"
    if key.startswith("head."):
        return "head"
    for leaf in reversed(key.split(".")):
        if leaf in _GROUP_OF_LEAF:
            return _GROUP_OF_LEAF[leaf]
    raise KeyError(f"{key!r} belongs to no parameter group")
