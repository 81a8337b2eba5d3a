"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn


convert_peft_config_for_transformers: Any
try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:
    convert_peft_config_for_transformers = None


# PEFT


def all_linear_modules(config: LoraConfig, model: nn.Module) -> set[str]:
    """
    Names of the modules that `target_modules="all-linear"` stands for in a base model, without the output embeddings.

    Reads `peft.tuners.tuners_utils._maybe_include_all_linear_layers`, the same in PEFT 0.18 to 0.21. A public function
    that resolves the short form would let it go.
    """
    probe: Any = LoraConfig(target_modules="all-linear", task_type=config.task_type)
    _maybe_include_all_linear_layers(probe, model)
    return set(probe.target_modules)


def converted_to_parameters(target_modules: str | list[str], model: nn.Module) -> set[str] | None:
    """
    The parameters of fused experts that PEFT adapts when these target modules are asked for, because it takes them for
    experts by their names; `None` if it refuses them, being a part of fused ones. Only the configuration of the model
    is read, unless a string has to be resolved.

    Reads `peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers`, which newer versions of
    PEFT call on every configuration (seen in 0.21); PEFT 0.18 has none and adapts the modules as named. It can go when
    gates can act on adapted parameters.
    """
    if convert_peft_config_for_transformers is None:
        return set()
    probe = LoraConfig(target_modules=target_modules)
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:
        return None
    return set(probe.target_parameters or ())


# sentence-transformers


def is_sentence_transformer(model: Any) -> bool:
    """
    Whether a model is one of sentence-transformers, which holds a transformers model among modules of its own.

    Looks for the property `transformers_model` of its class (sentence-transformers 5 and 6), so that the package need
    not be there. It can go when there is a name for such models in transformers or PEFT.
    """
    return hasattr(type(model), "transformers_model")


def load_sentence_transformer(model: Any, adapted: Any, folder: str) -> None:
    """
    Put what a checkpoint holds into a model of sentence-transformers whose transformers model is a `PeftModel`.

    Its trainer loads a whole model and copies the state by names (`BaseTrainer._load_from_checkpoint`, 6.2), and what
    it loads has an adapter without a `PeftModel`, so other names. It can go when it loads adapters with PEFT.
    """
    set_peft_model_state_dict(adapted, load_peft_weights(folder, device="cpu"))
    for entry in json.loads(Path(folder, "modules.json").read_text()):
        part = model.get_submodule(entry["name"])
        if adapted not in part.modules() and list(part.parameters()):
            part.load_state_dict(type(part).load(folder, subfolder=entry["path"]).state_dict())


def backbone_of_sentence_transformer(model: nn.Module) -> tuple[nn.Module, str] | None:
    """
    The module and the name under which a model of sentence-transformers holds its transformers model, which is what
    can have LoRA; `None` for any other model.

    Reads their property `transformers_model` (see above), and looks for its value among their modules: it has no
    setter. A way to put a `PeftModel` in its place would let it go.
    """
    backbone = getattr(model, "transformers_model", None) if is_sentence_transformer(model) else None
    for parent in model.modules() if isinstance(backbone, nn.Module) else ():
        for name, child in parent.named_children():
            if child is backbone:
                return parent, name
    return None


# TRL


def with_reference_log_probs(trainer: Any, dataset: Any) -> Any:
    """
    A data set with the reference's log-probabilities of its rows, where the trainer computes those of its training set
    ahead (`precompute_ref_log_probs=True`, DPO and KTO).

    Calls `_precompute_ref_logps(dataset, name, batch_size)` of these trainers (seen in TRL 1.16). In TRL 0.28 they
    have no such method, and compute what a batch lacks, so nothing is to be done. It can go when TRL prepares any data
    set that it is given in one public method.
    """
    precompute = getattr(trainer, "_precompute_ref_logps", None)
    if precompute is None or not getattr(trainer.args, "precompute_ref_log_probs", False):
        return dataset
    args = trainer.args
    return precompute(dataset, "arch", args.precompute_ref_batch_size or args.per_device_train_batch_size)
