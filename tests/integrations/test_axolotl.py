"""
The plugin for axolotl, called as axolotl 0.19.0 calls it: `register` with the configuration as it was written
(`cli/config.py`, `prepare_plugins`), the arguments mixed into its own pydantic class (`integrations/config.py`,
`merge_input_args`), `post_trainer_create` with the built trainer and `post_train` when all is saved (`train.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import BatchSampler, RandomSampler
from transformers import Trainer

from diffora_trainer import ArchitectureSearch, DiffoRACallback, DiffoRAConfig, Selection
from helpers import ROOT
from helpers.adapted import lora_layers
from helpers.axolotl import Cfg, plugin_module
from helpers.checks import adapter, assert_helpful, assert_same, assert_was_searched, step_logs
from helpers.trainers import causal_model, classifier, lora, make_trainer, search_config


yaml = pytest.importorskip("yaml")
pydantic = pytest.importorskip("pydantic")
OPTIONS = {"arch_warmup": 3, "discretize_at": 8, "fade_out": 0, "method_options": {"arch_every": 1}}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plugin_module(monkeypatch)


def written(module: Any, **options: Any) -> Cfg:
    """A configuration as a user writes it."""
    return Cfg({"plugins": [module.NAME], "adapter": "lora", "diffora": OPTIONS, **options})


def validated(module: Any, cfg: Cfg) -> Cfg:
    """Through axolotl's own class and that of the plugin, in the order in which axolotl derives from them."""

    class AxolotlInputConfig(pydantic.BaseModel):
        model_config = {"extra": "allow"}

    both = type("AxolotlInputConfig", (AxolotlInputConfig, module.DiffoRAArgs), {})
    return Cfg(both(**cfg).model_dump(exclude_none=True))


def wrapped() -> Any:
    torch.manual_seed(3)
    return get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))


def test_run_of_the_plugin(module: Any, tmp_path: Path) -> None:
    """It is that of `DiffoRATrainer`; what was found lies beside the adapter, which the trainer does not save here."""
    direct = make_trainer(tmp_path / "direct", model=wrapped(), peft_config=None)
    direct.train()
    plugin = module.DiffoRAPlugin()
    cfg = written(module, output_dir=str(tmp_path / "out"))
    plugin.register(cfg)
    assert plugin.get_input_args() == "diffora_trainer.integrations.axolotl.DiffoRAArgs"
    cfg = validated(module, cfg)
    trainer: Any = make_trainer(tmp_path / "out", cls=Trainer, model=wrapped(), peft_config=None)
    plugin.post_trainer_create(cfg, trainer)
    assert trainer.diffora_config == search_config()
    trainer.train()
    assert_was_searched(trainer)
    assert_same(step_logs(trainer), step_logs(direct), "logs")
    assert_same(adapter(trainer.model), adapter(direct.model), "adapter")
    trainer.model.save_pretrained(cfg.output_dir)
    plugin.post_train(cfg, trainer.model)
    assert Selection.load(tmp_path / "out") == trainer.selection == direct.selection
    assert "DiffoRA" in (tmp_path / "out" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(classifier().model, cfg.output_dir)
    assert set(lora_layers(loaded, "default")) == set(trainer.selection.selected)


def test_kernels(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Those that nobody asked for are off, before axolotl's validation switches them on; others are refused."""
    cfg = written(module, lora_o_kernel=False, gradient_checkpointing=True)
    module.DiffoRAPlugin().register(cfg)
    assert cfg.gradient_checkpointing_kwargs == {"use_reentrant": False} and "use_reentrant" in caplog.text
    assert not any(cfg[name] for name in module.KERNELS) and set(module.KERNELS) < set(cfg)
    assert "lora_mlp_kernel, lora_qkv_kernel, lora_embedding_kernel: switched off" in caplog.text
    caplog.clear()
    module.DiffoRAPlugin().register(cfg)
    assert not caplog.text  # all of them were set
    other = Cfg({"plugins": ["axolotl.integrations.liger.LigerPlugin"], "adapter": "lora", "lora_qkv_kernel": True})
    module.DiffoRAPlugin().register(other)  # the plugin of an earlier configuration
    assert set(other) == {"plugins", "adapter", "lora_qkv_kernel"}


@pytest.mark.parametrize(
    ("options", "essential"),
    [
        ({"lora_qkv_kernel": True}, "`lora_qkv_kernel: true`.*gates"),
        ({"adapter": None}, "`adapter: None`.*`adapter: lora`"),
        ({"relora": True}, "`relora: True`"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant: true.*`use_reentrant: false`"),
        ({"deepspeed": "zero2.json"}, "`deepspeed: zero2.json`"),
        ({"diffora": {"selction_ratio": 0.5}}, "no option 'selction_ratio'; did you mean 'selection_ratio'"),
        ({"diffora": {"selection_ratio": 1.5}}, "selection_ratio"),
        ({"diffora": {"discretize_at": "soon"}}, "discretize_at"),
        ({"diffora": 0.5}, "`diffora: 0.5` must be a mapping"),
    ],
)
def test_refused_before_anything_is_loaded(options: dict[str, Any], essential: str, module: Any) -> None:
    with pytest.raises(ValueError) as caught:
        cfg = written(module, **options)
        module.DiffoRAPlugin().register(cfg)
        validated(module, cfg)
    assert_helpful(str(caught.value), essential)


@pytest.mark.parametrize("kernel", ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"])
def test_kernels_of_axolotl_are_recognised(kernel: str) -> None:
    """What axolotl itself puts into a model; nothing of it has to be run."""
    kernels = pytest.importorskip("axolotl.monkeypatch.lora_kernels")
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    kernels.apply_lora_kernel_patches(model=model, cfg=Cfg({kernel: True}))
    with pytest.raises(ValueError, match=f"fused kernels of axolotl.*`{kernel}`"):
        ArchitectureSearch(model, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss)


def test_example(module: Any) -> None:
    """The recipe names this plugin, in a form that it takes."""
    cfg = Cfg(yaml.safe_load((ROOT / "recipes" / "integrations" / "axolotl" / "config.yaml").read_text()))
    assert cfg.plugins == [module.NAME]
    module.DiffoRAPlugin().register(cfg)
    assert module.make_config(validated(module, cfg).diffora).selection_ratio == 0.5
    json.dumps(cfg)


def test_sample_packing(tmp_path: Path) -> None:
    """
    As `AxolotlTrainer` packs (`core/trainers/base.py`): `_get_train_sampler` gives batches of rows, so the held-out
    rows are taken out of the data set.
    """
    read: list[int] = []

    class Packing(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return BatchSampler(RandomSampler(train_dataset or self.train_dataset), 4, drop_last=True)

        def get_train_dataloader(self) -> Any:
            sampler = self._get_train_sampler(self.train_dataset)
            loader = torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            read.extend(inputs["row"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = {name: value for name, value in inputs.items() if name != "row"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = Dataset.from_list(
        [{"input_ids": [7, 8, 9 + i % 8], "labels": [7, 8, 9 + i % 8], "row": i} for i in range(40)]
    )

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in features]) for key in features[0]}

    torch.manual_seed(3)
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    args = {"remove_unused_columns": False}
    trainer: Any = make_trainer(
        tmp_path,
        cls=Packing,
        model=model,
        peft_config=None,
        args=args,
        train_dataset=rows,
        data_collator=collate,
    )
    DiffoRACallback(search_config()).attach(trainer)
    trainer.train()
    assert_was_searched(trainer)
    assert len(read) == 48 and len(set(read)) == 36
