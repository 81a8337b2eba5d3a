"""Methods that give ranks or choose layers: their scores, computed once more in another way."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import Selection, SelectionRun
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.grid import Grid
from diffora_trainer.core.ranks import RankBudget
from diffora_trainer.methods.eva import _Sketch
from diffora_trainer.methods.ranks import RankMethod
from diffora_trainer.methods.registry import get_method
from helpers.checks import assert_each_close
from helpers.models import bert, llama
from helpers.options import make_config
from helpers.searches import components, make_search, make_steps, model_loss, pairs, warm
from helpers.threads import in_two_processes
from helpers.trainers import lora


def inputs(model: nn.Module, batches: list[dict[str, Tensor]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What each adapted layer reads, without padding."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    mask: Tensor | None = None

    def hook(name: str) -> Any:
        def read(_: nn.Module, args: Any, output: Any) -> None:
            states = args[0].detach()
            states = states[mask.bool()] if mask is not None and states.ndim == 3 else states.flatten(0, -2)
            found[name].append(states.double().numpy())

        return read

    plain = copy.deepcopy(model).eval()
    for name in names:
        plain.base_model.model.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            plain(**batch)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", [llama, bert])
def test_adalora_is_sensitivity_times_uncertainty(kind: Any) -> None:
    model, batches = warm(kind())
    search = make_search(model, "adalora", loss_scale=lambda: 1024.0)
    search.score(batches)
    plain = copy.deepcopy(model).eval()
    means: dict[Any, np.ndarray] = {}
    devs: dict[Any, np.ndarray] = {}
    for batch in batches:
        plain.zero_grad()
        model_loss(plain, batch).backward()
        for index, (a, b) in enumerate(pairs(plain)):
            a_, ga, b_, gb = (x.detach().double().numpy() for x in (a, a.grad, b, b.grad))
            for key, now in (
                ((index, "gate"), np.abs(np.einsum("ki,ki->k", a_, ga))[:, None]),
                ((index, "a"), np.abs(a_ * ga)),
                ((index, "b"), np.abs(b_ * gb).T),
            ):
                means[key] = 0.85 * means.get(key, 0.0) + 0.15 * now
                devs[key] = 0.85 * devs.get(key, 0.0) + 0.15 * np.abs(now - means[key])
    expected = [
        sum((means[index, part] * devs[index, part]).mean(axis=1) for part in ("gate", "a", "b"))
        for index in range(len(search.grid))
    ]
    assert_each_close(components(search), expected, rtol=2e-3)
    assert len(np.unique(np.concatenate(expected))) > 40


@pytest.mark.parametrize("kind", [llama, bert])
def test_prilora_rises_linearly_and_keeps_what_reads_most(kind: Any) -> None:
    model, batches = warm(kind())
    search = make_search(model, "prilora", selection_ratio=0.5)
    search.score(batches)
    grid = search.grid
    rows = [row for row in grid.rows if row != "other"]
    weight = {row: 1 / 3 + 2 / 3 * index / (len(rows) - 1) for index, row in enumerate(rows)}
    weight["other"] = float(np.mean(list(weight.values())))
    read = inputs(model, batches, grid.names)
    expected = []
    for site, (a, _) in zip(grid.sites, pairs(model), strict=True):
        importance = np.abs(a.detach().double().numpy()) @ np.linalg.norm(read[site.name], axis=0)
        place = np.argsort(np.argsort(-importance))
        expected.append(weight[grid.rows[site.row]] / (place + 1) + (place == 0))
    assert_each_close(components(search), expected, rtol=1e-12)
    ranks = search.select().ranks
    means = [np.mean([r for r, s in zip(ranks, grid.sites, strict=True) if grid.rows[s.row] == row]) for row in rows]
    assert all(before < after for before, after in pairwise(means))


def test_ranks_are_in_proportion_to_weights_under_any_budget() -> None:
    grid = Grid.arrange([(f"layers.{index}.q", 12, 10, "lora") for index in range(4)])
    weights = torch.tensor([1.0, 2.0, 3.0, 6.0])
    for total in (1, 7, 12, 24, 30):
        method = get_method("prilora")(Budget([0, 1, 2, 3], [120] * 4))
        assert isinstance(method, RankMethod)
        method.prepare(grid, RankBudget((0,) * 4, (10,) * 4, (12,) * 4, (10 * total + 9,)))
        worth = method.in_proportion(weights, [torch.zeros(12)] * 4)
        method.set_scores(worth, torch.zeros(48))
        ranks = [len(own) for own in method.kept_components()]
        assert sum(ranks) == total and (total < 4 or min(ranks) >= 1) and ranks == sorted(ranks)
        if total in (12, 24):
            assert ranks == [total // 12 * int(w) for w in weights]
        for own, rank in zip(method.split(method.components()), ranks, strict=True):
            assert own[:rank].all() and not own[rank:].any()


@pytest.mark.parametrize("kind", [llama, bert])
def test_eva_is_the_variance_that_directions_explain(kind: Any) -> None:
    model, batches = warm(kind())
    with torch.no_grad():
        for _, b in pairs(model):
            b.zero_()
    search = make_search(model, "eva", selection_ratio=0.5)
    search.score(batches)
    read = inputs(model, batches, search.grid.names)
    expected, directions = [], []
    for site in search.grid.sites:
        states = read[site.name] - read[site.name].mean(axis=0)
        _, singular, right = np.linalg.svd(states, full_matrices=False)
        expected.append((singular**2 / (singular**2).sum())[: site.rank])
        directions.append(right[: site.rank])
    for one, other in zip(components(search), expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=2e-4)
    search.finish()
    for (a, _), own in zip(pairs(model), directions, strict=True):
        overlap = np.abs(np.sum(a.detach().double().numpy() * own, axis=1))
        assert overlap[0] > 0.99 and np.allclose(np.linalg.norm(a.detach().numpy(), axis=1), 1.0, atol=1e-3)


def test_eva_is_near_where_inputs_are_many_and_alike() -> None:
    """More inputs than the sketch has directions, whose variances fall slowly; `narrow` is exact."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(512, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(torch.tanh(self.wide(x))).square().mean()

    torch.manual_seed(0)
    model = get_peft_model(Wide(), LoraConfig(r=8, target_modules=["wide", "narrow"]))  # type: ignore[arg-type]
    x = torch.randn(1500, 512) * torch.arange(1, 513) ** -0.25 @ torch.linalg.qr(torch.randn(512, 512)).Q
    search = make_search(model, "eva", lambda model, batch: model(batch))
    search.score(list(x.split(500)))
    own = dict(zip(search.grid.names, components(search), strict=True))
    with torch.no_grad():
        hidden = torch.tanh(model.get_base_model().wide.base_layer(x))
    for name, vectors, error in (("wide", x, 0.02), ("narrow", hidden, 1e-3)):
        values = torch.linalg.eigvalsh(torch.cov(vectors.T.double())).flip(0)
        found = own[name].sort(descending=True).values
        torch.testing.assert_close(found, (values / values.sum())[:8], rtol=error, atol=0.0)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_eva_centers_what_is_far_from_zero(mean: float) -> None:
    """In two processes, which have seen vectors with other means, one of them more than the other."""
    torch.manual_seed(0)
    x = torch.randn(2000, 64) * torch.arange(1, 65).rsqrt() + mean
    x[:600, 0] += 1.0
    values = torch.linalg.eigvalsh(torch.cov(x.T.double(), correction=0)).flip(0)

    def process(rank: int, reduce: Any) -> Tensor:
        context: Any = SimpleNamespace(reduce=reduce)
        sketch = _Sketch(64, 8)
        for part in (x[:600], x[600:])[rank].split(200):
            sketch.add(part)
        return sketch.principal(context)[0]

    found = in_two_processes(process)
    assert found[0].equal(found[1])
    torch.testing.assert_close(found[0][:8], (values / values.sum())[:8], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [llama, bert])
