"""
Zero-cost scores of LoRA modules, after HeteroLoRA (https://huggingface.co/papers/2406.14956); higher is kept.

With `A` and `B` the matrices of one LoRA, or of one shortcut, and `gA` and `gB` the gradients of the mean loss of the
scoring batches with respect to them:

- [`grad_norm`]: `||gA|| + ||gB||`.
- [`snip`]: `sum |A * gA| + sum |B * gB|`.
- [`synflow`]: the same, with the gradient of the sum of the outputs of a model whose weights are all made positive,
  for an input of ones.
- [`alpha_test`]: the smallest part of the module's contribution at which the loss stays within a tolerance.
- [`constant`]: random numbers, the control.

LoRA modules and shortcuts that compete with each other are compared in units of their own kind, see [`scale_free`].

None of them touches a gradient that is accumulated in `.grad`. Random streams and the model's mode are left to the
caller, [`~diffora_trainer.ArchitectureSearch.score`].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.gates import Gates
from ..adapters.grid import ModuleGrid, parameters_of, searched_modules
from ..compat import saved_buffers


BatchLoss = Callable[[Any], Tensor]
ScoreFunction = Callable[[nn.Module, list[Any]], Mapping[str, Any]]

SYNFLOW_LENGTH = 32
_PEFT_PREFIX = "base_model.model."
_SIGNED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def grad_norm(
    model: nn.Module, grid: ModuleGrid, loss: BatchLoss, batches: Sequence[Any], scale: float = 1.0
) -> Tensor:
    """
    Norm of the gradient of `lora_A` plus that of `lora_B`: one forward and backward pass for each batch.

    Args:
        model (`PeftModel`): the model.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): its modules.
        loss (`Callable`): gives the scalar loss of a batch.
        batches (`Sequence`): the scoring batches.
        scale (`float`, *optional*, defaults to `1.0`): factor of the loss while its gradient is taken, for float16.

    Returns:
        `Tensor` of shape `(n,)`, float64, on the CPU.
    """
    gradients = _mean_gradients(_weights(model, grid), loss, batches, scale)
    return _pairwise([torch.linalg.vector_norm(gradient) for gradient in gradients])


def snip(model: nn.Module, grid: ModuleGrid, loss: BatchLoss, batches: Sequence[Any], scale: float = 1.0) -> Tensor:
    """Sum of `|weight * gradient|` over `lora_A` and `lora_B`; arguments and cost are those of [`grad_norm`]."""
    weights = _weights(model, grid)
    gradients = _mean_gradients(weights, loss, batches, scale)
    return _pairwise([_saliency(w, g) for w, g in zip(weights, gradients, strict=True)])


def synflow(model: Any, grid: ModuleGrid) -> Tensor:
    """
    Sum of `|weight * gradient|` over `lora_A` and `lora_B`, where all weights of the model are replaced by their
    absolute values and the gradient is that of the sum of its outputs, for one row of 32 positions whose embeddings
    are all ones. No data is read. In a model without learned positions all positions are then alike, so that attention
    does not depend on queries and keys: their modules come last, in an order that is rounding. Where the embeddings
    besides pass through a layer norm first, as in DeBERTa, it makes zeros of the ones, and all scores are 0.

    The signs are put back bit for bit, also when the pass fails; they take a byte for each weight while it runs.

    Args:
        model (`PeftModel`): the model; it has to take `inputs_embeds`.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): its modules.

    Returns:
        `Tensor` of shape `(n,)`, float64, on the CPU. Not finite where the positive weights overflow.

    Raises:
        ValueError: if the model takes no `inputs_embeds`, or has weights without a sign, as quantized ones.
    """
    base = model.get_base_model()
    size = getattr(base.get_input_embeddings(), "embedding_dim", None)
    if size is None:
        raise ValueError(
            f"You passed `method='synflow'`, which feeds a model embeddings of ones, but {type(base).__name__} has no "
            "token embeddings. Please use another method, such as 'snip'."
        )
    weights = _weights(model, grid)
    # Learned positions may begin behind an offset, so not all of them are taken.
    length = min(SYNFLOW_LENGTH, (getattr(base.config, "max_position_embeddings", None) or 2 * SYNFLOW_LENGTH) // 2)
    embedding = base.get_input_embeddings().weight
    dtype = embedding.dtype if embedding.dtype in _SIGNED else torch.float32
    inputs = {
        "inputs_embeds": torch.ones(1, length, size, device=embedding.device, dtype=dtype),
        "attention_mask": torch.ones(1, length, device=embedding.device, dtype=torch.long),
    }
    if getattr(base.config, "is_encoder_decoder", False):
        inputs["decoder_inputs_embeds"] = inputs["inputs_embeds"]
    # The base model, not the wrapper: on the wrapper accelerate has put the autocast of the training.
    with positive_weights(base), torch.autocast(embedding.device.type, enabled=False):
        total = _wide(base(**inputs)[0]).sum()
        found = torch.autograd.grad(total, weights, allow_unused=True)
        return _pairwise(
            [w.new_zeros(()) if g is None else _saliency(w, g) for w, g in zip(weights, found, strict=True)]
        )


def alpha_test(
    gates: Gates,
    grid: ModuleGrid,
    loss: BatchLoss,
    batches: Sequence[Any],
    reduce: Callable[[Tensor], Tensor] = lambda values: values,
) -> tuple[Tensor, Tensor]:
    """
    For each module the smallest `a / 10`, `a` from 0 to 10, such that the loss stays within a tolerance when the
    module's contribution is multiplied by it, found by bisection. The tolerance is an average module's part of what
    all of them have gained: the loss without any, less the loss with all, divided by their number.

    A module whose loss without it is within the tolerance costs one forward pass over the batches, another one four
    or five. Eleven values make ties; between equal ones the rise of the loss without the module decides.

    Args:
        gates ([`~diffora_trainer.adapters.gates.Gates`]): the gates, attached to the model.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): its modules.
        loss (`Callable`): gives the scalar loss of a batch.
        batches (`Sequence`): the scoring batches.
        reduce (`Callable`, *optional*): averages a tensor over all processes. They have to bisect alike: where the
            model is sharded, one that made more passes than another would wait for it for ever.

    Returns:
        `tuple[Tensor, Tensor]`: the scores and the rises, `(n,)` each, float64, on the CPU.
    """
    count = len(grid)

    def mean_loss(values: Tensor) -> float:
        with torch.no_grad(), gates.override(values):
            losses = [loss(batch).detach().float().cpu().reshape(1) for batch in batches]
        return float(reduce(torch.cat(losses).mean().reshape(1)))

    def without(index: int, tenths: int) -> float:
        values = torch.ones(count)
        values[index] = tenths / 10
        return mean_loss(values)

    whole = mean_loss(torch.ones(count))
    limit = whole + max(0.0, mean_loss(torch.zeros(count)) - whole) / count
    scores, rises = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for index in range(count):
        off = without(index, 0)
        rises[index] = off - whole
        fails, holds = (-1, 0) if off <= limit else (0, 10)
        while holds - fails > 1:
            middle = (fails + holds) // 2
            fails, holds = (fails, middle) if without(index, middle) <= limit else (middle, holds)
        scores[index] = holds / 10
    return scores, rises


def constant(grid: ModuleGrid, seed: int, draw: int = 0) -> Tensor:
    """
    Random numbers from a generator of their own: every set of modules is as likely as another of its size. When the
    modules are scored more than once, each time is another `draw`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(draw + 1, len(grid), dtype=torch.float64, generator=generator)[-1]


