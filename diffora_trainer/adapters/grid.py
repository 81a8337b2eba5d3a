"""The LoRA modules and shortcuts of a PEFT model as a grid of layers x kinds. The one reader of PEFT's structure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn, tensor

from ..compat import is_sentence_transformer
from ..experimental.shortcuts.hooks import ATTRIBUTE
from ..experimental.shortcuts.shortcuts import Shortcut
from .compiled import check_not_compiled


OTHER_ROW = "other"
_PREFIX = "base_model.model."

# A gate multiplies the output of `lora_A`. These layers never call it, so a gate there would have no effect.
_UNGATEABLE: dict[type[nn.Module], str] = {
    ParamWrapper: (
        "PEFT adapts fused experts by adding to the parameter itself (`target_parameters`, which it also fills in for "
        "'all-linear' on a mixture of experts). Please name the projections to choose from instead, for example "
        "`LoraConfig(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'])`."
    ),
    MultiheadAttention: (
        "PEFT merges the LoRA of `nn.MultiheadAttention` into its weight. Please target its other layers, or leave it "
        "out with `exclude_modules`."
    ),
    Embedding: "PEFT holds the LoRA of embeddings as bare parameters. Please leave it out with `exclude_modules`.",
}

# These initialisations subtract the LoRA from the base weight, so a module that loses its LoRA would be damaged.
_CHANGES_BASE_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class ModuleGrid:
    """
    Where the LoRA modules of a model stand, and its shortcuts, if it has any (see
    [`~diffora_trainer.experimental.shortcuts`]): a row for each numbered layer, a column for each kind of module.

    Args:
        names (`tuple[str, ...]`): full names in the base model, row by row.
        rows (`tuple[str, ...]`): names of the rows; modules without a layer number stand in a row of their own.
        columns (`tuple[str, ...]`): names of the columns: what follows the layer number.
        positions (`tuple[tuple[int, int], ...]`): row and column of each module.
        parameters (`tuple[int, ...]`): trainable parameters of each module.
        adapter_name (`str`): the PEFT adapter they belong to.
        shortcuts (`tuple[str, ...]`, *optional*): names of those modules that are shortcuts.
    """

    names: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    positions: tuple[tuple[int, int], ...]
    parameters: tuple[int, ...]
    adapter_name: str
    shortcuts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_model(cls, model: nn.Module, adapter_name: str | None = None) -> ModuleGrid:
        """
        Read the grid of a PEFT model.

        Args:
            model (`PeftModel`): a model with a LoRA adapter.
            adapter_name (`str`, *optional*): which adapter; defaults to the active one.

        Raises:
            TypeError: if the model is not a `PeftModel`, or the adapter is not LoRA.
            ValueError: if the adapter has no layer, is merged, disabled or frozen, or is of a variant whose effect a
                gate cannot scale exactly.
        """
        config = _check_adapter(model, adapter_name)
        assert isinstance(model, PeftModel)
        adapter_name = adapter_name or model.active_adapters[0]
        layers = searched_modules(model, adapter_name)
        if not any(isinstance(layer, LoraLayer) for layer in layers.values()):
            raise ValueError(
                f"The adapter {adapter_name!r} has no LoRA layer in this model, so there is nothing to choose from. "
                f"Please check `target_modules` (it is {config.target_modules!r}); 'all-linear' fits most models."
            )
        for name, layer in layers.items():
            _check_layer(name, layer, adapter_name)

        places = [_place(name) for name in layers]
        # Rows and columns in the order of the model, but the modules outside the numbered layers come last.
        rows = list(dict.fromkeys(row for row, _ in places if row != OTHER_ROW))
        if any(row == OTHER_ROW for row, _ in places):
            rows.append(OTHER_ROW)
        inside = [column for row, column in places if row != OTHER_ROW]
        columns = list(dict.fromkeys([*inside, *(column for _, column in places)]))
        found = sorted(
            ((rows.index(row), columns.index(column)), name)
            for name, (row, column) in zip(layers, places, strict=True)
        )
        return cls(
            names=tuple(name for _, name in found),
            rows=tuple(rows),
            columns=tuple(columns),
            positions=tuple(position for position, _ in found),
            parameters=tuple(sum(p.numel() for p in parameters_of(layers[name], adapter_name)) for _, name in found),
            adapter_name=adapter_name,
            shortcuts=tuple(name for _, name in found if isinstance(layers[name], Shortcut)),
        )

    @property
    def row_of(self) -> tuple[int, ...]:
        """Row of each module."""
        return tuple(row for row, _ in self.positions)

    @property
    def is_shortcut(self) -> tuple[bool, ...]:
        """Whether each module is a shortcut, and not a LoRA module."""
        found = set(self.shortcuts)
        return tuple(name in found for name in self.names)

    @property
    def position_tensor(self) -> Tensor:
        """Row and column of each module as a tensor of shape `(n, 2)`."""
        return tensor(self.positions)

    def describe(self) -> str:
        """One line for the log: the grid and what it covers."""
        layers = sum(row != OTHER_ROW for row in self.rows)
        cells = len(self.rows) * len(self.columns)
        outside = sum(self.rows[row] == OTHER_ROW for row, _ in self.positions)
        text = f"{len(self) - len(self.shortcuts)} LoRA modules"
        if self.shortcuts:
            text += f" and {len(self.shortcuts)} shortcuts"
        text += f" in {layers} layers x {len(self.columns)} kinds"
        if outside:
            text += f", {outside} of them outside the numbered layers"
        kind = "" if self.shortcuts else "LoRA "
        return f"{text} ({len(self) / cells:.0%} of the grid), {sum(self.parameters):,} {kind}parameters"


def peft_model(model: Any) -> Any:
    """
    The part of a model that has the LoRA: the model itself, but of one of sentence-transformers the `PeftModel` that
    it holds.
    """
    if not is_sentence_transformer(model):
        return model
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    return found[0] if len(found) == 1 else model


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter by their full name in the base model, in the model's order."""
    found = searched_modules(model, adapter_name)
    return {name: module for name, module in found.items() if isinstance(module, LoraLayer)}


