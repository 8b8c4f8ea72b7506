# SPDX-License-Identifier: Apache-2.0
"""FiRST's routers (arXiv 2410.12513): from the stream before a layer to how much it is needed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional

from vllm_adaskip.classifiers.profile import ProfileError

FILE = "routers.safetensors"
_SMALLEST = 1e-6


class Routers(nn.Module):
    """One router for each decoder layer, the same in training and in serving.

    ``rho_l(h) = sigmoid(f_l(h / rms(h)))`` in (0, 1), where ``h`` is the residual stream before
    layer ``l``; near 1: the layer is needed. The paper leaves the form of ``f`` open. Here it is
    linear, or, with ``width`` > 0, ``Linear(hidden, width) -> GELU -> Linear(width, 1)``. The
    stream is brought to one scale because it grows with depth.

    Args:
        num_layers: decoder layers of the model.
        hidden: width of its residual stream.
        width: units of the router's own hidden layer; 0: linear.
        start: what every ``rho`` is before any training.

    """

    def __init__(self, num_layers: int, hidden: int, width: int = 0, start: float = 0.9) -> None:
        super().__init__()
        self.width = width
        # float32 by name: while an engine loads its model the default is the model's dtype.
        like = torch.zeros(num_layers, dtype=torch.float32)
        if width:
            inner = torch.randn(num_layers, width, hidden, dtype=like.dtype) * hidden**-0.5
            self.inner = nn.Parameter(inner)
            self.inner_bias = nn.Parameter(like.new_zeros(num_layers, width))
        self.weight = nn.Parameter(like.new_zeros(num_layers, width or hidden))
        self.bias = nn.Parameter(like.new_full((num_layers,), start).logit())

    def forward(self, layer: int, before: Tensor) -> Tensor:
        """Return ``rho`` ``[...]`` float32 of a layer for a stream ``[..., hidden]``."""
        stream = before.float()
        # |h| = rms(h) * sqrt(hidden); no more operations than needed, for they are what it costs.
        length = vector_norm(stream, dim=-1).clamp_min(_SMALLEST)
        scale = math.sqrt(stream.shape[-1])
        if self.width:
            seen = functional.linear(stream, scale * self.inner[layer]) / length[..., None]
            logits = functional.gelu(seen + self.inner_bias[layer]) @ self.weight[layer]
            return torch.sigmoid(logits + self.bias[layer])
        dots = stream @ self.weight[layer]
        return torch.sigmoid(torch.addcdiv(self.bias[layer], dots, length, value=scale))

    def save(self, folder: Path) -> None:
        """Write the weights into a profile's folder."""
        save_file({name: each.cpu() for name, each in self.state_dict().items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, num_layers: int, hidden: int) -> Routers:
        """Read a profile's weights, for a model of this shape.

        Raises:
            ProfileError: no such file, or one that does not fit the model.

        """
        path = folder / FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"{path}: {error}") from None
        inner = tensors.get("inner")
        width = inner.shape[1] if inner is not None and inner.ndim == 3 else 0
        routers = cls(num_layers, hidden, width)
        wanted = {name: tuple(each.shape) for name, each in routers.state_dict().items()}
        found = {name: tuple(each.shape) for name, each in tensors.items()}
        if wanted != found:
            raise ProfileError(f"{path}: holds {found}; this model's routers are {wanted}")
        if bad := [name for name, each in tensors.items() if not each.isfinite().all()]:
            raise ProfileError(f"{path}: {', '.join(bad)} holds values that are not finite")
        routers.load_state_dict(tensors)
        return routers.requires_grad_(False)
