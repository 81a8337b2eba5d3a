"""The configuration of a DiffoRA run: every option with its help text, and all validation of values."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .methods.matrix import DifferentialAdaptationMatrix


METHODS = ("diffora", "grad_norm", "snip", "synflow", "alpha_test", "constant", "custom")
SCORE_OPTIONS = ("score_batches", "normalize_scores", "reallocate_every")
"""What only a method that scores reads."""
SEARCH_OPTIONS = (
    *("arch_closing", "arch_every", "arch_learning_rate", "arch_order", "arch_warmup", "fold_gates", "relaxation"),
)
"""What only `method="diffora"` reads; `arch_warmup` is also read with `reallocate_every`."""
SELECTION_SCOPES = ("layer", "model")
COSTS = ("parameters", "time")
SHORTCUTS = ("residual1", "residual2", "shortcut1", "shortcut2")
SHORTCUT_RANKINGS = ("combined", "separated")
RELAXATIONS = tuple(DifferentialAdaptationMatrix.relaxations)
"""Those of this package; a user's own is known from the class that makes it."""
WEIGHT_SHARING = ("none", "layer", "model")


@dataclass
class DiffoRAConfig:
    r"""
    Configuration of the search for the modules that deserve a LoRA.

    The search follows DiffoRA (https://huggingface.co/papers/2502.08905): a Differential Adaptation Matrix (DAM) with
    a row for each transformer layer and a column for each kind of module is learned on held-out data while the LoRA
    weights are learned on training data, and is then discretized. The paper's code is not public, so every default
    here is a choice of this package. Parse it from the command line or YAML with [`~transformers.HfArgumentParser`] or
    [`~trl.TrlParser`].

    > Parameters that control how much is kept

    selection_ratio (`float`, *optional*, defaults to `0.5`):
        Share of the LoRA modules to keep, in (0, 1].
    selection_scope (`str`, *optional*, defaults to `"layer"`):
        `"layer"` keeps the best `round(selection_ratio * n)` of the `n` modules of each layer, and at least one;
        `"model"` keeps the best `round(selection_ratio * n)` of the `n` modules of the whole model.
    max_trainable_parameters (`int`, *optional*):
        Exact cap on the number of trainable LoRA parameters, used instead of `selection_ratio`: the best modules of
        the whole model are kept as long as they fit. Parameters that are not LoRA (a new classification head, say) do
        not count. It requires `selection_scope="model"` or the default scope, which it overrides.
    cost (`str`, *optional*, defaults to `"parameters"`):
        What the budget counts. `"parameters"` counts modules, or parameters with `max_trainable_parameters`. `"time"`
        counts the time of a training step as well, and needs `selection_scope="model"` or `max_trainable_parameters`:
        the backward pass ends at the lowest layer that has a LoRA, so of two sets of equally many modules the one in
        the later layers is faster. At the end of the warm-up steps of different depths are timed, and the search then
        only considers modules with which a step stays under `max_step_time`.
    max_step_time (`float`, *optional*, defaults to `0.7`):
        With `cost="time"`: the longest that a step may take after the cut, in (0, 1], as a part of what it would take
        with equally many modules spread over all layers. If no set of the full size is as fast, the fastest depth that
        has room for it is taken.

    > Parameters that control when things happen

    discretize_at (`float`, *optional*, defaults to `0.25`):
        When the matrix is discretized and the unselected modules leave the model: a whole number of 1 or more is an
        optimizer step, a number in (0, 1) a fraction of all steps.
    arch_warmup (`float`, *optional*, defaults to `0.05`):
        For how long only the LoRA weights learn at the start, in the same two forms; `0` is allowed. With `lora_B = 0`
        at the start every gate has a gradient of exactly zero, so at least one step of warm-up is always made.
        Example: in a run of 300 steps with the defaults, steps 1 to 15 are the warm-up and steps 16 to 60 the search,
        which decides; from step 61 on the gates of the modules that go are closed, the cut is made at the end of step
        75, and steps 76 to 300 train the selected modules alone.
    arch_closing (`float`, *optional*, defaults to `0.05`):
        For how long, in the same two forms, the gates of the modules that go are closed before the cut. The choice is
        made so much earlier, and then these gates fall linearly to 0 while all weights train on, so that the selected
        modules take over and nothing is lost at the cut itself. `0` searches until the cut and drops the others at
        once. It applies where the weights train with open gates (`"budget"`, `"softmax"`, and any relaxation of your
        own that says so by `trains_open`) and the modules that go do not come back as shared pairs.
    arch_every (`int`, *optional*, defaults to `4`):
        During the search an architecture step follows each `arch_every`-th optimizer step, the first one included.

    > Parameters that control the search

    relaxation (`str`, *optional*, defaults to `"budget"`):
        How the entries of the matrix leave {0, 1}, and under which gates the weights train until the cut.

        - `"budget"`: the matrix stays in the polytope of the matrices that the budget can pay and is moved by
          Frank-Wolfe steps towards the affordable set with the largest linear gain. The weights train with all gates
          open, so until the cut the run is one of plain LoRA on all modules.
        - `"sampled"`: gates in {0, 1} drawn at the target ratio, with a straight-through gradient; the weights train
          under such gates too.
        - `"sigmoid"`: independent sigmoids learned by Adam, under which the weights train: the plain reading of the
          paper.
        - `"softmax"`: a softmax over each row (or the whole matrix), which is zero-sum, learned by Adam; the weights
          train with all gates open.
    arch_learning_rate (`float`, *optional*):
        Step size of the matrix. Defaults to the relaxation's own: `2 / (t + 2)` at the `t`-th Frank-Wolfe step for
        `"budget"`, `0.1` for `"sampled"` and `0.05` for the Adam of `"sigmoid"` and `"softmax"`.
    arch_order (`int`, *optional*, defaults to `1`):
        `1` takes the gradient of the held-out loss at the present weights; `2` is the finite-difference unrolled step
        of DARTS (https://huggingface.co/papers/1806.09055, eqs. 7 and 8), about four times as costly.
    arch_split (`float`, *optional*, defaults to `0.1`):
        Part of the training set that is held out for the matrix, in (0, 1), and given back to training after the cut.
        The evaluation set is never used. Of a stream its first rows are held out, no more of them than the search
        reads (up to 64 batches), and at most this part of the stream and of what the run reads of it. Ignored when
        the trainer is given an `arch_dataset`, and by trainers that make their own completions (GRPO, RLOO), which
        hold nothing out.
    arch_batch_size (`int`, *optional*):
        Held-out rows per device in an architecture step. Defaults to the training batch size per device.
    arch_seed (`int`, *optional*, defaults to `0`):
        Seed of the split, of the order of the held-out batches and of the sampled gates. The search has random streams
        of its own and does not touch those of training.

    > Parameters that control the cut

    weight_sharing (`str`, *optional*, defaults to `"none"`):
        What becomes of the unselected modules: `"none"` removes them; with `"layer"` (or `"model"`) those of a layer
        (or of the model) that have equal shapes share one trainable pair of LoRA matrices. A module with nobody to
        share with is removed. Shared pairs are saved as ordinary LoRA weights.
    fold_gates (`bool`, *optional*, defaults to `True`):
        Multiply the gate that each selected module's weights were trained for into its `lora_B` at the cut, so that
        the model's output does not jump. This matters for `"sigmoid"`, whose weights train under fractions; for the
        other relaxations that gate is 1. With `False` the selected gates are set to 1.

    > Parameters that control what is published

    base_model_id (`str`, *optional*):
        Hub id of the base model, for the adapter's configuration and model card when the base model was loaded from a
        local folder.

    > Parameters that control what is logged

    log_gates_by_kind (`bool`, *optional*, defaults to `False`):
        Log the mean gate (or score) of each kind of module as well, as `diffora/gate/q_proj` and so on: one more
        number a kind in each log, if there are at most 16 kinds.

    > Parameters that control by what the modules are chosen

    method (`str`, *optional*, defaults to `"diffora"`):
        `"diffora"` learns the matrix. The others are zero-cost scores, after HeteroLoRA
        (https://huggingface.co/papers/2406.14956): all modules train with open gates until `discretize_at`, are then
        scored once, and the cut follows at once (see `reallocate_every` for more than once). Budget, surgery,
        checkpoints and card are the same. `discretize_at=1` scores after the first optimizer step, as near to the
        start as there is something to score in a new adapter, whose `lora_B` is 0 before it. `discretize_at=0` scores
        and cuts before the first step: for an adapter that was trained before, or for `"grad_norm"`, which sees the
        gradient of `lora_B`. `relaxation`, `fold_gates` and the `arch_`
        options on steps (`arch_warmup`, `arch_closing`, `arch_every`, `arch_learning_rate`, `arch_order`) are not
        read. The scores are explained in
        [`~diffora_trainer.methods.scores`]; higher is kept.

        - `"grad_norm"`: norm of the gradient of `lora_A` plus that of `lora_B`.
        - `"snip"`: sum of `|weight * gradient|` over both.
        - `"synflow"`: the same with all weights made positive and an input of ones: no data is read.
        - `"alpha_test"`: how far the module's contribution can be scaled down before the loss rises. It costs about
          four passes over the scoring batches for each module, all others cost one or none in all.
        - `"constant"`: a random order drawn from `arch_seed`: the control.
        - `"custom"`: the function that the trainer or [`ArchitectureSearch`] was given as `score_function`.
    score_batches (`int`, *optional*, defaults to `32`):
        Batches that a score is taken on, of `arch_batch_size` rows on each process. They come in random order from the
        rows of the training set that are held out until the cut (see `arch_split`), each row once: if these are fewer,
        so are the batches. Not read with `method="diffora"`.
    normalize_scores (`bool`, *optional*, defaults to `False`):
        Divide each score by the module's number of LoRA parameters. By default scores are raw, as published, which
        favours large modules.
    reallocate_every (`float`, *optional*):
        With a method that scores: choose anew every so many optimizer steps (a whole number of 1 or more), or after
        each such fraction of all steps of the run (a number in (0, 1)); each fifth of an epoch, as HeteroLoRA has it,
        is `0.2 / num_train_epochs`. From the end of the warm-up (`arch_warmup`, which is read then) until
        `discretize_at` all modules are switched on and scored at each of these moments, on held-out batches that go on
        through the rows from moment to moment; the best under the budget stay on, and the others are switched off.
        These keep their weights and their state in the optimizer, take no part in a step, and go on as they were when
        they are chosen again. `discretize_at` cuts to the set that is in force: `discretize_at=0.999`, or the number
        of the last step, goes on to the end. It does not combine with `weight_sharing`. Each moment costs
        `score_batches` passes. By default modules are scored once.

    > Parameters that control shortcuts

    shortcuts (`list[str]`, *optional*):
        Which kinds of shortcut are put into each layer and chosen among beside the LoRA modules, after HeteroLoRA:
        `"residual1"`, `"residual2"`, `"shortcut1"` and `"shortcut2"`, see [`~diffora_trainer.experimental.shortcuts`].
        They have the rank, scale and dropout of the LoRA configuration, and count in the budget as modules do. PEFT
        cannot hold them: an adapter that keeps one needs [`~diffora_trainer.ShortcutModel`] to be loaded, and says so;
        one that keeps none is a plain PEFT adapter. By default there are none. A model that was given shortcuts by
        [`~diffora_trainer.add_shortcuts`] keeps its own.
    shortcut_ranking (`str`, *optional*, defaults to `"combined"`):
        `"combined"` lets shortcuts and LoRA modules compete for one budget, by scores in units of the mean of their
        kind, which are free of scale (see [`scale_free`]); with `method="diffora"` by their
        gates, whose gradient is a change of the loss for either. `"separated"` ranks them apart: the same ratio of
        each is kept, or each has its part of `max_trainable_parameters` in proportion to its size. At least one LoRA
        module is always kept.

    > Evidence

    `recipes/compare`, `recipes/profile` and `recipes/ablation` (MiniLM on SST-2, 150 steps; their READMEs have the
    tables and the commands) are what the defaults rest on:

    - `relaxation="budget"`: its choices of 1/12 and 1/6 of the parameters, trained from scratch, beat all of 20 random
      sets of equal size, on two seeds (`recipes/compare`). `"sampled"` ended 0.016 ± 0.009 higher in final loss at a
      sixth of the modules (4 seeds, `recipes/ablation`).
    - Open gates until the choice: training under gates drawn at the target ratio ended 0.037 ± 0.004 higher at a
      sixth of the modules, and 0.005 ± 0.003 at a half (4 seeds, `recipes/ablation`).
    - `arch_closing`: without it the held-out loss jumps by 20 to 50 % when 5/6 of the parameters or more go
      (`recipes/compare`).
    - `arch_every` and `discretize_at`: as many architecture steps as a search may have that costs at most a quarter
      more per step (`recipes/profile`). Twice as many choose more alike from seed to seed.
    - `selection_ratio=0.5`: at a half, the final loss is that of a random half (difference 0.000 ± 0.003, 6 seeds): an
      easy budget, at which little can go wrong.
    - `arch_warmup`, `arch_split` and the learning rates are judgement, not yet measured.

    Raises:
        ValueError: if a value is out of its range, or two of them contradict each other.
        TypeError: if a value is of the wrong type.
    """

    selection_ratio: float = field(
        default=0.5, metadata={"help": "Share of the LoRA modules to keep, in (0, 1]. Ignored with a parameter cap."}
    )
    selection_scope: str = field(
        default="layer",
        metadata={
            "help": "Keep the best modules of each layer ('layer') or of the whole model ('model').",
            "choices": list(SELECTION_SCOPES),
        },
    )
    max_trainable_parameters: int | None = field(
        default=None,
        metadata={"help": "Exact cap on the number of trainable LoRA parameters, instead of `selection_ratio`."},
    )
    discretize_at: float = field(
        default=0.25,
        metadata={
            "help": "When to cut: a whole number is an optimizer step, a number in (0, 1) a fraction of all steps."
        },
    )
    arch_warmup: float = field(
        default=0.05,
        metadata={"help": "For how long only the LoRA weights learn at the start: a step, or a fraction in [0, 1)."},
    )
    arch_every: int = field(
        default=4, metadata={"help": "An architecture step follows each `arch_every`-th optimizer step."}
    )
    relaxation: str = field(
        default="budget",
        metadata={
            "help": "How the entries of the matrix leave {0, 1}.",
            "choices": DifferentialAdaptationMatrix.relaxations,  # with those of the user's own, once they are made
        },
    )
    arch_learning_rate: float | None = field(
        default=None, metadata={"help": "Step size of the matrix. Defaults to the relaxation's own."}
    )
    arch_order: int = field(
        default=1,
        metadata={"help": "1: first-order gradient; 2: DARTS' finite-difference unrolled step.", "choices": [1, 2]},
    )
    arch_split: float = field(
        default=0.1,
        metadata={"help": "Part of the training set held out for the matrix until the cut, in (0, 1)."},
    )
    arch_batch_size: int | None = field(
        default=None,
        metadata={"help": "Held-out rows per device in an architecture step. Defaults to the training batch size."},
    )
    arch_seed: int = field(
        default=0, metadata={"help": "Seed of the split, of the held-out batches and of the sampled gates."}
    )
    weight_sharing: str = field(
        default="none",
        metadata={
            "help": "Unselected modules of equal shape in a layer (or the model) share one LoRA pair, or are removed.",
            "choices": list(WEIGHT_SHARING),
        },
    )
    fold_gates: bool = field(
        default=True,
        metadata={"help": "Multiply the selected gates into `lora_B` at the cut instead of setting them to 1."},
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, for the adapter's configuration and model card."}
    )
    cost: str = field(
        default="parameters",
        metadata={
            "help": "Whether the budget counts parameters alone, or the measured time of a training step as well.",
            "choices": list(COSTS),
        },
    )
    max_step_time: float = field(
        default=0.7,
        metadata={
            "help": "With `cost='time'`: the longest that a step may take after the cut, as a part of its time with "
            "equally many modules spread over all layers."
        },
    )
    arch_closing: float = field(
        default=0.05,
        metadata={
            "help": "For how long the gates of the modules that go are closed before the cut: a number of steps, or a "
            "fraction in [0, 1)."
        },
    )
    method: str = field(
        default="diffora",
        metadata={
            "help": "Learn the matrix ('diffora'), or score the modules once at `discretize_at`.",
            "choices": list(METHODS),
        },
    )
    score_batches: int = field(
        default=32, metadata={"help": "Batches that a score is taken on; not read with `method='diffora'`."}
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Divide each score by the module's number of LoRA parameters."}
    )
    reallocate_every: float | None = field(
        default=None,
        metadata={
            "help": "With a method that scores: choose anew every so many steps, or after each such fraction of all "
            "steps, from the end of the warm-up until `discretize_at`."
        },
    )
    shortcuts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Kinds of shortcut to choose among too; an adapter that keeps one is no plain PEFT adapter.",
            "choices": list(SHORTCUTS),
        },
    )
    shortcut_ranking: str = field(
        default="combined",
        metadata={
            "help": "Whether shortcuts and LoRA modules compete for one budget, or are ranked apart.",
            "choices": list(SHORTCUT_RANKINGS),
        },
    )
    log_gates_by_kind: bool = field(
        default=False, metadata={"help": "Log the mean gate (or score) of each kind of module as well."}
    )

    def __post_init__(self) -> None:
        self.arch_seed = _integer("arch_seed", self.arch_seed)
        for name in ("selection_ratio", "max_step_time", "discretize_at", "arch_warmup", "arch_closing", "arch_split"):
            setattr(self, name, _number(name, getattr(self, name)))
        for name in ("arch_every", "arch_order", "score_batches"):
            setattr(self, name, _integer(name, getattr(self, name)))
        for name in ("max_trainable_parameters", "arch_batch_size"):
            if getattr(self, name) is not None:
                setattr(self, name, _integer(name, getattr(self, name)))
        for name, choices in (
            ("selection_scope", SELECTION_SCOPES),
            ("cost", COSTS),
            ("relaxation", tuple(DifferentialAdaptationMatrix.relaxations)),
            ("weight_sharing", WEIGHT_SHARING),
            ("method", METHODS),
            ("shortcut_ranking", SHORTCUT_RANKINGS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"You passed `{name}={value!r}`; it must be one of {list(choices)}.")
        for name in ("fold_gates", "normalize_scores", "log_gates_by_kind"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be a bool, got {getattr(self, name)!r}.")
        if self.base_model_id is not None and not isinstance(self.base_model_id, str):
            raise TypeError(f"`base_model_id` must be a string such as 'org/name', got {self.base_model_id!r}.")
        if self.base_model_id is not None:
            try:
                validate_repo_id(self.base_model_id)
            except HFValidationError as error:
                raise ValueError(
                    f"You passed `base_model_id={self.base_model_id!r}`, which cannot be a model on the Hub. It is "
                    "published with the adapter; please pass a name such as 'org/name', or leave it out."
                ) from error

        if not 0 < self.selection_ratio <= 1:
            raise ValueError(
                f"You passed `selection_ratio={self.selection_ratio}`, but it is the share of modules to keep and "
                "must be in (0, 1]. Use 0.5 to keep half of the modules."
            )
        if self.max_trainable_parameters is not None:
            if self.max_trainable_parameters <= 0:
                raise ValueError(
                    f"You passed `max_trainable_parameters={self.max_trainable_parameters}`; it must be positive."
                )
            if self.weight_sharing != "none":
                raise ValueError(
                    f"You passed `max_trainable_parameters` together with `weight_sharing={self.weight_sharing!r}`. "
                    "The shared pairs are trainable too, so the cap would not hold. Please use `selection_ratio`, or "
                    "set `weight_sharing='none'`."
                )
        if not 0 < self.max_step_time <= 1:
            raise ValueError(
                f"You passed `max_step_time={self.max_step_time}`, but it is a part of the time of a step and must be "
                "in (0, 1]."
            )
        if self.cost == "time" and self.selection_scope == "layer" and self.max_trainable_parameters is None:
            raise ValueError(
                "You passed `cost='time'` with `selection_scope='layer'`. A choice that keeps modules in every layer "
                "cannot save the backward pass of any. Please set `selection_scope='model'`."
            )
        if self.arch_learning_rate is not None:
            self.arch_learning_rate = _number("arch_learning_rate", self.arch_learning_rate)
            if self.arch_learning_rate <= 0:
                raise ValueError(
                    f"You passed `arch_learning_rate={self.arch_learning_rate}`; it must be positive, or None for the "
                    "default of the relaxation."
                )
            if self.arch_learning_rate > 1000:
                raise ValueError(
                    f"You passed `arch_learning_rate={self.arch_learning_rate}`, after one step of which every gate "
                    "would stand at 0 or 1 for good. Use a value such as 0.05, or None for the relaxation's default."
                )
            if self.relaxation == "budget" and self.arch_learning_rate > 1:
                raise ValueError(
                    f"You passed `arch_learning_rate={self.arch_learning_rate}` with `relaxation='budget'`. It is the "
                    "length of a Frank-Wolfe step, and a step longer than 1 leaves the budget. Use a value in (0, 1]."
                )
        if not 0 < self.arch_split < 1:
            raise ValueError(
                f"You passed `arch_split={self.arch_split}`, but it is a part of the training set and must be in "
                "(0, 1). To use a data set of your own, pass `arch_dataset=` to the trainer."
            )
        if self.arch_order not in (1, 2):
            raise ValueError(f"You passed `arch_order={self.arch_order}`; it must be 1 (first order) or 2 (unrolled).")
        if self.arch_every < 1:
            raise ValueError(f"You passed `arch_every={self.arch_every}`; it must be 1 or more.")
        if self.arch_batch_size is not None and self.arch_batch_size < 1:
            raise ValueError(f"You passed `arch_batch_size={self.arch_batch_size}`; it must be 1 or more.")
        if not 0 <= self.arch_seed < 2**32:
            raise ValueError(f"You passed `arch_seed={self.arch_seed}`; it must be 0 or more, and below 2**32.")
        if self.score_batches < 1:
            raise ValueError(f"You passed `score_batches={self.score_batches}`; it must be 1 or more.")
        if self.normalize_scores and self.method in ("diffora", "constant"):
            raise ValueError(
                f"You passed `normalize_scores=True` with `method={self.method!r}`, which has no score that grows "
                "with the size of a module. Please leave it out, or use another method."
            )
        if self.reallocate_every is not None:
            self._check_reallocation()
        if self.shortcuts is not None:
            self._check_shortcuts()
        _check_moment("discretize_at", self.discretize_at, minimum_open=self._chooses_before_cut)
        _check_moment("arch_warmup", self.arch_warmup, minimum_open=False)
        _check_moment("arch_closing", self.arch_closing, minimum_open=False)
        same_unit = (self.arch_warmup < 1) == (self.discretize_at < 1)
        if self._chooses_before_cut and same_unit and self.discretize_at <= self.arch_warmup:
            raise ValueError(
                f"You passed `discretize_at={self.discretize_at}` and `arch_warmup={self.arch_warmup}`, so the matrix "
                "would be cut before the search starts. Please make `discretize_at` larger than `arch_warmup`."
            )

    @property
    def _chooses_before_cut(self) -> bool:
        """Whether something is chosen between the end of the warm-up and the cut."""
        return self.method == "diffora" or self.reallocate_every is not None

    def _check_shortcuts(self) -> None:
        if not isinstance(self.shortcuts, (list, tuple)):
            raise TypeError(f"`shortcuts` must be a list of kinds of shortcut, got {self.shortcuts!r}.")
        self.shortcuts = list(self.shortcuts)
        known = all(isinstance(kind, str) and kind in SHORTCUTS for kind in self.shortcuts)
        if not known or not self.shortcuts or len(set(self.shortcuts)) != len(self.shortcuts):
            raise ValueError(
                f"You passed `shortcuts={self.shortcuts!r}`; it must name one or more of {list(SHORTCUTS)}, each "
                "once. Please leave it out to have none."
            )
        if self.weight_sharing != "none":
            raise ValueError(
                f"You passed `shortcuts` together with `weight_sharing={self.weight_sharing!r}`. What is saved beside "
                "shortcuts shares no matrices. Please set `weight_sharing='none'`."
            )

    def _check_reallocation(self) -> None:
        self.reallocate_every = every = _number("reallocate_every", self.reallocate_every)
        if every <= 0 or (every >= 1 and not every.is_integer()):
            raise ValueError(
                f"You passed `reallocate_every={every}`. A whole number of 1 or more is a number of optimizer steps "
                "and a number in (0, 1) a fraction of all steps; this is neither."
            )
        if self.method == "diffora":
            raise ValueError(
                f"You passed `reallocate_every={every}` with `method='diffora'`, which learns one choice and scores "
                "nothing anew. Please leave it out, or use a method that scores, such as 'snip'."
            )
        if self.weight_sharing != "none":
            raise ValueError(
                f"You passed `reallocate_every={every}` with `weight_sharing={self.weight_sharing!r}`, which would "
                "switch the modules that are off on again at the cut. Please set `weight_sharing='none'`."
            )
        units = {value < 1 for value in (every, self.discretize_at, self.arch_warmup or every)}
        warmup = max(self.arch_warmup, 1.0) if every >= 1 else self.arch_warmup
        if len(units) == 1 and warmup + every >= self.discretize_at:
            raise ValueError(
                f"You passed `reallocate_every={every}` with `arch_warmup={self.arch_warmup}` and "
                f"`discretize_at={self.discretize_at}`, so the modules would be chosen once and never anew. Please "
                "make `discretize_at` larger (0.999 is the end of the run) or `reallocate_every` smaller."
            )

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """
        Resolve the two moments of the run.

        Args:
            total_steps (`int`): optimizer steps of the whole run.

        Returns:
            `tuple[int, int]`: the last step of the warm-up and the step after which the matrix is cut; the search is
            made in between, so `1 <= warmup < cut <= total_steps`. With another `method` than `"diffora"` and no
            `reallocate_every` nothing is chosen in between, and the warm-up lasts until the cut, which may be at 0.

        Raises:
            ValueError: if the run is too short, the cut comes after its last step or not after the warm-up.
        """
        total_steps = _integer("total_steps", total_steps)
        if total_steps > sys.maxsize:
            raise ValueError(f"You passed `total_steps={total_steps}`; no run is as long. Please set `max_steps`.")
        if total_steps < 2:
            raise ValueError(
                f"The run has {total_steps} optimizer step(s), but a search needs at least 2: one of warm-up and one "
                "of search. Please raise `max_steps` or `num_train_epochs`."
            )
        # Fractions bend to a short run (people try their script with 3 steps first); steps that were named do not.
        if self.discretize_at == 0:
            cut = 0
        elif self.discretize_at < 1:
            cut = min(
                max(2 if self._chooses_before_cut else 1, _round_half_up(self.discretize_at * total_steps)),
                total_steps,
            )
        else:
            cut = int(self.discretize_at)
        if not self._chooses_before_cut:
            warmup = cut
        elif self.arch_warmup < 1:
            warmup = max(1, _round_half_up(self.arch_warmup * total_steps))
            if self.discretize_at < 1:
                warmup = min(warmup, cut - 1)
        else:
            warmup = int(self.arch_warmup)
        if cut > total_steps:
            raise ValueError(
                f"You passed `discretize_at={cut}`, but the run has only {total_steps} optimizer steps, so no module "
                "would ever be chosen. Use a smaller step, or a fraction such as 0.25."
            )
        if cut <= warmup and self._chooses_before_cut:
            raise ValueError(
                f"The matrix would be cut at step {cut} (`discretize_at={self.discretize_at}`), but the warm-up lasts "
                f"until step {warmup} (`arch_warmup={self.arch_warmup}`), so there is nothing to decide by. Please "
                "make `discretize_at` larger or `arch_warmup` smaller."
            )
        return warmup, cut

    def decision(self, total_steps: int) -> int:
        """
        The step after which the choice is made: that of the cut, or `arch_closing` before it, but not before one step
        of the search.

        Args:
            total_steps (`int`): optimizer steps of the whole run.
        """
        warmup, cut = self.schedule(total_steps)
        trains_open = DifferentialAdaptationMatrix.relaxations[self.relaxation].trains_open
        if self.method != "diffora" or not trains_open or self.weight_sharing != "none":
            return cut
        closing = _round_half_up(self.arch_closing * total_steps) if self.arch_closing < 1 else int(self.arch_closing)
        return max(warmup + 1, cut - closing)

    def reallocations(self, total_steps: int) -> range:
        """
        The steps after which the modules are chosen anew, the end of the warm-up first; none without
        `reallocate_every`.

        Args:
            total_steps (`int`): optimizer steps of the whole run.
        """
        if self.reallocate_every is None:
            return range(0)
        every = self.reallocate_every
        steps = max(1, _round_half_up(every * total_steps)) if every < 1 else int(every)
        warmup, cut = self.schedule(total_steps)
        return range(warmup, cut, steps)

    def to_dict(self) -> dict[str, Any]:
        """All options as a dictionary of JSON values."""
        return dataclasses.asdict(self)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        quotes = " Please write it without quotes." if isinstance(value, str) else ""
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}.{quotes}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"You passed `{name}={number}`; it must be finite.")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
    return int(value)


def _check_moment(name: str, value: float, *, minimum_open: bool) -> None:
    valid = value > 0 if minimum_open else value >= 0
    if not valid or (value >= 1 and not value.is_integer()):
        raise ValueError(
            f"You passed `{name}={value}`. A whole number of 1 or more is an optimizer step and a number in "
            f"{'(0, 1)' if minimum_open else '[0, 1)'} a fraction of all steps; this is neither."
        )


def _round_half_up(value: float) -> int:
    # Python rounds halves to even, so that 2.5 and 3.5 would behave differently.
    return math.floor(value + 0.5)
