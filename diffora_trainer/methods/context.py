"""What a method is given to score the modules by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compat.peft import adapters_in_use
from ..core.grid import Grid


# Gains beyond this are an accident; the sums and squares that are formed of them must stay finite in float32.
_LARGEST_GAIN = 1e15

ScoreFunction = Callable[[nn.Module, list[Any]], Mapping[str, Any]]


class Site(Protocol):
    """What a method may know of a site: its name, its parameters, and its components, if it has any."""

    name: str

    @property
    def kind(self) -> str:
        """What kind of site it is, such as `"lora"`."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of its adapter."""

    @property
    def gated(self) -> nn.Module:
        """The module whose output a gate multiplies: `lora_A`."""

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """`lora_A` and `lora_B`, a row and a column of which are a component; `None` where there are no components."""

    @property
    def reads_vectors(self) -> bool:
        """Whether `lora_A` multiplies vectors, and is not indexed."""

    def watch_inputs(self, read: Callable[[Tensor], None]) -> Any:
        """Have a function called with what `lora_A` multiplies, `(..., size)`, until `remove()` of what is given."""

    @property
    def num_components(self) -> int:
        """How many gates can act on its components, each on one; 1, if a gate multiplies the adapter as a whole."""

    def fold_components(self, factors: Tensor) -> None:
        """
        Multiply gates of its components into the weights for good. At the pruning a run then rescales the moments that
        the optimizer holds of these.
        """


