"""`torch_compile=True`: the compiled run is the eager one, with the gates as inputs of its graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from diffora_trainer import DiffoRAConfig, SelectionRun, selected_lora_config
from diffora_trainer.search.runtime import Runtime
from helpers.checks import adapter, assert_continues, step_logs
from helpers.data import rows_of
from helpers.models import bert, llama
from helpers.trainers import causal_model, classifier, lora, make_trainer, saving_trainer


ONE_LABEL = "single_label_classification"
"""The `problem_type` of a classifier, which otherwise the first loss sets, and all is traced anew."""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The training arguments tell accelerate of the backend by an environment variable, and leave it there."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield
    torch.compiler.reset()


def without_dropout(task: str) -> Any:
    """Compiled dropout draws other numbers."""
    if task == "sft":
        return causal_model(attention_dropout=0.0)
    model = classifier().model
    model.config.problem_type = ONE_LABEL
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def run(folder: Path, task: str, backend: str | None, search: dict[str, Any], evaluate: bool = False) -> Any:
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    args = {"torch_compile_backend": backend, "dataloader_drop_last": True}
    args |= {"max_length": 8} if task == "sft" else {}
    # All batches are of one shape: no graph is for another.
    rows = {} if task == "sft" else {"train_dataset": rows_of(24)}
    trainer = make_trainer(folder, task, model=without_dropout(task), args=args, search=search, **rows)
    if evaluate:  # what is compiled then knows no gates
        trainer.evaluate(trainer.train_dataset)
    torch.compiler.reset()
    counters.clear()
    trainer.train()
    return trainer


def assert_equal_runs(compiled: Any, eager: Any, tolerance: float) -> None:
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule" and isinstance(compiled.model, PeftModel)
    assert compiled.selection.ranks == eager.selection.ranks
    assert compiled.selection.scores == pytest.approx(eager.selection.scores, abs=tolerance)
    for step, log in step_logs(eager).items():
        assert step_logs(compiled)[step]["loss"] == pytest.approx(log["loss"], abs=tolerance), step
    expected, found = adapter(eager.model), adapter(compiled.model)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=tolerance), name


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "open gates that fade out": ("cls", {"fade_out": 2}),
    "other gates in each step": ("cls", {"method": "sampled", "max_trainable_parameters": 2000}),
    "ranks": ("sft", {"fade_out": 2, "selection_granularity": "rank"}),
    "modules off and on again": (
        "cls",
        {"method": "snip", "reallocate_every": 2, "score_batches": 2, "selection_scope": "model"},
    ),
    "micro-batches": ("cls", {"fade_out": 2, "search_micro_batches": 2}),
}
LONG = ("ranks", "other gates in each step", "modules off and on again", "micro-batches")
"""Of these runs those for `make test-all`: each takes up to half a minute."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in RUNS]
)
def test_compiled_run_is_the_eager_run(name: str, tmp_path: Path) -> None:
    """
    The search is compiled once and what is left once more: not for each step, and not before the choice alone. Modules
    that go off and on in between are the one case in which there is more to compile.
    """
    task, search = RUNS[name]
    eager = run(tmp_path / "eager", task, None, search)
    compiled = run(tmp_path / "compiled", task, "aot_eager", search, evaluate=name.startswith("open"))
    if task == "cls" and name != "modules off and on again":
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert_equal_runs(compiled, eager, 1e-6)
    compiled.save_model(str(tmp_path / "out"))
    base = without_dropout(task)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert all(torch.equal(adapter(loaded)[key], weight) for key, weight in adapter(compiled.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open gates that fade out", "other gates in each step", "ranks"])
def test_inductor(name: str, tmp_path: Path) -> None:
    task, search = RUNS[name]
    eager = run(tmp_path / "eager", task, None, search)
    assert_equal_runs(run(tmp_path / "compiled", task, "inductor", search), eager, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [5, 10])
def test_compiled_run_resumes(moment: int, tmp_path: Path) -> None:
    args = {"torch_compile_backend": "aot_eager"}

    def make(folder: str) -> Any:
        few = lora(target_modules=["query", "value"])  # which are compiled in less time
        return saving_trainer(tmp_path / folder, "cls", args=args, train_dataset=rows_of(24), peft_config=few)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.evaluate(resumed.train_dataset)  # compiled with the modules that go when the checkpoint is loaded
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{moment}"))
    assert_continues(resumed, whole, moment)


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, bert])
def test_a_loop_of_one_s_own_and_how_deep_its_backward_pass_goes(make: Any) -> None:
    """
    The model is compiled anew when the gates come and when they go. After the choice its backward pass has the matrix
    products of a stock model with the same LoRA, and no more.
    """
    products: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return graph

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=count)
    tiny = make()

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    def train(model: Any, wrapped: Any, chooses: bool) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = None
        if chooses:
            options = DiffoRAConfig(
                method="custom", selection_scope="model", selection_ratio=0.2, discretize_at=3, arch_warmup=1
            )
            scores = lambda model, batches: {n: float("layer.1" in n or "layers.1" in n) for n in names}  # noqa: E731
            found = SelectionRun(
                *(model, optimizer, options, loss_of, [tiny.batch], 6),
                score_function=scores,
                runtime=Runtime(compiled=wrapped is not model),
            )
            names = found.search.grid.names
            loss_of(wrapped, tiny.batch).backward()  # traced before the run begins, without gates
            optimizer.zero_grad()
        losses = []
        for _ in range(6 if chooses else 1):
            if found is not None:
                found.before_step()
            loss = loss_of(wrapped, tiny.batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if found is not None:
                found.after_step()
        if found is not None:
            configs.append(selected_lora_config(found))
        return losses

    def adapted(config: Any) -> Any:
        torch.manual_seed(1)
        model = make().model
        model.config.problem_type = ONE_LABEL
        return get_peft_model(model, config).eval()  # dropout is off

    config, configs = lora(task_type=tiny.task_type, target_modules=tiny.target_modules), []
    eager = adapted(config)
    expected = train(eager, eager, chooses=True)
    model = adapted(config)
    assert train(model, torch.compile(model, backend=backend), chooses=True) == pytest.approx(expected, abs=1e-5)
    _, with_all, after = products
    torch.compiler.reset()  # or the graph would be taken again, for another model
    stock = adapted(configs[0])
    train(stock, torch.compile(stock, backend=backend), chooses=False)
    assert products[3] == after < with_all / 2


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffora_trainer.trainer.compilation import check_compilation

    args = {"torch_compile_backend": "aot_eager"}
    with pytest.raises(ValueError, match=r"`prefix_cache='memory'` together with `torch_compile`"):
        make_trainer(tmp_path, args=args, search={"prefix_cache": "memory"})
    trainer = make_trainer(tmp_path, args=args)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"`torch_compile` together with FSDP.*search_only=True"):
        check_compilation(trainer)
    trainer.is_fsdp_enabled = False
    plugin = SimpleNamespace(backend="aot_eager", use_regional_compilation=True)
    monkeypatch.setattr(type(trainer.accelerator.state), "dynamo_plugin", plugin, raising=False)
    trainer.accelerator.state.__dict__.pop("dynamo_plugin", None)
    with pytest.raises(ValueError, match=r"regional compilation.*`torch_compile=True`"):
        check_compilation(trainer)


def test_the_launcher_s_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --dynamo_backend` sets an environment variable; `torch_compile` stays `False`."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    trainer = make_trainer(tmp_path, model=without_dropout("cls"), train_dataset=rows_of(24))
    assert not trainer.args.torch_compile
    trainer.train()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert_equal_runs(trainer, run(tmp_path, "cls", None, {}), 1e-6)
