"""The zero-cost scores: their formulas, that they leave no trace, and the runs that are cut by them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CUT,
    WARMUP,
    adapter,
    assert_continues,
    assert_same,
    classifier,
    lora,
    make_trainer,
    search_config,
    step_logs,
)
from datasets import Dataset
from models import bert, gpt2, llama, opt
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_resume import SAVES, build
from tokenizer import lm_dataset
from torch import Tensor, nn
from transformers import HfArgumentParser, Trainer, TrainerCallback
from trl import SFTConfig, TrlParser

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, Selection
from diffora_trainer.adapters.grid import ModuleGrid
from diffora_trainer.config import METHODS
from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.matrix import ScoreMatrix


SCORES = METHODS[1:-1]


def warm(tiny: Any = None, spread: float = 0.3) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model whose `lora_B` is no longer 0, and three batches for it."""
    tiny = tiny or llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=spread * float(torch.rand(())))
    batches = [{key: value[[i, i + 1]] for key, value in tiny.batch.items()} for i in range(3)]
    return model, batches


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def make_search(model: nn.Module, method: str, loss_fn: Any = model_loss, **options: Any) -> ArchitectureSearch:
    keywords = {name: options.pop(name) for name in ("score_function", "loss_scale", "reduce") if name in options}
    search = ArchitectureSearch(model, DiffoRAConfig(method=method, **options), loss_fn=loss_fn, **keywords)
    search.begin()
    return search


