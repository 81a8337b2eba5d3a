"""What is filled in for a model that comes without LoRA: what is adapted, and what is trained and saved whole."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from diffora_trainer import DiffoRAMixin, DiffoRATrainer
from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.handover import lora_config_of_run
from diffora_trainer.adapters.wrapping import wrap_model
from diffora_trainer.compat.peft import convert_peft_config_for_transformers
from helpers.adapted import base_weights, lora_layers, randomize
from helpers.checks import assert_continues, assert_same
from helpers.data import tiny_tokenizer
from helpers.models import MOE_PARAMETERS, moe
from helpers.speech_models import speech_to_text, whisper
from helpers.tasks import Rows, model_for, rows_for
from helpers.tiny_model import HIDDEN
from helpers.trainers import (
    SAVES,
    VOCABULARY,
    arguments,
    causal_model,
    classifier,
    lora,
    make_trainer,
    saving_trainer,
    search_config,
)


def whole_parts(model: nn.Module) -> set[str]:
    """What is trained besides LoRA, by the name of the child of the base model."""
    names = {n for n, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in n}
    return {name.removeprefix("base_model.model.").partition(".")[0] for name in names}


TASKS = {
    "ForTokenClassification": ["Bert", "Roberta", "DebertaV2", "Llama", "GPT2"],
    "ForQuestionAnswering": ["Bert", "Roberta", "DebertaV2", "Llama", "GPT2"],
    "ForQuestionAnsweringSimple": ["XLNet"],
    "ForMultipleChoice": ["Bert", "DebertaV2"],
    "ForImageClassification": ["ViT"],
    "ForSequenceClassification": ["Roberta", "DebertaV2", "XLNet", "T5"],
}


@pytest.mark.parametrize(("kind", "task"), [(kind, task) for task, kinds in TASKS.items() for kind in kinds])
def test_new_head_is_trained_and_saved_whole(kind: str, task: str, tmp_path: Path) -> None:
    """With the default configuration, and whatever name the head has."""
    model = model_for(kind, task)
    backbone = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    trainer = DiffoRATrainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=rows_for(task),
        diffora_config=search_config(arch_warmup=1, discretize_at=3),
    )
    heads = whole_parts(trainer.model)
    assert heads and not any(name.partition(".")[0] in heads for name in lora_layers(trainer.model, "default"))
    trainer.train()
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)
    trainer.save_model(str(tmp_path / "saved"))

    fresh = model_for(kind, task, seed=1)  # another head
    fresh.base_model.load_state_dict(backbone, strict=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "saved").eval()
    batch = {
        name: value[None].to(trainer.model.device)
        for name, value in rows_for(task)[0].items()
        if name in ("input_ids", "pixel_values")
    }
    trainer.model.eval()
    with torch.no_grad():
        first, second = trainer.model(**batch), loaded(**batch)
    for name in ("start_logits", "end_logits") if "Question" in task else ("logits",):
        assert torch.equal(first[name], second[name])


def test_what_the_user_excludes_stays_excluded() -> None:
    for excluded in (["query"], r".*\.query"):
        given = lora(exclude_modules=excluded)
        model = wrap_model(model_for("Bert", "ForTokenClassification"), given)
        names = lora_layers(model, "default")
        assert len(names) == 10 and not any(name.endswith("query") or name == "classifier" for name in names)
        assert given.exclude_modules == (set(excluded) if isinstance(excluded, list) else excluded)


def test_what_the_user_saves_whole_has_no_lora() -> None:
    model = wrap_model(model_for("Bert", "ForTokenClassification"), lora(modules_to_save=["attention.output.dense"]))
    assert len(lora_layers(model, "default")) == 10


def mixture(kind: str) -> Any:
    """Fused experts; in two of the kinds beside shared ones, whose linear layers have the names that experts had."""
    vocab_size = len(tiny_tokenizer())
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "qwen2_moe":
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=4, shared_expert_intermediate_size=32))
    if kind == "glm4_moe":
        return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, n_routed_experts=4, head_dim=8, first_k_dense_replace=1))
    return moe(vocab_size).model


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_mixture_of_experts(kind: str, named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What can have a gate is adapted, and the rest is named in the log; also if the trainer loads the model."""
    base = mixture(kind)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        trainer = make_trainer(tmp_path, "sft", model=str(tmp_path / "base") if named else base, peft_config=None)
    names = lora_layers(trainer.model, "default")
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    found = {name.rpartition(".")[2] for name in names}
    lines = [record.message for record in caplog.records if "mixture of experts" in record.message]
    if kind == "qwen2_moe":  # PEFT changes nothing for it, so its shared expert can be adapted
        assert found == {*attention, "shared_expert_gate", "gate_proj", "up_proj", "down_proj"} and not lines
    elif convert_peft_config_for_transformers is not None:
        assert found == attention
        assert "gate_up_proj" in lines[0] or "its fused experts" in lines[0]  # older PEFT does not name them
        assert ("mlp.shared_experts.up_proj" in lines[0]) == (kind == "glm4_moe")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    fresh = type(base).from_pretrained(tmp_path / "base", dtype="float32")
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in start.items())
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "saved").eval()
    assert set(lora_layers(loaded, "default")) == set(trainer.selection.selected)
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)


