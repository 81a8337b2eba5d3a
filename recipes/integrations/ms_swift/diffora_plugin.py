"""
A plugin for ms-swift, which chooses the LoRA modules while it trains. `config.yaml` beside it has these in it:

    swift sft ... --external_plugins recipes/integrations/ms_swift/diffora_plugin.py --callbacks diffora \
        --gradient_checkpointing_kwargs '{"use_reentrant": false}'

See docs/integrations.md for the versions that it was run with.
"""

from __future__ import annotations

from swift.callbacks import callbacks_map

from diffora_trainer import DiffoRACallback, DiffoRAConfig


callbacks_map["diffora"] = lambda args, trainer: DiffoRACallback(DiffoRAConfig(selection_ratio=0.5), trainer=trainer)