def pairs(model: nn.Module) -> list[list[nn.Parameter]]:
    """`lora_A` and `lora_B` of each module in the grid's order, by their names."""
    weights = dict(model.named_parameters())
    names = ModuleGrid.from_model(model).names
    return [[weights[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB"] for name in names]


def by_hand(
    method: str,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    matrices: Callable[[nn.Module], list[list[nn.Parameter]]] = pairs,
) -> list[float]:
    """The formula for the pairs of matrices on a copy of the model, with `backward`."""
    model = copy.deepcopy(model).eval()
    if method == "synflow":
        for tensor in model.state_dict().values():
            tensor.abs_()
        size = model.get_input_embeddings().embedding_dim
        # A length of 32, or half of the positions that the model has.
        length = min(32, model.config.max_position_embeddings // 2)
        output = model(inputs_embeds=torch.ones(1, length, size), attention_mask=torch.ones(1, length).long())
        output.logits.sum().backward()
    else:
        (sum(model_loss(model, batch) for batch in batches) / len(batches)).backward()
    if method == "grad_norm":
        return [sum(float(w.grad.norm()) for w in pair) for pair in matrices(model)]
    return [sum((w * w.grad).abs().sum().item() for w in pair) for pair in matrices(model)]


@pytest.mark.parametrize("kind", [llama, bert, opt, gpt2])
@pytest.mark.parametrize("method", ["grad_norm", "snip", "synflow"])
def test_gradient_formulas(method: str, kind: Any) -> None:
    model, batches = warm(kind())
    search = make_search(model, method, loss_scale=lambda: 1024.0)
    expected = torch.tensor(by_hand(method, model, batches), dtype=torch.float64)
    assert len(expected.unique()) > len(expected) // 2
    model.train()
    torch.testing.assert_close(search.score(batches), expected, rtol=1e-4, atol=float(expected.max()) * 1e-6)

    normal = make_search(model, method, normalize_scores=True)
    sizes = torch.tensor(search.grid.parameters)
    assert len(sizes.unique()) > 1
    torch.testing.assert_close(normal.score(batches), expected / sizes, rtol=1e-4, atol=float(expected.max()) * 1e-8)


def test_alpha_test_is_the_smallest_multiplier_within_the_tolerance() -> None:
    tiny = llama()
    model, batches = warm(tiny, spread=1.0)
    # Teach it, so that what the LoRA adds is worth something.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        model_loss(model, tiny.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    search = make_search(model, "alpha_test")
    found = search.score(batches)

    plain = copy.deepcopy(model).eval()

    @torch.no_grad()
    def loss(scale: dict[int, float]) -> float:
        kept = [pair[1].clone() for pair in pairs(plain)]
        for index, factor in scale.items():
            pairs(plain)[index][1].mul_(factor)
        value = float(sum(model_loss(plain, batch) for batch in batches) / len(batches))
        for pair, weight in zip(pairs(plain), kept, strict=True):
            pair[1].copy_(weight)
        return value

    count = len(search.grid)
    tolerance = (loss(dict.fromkeys(range(count), 0.0)) - loss({})) / count
    assert tolerance > 0
    expected = [
        next(a / 10 for a in range(11) if a == 10 or loss({index: a / 10}) <= loss({}) + tolerance)
        for index in range(count)
    ]
    assert found.tolist() == expected and len(set(expected)) > 2
    # Of modules with equal scores those without which the loss rises most are kept.
    rises = [loss({index: 0.0}) for index in range(count)]
    order = sorted(range(count), key=lambda index: (-expected[index], -rises[index]))
    search = make_search(model, "alpha_test", selection_scope="model", selection_ratio=0.5)
    search.score(batches)
    kept = search.select().kept
    assert {index for index in range(count) if kept[index]} == set(order[: count // 2])


def test_constant_is_a_seeded_random_order() -> None:
    model, batches = warm()
    orders = [
        tuple(make_search(model, "constant", arch_seed=seed).score(batches).argsort().tolist()) for seed in (0, 1, 2)
    ]
    again = make_search(model, "constant", arch_seed=1).score(batches)
    assert len(set(orders)) == 3 and tuple(again.argsort().tolist()) == orders[1]


def bits(tensor: Tensor) -> Tensor:
    """With the sign of a zero, which `torch.equal` does not see."""
    return tensor.detach().clone().view(torch.int32) if tensor.dtype == torch.float32 else tensor.detach().clone()


class Planned(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "fails"),
    [(method, fails) for method in METHODS[1:] for fails in (False, True) if method != "constant" or not fails],
)
def test_scoring_leaves_no_trace(method: str, fails: bool) -> None:
    model, batches = warm(bert())
    with torch.no_grad():  # zeros of either sign, in the base model and in the LoRA
        for pair in pairs(model):
            pair[0][0].fill_(-0.0)
        for parameter in model.parameters():
            parameter.view(-1)[0] = -0.0
    calls = 0

    def count_down() -> None:
        nonlocal calls
        calls += 1
        if fails and calls == 2:
            raise Planned

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        count_down()
        return model_loss(model, batch) + 0 * (torch.rand(()) + random.random() + float(np.random.rand()))

    def backward_everywhere(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
        for batch in batches:
            noisy(model, batch).backward()
        scores = {n: w.grad.norm() for n, w in model.named_parameters() if ".lora_B" in n}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        return {name.partition(".lora_B")[0]: score for name, score in scores.items()}

    function = {"score_function": backward_everywhere} if method == "custom" else {}
    search = make_search(model, method, loss_fn=noisy, **function)
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).eval()
    model_loss(model, batches[0]).backward()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    gradients = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    calls = 0
    if method == "synflow":  # it calls no loss function
        for name, module in model.named_modules():
            if name.endswith("intermediate.dense"):
                module.register_forward_hook(lambda *_: count_down())

    if fails:
        with pytest.raises(Planned):
            search.score(batches)
        assert calls == 2
    else:
        search.score(batches)

    assert_same({name: bits(tensor) for name, tensor in model.state_dict().items()}, state)
    for name, parameter in model.named_parameters():
        gradient, value = gradients[name]
        assert parameter.grad is gradient and (value is None or gradient.equal(value)), name
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.get_rng_state().equal(streams[0]) and random.getstate() == streams[1]
    assert (np.random.get_state()[1] == streams[2]).all()  # type: ignore[index]
    assert search.gates._evaluation is None and search.gates._training is None
    assert bool(search.matrix.steps) != fails


def test_dropout_is_off_also_where_activations_are_checkpointed() -> None:
    tiny = llama()
    tiny.model.config.attention_dropout = 0.5
    for layer in tiny.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model, batches = warm(tiny)
    plain = make_search(model, "snip").score(batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    search = make_search(model, "snip")
    passes = []
    model.base_model.model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    assert_same(search.score(batches), plain)
    assert len(passes) == 2 * len(batches)  # forward, and once more in the backward pass


def test_what_decides_between_equal_scores_is_enough() -> None:
    # ALPHA-TEST gives every module 0 when each of them alone can be spared; the rises of the loss still differ.
    matrix = ScoreMatrix(Budget([0] * 4, [1] * 4, ratio=0.5))
    matrix.set_scores(torch.zeros(4), torch.tensor([0.1, 0.3, 0.0, 0.2]))
    assert matrix.choose().tolist() == [False, True, False, True] and not matrix.num_boundary_ties()
    with pytest.raises(ValueError, match="nothing to choose by"):
        matrix.set_scores(torch.zeros(4), torch.full((4,), 0.1))


@pytest.mark.parametrize("method", ["snip", "synflow", "custom"])
def test_scores_that_tie_choose_nothing(method: str) -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules))  # lora_B is 0
    function = {"score_function": lambda model, batches: dict.fromkeys(ModuleGrid.from_model(model).names, 2)}
    search = make_search(model, method, **(function if method == "custom" else {}))
    value = 2 if method == "custom" else 0
    with pytest.raises(ValueError, match=f"All 14 modules have the score {value}, .*score later"):
        search.score([tiny.batch])
    with pytest.raises(ValueError, match="no scores yet"):
        search.finish()


def test_ties_at_the_edge_of_the_choice_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    matrix = ScoreMatrix(Budget([0, 0, 0, 1, 1, 1], [1] * 6, ratio=0.5))  # keeps two of three in each row
    matrix.set_scores(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0]), torch.zeros(6))
    assert matrix.choose().tolist() == [True, True, False, True, True, False] and matrix.num_boundary_ties() == 2
    matrix.set_scores(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0]), torch.arange(6.0))
    assert matrix.choose().tolist() == [True, False, True, True, True, False] and matrix.num_boundary_ties() == 0

    def nearly_equal(model: nn.Module, batches: list[Any]) -> dict[str, int]:
        return {name: int(index == 5) for index, name in enumerate(ModuleGrid.from_model(model).names)}

    search = {"method": "custom", "selection_scope": "model"}
    make_trainer(tmp_path, score_function=nearly_equal, search=search).train()
    assert "12 modules at the edge of the choice have equal scores" in caplog.text


