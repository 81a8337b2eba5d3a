"""What `diffora sft`, `dpo` and `classify` have in common: arguments, model, training, saving."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..compat.transformers import readable_help
from ..core.files import ADAPTER_CONFIG_NAME
from .data import DataArguments, check_texts, load_splits, looks_local


METRICS = ("accuracy", "pearson", "mse")
"""What is printed of an evaluation beside the loss."""

TEXT_FIELD = "dataset_text_field"
"""The option of TRL's that names the column with the text."""


def make_parser(config: type, prog: str | None = None, data: type = DataArguments) -> Any:
    """
    A parser of data, trainer, model and search, on the command line and in a YAML file (`--config`).

    Args:
        config (`type`): the trainer's arguments, such as [`~trl.SFTConfig`].
        prog (`str`, *optional*): what the command is called.
        data (`type`, *optional*): what says which rows are read.
    """
    from transformers.utils import is_torch_bf16_gpu_available  # type: ignore[attr-defined]

    parser = parser_of(data, config, prog=prog)
    # TRL's configurations turn bf16 on and then refuse a machine without it: there, full precision is the default.
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    readable_help(parser)
    return parser


def parser_of(*kinds: type, prog: str | None = None) -> Any:
    """A [`~diffora_trainer.cli.parser.ConfigParser`] of some dataclasses, then of the model's and the search's."""
    from trl import ModelConfig  # type: ignore[attr-defined]

    from ..config import DiffoRAConfig
    from .parser import ConfigParser

    return ConfigParser((*kinds, ModelConfig, DiffoRAConfig), prog=prog)  # type: ignore[arg-type]


def checked(parse: Callable[[], Any]) -> Any:
    """
    What a parser reads, of which the last is a [`DiffoRAConfig`].

    Args:
        parse (`Callable`): has it read.

    Raises:
        ValueError: if a value is wrong or of the wrong type.
    """
    from ..methods.build import method_of

    try:
        found = parse()
        method_of(found[-1])  # its options are checked where a run is built, when much has been loaded
    except TypeError as error:  # how a configuration refuses what a YAML file or JSON may hold
        raise ValueError(f"An argument is of the wrong type: {error}") from error
    return found


