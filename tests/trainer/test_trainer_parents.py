"""Trainers of other classes: with data of their own, and as the scripts of TRL build them."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import (
    DataCollatorWithPadding,
    Trainer,
)
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser, get_peft_config

from diffora_trainer import DiffoRAConfig, DiffoRAMixin, DiffoRATrainer
from helpers.checks import step_logs
from helpers.data import classification_dataset, lm_dataset, preference_dataset, rows_of, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.parents import TOKENS, kto_dataset, of_trl, reward_dataset, searching
from helpers.rollouts import Reward, prompts
from helpers.trainers import CUT, arguments, causal_model, classifier, lora, make_trainer, search_config


@pytest.mark.parametrize(
    ("name", "data"), mostly_slow([("DPO", preference_dataset), ("KTO", kto_dataset)], ("DPO", preference_dataset))
)
def test_precomputed_reference_and_own_held_out_data(name: str, data: Any, tmp_path: Path) -> None:
    """The reference's log-probabilities of the held-out rows are those that are computed in each step otherwise."""
    parent, args = of_trl(name)
    if name == "KTO" and not hasattr(parent, "_prepare_dataset"):
        pytest.skip("this version of KTO prepares its training set in its constructor")
    scores = []
    for ahead in (False, True):
        trainer = searching(parent)(
            model=causal_model(attention_dropout=0.0),
            args=arguments(tmp_path / str(ahead), args, precompute_ref_log_probs=ahead),
            train_dataset=data(24),
            arch_dataset=data(8, 1),
            processing_class=tiny_tokenizer(),
            peft_config=lora(),
            diffora_config=search_config(),
        )
        trainer.train()
        scores.append(trainer.selection.scores)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_a_lora_that_is_passed_by_position(name: str, tmp_path: Path) -> None:
    """As the parent takes it, and not replaced by the default LoRA."""
    parent, args = of_trl(name)
    names = list(inspect.signature(parent.__init__).parameters)[1:]
    given = {
        "model": causal_model(),
        "reward_funcs": Reward(),
        "args": arguments(tmp_path, args, **({"num_generations": 4} if name == "GRPO" else {})),
        "train_dataset": lm_dataset(8) if name == "SFT" else prompts(8),
        "processing_class": tiny_tokenizer(),
        "optimizers": (None, None),
        "peft_config": lora(r=3, target_modules=["q_proj"]),
    }
    values = [given.get(one) for one in names[: names.index("peft_config") + 1]]
    config = searching(parent)(*values, diffora_config=search_config()).model.peft_config["default"]
    assert (config.r, config.target_modules) == (3, {"q_proj"})
    with pytest.raises(TypeError, match="got peft_config both by position and by name"):
        searching(parent)(*values, peft_config=lora(), diffora_config=search_config())


@pytest.mark.parametrize("data", [preference_dataset, reward_dataset], ids=["texts", "conversations"])
@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_own_held_out_data_where_the_constructor_prepares_rows(name: str, data: Any, tmp_path: Path) -> None:
    """It is prepared as the training set is, and an evaluation set of the same rows."""
    parent, args = of_trl(name)
    trainer = searching(parent)(
        model=causal_model(),
        args=arguments(tmp_path, args),
        train_dataset=data(24),
        eval_dataset=data(8),
        arch_dataset=data(8),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(),
    )
    assert trainer.arch_dataset.to_list() == trainer.eval_dataset.to_list()
    trainer.train()
    assert math.isfinite(step_logs(trainer)[CUT]["diffora/gap"])


def test_own_held_out_data_that_no_call_prepares(tmp_path: Path) -> None:
    """As in KTO and BCO of TRL 0.28: the rows are of the form of the training set, so nobody is asked for that."""

    class Parent(Trainer):
        def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any) -> None:
            super().__init__(*args, train_dataset=train_dataset.rename_column("label", "labels"), **kwargs)

    def trainer(held_out: Any) -> Any:
        return make_trainer(
            tmp_path, cls=searching(Parent), train_dataset=classification_dataset(24), arch_dataset=held_out
        )

    raw = classification_dataset(8, seed=3)
    with pytest.raises(ValueError, match=r"with \['labels'\] too.*DiffoRAParent makes these in its constructor"):
        trainer(raw)
    trainer(raw.rename_column("label", "labels")).train()