def test_scores_that_are_not_finite_are_refused() -> None:
    model, batches = warm()
    search = make_search(model, "grad_norm", loss_fn=lambda model, batch: model_loss(model, batch) * float("nan"))
    with pytest.raises(ValueError, match="14 of 14 modules by `method='grad_norm'` are not finite"):
        search.score(batches)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1e38)
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite.*synflow.*float32"):
        make_search(model, "synflow").score(batches)
    assert_same({name: bits(tensor) for name, tensor in model.state_dict().items()}, state)


def test_what_cannot_be_scored_is_refused() -> None:
    model, batches = warm()
    with pytest.raises(ValueError, match="depends on no weight"):
        make_search(model, "snip", loss_fn=lambda model, batch: torch.zeros(())).score(batches)
    with pytest.raises(ValueError, match="no batch"):
        make_search(model, "snip").score([])
    with pytest.raises(ValueError, match="call `step`"):
        make_search(model, "diffora").score(batches)
    with pytest.raises(ValueError, match="call `score`"):
        make_search(model, "snip").step(batches[0])
    quantized = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.base_model.model.lm_head.weight = quantized
    with pytest.raises(ValueError, match="lm_head.weight' is of torch.uint8, as quantized"):
        make_search(model, "synflow").score(batches)
    model.get_input_embeddings().embedding_dim = None
    with pytest.raises(ValueError, match="no token embeddings"):
        make_search(model, "synflow").score(batches)


