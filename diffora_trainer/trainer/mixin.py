"""The mixin that makes a searching trainer of any Trainer, and the trainers made of it. Wiring only."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.compiled import check_not_compiled
from ..adapters.distributed import rebuild_ddp
from ..adapters.grid import peft_model
from ..adapters.pruning import own_config, remove_empty_groups
from ..adapters.wrapping import complete_lora_config, wrap_model, wrap_model_init
from ..compat import (
    activation_checkpointing,
    check_trainer_methods,
    is_sentence_transformer,
    load_sentence_transformer,
    loss_of_training_step,
    output_dir,
    own_training_step,
)
from ..config import DiffoRAConfig
from ..core.files import ADAPTER_FOLDER
from ..core.selection import Selection
from ..experimental.shortcuts.model import ShortcutModel, add_to_adapter, load_shortcuts
from ..experimental.shortcuts.shortcuts import shortcuts
from ..hub.card import complete_card
from ..hub.plots import plot_to
from ..hub.push import PublicPushMixin
from ..logging import follow_log_level, get_logger
from ..methods.scores import ScoreFunction, check_score_function
from ..search.search import ArchitectureSearch
from .callback import DiffoRACallback
from .checkpoint import atomic_checkpoint, find_checkpoint
from .checks import (
    check_arch_columns,
    check_loaded,
    check_loop,
    check_own_loss,
    check_rows_left,
    check_trainer,
    give_shortcuts,
    prepare_dataset,
    preserved_bookkeeping,
    task_type_of_trainer,
)
from .data import check_dataset
from .held_out import HeldOutMixin
from .progress import SearchProgressCallback


logger = get_logger(__name__)

if TYPE_CHECKING:

    class _Base(Trainer):
        """What the mixin may rely on, without the unions of the parent's own annotations."""

        args: Any
        model: Any
        train_dataset: Any

else:
    _Base = object


