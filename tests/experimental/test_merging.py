"""Shortcuts that can be merged become a plain model of the same function, and all others are refused untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig, DistilBertConfig
from transformers import DistilBertForSequenceClassification as DistilBert
from transformers.activations import ACT2FN

from diffora_trainer import ShortcutConfig, ShortcutModel, add_shortcuts
from diffora_trainer.experimental.shortcuts.hooks import LayerShortcuts
from diffora_trainer.experimental.shortcuts.shortcuts import keep_shortcuts, shortcuts
from helpers.checks import assert_same, snapshot
from helpers.models import bert, deberta_v2, llama, opt, opt_post_norm, roberta, vit
from helpers.processes import elsewhere
from helpers.quantized import PackedLinear
from helpers.shortcuts import filled, hooks, result
from helpers.tiny_model import HIDDEN, PAD, VOCAB, TinyModel
from helpers.trainers import lora, make_trainer


RANK = 3


def distilbert() -> TinyModel:
    """Norms after the sums that are children of the layer, and a feed-forward that is a module."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, hidden_dim=2 * HIDDEN, n_layers=2, n_heads=4, pad_token_id=PAD
    )
    config.initializer_range = 0.2
    return TinyModel(DistilBert(config), bert().batch, ["q_lin", "v_lin", "lin1", "lin2"], "SEQ_CLS", 2, 6)


# The width of the feed-forward in the configuration, and its first and second matrix in a layer.
MODELS: dict[str, tuple[Callable[[], TinyModel], str, str, str]] = {
    "bert": (bert, "intermediate_size", "intermediate.dense", "output.dense"),
    "roberta": (roberta, "intermediate_size", "intermediate.dense", "output.dense"),
    "deberta_v2": (deberta_v2, "intermediate_size", "intermediate.dense", "output.dense"),
    "opt_post_norm": (opt_post_norm, "ffn_dim", "fc1", "fc2"),
    "distilbert": (distilbert, "hidden_dim", "ffn.lin1", "ffn.lin2"),
}
RESIDUAL2 = ShortcutConfig(r=RANK, lora_alpha=5, kinds=("residual2",))


def with_shortcuts(tiny: TinyModel, adapted: bool, config: ShortcutConfig = RESIDUAL2) -> ShortcutModel:
    """A model with shortcuts that do something and, if adapted, a LoRA on all linear layers that does too."""
    model: nn.Module = tiny.model
    if adapted:
        model = get_peft_model(
            model, lora(init_lora_weights=False, target_modules=tiny.target_modules, task_type=tiny.task_type)
        )
    return ShortcutModel(filled(model, config)).eval()


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_is_plain_and_gives_the_same(name: str, adapted: bool) -> None:
    make, key, first, second = MODELS[name]
    tiny = make()
    plain_class, without, count = type(tiny.model), result(tiny.model.eval(), tiny.batch), hooks(tiny.model)
    model = with_shortcuts(tiny, adapted)
    expected = result(model, tiny.batch)
    assert (expected["logits"] - without["logits"]).abs().max() > 0.01, "what is merged does nothing"
    model.train()
    model(**tiny.batch).loss.backward()
    before, found, state = snapshot(model), modes(model), torch.get_rng_state()

    merged = model.merge_and_unload()

    assert_same(snapshot(model), before)
    assert modes(model) == found and torch.equal(torch.get_rng_state(), state)
    assert type(merged) is plain_class and all(modes(merged)) and hooks(merged) == count
    torch.testing.assert_close(result(merged.eval(), tiny.batch), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, LayerShortcuts) for module in merged.modules())
    names = [n for n, _ in merged.named_parameters()]
    assert not any("lora_" in n or "diffora" in n for n in names) and names == [
        n for n, _ in make().model.named_parameters()
    ]
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert all(p.grad is None for p in merged.parameters()) and any(p.grad is not None for p in model.parameters())
    width = 2 * HIDDEN + 2 * RANK
    assert getattr(merged.config, key) == width
    layers = [module for module in merged.modules() if type(module).__name__.endswith(("Layer", "Block"))]
    assert len(layers) == tiny.rows
    for layer in layers:
        one, two = layer.get_submodule(first), layer.get_submodule(second)
        assert (one.out_features, two.in_features) == (width, width)
        assert one.weight.shape == (width, HIDDEN) and two.weight.shape == (HIDDEN, width)
    assert_same(result(model.eval(), tiny.batch), expected)