@pytest.mark.parametrize("task", ["cls", "sft"])
@pytest.mark.parametrize("method", SCORES)
def test_run(method: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules train as in a run of plain LoRA, the best-scored go on, and the adapter is plain PEFT."""
    seen: list[Tensor] = []
    take = ScoreMatrix.set_scores
    monkeypatch.setattr(ScoreMatrix, "set_scores", lambda self, s, t: (seen.append(s.clone()), take(self, s, t))[1])
    trainer = make_trainer(tmp_path, task, search={"method": method, "selection_scope": "model", "arch_warmup": 0})
    names = ModuleGrid.from_model(trainer.model).names
    trainer.train()
    trainer.save_model()

    selection = trainer.selection
    assert selection is not None and selection == Selection.load(tmp_path)
    assert selection.step == CUT and selection.config["method"] == method
    assert len(seen) == 1 and selection.scores == tuple(seen[0].tolist()) and set(selection.gates) == {1.0}
    by_score = dict(zip(names, selection.scores, strict=True))
    assert min(by_score[name] for name in selection.selected) >= max(by_score[name] for name in selection.dropped)
    assert len(selection.selected) == (len(names) + 1) // 2
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in saved if ".lora_" in key} == set(
        selection.selected
    )
    logs = step_logs(trainer)
    assert not [key for step, log in logs.items() if step != CUT for key in log if key.startswith("diffora")]
    assert logs[CUT]["diffora/score_max"] == max(selection.scores)
    assert not [key for key in logs[CUT] if key.startswith(("diffora/gate", "diffora/entropy"))]
    card = (tmp_path / "README.md").read_text()
    assert ("2406.14956" in card) == (method != "constant") and "2502.08905" not in card
    assert "| `method` |" in card and "relaxation" not in card
    assert (tmp_path / "dam.png").stat().st_size > 1000


def test_scoring_leaves_no_trace_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one and the same choice the runs of all methods are one run, in the middle of an epoch, with dropout."""
    monkeypatch.setattr(ScoreMatrix, "choose", lambda self: torch.arange(len(self.budget)) % 2 == 0)

    def run(method: str) -> tuple[Any, Any]:
        trainer = make_trainer(
            tmp_path / method,
            "sft",
            args={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            search={"method": method},
        )
        trainer.train()
        return step_logs(trainer, ("diffora/score",)), adapter(trainer.model)

    expected = run("constant")
    for method in ("grad_norm", "snip", "synflow", "alpha_test"):
        assert_same(run(method), expected, method)


@pytest.mark.parametrize(("task", "method"), [("cls", "alpha_test"), ("sft", "snip")])
def test_resumed_run_is_the_uninterrupted_run(task: str, method: str, tmp_path: Path) -> None:
    search = {"method": method, "cost": "parameters"}
    whole = build(tmp_path / "whole", task, 2, search=search)
    whole.train()
    for step in SAVES:
        checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
        state = json.loads(Path(checkpoint, "diffora_state.json").read_text())
        assert state["phase"] == ("warm-up" if step < CUT else "selected")
        resumed = build(tmp_path / str(step), task, 2, search=search)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_continues(resumed, whole, step)


def test_scored_after_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search={"method": "snip", "discretize_at": 1})
    trainer.train()
    assert trainer.selection.step == 1


@pytest.mark.parametrize("cost", ["parameters", "time"])
def test_scored_before_the_first_step(cost: str, tmp_path: Path) -> None:
    """Of an adapter that was trained before: the run is one of a plain LoRA of the chosen modules, from the start."""
    state = get_peft_model(classifier().model, lora(task_type="SEQ_CLS", init_lora_weights=False)).state_dict()

    def warmed() -> PeftModel:
        model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
        model.load_state_dict(state)
        return model

    def run(folder: str, method: str, **kwargs: Any) -> Any:
        options = {"method": method, "discretize_at": 0, "selection_scope": "model", "cost": cost}
        args = {"save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(tmp_path / folder, peft_config=None, args=args, search=options, **kwargs)
        trainer.train(resume_from_checkpoint=kwargs.get("resume"))
        return trainer

    trainer = run("snip", "snip", model=warmed())
    selection = trainer.selection
    assert selection.step == 0 and len(selection.selected) < len(selection.modules)
    stock = get_peft_model(classifier().model, lora(task_type="SEQ_CLS", target_modules=list(selection.selected)))
    stock.load_state_dict({name: state.get(name, state.get(_unwrapped(name))) for name in stock.state_dict()})
    plain = make_trainer(tmp_path / "plain", model=stock, cls=Trainer)
    plain.train()
    assert_same(adapter(trainer.model), adapter(plain.model))
    resumed = make_trainer(
        tmp_path / "resumed",
        model=warmed(),
        peft_config=None,
        search={"method": "snip", "discretize_at": 0, "selection_scope": "model", "cost": cost},
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "snip" / "checkpoint-4"))
    assert_continues(resumed, trainer, 4)

    with pytest.raises(ValueError, match="the score 0, .*an adapter that was trained before"):
        run("fresh", "snip", model=get_peft_model(classifier().model, lora(task_type="SEQ_CLS")))
    assert run("gradients", "grad_norm", model=get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))).selection


def _unwrapped(name: str) -> str:
    """The name of a base weight in the model that has a LoRA around it."""
    head, _, last = name.rpartition(".")
    return f"{head}.base_layer.{last}"


