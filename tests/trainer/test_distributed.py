"""Several processes decide as one, whether each holds the model or a part of it, and none hangs when another fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from diffora_trainer.core.agreement import check_agreement, fingerprint
from helpers.adapted import VERA_TARGETS
from helpers.data import chat_dataset, tiny_tokenizer
from helpers.processes import RECIPES, distribute, launch, read_reports, train
from helpers.trainers import causal_model, lora, make_trainer


CONFIGS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
KINDS = [path.stem for path in CONFIGS]
SAVES = {"warm-up": 2, "search": 5, "closing": 7, "cut": 8, "selected": 10}


SIGMOID = {"search": {"method": "sigmoid", "fade_out": 0}}  # scores that differ by little


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of a single process that reads the same global batches."""
    return train(None, tmp_path_factory.mktemp("alone"), **SIGMOID)[0]


def rank_runs(root: Path, granularity: str, phase: str) -> dict[str, dict[str, Any]]:
    """A run that gives ranks, and one that goes on from its checkpoint of a phase."""
    run = {"search": {"selection_granularity": granularity}, "save_at": [SAVES[phase]]}
    return {"ranks": run, "resumed": {**run, "resume": f"{root}/ranks/checkpoint-{SAVES[phase]}"}}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """The folders of the runs that two processes of a kind make, started once for all of them."""
    checked = {"ddp_find_unused_parameters": False}  # so that a parameter that gets no gradient any more is an error
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    made: dict[str, dict[str, Path]] = {}

    def run(kind: str) -> dict[str, Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            runs: dict[str, dict[str, Any]] = {"checkpointing": {"args": {**checked, **checkpointing}, **SIGMOID}}
            if kind == "ddp":
                runs["micro-batches"] = {"args": checked, "search": {**SIGMOID["search"], "search_micro_batches": 2}}
                runs |= rank_runs(root, "rank", "closing")
            distribute(kind, {root / name: options for name, options in runs.items()})
            made[kind] = {name: root / name for name in runs}
        return made[kind]

    return run


def assert_as_alone(report: dict[str, Any], alone: dict[str, Any], what: str = "run") -> None:
    """A process of several has chosen and trained what a single one does on the same global batches."""
    assert report["selected"] == alone["selected"], what
    assert report["losses"] == pytest.approx(alone["losses"], abs=1e-4), what
    assert set(report["weights"]) == set(alone["weights"]), what
    for name, weights in alone["weights"].items():
        assert report["weights"][name] == pytest.approx(weights, abs=1e-4), f"{name}, {what}"


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_decide_as_one(kind: str, alone: dict[str, Any], together: Any) -> None:
    """With gradient accumulation and gradient checkpointing."""
    folder = together(kind)["checkpointing"]
    reports = read_reports(folder)
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}[kind]
    assert [report["wrapper"] for report in reports] == [wrapper] * 2
    assert reports[0] == reports[1]  # one decision, and the same weights
    report = reports[0]
    assert_as_alone(report, alone)
    assert report["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert len(set(report["scores"])) > 10

    # After the cut nothing is left of the modules that went: what is wrapped anew learns, and communicates no more
    # than the model has.
    assert report["moved"] and all(report["moved"])
    assert report["gathered"] == report["parameters"]
    assert report["optimized"] == report["trainable"]

    adapter = load_file(folder / "adapter_model.safetensors")
    assert {name.replace(".weight", ".default.weight") for name in adapter} == set(report["weights"])
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)


def test_two_processes_split_their_batches(alone: dict[str, Any], together: Any) -> None:
    """With gradient accumulation: gradients are exchanged once for all micro-batches of all batches of a step."""
    reports = read_reports(together("ddp")["micro-batches"])
    assert reports[0] == reports[1]
    assert_as_alone(reports[0], alone)


@pytest.mark.slow
def test_two_processes_train_a_compiled_model(alone: dict[str, Any], tmp_path: Path) -> None:
    """The wrapper of DDP is inside of the compiled model, and built anew there."""
    args = {"ddp_find_unused_parameters": False, "torch_compile_backend": "aot_eager"}
    reports = train("ddp", tmp_path, args=args, **SIGMOID)
    assert reports[0] == reports[1] and all(reports[0]["moved"])
    assert [report["wrapper"] for report in reports] == ["OptimizedModule"] * 2
    assert_as_alone(reports[0], alone)