@dataclass
class ScoreContext:
    """
    The model, the sites to be scored, and the batches to score them on. Nothing that a method does with it may leave a
    trace in weights or gradients; random streams and modes are put back afterwards.

    Args:
        model (`PeftModel`): the model, in evaluation mode, with all gates open.
        base_model (`nn.Module`): the model without the wrapper of PEFT.
        grid ([`~diffora_trainer.core.grid.Grid`]): where the sites stand.
        sites (`Sequence[Site]`): the sites, in the order of the grid.
        batches (`list`): the scoring batches, as `loss` takes them.
        loss (`Callable`): gives the scalar loss of a batch.
        gated (`Callable`): `with gated(values):` lets gates, `(n,)`, act for a while; gradients flow into them.
        masked (`Callable`): `with masked(values):` multiplies the components of adapters for a while: by `(r,)`
            numbers for each site.
        reduce (`Callable`): averages a float32 CPU tensor over all processes. Those of a sharded model have to make
            equally many passes.
        loss_scale (`float`): factor of the loss while its gradient is taken, in float16. It is lowered where a
            gradient does not fit (see [`each_gradient`]).
        draw (`int`): how often the modules were scored before.
        score_function (`Callable`, *optional*): the user's own function.
    """

    model: nn.Module
    base_model: Any
    grid: Grid
    sites: Sequence[Site]
    batches: list[Any]
    loss: Callable[[Any], Tensor]
    gated: Callable[[Tensor], AbstractContextManager[None]]
    masked: Callable[[Sequence[Tensor]], AbstractContextManager[None]]
    reduce: Callable[[Tensor], Tensor]
    loss_scale: float = 1.0
    draw: int = 0
    score_function: ScoreFunction | None = None

    def each_gradient(
        self,
        weights: Sequence[nn.Parameter],
        take: Callable[[Sequence[Tensor | None], float], None],
        batches: Sequence[Any] | None = None,
    ) -> float:
        """
        Take the gradient of the loss of each batch with respect to some weights, one after the other. Batches whose
        loss is not finite, as without any label, are left out. Over several processes all have to call this equally
        often, since they agree on the loss scale and on how many batches count.

        Where a gradient is not finite under a loss scale, this is halved, for the batches that follow too, and the
        pass is made again, down to a scale of 1: the training would skip such a step.

        Args:
            weights (`Sequence[nn.Parameter]`): the weights.
            take (`Callable`): is given the gradients of a batch (`None` where the loss does not depend on a weight)
                under the loss scale, and this scale.
            batches (`Sequence`, *optional*): the batches; by default all.

        Returns:
            `float`: how many batches have counted; of several processes, the mean. A process may have none.

        Raises:
            ValueError: if the loss does not depend on any weight, or no batch of any process has a finite one.
        """
        batches = self.batches if batches is None else batches
        used = 0
        for batch in batches:
            finite, found = self._pass(batch, weights)
            if finite:
                used += 1
                take(found, self.loss_scale)
        [count] = self.reduce(torch.tensor([used], dtype=torch.float32)).tolist()
        if count <= 0:
            raise ValueError(_no_finite_loss(len(batches)))
        return count

    def _pass(self, batch: Any, weights: Sequence[nn.Parameter]) -> tuple[bool, Sequence[Tensor | None]]:
        """Whether the loss of a batch is finite, and its gradients under the loss scale, which is lowered to fit."""
        while True:
            loss = self.loss(batch)
            if not loss.requires_grad:
                raise ValueError(
                    "The loss does not depend on any weight, so no module has a gradient to be scored by. Please let "
                    "`loss_fn` run the model that it is given, without `torch.no_grad`."
                )
            finite = bool(loss.detach().isfinite().all())
            # `torch.autograd.grad` leaves every `.grad` alone.
            found = torch.autograd.grad(loss * self.loss_scale, weights, allow_unused=True)
            if self.loss_scale <= 1:
                return finite, found
            overflown = finite and not all(bool(g.isfinite().all()) for g in found if g is not None)
            if not self.reduce(torch.tensor([overflown], dtype=torch.float32)).any():  # all make equally many passes
                return finite, found
            self.loss_scale = max(self.loss_scale / 2, 1.0)

    def gradients(self, batches: Sequence[Any] | None = None) -> list[list[Tensor]]:
        """
        Gradients of the mean loss of some batches (all of them by default) with respect to the parameters of each
        site, in float32 at least: one forward and backward pass for each batch. Which batches count is said in
        [`each_gradient`]; the mean over several processes of what is linear in these gradients is that over all of
        their batches.

        Args:
            batches (`Sequence`, *optional*): the batches.

        Returns:
            `list[list[Tensor]]`: for each site, the gradients of its `parameters`, in their order.

        Raises:
            ValueError: if the loss does not depend on any weight, or no batch has a finite one.
        """
        weights = [weight for site in self.sites for weight in site.parameters]
        total = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]

        def add(found: Sequence[Tensor | None], scale: float) -> None:
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_.add_(gradient, alpha=1.0 / scale)

        count = self.each_gradient(weights, add, batches)
        rest = iter(total)
        return [[next(rest).div_(count) for _ in site.parameters] for site in self.sites]

    def sum_over_weights(
        self, number: Callable[[Tensor, Tensor], Tensor], gradients: Sequence[Sequence[Tensor]] | None = None
    ) -> Tensor:
        """
        For each site the sum of a number over its parameters.

        Args:
            number (`Callable`): gives the number of a parameter and its gradient.
            gradients (`list`, *optional*): the gradients; by default those of the mean loss of all batches.

        Returns:
            `Tensor` of shape `(n,)`, float64, on the CPU.
        """
        gradients = self.gradients() if gradients is None else gradients
        sums = [
            torch.stack(
                [number(w.detach(), g).detach().cpu().double() for w, g in zip(site.parameters, found, strict=True)]
            ).sum()
            for site, found in zip(self.sites, gradients, strict=True)
        ]
        return torch.stack(sums)

    def mean_over_batches(self, number: Callable[[Tensor], Tensor]) -> Tensor:
        """
        For each site the sum, over its parameters, of a number of the gradient, averaged over the batches one by one:
        of squares that is the diagonal of the empirical Fisher information. Which batches count is said in
        [`each_gradient`].

        Args:
            number (`Callable`): gives the number of a gradient.

        Returns:
            `Tensor` of shape `(n,)`, float64, on the CPU.
        """
        weights = [weight for site in self.sites for weight in site.parameters]
        total = torch.zeros(len(self.sites), dtype=torch.float64)

        def add(found: Sequence[Tensor | None], scale: float) -> None:
            split = self.by_site(found, scale)
            total.add_(self.sum_over_weights(lambda weight, gradient: number(gradient), split))

        return total / self.each_gradient(weights, add)

    def by_site(self, gradients: Sequence[Tensor | None], scale: float) -> list[list[Tensor]]:
        """
        What [`each_gradient`] gives of the parameters of all sites: for each site a list, in float32 at least and
        without the loss scale.
        """
        rest = iter(gradients)
        return [[_unscaled(next(rest), weight, scale) for weight in site.parameters] for site in self.sites]


