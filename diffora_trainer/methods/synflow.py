"""SynFlow: saliency without data, in a model whose weights are all made positive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.peft import modules_of_adapters
from ..compat.torch import saved_buffers
from ..compat.transformers import own_input_embeddings
from .base import ScoreMethod
from .context import ScoreContext, Site, holds_floats, saliency, wide
from .papers import HETEROLORA, ZERO_COST
from .registry import register_method


SYNFLOW_LENGTH = 32
_SIGNED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@register_method("synflow")
class Synflow(ScoreMethod):
    """
    Sum of `|weight * gradient|` over `lora_A` and `lora_B`, where all weights of the model are replaced by their
    absolute values and the gradient is that of the sum of its outputs, for one row of 32 positions whose embeddings
    are all ones (Tanaka et al., 2020, https://huggingface.co/papers/2006.05467; after HeteroLoRA). No data is read. In
    a model without learned positions all positions are then alike, so that attention does not depend on queries and
    keys: their modules come last, in an order that is rounding. Where the embeddings besides pass through a layer norm
    first, as in ModernBERT, it makes a constant of the ones, and if that is 0 no gradient reaches an adapter: such a
    model is refused before the first step. Scores are not finite where the positive weights overflow.

    The signs are put back bit for bit, also when the pass fails; they take a byte for each weight while it runs.
    """

    paper = HETEROLORA
    described = f"`synflow`, {ZERO_COST}"
    shardable = False
    reads_data = False

    def inspect(self, model: Any, sites: Sequence[Site]) -> None:
        if _embeddings(model) is None:
            raise ValueError(
                "You passed `method='synflow'`, which feeds a model embeddings of ones, but "
                f"{type(model).__name__} has no token embeddings. Please use another method, such as 'snip'."
            )
        outer = own_input_embeddings(model)
        passed_by = {name for name, module in model.named_modules() if module is outer}
        if found := [site.name for site in sites if site.name in passed_by]:
            raise ValueError(
                "You passed `method='synflow'`, which feeds a model embeddings of ones, so nothing passes through the "
                f"adapter of its embedding {found[0]!r}. Please leave that out of `target_modules`, or use another "
                "method, such as 'snip'."
            )

    def try_out(self, context: ScoreContext) -> None:
        self.score(context)

    def score(self, context: ScoreContext) -> Tensor:
        base = context.base_model
        embedding: Any = _embeddings(base)
        weights = [weight for site in context.sites for weight in site.parameters]
        # Learned positions may begin behind an offset, so not all of them are taken.
        positions = getattr(base.config, "max_position_embeddings", None) or 2 * SYNFLOW_LENGTH
        length = min(SYNFLOW_LENGTH, positions // 2)
        device, dtype = embedding.weight.device, embedding.weight.dtype
        dtype = dtype if dtype in _SIGNED else torch.float32
        inputs = {
            "inputs_embeds": torch.ones(1, length, embedding.embedding_dim, device=device, dtype=dtype),
            "attention_mask": torch.ones(1, length, device=device, dtype=torch.long),
        }
        if getattr(base.config, "is_encoder_decoder", False):
            inputs["decoder_inputs_embeds"] = inputs["inputs_embeds"]
        # The base model, not the wrapper: on the wrapper accelerate has put the autocast of the training.
        with positive_weights(base), torch.autocast(device.type, enabled=False):
            total = wide(base(**inputs)[0]).sum()
            found = torch.autograd.grad(total, weights, allow_unused=True)
            if not any(gradient is not None and bool(gradient.any()) for gradient in found):
                raise ValueError(
                    "You passed `method='synflow'`, which feeds a model embeddings of ones, but in "
                    f"{type(base).__name__} no gradient reaches an adapter from there: its states are zeros, as where "
                    "a layer norm right behind the embeddings makes zeros of the ones. Later scores would be 0 too. "
                    "Please use another method, such as 'snip'."
                )
            rest = iter(torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
            return context.sum_over_weights(saliency, [[next(rest) for _ in s.parameters] for s in context.sites])


def _embeddings(model: Any) -> nn.Module | None:
    """The embedding of a model's tokens, below what PEFT has put around it; `None` if it has none."""
    found = own_input_embeddings(model)
    for inner in ("original_module", "base_layer"):  # of tokens or modules that are trained, and of an adapter
        found = getattr(found, inner, found)
    return found if getattr(found, "embedding_dim", None) is not None else None


@contextmanager
def positive_weights(model: nn.Module) -> Iterator[None]:
    """
    For a while, replace every weight and saved buffer of a model by its absolute value, and every buffer of its
    adapters: frozen matrices that can be computed anew are weights too, though they are not saved. Afterwards the
    signs are put back bit for bit, those of zeros included.

    Args:
        model (`nn.Module`): the model.

    Raises:
        ValueError: if a weight has no sign that could be taken off and put back.
    """
    tensors: list[tuple[str, Tensor]] = list(model.named_parameters())
    of_adapters = modules_of_adapters(model)
    for path, module in model.named_modules():
        buffers = module.named_buffers(recurse=False) if module in of_adapters else saved_buffers(module)
        tensors += [(f"{path}.{name}", buffer) for name, buffer in buffers if buffer.is_floating_point()]
    for name, tensor in tensors:
        if tensor.dtype not in _SIGNED or tensor.is_meta or not holds_floats(tensor):
            what = tensor.dtype if tensor.dtype not in _SIGNED else type(tensor).__name__
            raise ValueError(
                f"You passed `method='synflow'`, which needs the absolute value of each weight, but {name!r} is "
                f"{'offloaded' if tensor.is_meta else f'of {what}, as quantized weights are'}. Please use another "
                "method, such as 'snip'."
            )
    negative: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for _, tensor in tensors:
                negative.append((tensor, torch.signbit(tensor)))
                tensor.abs_()
        yield
    finally:
        with torch.no_grad():
            # The last first: of two tensors in one storage the first has seen the signs. `where`, since -0.0 == 0.0.
            for tensor, signs in reversed(negative):
                if signs.any():
                    tensor.copy_(torch.where(signs, -tensor.abs(), tensor))
