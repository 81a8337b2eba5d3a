"""What is passed wrongly, and the message that each gives: before the first step, by name, and with what to do."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CUT, Probe, causal_model, classifier, lora, make_trainer, step_logs
from datasets import Dataset, IterableDataset
from peft import AdaLoraConfig, IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from test_selection import make_selection
from tokenizer import classification_dataset, lm_dataset, tiny_tokenizer
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, DiffoRATrainer, Selection, add_shortcuts
from diffora_trainer.adapters.grid import ModuleGrid, lora_layers
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.core.selection import SELECTION_NAME
from diffora_trainer.hub.card import write_card
from diffora_trainer.trainer.checkpoint import STATE_NAME, load_state, save_state


# Options: what is passed, the class of the error, and the essential part of its message

CONFIG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"selection_ratio": 0}, ValueError, "selection_ratio=0.0.*must be in"),
    ({"selection_ratio": 1.01}, ValueError, "selection_ratio=1.01"),
    ({"selection_ratio": float("nan")}, ValueError, "selection_ratio=nan.*finite"),
    ({"selection_ratio": 10**400}, ValueError, "selection_ratio=inf.*finite"),
    ({"selection_ratio": "0.5"}, TypeError, "`selection_ratio` must be.*'0.5'.*without quotes"),  # quoted in YAML
    ({"selection_ratio": True}, TypeError, "`selection_ratio` must be"),
    ({"selection_scope": "head"}, ValueError, "selection_scope='head'.*'layer', 'model'"),
    ({"selection_scope": ["layer"]}, ValueError, r"selection_scope=\['layer'\].*must be one of"),
    ({"relaxation": "hard"}, ValueError, "relaxation='hard'.*'budget'"),
    ({"relaxation": None}, ValueError, "relaxation=None.*must be one of"),
    ({"weight_sharing": "all"}, ValueError, "weight_sharing='all'.*'none'"),
    ({"cost": "flops"}, ValueError, "cost='flops'.*must be one of"),
    ({"cost": "time"}, ValueError, "cost='time'.*selection_scope='model'"),
    ({"max_step_time": 1.5}, ValueError, "max_step_time=1.5.*must be in"),
    ({"max_trainable_parameters": 0}, ValueError, "max_trainable_parameters=0.*positive"),
    ({"max_trainable_parameters": 10.5}, TypeError, "`max_trainable_parameters` must be"),
    (
        {"max_trainable_parameters": 10, "weight_sharing": "layer"},
        ValueError,
        "together with `weight_sharing='layer'`",
    ),
    ({"discretize_at": 0}, ValueError, "discretize_at=0.0.*neither"),
    ({"discretize_at": -3}, ValueError, "discretize_at=-3.0.*neither"),
    ({"discretize_at": 1.5}, ValueError, "discretize_at=1.5.*neither"),
    ({"discretize_at": float("inf")}, ValueError, "discretize_at=inf.*finite"),
    ({"discretize_at": "half"}, TypeError, "`discretize_at` must be"),
    ({"arch_warmup": -0.1}, ValueError, "arch_warmup=-0.1.*neither"),
    ({"arch_warmup": 2.5}, ValueError, "arch_warmup=2.5.*neither"),
    ({"arch_warmup": 0.3, "discretize_at": 0.3}, ValueError, "cut before the search starts"),
    ({"arch_warmup": 30, "discretize_at": 20}, ValueError, "cut before the search starts"),
    ({"arch_closing": -1}, ValueError, "arch_closing=-1.0.*neither"),
    ({"arch_every": 0}, ValueError, "arch_every=0.*1 or more"),
    ({"arch_every": 2.0}, TypeError, "`arch_every` must be"),
    ({"arch_every": True}, TypeError, "`arch_every` must be"),
    ({"arch_learning_rate": 0}, ValueError, "arch_learning_rate=0.0.*positive"),
    ({"arch_learning_rate": float("inf"), "relaxation": "sigmoid"}, ValueError, "arch_learning_rate=inf.*finite"),
    ({"arch_learning_rate": 1.5}, ValueError, "arch_learning_rate=1.5.*Frank-Wolfe"),
    ({"arch_learning_rate": 1e30, "relaxation": "softmax"}, ValueError, "arch_learning_rate=1e.30.*such as 0.05"),
    ({"arch_learning_rate": "0.1"}, TypeError, "`arch_learning_rate` must be.*without quotes"),
    ({"arch_order": 3}, ValueError, "arch_order=3"),
    ({"arch_order": "2"}, TypeError, "`arch_order` must be"),
    ({"arch_split": 0}, ValueError, "arch_split=0.0.*arch_dataset"),
    ({"arch_split": 1}, ValueError, "arch_split=1.0.*arch_dataset"),
    ({"arch_batch_size": 0}, ValueError, "arch_batch_size=0"),
    ({"arch_batch_size": 2.0}, TypeError, "`arch_batch_size` must be"),
    ({"arch_seed": -1}, ValueError, "arch_seed=-1"),
    ({"arch_seed": 2**32}, ValueError, "arch_seed=4294967296.*below"),
    ({"arch_seed": None}, TypeError, "`arch_seed` must be"),
    ({"arch_seed": "7"}, TypeError, "`arch_seed` must be"),
    ({"fold_gates": 1}, TypeError, "`fold_gates` must be"),
    ({"base_model_id": 3}, TypeError, "`base_model_id` must be"),
    ({"base_model_id": "/home/alice/model"}, ValueError, "base_model_id='/home/alice/model'.*such as 'org/name'"),
]


def assert_helpful(message: str, essential: str) -> None:
    """It names what was passed, and says what to do or what would be right."""
    assert re.search(essential, message, re.DOTALL), message
    assert len(message) > 30 and re.search(r"[Pp]lease|[Uu]se |must|[Pp]ass|[Cc]all|Load |has to be", message), message


@pytest.mark.parametrize(("options", "error", "message"), CONFIG, ids=[str(options) for options, *_ in CONFIG])
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        DiffoRAConfig(**options)
    assert_helpful(str(found.value), message)


# Models


def ready_model(**overrides: Any) -> PeftModel:
    return get_peft_model(classifier().model, lora(task_type="SEQ_CLS", **overrides))


def merged() -> PeftModel:
    model = ready_model()
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = ready_model()
    model.base_model.disable_adapter_layers()
    return model


def with_shortcuts_and_a_reference() -> PeftModel:
    model = ready_model()
    model.add_adapter("ref", lora())
    add_shortcuts(model)
    return model


def frozen() -> PeftModel:
    model = ready_model()
    return model.requires_grad_(False)


def two_adapters() -> PeftModel:
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    model.add_adapter("other", lora(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def without_layers() -> PeftModel:
    model = ready_model(target_modules=["query"])
    for name in list(lora_layers(model, "default")):
        parent, _, child = f"base_model.model.{name}".rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(f"base_model.model.{name}").get_base_layer())
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return causal_model()


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 2)


ADALORA = AdaLoraConfig(total_step=12, task_type="SEQ_CLS", target_modules=["key"])
IA3 = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
PROMPT = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
rows = classification_dataset


def stream() -> Any:
    return rows(24).to_iterable_dataset()


def ready(make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """A model that comes with its adapter."""
    return lambda: {"model": make(), "peft_config": None}


# What the trainer is given, the class of the error, and the essential part of its message
TRAINER: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    # Models
    "no model": (lambda: {"model": None}, TypeError, "`model` must be a model, got NoneType.*from_pretrained"),
    "model by name": (lambda: {"model": "org/name"}, TypeError, "`model` must be a model, got str.*from_pretrained"),
    "model on meta": (lambda: {"model": on_meta()}, ValueError, "meta device.*load it with its weights"),
    "no linear layer": (lambda: {"model": NoLinear()}, ValueError, "NoLinear has no linear layer.*target_modules"),
    "no LoRA layer": (ready(without_layers), ValueError, "no LoRA layer.*target_modules"),
    "no match": (lambda: {"peft_config": lora(target_modules=["nowhere"])}, ValueError, "target_modules"),
    "AdaLoRA": (lambda: {"peft_config": ADALORA}, TypeError, "AdaLoraConfig.*plain `peft.LoraConfig`"),
    "AdaLoRA model": (
        ready(lambda: get_peft_model(classifier().model, ADALORA)),
        TypeError,
        "AdaLoraConfig.*plain `peft.LoraConfig`",
    ),
    "IA3": (lambda: {"peft_config": IA3}, TypeError, "peft_config.*IA3Config.*LoraConfig"),
    "prompt tuning": (lambda: {"peft_config": PROMPT}, TypeError, "peft_config.*PromptTuningConfig.*LoraConfig"),
    "IA3 model": (ready(lambda: get_peft_model(classifier().model, IA3)), TypeError, "IA3Config.*LoraConfig"),
    "prompt tuning model": (
        ready(lambda: get_peft_model(classifier().model, PROMPT)),
        TypeError,
        "PromptTuningConfig",
    ),
    "LoRA as a dictionary": (lambda: {"peft_config": {"r": 4}}, TypeError, "peft_config.*dict.*LoraConfig"),
    "DoRA": (lambda: {"peft_config": lora(use_dora=True)}, ValueError, "use_dora.*plain LoRA"),
    "DoRA model": (ready(lambda: ready_model(use_dora=True)), ValueError, "use_dora.*plain LoRA"),
    "lora_bias": (lambda: {"peft_config": lora(lora_bias=True)}, ValueError, "lora_bias=False"),
    "bias": (lambda: {"peft_config": lora(bias="all")}, ValueError, "bias='all'.*bias='none'"),
    "pissa": (lambda: {"peft_config": lora(init_lora_weights="pissa")}, ValueError, "init_lora_weights='pissa'"),
    "target_parameters": (
        lambda: {"peft_config": lora(target_modules=["query"], target_parameters=["query.weight"])},
        ValueError,
        "target_parameters.*name the projections",
    ),
    "merged": (ready(merged), ValueError, "merged.*unmerge_adapter"),
    "disabled": (ready(disabled), ValueError, "disabled.*enable_adapter_layers"),
    "shortcuts and two adapters": (
        ready(with_shortcuts_and_a_reference),
        ValueError,
        r"2 adapters \(\['default', 'ref'\]\).*leave the shortcuts out",
    ),
    "frozen": (ready(frozen), ValueError, "frozen.*is_trainable=True"),
    "two active adapters": (ready(two_adapters), ValueError, "2 active adapters.*set_adapter"),
    "model and configuration": (lambda: {"model": ready_model()}, ValueError, "`PeftModel` together.*peft_config"),
    # Options and training arguments
    "options as a dictionary": (
        lambda: {"diffora_config": {"a": 1}},
        TypeError,
        "diffora_config.*got dict.*DiffoRAConfig",
    ),
    "options as a class": (lambda: {"diffora_config": DiffoRAConfig}, TypeError, "diffora_config.*got type"),
    "tiny cap": (
        lambda: {"search": {"max_trainable_parameters": 10}},
        ValueError,
        "max_trainable_parameters=10.*raise",
    ),
    "late cut": (lambda: {"search": {"discretize_at": 13}}, ValueError, "discretize_at=13.*smaller step"),
    "late cut, in epochs": (
        lambda: {"search": {"discretize_at": 13}, "args": {"max_steps": -1, "num_train_epochs": 2}},
        ValueError,
        "discretize_at=13",
    ),
    "early cut": (lambda: {"search": {"discretize_at": 2}}, ValueError, "discretize_at=2.*larger"),
    "one step": (lambda: {"args": {"max_steps": 1}}, ValueError, "1 optimizer step.*raise `max_steps`"),
    "reentrant": (lambda: {"args": CHECKPOINTING}, ValueError, "use_reentrant.*gradient_checkpointing_kwargs"),
    "compiled": (lambda: {"args": {"torch_compile": True}}, ValueError, "torch_compile=True.*model.compile"),
    "whole batches": (
        lambda: {"args": {"train_sampling_strategy": "batch_rebalance"}},
        ValueError,
        "train_sampling_strategy.*arch_dataset",
    ),
    # Data
    "no data": (lambda: {"train_dataset": None}, ValueError, "train_dataset=None.*pass a `train_dataset`"),
    "empty data": (lambda: {"train_dataset": rows(2).select([])}, ValueError, "`train_dataset`.*no rows"),
    "one row": (lambda: {"train_dataset": rows(1)}, ValueError, "1 row.*arch_split=0.1.*more data"),
    "data by name": (lambda: {"train_dataset": "a.jsonl"}, TypeError, "train_dataset='a.jsonl'.*load_dataset"),
    "splits": (
        lambda: {"train_dataset": {"train": rows(8)}},
        TypeError,
        r"'train' as `train_dataset`.*data\['train'\]",
    ),
    "columns of another model": (
        lambda: {"train_dataset": Dataset.from_dict({"a": [1] * 24})},
        ValueError,
        "No columns.*check the dataset",
    ),
    "empty arch_dataset": (lambda: {"arch_dataset": rows(2).select([])}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset without rows": (lambda: {"arch_dataset": []}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset by name": (lambda: {"arch_dataset": Path("a")}, TypeError, "arch_dataset=.*load_dataset"),
    "arch_dataset of splits": (lambda: {"arch_dataset": {"a": rows(8)}}, TypeError, "'a' as `arch_dataset`"),
    "arch_dataset that is none": (lambda: {"arch_dataset": 3}, TypeError, "arch_dataset=3.*int"),
    "arch_dataset without labels": (
        lambda: {"arch_dataset": rows(8).remove_columns("label")},
        ValueError,
        r"arch_dataset.*\['label'\].*same|form of the training set",
    ),
    "endless stream": (lambda: {"train_dataset": stream(), "args": {"max_steps": -1}}, ValueError, "max_steps"),
    "stream of two workers": (
        lambda: {"train_dataset": stream(), "args": {"dataloader_num_workers": 2}},
        ValueError,
        "dataloader_num_workers=2.*arch_dataset",
    ),
    "empty stream": (
        lambda: {"train_dataset": IterableDataset.from_generator(lambda: iter(()))},
        ValueError,
        "stream.*empty",
    ),
    "collator of nothing": (lambda: {"data_collator": lambda batch: None}, TypeError, "data collator made None"),
    "collator of no columns": (lambda: {"data_collator": lambda batch: {}}, TypeError, "data collator made {}"),
}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_names_it_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, error, message = TRAINER[name]
    steps: list[int] = []
    plain: Callable[..., Any] = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs))
    with pytest.raises(error) as found:
        make_trainer(tmp_path, **make()).train()
    assert_helpful(str(found.value), message)
    assert not steps


SFT: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    **{
        name: TRAINER[name]
        for name in (
            "AdaLoRA",
            "IA3",
            "DoRA",
            "bias",
            "pissa",
            "tiny cap",
            "late cut",
            "options as a dictionary",
            "model on meta",
        )
        + ("data by name", "splits", "arch_dataset by name", "arch_dataset of splits", "LoRA as a dictionary")
    },
    "no model": (lambda: {"model": None}, TypeError, "`model`.*name or folder.*NoneType.*from_pretrained"),
    "empty data": (lambda: {"train_dataset": lm_dataset(2).select([])}, ValueError, "`train_dataset`.*no rows"),
    "empty arch_dataset": (lambda: {"arch_dataset": lm_dataset(2).select([])}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset of other columns": (
        lambda: {"arch_dataset": Dataset.from_dict({"a": ["x"] * 4})},
        ValueError,
        r"arch_dataset.*\['a'\].*same form",
    ),
}


@pytest.mark.parametrize("name", SFT)
def test_the_sft_trainer_names_it(name: str, tmp_path: Path) -> None:
    make, error, message = SFT[name]
    with pytest.raises(error) as found:
        make_trainer(tmp_path, "sft", **make())
    assert_helpful(str(found.value), message)


# Without a trainer: the search, the cut, and files


def searching(loss_fn: Any) -> None:
    search = ArchitectureSearch(small(), loss_fn=loss_fn)
    search.begin()
    search.step({"input_ids": torch.arange(5, 13).reshape(2, 4), "labels": torch.tensor([0, 1])})


def small() -> PeftModel:
    return ready_model(target_modules=["query"])


def twice() -> None:
    model = small()
    grid = ModuleGrid.from_model(model)
    numbers = (0.0,) * len(grid)
    kept = (True,) + (False,) * (len(grid) - 1)
    selection = Selection(grid.rows, grid.columns, grid.names, grid.positions, grid.parameters, numbers, numbers, kept)
    for _ in range(2):
        apply_selection(model, selection)


def written(folder: Path, content: bytes | None) -> Path:
    """A folder with a selection of this content; without one it is a folder itself."""
    path = folder / SELECTION_NAME
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return folder


def damaged(folder: Path, **changes: Any) -> Path:
    state = {"phase": "selected", "config": {}, "selection": make_selection().to_json(), **changes}
    save_state(folder, state, {})
    return folder


DAMAGED = f"{STATE_NAME}.*cannot be read.*another checkpoint"
OTHER: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    # The search and the cut
    "search without a loss": (lambda _: searching(None), TypeError, "loss_fn.*NoneType.*Please pass one"),
    "loss in a tuple": (lambda _: searching(lambda m, b: (m(**b).loss, 1)), TypeError, "returned tuple.*one number"),
    "loss of a row each": (lambda _: searching(lambda m, b: m(**b).logits), TypeError, r"shape \(2, 2\).*one number"),
    "loss that is a number": (lambda _: searching(lambda m, b: 1.0), TypeError, "returned float.*one element"),
    "loss without a gradient": (
        lambda _: searching(torch.no_grad()(lambda m, b: m(**b).loss)),
        ValueError,
        "does not depend on any gate.*no_grad",
    ),
    "search of a plain model": (
        lambda _: ArchitectureSearch(nn.Linear(2, 2), loss_fn=print),
        TypeError,
        "PeftModel.*got Linear.*get_peft_model",
    ),
    "search with a dictionary": (
        lambda _: ArchitectureSearch(small(), {"a": 1}, loss_fn=print),  # type: ignore[arg-type]
        TypeError,
        "`config` must be a `DiffoRAConfig`, got dict",
    ),
    "search of no adapter": (
        lambda _: ArchitectureSearch(small(), loss_fn=print, adapter_name="nobody"),
        ValueError,
        r"adapter_name='nobody'.*\['default'\]",
    ),
    "cut of a plain model": (
        lambda _: apply_selection(nn.Linear(2, 2), make_selection()),
        TypeError,
        "got Linear and Selection.*model that was searched",
    ),
    "cut by a file name": (
        lambda _: apply_selection(small(), SELECTION_NAME),  # type: ignore[arg-type]
        TypeError,
        "and str.*Selection.load",
    ),
    "cut of no adapter": (
        lambda _: apply_selection(small(), make_selection(), adapter_name="nobody"),
        ValueError,
        "adapter_name='nobody'.*Please pass",
    ),
    "cut of another model": (
        lambda _: apply_selection(small(), make_selection()),
        ValueError,
        "made for other modules",
    ),
    "a second cut": (lambda _: twice(), ValueError, "made for other modules.*with all its LoRA modules"),
    # Files
    "no file": (lambda f: Selection.load(f), FileNotFoundError, f"no .*{SELECTION_NAME}.*output folder"),
    "a folder as a file": (lambda f: Selection.load(written(f, None)), OSError, SELECTION_NAME),
    "empty file": (lambda f: Selection.load(written(f, b"")), ValueError, f"{SELECTION_NAME}.*Please pass"),
    "a list": (lambda f: Selection.load(written(f, b"[]")), ValueError, "`format` is not 1.*Please pass"),
    "another format": (lambda f: Selection.load(written(f, b'{"format": 2}')), ValueError, "`format` is not 1"),
    "no modules": (lambda f: Selection.load(written(f, b'{"format": 1}')), ValueError, "has no 'modules'"),
    "binary": (lambda f: Selection.load(written(f, b"\x80\x04\xff\x00")), ValueError, "it is no text.*Please pass"),
    "no state": (lambda f: load_state(f), ValueError, f"holds no {STATE_NAME}.*start a new run"),
    "state of other options": (lambda f: load_state(damaged(f, config=3)), ValueError, DAMAGED),
    "state without a selection": (lambda f: load_state(damaged(f, selection=None)), ValueError, DAMAGED),
    "state of no search": (lambda f: load_state(damaged(f, phase="search")), ValueError, DAMAGED),
    "card into a file": (
        lambda f: write_card(written(f, b"") / SELECTION_NAME, make_selection(), lora()),
        OSError,
        SELECTION_NAME,
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_search_cut_and_files(name: str, tmp_path: Path) -> None:
    call, error, message = OTHER[name]
    with pytest.raises(error) as found:
        call(tmp_path)
    if isinstance(found.value, OSError) and found.value.errno:  # the system's own words, with the path
        assert message in str(found.value)
    else:
        assert_helpful(str(found.value), message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (written(tmp_path, b"{}") / SELECTION_NAME).chmod(0)
    with pytest.raises(PermissionError, match=SELECTION_NAME):
        Selection.load(tmp_path)


def test_a_loss_that_is_never_finite_is_said_at_the_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(DiffoRATrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * float("nan")

    make_trainer(tmp_path, cls=Broken).train()
    assert "not one of the 5 architecture steps had a finite loss" in caplog.text


def test_there_are_enough_of_them() -> None:
    assert len(CONFIG) + len(TRAINER) + len(SFT) + len(OTHER) >= 100


def labelled(count: int, masked: Callable[[int], bool]) -> Dataset:
    """Tokenized rows, some without any label."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["text"])["input_ids"] for row in lm_dataset(count)]
    return Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * len(ids) if masked(i) else ids} for i, ids in enumerate(rows)]
    )


