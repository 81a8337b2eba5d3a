"""A callback by which the trainer that a tool builds becomes a searching one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..compat.transformers import trainer_of_callback
from ..config import DiffoRAConfig
from ..core.selection import Selection
from ..methods.build import check_score_function
from ..methods.context import ScoreFunction
from ..trainer.checks import check_class, check_options
from ..trainer.datasets import check_dataset
from ..trainer.mixin import DiffoRAMixin


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class DiffoRACallback(TrainerCallback):
    """
    Makes a searching trainer of one that somebody else builds: with the same arguments, data and seed the run is bit
    for bit that of a class made with [`DiffoRAMixin`]. Pass it to a tool that takes callbacks,

    ```python
    run_exp(args, callbacks=[DiffoRACallback(DiffoRAConfig(selection_ratio=0.5))])
    ```

    or call [`attach`] on a trainer before its `train`:

    ```python
    trainer = DiffoRACallback(DiffoRAConfig(selection_ratio=0.5)).attach(SFTTrainer(...))
    ```

    The trainer's class becomes a subclass of what it was, with [`DiffoRAMixin`] before it: the hooks of a callback
    alone cannot hold rows out of the training data, nor restore the modules of a checkpoint before its weights.

    What it cannot do: it puts no LoRA on the model; the tool has to, or the trainer's `peft_config`. It belongs to one
    trainer, and given as a callback it has to be among those that the trainer is built with. Refused are a trainer
    that was trained already, one with a training loop of its own, one on which a method that the search overrides was
    replaced, fused kernels for LoRA, and what [`DiffoRAMixin`] refuses (DeepSpeed, FSDP1).

    Args:
        config ([`DiffoRAConfig`], *optional*):
            Options of the search.
        arch_dataset (`Dataset` or `IterableDataset`, *optional*):
            Held-out data for the matrix, in the form of the trainer's own training set: tokenized, if that is. By
            default a part of the training set is held out until the pruning.
        score_function (`Callable`, *optional*):
            For `DiffoRAConfig(method="custom")`; see [`DiffoRAMixin`].
        trainer (`Trainer`, *optional*):
            The trainer, where a tool tells its callbacks of it while it is built (ms-swift). Otherwise it is found.

    Attributes:
        trainer (`Trainer` or `None`): the trainer that it was attached to.
        selection ([`Selection`] or `None`): what was chosen, once the others are pruned.

    Raises:
        TypeError: if `config` is not a [`DiffoRAConfig`].
        ValueError: if the trainer cannot be searched with; the message says what to do instead.
    """

    def __init__(
        self,
        config: DiffoRAConfig | None = None,
        arch_dataset: Any = None,
        score_function: ScoreFunction | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        check_options(config)
        self.config = config or DiffoRAConfig()
        check_score_function(self.config, score_function)
        check_dataset("arch_dataset", arch_dataset)
        self.arch_dataset = arch_dataset
        self.score_function = score_function
        self.trainer: Any = None
        self._announced = trainer

    @property
    def selection(self) -> Selection | None:
        """What was chosen; `None` until the others are pruned."""
        return None if self.trainer is None else self.trainer.selection

    def attach(self, trainer: AnyTrainer) -> AnyTrainer:
        """
        Make a built trainer a searching one, and return it. If it cannot be searched with, it stays as it is.

        Args:
            trainer (`Trainer`): of any subclass; not trained yet, its model a `PeftModel` with LoRA.

        Raises:
            TypeError: if it is not a `Trainer`, its model has no LoRA, or its class has a training loop of its own.
            ValueError: if it cannot be searched with.
        """
        self._check(trainer)
        with _undone_on_failure(trainer):
            self._change_class(trainer)
            trainer._prepare_search()  # type: ignore[attr-defined]
        self.trainer = trainer
        return trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._announced or trainer_of_callback(self)
        if trainer is None:
            raise ValueError(
                "`on_init_end` of the `DiffoRACallback` was called, but no `transformers.Trainer` is being "
                "built with it, so it cannot be searched with. Please call "
                "`DiffoRACallback(config).attach(trainer)` on the finished trainer."
            )
        self._check(trainer)
        with _undone_on_failure(trainer):
            # The constructors of subclasses go on from here, so the rest is done when `train` is called.
            self._change_class(trainer)
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = None if self.trainer is None else self.trainer.callback_handler
        if handler is None or self.trainer._callback not in handler.callbacks:
            raise ValueError(
                "The `DiffoRACallback` was added to a trainer after that was built, or its `train` was bypassed, so "
                "no module would ever be chosen. Please pass it in `callbacks=` where the trainer is built, or call "
                "`DiffoRACallback(config).attach(trainer)` before `trainer.train()`."
            )

    def _change_class(self, trainer: Any) -> None:
        trainer.__class__ = _searching(type(trainer))
        trainer._set_options(self.config, self.arch_dataset, self.score_function)

    def _check(self, trainer: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"A `DiffoRACallback` is attached to a `transformers.Trainer`, got {type(trainer).__name__}. Please "
                "use `SelectionRun` in a training loop of your own."
            )
        name = type(trainer).__name__
        if isinstance(trainer, DiffoRAMixin):
            raise ValueError(
                f"{name} searches already: it is made with `DiffoRAMixin`, or another `DiffoRACallback` was attached "
                "to it. Please leave one of them out."
            )
        if self.trainer is not None or (self._announced is not None and self._announced is not trainer):
            raise ValueError(
                "This `DiffoRACallback` belongs to another trainer. Please make one for each: "
                "`DiffoRACallback(config)`."
            )
        if trainer.state.global_step:
            raise ValueError(
                f"{name} was trained for {trainer.state.global_step} steps already. Please attach the callback before "
                "`train`; `train(resume_from_checkpoint=...)` resumes a run."
            )
        check_class(type(trainer))
        if replaced := sorted(name for name in vars(trainer) if callable(vars(DiffoRAMixin).get(name))):
            raise ValueError(
                f"`{replaced[0]}` of this {name} was replaced on the object itself, so that what the search does "
                "there would be bypassed. Please attach the callback before that, or leave the replacement out."
            )


def _searching(parent: type) -> type:
    """A class of trainers with the search before it."""
    return type(f"DiffoRA{parent.__name__}", (DiffoRAMixin, parent), {"__doc__": DiffoRAMixin.__doc__})


@contextmanager
def _undone_on_failure(trainer: Trainer) -> Iterator[None]:
    """Leave a trainer as it was if it cannot be searched with."""
    handler = trainer.callback_handler
    stock, attributes, callbacks = type(trainer), dict(vars(trainer)), list(handler.callbacks)
    try:
        yield
    except BaseException:
        trainer.__class__ = stock
        vars(trainer).clear()
        vars(trainer).update(attributes)
        handler.callbacks[:] = callbacks
        raise
