"""Heads of tasks without a type in PEFT, and of classes of the user's own: trained, saved whole, and loaded again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Wav2Vec2Config,
    Wav2Vec2ForXVector,
    YolosConfig,
    YolosForObjectDetection,
)

from diffora_trainer import DiffoRATrainer
from diffora_trainer.adapters.wrapping import wrap_model
from helpers.adapted import lora_layers
from helpers.models import llama_config
from helpers.tasks import Rows, model_for, tiny_config
from helpers.tiny_model import HIDDEN, VOCAB
from helpers.trainers import arguments, lora, search_config


LABELS = 3


def two_losses(intent: torch.Tensor, slots: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
    outputs = {"logits": torch.cat([intent[:, None].expand(-1, slots.shape[1], -1), slots], -1)}
    if labels is None:
        return outputs
    expected = labels[:, None].expand(-1, slots.shape[1]).flatten()
    losses = [nn.functional.cross_entropy(intent, labels), nn.functional.cross_entropy(slots.flatten(0, 1), expected)]
    return {"loss": torch.stack(losses).sum(), **outputs}


class JointIntentAndSlots(BertPreTrainedModel):
    """As in a user's script: two heads on the encoder of a pre-trained model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.heads = nn.ModuleDict({"intent": nn.Linear(HIDDEN, LABELS)})
        self.slots = nn.Linear(HIDDEN, LABELS)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        states = self.bert(input_ids).last_hidden_state
        return two_losses(self.heads["intent"](states[:, 0]), self.slots(states), labels)


class PlainModule(nn.Module):
    """The same without the classes of transformers around it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = BertModel(config)
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, LABELS), nn.Sequential(nn.Tanh(), nn.Linear(HIDDEN, LABELS))])

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        states = self.encoder(input_ids).last_hidden_state
        return two_losses(self.heads[0](states[:, 0]), self.heads[1](states), labels)


class Smoothed(BertForSequenceClassification):
    """A loss of the user's own, and so a class whose name says nothing."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class WithValueHead(LlamaForCausalLM):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.value = nn.Linear(HIDDEN, 1)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        states = self.model(input_ids).last_hidden_state
        values = self.value(states)[:, -1]
        logits = torch.cat([self.lm_head(states)[:, -1], values], -1)
        loss = None if labels is None else nn.functional.mse_loss(values[:, 0], labels.float())
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def segmenter() -> Any:
    sizes: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    sizes |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=LABELS))


def detector() -> Any:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5}
    return YolosForObjectDetection(YolosConfig(**sizes, num_labels=LABELS, use_mid_position_embeddings=False))


def speaker_embedder() -> Any:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    sizes |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes |= {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 16}
    return Wav2Vec2ForXVector(Wav2Vec2Config(**sizes, mask_time_prob=0.0, num_labels=LABELS))


GENERATOR = torch.Generator().manual_seed(0)


def text_row(index: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (7,), generator=GENERATOR)
    return {"input_ids": torch.cat([ids, torch.tensor([2])]), "labels": torch.tensor(index % 2)}


def segmentation_row(index: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, LABELS, (32, 32), generator=GENERATOR)
    return {"pixel_values": torch.randn(3, 32, 32, generator=GENERATOR), "labels": labels}


