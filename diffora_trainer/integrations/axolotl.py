"""The plugin for axolotl, which loads this module. It alone imports axolotl and pydantic."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, field_validator

from ..config import DiffoRAConfig
from ..logging import get_logger
from ..trainer.saving import save_findings
from .callback import DiffoRACallback


if TYPE_CHECKING:
    from ..trainer.types import SearchingTrainer


logger = get_logger(__name__)

NAME = f"{__name__}.DiffoRAPlugin"
"""What stands under `plugins:`."""
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""axolotl's fused kernels for LoRA. It switches them on where none of them is set."""


class DiffoRAArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    diffora: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of `diffora_trainer.DiffoRAConfig`, by their names, such as `selection_ratio: 0.5`.",
    )

    @field_validator("diffora", mode="before")
    @classmethod
    def check_options(cls, value: Any) -> dict[str, Any]:
        """Refuse what `DiffoRAConfig` would refuse, before anything is loaded."""
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ValueError(
                f"`diffora: {value!r}` must be a mapping of options of `DiffoRAConfig`, such as "
                "`diffora: {selection_ratio: 0.5}`."
            )
        make_config(value)
        return dict(value)


class DiffoRAPlugin(BasePlugin):
    """
    Chooses the LoRA modules of an axolotl run while it trains:

    ```yaml
    plugins:
      - diffora_trainer.integrations.axolotl.DiffoRAPlugin
    ```

    The trainer that axolotl builds is made a searching one right after, by [`DiffoRACallback`]. `get_trainer_cls`
    would not do: axolotl takes the class of one plugin only, and where `rl` is set it builds such a class without a
    model.

    axolotl's fused kernels for LoRA compute around the gates, and reentrant checkpointing has no gradient of them.
    Where the configuration does not name them they are switched off, with a warning; where it asks for one, that is
    refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: SearchingTrainer | None = None

    def register(self, cfg: Any) -> None:
        """
        The configuration as the user wrote it, before axolotl fills in defaults.

        Raises:
            ValueError: if it asks for something that a search cannot be part of.
        """
        if NAME not in (cfg.get("plugins") or []):  # axolotl keeps the plugins of an earlier configuration
            return
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise ValueError(
                f"`adapter: {cfg.get('adapter')}` with {NAME}, which chooses among LoRA modules. Please set "
                "`adapter: lora` or `adapter: qlora`."
            )
        if wanted := [name for name in KERNELS if cfg.get(name)]:
            raise ValueError(
                f"`{wanted[0]}: true` with {NAME}. This kernel of axolotl reads the weight of `lora_A` without "
                "calling it, so the gates of the search would have no effect. Please set it to false, or leave it out."
            )
        for name, why in (
            ("relora", "merges the LoRA into the base weights and starts it anew, which no module can be pruned from"),
            ("deepspeed", "keeps weights and optimizer states in buffers that modules cannot be taken out of"),
        ):
            if cfg.get(name):
                raise ValueError(f"`{name}: {cfg.get(name)}` with {NAME}: it {why}. Please leave `{name}` out.")
        if unset := [name for name in KERNELS if cfg.get(name) is None]:
            for name in unset:
                cfg[name] = False
            logger.warning(
                f"{', '.join(unset)}: switched off. These kernels of axolotl compute the LoRA without calling "
                "`lora_A`, so the gates of the search would have no effect. Set them to false to say so yourself."
            )
        checkpointing = dict(cfg.get("gradient_checkpointing_kwargs") or {})
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                f"`gradient_checkpointing_kwargs: {{use_reentrant: true}}` with {NAME}. The backward pass of the "
                "reentrant way cannot give the gradient of the gates alone. Please set `use_reentrant: false`."
            )
        if cfg.get("gradient_checkpointing") and "use_reentrant" not in checkpointing:  # axolotl's default is true
            cfg["gradient_checkpointing_kwargs"] = {**checkpointing, "use_reentrant": False}
            logger.warning("gradient_checkpointing_kwargs: `use_reentrant` is set to false, which a search needs.")

    def get_input_args(self) -> str:
        """Where axolotl finds the plugin's arguments."""
        return f"{__name__}.DiffoRAArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make the trainer that axolotl built, of whatever class, a searching one."""
        self._trainer = DiffoRACallback(make_config(cfg.diffora or {})).attach(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """axolotl saves an adapter without its trainer, so what was found is written when all else is saved."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None and trainer.is_world_process_zero():
            save_findings(trainer, Path(cfg.output_dir))


def make_config(options: Any) -> DiffoRAConfig:
    """
    The options under `diffora:`.

    Raises:
        ValueError: if one has no such name, or a value that cannot be.
    """
    options = options.to_dict() if hasattr(options, "to_dict") else dict(options)
    names = [field.name for field in dataclasses.fields(DiffoRAConfig)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            raise ValueError(
                f"`diffora: {{{name}: ...}}`: `DiffoRAConfig` has no option {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" Please use one of {', '.join(names)}."
            )
    try:
        return DiffoRAConfig(**options)
    except TypeError as error:  # pydantic reports ValueErrors with the name of the field
        raise ValueError(str(error)) from error
