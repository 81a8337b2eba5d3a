"""What `diffora sft` and `diffora dpo` have in common: arguments, model, training, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import DataArguments, load_splits


def make_parser(config: type, prog: str | None = None, data: type = DataArguments) -> Any:
    """
    A parser of data, trainer, model and search, on the command line and in a YAML file (`--config`).

    Args:
        config (`type`): the trainer's arguments, such as [`~trl.SFTConfig`].
        prog (`str`, *optional*): what the command is called.
        data (`type`, *optional*): what says which rows are read.
    """
    from transformers.utils import is_torch_bf16_gpu_available  # type: ignore[attr-defined]
    from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]

    from ..config import DiffoRAConfig

    parser = TrlParser((data, config, ModelConfig, DiffoRAConfig), prog=prog)  # type: ignore[arg-type]
    # TRL's configurations turn bf16 on and then refuse a machine without it: there, full precision is the default.
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    return parser


def prepare_model(training_args: Any, model_args: Any) -> Any:
    """
    How the trainer loads the model, written into its arguments; and the LoRA that it begins with, which is one of all
    linear layers unless told otherwise. Both are objects that a parser has just made.

    Args:
        training_args ([`~trl.SFTConfig`] or alike): gets `model_init_kwargs`.
        model_args ([`~trl.ModelConfig`]): what was asked for.

    Returns:
        `LoraConfig`: the LoRA.

    Raises:
        ValueError: if no model is named.
    """
    from trl import get_peft_config, get_quantization_config  # type: ignore[attr-defined]

    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: a Hub id or a local folder.")
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if (quantization := get_quantization_config(model_args)) is not None:
        options["quantization_config"] = quantization
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    model_args.use_peft = True
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    return get_peft_config(model_args)


def run(trainer_class: type, parser: Any, words: Sequence[str]) -> dict[str, float]:
    """
    Train as the words say, evaluate, save, and print what was chosen.

    Args:
        trainer_class (`type`): a trainer that searches.
        parser ([`~trl.TrlParser`]): of [`make_parser`].
        words (`Sequence[str]`): of the command line.

    Returns:
        `dict[str, float]`: the metrics of the evaluation.
    """
    data_args, training_args, model_args, config = parser.parse_args_and_config(list(words))
    train, test = load_splits(data_args, seed=training_args.seed)
    peft_config = prepare_model(training_args, model_args)
    trainer: Any = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=peft_config,
        diffora_config=config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics: dict[str, float] = trainer.evaluate()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        local = Path(data_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=None if local else data_args.dataset_name)
    lines = ["", trainer.selection.table(), "", f"DiffoRA {trainer.selection.summary()}."]
    lines += [f"Held-out loss: {metrics['eval_loss']:.4f}", f"Adapter: {training_args.output_dir}"]
    trainer.accelerator.print("\n".join(lines))
    if hasattr(trainer, "end"):  # finishes the trackers and the process group; newer transformers only
        trainer.end()
    return metrics
