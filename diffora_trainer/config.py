"""The configuration of a run: every option of the user, explained once, and the rules between them."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

from .config_checks import (
    PREFIX_CACHES,
    SELECTION_GRANULARITIES,
    SELECTION_SCOPES,
    SELECTION_UNITS,
    UNSELECTED,
    WEIGHT_SHARING,
    Derived,
    check_config,
)
from .core.values import parse_mapping
from .renamed import OLD_NAMES, REMEDIES, OldMoments, Renamed, take_over_old_names


def _old(name: str) -> Any:
    return field(default=Renamed(name), repr=False, compare=False, metadata={"help": f"Deprecated: {REMEDIES[name]}."})


@dataclass
class DiffoRAConfig(Derived, OldMoments):
    r"""
    Configuration of a run that chooses the modules that deserve a LoRA.

    By default it follows DiffoRA (https://huggingface.co/papers/2502.08905): a Differential Adaptation Matrix (DAM)
    with a row for each transformer layer and a column for each kind of module is learned on held-out data while the
    LoRA weights are learned on training data, and is then discretized. The paper's code is not public, so every
    default here is a choice of this package; `docs/defaults.md` says what each rests on. Parse it from the command
    line or YAML with [`~transformers.HfArgumentParser`] or [`~trl.TrlParser`].

    > Parameters that control how much is kept

    Limits hold together: what is kept is within all that are set. Time and memory limits apply to the predicted step.

    selection_ratio (`float`, *optional*):
        Share of the LoRA modules to keep, in (0, 1]. Defaults to 0.5 if nothing else limits what is kept.
    selection_scope (`str`, *optional*, defaults to `"layer"`):
        `"layer"` keeps the best `selection_ratio * n` (halves rounded up) of the `n` modules of each layer, at least
        one: 4 of the 7 of a Llama layer at 0.5. `"model"` rounds once for the whole model, as do all limits of it
        (`max_trainable_parameters`, `max_step_time`, `max_step_memory`, `selection_unit="layer"`).
    max_trainable_parameters (`int`, *optional*):
        Exact cap on the number of trainable LoRA parameters: the best modules of the whole model are kept as long as
        they fit, or the ranks of all (see `selection_granularity`). Parameters that are not LoRA (a new classification
        head, say) do not count.
    selection_granularity (`str`, *optional*, defaults to `"auto"`):
        Unit in which the budget is spent. `"module"` keeps or prunes whole modules. With `"rank"` a run begins as
        one of LoRA on all modules at the rank that fits, and at the choice half of the modules, those that the matrix
        favours, get up to half of the ranks of the others (the `rank_pattern` of the saved adapter says who has how
        much). Where nothing was learned yet, or two halves of the search do not agree, none is favoured. `"component"`
        has a gate for each component of each module (a row of `lora_A` with its column of `lora_B`): the best stay,
        and a quarter of the budget goes to new ones where they are worth most (`rank_growth` and `rank_margin` in
        `method_options`), so that a module may end with any rank, or none. `"auto"` spends a cap
        (`max_trainable_parameters`) in ranks, and `selection_ratio` in modules. Ranks need a new LoRA of linear
        layers, room for rank 1 in every module (but `"component"`), a method that can tell where they are worth most
        (`"diffora"`), and none of `max_step_time`, `max_step_memory`, `selection_unit`, `unselected`,
        `weight_sharing`, `extra_sites` and FSDP; elsewhere `"auto"` takes modules. Methods that give ranks themselves,
        such as `"adalora"`, spend a ratio in ranks too: the LoRA need not be new then, and a module may end with none.
    max_step_time (`float`, *optional*):
        Cap on the time of a training step after the pruning, in (0, 1], as a part of that of a step with all modules.
        The backward pass ends at the lowest layer that has a LoRA, and each LoRA adds matrices of its own, so a limit
        has room for many modules in the later layers or for fewer that go deeper. At the end of the warm-up steps of
        different depths are timed, and the choice is then made over depth and modules at once: of the best sets within
        the limits, one for each lowest layer, the one with the largest gain. Without another limit as many modules are
        kept as this one has room for. If not even one is fast enough, the run ends there with an error.
    max_step_memory (`float`, *optional*):
        The same for the memory of a training step: what it holds on top of the model (activations, gradients, and LoRA
        weights with two moments each), counted at the end of the warm-up. A warning is logged if the step exceeds the
        limit by more than 2 %.
    selection_unit (`str`, *optional*, defaults to `"module"`):
        What is kept or pruned together: a `"module"`, a `"group"` that fused kernels and servers compute as one
        (query, key and value; gate and up), or a whole `"layer"` (of the whole model then), by the mean of its parts.
    selection_groups (`dict`, *optional*):
        For `selection_unit="group"`: groups of your own, by any name, as a dictionary or as JSON, such as
        `{"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}`. A module in none of them is a unit of its own.

    > Parameters that control how the modules are chosen

    method (`str`, *optional*, defaults to `"diffora"`):
        `"diffora"` learns the matrix by Frank-Wolfe steps in the budget; `"sampled"`, `"sigmoid"` and `"softmax"` are
        other relaxations. Others score all modules once, after HeteroLoRA (https://huggingface.co/papers/2406.14956):
        `"grad_norm"`, `"snip"`, `"synflow"`, `"alpha_test"`, `"random"` (the control) and `"custom"` (the function
        passed as `score_function`). `"adalora"`, `"alora"`, `"sora"`, `"beamlora"`, `"prilora"`, `"gelora"` and
        `"eva"` give ranks, `"cka"` and `"aletheia"` keep layers. Each is explained in its file in
        [`~diffora_trainer.methods`]; add your own with [`~diffora_trainer.register_method`].
    method_options (`dict`, *optional*):
        Options of the method alone, as a dictionary or as JSON, such as `{"arch_every": 2}`: see
        [`~diffora_trainer.methods.options.GradientOptions`] for methods that search and
        [`~diffora_trainer.methods.options.ScoreOptions`] for those that score.

    > Parameters that control when things happen

    discretize_at (`float`, *optional*, defaults to `0.25`):
        When the matrix is discretized and the unselected modules leave the model: a whole number of 1 or more is an
        optimizer step, a number in (0, 1) a fraction of all steps. A method that scores can do so at `1`, or at `0`,
        before the first step, where `lora_B`, which is 0 in a new adapter, leaves it something to score.
    decide_early (`bool`, *optional*, defaults to `False`):
        Choose as soon as there is evidence: two halves of the search agree, and the LoRA has lowered the held-out loss
        significantly, and by at least 1 %. `discretize_at` is then the latest moment. Scoring methods ignore it.
    arch_warmup (`float`, *optional*, defaults to `0.05`):
        Length of the warm-up, in which only the LoRA weights train, in the same two forms; `0` is allowed. With
        `lora_B = 0` every gate has a gradient of 0, so it has one step or more. Not read by a method that scores once.
        Example: of 300 steps with the defaults, 1 to 15 are the warm-up and 16 to 60 the search, which decides; from
        61 on the gates of the pruned modules fade out, and 76 to 300 train the selected modules alone.
    fade_out (`float`, *optional*, defaults to `0.05`):
        How long, in the same two forms, the gates of the pruned modules fade out before they leave the model: they
        fall linearly to 0 while all weights train on, so that the selected modules take over and nothing is lost at
        the pruning. The choice is made that much earlier. `0` searches until the pruning, as does a run whose weights
        train under gates, whose shared pairs come back (`weight_sharing`) or whose modules stay (`unselected`).
    search_only (`bool`, *optional*, defaults to `False`):
        End the run once the modules are chosen and the others pruned. A second run, of any trainer, launcher or tool,
        then begins anew with the `LoraConfig` of [`~diffora_trainer.selected_lora_config`]. The moments above are
        those of the whole run, of which the first part is made: of 300 steps, 75 with the defaults.

    > Parameters that control what the choice is learned from

    arch_split (`float`, *optional*, defaults to `0.1`):
        Part of the training set that is held out for the matrix, in (0, 1), and given back to training after the
        pruning. The evaluation set is never used. For a stream, the first rows are held out: no more than the search
        reads (up to 64 batches), and at most this part of the stream and of what the run reads of it. Ignored with an
        `arch_dataset`, and by trainers that make their own completions (GRPO, RLOO).
    arch_batch_size (`int`, *optional*):
        Held-out rows per device in an architecture step. Defaults to the training batch size per device.
    arch_seed (`int`, *optional*, defaults to `0`):
        Seed of the split, of the order of the held-out batches and of what a method draws. The search has random
        streams of its own and does not touch those of training.

    > Parameters that control what the search costs

    search_micro_batches (`int`, *optional*):
        Micro-batches into which each training batch and each held-out batch of an architecture step is split until the
        pruning, so that no step needs the memory of one with all modules. The update is identical up to rounding,
        except with dropout. Defaults to 1, or with `max_step_memory` to as many as keep these steps within that limit.
        Whether the loss of a batch is that of its parts (in `Trainer` and `SFTTrainer` it is, except for an auxiliary
        loss of routers) is tested on the first one; your own loop splits held-out batches alone.

    > Parameters that control what the steps after the pruning cost

    prefix_cache (`str`, *optional*, defaults to `"none"`):
        Keep what the layers below the lowest trained LoRA compute for a row, in `"memory"` or on `"disk"` (in
        `output_dir`), so that a row which comes again begins at that layer. The update is identical up to rounding.
        Rows are known by their content. The cache is tested on the first batch after the pruning, and switched off,
        with a warning, where these layers draw random numbers (dropout) or the loss differs. For one process.
    prefix_cache_gib (`float`, *optional*, defaults to `4.0`):
        GiB that the cache may take up; rows beyond that are computed again.

    > Parameters that control the model that is left

    unselected (`str`, *optional*, defaults to `"prune"`):
        What becomes of the unselected modules: `"prune"` removes them; `"freeze"` leaves them as they are and trains
        them no further, as in AutoFreeze (https://huggingface.co/papers/2102.01386). What they have learned is kept,
        and a step still gets cheaper (see `max_step_time`), but the adapter no smaller. For LoRA alone.
    weight_sharing (`str`, *optional*, defaults to `"none"`):
        What becomes of pruned modules: `"none"` removes them; with `"layer"` (or `"model"`) those of a layer (or of
        the model) that have equal shapes share one trainable pair of LoRA matrices. A module with nobody to share with
        is removed. Shared pairs are saved as ordinary LoRA weights.
    extra_sites (`dict`, *optional*):
        Experimental: other kinds of adapter to choose among beside the LoRA modules, by the name of the kind, with its
        options, as a dictionary or as JSON. They count in the budget as modules do, and an adapter that keeps one is
        not a plain PEFT adapter. Available: `"shortcuts"`; see [`~diffora_trainer.experimental`].

    > Parameters that control what is reported

    base_model_id (`str`, *optional*):
        Hub id of the base model, for the adapter's configuration and card when it was loaded from a local folder.
    log_gates_by_kind (`bool`, *optional*, defaults to `False`):
        Also log the mean gate (or score) of each kind of module, as `diffora/gate/q_proj`, for at most 16 kinds.

    > Deprecated parameters

    `relaxation` (use `method`), `arch_closing` (`fade_out`), `cost="time"` (`max_step_time`), `shortcuts` and
    `shortcut_ranking` (`extra_sites`), and the options of a method by their own names (`method_options`) are still
    read, with a `FutureWarning`, until version 0.3.

    Raises:
        ValueError: if a value is out of its range, or two of them contradict each other. What depends on the method is
            checked when a run is built.
        TypeError: if a value is of the wrong type.
    """

    selection_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the LoRA modules to keep, in (0, 1]. Defaults to 0.5 if nothing else is limited."},
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
        metadata={"help": "Exact cap on the number of trainable LoRA parameters."},
    )
    selection_granularity: str = field(
        default="auto",
        metadata={
            "help": "Keep whole modules ('module') or single components of them ('component'), or give more rank "
            "where it is worth most ('rank'). 'auto': ranks under a cap on the parameters, otherwise modules.",
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
        metadata={"help": "Warm-up, in which only the LoRA weights train: steps, or a fraction of all in [0, 1)."},
    )
    decide_early: bool = field(
        default=False,
        metadata={"help": "Make the choice as soon as there is evidence; `discretize_at` is then the latest moment."},
    )
    fade_out: float = field(
        default=0.05,
        metadata={
            "help": "How long the gates of the pruned modules fade out before they leave the model: a number of "
            "steps, or a fraction in [0, 1)."
        },
    )
    search_only: bool = field(
        default=False,
        metadata={"help": "End the run once the modules are chosen: a second run begins with their `LoraConfig`."},
    )
    method: str = field(
        default="diffora",
        metadata={"help": "Name of the selection method (a search or a scoring method)."},
    )
    method_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the method alone, as JSON, such as '{\"arch_every\": 2}'."}
    )
    max_step_time: float | None = field(
        default=None,
        metadata={
            "help": "Cap on the time of a step after the pruning, as a part of that of a step with all modules."
        },
    )
    max_step_memory: float | None = field(
        default=None,
        metadata={
            "help": "Cap on the memory of a step after the pruning, as a part of that of a step with all modules, "
            "beside the model."
        },
    )
    selection_unit: str = field(
        default="module",
        metadata={
            "help": "Unit of selection: single modules ('module'), modules that are computed together ('group'), "
            "or whole layers ('layer').",
            "choices": list(SELECTION_UNITS),
        },
    )
    selection_groups: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For `selection_unit='group'`: names of the modules of each group, as JSON."},
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
    search_micro_batches: int | None = field(
        default=None,
        metadata={"help": "Number of micro-batches that each batch is split into until the pruning, to save memory."},
    )
    prefix_cache: str = field(
        default="none",
        metadata={
            "help": "Keep what the layers below the lowest trained LoRA compute for a row, in 'memory' or on 'disk'.",
            "choices": list(PREFIX_CACHES),
        },
    )
    prefix_cache_gib: float = field(default=4.0, metadata={"help": "GiB that the prefix cache may take up."})
    unselected: str = field(
        default="prune",
        metadata={
            "help": "Remove unselected modules ('prune'), or keep them untrained ('freeze').",
            "choices": list(UNSELECTED),
        },
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
        self.selection_groups = parse_mapping("selection_groups", self.selection_groups)
        if remedies := take_over_old_names(self):
            warnings.warn(
                f"Some options of `DiffoRAConfig` are deprecated and will be removed in version 0.3: "
                f"{'; '.join(remedies)}. The equivalent without them is {self!r}.",
                FutureWarning,
                stacklevel=3,
            )
        check_config(self)

    def to_dict(self) -> dict[str, Any]:
        """All options as a dictionary of JSON values, without the deprecated names."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OLD_NAMES}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> DiffoRAConfig:
        """
        A configuration from what [`to_dict`] gave, now or before options were renamed, without a deprecation warning.

        Args:
            options (`dict`): the options by their names.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return cls(**options)
