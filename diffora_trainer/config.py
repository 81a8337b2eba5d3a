"""The configuration of a run: every option of the user, explained once, and the rules between them."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .core.schedule import check_moment
from .core.values import check_integer, check_number, parse_mapping
from .renamed import OLD_NAMES, REMEDIES, Renamed, old_schedule, take_over_old_names


SELECTION_SCOPES = ("layer", "model")
SELECTION_GRANULARITIES = ("auto", "rank", "module")
WEIGHT_SHARING = ("none", "layer", "model")


def _old(name: str) -> Any:
    return field(default=Renamed(name), repr=False, compare=False, metadata={"help": f"Deprecated: {REMEDIES[name]}."})


@dataclass
class DiffoRAConfig:
    r"""
    Configuration of a run that chooses the modules that deserve a LoRA.

    By default it follows DiffoRA (https://huggingface.co/papers/2502.08905): a Differential Adaptation Matrix (DAM)
    with a row for each transformer layer and a column for each kind of module is learned on held-out data while the
    LoRA weights are learned on training data, and is then discretized. The paper's code is not public, so every
    default here is a choice of this package; `docs/defaults.md` says what each rests on. Parse it from the command
    line or YAML with [`~transformers.HfArgumentParser`] or [`~trl.TrlParser`].

    > Parameters that control how much is kept

    selection_ratio (`float`, *optional*, defaults to `0.5`):
        Share of the LoRA modules to keep, in (0, 1].
    selection_scope (`str`, *optional*, defaults to `"layer"`):
        `"layer"` keeps the best `round(selection_ratio * n)` of the `n` modules of each layer, and at least one;
        `"model"` keeps the best `round(selection_ratio * n)` of the `n` modules of the whole model.
    max_trainable_parameters (`int`, *optional*):
        Exact cap on the number of trainable LoRA parameters, used instead of `selection_ratio`: the best modules of
        the whole model are kept as long as they fit, or the ranks of all (see `selection_granularity`). Parameters
        that are not LoRA (a new classification head, say) do not count. It requires `selection_scope="model"` or the
        default scope, which it overrides.
    selection_granularity (`str`, *optional*, defaults to `"auto"`):
        In what the budget is spent. With `"module"` whole modules are kept or pruned. With `"rank"` a run begins as
        one of LoRA on all modules at the rank that the budget has room for, and at the choice half of the modules,
        those that the matrix favours, get up to half of the ranks of the others (a `rank_pattern` of the saved adapter
        says which has how much). Where nothing was learned yet, or two halves of the search do not agree, none is
        favoured, and the run stays one of LoRA on all modules at the rank that fits. `"auto"` spends a cap
        (`max_trainable_parameters`) in ranks, and `selection_ratio`, a share of the modules, in modules. Ranks need a
        new LoRA of linear layers, room for rank 1 in every module, a method that can tell where they are worth most
        (`"diffora"`), and no `max_step_time`, `weight_sharing`, `extra_sites` or FSDP; elsewhere `"auto"` takes
        modules.
    max_step_time (`float`, *optional*):
        Cap on the time of a training step after the pruning, in (0, 1], as a part of what it would take with equally
        many modules spread over all layers; needs `selection_scope="model"` or `max_trainable_parameters`. The
        backward pass ends at the lowest layer that has a LoRA, so of two sets of equally many modules the one in the
        later layers is faster. At the end of the warm-up steps of different depths are timed, and the search then only
        considers modules with which a step is fast enough. If no set of the full size is, the fastest depth that has
        room for it is taken. By default the time is not limited.

    > Parameters that control by what the modules are chosen

    method (`str`, *optional*, defaults to `"diffora"`):
        `"diffora"` learns the matrix by Frank-Wolfe steps inside of the budget; `"sampled"`, `"sigmoid"` and
        `"softmax"` are other relaxations of it with their own architecture optimizers. The others score all modules
        once, right before the pruning, after HeteroLoRA (https://huggingface.co/papers/2406.14956): `"grad_norm"`,
        `"snip"`, `"synflow"`, `"alpha_test"`, `"random"` (the control) and `"custom"` (the function passed as
        `score_function`). Each is explained in its file in [`~diffora_trainer.methods`]; one of your own is registered
        with [`~diffora_trainer.register_method`].
    method_options (`dict`, *optional*):
        Options of the method alone, as a dictionary or as JSON, such as `{"arch_every": 2}`: see
        [`~diffora_trainer.methods.options.GradientOptions`] for methods that search and
        [`~diffora_trainer.methods.options.ScoreOptions`] for those that score.

    > Parameters that control when things happen

    discretize_at (`float`, *optional*, defaults to `0.25`):
        When the matrix is discretized and the unselected modules leave the model: a whole number of 1 or more is an
        optimizer step, a number in (0, 1) a fraction of all steps. A method that scores can do so at `1`, as near to
        the start as there is something to score in a new adapter, whose `lora_B` is 0 before; and at `0`, before the
        first step: for an adapter that was trained before, or for `"grad_norm"`, which sees the gradient of `lora_B`.
    arch_warmup (`float`, *optional*, defaults to `0.05`):
        For how long only the LoRA weights learn at the start, in the same two forms; `0` is allowed. With `lora_B = 0`
        at the start every gate has a gradient of exactly zero, so at least one step of warm-up is always made. Not
        read by a method that scores once.
        Example: in a run of 300 steps with the defaults, steps 1 to 15 are the warm-up and steps 16 to 60 the search,
        which decides; from step 61 on the gates of the modules that go fade out, they are pruned at the end of step
        75, and steps 76 to 300 train the selected modules alone.
    fade_out (`float`, *optional*, defaults to `0.05`):
        For how long, in the same two forms, the gates of the modules that go fade out before they are pruned. The
        choice is made so much earlier, and then these gates fall linearly to 0 while all weights train on, so that the
        selected modules take over and nothing is lost at the pruning itself. `0` searches until then and drops the
        others at once. It applies where the weights train with open gates (of the methods here, `"diffora"` and
        `"softmax"`) and the modules that go do not come back as shared pairs.

    > Parameters that control what the choice is learned from

    arch_split (`float`, *optional*, defaults to `0.1`):
        Part of the training set that is held out for the matrix, in (0, 1), and given back to training after the
        pruning. The evaluation set is never used. Of a stream its first rows are held out, no more of them than the
        search reads (up to 64 batches), and at most this part of the stream and of what the run reads of it. Ignored
        when the trainer is given an `arch_dataset`, and by trainers that make their own completions (GRPO, RLOO),
        which hold nothing out.
    arch_batch_size (`int`, *optional*):
        Held-out rows per device in an architecture step. Defaults to the training batch size per device.
    arch_seed (`int`, *optional*, defaults to `0`):
        Seed of the split, of the order of the held-out batches and of what a method draws. The search has random
        streams of its own and does not touch those of training.

    > Parameters that control the model that is left

    weight_sharing (`str`, *optional*, defaults to `"none"`):
        What becomes of the unselected modules: `"none"` removes them; with `"layer"` (or `"model"`) those of a layer
        (or of the model) that have equal shapes share one trainable pair of LoRA matrices. A module with nobody to
        share with is removed. Shared pairs are saved as ordinary LoRA weights.
    extra_sites (`dict`, *optional*):
        Experimental: other kinds of adapter to choose among beside the LoRA modules, by the name of the kind, with its
        options, as a dictionary or as JSON. They count in the budget as modules do, and an adapter that keeps one is
        no plain PEFT adapter. There is `"shortcuts"`; see [`~diffora_trainer.experimental`].

    > Parameters that control what is said

    base_model_id (`str`, *optional*):
        Hub id of the base model, for the adapter's configuration and model card when the base model was loaded from a
        local folder.
    log_gates_by_kind (`bool`, *optional*, defaults to `False`):
        Log the mean gate (or score) of each kind of module as well, as `diffora/gate/q_proj` and so on: one more
        number a kind in each log, if there are at most 16 kinds.

    > Deprecated parameters

    `relaxation` (use `method`), `arch_closing` (`fade_out`), `cost="time"` (`max_step_time`), `shortcuts` and
    `shortcut_ranking` (`extra_sites`), and the options of a method by their own names (`method_options`) are still
    read, with a `FutureWarning`, until version 0.3.

    Raises:
        ValueError: if a value is out of its range, or two of them contradict each other. What depends on the method is
            checked when a run is built.
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
    selection_granularity: str = field(
        default="auto",
        metadata={
            "help": "Keep whole modules ('module'), or give more rank where it is worth most ('rank'). 'auto': ranks "
            "under a cap on the parameters, otherwise modules.",
            "choices": list(SELECTION_GRANULARITIES),
        },
    )
    discretize_at: float = field(
        default=0.25,
        metadata={
            "help": "When the others are pruned: a whole number is an optimizer step, a number in (0, 1) a fraction "
            "of all steps."
        },
    )
    arch_warmup: float = field(
        default=0.05,
        metadata={"help": "For how long only the LoRA weights learn at the start: a step, or a fraction in [0, 1)."},
    )
    fade_out: float = field(
        default=0.05,
        metadata={
            "help": "For how long the gates of the modules that go fade out before they are pruned: a number of "
            "steps, or a fraction in [0, 1)."
        },
    )
    method: str = field(
        default="diffora",
        metadata={"help": "By what the modules are chosen: a method that searches or scores, by its name."},
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the method alone, as JSON, such as '{\"arch_every\": 2}'."}
    )
    max_step_time: float | None = field(
        default=None,
        metadata={
            "help": "Cap on the time of a step after the pruning, as a part of its time with equally many modules "
            "spread over all layers."
        },
    )
    arch_split: float = field(
        default=0.1,
        metadata={"help": "Part of the training set held out for the matrix until the pruning, in (0, 1)."},
    )
    arch_batch_size: int | None = field(
        default=None,
        metadata={"help": "Held-out rows per device in an architecture step. Defaults to the training batch size."},
    )
    arch_seed: int = field(
        default=0, metadata={"help": "Seed of the split, of the held-out batches and of what a method draws."}
    )
    weight_sharing: str = field(
        default="none",
        metadata={
            "help": "Unselected modules of equal shape in a layer (or the model) share one LoRA pair, or are removed.",
            "choices": list(WEIGHT_SHARING),
        },
    )
    extra_sites: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Experimental: other kinds of adapter to choose among: names and their options, as JSON."},
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, for the adapter's configuration and model card."}
    )
    log_gates_by_kind: bool = field(
        default=False, metadata={"help": "Log the mean gate (or score) of each kind of module as well."}
    )

    # Names of before, read until version 0.3
    relaxation: str | None = _old("relaxation")
    cost: str | None = _old("cost")
    arch_closing: float | None = _old("arch_closing")
    arch_every: int | None = _old("arch_every")
    arch_learning_rate: float | None = _old("arch_learning_rate")
    arch_order: int | None = _old("arch_order")
    fold_gates: bool | None = _old("fold_gates")
    score_batches: int | None = _old("score_batches")
    normalize_scores: bool | None = _old("normalize_scores")
    reallocate_every: float | None = _old("reallocate_every")
    shortcuts: list[str] | None = _old("shortcuts")
    shortcut_ranking: str | None = _old("shortcut_ranking")

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise TypeError(f"`method` must be the name of a method, got {self.method!r}.")
        self.method_options = parse_mapping("method_options", self.method_options)
        self.extra_sites = parse_mapping("extra_sites", self.extra_sites)
        if remedies := take_over_old_names(self):
            warnings.warn(
                f"Some options of `DiffoRAConfig` are deprecated and will be removed in version 0.3: "
                f"{'; '.join(remedies)}. The equivalent without them is {self!r}.",
                FutureWarning,
                stacklevel=3,
            )
        self.arch_seed = check_integer("arch_seed", self.arch_seed)
        for name in ("selection_ratio", "discretize_at", "arch_warmup", "fade_out", "arch_split"):
            setattr(self, name, check_number(name, getattr(self, name)))
        for name in ("max_trainable_parameters", "arch_batch_size"):
            if getattr(self, name) is not None:
                setattr(self, name, check_integer(name, getattr(self, name)))
        for name, choices in (
            ("selection_scope", SELECTION_SCOPES),
            ("selection_granularity", SELECTION_GRANULARITIES),
            ("weight_sharing", WEIGHT_SHARING),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"You passed `{name}={value!r}`; it must be one of {list(choices)}.")
        if not isinstance(self.log_gates_by_kind, bool):
            raise TypeError(f"`log_gates_by_kind` must be a bool, got {self.log_gates_by_kind!r}.")
        self._check_budget()
        self._check_base_model_id()
        if not 0 < self.arch_split < 1:
            raise ValueError(
                f"You passed `arch_split={self.arch_split}`, but it is a part of the training set and must be in "
                "(0, 1). To use a data set of your own, pass `arch_dataset=` to the trainer."
            )
        if self.arch_batch_size is not None and self.arch_batch_size < 1:
            raise ValueError(f"You passed `arch_batch_size={self.arch_batch_size}`; it must be 1 or more.")
        if not 0 <= self.arch_seed < 2**32:
            raise ValueError(f"You passed `arch_seed={self.arch_seed}`; it must be 0 or more, and below 2**32.")
        for name in ("discretize_at", "arch_warmup", "fade_out"):
            check_moment(name, getattr(self, name), minimum_open=False)
        if self.extra_sites and self.weight_sharing != "none":
            raise ValueError(
                f"You passed `extra_sites` with {sorted(self.extra_sites)} together with "
                f"`weight_sharing={self.weight_sharing!r}`. What is saved beside them shares no matrices. Please set "
                "`weight_sharing='none'`."
            )

    def _check_budget(self) -> None:
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
        if self.max_step_time is None:
            return
        self.max_step_time = check_number("max_step_time", self.max_step_time)
        if not 0 < self.max_step_time <= 1:
            raise ValueError(
                f"You passed `max_step_time={self.max_step_time}`, but it is a part of the time of a step and must be "
                "in (0, 1]."
            )
        if self.selection_scope == "layer" and self.max_trainable_parameters is None:
            raise ValueError(
                f"You passed `max_step_time={self.max_step_time}` with `selection_scope='layer'`. A choice that keeps "
                "modules in every layer cannot save the backward pass of any. Please set `selection_scope='model'`."
            )

    def _check_base_model_id(self) -> None:
        if self.base_model_id is None:
            return
        if not isinstance(self.base_model_id, str):
            raise TypeError(f"`base_model_id` must be a string such as 'org/name', got {self.base_model_id!r}.")
        try:
            validate_repo_id(self.base_model_id)
        except HFValidationError as error:
            raise ValueError(
                f"You passed `base_model_id={self.base_model_id!r}`, which cannot be a model on the Hub. It is "
                "published with the adapter; please pass a name such as 'org/name', or leave it out."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """All options as a dictionary of JSON values, without the deprecated names."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OLD_NAMES}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> DiffoRAConfig:
        """A configuration from what [`to_dict`] gave, now or before options were renamed; it warns of nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return cls(**options)

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """Deprecated: `warmup` and `prune` of `make_schedule(config, total_steps)`."""
        found = old_schedule(self, total_steps, "schedule")
        return found.warmup, found.prune

    def decision(self, total_steps: int) -> int:
        """Deprecated: `make_schedule(config, total_steps).discretize`."""
        return old_schedule(self, total_steps, "decision").discretize
