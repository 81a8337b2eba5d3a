r"""
Shortcuts merged into the weights of a model, which then needs neither PEFT nor this package.

That is possible for `residual2` of a post-norm layer: its feed-forward reads what the shortcut reads, and adds to the
same sum. If the activation `g` has `g(u) - g(-u) = c u` for some `c` other than 0, the shortcut `s * B(A v)` is `2 r`
more hidden units, with the rows `A` and `-A` of the first matrix, no bias, and the columns `s B / c` and `-s B / c` of
the second one. ReLU, every GELU, SiLU and hard swish have `c = 1`, a leaky ReLU of slope `a` has `1 + a`. Why nothing
else can be merged is explained in [`~diffora_trainer.experimental.shortcuts`].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapters.wrapping import has_adapter
from ...compat.peft import adapters_disabled
from .shortcuts import Shortcut, remove_shortcuts, shortcut_config, shortcuts
from .structure import ATTRIBUTE, Parts, plan_layers


# Where a layer has the first matrix of its feed-forward, the activation and the second matrix, and what the
# configuration calls the width between them.
_FORMS = (
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "intermediate_size"),
    ("fc1", "activation_fn", "fc2", "ffn_dim"),
    ("ffn.lin1", "ffn.activation", "ffn.lin2", "hidden_dim"),
)
_REASONS = {
    "residual1": "passes by the attention, which mixes the tokens",
    "shortcut1": "passes by all of the layer",
    "shortcut2": "comes from the layer before, past its norms",
}
_PRE_NORM = "the layer is pre-norm: the feed-forward reads what a norm gives, and the shortcut what the norm reads"
_TOLERANCE = 1e-5
"""How far a layer's output may be off, in units of its largest number. It is compared in float64."""
_TOKENS = 8


@dataclass(frozen=True)
class _Layer:
    """A layer to be widened: its shortcut, if it has one, and the two matrices of its feed-forward."""

    module: nn.Module
    config: Any
    shortcut: Shortcut | None
    first: nn.Linear
    second: nn.Linear
    key: str
    factor: float


def merge_shortcuts(model: nn.Module) -> nn.Module:
    """
    A copy of a model whose shortcuts and LoRA are merged into its weights, see [`ShortcutModel.merge_and_unload`].

    Args:
        model (`PeftModel` or `PreTrainedModel`): a model with shortcuts.

    Returns:
        `PreTrainedModel`: the merged copy.

    Raises:
        ValueError: if something cannot be merged, or the merged model is not the same function.
    """
    config = shortcut_config(model)  # raises where there are none
    _check_model(model)
    _, problems, unknown = _layers(model)
    if unknown:
        # Only a run tells these pre-norm layers from post-norm ones. It comes before the copy, which takes memory.
        try:
            with _evaluating(model):
                _outputs(model, [])
        except ValueError:
            if not problems:
                raise
        _, problems, _ = _layers(model)
    if problems:
        raise ValueError(
            f"Not all shortcuts of this {type(_base(model)).__name__} can be merged into its weights: "
            f"{_told(problems)}. Please keep the `ShortcutModel`, or train one with `kinds=('residual2',)` on a "
            "post-norm model such as BERT, with an activation such as ReLU or GELU, that is not quantized."
        )

    twin = copy.deepcopy(model)
    layers, *_ = _layers(twin)
    with _evaluating(twin), _in_double_precision(twin):
        modules = [layer.module for layer in layers]
        before = _outputs(twin, modules)
        remove_shortcuts(twin)
        plain: Any = twin.merge_and_unload() if isinstance(twin, PeftModel) else twin
        for layer in layers:
            _widen(layer, config.r)
        _check_rebuilt(plain, layers)
        _check_equal(before, _outputs(plain, modules))
    return plain


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_model(model: nn.Module) -> None:
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"You passed a {type(base).__name__}, which is not a `PreTrainedModel`: no configuration could say how "
            "wide its merged feed-forward is. Please keep the `ShortcutModel`."
        )
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"This {type(base).__name__} is quantized, and quantized weights cannot take on rows and columns, so "
            "nothing is merged. Please keep the `ShortcutModel`, or load it onto the base without quantization."
        )
    if isinstance(model, PeftModel):
        mergeable = hasattr(model, "merge_and_unload")
    else:
        mergeable = not has_adapter(model)
    if not mergeable:
        raise ValueError(
            f"The adapter of this {type(model).__name__} cannot be merged by `merge_and_unload`. Please use a LoRA "
            "from `get_peft_model`, or keep the `ShortcutModel`."
        )
    if adapters_disabled(model):
        raise ValueError(
            "You merge inside `disable_adapter()`, which switches shortcuts and LoRA off. Please merge outside of it."
        )