def test_learning_rate_of_zero_is_explained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args={"warmup_steps": 4}, search={"method": "snip", "discretize_at": 1})
    with pytest.raises(ValueError, match="the score 0, .*learning rate is 0"):
        trainer.train()


def test_run_that_ends_before_the_scores_keeps_all(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search={"method": "snip"})
    modules = len(ModuleGrid.from_model(trainer.model))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.selection is None and not trainer._callback.gates_active
    assert len(ModuleGrid.from_model(trainer.model)) == modules


def test_budget_of_time_and_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    score = ArchitectureSearch.score
    monkeypatch.setattr(ArchitectureSearch, "score", lambda self, rows: (read.append(len(rows)), score(self, rows))[1])
    trainer = make_trainer(tmp_path, search={"method": "snip", "cost": "time", "selection_scope": "model"})
    trainer.train()
    assert trainer.selection.times["predicted"] > 0
    trainer = make_trainer(
        tmp_path / "stream",
        "sft",
        train_dataset=Dataset.from_list(list(lm_dataset(48))).to_iterable_dataset(),
        search={"method": "snip", "score_batches": 3, "arch_split": 0.25},
    )
    trainer.train()
    assert trainer.selection.step == CUT and read == [1, 3]


def test_function_of_ones_own(tmp_path: Path) -> None:
    """It is called once, in evaluation mode, with batches on the device; what it returns is what is kept."""
    called: list[int] = []

    def last_ones(model: PeftModel, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        called.append(len(batches))
        assert not model.training and model(**batches[0]).loss.requires_grad
        grid = ModuleGrid.from_model(model)
        return {f"base_model.model.{name}": index for index, name in enumerate(grid.names)}

    search = {"method": "custom", "selection_scope": "model", "arch_batch_size": 1, "score_batches": 2}
    trainer = make_trainer(tmp_path, score_function=last_ones, search=search)
    trainer.train()
    trainer.save_model()
    selection = trainer.selection
    assert called == [2] and selection.selected == selection.modules[-len(selection.selected) :]
    assert "by a function of the run's own" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda model, batches: [1.0], TypeError, "returned list, but a score for each module"),
        (lambda model, batches: {"a": "b"}, TypeError, "a score that is no number"),
        (lambda model, batches: {"a": 1.0}, ValueError, "no score to 14 of 14.*1 to names"),
    ],
)
def test_functions_that_return_something_else(function: Any, error: type, message: str) -> None:
    model, batches = warm()
    with pytest.raises(error, match=message):
        make_search(model, "custom", score_function=function).score(batches)


def test_function_and_method_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a `score_function`"):
        make_trainer(tmp_path, search={"method": "custom"})
    with pytest.raises(ValueError, match="method='snip'`, which would not call it"):
        make_trainer(tmp_path, score_function=lambda model, batches: {}, search={"method": "snip"})
    with pytest.raises(TypeError, match="must be a function"):
        ArchitectureSearch(
            get_peft_model(classifier().model, lora()),
            loss_fn=model_loss,
            score_function="snip",  # type: ignore[arg-type]
        )


def test_config(tmp_path: Path) -> None:
    config = DiffoRAConfig(method="snip", score_batches=5, normalize_scores=True, discretize_at=1)
    assert DiffoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config
    (parsed,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        ["--method", "snip", "--score_batches", "5", "--normalize_scores", "--discretize_at", "1"]
    )
    assert parsed == config
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nmethod: alpha_test\nscore_batches: 2\n")
    _, parsed = TrlParser((SFTConfig, DiffoRAConfig)).parse_args_and_config(["--config", str(recipe)])
    assert (parsed.method, parsed.score_batches) == ("alpha_test", 2)
    assert config.schedule(300) == (1, 1) and config.decision(300) == 1
    assert search_config(method="snip", arch_warmup=WARMUP).schedule(12) == (CUT, CUT)
    assert DiffoRAConfig(method="snip", discretize_at=0.04).schedule(300) == (12, 12)  # the warm-up is not read
    for options, message in (
        ({"method": "magnitude"}, "`method='magnitude'`; it must be one of"),
        ({"method": "snip", "score_batches": 0}, "`score_batches=0`"),
        ({"method": "constant", "normalize_scores": True}, "`normalize_scores=True`"),
        ({"normalize_scores": True}, "`normalize_scores=True`"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffoRAConfig(**options)