def custom(model: nn.Module, grid: ModuleGrid, function: ScoreFunction, batches: list[Any]) -> Tensor:
    """
    Scores of a user's own function. It may call `backward`: gradients and values of the trainable weights are put
    back as they were, whether it returns or fails. The frozen weights are its own responsibility.

    Args:
        model (`PeftModel`): the model.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): its modules.
        function (`Callable`): `function(model, batches)` gives a score for each module, by its name in the base model
            or in the PEFT model.
        batches (`list`): the scoring batches.

    Returns:
        `Tensor` of shape `(n,)`, float64, on the CPU.

    Raises:
        TypeError: if it returns no mapping from names to numbers.
        ValueError: if a module has no score, or a score belongs to no module.
    """
    with _trainable_weights_kept(model):
        found = function(model, batches)
    if not isinstance(found, Mapping):
        raise TypeError(
            f"`score_function` returned {type(found).__name__}, but a score for each module is needed. Please return "
            f"a dictionary by the names of the modules, such as {{{grid.names[0]!r}: 1.0, ...}}."
        )
    try:
        scores = {str(name).removeprefix(_PEFT_PREFIX): float(score) for name, score in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`score_function` returned a score that is no number: {error}.") from error
    missing, extra = [n for n in grid.names if n not in scores], sorted(set(scores) - set(grid.names))
    if missing or extra:
        raise ValueError(
            f"`score_function` gave no score to {len(missing)} of {len(grid)} modules {missing[:3]}, and {len(extra)} "
            f"to names that are no modules of this search {extra[:3]}. Please return one for each, by its full name."
        )
    return torch.tensor([scores[name] for name in grid.names], dtype=torch.float64)


def module_scores(
    method: str,
    model: nn.Module,
    grid: ModuleGrid,
    *,
    gates: Gates,
    loss: BatchLoss,
    batches: list[Any],
    scale: float,
    seed: int,
    draw: int,
    function: ScoreFunction | None,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The scores of a method, and what decides between equal ones; see its function for what it reads of these."""
    ties = torch.zeros(len(grid), dtype=torch.float64)
    if method == "alpha_test":
        return alpha_test(gates, grid, loss, batches, reduce)
    if method == "constant":
        return constant(grid, seed, draw), ties
    if method == "synflow":
        return synflow(model, grid), ties
    if method == "custom":
        assert function is not None
        return custom(model, grid, function, batches), ties
    formula = {"grad_norm": grad_norm, "snip": snip}[method]
    return formula(model, grid, loss, batches, scale), ties


def scale_free(method: str, grid: ModuleGrid, scores: Tensor) -> Tensor:
    """
    Scores of LoRA modules and shortcuts that can be compared: each divided by the mean magnitude of its kind. A
    gradient or a weight of a shortcut is of another size than one of a LoRA module for reasons that say nothing of its
    use: it reads the residual stream, which no norm has scaled. `"alpha_test"` is a fraction and `"constant"` random,
    so these are left as they are.

    Args:
        method (`str`): what the scores are by.
        grid ([`~diffora_trainer.adapters.grid.ModuleGrid`]): the modules.
        scores (`Tensor` of shape `(n,)`): finite.

    Returns:
        `Tensor` of shape `(n,)`. A kind whose scores are all 0 stays at 0.
    """
    if method in ("alpha_test", "constant"):
        return scores
    found, shortcut = scores.clone(), torch.tensor(grid.is_shortcut)
    for kind in (shortcut, ~shortcut):
        if kind.any() and (mean := scores[kind].abs().mean()) > 0:
            found[kind] = scores[kind] / mean
    return found


def check_score_function(method: str, function: Any) -> None:
    """Raise if a user's own function and `method="custom"` are not passed together."""
    if function is not None and not callable(function):
        raise TypeError(
            f"`score_function` must be a function of the model and a list of batches, got {type(function).__name__}."
        )
    if (function is None) == (method == "custom"):
        raise ValueError(
            "You passed `method='custom'` without a `score_function`. Please pass one beside the configuration: a "
            "function of the model and a list of batches that gives a dictionary from module names to scores."
            if function is None
            else f"You passed a `score_function` with `method={method!r}`, which would not call it. Please set "
            "`DiffoRAConfig(method='custom')`."
        )


def check_finite(method: str, grid: ModuleGrid, scores: Tensor) -> None:
    """Raise a `ValueError` if a score is not finite."""
    bad = [name for name, finite in zip(grid.names, torch.isfinite(scores).tolist(), strict=True) if not finite]
    if bad:
        raise ValueError(
            f"The scores of {len(bad)} of {len(grid)} modules by `method={method!r}` are not finite, that of "
            f"{bad[0]!r} among them. Please look for the cause of the NaN or infinity. With 'synflow', "
            "whose positive weights add up, load the model in float32 or bfloat16, or use another method."
        )


@contextmanager
def positive_weights(model: nn.Module) -> Iterator[None]:
    """
    For a while, replace every weight and saved buffer of a model by its absolute value. Afterwards the signs are put
    back bit for bit, those of zeros included.

    Args:
        model (`nn.Module`): the model.

    Raises:
        ValueError: if a weight has no sign that could be taken off and put back.
    """
    tensors: list[tuple[str, Tensor]] = list(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in saved_buffers(module):
            if buffer.is_floating_point():
                tensors.append((f"{path}.{name}", buffer))
    for name, tensor in tensors:
        if tensor.dtype not in _SIGNED or tensor.is_meta:
            raise ValueError(
                f"You passed `method='synflow'`, which needs the absolute value of each weight, but {name!r} is "
                f"{'offloaded' if tensor.is_meta else f'of {tensor.dtype}, as quantized weights are'}. Please use "
                "another method, such as 'snip'."
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


@contextmanager
def _trainable_weights_kept(model: nn.Module) -> Iterator[None]:
    """Let a function accumulate gradients and move weights, and put both back as they were."""
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in kept:
                parameter.copy_(value)
                parameter.grad = gradient
                parameter.requires_grad_(True)


def _weights(model: nn.Module, grid: ModuleGrid) -> list[nn.Parameter]:
    """`lora_A` and `lora_B` of each module in turn, or `A` and `B` of a shortcut."""
    layers = searched_modules(model, grid.adapter_name)
    return list(itertools.chain(*(parameters_of(layers[name], grid.adapter_name) for name in grid.names)))


def _mean_gradients(
    weights: list[nn.Parameter], loss: BatchLoss, batches: Sequence[Any], scale: float
) -> list[Tensor]:
    total = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    for batch in batches:
        value = loss(batch)
        if not value.requires_grad:
            raise ValueError(
                "The loss depends on no weight, so no module has a gradient to be scored by. Please let `loss_fn` run "
                "the model that it is given, without `torch.no_grad`."
            )
        # `torch.autograd.grad` leaves every `.grad` alone.
        for mean, found in zip(total, torch.autograd.grad(value * scale, weights, allow_unused=True), strict=True):
            if found is not None:
                mean.add_(found, alpha=1.0 / (scale * len(batches)))
    return total


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.device.type != "mps" else values.float()


def _saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    return (_wide(weight.detach()) * _wide(gradient)).abs().sum()


def _pairwise(values: Sequence[Tensor]) -> Tensor:
    """The number of each `lora_A` plus that of its `lora_B`."""
    return torch.stack([value.detach().cpu().double() for value in values]).view(-1, 2).sum(dim=1)