def _unscaled(gradient: Tensor | None, weight: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight, dtype=dtype) if gradient is None else gradient.to(dtype) / scale


def _no_finite_loss(batches: int) -> str:
    return (
        f"None of the losses of the {batches} batches that modules are scored on is finite. Please check that their "
        "rows have labels (all are -100 where `max_length` cuts off what is to be learned), or score on more of them "
        "(`score_batches`)."
    )


def same_adapters_check(model: nn.Module) -> Callable[[], bool]:
    """
    A check that says, inside a forward pass, whether this is made with the adapters that are in use now, at the call,
    and not as one of a reference without them.
    """
    in_use = adapters_in_use(model)
    return lambda: in_use <= adapters_in_use(model)


class MeanLosses:
    """
    Mean losses of the same batches, one after the other under several gates: over all processes, which so decide
    alike. Batches whose first loss is not finite, as without any label, are left out of all.

    Args:
        context ([`ScoreContext`]): the batches and their loss.

    Raises:
        ValueError: if no batch has a finite loss.
    """

    def __init__(self, context: ScoreContext) -> None:
        self._context = context
        self._used: Tensor | None = None

    def mean(self) -> float:
        """The mean under the gates that are set now. It makes a pass for each batch, also those that are left out."""
        context = self._context
        with torch.no_grad():
            losses = torch.stack([context.loss(batch).detach().float().cpu() for batch in context.batches])
        if self._used is None:
            self._used = losses.isfinite()
        own = torch.stack([losses[self._used].sum(), self._used.float().sum()])
        total, number = context.reduce(own).tolist()
        if number <= 0:
            raise ValueError(_no_finite_loss(len(losses)))
        return total / number


def holds_floats(weight: Any) -> bool:
    """
    Whether a weight is made of numbers that have a gradient and a sign, and is not quantized. A tensor around others,
    such as torchao's, gives the dtype in which it computes; what it holds is told by the protocol by which
    `torch.compile` takes it apart.
    """
    if (flatten := getattr(weight, "__tensor_flatten__", None)) is not None:
        return all(holds_floats(getattr(weight, name)) for name in flatten()[0])
    return bool(weight.is_floating_point() and weight.dtype.itemsize > 1)


def wide(values: Tensor) -> Tensor:
    """In float64, but on MPS, which has none."""
    return values.double() if values.device.type != "mps" else values.float()


def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """Sum of `|weight * gradient|`."""
    return (wide(weight) * wide(gradient)).abs().sum()


def matrices_of(site: Site) -> tuple[nn.Parameter, nn.Parameter]:
    """`lora_A` and `lora_B` of a site that has components. A `RankMethod` has others refused (`reads_matrices`)."""
    if site.matrices is None:
        raise ValueError(
            f"The adapter of {site.name!r} is not a pair of matrices with a row and a column for each component. "
            "Please look at `site.matrices`, or set `reads_matrices = True` in the class of the method, to refuse it."
        )
    return site.matrices


def bounded(gradient: Tensor) -> Tensor:
    """A gradient without what is an accident."""
    return gradient.clamp(-_LARGEST_GAIN, _LARGEST_GAIN)
