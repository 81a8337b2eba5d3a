"""Cards of models whose class is the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trainers import classifier, lora, make_trainer


MODULE = """
from torch import nn
from transformers import BertForSequenceClassification, BertModel, BertPreTrainedModel


class Scorer(BertForSequenceClassification):
    pass


class TwoHeads(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, config.num_labels) for name in ("one", "two")})
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
        pooled = self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits = self.heads["one"](pooled) + self.heads["two"](pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}
"""


@pytest.mark.parametrize(
    ("name", "heads", "where"),
    [
        ("Scorer", ["classifier"], "module"),
        ("TwoHeads", ["heads.one", "heads.two"], "module"),
        ("TwoHeads", ["heads.one", "heads.two"], "__main__"),
    ],
)
def test_the_snippet_loads_a_head_of_any_size(
    name: str, heads: list[str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_models_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import own_models_of_a_test as own  # type: ignore[import-not-found]

    base = tmp_path / "base"
    classifier().model.bert.save_pretrained(base)
    torch.manual_seed(0)
    model = getattr(own, name).from_pretrained(base, num_labels=3)
    if where == "__main__":  # as in the script that trains it
        monkeypatch.setattr(type(model), "__module__", where)
    folder = tmp_path / "out"
    # With a task type PEFT does not save the class.
    task = "SEQ_CLS" if where == "__main__" else None
    trainer = make_trainer(folder, model=model, peft_config=lora(modules_to_save=heads, task_type=task))
    trainer.train()
    trainer.save_model(str(folder))
    card = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"### Load it with plain PEFT\n\n```python\n(.*?)```", card, re.DOTALL)
    note = "is a class of the script" if where == "__main__" else "a module that is not in a package"
    assert note in snippet
    scope: dict[str, Any] = {name: type(model)} if where == "__main__" else {}
    exec(snippet.replace("<the base model>", str(base)).replace('"out"', repr(str(folder))), scope)
    batch = {"input_ids": torch.arange(3, 23).view(2, 10)}
    with torch.no_grad():
        found = scope["model"].eval()(**batch)["logits"]
        assert found.shape == (2, 3) and found.equal(trainer.model.eval()(**batch)["logits"])
