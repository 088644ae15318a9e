"""Adapters and heads of several sites in one model: a parameter of shape (…) becomes one of shape (sites, …).

A batch holds the rows of the sites one after the other, the same number of rows for each. The layers of the base model
see one large batch, and the layers with parameters of the sites multiply each site's rows by its own matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class NotStackable(Exception):
    """A model that cannot hold the parameters of several sites; the text says why."""


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x Wᵀ for W (out, in), or each site's rows of x times its own Wᵀ for W (sites, out, in).

    Raises NotStackable if the rows of x cannot be divided among the sites.
    """
    if weight.dim() == 2:
        return F.linear(x, weight)
    product = torch.bmm(_by_site(x, len(weight)), weight.transpose(1, 2))
    return product.reshape(*x.shape[:-1], weight.shape[1])


def scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return x ⊙ f for f (d,), or each site's rows of x ⊙ its own f for f (sites, d)."""
    if factor.dim() == 1:
        return x * factor
    return (_by_site(x, len(factor)) * factor.unsqueeze(1)).reshape(x.shape)


def _by_site(x: torch.Tensor, sites: int) -> torch.Tensor:
    if x.shape[0] % sites:
        raise NotStackable("a layer receives the rows in another order")
    return x.reshape(sites, -1, x.shape[-1])


class StackedLinear(nn.Module):
    """A linear layer with a weight (sites, out, in) and perhaps a bias (sites, out)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply each site's rows by its own weight."""
        y = linear(x, self.weight)
        if self.bias is None:
            return y
        return (_by_site(y, len(self.bias)) + self.bias.unsqueeze(1)).reshape(y.shape)


@contextmanager
def stacked(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], stacks: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Replace ``parameters`` of ``module`` by ``stacks``, under the same names and with a leading dimension of sites.

    Linear layers and the additional parameters of adapter forms can be replaced. Raises NotStackable for others.
    """
    keys = {id(parameter): key for key, parameter in parameters.items()}
    replaced: list[tuple[dict, str, object]] = []
    try:
        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, nn.Linear) and id(child.weight) in keys:
                    bias = None if child.bias is None else stacks[keys.pop(id(child.bias))]
                    _replace(parent._modules, name, StackedLinear(stacks[keys.pop(id(child.weight))], bias), replaced)
            for name, value in list(parent._parameters.items()) if isinstance(parent, nn.ParameterDict) else ():
                if id(value) in keys:
                    _replace(parent._parameters, name, stacks[keys.pop(id(value))], replaced)
        if keys:
            raise NotStackable(f"{min(keys.values())} is not the weight of a linear layer")
        yield
    finally:
        for table, name, before in replaced:
            table[name] = before


def _replace(table: dict, name: str, value: object, replaced: list[tuple[dict, str, object]]) -> None:
    replaced.append((table, name, table[name]))
    table[name] = value