@pytest.mark.parametrize(
    ("granularity", "phase"),
    [
        ("rank", "closing"),
        pytest.param("rank", "selected", marks=pytest.mark.slow),
        pytest.param("component", "closing", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_ranks_as_one(granularity: str, phase: str, together: Any, tmp_path: Path) -> None:
    """What is left of each matrix is optimized on both, and its gradients are exchanged; a resumed run goes on so."""
    if (granularity, phase) == ("rank", "closing"):
        folders = together("ddp")
    else:
        runs = rank_runs(tmp_path, granularity, phase)
        folders = {name: tmp_path / name for name in runs}
        distribute("ddp", {folders[name]: options for name, options in runs.items()})
    whole, resumed = (read_reports(folders[name]) for name in ("ranks", "resumed"))
    assert whole[0] == whole[1] and whole[0]["moved"] and all(whole[0]["moved"])
    assert whole[0]["optimized"] == whole[0]["trainable"]
    whole_size = causal_model().config.hidden_size * lora().r
    assert all(len(w) < whole_size for name, w in whole[0]["weights"].items() if "q_proj.lora_B" in name)
    assert [report["weights"] for report in resumed] == [report["weights"] for report in whole]


@pytest.mark.slow
def test_two_processes_freeze_as_one(tmp_path: Path) -> None:
    """What stays without being trained is neither exchanged nor waited for; a resumed run goes on so."""
    run: dict[str, Any] = {"search": {"unselected": "freeze"}, "args": {"ddp_find_unused_parameters": False}}
    checkpoint = f"{tmp_path}/whole/checkpoint-{SAVES['selected']}"
    distribute(
        "ddp",
        {
            tmp_path / "whole": {**run, "save_at": [SAVES["selected"]]},
            tmp_path / "resumed": {**run, "resume": checkpoint},
        },
    )
    whole, resumed = read_reports(tmp_path / "whole"), read_reports(tmp_path / "resumed")
    alone = train(None, tmp_path / "alone", **run)[0]
    assert whole[0] == whole[1]
    assert whole[0]["selected"] == alone["selected"]
    assert whole[0]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert whole[0]["optimized"] == whole[0]["trainable"] == alone["trainable"]
    assert whole[0]["moved"].count(False) == alone["moved"].count(False) > 0  # those that are frozen
    assert [report["weights"] for report in resumed] == [report["weights"] for report in whole]


ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": {"adapter": {"use_dora": True}},
    "embeddings": {
        "adapter": {"target_modules": ["embed_tokens", "q_proj", "up_proj"]},
        "search": {"selection_scope": "model"},
    },
    "LoHa": {"adapter": {"type": "LoHaConfig", "alpha": 8}},
    "LoKr": {"adapter": {"type": "LoKrConfig", "alpha": 8}, "search": {"method": "sampled", "fade_out": 0}},
    "OLoRA": {"adapter": {"init_lora_weights": "olora"}},
    "PiSSA": {"adapter": {"init_lora_weights": "pissa"}},
    "VeRA": {
        "adapter": {"type": "VeraConfig", "target_modules": VERA_TARGETS},
        "search": {"selection_scope": "model"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_other_adapters(kind: str, tmp_path: Path) -> None:
    """What starts as a part of the weight gives it back to the shards of pruned modules."""
    distribute(kind, {tmp_path / name: options for name, options in ADAPTERS.items()})
    for name, options in ADAPTERS.items():
        reports = read_reports(tmp_path / name)
        single = train(None, tmp_path / f"{name} alone", **options)[0]
        assert reports[0] == reports[1] and all(reports[0]["moved"]), name
        assert_as_alone(reports[0], single, name)
        assert reports[0]["gathered"] == reports[0]["parameters"], name
        assert reports[0]["optimized"] == reports[0]["trainable"], name


@pytest.mark.slow
def test_two_processes_train_the_factors_in_turn(tmp_path: Path) -> None:
    """From the choice on; a resumed run goes on with the factor whose turn it is."""
    run: dict[str, Any] = {"alternate": [1], "args": {"ddp_find_unused_parameters": True}}
    step = SAVES["selected"]
    distribute(
        "ddp",
        {
            tmp_path / "whole": {**run, "save_at": [step]},
            tmp_path / "resumed": {**run, "resume": f"{tmp_path}/whole/checkpoint-{step}"},
        },
    )
    whole, resumed = read_reports(tmp_path / "whole"), read_reports(tmp_path / "resumed")
    alone, plain = train(None, tmp_path / "alone", **run)[0], train(None, tmp_path / "plain")[0]
    assert whole[0] == whole[1]
    assert_as_alone(whole[0], alone)
    assert alone["weights"] != plain["weights"]
    assert [report["weights"] for report in resumed] == [report["weights"] for report in whole]


@pytest.mark.slow
def test_shards_are_not_frozen(tmp_path: Path) -> None:
    output = distribute("fsdp2", {tmp_path / "run": {"search": {"unselected": "freeze"}}}, ok=False)
    assert "You passed `unselected='freeze'`" in output and "is sharded" in output


@pytest.mark.slow
def test_shards_are_not_given_ranks(tmp_path: Path) -> None:
    reports = train("fsdp2", tmp_path / "modules", search={"max_trainable_parameters": 1500})
    assert reports[0] == reports[1]  # whole modules, as FSDP2 can
    output = distribute("fsdp2", {tmp_path / "ranks": {"search": {"selection_granularity": "rank"}}}, ok=False)
    assert "it is sharded, so it cannot be given another rank" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("ddp", method) for method in ("snip", "synflow", "adalora", "eva", "sora")), ("fsdp2", "alpha_test")],
)
def test_two_processes_score_as_one(kind: str, method: str, tmp_path: Path) -> None:
    """Each scores on rows of its own, with gradient accumulation; what is not sharded can be scored by gradients."""
    search = {"method": method, "selection_scope": "model"}
    reports = train(kind, tmp_path / "two", search=search)
    assert reports[0] == reports[1] and all(reports[0]["moved"])
    # With `eva` query, key and value have one score, since they read the same states.
    assert len(set(reports[0]["scores"])) > {"alpha_test": 1, "eva": 5}.get(method, 10)
    if method == "synflow":  # reads no rows
        single = train(None, tmp_path / "one", search=search)[0]
        assert reports[0]["scores"] == pytest.approx(single["scores"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    """Bit for bit on both processes, with dropout, in the first, second and third epoch of 4 steps each."""
    run = {"rows": 32, "dropout": 0.1}
    whole = train(kind, tmp_path / "whole", save_at=list(SAVES.values()), **run)
    for moment, step in SAVES.items():
        resumed = train(kind, tmp_path / moment, resume=f"{tmp_path}/whole/checkpoint-{step}", **run)
        for key in ("losses", "scores", "selected", "weights"):
            assert [r[key] for r in resumed] == [w[key] for w in whole], f"{key}, resumed in the phase {moment}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"die_at": 5}, "rank      : 1"),
        ({"choose_otherwise_at": 5}, "disagree on which modules to keep"),
        ({"other_search": {"ranks": [1], "search": {"selection_ratio": 0.25}}}, "disagree on what to search"),
    ],
    ids=["a process dies", "one would choose otherwise", "one has other options"],
)
def test_a_fault_stops_all(kind: str, fault: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The launcher comes back with an error, which a hanging process would prevent, and no adapter is written."""
    output = distribute(kind, {tmp_path: fault}, ok=False)
    assert message in output
    if "disagree" in message:
        raising = {line.split("]")[0] for line in output.splitlines() if "disagree on" in line}
        assert raising == {"[rank0", "[rank1"}
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recipe_in_two_processes(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    trainer = make_trainer(tmp_path, "sft")
    base = trainer.model.get_base_model()
    assert isinstance(base, LlamaForCausalLM)
    trainer.model.unload().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chat_dataset(48).to_json(tmp_path / "chats.jsonl")
    options = {
        "config": RECIPES / "sft" / "demo.yaml",
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "chats.jsonl",
        "output_dir": tmp_path / "out",
        **{"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_eval_samples": 4},
        **{"lora_r": 4, "max_length": 64, "answer_tokens": 4, "use_cpu": True, "report_to": "none"},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    output = launch(kind, RECIPES / "sft" / "sft.py", *words)
    assert output.count("Chosen modules") == 1  # printed by one process
    selection = json.loads((tmp_path / "out" / "diffora_selection.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    found = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in loaded.named_parameters()}
    assert {name for name in found if "lora_" not in name} >= set(selection["selected"])
    assert any(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)


def test_configurations_are_accelerate_ones() -> None:
    """What the README names is there, and nothing in it turns a precision on by itself."""
    assert KINDS == ["ddp", "fsdp2"]
    for path in CONFIGS:
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


def test_disagreement_is_seen_by_all_alike() -> None:
    """Three processes of which two agree: the mean tells each of them, also the majority."""
    held = [fingerprint("a"), fingerprint("a"), fingerprint("b")]
    assert len(set(map(tuple, (bits.tolist() for bits in held)))) == 2 and len(held[0]) == 256
    mean = torch.stack([bits.float() for bits in held]).mean(0)
    for bits in held:
        with pytest.raises(ValueError, match="disagree on the plan. Start again."):
            check_agreement(bits, lambda values: mean, "the plan", "Start again.")
    check_agreement(held[0], lambda values: values, "the plan", "Start again.")


class _Plugin:
    """What is read of accelerate's FSDP plugin."""

    def __init__(
        self,
        fsdp_version: int = 2,
        activation_checkpointing: bool = False,
        state_dict_type: str = "StateDictType.FULL_STATE_DICT",
    ) -> None:
        self.fsdp_version, self.activation_checkpointing = fsdp_version, activation_checkpointing
        self.state_dict_type = state_dict_type


@pytest.mark.parametrize(
    ("sharding", "search", "message"),
    [
        ("deepspeed", {}, "DeepSpeed is not supported.*ZeRO-2.*ZeRO-3.*fsdp2.yaml.*search_only=True"),
        ("tensor", {}, r"\(`tp_size=2`\).*held-out rows of their own.*DDP or FSDP2.*search_only=True"),
        (_Plugin(fsdp_version=1), {}, "FSDP1 is not supported.*fsdp_version: 2"),
        (_Plugin(activation_checkpointing=True), {}, "without any weights.*gradient_checkpointing=True"),
        (
            _Plugin(state_dict_type="StateDictType.SHARDED_STATE_DICT"),
            {},
            "SHARDED_STATE_DICT, with which the Trainer writes no adapter.*fsdp_state_dict_type: FULL_STATE_DICT",
        ),
        (_Plugin(), {"weight_sharing": "layer"}, "`weight_sharing='layer'` with FSDP.*`weight_sharing='none'`"),
        (
            _Plugin(),
            {"max_step_time": 0.7, "selection_scope": "model"},
            "`max_step_time=0.7` with FSDP.*`max_step_time=None`",
        ),
        (_Plugin(), {"method": "snip"}, "`method='snip'` with FSDP.*plain data parallelism"),
        (_Plugin(), {"shortcuts": ["residual1"]}, "shortcuts with FSDP.*plain data parallelism.*ddp.yaml"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    sharding: Any, search: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffora_trainer.trainer import checks as trainer_utils

    trainer = make_trainer(tmp_path, peft_config=lora(), search=search)
    if sharding == "deepspeed":
        trainer.is_deepspeed_enabled = True
    elif sharding == "tensor":  # on a CPU accelerate refuses it itself
        monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(tp_size=2))
    else:
        trainer.is_fsdp_enabled = True
        monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", sharding, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer_utils.check_trainer(trainer)


def test_fsdp_of_an_unknown_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch in which the private names are gone by which modules are taken out of FSDP2."""
    import diffora_trainer.compat.torch as compat_torch
    from diffora_trainer.trainer import checks as trainer_utils

    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", _Plugin(), raising=False)
    trainer_utils.check_trainer(trainer)
    monkeypatch.setattr(compat_torch, "FSDP_GROUPS", ("_groups_of_a_later_torch",))
    with pytest.raises(ValueError, match=r"FSDP2 of torch .* does not keep what it gathers.*ddp.yaml"):
        trainer_utils.check_trainer(trainer)
