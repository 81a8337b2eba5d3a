"""Parameters that leave a live optimizer and its scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.torch import SCHEDULER_LISTS, inner_schedulers
from ..logging import get_logger


logger = get_logger(__name__)

NO_LORA_FA = (
    "LoRA-FA (`peft.optimizers.create_lorafa_optimizer`) freezes `lora_A`, and keeps its state by the names of the "
    "parameters: it would keep those of pruned modules, and moments of another shape for modules that lose ranks. "
    "Please train the whole LoRA with another optimizer, or use the parent trainer."
)


def check_optimizer(optimizer: Any) -> None:
    """Raise a `ValueError` if parameters cannot leave an optimizer in the middle of a run."""
    found = type(innermost(optimizer))
    if issubclass(found, torch.optim.LBFGS):
        raise ValueError(
            "You passed an `LBFGS`, which keeps its history of all parameters as one vector, so that none can leave "
            "it in the middle of a run. Please use another optimizer, such as `torch.optim.AdamW`."
        )
    if any(cls.__name__ == "LoraFAOptimizer" for cls in found.__mro__):  # by its name: older versions of PEFT lack it
        raise ValueError(f"You passed a `{found.__name__}`. {NO_LORA_FA}")


def check_holds(optimizer: Any, model: nn.Module, sites: Iterable[Any]) -> None:
    """
    Warn if an optimizer lacks some of the adapter's weights. Nothing is said of one that holds no parameter of the
    model: it has others in their place (one for each layer, or flattened ones), and what it trains cannot be told.

    Args:
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it.
        model (`nn.Module`): the model.
        sites (`Iterable[AdapterSite]`): the sites of its adapter.

    Raises:
        ValueError: if it has none of them.
    """
    if not hasattr(innermost(optimizer), "param_groups"):
        return
    held, found = parameters_of(optimizer), type(innermost(optimizer)).__name__
    trained = {parameter for site in sites for parameter in site.parameters if parameter.requires_grad}
    if not (missing := trained - held) or held.isdisjoint(model.parameters()):
        return
    if missing == trained:
        raise ValueError(
            f"The {found} holds none of the {len(trained)} weights of the adapter that are to be trained: it was "
            "built before the adapter was put in. Please build the model with `get_peft_model` before the optimizer, "
            "or pass a trainer `optimizer_cls_and_kwargs=` in place of `optimizers=`."
        )
    logger.warning(
        f"The {found} does not hold {len(missing)} of the {len(trained)} weights of the adapter, so it will not train "
        "them. If that is not meant, please build it of all parameters that require a gradient."
    )


def remove_from_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter], scheduler: Any = None) -> None:
    """
    Take parameters out of a live optimizer: out of its groups, with their entries in lists that run beside them (as
    the names of named parameters do), and out of its state. Groups that this empties go too, together with the
    scheduler's entries for them. A group that was empty before stays, as the optimizer of a plain run has it.

    Args:
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it in an attribute `optimizer`.
        parameters (`Iterable[nn.Parameter]`): what to forget.
        scheduler (*optional*): the learning rate scheduler, or one that wraps it in an attribute `scheduler`.
    """
    optimizer = innermost(optimizer)
    gone = set(parameters)
    keep = []
    for group in optimizer.param_groups:
        left = [index for index, parameter in enumerate(group["params"]) if parameter not in gone]
        keep.append(bool(left) or not group["params"])
        _take(optimizer, group, left)
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    _keep_groups(optimizer, keep, scheduler)


def remove_empty_groups(optimizer: Any, scheduler: Any = None) -> bool:
    """Take all groups without parameters out of an optimizer and its scheduler, and tell whether there were any."""
    optimizer = innermost(optimizer)
    keep = [bool(group["params"]) for group in optimizer.param_groups]
    _keep_groups(optimizer, keep, scheduler)
    return not all(keep)


def narrow_weight(module: nn.Module, dim: int, kept: Sequence[int], optimizer: Any = None) -> None:
    """
    Keep some entries of a module's weight along a dimension, and of what an optimizer holds of it entry by entry.
    A state of another form (factored, quantized, paged) cannot be narrowed; it is forgotten, and begins anew for this
    weight.

    The weight becomes another parameter: one that changes its shape would fail in a backward pass as long as anything
    of an earlier one is alive.

    Args:
        module (`nn.Module`): the module.
        dim (`int`): the dimension.
        kept (`Sequence[int]`): the indices of those that stay, in the order in which they do.
        optimizer (`torch.optim.Optimizer`, *optional*): the optimizer, or one that wraps it.
    """
    old: Any = module.weight
    indices = torch.tensor(list(kept), device=old.device)
    new = nn.Parameter(old.detach().index_select(dim, indices), requires_grad=old.requires_grad)
    module.weight = new
    if optimizer is None:
        return
    optimizer = innermost(optimizer)
    _exchange(optimizer, old, new)
    state = optimizer.state.pop(old, None)
    if not state:
        return
    values = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    if all(is_entry_by_entry(value, old) for value in values.values()):
        narrowed = {name: value.index_select(dim, indices) for name, value in values.items()}
        optimizer.state[new] = {**state, **narrowed}


def widen_weight(module: nn.Module, dim: int, added: Tensor, optimizer: Any = None) -> None:
    """
    Append entries to a module's weight along a dimension. What an optimizer holds of the weight is forgotten: it
    begins anew.

    Without an optimizer the parameter stays the same one, for an optimizer that is not known here may hold it already.
    That is for a model whose weights are being loaded: see [`narrow_weight`] for why it is another one otherwise.

    Args:
        module (`nn.Module`): the module.
        dim (`int`): the dimension.
        added (`Tensor`): the entries.
        optimizer (`torch.optim.Optimizer`, *optional*): the optimizer, or one that wraps it.
    """
    old: Any = module.weight
    value = torch.cat([old.detach(), added.to(old.device, old.dtype)], dim)
    if optimizer is None:
        old.data, old.grad = value, None
        return
    module.weight = new = nn.Parameter(value, requires_grad=old.requires_grad)
    optimizer = innermost(optimizer)
    optimizer.state.pop(old, None)
    _exchange(optimizer, old, new)


def learning_rate_of(optimizer: Any, parameters: Iterable[nn.Parameter], remedy: str, initial: bool = False) -> float:
    """
    The present learning rate of the first of some parameters that an optimizer holds; of its first group, if it holds
    none of them.

    Args:
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it.
        parameters (`Iterable[nn.Parameter]`): the parameters.
        remedy (`str`): what to do if it has none: the end of the message.
        initial (`bool`, *optional*, defaults to `False`): return `initial_lr`, where a scheduler has stored it.

    Raises:
        ValueError: if there is none, as in an Adafactor with `relative_step`.
    """
    groups = innermost(optimizer).param_groups
    holders = {id(parameter): group for group in groups for parameter in group["params"]}
    group = next((holders[id(parameter)] for parameter in parameters if id(parameter) in holders), groups[0])
    rate = group.get("lr")
    if initial:
        rate = group.get("initial_lr", rate)
    if rate is None:
        raise ValueError(
            f"The {type(innermost(optimizer)).__name__} that you passed has no learning rate (`lr`) for the LoRA "
            f"weights, as with `relative_step`, but a step of the gates depends on it: {remedy}"
        )
    return float(rate)


def parameters_of(optimizer: Any) -> set[nn.Parameter]:
    """All parameters that an optimizer, or one inside of its wrappers, holds."""
    return {parameter for group in innermost(optimizer).param_groups for parameter in group["params"]}


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of its wrappers."""
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def _exchange(optimizer: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another one, in the lists that are there: an optimizer may hold these itself."""
    for group in optimizer.param_groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]


def is_entry_by_entry(value: Any, weight: Tensor) -> bool:
    """
    Whether a state has an entry for each of a weight's, and is nothing but a tensor. One that is quantized may have
    the shape too, in a class of its own, and one of bitsandbytes' paged optimizers is on another device, with marks.
    """
    return has_each_entry(value, weight, (Tensor,))


def has_each_entry(value: Any, weight: Tensor, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and value.shape == weight.shape and value.device == weight.device


def _keep_groups(optimizer: Any, keep: list[bool], scheduler: Any) -> None:
    if not all(keep):
        optimizer.param_groups[:] = [g for g, stays in zip(optimizer.param_groups, keep, strict=True) if stays]
        if scheduler is not None:
            _forget_groups(scheduler, keep)


def sort_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """
    Put the parameters of each group in the model's order. A shared one now comes up first with its group's first
    module, and an optimizer built anew on resume, whose saved state is matched by position, will find it there.
    """
    order = {parameter: index for index, parameter in enumerate(model.parameters())}
    for group in innermost(optimizer).param_groups:
        places = [order.get(parameter, len(order)) for parameter in group["params"]]
        _take(innermost(optimizer), group, sorted(range(len(places)), key=places.__getitem__))


def _take(optimizer: Any, group: dict[str, Any], indices: Sequence[int]) -> None:
    """
    Let some parameters of a group stay, in this order, and with them their entries in lists that run beside them:
    `param_names`, where an optimizer was given named parameters, and others of a user's. An option that all groups
    have, such as `betas`, is none of these, though it may be a list and as long.
    """
    options = getattr(optimizer, "defaults", {})  # which one that is not a `torch.optim.Optimizer` may lack
    beside = [
        name
        for name, values in group.items()
        if isinstance(values, list) and len(values) == len(group["params"]) and name not in options
    ]
    for name in beside:
        group[name][:] = [group[name][index] for index in indices]


def _forget_groups(scheduler: Any, filled: list[bool]) -> None:
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    for name in SCHEDULER_LISTS:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == len(filled):
            setattr(scheduler, name, [value for value, keep in zip(values, filled, strict=True) if keep])
    for inner in inner_schedulers(scheduler):
        _forget_groups(inner, filled)
