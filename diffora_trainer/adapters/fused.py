"""Models whose LoRA is computed by the fused kernels of a tool, around the gates."""

from __future__ import annotations

from torch import nn

from ..compat.kernels import fused_lora


_REMEDIES = {
    "axolotl": (
        "Please set `lora_mlp_kernel`, `lora_qkv_kernel`, `lora_o_kernel` and `lora_embedding_kernel` to false; "
        "`diffora_trainer.integrations.axolotl.DiffoRAPlugin` does so where they are not set"
    ),
    "unsloth": "Please load the model with transformers and wrap it with `peft.get_peft_model`",
}


def check_not_fused(model: nn.Module) -> None:
    """
    Raise a `ValueError` if a tool computes the LoRA of a model with kernels of its own. A gate is a hook on `lora_A`,
    and they never call that: the search would silently choose by gates that do nothing.
    """
    if (found := fused_lora(model)) is None:
        return
    tool, name = found
    raise ValueError(
        f"You passed a model whose LoRA is computed by the fused kernels of {tool} (in {name or 'the model'!r}). They "
        "read the weight of `lora_A` without calling it, so the gates of the search would have no effect. "
        f"{_REMEDIES[tool]}. Or search in a first run without {tool} (`DiffoRAConfig(search_only=True)`), and train "
        f"with {tool} in a second one the modules that `selected_lora_config` gives."
    )