def detection_row(index: int) -> dict[str, Any]:
    labels = {"class_labels": torch.tensor([index % LABELS]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return {"pixel_values": torch.randn(3, 32, 32, generator=GENERATOR), "labels": labels}


def speech_row(index: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(800, generator=GENERATOR), "labels": torch.tensor(index % LABELS)}


def collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": [r["labels"] for r in rows]}


# Model, row, where the backbone is, the heads, and whether they are found by the class being the user's.
CASES: dict[str, tuple[Any, Any, str, list[str], bool]] = {
    "two-heads": (
        lambda: JointIntentAndSlots(tiny_config("Bert")),
        text_row,
        "bert",
        ["heads.intent", "slots"],
        True,
    ),
    "plain-module": (lambda: PlainModule(tiny_config("Bert")), text_row, "encoder", ["heads.0", "heads.1"], True),
    "loss-of-its-own": (lambda: Smoothed(tiny_config("Bert")), text_row, "bert", ["classifier"], False),
    "value-head": (lambda: WithValueHead(llama_config()), text_row, "model", ["value"], True),
    "segmentation": (segmenter, segmentation_row, "segformer", ["decode_head"], False),
    "object-detection": (
        detector,
        detection_row,
        "vit",
        ["bbox_predictor", "class_labels_classifier"],
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_heads_are_trained_and_saved_whole(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, row, backbone, heads, own = CASES[name]
    if name == "object-detection":
        pytest.importorskip("scipy", reason="its loss matches boxes with SciPy")
    torch.manual_seed(0)
    model = make()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.split(".")[0] not in heads}
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        trainer = DiffoRATrainer(
            model,
            arguments(tmp_path, max_steps=4, remove_unused_columns=False),
            train_dataset=Rows([row(index) for index in range(24)]),
            data_collator=collate_images if row is detection_row else None,
            diffora_config=search_config(arch_warmup=1, discretize_at=3),
        )
    lines = [record.message for record in caplog.records if "stand beside its pre-trained model" in record.message]
    assert len(lines) == own and all(", ".join(heads) in line for line in lines)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all(any(f".{head}." in name for name in trained) for head in heads)
    assert all(any(f".{head}." in name for head in heads) for name in trained)
    adapted = lora_layers(trainer.model, "default")
    assert adapted and all(name.startswith((f"{backbone}.", "lm_head")) for name in adapted)
    trainer.train()
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)
    trainer.save_model(str(tmp_path / "saved"))

    torch.manual_seed(1)
    fresh = make()  # other heads
    fresh.load_state_dict({key: tensor for key, tensor in start.items() if key.startswith(backbone)}, strict=False)
    if name == "value-head":
        fresh.lm_head.load_state_dict({"weight": start["lm_head.weight"]})
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "saved").eval()
    given = {key: value[None] for key, value in row(0).items() if key != "labels"}
    trainer.model.cpu().eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(**given)["logits"], loaded(**given)["logits"])


def test_what_cannot_be_saved_whole_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A name that a module of the backbone ends with too, a parameter of the model itself, a module in two places."""

    class Crowded(PlainModule):
        def __init__(self) -> None:
            super().__init__(tiny_config("Bert"))
            self.query, self.scale = nn.Linear(HIDDEN, LABELS), nn.Parameter(torch.ones(1))
            self.first = self.second = nn.Linear(HIDDEN, LABELS)

    with caplog.at_level(logging.INFO, "diffora_trainer"):
        wrap_model(Crowded(), lora())
        wrap_model(speaker_embedder(), lora(target_modules="all-linear"))
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert "scale, query, first of Crowded stand beside" in warned[0] and "modules_to_save" in warned[0]
    assert "feature_extractor of Wav2Vec2ForXVector stand beside" in warned[1]


@pytest.mark.parametrize("named", [[], ["slots"]])
def test_what_the_user_names_is_taken_at_its_word(named: list[str], caplog: pytest.LogCaptureFixture) -> None:
    given = lora(target_modules="all-linear", modules_to_save=named)
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        model = wrap_model(JointIntentAndSlots(tiny_config("Bert")), given)
    assert model.peft_config["default"].modules_to_save == named and given.modules_to_save == named
    assert {"heads.intent", "slots"} - set(lora_layers(model, "default")) == set(named)
    assert not caplog.records


def test_a_second_model_and_a_masked_lm_of_ones_own_have_lora() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model_for("Bert", "Model"), model_for("Bert", "ForMaskedLM")

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.first(input_ids).last_hidden_state

    class Own(type(model_for("Bert", "ForMaskedLM"))):  # type: ignore[misc]
        pass

    for model in (TwoTowers(), Own(tiny_config("Bert"))):
        wrapped = wrap_model(model, lora(target_modules="all-linear"))
        assert not wrapped.peft_config["default"].modules_to_save
        assert any(name.endswith("predictions.transform.dense") for name in lora_layers(wrapped, "default"))
