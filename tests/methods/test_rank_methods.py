"""Methods that give ranks or choose layers: their formulas, computed once more in another way."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffora_trainer import SelectionRun
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.grid import Grid
from diffora_trainer.core.ranks import RankBudget
from diffora_trainer.methods.gelora import intrinsic_dimension
from diffora_trainer.methods.ranks import RankMethod
from diffora_trainer.methods.registry import get_method
from diffora_trainer.search.runtime import Runtime
from helpers.checks import assert_same
from helpers.models import bert, gpt2, llama
from helpers.options import make_config
from helpers.searches import make_search, model_loss, pairs, warm


def components(search: Any) -> list[Tensor]:
    """What each component was found to be worth, module by module."""
    assert isinstance(search.method, RankMethod)
    return search.method.split(search.method._scores)


def close(found: list[Tensor], expected: list[Any], rtol: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), np.asarray(other), rtol=rtol, atol=1e-9)


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
    close(components(search), expected, rtol=2e-3)
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
    close(components(search), expected, rtol=1e-12)
    ranks = search.choice()[1]
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
        ranks = method.kept_ranks()
        assert sum(ranks) == total and (total < 4 or min(ranks) >= 1) and list(ranks) == sorted(ranks)
        if total in (12, 24):
            assert list(ranks) == [total // 12 * int(w) for w in weights]
        for own, rank in zip(method.split(method.components()), ranks, strict=True):
            assert own[:rank].all() and not own[rank:].any()


@pytest.mark.parametrize(("size", "dimension"), [(20, 2), (30, 5)])
def test_two_nn_finds_the_dimension_of_a_plane(size: int, dimension: int) -> None:
    generator = np.random.default_rng(0)
    points = generator.uniform(size=(700, dimension)) @ generator.normal(size=(dimension, size))
    found = intrinsic_dimension(torch.tensor(np.concatenate([points, points[:50]])))  # some of them twice
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    first, second = np.sort(distances, axis=1)[:, 1:3].T
    ratios = np.sort(np.log(second / first))[:630]
    line = -np.log(1 - np.arange(1, 631) / 700)
    assert found == pytest.approx(np.linalg.lstsq(ratios[:, None], line, rcond=None)[0][0], rel=1e-6)
    assert abs(found - dimension) < 0.15 * dimension
    with pytest.raises(ValueError, match="2 different states.*score_batches"):
        intrinsic_dimension(torch.tensor([[1.0], [2.0], [2.0]]).double())


def hidden(model: nn.Module, batches: list[dict[str, Tensor]], position: str) -> list[np.ndarray]:
    """The states of the embeddings and after each layer, by the model's own output."""
    plain = copy.deepcopy(model).eval()
    found: list[list[np.ndarray]] = []
    for batch in batches:
        with torch.no_grad():
            states = plain(**batch, output_hidden_states=True).hidden_states
        mask = batch.get("attention_mask", torch.ones(states[0].shape[:2]))
        for index, layer in enumerate(states):
            if index == len(found):
                found.append([])
            for row, seen in zip(layer.double(), mask.bool(), strict=True):
                own = row[seen]
                found[index].append({"first": own[0], "last": own[-1], "mean": own.mean(dim=0)}[position].numpy())
    return [np.stack(parts) for parts in found]


@pytest.mark.parametrize(("kind", "position"), [(bert, "first"), (gpt2, "last")])
def test_cka_is_the_change_of_the_representation(kind: Any, position: str) -> None:
    model, batches = warm(kind())
    for batch in batches:
        batch["input_ids"][:, 0] = 5  # as texts begin
    search = make_search(model, "cka")
    found = search.score(batches)
    states = hidden(model, batches, position)
    by_row = {}
    numbered = [row for row, name in enumerate(search.grid.rows) if name != "other"]
    # Behind the last layer of a causal model a norm follows before its states are given out.
    for row, (x, y) in zip(numbered, pairwise(states), strict=True):
        count = len(x)
        centering = np.eye(count) - 1 / count
        k, l = (centering @ s @ s.T @ centering for s in (x, y))  # noqa: E741
        by_row[row] = 1 - np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))
    if position == "first":
        assert np.ptp(states[0], axis=0).max() < 1e-6  # the first token is the same everywhere
        by_row[numbered[0]] = 0.0
    compared = numbered if position == "first" else numbered[:-1]
    for row, score in zip(search.grid.row_of, found.tolist(), strict=True):
        if row in compared:
            assert score == pytest.approx(by_row[row], abs=1e-6)
        elif row not in numbered:
            assert score == 0.0
    assert max(by_row.values()) > 1e-3
    kept = search.select().kept
    rows = {row: {keep for keep, own in zip(kept, search.grid.row_of, strict=True) if own == row} for row in numbered}
    assert all(len(fates) == 1 for fates in rows.values()), "whole layers are kept or pruned"


