"""The layers of a model below the lowest one that is trained, which compute the same for a row each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..compat.peft import PEFT_PREFIX
from ..core.isolation import replaced


class PrefixError(Exception):
    """Why the output of the frozen layers cannot be kept, as a part of a sentence."""


class _Reached(Exception):
    """The last of the layers has been computed, and nothing beyond it is wanted."""


class Prefix:
    """
    The frozen layers at the start of a model.

    Args:
        layers (`list[nn.Module]`): the layers, the first one first.
        names (`list[str]`): their names, and that of the first one which is trained.
    """

    def __init__(self, layers: list[nn.Module], names: list[str]) -> None:
        self.layers, self.names = layers, names
        self._extras: dict[nn.Module, int | None] = {}

    @classmethod
    def find(cls, model: nn.Module) -> Prefix:
        """
        The layers of a model below the lowest trained one: of the first list of layers of which one is trained, those
        before it.

        Raises:
            PrefixError: if there are none.
        """
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise PrefixError("the model has an encoder and a decoder")
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) < 2:
                continue
            trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in module]
            if not any(trained):
                continue
            lowest = trained.index(True)
            if not lowest:
                raise PrefixError(f"{name}.0, the lowest layer, is trained")
            name = name.removeprefix(PEFT_PREFIX)  # as modules are called everywhere else
            return cls(list(module[:lowest]), [f"{name}.{index}" for index in range(lowest + 1)])
        raise PrefixError("no list of layers is trained")

    def output(self, run: Callable[[], Any]) -> Tensor:
        """
        What the last of the layers gives.

        Args:
            run (`Callable`): runs the model; it is stopped there.

        Returns:
            `Tensor` of shape `(rows, length, width)`.

        Raises:
            PrefixError: if a layer gives more than that, or is not run.
        """
        found: list[Tensor] = []

        def note(layer: nn.Module, _: Any, output: Any) -> None:
            rest = output[1:] if isinstance(output, tuple) else ()
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor) or first.dim() != 3 or any(value is not None for value in rest):
                raise PrefixError(f"a layer gives more than one tensor of hidden states ({type(layer).__name__})")
            self._extras[layer] = len(rest) if isinstance(output, tuple) else None
            if layer is self.layers[-1]:
                found.append(first)
                raise _Reached

        hooks = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            run()
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not found or len(self._extras) != len(self.layers):
            raise PrefixError("the model does not run its layers one after the other")
        return found[0]

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """For a while, note what the last of the layers gives, each time."""
        found: list[Tensor] = []
        hook = self.layers[-1].register_forward_hook(
            lambda layer, args, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            yield found
        finally:
            hook.remove()

    @contextmanager
    def given(self, states: Tensor, between: Tensor | None = None) -> Iterator[None]:
        """
        Run the model with these states instead of the layers' output, `(rows, length, width)`.

        Args:
            states (`Tensor`): what the last of the layers gives.
            between (`Tensor`, *optional*, defaults to `states`): what the others do, which none but the next one
                should read.
        """
        with ExitStack() as stack:
            for layer in self.layers:
                extras = self._extras[layer]
                own = states if between is None or layer is self.layers[-1] else between
                output = own if extras is None else (own, *(None,) * extras)
                stack.enter_context(replaced(layer, "forward", lambda *args, _output=output, **kwargs: _output))
            yield
