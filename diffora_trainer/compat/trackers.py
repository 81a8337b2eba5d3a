"""Private and version-dependent names of the trackers that transformers reports to: TensorBoard, Trackio, W&B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


ImageWriter = Callable[[str, Any, str, int], None]
"""Takes a tag, an array of shape `(height, width, 3)` and dtype `uint8`, a caption and a step."""


def image_writers(callbacks: list[Any]) -> list[ImageWriter]:
    """
    What images can be given to, of the callbacks of a Trainer that are reporting at the moment.

    `TensorBoardCallback.tb_writer` is a `SummaryWriter` from the begin of training until its end, and else `None`;
    `TrackioCallback._trackio` and `WandbCallback._wandb` are the modules, whose `Image` and `log` they call alike once
    `_initialized` is true. So it is in transformers 5.2 to 5.23. Goes with a public way to log an image through a
    Trainer.

    Args:
        callbacks (`list`): the callbacks of the Trainer (`trainer.callback_handler.callbacks`).
    """
    from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

    writers: list[ImageWriter] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            writers.append(_to_tensorboard(callback.tb_writer))
        elif isinstance(callback, (TrackioCallback, WandbCallback)) and getattr(callback, "_initialized", False):
            module = getattr(callback, "_trackio", None) or getattr(callback, "_wandb", None)
            if module is not None:
                writers.append(_to_module(module))
    return writers


def _to_tensorboard(writer: Any) -> ImageWriter:
    def write(tag: str, pixels: Any, caption: str, step: int) -> None:
        writer.add_image(tag, pixels, step, dataformats="HWC")
        writer.flush()

    return write


def _to_module(module: Any) -> ImageWriter:
    def write(tag: str, pixels: Any, caption: str, step: int) -> None:
        # The step as the callbacks log it beside their numbers.
        module.log({tag: module.Image(pixels, caption=caption), "train/global_step": step})

    return write


def training_bar(callbacks: list[Any]) -> Any:
    """
    The tqdm bar of a Trainer's steps, or `None`: `ProgressCallback.training_bar`, in transformers 5.2 to 5.23. It is
    `None` outside of training and on other processes; in a notebook another callback draws, and with `disable_tqdm`
    none does. Goes with a public name of the bar.

    Args:
        callbacks (`list`): the callbacks of the Trainer.
    """
    from transformers import ProgressCallback

    progress = next((callback for callback in callbacks if isinstance(callback, ProgressCallback)), None)
    return getattr(progress, "training_bar", None)
