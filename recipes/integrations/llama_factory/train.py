"""
`llamafactory-cli train`, with the LoRA modules chosen while it trains:

    python recipes/integrations/llama_factory/train.py recipes/integrations/llama_factory/config.yaml

It takes what `llamafactory-cli train` takes. See docs/integrations.md for the versions that it was run with.
"""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

from diffora_trainer import DiffoRACallback, DiffoRAConfig


if __name__ == "__main__":
    callback = DiffoRACallback(DiffoRAConfig(selection_ratio=0.5))
    run_exp(callbacks=[callback])
    if callback.selection is not None:
        print(callback.selection.table())
