# SPDX-License-Identifier: Apache-2.0
"""Twins of vLLM's modules, which share parts, and copies with parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

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


def twin(module: Module, made: Callable[[nn.Module], nn.Module | None]) -> Module:
    """Return a twin of a module in which others stand in for some of its parts.

    What holds none of these is shared. ``made`` returns what stands in for a part; None: nothing.
    """
    children = {name: child and _stand_in(child, made) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return alike(module, _modules=children)


def _stand_in(module: nn.Module, made: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    return made(module) or twin(module, made)


def alike(module: Module, **changed: Any) -> Module:
    """Return a module that shares all but some of its attributes with another."""
    own: Module = object.__new__(type(module))
    own.__dict__.update(module.__dict__, **changed)
    return own


def linears(module: nn.Module) -> Iterator[nn.Module]:
    """Return the linear layers in a module, packed as vLLM packs them.

    Since 0.26 (`LinearBase`). Remove when vLLM documents it.
    """
    return (each for each in module.modules() if isinstance(each, LinearBase))