def read_arguments(parser: Any, words: Sequence[str]) -> Any:
    """
    The dataclasses of a parser, from the words of a command line and the YAML file that they name.

    Args:
        parser ([`~diffora_trainer.cli.parser.ConfigParser`]): of [`make_parser`].
        words (`Sequence[str]`): of the command line.

    Raises:
        ValueError: if a value is wrong or of the wrong type, or the file holds no arguments.
    """
    found = checked(lambda: parser.parse_args_and_config(list(words)))
    for args in found:  # a folder, but a YAML file may say `true` for the last one in `output_dir`
        if hasattr(args, "resume_from_checkpoint"):
            given = args.resume_from_checkpoint
            args.resume_from_checkpoint = {"true": True, "false": None}.get(str(given).lower(), given)
    return found


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
        FileNotFoundError: if there is no such folder.
    """
    checked_model_name(model_args.model_name_or_path)
    options, peft_config = model_options(model_args)
    training_args.model_init_kwargs = {**options, **(training_args.model_init_kwargs or {})}
    return peft_config


def checked_model_name(name: str | None) -> str:
    """
    A Hub id, or the folder of a model that is there.

    Raises:
        ValueError: if there is no name, or it is that of an adapter.
        FileNotFoundError: if there is no such folder.
    """
    if not name:
        raise ValueError("`model_name_or_path` is missing: a Hub id or a local folder.")
    path = Path(name)
    if not path.exists() and looks_local(name):
        raise FileNotFoundError(f"`model_name_or_path` looks like a local path, but there is no {path}.")
    if (path / ADAPTER_CONFIG_NAME).is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"`model_name_or_path={name!r}` is an adapter, not a model. Please name its base model; to continue from "
            f"what it has learned, merge it first: `diffora export {name} --for merged --output FOLDER`."
        )
    return name


def check_language_model(name: str, options: dict[str, Any]) -> None:
    """
    Check that a model is one that writes texts: TRL loads the class that a configuration names, whatever that is, and
    fails on what it lacks.

    Args:
        name (`str`): Hub id or local folder.
        options (`dict`): arguments of its `from_pretrained`.

    Raises:
        ValueError: if it is another one.
    """
    import transformers

    from ..adapters.wrapping import read_base_config

    # The file alone: no code that comes with the model is run, or asked for, before TRL loads it.
    named = read_base_config(name, options).get("architectures") or [""]
    cls = getattr(transformers, named[0], None)  # none of a class that comes with the model
    if cls is not None and not cls.can_generate():
        raise ValueError(
            f"`model_name_or_path={name!r}` is a {named[0]}, which is not a language model. Please name another one; "
            "encoders are trained with `diffora classify`."
        )


def model_options(model_args: Any, task_type: str | None = None) -> tuple[dict[str, Any], Any]:
    """
    How a model is loaded, and the LoRA that it begins with: one of all linear layers unless told otherwise.

    Args:
        model_args ([`~trl.ModelConfig`]): what was asked for. A parser has just made it.
        task_type (`str`, *optional*): the LoRA's, instead of what was asked for.

    Returns:
        `tuple[dict, LoraConfig]`: arguments of `from_pretrained`, and the LoRA.
    """
    from trl import get_peft_config, get_quantization_config  # type: ignore[attr-defined]

    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if (quantization := get_quantization_config(model_args)) is not None:
        options["quantization_config"] = quantization
    model_args.use_peft = True
    targets = model_args.lora_target_modules
    if targets is None:
        model_args.lora_target_modules = "all-linear"
    elif isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        # TRL takes a name that stands alone out of its list, and PEFT a string for a pattern of whole names.
        model_args.lora_target_modules = [targets]
    if task_type is not None:
        model_args.lora_task_type = task_type
    lora: Any = get_peft_config(model_args)
    if model_args.model_revision != "main":  # by which the base model is found again
        lora.revision = model_args.model_revision
    return options, lora


def run(trainer_class: type, parser: Any, words: Sequence[str], forms: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """
    Train as the words say, save, evaluate, and print what was chosen.

    Args:
        trainer_class (`type`): a trainer that searches.
        parser ([`~diffora_trainer.cli.parser.ConfigParser`]): of [`make_parser`].
        words (`Sequence[str]`): of the command line.
        forms (`Sequence[tuple[str, ...]]`): see [`check_form`].

    Returns:
        `dict[str, float]`: the metrics of the evaluation.
    """
    data_args, training_args, model_args, config = read_arguments(parser, words)
    train, test = load_splits(data_args, seed=training_args.seed)
    check_form((train, test), forms, getattr(training_args, TEXT_FIELD, None))
    peft_config = prepare_model(training_args, model_args)
    check_language_model(model_args.model_name_or_path, training_args.model_init_kwargs)
    trainer: Any = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=peft_config,
        diffora_config=config,
    )
    return train_and_save(trainer, data_args.dataset_name, "dataset_name")


def check_form(splits: tuple[Any, Any], forms: Sequence[tuple[str, ...]], text_field: str | None) -> None:
    """
    Check that data are of a form that a trainer reads: it would name a missing column, and nothing else.

    Args:
        splits (`tuple[Dataset, Dataset]`): the training and the evaluation set.
        forms (`Sequence[tuple[str, ...]]`): the columns of each form; of several that fit the first is read.
        text_field (`str`, *optional*): the column that `dataset_text_field` in them stands for.

    Raises:
        ValueError: if a set is of none of them, or has rows with nothing in these columns.
    """
    shared = [name for name in splits[0].column_names if name in splits[1].column_names]
    named = [tuple(str(text_field) if name == TEXT_FIELD else name for name in form) for form in forms]
    form = next((form for form in named if set(form) <= set(shared)), None)
    if form is None:
        wanted = ", or ".join(" and ".join(map(repr, form)) for form in named)
        raise ValueError(
            f"The data set has the columns {', '.join(map(repr, shared))}, but what is trained on is read from "
            f"{wanted}. Please rename the columns"
            + (f", or name the one with the text with `--{TEXT_FIELD}`." if (TEXT_FIELD,) in forms else ".")
        )
    check_texts(splits, form, lists=form != (text_field,))


def train_and_save(trainer: Any, dataset_name: str, named: str = "dataset") -> dict[str, float]:
    """
    Train, save, evaluate, push if that was asked for, and print what was chosen.

    Args:
        trainer (`Trainer`): a trainer that searches.
        dataset_name (`str`): what its data set is called.
        named (`str`, *optional*, defaults to `"dataset"`): by what name its card takes that.

    Returns:
        `dict[str, float]`: the metrics of the evaluation.
    """
    from ..trainer.saving import save_findings

    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)  # first: what goes wrong in the evaluation must not cost the training
    metrics: dict[str, float] = trainer.evaluate()
    if trainer.is_world_process_zero():  # the report, with the loss of the evaluation
        save_findings(trainer, Path(args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub(**{named: None if Path(dataset_name).exists() else dataset_name})
    lines = ["", trainer.selection.table(), "", f"DiffoRA {trainer.selection.summary()}."]
    lines += [f"Evaluation loss: {metrics['eval_loss']:.4f}"]
    lines += [f"{n.capitalize()}: {metrics[key]:.4f}" for n in METRICS if (key := f"eval_{n}") in metrics]
    lines += [f"Adapter: {args.output_dir}"]
    if trainer.diffora_config.search_only:
        lines += [f"LoRA of a second run: diffora show {args.output_dir} --lora_config FILE.json"]
    trainer.accelerator.print("\n".join(lines))
    if hasattr(trainer, "end"):  # finishes the trackers and the process group; newer transformers only
        trainer.end()
    return metrics