class DiffoRAMixin(HeldOutMixin, PublicPushMixin, _Base):
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
    model), so no losses are compared around the cut. One micro-batch is kept, or the latest `score_batches` for
    another `method`.

    A trainer whose loss is in its `training_step` (OnlineDPO) runs that step on held-out prompts, up to its backward
    pass: each architecture step, or each of the `score_batches` of another `method`, generates and calls the reward
    functions or the judge once. Here too no losses are compared around the cut.

    The trainer takes all that its parent takes, plus:

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA of the modules to choose from. Defaults to LoRA on all linear layers. If the model is a
            `PeftModel` it is taken as it is. The configuration that you pass is not changed.
        diffora_config ([`DiffoRAConfig`], *optional*):
            Options of the search.
        arch_dataset (`Dataset` or `IterableDataset`, *optional*):
            Held-out data for the matrix, in the form of the training data. By default a part of the training set is
            held out until the cut (see `arch_split`). The evaluation set is never used. Not for trainers that make
            their own completions.
        score_function (`Callable`, *optional*):
            For `DiffoRAConfig(method="custom")`: `score_function(model, batches)` gives a dictionary from the name of
            each LoRA module to its score, of which the highest are kept. It is called once, right before the cut (or
            at each moment of `reallocate_every`), with the model in evaluation mode and a list of held-out batches on
            its device.

    Attributes:
        selection ([`Selection`] or `None`): what was chosen, once the matrix is cut.

    Raises:
        TypeError: if `diffora_config` is not a [`DiffoRAConfig`] or `peft_config` not a `LoraConfig`.
        ValueError: if the model, the data or the training arguments cannot be searched with; the message says what to
            do instead.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(DiffoRAMixin)]
        if Trainer in before:
            first = next(base.__name__ for base in before[1:] if issubclass(base, Trainer))
            raise TypeError(
                f"`{cls.__name__}` names {first} before the mixin, so that {first} would train without a search, in "
                f"silence. Please turn them round: `class {cls.__name__}(DiffoRAMixin, {first})`."
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
        if diffora_config is not None and not isinstance(diffora_config, DiffoRAConfig):
            raise TypeError(
                f"`diffora_config` must be a `DiffoRAConfig`, got {type(diffora_config).__name__}. "
                "Please make one of your options: `DiffoRAConfig(selection_ratio=0.5)`."
            )
        check_trainer_methods(type(self))
        check_loop(type(self))
        self.diffora_config = diffora_config or DiffoRAConfig()
        check_score_function(self.diffora_config.method, score_function)
        self.score_function = score_function
        check_dataset("arch_dataset", arch_dataset)
        self.arch_dataset = arch_dataset
        self._last_train_batch: Any = None
        self._loop_began = False
        self._in_architecture_step = False
        named = self._with_lora(self._by_name(args, kwargs), peft_config)
        given_columns = getattr(named.get("train_dataset"), "column_names", None)
        super().__init__(**named)
        follow_log_level(self.args.log_level)
        check_trainer(self)
        # Whether an architecture step has to run the parent's `training_step` for its loss.
        default = type(self).compute_architecture_loss is DiffoRAMixin.compute_architecture_loss
        self._generates_for_loss = default and own_training_step(self) is not None
        if self._generates_for_loss:
            check_own_loss(self)
        give_shortcuts(self.model, self.diffora_config)
        if arch_dataset is not None:
            self.arch_dataset = prepare_dataset(self, arch_dataset, named.get("formatting_func"))
            check_arch_columns(self, given_columns)
        check_rows_left(self)
        self._callback = DiffoRACallback(
            self.diffora_config,
            make_search=self._make_search,
            make_held_out=self._make_held_out,
            resume_split=self._set_cut,
            after_cut=self._after_cut,
            last_train_batch=lambda: self._last_train_batch,
            after_switch=lambda: rebuild_ddp(self.model_wrapped, self.accelerator.ddp_handler),
        )
        self.add_callback(self._callback)
        self.add_callback(SearchProgressCallback(self._callback, self._find_progress_bar))
        # What is wrong with the model or the schedule should be said now, not when training starts.
        self._make_search(self.model)
        if self.args.max_steps > 0:
            self.diffora_config.schedule(self.args.max_steps)

    @property
    def selection(self) -> Selection | None:
        """What was chosen; `None` until the matrix is cut."""
        return self._callback.selection

    # Building

    def _parent_parameters(self) -> list[str]:
        """Names of what the parent's constructor takes, in order."""
        names: list[str] = []
        mro = type(self).__mro__
        for parent in mro[mro.index(DiffoRAMixin) + 1 :]:
            if "__init__" in vars(parent):
                found = inspect.signature(vars(parent)["__init__"]).parameters.values()
                names += [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
                if not any(p.kind is p.VAR_KEYWORD for p in found):
                    break
        return [name for name in dict.fromkeys(names) if name != "self"]

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self._parent_parameters()
        if len(args) > len(names):
            raise TypeError(
                f"{type(self).__name__} takes {len(names)} positional arguments, but {len(args)} were given."
            )
        named = dict(zip(names, args, strict=False))
        if twice := sorted(named.keys() & kwargs.keys()):
            raise TypeError(f"{type(self).__name__} got {', '.join(twice)} both by position and by name.")
        return {**named, **kwargs}

    def _with_lora(self, arguments: dict[str, Any], peft_config: PeftConfig | None) -> dict[str, Any]:
        """The parent's arguments, with LoRA on the model or its configuration among them."""
        if isinstance(arguments.get("model"), ShortcutModel):  # as `from_pretrained` gave it, to be trained on
            arguments = {**arguments, "model": arguments["model"].model}
        model, args = arguments.get("model"), arguments.get("args")
        if args is not None and not isinstance(args, TrainingArguments):
            raise TypeError(
                f"`args` must be training arguments, got {type(args).__name__}. Please pass a `TrainingArguments`, or "
                "what belongs to the trainer, such as `SFTConfig`."
            )
        check_loaded(model)
        check_dataset("train_dataset", arguments.get("train_dataset"))
        if isinstance(model, nn.Module):
            check_not_compiled(model)  # before it is changed
        if "peft_config" in self._parent_parameters():
            if not isinstance(model, (nn.Module, str, Path)) and arguments.get("model_init") is None:
                raise TypeError(
                    f"`model` must be a model, or the name or folder of one, got {type(model).__name__}. Please load "
                    "it, for example with `AutoModelForCausalLM.from_pretrained`."
                )
            if not isinstance(model, PeftModel):
                options = getattr(args, "model_init_kwargs", None) or {}
                peft_config = complete_lora_config(peft_config, model, task_type_of_trainer(self), options)
            return {**arguments, "peft_config": peft_config}
        checkpointing = activation_checkpointing(args)
        if arguments.get("model_init") is not None:
            return {**arguments, "model_init": wrap_model_init(arguments["model_init"], peft_config, checkpointing)}
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` must be a model, got {type(model).__name__}. Please load it first, for example with "
                "`AutoModelForSequenceClassification.from_pretrained`."
            )
        if args is not None:
            set_seed(args.seed)  # LoRA weights are drawn here, before the parent sets the seed
        return {**arguments, "model": wrap_model(model, peft_config, checkpointing)}

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The parent's, with the shortcuts that the options ask for."""
        return give_shortcuts(super().call_model_init(*args, **kwargs), self.diffora_config)

    def _make_search(self, model: nn.Module) -> ArchitectureSearch:
        model = peft_model(model)
        if self.diffora_config.base_model_id is not None:
            for name in list(model.peft_config):  # type: ignore[arg-type]
                own_config(model, name).base_model_name_or_path = self.diffora_config.base_model_id
        scaler = getattr(self.accelerator, "scaler", None)
        return ArchitectureSearch(
            model,
            self.diffora_config,
            loss_fn=self._architecture_loss,
            reduce=self._mean_over_processes,
            loss_scale=None if scaler is None else scaler.get_scale,
            score_function=None if self.score_function is None else self._custom_scores,
        )

    def _custom_scores(self, model: nn.Module, batches: list[Any]) -> Any:
        assert self.score_function is not None
        return self.score_function(model, [self._prepare_architecture_batch(batch) for batch in batches])

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="mean").cpu()

    def _find_progress_bar(self) -> ProgressCallback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, ProgressCallback)), None)

    # Training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, search and cut. See [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest
        checkpoint that is whole; one whose saving was interrupted is passed over.
        """
        if self._callback not in self.callback_handler.callbacks:
            raise ValueError(
                "The `DiffoRACallback` was removed from this trainer, so no module would ever be chosen. Please leave "
                "it in, or use the parent trainer."
            )
        if self.train_dataset is None:
            raise ValueError(
                "This trainer has `train_dataset=None`, so it can evaluate and predict but not train. Please pass a "
                "`train_dataset`."
            )
        self._callback.forget_checkpoint()
        self._loop_began = False
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            resume_from_checkpoint, passed = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            if passed and self.is_world_process_zero():
                reasons = "".join(f"\n{name}: {reason}" for name, reason in passed.items())
                logger.warning(f"Resuming from {resume_from_checkpoint}, because newer ones are not whole.{reasons}")
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._callback.give_back(self.model)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` runs the loop again when memory ran out. The parent reads the checkpoint's weights
        # once, before the first time, and so is the search restored once.
        checkpoint = kwargs.get("resume_from_checkpoint")
        if self._loop_began:
            alone = self._callback.is_cut(self.model) and checkpoint is None
            logger.warning(
                f"Memory ran out; training starts again from {checkpoint or 'its first step'} with smaller batches."
                + (" The modules that were chosen stay, and are trained alone from there." if alone else "")
            )
            if checkpoint is not None and not self.is_fsdp_enabled:  # with FSDP the parent reads them in the loop
                self._load_from_checkpoint(checkpoint)
        self._loop_began = True
        self._callback.release()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A training step of the parent, under gates drawn for it while the search lasts."""
        if self._in_architecture_step:  # which runs the step for its loss, under gates of its own
            return super().training_step(model, inputs, *args, **kwargs)
        if self._callback.gates_active and self._callback.search is not None:
            self._callback.search.draw_gates()
            if self.diffora_config.arch_order == 2:
                self._last_train_batch = inputs
        with self._kept_rollouts():
            return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The parent's log, with the state of the search in those of training."""
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._callback.metrics())
        super().log(logs, *args, **kwargs)

    def compute_architecture_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """
        The loss of an architecture step, whose gradient moves the matrix: `compute_loss`, or, in a trainer that takes
        its loss elsewhere, what its `training_step` would take the gradient of. Override it where an architecture step
        should minimise another loss. Counters and metrics of the trainer are put back after the call.

        Args:
            model (`nn.Module`): the model as it is trained, under the gates of the search.
            inputs (`dict`): a held-out batch, prepared as the trainer prepares a training batch. Of a trainer that
                makes its own completions, the batch of a training step just made.

        Returns:
            `Tensor`: a scalar that depends on the model's LoRA modules.
        """
        if own_training_step(self) is None:
            loss = self.compute_loss(model, inputs)
            assert isinstance(loss, Tensor)  # a tuple only where outputs are asked for
            return loss
        self._in_architecture_step = True
        try:
            found = loss_of_training_step(self, model, inputs)
        finally:
            self._in_architecture_step = False
        if found is None:
            raise ValueError(
                f"The `training_step` of {type(self).__name__} handed no loss to `accelerator.backward`, so there is "
                "none to take the gradient of the gates of. Please override `compute_architecture_loss`."
            )
        return found

    def _architecture_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The architecture loss of a batch of the search; leaves metrics, counters and the batch as they were."""
        with preserved_bookkeeping(self):
            inputs = self._prepare_architecture_batch(batch)
            with self.compute_loss_context_manager():
                # The search knows the part that has the LoRA, and the loss is one of the whole model.
                whole = self.model if model is peft_model(self.model) else model
                return self.compute_architecture_loss(whole, inputs)

    def _after_cut(self) -> None:
        rebuild_ddp(self.model_wrapped, self.accelerator.ddp_handler)
        self._last_train_batch = None
        self._give_held_out_back()

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            add_to_adapter(peft_model(self.model), folder)
            self._save_findings(folder)

    def _save_findings(self, folder: Path) -> None:
        """What the search found, beside the adapter: the selection, its picture and the card."""
        if self.selection is not None:
            self.selection.save(folder)
            plot_to(self.selection, folder)
        if isinstance(self.model, PeftModel):  # that of sentence-transformers is about the whole model
            complete_card(self, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, PEFT's facts, and what the search found."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._save_findings(Path(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(output_dir(self, trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with atomic_checkpoint(folder, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._callback.save(output_dir, self.state, self.model)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The file by which a checkpoint is known to be whole comes next, from one process: the others are done first.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The module set first: the optimizer is built, and its state loaded, for the modules that are there then.
        self._callback.load(resume_from_checkpoint, self.model, self.optimizer, self.lr_scheduler)
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        if is_sentence_transformer(self.model):
            load_sentence_transformer(self.model, peft_model(self.model), resume_from_checkpoint)
            return
        folder = "" if not shortcuts(self.model) else ADAPTER_FOLDER
        super()._load_from_checkpoint(str(Path(resume_from_checkpoint, folder)), model)
        if shortcuts(self.model):
            load_shortcuts(self.model, resume_from_checkpoint)
        # The parent loads the adapter with PEFT's default, which makes LoRA weights in half precision float32: the
        # resumed run would round otherwise than the run that made the checkpoint.
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError:
            # A group that the cut emptied has left the run, but an optimizer that is built anew may have it, empty.
            if not self._callback.is_cut(self.model) or not remove_empty_groups(self.optimizer, self.lr_scheduler):
                raise
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not shortcuts(self.model):
            super()._load_best_model()
            return
        self.state.best_model_checkpoint = str(Path(best, ADAPTER_FOLDER))
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best
        load_shortcuts(self.model, best)


class DiffoRATrainer(DiffoRAMixin, Trainer):
    """
    A [`~transformers.Trainer`] that chooses its LoRA modules while it trains. It takes all that `Trainer` takes, and
    `peft_config`, `diffora_config` and `arch_dataset`; see [`DiffoRAMixin`].

    ```python
    trainer = DiffoRATrainer(
        model=AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2),
        args=TrainingArguments("out", num_train_epochs=3),
        train_dataset=dataset,
        diffora_config=DiffoRAConfig(selection_ratio=0.5),
    )
    trainer.train()
    print(trainer.selection.table())
    ```
    """
