"""The mixin that makes a searching trainer of any Trainer: what it overrides, and who does it. Wiring only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compat.neftune import end_neftune, renew_neftune
from ..compat.transformers import output_dir
from ..compat.trl import own_training_step
from ..config import DiffoRAConfig
from ..core.selection import Selection
from ..hub.push import PublicCopies
from ..logging import follow_log_level
from ..methods.build import check_score_function, make_schedule
from ..methods.context import ScoreFunction
from ..search.run import SelectionRun
from . import saving
from .building import parent_arguments
from .callback import SessionCallback
from .checkpoint import atomic_checkpoint
from .checks import check_can_train, check_class, check_options, check_trainer
from .compilation import model_changed, recompile
from .datasets import check_dataset, prepare_arch_dataset
from .held_out import HeldOutData
from .images import MatrixImageCallback
from .loss import check_own_loss, loss_of_trainer
from .micro_batches import step_in_micro_batches
from .prefix import TrainingPrefix, check_prefix_cache
from .progress import SearchProgressCallback
from .running import check_search, complete_model, make_run
from .session import Hooks, TrainerSession


if TYPE_CHECKING:
    from .types import SearchingTrainer as _Base
else:
    _Base = object


class DiffoRAMixin(_Base):
    """
    Makes a trainer search for the modules that deserve a LoRA while it trains (DiffoRA,
    https://huggingface.co/papers/2502.08905), drop the others at a set step, go on with the chosen ones in the same
    run, and save an ordinary PEFT adapter. Put it before any subclass of [`~transformers.Trainer`]:

    ```python
    class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
        pass
    ```

    A trainer that makes the completions that it trains on (GRPO, RLOO) has no rows that could be held out: a row is a
    prompt, and the loss takes completions and their rewards. There an architecture step takes the gradient of the
    gates on the completions of the micro-batch just trained on. It costs one forward and one backward pass, generates
    nothing and calls no reward function; prompts, groups and their order are the parent's. Of the bi-level idea this
    gives up one thing: the gates learn from completions that the weights have just been stepped on, and not from
    held-out prompts. The value of such a loss says nothing (right after a step it is the mean advantage, whatever the
    model), so no losses are compared around the pruning. One micro-batch is kept, or the latest `score_batches` for
    another `method`.

    A trainer whose loss is in its `training_step` (OnlineDPO) runs that step on held-out prompts, up to its backward
    pass: each architecture step, or each of the `score_batches` of another `method`, generates and calls the reward
    functions or the judge once. Here too no losses are compared around the pruning.

    The trainer takes all that its parent takes, plus:

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA of the modules to choose from. Defaults to LoRA on all linear layers. If the model is a
            `PeftModel` it is taken as it is. The configuration that you pass is not changed.
        diffora_config ([`DiffoRAConfig`], *optional*):
            Options of the search.
        arch_dataset (`Dataset` or `IterableDataset`, *optional*):
            Held-out data for the matrix, in the form of the training data. By default a part of the training set is
            held out until the pruning (see `arch_split`). The evaluation set is never used. Not for trainers that make
            their own completions.
        score_function (`Callable`, *optional*):
            For `DiffoRAConfig(method="custom")`: `score_function(model, batches)` gives a dictionary from the name of
            each LoRA module to its score, of which the highest are kept. It is called once, right before the pruning
            (or at each moment of `reallocate_every`), with the model in evaluation mode and a list of held-out batches
            on its device.

    Attributes:
        selection ([`Selection`] or `None`): what was chosen, once the others are pruned.

    Raises:
        TypeError: if `diffora_config` is not a [`DiffoRAConfig`] or `peft_config` not a `LoraConfig`.
        ValueError: if the model, the data or the training arguments cannot be searched with; the message says what to
            do instead.
    """

    _callback: SessionCallback | None = None
    _loop_began = False
    _in_architecture_step = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(DiffoRAMixin)]
        if Trainer in before:
            first = next(base.__name__ for base in before[1:] if issubclass(base, Trainer))
            raise TypeError(
                f"`{cls.__name__}` names {first} before the mixin, so that {first} would silently train without "
                f"a search. Please swap them: `class {cls.__name__}(DiffoRAMixin, {first})`."
            )

    def __init__(
        self,
        *args: Any,
        peft_config: PeftConfig | None = None,
        diffora_config: DiffoRAConfig | None = None,
        arch_dataset: Any = None,
        score_function: ScoreFunction | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_options(diffora_config, arch_dataset, score_function)
        with parent_arguments(self, DiffoRAMixin, args, kwargs, peft_config) as named:
            super().__init__(**named)
            self._prepare_search(named.get("train_dataset"), named.get("formatting_func"))

    def _set_options(
        self, config: DiffoRAConfig | None, arch_dataset: Any, score_function: ScoreFunction | None
    ) -> None:
        """What can be said before there is a model: the first half of a trainer's construction."""
        check_options(config)
        check_class(type(self))
        self.diffora_config = config or DiffoRAConfig()
        check_score_function(self.diffora_config, score_function)
        self.score_function = score_function
        check_dataset("arch_dataset", arch_dataset)
        self.arch_dataset = arch_dataset
        self._held_out = HeldOutData(self)
        self._public_copies = PublicCopies(self)
        self._output_card = saving.OutputCard(self)
        self._prefix_cache = TrainingPrefix(self)
        hooks = Hooks(self._make_run, self._set_prune_step, self._held_out)
        self._session = TrainerSession(self.diffora_config, hooks)

    def _prepare_search(self, given: Any = None, formatting_func: Any = None) -> None:
        """
        What needs the parent's work: the second half of a trainer's construction.

        Args:
            given (`Dataset`, *optional*): the training set as it was passed to the parent.
            formatting_func (`Callable`, *optional*): what was passed to the parent to prepare it with.
        """
        follow_log_level(self.args.log_level)
        check_trainer(self)
        check_own_loss(self)
        check_prefix_cache(self)
        complete_model(self.model, self.diffora_config)
        self.arch_dataset = prepare_arch_dataset(self, given, formatting_func)
        self._callback = SessionCallback(self._session)
        self.add_callback(self._callback)
        self.add_callback(SearchProgressCallback(self._session, self.callback_handler))
        self.add_callback(MatrixImageCallback(self._session, self.callback_handler))
        # What is wrong with the model or the schedule should be said now, not when training starts.
        check_search(self)
        if self.args.max_steps > 0:
            make_schedule(self.diffora_config, self.args.max_steps)

    @property
    def selection(self) -> Selection | None:
        """What was chosen; `None` until the others are pruned."""
        return self._session.selection

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The parent's, with what the options put into it."""
        return complete_model(super().call_model_init(*args, **kwargs), self.diffora_config)

    def _make_run(self, model: nn.Module, optimizer: Any, scheduler: Any, total_steps: int) -> SelectionRun:
        return make_run(self, model, optimizer, scheduler, total_steps, self._after_prune)

    # Training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, search and prune. See [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest
        checkpoint that is whole; one whose saving was interrupted is passed over.
        """
        if self._callback is None:  # searching since its constructor ran (`integrations.callback`)
            self._prepare_search()
        check_can_train(self)
        self._loop_began = False
        checkpoint = saving.checkpoint_to_resume(self, resume_from_checkpoint)
        self._session.prepare_resume(checkpoint)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self._prefix_cache.close()
            self._session.release_model(self.model)
            end_neftune(self)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` runs the loop again when memory ran out. The parent reads the checkpoint's weights
        # once, before the first time, and so is the search restored once.
        checkpoint = kwargs.get("resume_from_checkpoint")
        if self._loop_began:
            saving.log_restart(self, checkpoint)
            if checkpoint is not None and not self.is_fsdp_enabled:  # with FSDP the parent reads them in the loop
                self._load_from_checkpoint(checkpoint)
        self._loop_began = True
        self._session.leave_loop()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A training step of the parent, under gates drawn for it while the search lasts."""
        if self._in_architecture_step:  # which runs the step for its loss, under gates of its own
            return super().training_step(model, inputs, *args, **kwargs)
        replayed = self._prefix_cache.replayed(inputs, self._session.is_pruned(self.model))
        self._session.before_step(inputs)
        with replayed, self._held_out.keep_rollouts(self._session.gates_active):
            if (search := self._session.splitting_search) is not None:
                return step_in_micro_batches(self, search, super().training_step, model, inputs, *args, **kwargs)
            return super().training_step(model, inputs, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's batches of an optimizer step; none if the run is to end before its first step."""
        if self._session.in_loop and self._session.should_stop:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _end_search(self) -> None:
        """The loop has made its last step: what is still to be chosen is chosen now."""
        if self._callback is not None:
            self._callback.on_train_end(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's log, with the state of the search in those of training."""
        if "train_runtime" in logs:  # the last one: trackers close before the end of the training is announced to us
            self._end_search()
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._session.metrics())
        super().log(logs, *args, **kwargs)

    def compute_architecture_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """
        The loss of an architecture step, whose gradient moves the matrix: `compute_loss`, or, in a trainer that takes
        its loss elsewhere, what its `training_step` would take the gradient of. Override it where an architecture step
        should minimise another loss. The trainer's `log` does nothing meanwhile, and its counters and metrics are put
        back after the call: numbers, texts, tensors without a gradient, NumPy arrays, lists, dictionaries, sets and
        deques (up to 100,000 entries each, 16 MiB in all), and objects that hold nothing but numbers. What else it
        changes (attributes of other objects, files, what is sent to a tracker directly) stays changed.

        Args:
            model (`nn.Module`): the model as it is trained, under the gates of the search.
            inputs (`dict`): a held-out batch, prepared as the trainer prepares a training batch. For a trainer that
                makes its own completions, the batch of a training step just made.

        Returns:
            `Tensor`: a scalar that depends on the model's LoRA modules.
        """
        return loss_of_trainer(self, model, inputs)

    @property
    def _generates_for_loss(self) -> bool:
        """Whether an architecture step has to run the parent's `training_step` for its loss."""
        default = type(self).compute_architecture_loss is DiffoRAMixin.compute_architecture_loss
        return default and own_training_step(self) is not None

    def _after_prune(self) -> None:
        model_changed(self)
        renew_neftune(self)
        self._held_out.give_back()

    # Held-out data

    def _set_prune_step(self, step: int) -> None:
        self._held_out.set_prune_step(step, given_back=self._session.is_pruned(self.model))

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The parent's data loader; until the pruning it leaves the held-out rows out."""
        parent, session = partial(super().get_train_dataloader, *args, **kwargs), self._session
        with self._prefix_cache.keyed():
            return self._held_out.train_dataloader(parent, session.held_out_rows(self.model), again=session.in_loop)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._held_out.train_sampler(super()._get_train_sampler(train_dataset))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._held_out.removes_columns = True
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        self._held_out.removes_columns = True
        return super()._get_collator_with_removed_columns(data_collator, description)

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        self._output_card.write_waiting(folder)
        with self._public_copies.arguments():  # the parent pickles them
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            saving.complete_adapter(self, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, PEFT's facts, and what the search found."""
        self._output_card.write(partial(super().create_model_card, *args, **kwargs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._session.in_loop and self._callback is not None:
            # A callback that comes before ours may save at the end of a step, as `enable_jit_checkpoint` does: what
            # the search does then belongs into the checkpoint. Ours does not come first instead: the callbacks that a
            # trainer is built with would begin after the run has begun, and see a model that is pruned already.
            self._callback.on_step_end(self.args, self.state, self.control)
        folder = Path(output_dir(self, trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with atomic_checkpoint(folder, self.args.should_save), self._output_card.at_checkpoint():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._session.save(output_dir, self.state.global_step, self.model)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The file by which a checkpoint is known to be whole comes next, from one process: the others are done first.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The module set first: the optimizer is built, and its state loaded, for the modules that are there then.
        self._session.load(resume_from_checkpoint, self.model, self.optimizer, self.lr_scheduler)
        recompile(self)
        renew_neftune(self)
        parent = super()._load_from_checkpoint
        saving.load_adapter(self, resume_from_checkpoint, lambda folder: parent(folder, model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saving.load_optimizer(self, checkpoint, super()._load_optimizer_and_scheduler)

    def _load_best_model(self) -> None:
        self._end_search()  # in a run that stopped before, the best checkpoint is one of other modules
        if self.state.best_model_checkpoint is not None:
            saving.load_best_adapter(self, super()._load_best_model)

    # Pushing

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._public_copies.push_checkpoint(
            super()._push_from_checkpoint, checkpoint_folder, lambda: saving.update_output(self, checkpoint_folder)
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.push_to_hub`]. The tokens and folders of this machine are left out."""
        return self._public_copies.push(super().push_to_hub, *args, **kwargs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._public_copies.renew()