@pytest.mark.parametrize("task_type", ["the default", "SEQ_CLS"])
def test_reward_script_with_use_peft(task_type: str, tmp_path: Path) -> None:
    """`trl/scripts/reward.py` with `--use_peft`, one import changed. TRL's default task type is a causal LM's."""
    causal_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    command = ["--dataset_name", "none", "--model_name_or_path", str(tmp_path / "base"), "--use_peft"]
    command += ["--lora_target_modules", "all-linear", "--output_dir", str(tmp_path / "out"), "--max_steps", "6"]
    command += [
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    command += ["--arch_warmup", "1", "--discretize_at", "4", "--arch_every", "1", "--arch_closing", "0"]
    if task_type == "SEQ_CLS":
        command += ["--lora_task_type", "SEQ_CLS", "--lora_modules_to_save", "score"]
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig, DiffoRAConfig))
    _, training_args, model_args, diffora_config = parser.parse_args_and_config(command)
    trainer = searching(RewardTrainer)(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=reward_dataset(24),
        peft_config=get_peft_config(model_args),
        diffora_config=diffora_config,
    )
    start = trainer.model.base_model.model.score.modules_to_save["default"].weight.clone()
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert len(trainer.selection.selected) == 8
    torch.manual_seed(1)  # another new head
    base = trainer.model.get_base_model()
    plain = type(base).from_pretrained(tmp_path / "base", num_labels=base.config.num_labels, dtype="float32")
    loaded: Any = PeftModel.from_pretrained(plain, training_args.output_dir).eval()
    trainer.model.eval()
    assert not torch.equal(start, loaded.base_model.model.score.modules_to_save["default"].weight)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, trainer.model(**TOKENS).logits)


@pytest.mark.parametrize("own_data", [False, True])
def test_parent_with_a_data_loader_of_its_own(own_data: bool, tmp_path: Path) -> None:
    """Its rows are held out of its data, and keep the columns that its own collator needs."""
    trained: set[int] = set()
    searched: set[int] = set()

    class Parent(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            (trained if model.training and not self.in_search else searched).update(inputs.pop("row").tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class DiffoRAParent(DiffoRAMixin, Parent):
        in_search = False

        def compute_architecture_loss(self, model: Any, inputs: Any) -> Any:
            self.in_search = True
            try:
                return super().compute_architecture_loss(model, inputs)
            finally:
                self.in_search = False

    trainer = DiffoRAParent(
        model=classifier().model,
        args=arguments(tmp_path),
        train_dataset=rows_of(24),
        arch_dataset=rows_of(4, start=100) if own_data else None,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        diffora_config=search_config(),
    )
    trainer.train()
    assert "diffora/gap" in step_logs(trainer)[CUT]
    assert not trained & searched and len(trained) == (24 if own_data else 21)
    assert searched == set(range(100, 104)) if own_data else len(searched) == 3


def test_data_loader_that_leaves_no_rows_out_is_refused(tmp_path: Path) -> None:
    """One made past the mixin, and one whose rows are drawn by weights of the whole set."""

    class Past(DiffoRATrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)

    class Parent(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            sampler = WeightedRandomSampler([1.0] * 24, 24)
            return DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)

    rows = classification_dataset(24).rename_column("label", "labels")
    for cls, text in (
        (Past, r"^Past makes its data loader.*`arch_dataset=`.*class MyTrainer\(DiffoRAMixin, Parent\)"),
        (searching(Parent), r"by a WeightedRandomSampler.*not one of the 21 rows.*3 of 24.*`arch_dataset=`"),
    ):
        with pytest.raises(ValueError, match=text):
            make_trainer(tmp_path, cls=cls, train_dataset=rows).train()
        given = make_trainer(tmp_path, cls=cls, train_dataset=rows, arch_dataset=rows.select(range(8)))
        given.train()
        assert given.selection is not None


def test_iterable_with_a_length_needs_held_out_data(tmp_path: Path) -> None:
    class Sized(IterableDataset):
        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Any:
            return iter(rows_of(24))

    def trainer(**kwargs: Any) -> Any:
        collator = DataCollatorWithPadding(tiny_tokenizer())
        return searching(Trainer)(
            classifier().model,
            arguments(tmp_path),
            train_dataset=Sized(),
            data_collator=collator,
            diffora_config=search_config(),
            **kwargs,
        )

    with pytest.raises(ValueError, match=r"Sized.*in its order.*arch_dataset"):
        trainer().train()
    given = trainer(arch_dataset=rows_of(8))
    given.train()
    assert given.selection is not None
