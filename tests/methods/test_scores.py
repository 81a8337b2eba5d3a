"""The zero-cost scores: their formulas, that they leave no trace, and the runs that are cut by them."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from diffora_trainer import ArchitectureSearch, DiffoRAConfig
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.base import ScoreMethod
from diffora_trainer.methods.build import make_schedule, method_of
from diffora_trainer.methods.registry import get_method, method_names
from helpers.checks import assert_same
from helpers.models import bert, deberta_v2, gpt2, llama, opt
from helpers.options import make_config
from helpers.searches import by_hand, make_search, model_loss, pairs, warm
from helpers.trainers import CUT, WARMUP, classifier, lora, make_trainer, search_config


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


@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [
        ("snip", {}, 3),
        ("adalora", {}, 3),
        ("prilora", {}, 3),
        ("eva", {}, 9),
        ("alora", {}, None),
        ("alpha_test", {}, None),
        ("aletheia", {"layers_at_once": 1}, 6),
        ("cka", {}, 5),
        ("cka", {"position": "mean"}, 3),
        ("gelora", {}, 3),
    ],
)
def test_as_many_passes_as_a_method_says(method: str, options: dict[str, Any], passes: int | None) -> None:
    model, batches = warm()
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        return model_loss(model, batch)

    search = make_search(model, method, loss_fn=loss, method_options=options)
    least, most = search.method.num_passes(len(batches), search.grid, search.adapters.sites)
    search.score(batches)
    assert least <= len(calls) <= most and (least == most) == (method != "alpha_test")
    assert passes is None or len(calls) == passes


def bits(tensor: Tensor) -> Tensor:
    """With the sign of a zero, which `torch.equal` does not see."""
    return tensor.detach().clone().view(torch.int32) if tensor.dtype == torch.float32 else tensor.detach().clone()


METHODS = ("grad_norm", "snip", "synflow", "alpha_test", "random", "custom")


class Planned(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "fails"),
    [(method, fails) for method in METHODS for fails in (False, True) if method != "random" or not fails],
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
    assert bool(search.method.steps) != fails


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
    matrix = get_method("alpha_test")(Budget([0] * 4, [1] * 4, ratio=0.5))
    assert isinstance(matrix, ScoreMethod)
    matrix.set_scores(torch.zeros(4), torch.tensor([0.1, 0.3, 0.0, 0.2]))
    assert matrix.discretize().tolist() == [False, True, False, True] and not matrix.num_boundary_ties()
    with pytest.raises(ValueError, match="nothing to choose by"):
        matrix.set_scores(torch.zeros(4), torch.full((4,), 0.1))


@pytest.mark.parametrize("method", ["snip", "synflow", "custom"])
def test_scores_that_tie_choose_nothing(method: str) -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules))  # lora_B is 0
    function = {"score_function": lambda model, batches: dict.fromkeys(AdapterGrid.from_model(model).grid.names, 2)}
    search = make_search(model, method, **(function if method == "custom" else {}))
    value = 2 if method == "custom" else 0
    with pytest.raises(ValueError, match=f"All 14 modules have the score {value}, .*score later"):
        search.score([tiny.batch])
    with pytest.raises(ValueError, match="no scores yet"):
        search.finish()


def test_scores_may_tie_where_everything_is_kept() -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules))
    search = make_search(model, "snip", selection_ratio=1.0)
    search.score([tiny.batch])
    assert search.finish().notes == ("There was nothing to choose: the budget keeps all 14 modules.",)


def test_the_documentation_says_which_methods_normalize() -> None:
    text = (Path(__file__).parents[2] / "docs" / "choosing_options.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `normalize_scores`")]
    for name in method_names():
        if not get_method(name).searches:
            try:
                method_of(make_config(method=name, normalize_scores=True))
            except ValueError:
                assert f"`{name}`" not in row, name
            else:
                assert f"`{name}`" in row, name


def test_ties_at_the_edge_of_the_choice_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    matrix = get_method("snip")(Budget([0, 0, 0, 1, 1, 1], [1] * 6, ratio=0.5))  # keeps two of three in each row
    assert isinstance(matrix, ScoreMethod)
    matrix.set_scores(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0]), torch.zeros(6))
    assert matrix.discretize().tolist() == [True, True, False, True, True, False] and matrix.num_boundary_ties() == 2
    matrix.set_scores(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0]), torch.arange(6.0))
    assert matrix.discretize().tolist() == [True, False, True, True, True, False] and matrix.num_boundary_ties() == 0

    def nearly_equal(model: nn.Module, batches: list[Any]) -> dict[str, int]:
        return {name: int(index == 5) for index, name in enumerate(AdapterGrid.from_model(model).grid.names)}

    search = {"method": "custom", "selection_scope": "model"}
    make_trainer(tmp_path, score_function=nearly_equal, search=search).train()
    assert "12 modules at the edge of the choice have equal scores" in caplog.text


def test_scores_that_are_not_finite_are_refused() -> None:
    model, batches = warm()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Finite, with gradients that are not."""
        return model_loss(model, batch) + sum((pair[0] * 0).sum().sqrt() for pair in pairs(model))

    match = "14 of 14 modules by `method='grad_norm'` are not finite, that of .* among them. Please look for the cause"
    with pytest.raises(ValueError, match=match):
        make_search(model, "grad_norm", loss_fn=loss).score(batches)
    with pytest.raises(ValueError, match="among them, though the loss scale of float16 was lowered from 8 to 1. Pl"):
        make_search(model, "grad_norm", loss_fn=loss, loss_scale=lambda: 8.0).score(batches)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1e38)
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite.*synflow.*float32"):
        make_search(model, "synflow").score(batches)
    assert_same({name: bits(tensor) for name, tensor in model.state_dict().items()}, state)


