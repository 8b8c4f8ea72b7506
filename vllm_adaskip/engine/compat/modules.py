# SPDX-License-Identifier: Apache-2.0
"""Copies of vLLM's modules with parameters of their own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module, *shared: nn.Module) -> Module:
    """Return a copy that weights can be loaded into, as into the module; some parts are shared.

    vLLM's parameters know how they are loaded by attributes, which `deepcopy` drops. Since 0.26
    (attributes of parameters). Remove when it keeps them.
    """
    memo: dict[int, Any] = {id(each): each for each in shared}
    for parameter in module.parameters():
        own = nn.Parameter(parameter.data.clone(), requires_grad=False)
        own.__class__ = parameter.__class__
        own.__dict__.update(parameter.__dict__)
        memo[id(parameter)] = own
    return deepcopy(module, memo)