def searched_modules(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer | Shortcut]:
    """
    What a search chooses among: the LoRA layers of an adapter by their full name in the base model, and the shortcuts
    by theirs, in the model's order.
    """
    found: dict[str, LoraLayer | Shortcut] = {}
    for name, module in model.named_modules():
        if isinstance(module, Shortcut):
            found[name.removeprefix(_PREFIX).replace(f".{ATTRIBUTE}.", ".")] = module
        elif isinstance(module, LoraLayer) and (
            adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
        ):
            found[name.removeprefix(_PREFIX)] = module
    return found


def parameters_of(module: LoraLayer | Shortcut, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one LoRA, `lora_A` and `lora_B`, or of one shortcut, `A` and `B`."""
    if isinstance(module, Shortcut):
        return [module.A, module.B]
    return [*module.lora_A[adapter_name].parameters(), *module.lora_B[adapter_name].parameters()]


def _place(name: str) -> tuple[str, str]:
    # The first number is the layer's: in T5 and in mixtures of experts further ones follow it, and those belong to the
    # kind. A name that *ends* with its first number is itself an element of a list (`classifier.0`), not in a layer.
    match = re.match(r"(?P<row>(?:.*?\.)?\d+)\.(?P<column>.+)", name, re.DOTALL)
    return (match["row"], match["column"]) if match else (OTHER_ROW, name)


def _check_adapter(model: nn.Module, adapter_name: str | None) -> LoraConfig:
    check_not_compiled(model)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"Expected a `peft.PeftModel` with a LoRA adapter, got {type(model).__name__}. Please wrap the model with "
            "`peft.get_peft_model`, or pass `peft_config` to the trainer."
        )
    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ValueError(
            f"The model has {len(active)} active adapters ({active}), but one is searched at a time. Please activate "
            "one with `model.set_adapter(name)`."
        )
    adapter_name = adapter_name or active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"You passed `adapter_name={adapter_name!r}`, but the model's adapters are {sorted(model.peft_config)}. "
            "Please pass one of them, or none for the active one."
        )
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.is_prompt_learning:
        raise TypeError(
            f"The adapter {adapter_name!r} is configured by {type(config).__name__}; only LoRA modules can be "
            "searched. Please pass a `peft.LoraConfig`."
        )
    check_lora_config(config)
    return config


def check_lora_config(config: LoraConfig) -> None:
    """
    Raise a `TypeError` if a configuration is of another method that is derived from LoRA, and a `ValueError` if it
    asks for something that a gate or the cut cannot do exactly.
    """
    if config.peft_type != PeftType.LORA:
        raise TypeError(
            f"The LoRA is configured by {type(config).__name__}, a method with modules of its own "
            f"({getattr(config.peft_type, 'value', config.peft_type)}): they have no `lora_A` whose output a gate "
            "could multiply. Please pass a plain `peft.LoraConfig`, among whose modules the search chooses, or use "
            "the parent trainer."
        )
    switches = [
        *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
        *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
    ]
    variants = [name for name in switches if getattr(config, name, None)]
    if variants:
        raise ValueError(
            f"You passed a `LoraConfig` with `{variants[0]}`. A gate multiplies the output of `lora_A`, and this "
            "variant's effect is not proportional to it, so the search would score the wrong thing. Please use plain "
            "LoRA."
        )
    if config.lora_bias:
        raise ValueError(
            "You passed a `LoraConfig` with `lora_bias=True`. The bias of `lora_B` is not behind the gate, so the "
            "gate could not switch the module off. Please set `lora_bias=False`."
        )
    if config.bias != "none":
        raise ValueError(
            f"You passed a `LoraConfig` with `bias={config.bias!r}`. Biases trained in a module that is dropped later "
            "would stay changed in the run but not be saved with it. Please set `bias='none'`."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_CHANGES_BASE_WEIGHT):
        raise ValueError(
            f"You passed a `LoraConfig` with `init_lora_weights={init!r}`. It moves a part of each base weight into "
            "the LoRA, so a module that loses its LoRA would lose that part of the pre-trained model. Please use "
            "`init_lora_weights=True`."
        )
    if config.target_parameters:
        raise ValueError(
            f"You passed a `LoraConfig` with `target_parameters={config.target_parameters!r}`. "
            + _UNGATEABLE[ParamWrapper]
        )


def _check_layer(name: str, layer: LoraLayer | Shortcut, adapter_name: str) -> None:
    if isinstance(layer, Shortcut):
        if not all(parameter.requires_grad for parameter in layer.parameters()):
            raise ValueError(
                f"The shortcut {name!r} is frozen, so it cannot be trained. Please load it with `is_trainable=True`, "
                "and call `add_shortcuts` after `get_peft_model`, which freezes all that it does not know."
            )
        return
    for kind, reason in _UNGATEABLE.items():
        if isinstance(layer, kind):
            raise ValueError(f"The LoRA of {name!r} cannot be gated: {reason}")
    if adapter_name in layer.lora_variant:
        raise ValueError(
            f"The LoRA of {name!r} is of the variant {type(layer.lora_variant[adapter_name]).__name__}, whose effect "
            "a gate on `lora_A` does not scale exactly. Please use plain LoRA."
        )
    if layer.merged:
        raise ValueError(
            f"The adapter is merged into {name!r}, so its LoRA takes no part in the forward pass. Please call "
            "`model.unmerge_adapter()` first."
        )
    if layer.disable_adapters:
        raise ValueError(f"The adapters of {name!r} are disabled. Please call `model.enable_adapter_layers()` first.")
    if not all(parameter.requires_grad for parameter in parameters_of(layer, adapter_name)):
        raise ValueError(
            f"The LoRA of {name!r} is frozen, so it cannot be trained. Load the adapter with `is_trainable=True`, or "
            "call `model.set_adapter(name)`."
        )
