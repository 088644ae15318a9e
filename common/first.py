"""S_0: the first shared adapter, from the model's configuration and the seed, without the model's weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .adapters.attach import Layout, attach, initial_values, layout_of
from .methods import SHARED
from .model import BaseModel, Fingerprint, skeleton
from .settings import Plan


def initial_shared_state(plan: Plan, classes: int = 0) -> dict[str, np.ndarray]:
    """The shared arrays that round 1 starts from; ``classes`` sizes a shared head. Needs no weights and no GPU."""
    row = plan.row()
    backbone = skeleton(plan.model)
    layout = layout_of(attach(backbone, plan.adapter, row))
    if row.head is SHARED and classes:
        layout |= head_layout(backbone, classes)
    values = initial_values(row.having(layout, SHARED), plan.adapter, plan.seed)
    return {key: value.numpy() for key, value in values.items()}


def head_layout(backbone: nn.Module, classes: int) -> Layout:
    """Names and shapes of a classification head on a backbone without weights. Raises ModelError if there is none."""
    meta = BaseModel(backbone, backbone.config, None, Fingerprint("", "", ""), torch.device("meta"))
    return layout_of(meta.head_parameters(meta.classifier(classes)[1]))
