"""Private and version-dependent names of sentence-transformers, which need not be installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn


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