def test_what_is_saved_loads_without_this_package_and_peft(tmp_path: Path) -> None:
    for name, (make, *_) in MODELS.items():
        tiny = make()
        model = with_shortcuts(tiny, adapted=True)
        model.merge_and_unload().save_pretrained(tmp_path / name)
        save_file({**tiny.batch, "expected": result(model, tiny.batch)["logits"]}, tmp_path / name / "expected.st")
        (tmp_path / name / "class.json").write_text(json.dumps(type(tiny.model).__name__))
    program = """
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
report = {}
for folder in Path(jobs).iterdir():
    cls = getattr(transformers, json.loads((folder / "class.json").read_text()))
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    batch = load_file(folder / "expected.st")
    expected = batch.pop("expected")
    with torch.no_grad():
        report[folder.name] = (model.eval()(**batch).logits - expected).abs().max().item()
"""
    off = elsewhere(program, str(tmp_path), tmp_path.parent, missing=("diffora_trainer", "peft"))
    assert set(off) == set(MODELS) and max(off.values()) < 1e-5, off


@pytest.mark.parametrize("cut", [False, True])
def test_layers_without_a_shortcut_get_units_that_do_nothing(cut: bool) -> None:
    tiny = bert()
    name = "bert.encoder.layer.1.residual2"
    if cut:
        model = with_shortcuts(tiny, adapted=True, config=ShortcutConfig(r=RANK))
        keep_shortcuts(model.model, [name])
    else:
        config = ShortcutConfig(r=RANK, kinds=("residual2",), names=(name,))
        model = with_shortcuts(tiny, adapted=True, config=config)
    shortcut = shortcuts(model.model)[name]
    merged = model.merge_and_unload()
    torch.testing.assert_close(result(merged, tiny.batch), result(model, tiny.batch), rtol=1e-5, atol=1e-5)
    for index, layer in enumerate(merged.bert.encoder.layer):
        rows, bias = layer.intermediate.dense.weight[-2 * RANK :], layer.intermediate.dense.bias[-2 * RANK :]
        columns = layer.output.dense.weight[:, -2 * RANK :]
        assert not bias.any() and rows.any() == columns.any() == (index == 1)
    torch.testing.assert_close(rows, torch.cat([shortcut.A, -shortcut.A]))
    scaled = shortcut.B * 16 / RANK
    torch.testing.assert_close(columns, torch.cat([scaled, -scaled], dim=1))


def test_a_shortcut_that_is_switched_off_stays_off() -> None:
    tiny = bert()
    model = with_shortcuts(tiny, adapted=False)
    shortcuts(model.model)["bert.encoder.layer.0.residual2"].enabled = False
    merged = model.merge_and_unload()
    torch.testing.assert_close(result(merged, tiny.batch), result(model, tiny.batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu", "silu"]
    + [name for name in ("hardswish", "leaky_relu", "linear", "prelu") if name in ACT2FN],
)
def test_each_activation_that_can_be_merged(activation: str) -> None:
    tiny = bert()
    config = tiny.model.config
    config.hidden_act = activation
    tiny.model = BertForSequenceClassification(config)
    model = with_shortcuts(tiny, adapted=False)
    merged = model.merge_and_unload()
    torch.testing.assert_close(result(merged, tiny.batch), result(model, tiny.batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "mish", "relu2", "relu6", "gelu_10", "laplace"])
def test_each_activation_that_cannot(activation: str) -> None:
    tiny = bert()
    config = tiny.model.config
    config.hidden_act = activation
    tiny.model = BertForSequenceClassification(config)
    refused(with_shortcuts(tiny, True), tiny, r"layer\.\{0,1\}\.residual2 \(the activation \w+ has no g\(u\)")


def refused(model: ShortcutModel, tiny: TinyModel, message: str) -> None:
    """The merge is refused, and the model is what it was, bit for bit."""
    model.train()
    before, found, count = snapshot(model), modes(model), hooks(model)
    expected, config = result(model, tiny.batch), tiny.model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    assert_same(snapshot(model), before)
    assert modes(model) == found and hooks(model) == count and tiny.model.config.to_dict() == config
    assert_same(result(model, tiny.batch), expected)


PRE_NORM = r"residual2 \(the layer is pre-norm"
ALL = (
    r"layer\.\{0,1\}\.residual1 \(passes by the attention.*layer\.\{0,1\}\.shortcut1 \(passes by all of the layer.*"
    r"layer\.1\.shortcut2 \(comes from the layer before, past its norms\)\. Please keep"
)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (bert, {}, ALL),
        (
            bert,
            {"names": ("bert.encoder.layer.0.residual2", "bert.encoder.layer.1.residual1")},
            r"layer\.1\.residual1",
        ),
        (opt, {"kinds": ("residual2",)}, PRE_NORM),
        (opt, {}, r"residual1 \(passes.*shortcut1 \(.*shortcut2 \(.*" + PRE_NORM),
        (llama, {"kinds": ("residual2",)}, PRE_NORM),
    ],
)
def test_what_cannot_be_merged_is_named_and_nothing_changed(
    make: Callable[[], TinyModel], options: dict[str, object], message: str, adapted: bool
) -> None:
    tiny = make()
    refused(with_shortcuts(tiny, adapted, ShortcutConfig(r=RANK, **options)), tiny, message)