def _layers(model: nn.Module) -> tuple[list[_Layer], dict[str, str], bool]:
    """
    The layers to be widened, what cannot be merged with the reason, by its name, and whether it is still unknown of a
    layer if it is pre-norm. As one configuration has one width, all its layers are widened.
    """
    there = shortcuts(model)
    problems = {name: _REASONS[kind] for name in there if (kind := name.rpartition(".")[2]) in _REASONS}
    plan, configs = plan_layers(model, ["residual2"]), _configs(model)
    used = {id(configs[layer]) for name, layer, *_ in plan if f"{name}.residual2" in there}
    layers, unknown = [], False
    for name, module, parts, _ in plan:
        if id(configs[module]) not in used:
            continue
        shortcut = there.get(f"{name}.residual2")
        pre = _is_pre_norm(module, parts) if shortcut is not None else False
        unknown |= pre is None
        found = _PRE_NORM if pre else _feed_forward(module)
        if isinstance(found, str):
            problems[name if shortcut is None else f"{name}.residual2"] = found
            continue
        first, activation, second, key = found
        factor = _factor(activation, first.weight.device) if shortcut is not None else 1.0
        if factor is None:
            problems[f"{name}.residual2"] = f"the activation {type(activation).__name__} has no g(u) - g(-u) = c u"
            continue
        layers.append(_Layer(module, configs[module], shortcut, first, second, key, factor))
    return layers, problems, unknown


def _configs(model: nn.Module) -> dict[nn.Module, Any]:
    """The configuration of the innermost model that holds a module, for each module."""
    found: dict[nn.Module, Any] = {}
    for holder in model.modules():  # a model comes before its parts
        if isinstance(holder, PreTrainedModel):
            found.update(dict.fromkeys(holder.modules(), holder.config))
    return found


def _is_pre_norm(layer: nn.Module, parts: Parts) -> bool | None:
    if parts.sums:
        return False
    block: Any = getattr(layer, ATTRIBUTE)
    return block.live.pre


def _feed_forward(layer: nn.Module) -> tuple[Any, Callable[[Tensor], Tensor], Any, str] | str:
    """The parts of a layer's feed-forward, or why it cannot be widened."""
    for *paths, key in _FORMS:
        try:
            first, activation, second = (attrgetter(path)(layer) for path in paths)
        except AttributeError:
            continue
        first, second = (m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in (first, second))
        for module in (first, second):
            # torchao quantizes by a tensor of its own in an ordinary linear layer, others by a layer of their own.
            kind = type(module) if type(module) is not nn.Linear else type(module.weight.data)
            if kind is not Tensor:
                return f"the feed-forward has quantized or unknown weights, a {kind.__name__}"
        return first, activation, second, key
    return "the feed-forward is not known to be two linear layers with an activation between them"


def _factor(activation: Callable[[Tensor], Tensor], device: torch.device) -> float | None:
    """The `c` of an activation with `g(u) - g(-u) = c u`, found by its values."""
    u = torch.logspace(-2, 3, 101, device=device)
    with torch.no_grad():
        ratio = (activation(u) - activation(-u)) / u
    factor = ratio[-1].item()
    return factor if abs(factor) > 1e-3 and bool(((ratio - factor).abs() <= 1e-5).all()) else None