def causal(folder: Path, **kwargs: Any) -> Any:
    return make_trainer(folder, model=causal_model(), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), **kwargs)


@pytest.mark.parametrize("name", ["train_dataset", "arch_dataset"])
@pytest.mark.parametrize("task", ["sft", "plain"])
def test_rows_without_labels_are_named_before_the_first_step(task: str, name: str, tmp_path: Path) -> None:
    """By the trainer or its search; TRL drops such rows from 1.0 on."""
    data = {"train_dataset": labelled(24, lambda i: False), name: labelled(24, lambda i: True)}
    steps = Probe(lambda **kwargs: None)
    with pytest.raises(ValueError) as found:
        if task == "plain":
            causal(tmp_path, **data, callbacks=[steps]).train()
        else:
            make_trainer(tmp_path, "sft", **data, callbacks=[steps]).train()
    assert_helpful(str(found.value), "-100.*assistant_only_loss.*generation.*max_length")
    assert not steps.found


def test_some_rows_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch of them is passed over with its reason, and the loss around the cut is a number."""
    trainer = causal(
        tmp_path,
        train_dataset=labelled(24, lambda i: False),
        arch_dataset=labelled(8, lambda i: i % 2 == 0),
        search={"arch_batch_size": 1},
    )
    trainer.train()
    assert "no token of the held-out batch has a label; this architecture step is skipped" in caplog.text
    assert math.isfinite(step_logs(trainer)[CUT]["diffora/gap"])


def test_a_loss_of_ones_own_needs_no_labels(tmp_path: Path) -> None:
    class Own(DiffoRATrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.square().mean()

    trainer = causal(tmp_path, cls=Own, train_dataset=labelled(24, lambda i: True))
    trainer.train()
    assert math.isfinite(step_logs(trainer)[CUT]["diffora/gap"])
