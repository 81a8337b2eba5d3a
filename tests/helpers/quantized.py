"""Layers whose weights are packed."""

from __future__ import annotations

from typing import Any

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


class Int8Weight(Tensor):
    """
    A weight that says it is of floats and holds integers, as torchao has it in an ordinary linear layer. A stand-in:
    what it computes is the same, by other kernels.
    """

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
        return nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.codes.to(x.dtype) * weight.scale.to(x.dtype), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of packed integers")
