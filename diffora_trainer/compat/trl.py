"""Private and version-dependent names of TRL, and what tells its trainers apart."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.isolation import replaced
from .sentence_transformers import is_sentence_transformer


if TYPE_CHECKING:
    from transformers import Trainer


def is_reward_trainer(trainer: Trainer) -> bool:
    """
    Whether a trainer trains a reward model: the name in `_name`, with which all TRL trainers sign their card, in all
    versions. Goes if the class may be imported, which takes all of TRL.
    """
    return getattr(trainer, "_name", "") == "Reward"


def loss_is_of_rows(trainer: Trainer) -> bool:
    """
    Whether nothing is known that would make the loss of a batch more than one of its single rows: a trainer of
    transformers, or TRL's for supervised fine-tuning. Others compare rows, as preference trainers do; their batches
    hold the two answers of a pair as rows, which are far apart.

    Reads the name in `_name` too. It can go when trainers say whether a batch may be split.
    """
    return getattr(trainer, "_name", "SFT") in ("SFT", None) and not is_sentence_transformer(trainer.model)


def preparation(trainer: Trainer) -> Callable[..., Any] | None:
    """
    What a TRL trainer prepares its data sets with, or `None` if it takes them as they are.

    `_prepare_dataset` of the trainers that tokenize, in all versions; its arguments differ. What `SFTTrainer` keeps in
    `_skip_prepare_dataset` since TRL 1.7, its constructor made of these two before. ORPO and CPO (0.28 to 1.16)
    prepare in their constructor and have the last step alone as a method, `tokenize_row(feature)`; KTO and BCO of 0.28
    have none. Goes with a public call for one more data set.
    """
    asked = bool((getattr(trainer.args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))
    skipped = getattr(trainer, "_skip_prepare_dataset", asked or getattr(trainer, "_is_vision_dataset", False))
    prepare = None if skipped else getattr(trainer, "_prepare_dataset", None)
    tokenize = getattr(trainer, "tokenize_row", None)
    if skipped or prepare is not None or tokenize is None:
        return prepare
    # Other trainers have a function of this name, which wants a tokenizer, for each batch of texts.
    needed = [p for p in inspect.signature(tokenize).parameters.values() if p.default is inspect.Parameter.empty]
    return partial(_tokenized_preferences, tokenize) if len(needed) == 1 else None


def _tokenized_preferences(tokenize: Callable[[Any], Any], dataset: Any, processing_class: Any) -> Any:
    """
    Preferences, prepared as the constructors of ORPO and CPO do it (the same in TRL 0.28 and 1.16): the prompt taken
    out of both answers, the chat template, tokens.
    """
    from datasets import Dataset
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

    def prepared(row: Any) -> Any:
        row = maybe_extract_prompt(row)
        row = {**row, **maybe_apply_chat_template(row, processing_class)}
        return {**row, **tokenize(row)}

    if not isinstance(dataset, Dataset):
        return dataset.map(prepared)
    # The name of a file in the cache would be made of the function, and so of the trainer with its model.
    return dataset.map(prepared, new_fingerprint=uuid.uuid4().hex, keep_in_memory=True)


def with_reference_log_probs(trainer: Trainer, dataset: Any) -> Any:
    """
    A data set with the reference's log-probabilities of its rows, where the trainer computes those of its training set
    ahead (`precompute_ref_log_probs=True`, DPO and KTO).

    Calls `_precompute_ref_logps(dataset, name, batch_size)` of these trainers (seen in TRL 1.16). In TRL 0.28 they
    have no such method, and compute what a batch lacks, so nothing is to be done. It can go when TRL prepares any data
    set that it is given in one public method.
    """
    precompute = getattr(trainer, "_precompute_ref_logps", None)
    if precompute is None or not getattr(trainer.args, "precompute_ref_log_probs", False):
        return dataset
    args: Any = trainer.args
    return precompute(dataset, "arch", args.precompute_ref_batch_size or args.per_device_train_batch_size)


# TRL: trainers whose training step is not "prepare the batch, take `compute_loss` of it"


def makes_completions(trainer: Trainer) -> bool:
    """
    Whether a trainer makes the completions that it trains on while it prepares a batch, so that a row of its training
    set is only a prompt.

    Told by its structure, since TRL has no mark for it: a class before [`~transformers.Trainer`] overrides
    `_prepare_inputs`, in which TRL 0.28 to 1.16 generate, and the trainer has `_buffered_inputs`, `num_generations` or
    `reward_funcs`. That holds for GRPO, RLOO and distillation, and in TRL's `experimental` for what is derived from
    them, SDPO, SDFT, A2PO and GOLD. A public hook of TRL that is given each training batch would let it go.
    """
    from transformers import Trainer

    classes = type(trainer).__mro__
    overridden = any("_prepare_inputs" in vars(cls) for cls in classes[: classes.index(Trainer)] if not _is_ours(cls))
    return overridden and any(
        hasattr(trainer, name) for name in ("_buffered_inputs", "num_generations", "reward_funcs")
    )


def noted_preparation(trainer: Trainer, note: Callable[[Any], None]) -> AbstractContextManager[None]:
    """
    For a while, hand what a trainer's `_prepare_inputs` returns to a function as well, with all that subclasses do to
    it. `Trainer.training_step` calls it in transformers 5.2 to 5.23. See [`makes_completions`] for what would let it
    go.
    """
    prepare = trainer._prepare_inputs

    def prepare_and_note(inputs: Any) -> Any:
        prepared = prepare(inputs)
        note(prepared)
        return prepared

    return replaced(trainer, "_prepare_inputs", prepare_and_note)


def repeats_first_order(sampler: Any) -> bool:
    """
    Whether a run that is resumed in a later epoch gets the order of the first one from a sampler: `RepeatSampler` of
    TRL 0.28 to 1.16 shuffles by a generator of its own, whose state no checkpoint has and no epoch sets. Known by its
    name, since the class is private. Goes if TRL gives it a `set_epoch`.
    """
    return type(sampler).__name__ == "RepeatSampler" and sampler.shuffle and not hasattr(sampler, "set_epoch")


def uses_vllm(trainer: Trainer) -> bool:
    """Whether a trainer generates with vLLM (`use_vllm`, in TRL 0.28 to 1.16)."""
    return bool(getattr(trainer.args, "use_vllm", False))


def own_training_step(trainer: Trainer) -> Callable[..., Any] | None:
    """
    The `training_step` of a trainer that takes its loss there and not in `compute_loss`, or `None`.

    Read from the names that the function uses, since nothing else tells: neither `compute_loss` nor the parent's
    `training_step`. In TRL 0.28 to 1.16 that is OnlineDPO, in 0.28 also XPO and NashMD. A method for the loss in these
    trainers would let it go.
    """
    from transformers import Trainer

    for cls in type(trainer).__mro__:
        step = vars(cls).get("training_step")
        if cls is Trainer:
            return None
        if step is None or _is_ours(cls):
            continue
        names = _names(inspect.unwrap(step))
        if "compute_loss" in names:
            return None
        if "training_step" not in names:
            return step
    return None


def generates_in_step(trainer: Trainer) -> bool:
    """
    Whether a trainer whose loss is in `compute_loss` generates completions in its `training_step`, and takes the loss
    of them in the place of those of the batch.

    Read from the names that the function uses, of which one says "generate": in TRL 0.28 to 1.16 that is GKD, in 0.28
    also GOLD. These two do so in a part of their steps (`lmbda`), and GKD in all of them with `seq_kd`, which both may
    be off; of others nothing of the kind is known. A mark for it in TRL would let it go.
    """
    from transformers import Trainer

    classes = type(trainer).__mro__
    steps = [vars(cls).get("training_step") for cls in classes[: classes.index(Trainer)] if not _is_ours(cls)]
    names = {name for step in steps if step is not None for name in _names(inspect.unwrap(step))}
    if own_training_step(trainer) is not None or not any("generate" in name for name in names):
        return False
    switches = [getattr(trainer, name) for name in ("lmbda", "seq_kd") if hasattr(trainer, name)]
    return not switches or any(switches)


def averages_adapter(trainer: Trainer) -> bool:
    """
    Whether a callback of a trainer keeps a mean of the adapter's weights over the steps, each by its name: SDFT and
    SDPO of TRL 1.16 with `teacher_model_kind="ema"`. Known by what it keeps them in, `shadow_weights`. Goes if the
    class, `PEFTAdapterEMACallback`, leaves `trl.experimental`.
    """
    return any(hasattr(callback, "shadow_weights") for callback in trainer.callback_handler.callbacks)


def own_training_loop(trainer: type) -> str | None:
    """
    The method by which a class of trainers trains in a loop of its own and not in that of
    [`~transformers.Trainer`], or `None`. Read from the names that it uses: it does not go back to the parent's.
    In TRL 0.28 that is PPO. A way to ask a trainer for its loop would let it go.
    """
    from transformers import Trainer

    for cls in trainer.__mro__[: trainer.__mro__.index(Trainer)]:
        for name in ("train", "_inner_training_loop"):
            method = vars(cls).get(name)
            if method is not None and not _is_ours(cls) and not {"super", "Trainer"} & _names(inspect.unwrap(method)):
                return f"{cls.__name__}.{name}"
    return None


def calls_backward_itself(step: Callable[..., Any]) -> bool:
    """Whether a `training_step` takes its gradient without [`~accelerate.Accelerator`]'s `backward`."""
    names = _names(inspect.unwrap(step))
    return "backward" in names and "accelerator" not in names


def loss_of_training_step(trainer: Trainer, model: nn.Module, inputs: Any) -> Tensor | None:
    """
    The loss that a trainer's `training_step` hands to `accelerator.backward`, whose place this takes for the call; of
    several the sum, of none `None`. The model stays in the mode that it is in, whatever the step sets.

    All Trainers of transformers 5.2 to 5.23 and TRL 0.28 to 1.16 take their gradient so. See [`own_training_step`] for
    what would let it go.
    """
    losses: list[Tensor] = []
    with (
        replaced(trainer.accelerator, "backward", lambda loss, **kwargs: losses.append(loss)),
        replaced(model, "train", lambda mode=True: model),
    ):
        trainer.training_step(model, inputs, None)
    return None if not losses else sum(losses[1:], losses[0])


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _names(function: Any) -> set[str]:
    """Names of attributes and globals that a function uses, with the functions defined in it."""
    codes: list[Any] = [getattr(function, "__code__", None)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            codes.extend(code.co_consts)
    return names