def test_what_cannot_be_scored_is_refused() -> None:
    model, batches = warm()
    with pytest.raises(ValueError, match="does not depend on any weight"):
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


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda model, batches: [1.0], TypeError, "returned list, but a score for each module"),
        (lambda model, batches: {"a": "b"}, TypeError, "a score that is not a number"),
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
    config = make_config(method="snip", score_batches=5, normalize_scores=True, discretize_at=1)
    assert make_config(**json.loads(json.dumps(config.to_dict()))) == config
    (parsed,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        [
            "--method",
            "snip",
            "--method_options",
            '{"score_batches": 5, "normalize_scores": true}',
            "--discretize_at",
            "1",
        ]
    )
    assert parsed == config
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nmethod: alpha_test\n"
        "method_options:\n  score_batches: 2\n"
    )
    _, parsed = TrlParser((SFTConfig, DiffoRAConfig)).parse_args_and_config(["--config", str(recipe)])
    assert (parsed.method, parsed.method_options) == ("alpha_test", {"score_batches": 2})
    for one, total, step in (
        (config, 300, 1),
        (search_config(method="snip", arch_warmup=WARMUP), 12, CUT),
        (DiffoRAConfig(method="snip", discretize_at=0.04), 300, 12),  # the warm-up is not read
    ):
        schedule = make_schedule(one, total)
        assert (schedule.warmup, schedule.discretize, schedule.prune) == (step, step, step)
    for options, message in (
        ({"method": "magnitude"}, "`method='magnitude'`; it must be one of"),
        ({"method": "snip", "score_batches": 0}, "`score_batches=0`"),
        ({"method": "random", "normalize_scores": True}, "`normalize_scores=True`"),
        ({"normalize_scores": True}, "`normalize_scores` with `method='diffora'`"),
    ):
        with pytest.raises(ValueError, match=message):
            method_of(make_config(**options))


def test_synflow_says_before_the_first_step_where_nothing_flows() -> None:
    tiny = deberta_v2()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    search = make_search(model, "synflow")
    for look in (search.check_start, lambda batch: search.score([batch])):
        with pytest.raises(ValueError, match="DebertaV2ForSequenceClassification no gradient reaches.*layer norm"):
            look(tiny.batch)
    other = llama()  # lora_B is 0 here too
    model = get_peft_model(other.model, lora(target_modules=other.target_modules))
    make_search(model, "synflow").check_start(other.batch)