@pytest.mark.parametrize("named", [False, True])
def test_what_peft_refuses_has_no_lora(named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would end the run with an error of `target_modules`, though nobody has named them."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4, **ids)
    )
    if named:
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        trainer = make_trainer(tmp_path, "sft", model=model, peft_config=None)
    found = {name.rpartition(".")[2] for name in find_sites(trainer.model, "default")}
    assert found == {"in_proj", "x_proj", "dt_proj"}
    assert "mixer.out_proj of MambaForCausalLM have no LoRA" in caplog.text


def test_fused_experts_that_the_user_names_are_chosen_among(tmp_path: Path) -> None:
    """Of those that are nested in one module too; and a run is resumed after the choice."""
    config = lora(r=2, target_modules=["q_proj", "v_proj"], target_parameters=MOE_PARAMETERS)

    def build(folder: str) -> Any:
        return saving_trainer(
            tmp_path / folder, "sft", model=moe(VOCABULARY).model, peft_config=config, search={"selection_ratio": 0.5}
        )

    whole = build("whole")
    start = sorted(base_weights(whole.model).items())
    whole.train()
    whole.save_model()
    kept = whole.selection.selected
    assert any("experts" in name for name in whole.selection.modules) and 0 < len(kept) < 8
    assert set(find_sites(whole.model, "default")) == set(kept)
    assert_same(sorted(base_weights(whole.model).items()), start)
    loaded = PeftModel.from_pretrained(moe(VOCABULARY).model, whole.args.output_dir).eval()
    assert set(find_sites(loaded, "default")) == set(kept)
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, whole.model.eval()(**batch).logits)
    assert set(lora_config_of_run(whole).target_parameters or ()) == {name for name in kept if "experts" in name}
    for step in SAVES[1:]:
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


def test_fused_experts_of_a_second_adapter_are_refused(tmp_path: Path) -> None:
    """What is pruned of one adapter would stay for the other, and what is saved would not load."""
    config = lora(r=2, target_modules=["q_proj"], target_parameters=MOE_PARAMETERS, task_type="CAUSAL_LM")
    model = get_peft_model(moe(VOCABULARY).model, config)
    try:
        model.add_adapter("old", copy.deepcopy(config))
    except ValueError:
        pytest.skip("this PEFT holds one adapter of parameters alone")
    model.set_adapter("default")
    with pytest.raises(ValueError, match="a LoRA of the adapter 'old' too.*`merge_and_unload"):
        make_trainer(tmp_path, "sft", model=model, peft_config=None)


def test_the_configuration_of_a_saved_adapter_is_refused_with_its_remedy(tmp_path: Path) -> None:
    get_peft_model(causal_model(), lora()).save_pretrained(tmp_path / "saved")
    config = LoraConfig.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="`inference_mode=True`.*set `config.inference_mode = False`"):
        make_trainer(tmp_path, "sft", peft_config=config)
    config.inference_mode = False
    assert lora_layers(make_trainer(tmp_path, "sft", peft_config=config).model, "default")


@pytest.mark.parametrize("make", [whisper, speech_to_text])
@pytest.mark.parametrize("parent", [Trainer, Seq2SeqTrainer])
def test_models_without_input_ids(make: Any, parent: type[Trainer], tmp_path: Path) -> None:
    """PEFT's class of sequence-to-sequence tasks would pass them `input_ids`, so no task type is filled in."""

    class DiffoRAParent(DiffoRAMixin, parent):  # type: ignore[misc, valid-type]
        pass

    args = arguments(tmp_path, Seq2SeqTrainingArguments if parent is Seq2SeqTrainer else TrainingArguments)
    tiny = make()
    rows = Rows([{name: value[index % 4] for name, value in tiny.batch.items()} for index in range(24)])
    trainer = DiffoRAParent(tiny.model, args, train_dataset=rows, diffora_config=search_config())
    assert len(lora_layers(trainer.model, "default")) == tiny.linear_modules
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make().model, tmp_path / "saved").eval()
    assert set(lora_layers(loaded, "default")) == set(trainer.selection.selected)
    trainer.model.eval()
    with torch.no_grad():
        first, second = loaded(**tiny.batch).logits, trainer.model(**tiny.batch).logits
    assert torch.allclose(first, second, atol=1e-6)  # its convolutions round by where their inputs lie in memory


def test_task_type_that_passes_input_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SEQ_2_SEQ_LM.*Whisper.*input_features.*leave `task_type` out"):
        DiffoRATrainer(whisper().model, arguments(tmp_path), peft_config=lora(task_type="SEQ_2_SEQ_LM"))


@pytest.mark.parametrize("task", ["cls", "sft"])
def test_adapter_that_transformers_has_loaded_is_refused(task: str, tmp_path: Path) -> None:
    """A `PeftAdapterMixin` model is no `PeftModel`: PEFT would put a new LoRA in the place of the trained one."""
    make = (lambda: classifier().model) if task == "cls" else causal_model
    module = "query" if task == "cls" else "q_proj"
    model = make()
    model.add_adapter(lora(target_modules=[module]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = make()
    loaded.load_adapter(str(tmp_path / "adapter"))
    randomize(loaded)  # transformers 5.2 leaves some of an encoder's adapter as it was drawn
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with pytest.raises(ValueError, match=r"load_adapter.*`PeftModel.from_pretrained\(base_model.*`peft_config`"):
        make_trainer(tmp_path, task, model=loaded, peft_config=None)
    assert loaded.state_dict().keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in loaded.state_dict().items())