def test_gelora_gives_ranks_by_the_rise_of_the_dimension() -> None:
    tiny = bert()
    model, _ = warm(tiny)
    torch.manual_seed(0)
    rows = torch.randint(5, 7, (120, 7))  # of two tokens: the mean of their embeddings is near a line
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part[:, 0] % 2}
               for part in rows.split(30)]  # fmt: skip
    search = make_search(model, "gelora")
    search.score(batches)
    dimensions = [intrinsic_dimension(torch.tensor(part)) for part in hidden(model, batches, "mean")]
    rises = [max(after - before, 0.0) + 1 for before, after in pairwise(dimensions)]
    assert max(rises) > 1.0
    numbered = [row for row, name in enumerate(search.grid.rows) if name != "other"]
    weights = {**dict(zip(numbered, rises, strict=True)), len(numbered): float(np.mean(rises))}
    expected = []
    for site, (a, b) in zip(search.grid.sites, pairs(model), strict=True):
        sizes = [float(torch.linalg.matrix_norm((b[:, [k]] @ a[[k]]).detach())) for k in range(site.rank)]
        place = np.argsort(np.argsort(-np.array(sizes)))
        expected.append(weights[site.row] / (place + 1) + max(rises) * (place == 0))
    close(components(search), expected, rtol=1e-4)


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


def test_eva_starts_nothing_anew_that_has_learned() -> None:
    model, batches = warm()
    before = [a.detach().clone() for a, _ in pairs(model)]
    search = make_search(model, "eva")
    search.score(batches)
    search.finish()
    for (a, _), old in zip(pairs(model), before, strict=True):
        assert sorted(a.sum(dim=1).tolist()) == pytest.approx(sorted(old.sum(dim=1).tolist()))


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
    assert bool((search.method._scores[kept] > 0).all()) and bool((search.method._scores < 0).any())


def test_what_cannot_be_spent_in_ranks_keeps_whole_modules() -> None:
    model, batches = warm()
    search = make_search(model, "adalora", selection_granularity="module", selection_ratio=0.5)
    totals = search.score(batches)
    selection = search.select()
    assert not selection.in_ranks and sum(selection.kept) == 7
    assert [bool(keep) for keep in selection.kept] == [bool(score >= totals.sort().values[7]) for score in totals]
    torch.testing.assert_close(totals, torch.stack([own.sum() for own in components(search)]))
    for asked in ("rank", "component"):
        with pytest.raises(ValueError, match=f"'{asked}'`, but that does not combine with `selection_unit='layer'`"):
            make_search(model, "adalora", selection_granularity=asked, selection_unit="layer")
    with pytest.raises(ValueError, match="room for 10 parameters"):
        make_search(model, "adalora", max_trainable_parameters=10)


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


