"""Gates on live LoRA modules: attach and detach, and shut off whole modules for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..compat import checkpoint_function, checkpoints, disable_layer
from ..experimental.shortcuts.shortcuts import Shortcut
from .backward import without_input_gradients
from .grid import ModuleGrid, parameters_of, searched_modules


class Gates:
    """
    Multiplies the output of each module's `lora_A` by a gate: `r` numbers a token, so almost free, and exact, since
    nothing but `lora_B`, which has no bias, follows. Of a shortcut it multiplies the output.

    The gates are plain tensors held here, not on the tuner layer, because PEFT saves whatever is registered there.
    Which of two vectors applies is read from the module's own mode, training or evaluation.

    Args:
        model (`PeftModel`): the model.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): its modules.
    """

    def __init__(self, model: nn.Module, grid: ModuleGrid) -> None:
        found = searched_modules(model, grid.adapter_name)
        layers: list[Any] = [found[name] for name in grid.names]
        self._modules: list[nn.Module] = []
        self._shapes: list[tuple[Any, ...]] = []
        for layer in layers:
            if isinstance(layer, Shortcut):
                self._modules.append(layer)
                self._shapes.append((type(layer).__name__, *layer.A.shape))
            else:
                pair: list[Any] = [layer.lora_A[grid.adapter_name], layer.lora_B[grid.adapter_name]]
                self._modules.append(pair[0])
                self._shapes.append(tuple((type(module).__name__, *module.weight.shape) for module in pair))
        self._handles: list[RemovableHandle] = []
        self._training: Sequence[Tensor] | None = None
        self._evaluation: Sequence[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the gates are applied; the first module's device in a model spread over several."""
        return next(self._modules[0].parameters()).device

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        """What must be equal for two modules to share their matrices: class and shape of `lora_A` and `lora_B`."""
        return self._shapes

    @property
    def attached(self) -> bool:
        """Whether the gates act on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Let the gates act. Until values are set they change nothing."""
        if not self._handles:
            self._handles = [
                module.register_forward_hook(partial(self._scale, index)) for index, module in enumerate(self._modules)
            ]

    def detach(self) -> None:
        """Remove every trace of the gates from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def set_training(self, values: Tensor | None) -> None:
        """Set the gates of training, `(n,)`, or leave them open."""
        self._training = None if values is None else self._split(values)

    def set_evaluation(self, values: Tensor | None) -> None:
        """Set the gates of evaluation, `(n,)`, or leave them open."""
        self._evaluation = None if values is None else self._split(values)

    @contextmanager
    def override(self, values: Tensor | None) -> Iterator[None]:
        """Use these gates, `(n,)`, in either mode, or open ones; gradients flow into them."""
        before = self._training, self._evaluation
        self._training = self._evaluation = None if values is None else self._split(values)
        try:
            yield
        finally:
            self._training, self._evaluation = before

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        # One `unbind`, not n indexings: the backward of each indexing would fill a vector of n zeros.
        return values.to(self.device, torch.float32).unbind()

    def _scale(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        values = self._training if module.training else self._evaluation
        if values is None:
            return None
        gate = values[index]
        if gate.device != output.device:  # a model spread over several devices
            gate = gate.to(output.device)
        # In float32 at least: neither the gate nor its gradient, a sum over all tokens, is rounded to half precision.
        wide = torch.promote_types(output.dtype, torch.float32)
        return (output.to(wide) * gate).to(output.dtype)


@contextmanager
def pruned_view(model: Any, kept: Iterable[str], adapter_name: str) -> Iterator[list[nn.Parameter]]:
    """
    For a while, let a model compute what it would after a cut that keeps only some modules; gives their parameters.

    Args:
        model (`PeftModel`): a model before the cut.
        kept (`Iterable[str]`): names of the modules to keep.
        adapter_name (`str`): the adapter.
    """
    names = set(kept)
    layers: dict[str, Any] = dict(searched_modules(model, adapter_name))
    others = [layer for name, layer in layers.items() if name not in names]
    frozen = [p for layer in others for p in parameters_of(layer, adapter_name) if p.requires_grad]
    off = [layer for layer in others if not isinstance(layer, Shortcut)]
    passed = [layer for layer in others if isinstance(layer, Shortcut) and layer.enabled]
    before = [layer.disable_adapters for layer in off]
    try:
        for layer in off:
            disable_layer(layer, True)
        for layer in passed:
            layer.enabled = False
        for parameter in frozen:
            parameter.requires_grad_(False)
        with without_input_gradients(model):
            yield [p for name in names for p in parameters_of(layers[name], adapter_name)]
    finally:
        for layer, disabled in zip(off, before, strict=True):
            disable_layer(layer, disabled)
        for layer in passed:
            layer.enabled = True
        for parameter in frozen:
            parameter.requires_grad_(True)


def checkpoints_activations(model: nn.Module) -> bool:
    """
    Whether a model checkpoints activations. The reentrant way is refused: its backward pass gives no gradient of the
    gates, and none is not told from zero as long as a module outside the checkpointed blocks has one.
    """
    blocks = [module for module in model.modules() if checkpoints(module)]
    for block in blocks:
        function = checkpoint_function(block)
        # Reentrant is also what PyTorch takes when nothing is said, as in `prepare_model_for_kbit_training(model)`.
        if isinstance(function, partial) and function.keywords.get("use_reentrant") is not False:
            raise ValueError(
                f"The model checkpoints activations with {function.keywords or 'no arguments'}, which is the "
                "reentrant way: its backward pass cannot give the gradient of the gates alone. Please pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}` to `gradient_checkpointing_enable`, to "
                "`prepare_model_for_kbit_training` or in the training arguments, wherever it was switched on."
            )
    return bool(blocks)