def _widen(layer: _Layer, rank: int) -> None:
    """`2 r` more hidden units: those of the shortcut, or without one some that do nothing."""
    first, second, shortcut = layer.first, layer.second, layer.shortcut
    with torch.no_grad():
        rows = first.weight.new_zeros(rank, first.in_features)
        columns = second.weight.new_zeros(second.out_features, rank)
        if shortcut is not None and shortcut.enabled:
            rows.copy_(shortcut.A)
            columns.copy_(shortcut.B * (shortcut.scale / layer.factor))
        # `.data`, so that the parameter stays the same one.
        first.weight.data = torch.cat([first.weight, rows, -rows])
        second.weight.data = torch.cat([second.weight, columns, -columns], dim=1)
        if first.bias is not None:
            first.bias.data = torch.cat([first.bias, first.bias.new_zeros(2 * rank)])
    first.out_features += 2 * rank
    second.in_features += 2 * rank
    setattr(layer.config, layer.key, first.out_features)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _in_double_precision(model: nn.Module) -> Iterator[None]:
    """
    Merge and compare in float64, so that no difference is mere rounding, whatever the data type, and each weight is
    rounded once. MPS has no float64.
    """
    tensors = [(t, t.dtype) for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    for tensor, _ in tensors:
        tensor.data = tensor.data.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
    try:
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)


def _outputs(model: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """What some layers and the model give for random token ids, the same ones at each call."""
    base, found = _base(model), list[Tensor]()
    handles = [layer.register_forward_hook(lambda *args: found.append(_tensor(args[-1]))) for layer in layers]
    try:
        vectors = base.get_input_embeddings().weight
        generator = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(len(vectors), (1, _TOKENS), generator=generator, device="cpu").to(vectors.device)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"This {type(base).__name__} could not be run on token ids alone, which tells whether the merged model is "
            f"the same function: {error}. Please keep the `ShortcutModel`."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [*found, _tensor(output)]


def _tensor(output: Any) -> Tensor:
    """The hidden states or logits of an output. They come first where no labels ask for a loss."""
    return output.detach() if isinstance(output, Tensor) else output[0].detach()


def _check_equal(before: list[Tensor], after: list[Tensor]) -> None:
    off = 0.0
    for a, b in zip(after, before, strict=True):
        apart = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        off = max(off, apart if math.isfinite(apart) else math.inf)
    if off > _TOLERANCE:
        raise ValueError(
            f"The merged model is not the same function: on random tokens it is off by {off:.1e} of a layer's largest "
            "number. Something acts on the model beside its weights, such as the gates of a search, or some numbers "
            "are not finite. Please finish the search first, or keep the `ShortcutModel`."
        )


def _check_rebuilt(plain: PreTrainedModel, layers: list[_Layer]) -> None:
    """Raise if a model made from the configuration would have other matrices, and so could not be loaded."""
    widened = {id(p) for layer in layers for p in (layer.first.weight, layer.second.weight, layer.first.bias)}
    with torch.device("meta"):
        fresh = dict(type(plain)(copy.deepcopy(plain.config)).named_parameters())
    for name, parameter in plain.named_parameters():
        if id(parameter) in widened and (name not in fresh or fresh[name].shape != parameter.shape):
            raise ValueError(
                f"{name!r} of the merged model is {tuple(parameter.shape)}, and its configuration, with "
                f"`{layers[0].key}={getattr(layers[0].config, layers[0].key)}`, makes it "
                f"{tuple(fresh[name].shape) if name in fresh else 'missing'}. The layers of this "
                f"{type(plain).__name__} are not those of its configuration. Please keep the `ShortcutModel`."
            )


def _told(problems: dict[str, str]) -> str:
    """Names by reason; those that differ in the number of the layer are told together."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, reason in problems.items():
        before, number, after = _split(name)
        groups.setdefault((reason, before, after), []).append(number)
    return "; ".join(
        f"{before}.{'{' + ','.join(numbers) + '}' if len(numbers) > 1 else numbers[0]}{after} ({reason})"
        for (reason, before, after), numbers in groups.items()
    )


def _split(name: str) -> tuple[str, str, str]:
    before, _, last = name.rpartition(".")
    if last.isdecimal():
        return before, last, ""
    stack, _, number = before.rpartition(".")
    return stack, number, f".{last}"