def test_a_selection_of_components_keeps_the_function(tmp_path: Path) -> None:
    """Sorting changes no output, moves moments along, and the components that stay are those with the best scores."""
    model, batches = warm(spread=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches:
        model_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    search = make_search(model, "adalora", selection_ratio=0.5)
    search.score(batches)
    worth, kept = components(search), search.method.split(search.method.components())
    assert max(w[~k].max() for w, k in zip(worth, kept, strict=True) if not k.all()) <= min(
        w[k].min() for w, k in zip(worth, kept, strict=True) if k.any()
    )
    before = [(a.detach().clone(), b.detach().clone(), optimizer.state[b]["exp_avg"].clone()) for a, b in pairs(model)]
    logits = model.eval()(**batches[0]).logits
    selection = search.finish(0, optimizer)
    torch.testing.assert_close(model.eval()(**batches[0]).logits, logits)
    assert selection.ranks == tuple(int(own.sum()) for own in kept)
    for (a, b), old, own in zip(pairs(model), before, kept, strict=True):
        count = int(own.sum())
        assert a[:count].equal(old[0][own]) and b[:, :count].equal(old[1][:, own])
        assert optimizer.state[b]["exp_avg"][:, :count].equal(old[2][:, own])


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_sora_is_adam_with_a_soft_threshold_on_the_gradient_of_gates(scale: float) -> None:
    """Against gates that are parameters of the layers, in a loop with `torch.optim.Adam`."""
    rate, threshold, steps = 0.05, 0.01, 6
    tiny = llama()
    model, batches = warm(tiny)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"gate_learning_rate": rate, "threshold": threshold}
    config = make_config(method="sora", discretize_at=steps, selection_ratio=0.5, method_options=options)
    runtime = Runtime(loss_scale=lambda: scale)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=steps + 1, runtime=runtime)
    for step in range(steps - 1):
        for part in (0, 1):  # gradients are accumulated
            run.before_step()
            (scale * model_loss(model, batches[(step + part) % 3]) / 2).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    method = run.search.method

    weights = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    names = run.search.grid.names
    layers = [twin.base_model.model.get_submodule(name).lora_A["default"] for name in names]
    gates = [nn.Parameter(torch.ones(layer.out_features)) for layer in layers]
    for layer, gate in zip(layers, gates, strict=True):
        layer.register_forward_hook(lambda module, args, output, gate=gate: output * gate)
    adam = torch.optim.Adam(gates, lr=rate)
    for step in range(steps - 1):
        for part in (0, 1):
            (model_loss(twin, batches[(step + part) % 3]) / 2).backward()
        weights.step()
        adam.step()
        weights.zero_grad()
        adam.zero_grad()
        with torch.no_grad():
            for gate in gates:
                gate.copy_(torch.where(gate.abs() < threshold, 0.0, gate - threshold * gate.sign()))
    for found, gate in zip(method.component_gates(), gates, strict=True):
        torch.testing.assert_close(found, gate.detach(), atol=2e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny.batch).logits, twin(**tiny.batch).logits, atol=1e-5, rtol=1e-4)

    # A step whose loss was not finite moves no gate.
    run.before_step()
    (model_loss(model, batches[0]) * float("inf")).backward()
    optimizer.zero_grad()
    state = method.state_dict()
    run._trained.step(optimizer)  # type: ignore[union-attr]
    assert_same(method.state_dict(), state)
    assert run.search.skipped_steps == 1 and not any(leaf.grad is not None for leaf in run.search.gates._masks)

    # What they have come to is put into the weights.
    before = [gate.abs().clone() for gate in method.component_gates()]
    assert len({round(float(value), 6) for gate in before for value in gate}) > 20
    model.eval()
    expected = model(**tiny.batch).logits
    run.search.method.before_pruning(run.search.adapters.sites)
    run.search.gates.detach()
    torch.testing.assert_close(model(**tiny.batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_trained_gates_are_not_seen_by_a_compiled_model() -> None:
    model, batches = warm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for method in ("sora", "beamlora"):
        config = make_config(method=method, discretize_at=4, selection_ratio=0.5)
        with pytest.raises(ValueError, match=f"'{method}'`, which trains gates.*torch_compile"):
            SelectionRun(model, optimizer, config, model_loss, batches, total_steps=8, runtime=Runtime(compiled=True))


def test_sora_prunes_what_its_threshold_has_closed() -> None:
    model, batches = warm()
    options = {"gate_learning_rate": 0.1, "threshold": 0.15, "selection_ratio": 0.9}
    run = train_gated(model, batches, 9, 9, method="sora", **options)
    assert run.selection is not None
    closed = int((run.search.method._scores == 0).sum())
    total = sum(site.rank for site in run.search.grid.sites)
    assert 0 < closed and sum(run.selection.ranks) == total - closed < 0.85 * total
    for site in run.search.adapters.named(run.selection.selected):
        assert site.parameters[1].detach().norm(dim=0).min() > 0


def train_gated(model: Any, batches: list[Any], steps: int, until: int, **options: Any) -> SelectionRun:
    """Some steps of SGD under a method that trains gates."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ratio = options.pop("selection_ratio", 0.5)
    config = make_config(method=options.pop("method"), discretize_at=until, selection_ratio=ratio,
                         method_options=options)  # fmt: skip
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=until + 1)
    for step in range(steps):
        run.before_step()
        model_loss(model, batches[step % 3]).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    return run


def test_beamlora_trains_a_softmax_and_puts_strong_components_in_the_place_of_weak_ones() -> None:
    """Against scores that are parameters of the layers, with `torch.optim.Adam`, and a replacement by hand."""
    rate, temperature, every, until = 0.02, 0.05, 4, 20
    tiny = llama()
    model, batches = warm(tiny)
    twin = copy.deepcopy(model)
    options = {"method": "beamlora", "beam_every": every, "temperature": temperature, "gate_learning_rate": rate,
               "top_p": 0.9}  # fmt: skip
    run = train_gated(model, batches, every, until, **options)

    grid = run.search.grid
    weights = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    layers = [twin.base_model.model.get_submodule(name).lora_A["default"] for name in grid.names]
    half = [2] * len(layers)  # of rank 4
    scores = [nn.Parameter(torch.zeros(rank)) for rank in half]

    def gate(own: Tensor) -> Tensor:
        return torch.cat([torch.softmax(own / temperature, 0) * len(own), torch.zeros(4 - len(own))])

    for layer, own in zip(layers, scores, strict=True):
        layer.register_forward_hook(lambda module, args, output, own=own: output * gate(own))
    adam = torch.optim.Adam(scores, lr=rate)
    past: list[list[Tensor]] = []
    for step in range(every):
        model_loss(twin, batches[step % 3]).backward()
        weights.step()
        adam.step()
        weights.zero_grad()
        adam.zero_grad()
        if step + 1 == every // 2:
            past = [[x.detach().clone() for x in pair] for pair in pairs(twin)]
    importance = torch.cat([gate(own).detach() for own in scores])
    share = 1 - 0.1 * (1 + np.cos(np.pi * every / until)) / 2
    falling = importance.sort(descending=True)
    weak = set(falling.indices[falling.values.cumsum(0) > share * importance.sum()].tolist())
    replaced = 0
    with torch.no_grad():
        for index, ((a, b), own) in enumerate(zip(pairs(twin), scores, strict=True)):
            worst, best = int(own.argmin()), int(own.argmax())
            if not {4 * index, 4 * index + 1} & weak:
                continue
            replaced += 1
            a[worst], b[:, worst] = past[index][0][best], past[index][1][:, best]
            own.fill_(float(own.mean()))
    assert 0 < replaced < len(layers)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), atol=1e-5, rtol=1e-4)
    for found, own in zip(run.search.method.component_gates(), scores, strict=True):
        torch.testing.assert_close(found, gate(own).detach(), atol=1e-4, rtol=1e-3)

    run = train_gated(warm()[0], batches, 6, 6, **options)
    assert run.selection is not None and set(run.selection.ranks) == {2}
    assert run.selection.trainable_parameters * 2 == sum(run.search.grid.parameters)


def test_beamlora_keeps_every_module() -> None:
    model, _ = warm()
    for options in ({"selection_granularity": "module"}, {"selection_ratio": 0.1}, {"selection_unit": "layer"}):
        with pytest.raises(ValueError, match="'beamlora'`, which keeps every module"):
            make_search(model, "beamlora", **options)


def test_two_rows_do_not_tell_layers_apart() -> None:
    model, batches = warm()
    with pytest.raises(ValueError, match="2 rows.*score_batches"):
        make_search(model, "cka").score(batches[:1])