@pytest.mark.parametrize("at_once", [1, 8])
def test_aletheia_is_the_gradient_of_frozen_layers(kind: Any, at_once: int) -> None:
    model, batches = warm(kind())
    search = make_search(model, "aletheia", method_options={"layers_at_once": at_once}, loss_scale=lambda: 64.0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    found = search.score(batches)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters())
    plain = copy.deepcopy(model).eval()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" not in name)
    sums = dict.fromkeys(search.grid.rows, 0.0)
    for batch in batches:
        plain.zero_grad()
        model_loss(plain, batch).backward()
        for name, parameter in plain.named_parameters():
            for row in sums:
                if f".{row}." in name and parameter.grad is not None:
                    sums[row] += float(parameter.grad.double().norm())
    rows = [search.grid.rows[row] for row in search.grid.row_of]
    for row, score in zip(rows, found.tolist(), strict=True):
        assert score == pytest.approx(0.0 if row == "other" else sums[row], rel=1e-4)


def test_alora_is_the_loss_without_a_component_and_with_it_alone() -> None:
    model, batches = warm(spread=1.0)
    search = make_search(model, "alora")
    search.score(batches)
    plain = copy.deepcopy(model).eval()
    columns = [b for _, b in pairs(plain)]
    full = [b.detach().clone() for b in columns]

    @torch.no_grad()
    def loss(scale: list[Tensor]) -> float:
        for b, own, old in zip(columns, scale, full, strict=True):
            b.copy_(old * own)
        return float(sum(model_loss(plain, batch).double() for batch in batches) / len(batches))

    ones = [torch.ones(b.shape[1]) for b in columns]
    whole, bare = loss(ones), loss([0 * one for one in ones])
    expected = []
    for index, one in enumerate(ones):
        expected.append([])
        for k in range(len(one)):
            alone = [torch.zeros_like(other) for other in ones]
            alone[index][k] = 1.0
            without = loss([1 - other for other in alone])
            expected[-1].append(-whole + without - loss(alone) + bare)
    for found, other in zip(components(search), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), other, atol=2e-6)
    kept = search.method.components()
    worth = search.method.component_scores()
    assert bool((worth[kept] > 0).all()) and bool((worth < 0).any())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adalora", {"beta1": 1.0}, "`beta1=1.0`"),
        ("prilora", {"first_to_last": 0}, "`first_to_last=0"),
        ("gelora", {"position": "middle"}, "`position='middle'`"),
        ("cka", {"position": 3}, "`position=3`"),
        ("aletheia", {"layers_at_once": 0}, "`layers_at_once=0`"),
        ("alora", {"score_batches": 0}, "`score_batches=0`"),
        ("eva", {"normalize_scores": True}, "`normalize_scores=True`"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_search(warm()[0], method, method_options=options)


def many_rows(equal: bool = False) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    ids = torch.randint(3, 60, (4, 8, 6))
    ids = ids[:1, :1].expand_as(ids).contiguous() if equal else ids
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def of_one_layer(method: str, r: int) -> Selection:
    """What a run keeps of two modules of one layer by a ratio of a half."""
    tiny, batches = llama(), many_rows()
    names = ["k_proj", "v_proj"]  # of one size
    model = get_peft_model(tiny.model, lora(r=r, target_modules=names, layers_to_transform=[1], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = make_config(method=method, selection_ratio=0.5, discretize_at=1)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=2)
    make_steps(run, model, batches, optimizer, 2)
    assert run.selection is not None
    return run.selection


@pytest.mark.parametrize("method", ["cka", "aletheia"])
def test_the_only_layer_is_kept(method: str, caplog: pytest.LogCaptureFixture) -> None:
    selection = of_one_layer(method, 4)
    told = "nothing to choose: the budget keeps all 2 modules, which are kept or pruned together."
    assert selection.ranks == (4, 4) and selection.notes == (f"There was {told}",)
    assert f"There is {told}" in caplog.text and "a smaller budget" not in caplog.text


@pytest.mark.parametrize("method", ["gelora", "prilora"])
def test_modules_of_rank_1_in_one_layer_are_kept_by_their_order(method: str) -> None:
    selection = of_one_layer(method, 1)
    assert selection.ranks == (1, 0)
    (note,) = selection.notes
    assert note.startswith("2 modules at the edge of the choice have equal scores. Those that stand first")


def test_what_does_not_read_the_adapter_does_not_blame_it_for_ties() -> None:
    with pytest.raises(ValueError, match="All 14 modules have the score 0, so there is nothing") as caught:
        make_search(warm()[0], "cka", selection_ratio=0.5).score(many_rows(equal=True))
    assert "lora_B" not in str(caught.value) and "`score_batches`" in str(caught.value)