@pytest.mark.parametrize("make", [opt, llama])
def test_a_model_that_has_not_run_yet_is_known_to_be_pre_norm(make: Callable[[], TinyModel]) -> None:
    with pytest.raises(ValueError, match=PRE_NORM):
        with_shortcuts(make(), False).merge_and_unload()


def test_what_reads_no_tokens_is_refused_for_what_is_known() -> None:
    with pytest.raises(ValueError, match="not known to be two linear layers|could not be run on token ids"):
        with_shortcuts(vit(), False).merge_and_unload()


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    tiny = bert()
    tiny.model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    tiny.model = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=quantization)
    with pytest.raises(ValueError, match="is quantized"):
        with_shortcuts(tiny, False).merge_and_unload()

    tiny = bert()
    layer = tiny.model.bert.encoder.layer[0]
    layer.output.dense = PackedLinear(layer.output.dense)
    config = ShortcutConfig(r=RANK, kinds=("residual2",), names=("bert.encoder.layer.1.residual2",))
    refused(
        with_shortcuts(tiny, False, config),
        tiny,
        r"layer\.0 \(the feed-forward has quantized.*PackedLinear\)\. Please",
    )


def test_what_acts_beside_the_weights_is_noticed() -> None:
    tiny = bert()
    model = with_shortcuts(tiny, adapted=True)
    shortcut = next(iter(shortcuts(model.model).values()))
    handle = shortcut.register_forward_hook(lambda module, inputs, output: 1.001 * output)  # as a gate does
    refused(model, tiny, "is not the same function: .* off by")
    handle.remove()
    with torch.no_grad():
        shortcut.A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"off by inf.*not finite"):
        model.merge_and_unload()
    with torch.no_grad():
        shortcut.A[0, 0] = 0
    assert isinstance(model.merge_and_unload(), BertForSequenceClassification)


def test_layers_of_another_width_than_the_configuration_are_refused() -> None:
    tiny = bert()
    layer = tiny.model.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(HIDDEN, 7), nn.Linear(7, HIDDEN)
    refused(with_shortcuts(tiny, False), tiny, r"is \(13, 32\), and its configuration, with `intermediate_size=70`")


def test_bad_use_is_refused() -> None:
    tiny = bert()
    model = with_shortcuts(tiny, adapted=True)
    with model.model.disable_adapter(), pytest.raises(ValueError, match="outside of it"):
        model.merge_and_unload()
    prompts = get_peft_model(bert().model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot be merged by `merge_and_unload`"):
        ShortcutModel(prompts, RESIDUAL2).merge_and_unload()
    inside = bert().model
    inside.add_adapter(lora())
    with pytest.raises(ValueError, match="cannot be merged by `merge_and_unload`"):
        ShortcutModel(inside, RESIDUAL2).merge_and_unload()
    foreign = nn.Sequential()
    foreign.add_module("model", bert().model)
    add_shortcuts(foreign, RESIDUAL2)
    with pytest.raises(ValueError, match="You passed a Sequential"):
        ShortcutModel(foreign).merge_and_unload()


@pytest.mark.parametrize("adapted", [False, True])
def test_half_precision_is_rounded_once(adapted: bool) -> None:
    tiny = bert()
    tiny.model.bfloat16()
    model = with_shortcuts(tiny, adapted)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    shortcut = shortcuts(model.model)["bert.encoder.layer.1.residual2"]
    assert shortcut.A.dtype == (torch.float32 if adapted else torch.bfloat16)
    layer = merged.bert.encoder.layer[1]
    scaled = (shortcut.B.double() * 5 / RANK).bfloat16()
    assert torch.equal(layer.output.dense.weight[:, -2 * RANK :], torch.cat([scaled, -scaled], dim=1))
    rows = shortcut.A.bfloat16()
    assert torch.equal(layer.intermediate.dense.weight[-2 * RANK :], torch.cat([rows, -rows]))
    off = (result(merged, tiny.batch)["logits"] - result(model, tiny.batch)["logits"]).abs().max()
    assert off < 0.05, off


def test_the_merged_model_generates_the_same() -> None:
    tiny = opt_post_norm()
    model = with_shortcuts(tiny, adapted=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    ids = tiny.batch["input_ids"][:2, :5]
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, **settings), model.generate(input_ids=ids, **settings))


def test_what_a_search_has_kept_is_merged(tmp_path: Path) -> None:
    search = {"shortcuts": ["residual2"], "shortcut_ranking": "separated", "selection_scope": "model"}
    trainer = make_trainer(tmp_path, search=search)
    trainer.train()
    assert isinstance(trainer.model, PeftModel) and len(shortcuts(trainer.model)) == 1, "nothing was chosen"
    model = ShortcutModel(trainer.model).eval()
    rows = trainer.data_collator([{k: row[k] for k in ("input_ids", "label")} for row in trainer.train_dataset])
    expected = result(model, rows)
    torch.testing.assert_close(result(model.merge_and_unload(), rows), expected, rtol=1e-5, atol=1e-5)
