"""`DiffoRACallback`: a trainer that somebody else builds becomes a searching one, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTTrainer

from diffora_trainer import ArchitectureSearch, DiffoRACallback, DiffoRAConfig, DiffoRAMixin, Selection
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_continues, assert_helpful, assert_same, assert_was_searched, step_logs
from helpers.data import classification_dataset, preference_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.trainers import (
    SAVES,
    SaveAt,
    arguments,
    causal_model,
    classifier,
    lora,
    make_trainer,
    saving_trainer,
    search_config,
)


STOCK = {"cls": Trainer, "sft": SFTTrainer}


def wrapped(task: str) -> nn.Module:
    """A model that has its LoRA already, as a tool hands it to its trainer."""
    model = causal_model() if task == "sft" else classifier().model
    task_type = "CAUSAL_LM" if task == "sft" else "SEQ_CLS"
    torch.manual_seed(3)
    return get_peft_model(model, lora(task_type=task_type))


def directly(folder: Path, task: str) -> Any:
    """The run that all others should be: of a class with the mixin, saved in every phase."""
    return saving_trainer(folder, task, model=wrapped(task), peft_config=None)


def attached(folder: Path, task: str) -> Any:
    stock = saving_trainer(folder, task, cls=STOCK[task], model=wrapped(task), peft_config=None)
    return DiffoRACallback(search_config()).attach(stock)


def as_callback(folder: Path, task: str, given: Any = None) -> Any:
    """Among the callbacks of the constructor alone, which is all that a tool may take."""
    given = given or DiffoRACallback(search_config())
    args = {"save_strategy": "steps", "save_steps": 1000}
    settings = {"cls": STOCK[task], "model": wrapped(task), "peft_config": None, "args": args}
    return make_trainer(folder, task, callbacks=[SaveAt(), given], **settings)


@pytest.mark.parametrize("task", mostly_slow(["cls", "sft"], "sft"))
def test_run_is_that_of_the_mixin(task: str, tmp_path: Path) -> None:
    """Losses, selection, adapter and files are equal, and so is what is resumed in every phase."""
    direct = directly(tmp_path / "direct", task)
    direct.train()
    direct.save_model()
    for build in (attached, as_callback):
        folder = tmp_path / build.__name__
        trainer = build(folder, task)  # which sets the seed
        trainer.train()
        trainer.save_model()
        assert_was_searched(trainer)
        assert_same(step_logs(trainer), step_logs(direct), "logs")
        assert trainer.selection == direct.selection == Selection.load(folder)
        assert_same(adapter(trainer.model), adapter(direct.model), "adapter")
        assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "direct").iterdir()}
        for step in SAVES:
            resumed = build(tmp_path / f"{build.__name__}-{step}", task)
            resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
            assert_continues(resumed, direct, step)


def test_trainer_of_a_tool(tmp_path: Path) -> None:
    """
    As LLaMA-Factory 0.9.5 builds its own (`train/sft/trainer.py`): a class over `Seq2SeqTrainer` whose constructor
    goes on after that of `Trainer`, and whose methods override what the search overrides too.
    """

    class Custom(Seq2SeqTrainer):
        def __init__(self, finetuning_args: dict, **kwargs: Any) -> None:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
            super().__init__(**kwargs)
            self.finetuning_args = finetuning_args
            self.add_callback(TrainerCallback())

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            if self.finetuning_args["disable_shuffling"]:
                return torch.utils.data.SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(*args, **kwargs)

    found: list[Any] = []
    for way in ("class", "callback"):
        callback = DiffoRACallback(search_config())
        cls: Any = Custom if way == "callback" else type("Searching", (DiffoRAMixin, Custom), {})
        own = {"callbacks": [callback]} if way == "callback" else {"diffora_config": search_config()}
        trainer = cls(
            finetuning_args={"disable_shuffling": True},
            model=wrapped("cls"),
            args=arguments(tmp_path / way, Seq2SeqTrainingArguments),
            train_dataset=classification_dataset(24),
            data_collator=DataCollatorWithPadding(tiny_tokenizer()),
            tokenizer=tiny_tokenizer(),
            **own,
        )
        trainer.train()
        found.append((step_logs(trainer), trainer.selection, adapter(trainer.model)))
    assert_same(found[1], found[0], "run")
    assert callback.trainer is trainer and callback.selection == trainer.selection
    assert isinstance(trainer, Custom) and isinstance(trainer, DiffoRAMixin)


def test_preference_trainer(tmp_path: Path) -> None:
    """A trainer with a method that the mixin's class has to override no other way: its own data and loss."""
    found = []
    for way in (DPOTrainer, type("Searching", (DiffoRAMixin, DPOTrainer), {})):
        searching = issubclass(way, DiffoRAMixin)
        trainer = way(
            model=causal_model(attention_dropout=0.0),
            args=arguments(tmp_path / way.__name__, DPOConfig),
            train_dataset=preference_dataset(24),
            processing_class=tiny_tokenizer(),
            peft_config=lora(),
            **({"diffora_config": search_config()} if searching else {}),
        )
        if not searching:
            assert DiffoRACallback(search_config()).attach(trainer) is trainer
        trainer.train()
        found.append((step_logs(trainer), trainer.selection, adapter(trainer.model)))
    assert_same(found[0], found[1], "run")


def test_own_held_out_data(tmp_path: Path) -> None:
    held_out = classification_dataset(8, seed=1)
    found = []
    for way in ("direct", "callback"):
        own = {"arch_dataset": held_out} if way == "direct" else {"cls": Trainer}
        trainer: Any = make_trainer(tmp_path / way, model=wrapped("cls"), peft_config=None, **own)
        if way == "callback":
            DiffoRACallback(search_config(), arch_dataset=held_out).attach(trainer)
        trainer.train()
        found.append((step_logs(trainer), trainer.selection))
    assert_same(found[0], found[1], "run")


