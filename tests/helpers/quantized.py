"""Layers whose weights are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer of which only packed integers are left, as GPTQ and AWQ have it: two 4-bit numbers a byte."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 7
        codes = (weight / scale).round().add(8).to(torch.uint8)
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.qweight & 15, self.qweight >> 4], dim=2).flatten(1)
        return nn.functional.linear(x, ((codes.float() - 8) * self.scales).to(x.dtype))