def test_evaluation_alone_needs_no_search(tmp_path: Path) -> None:
    """A tool may build a trainer only to evaluate or save with it."""
    callback = DiffoRACallback(search_config())
    trainer = as_callback(tmp_path, "cls", callback)
    assert trainer.evaluate(classification_dataset(8))["eval_loss"] > 0
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and callback.selection is None


def stock(folder: Path, **kwargs: Any) -> Any:
    return make_trainer(folder, cls=Trainer, **{"model": wrapped("cls"), "peft_config": None, **kwargs})


def test_what_cannot_be_attached_to(tmp_path: Path) -> None:
    """Each is refused with what to do, and the trainer stays as it was."""
    callback = partial(DiffoRACallback, search_config())

    class OwnLoop(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> None:
            self.model.train()

    own_loop = stock(tmp_path)
    own_loop.__class__ = OwnLoop
    trained = stock(tmp_path, args={"max_steps": 1})
    trained.train()
    replaced = stock(tmp_path)
    replaced.training_step = replaced.training_step
    no_lora = stock(tmp_path, model=classifier().model)
    twice = callback().attach(stock(tmp_path))
    several = stock(tmp_path)
    several.args._n_gpu = 2
    refused = [
        (own_loop, TypeError, "training loop of its own"),
        (trained, ValueError, "trained for 1 steps already"),
        (replaced, ValueError, "`training_step` of this Trainer was replaced"),
        (no_lora, TypeError, "LoRA adapter, got BertForSequenceClassification"),
        (twice, ValueError, "searches already"),
        (make_trainer(tmp_path), ValueError, "DiffoRATrainer searches already"),
        (several, ValueError, "2 GPUs are visible"),
        (nn.Linear(1, 1), TypeError, "got Linear.*SelectionRun"),
    ]
    for trainer, error, essential in refused:
        cls, attributes = type(trainer), set(vars(trainer))
        callbacks = list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))
        with pytest.raises(error) as caught:
            callback().attach(trainer)
        assert_helpful(str(caught.value), essential)
        assert type(trainer) is cls and set(vars(trainer)) == attributes
        assert callbacks == list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))
    no_lora.train()  # it is a stock trainer still
    with pytest.raises(TypeError, match="must be a `DiffoRAConfig`, got dict"):
        DiffoRACallback({"selection_ratio": 0.5})  # type: ignore[arg-type]


def test_callback_out_of_its_place(tmp_path: Path) -> None:
    late = stock(tmp_path)
    late.add_callback(DiffoRACallback(search_config()))
    with pytest.raises(ValueError) as caught:
        late.train()
    assert_helpful(str(caught.value), "added to a trainer after that was built")
    used = DiffoRACallback(search_config())
    used.attach(stock(tmp_path))
    for build in (used.attach, lambda trainer: stock(tmp_path, callbacks=[used])):
        with pytest.raises(ValueError, match="belongs to another trainer"):
            build(stock(tmp_path))
    with pytest.raises(ValueError, match="searches already"):
        make_trainer(tmp_path, callbacks=[DiffoRACallback(search_config())])
    with pytest.raises(ValueError, match="no `transformers.Trainer` is being built"):
        DiffoRACallback(search_config()).on_init_end(late.args, late.state, late.control)
    passed_by = as_callback(tmp_path, "cls")
    with pytest.raises(ValueError, match="its `train` was bypassed"):
        Trainer.train(passed_by)


def test_refused_where_training_begins(tmp_path: Path) -> None:
    """As a callback the checks of what is trained wait for `train`."""
    trainer = make_trainer(tmp_path, cls=Trainer, model=classifier().model, callbacks=[DiffoRACallback()])
    with pytest.raises(TypeError, match="PeftModel.*got BertForSequenceClassification"):
        trainer.train()


def fused(name: str, module: str, qualname: str) -> Any:
    """A function as a tool puts it into a model."""

    def kernel(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    kernel.__name__, kernel.__module__, kernel.__qualname__ = name, module, qualname
    return kernel


@pytest.mark.parametrize(
    ("tool", "kernel"),
    [
        ("axolotl", ("apply_lora_qkv", "axolotl.kernels.lora", "apply_lora_qkv")),
        (
            "axolotl",
            ("apply_o", "axolotl.monkeypatch.lora_kernels", "_make_apply_lora_linear.<locals>.apply_linear"),
        ),
        ("unsloth", ("apply_lora_mlp_swiglu", "unsloth.kernels.fast_lora", "apply_lora_mlp_swiglu")),
        ("unsloth", ("unsloth_forward", "Linear_peft_forward", "unsloth_forward")),
    ],
)
def test_fused_kernels_are_refused(
    tool: str, kernel: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By the names that the functions have in axolotl 0.19.0 (`kernels/lora.py`, `monkeypatch/lora_kernels.py`), unsloth
    2026.10.9 (`kernels/fast_lora.py`) and unsloth_zoo 2026.10.9 (`compiler.py`, `patch_lora_forwards`).
    """
    trainer = stock(tmp_path)
    layer = next(iter(lora_layers(trainer.model, "default").values()))
    if kernel[0] == "unsloth_forward":
        monkeypatch.setattr(type(layer), "forward", fused(*kernel))
    else:
        layer.apply_qkv = partial(fused(*kernel).__get__(layer), inplace=False)
    for build in (
        DiffoRACallback(search_config()).attach,
        lambda trainer: ArchitectureSearch(trainer.model, DiffoRAConfig(), loss_fn=lambda model, batch: None),
    ):
        with pytest.raises(ValueError) as caught:
            build(trainer)
        assert_helpful(str(caught.value), f"fused kernels of {tool}.*selected_lora_config")
