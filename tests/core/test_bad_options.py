"""Options that are refused, each with its message."""

from __future__ import annotations

from typing import Any

import pytest

from diffora_trainer.methods.build import method_of
from helpers.checks import assert_helpful
from helpers.options import make_config


# What is passed, the class of the error, and the essential part of its message
CONFIG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"selection_ratio": 0}, ValueError, "selection_ratio=0.0.*must be in"),
    ({"selection_ratio": 1.01}, ValueError, "selection_ratio=1.01"),
    ({"selection_ratio": float("nan")}, ValueError, "selection_ratio=nan.*finite"),
    ({"selection_ratio": 10**400}, ValueError, "selection_ratio=inf.*finite"),
    ({"selection_ratio": "0.5"}, TypeError, "`selection_ratio` must be.*'0.5'.*without quotes"),  # quoted in YAML
    ({"selection_ratio": True}, TypeError, "`selection_ratio` must be"),
    ({"selection_scope": "head"}, ValueError, "selection_scope='head'.*'layer', 'model'"),
    ({"selection_scope": ["layer"]}, ValueError, r"selection_scope=\['layer'\].*must be one of"),
    ({"method": "hard"}, ValueError, "method='hard'.*'diffora'"),
    ({"method": None}, TypeError, "`method` must be the name of a method, got None"),
    (
        {"method": "snip", "arch_every": 2},
        ValueError,
        "`arch_every` with `method='snip'`.*score_batches.*leave it out",
    ),
    ({"method_options": {"arch_evry": 2}}, ValueError, "`arch_evry` with `method='diffora'`.*'arch_every'"),
    ({"method_options": "{arch_every: 2}"}, ValueError, "`method_options='{arch_every: 2}'`.*not valid JSON"),
    ({"method_options": ["arch_every"]}, TypeError, "`method_options` must be a dictionary"),
    ({"extra_sites": 3}, TypeError, "`extra_sites` must be a dictionary"),
    ({"extra_sites": {"shortcuts": {}}, "weight_sharing": "layer"}, ValueError, "extra_sites.*weight_sharing='none'"),
    ({"weight_sharing": "all"}, ValueError, "weight_sharing='all'.*'none'"),
    ({"cost": "flops"}, ValueError, "cost='flops'.*must be one of"),
    ({"max_step_memory": -0.1}, ValueError, "max_step_memory=-0.1.*must be in"),
    ({"max_step_memory": "0.6"}, TypeError, "`max_step_memory` must be.*without quotes"),
    ({"max_step_memory": 0.6, "weight_sharing": "layer"}, ValueError, "max_step_memory=0.6.*no step would be cheaper"),
    ({"prefix_cache": "ram"}, ValueError, "prefix_cache='ram'.*must be one of.*'disk'"),
    ({"prefix_cache": "memory", "prefix_cache_gib": 0}, ValueError, "prefix_cache_gib=0.0.*positive"),
    ({"search_micro_batches": 0}, ValueError, "search_micro_batches=0.*1 or more"),
    ({"search_micro_batches": 2.5}, TypeError, "`search_micro_batches` must be an int"),
    ({"selection_unit": "head"}, ValueError, "selection_unit='head'.*'group'"),
    ({"selection_unit": "group", "weight_sharing": "layer"}, ValueError, "selection_unit='group'.*weight_sharing"),
    ({"selection_groups": {"qkv": ["q_proj"]}}, ValueError, "selection_unit='module'`, which has no groups"),
    ({"selection_unit": "group", "selection_groups": {"qkv": "q_proj"}}, TypeError, "'qkv'.*list of names"),
    (
        {"selection_unit": "group", "selection_groups": ["q_proj"]},
        TypeError,
        "`selection_groups` must be a dictionary",
    ),
    ({"max_step_time": 1.5}, ValueError, "max_step_time=1.5.*must be in"),
    ({"max_trainable_parameters": 0}, ValueError, "max_trainable_parameters=0.*positive"),
    ({"max_trainable_parameters": 10.5}, TypeError, "`max_trainable_parameters` must be"),
    (
        {"max_trainable_parameters": 10, "weight_sharing": "layer"},
        ValueError,
        "together with `weight_sharing='layer'`",
    ),
    ({"discretize_at": 0}, ValueError, "discretize_at=0.0.*neither"),
    ({"discretize_at": -3}, ValueError, "discretize_at=-3.0.*neither"),
    ({"discretize_at": 1.5}, ValueError, "discretize_at=1.5.*neither"),
    ({"discretize_at": float("inf")}, ValueError, "discretize_at=inf.*finite"),
    ({"discretize_at": "half"}, TypeError, "`discretize_at` must be"),
    ({"arch_warmup": -0.1}, ValueError, "arch_warmup=-0.1.*neither"),
    ({"arch_warmup": 2.5}, ValueError, "arch_warmup=2.5.*neither"),
    ({"arch_warmup": 0.3, "discretize_at": 0.3}, ValueError, "pruned before the search starts"),
    ({"arch_warmup": 30, "discretize_at": 20}, ValueError, "pruned before the search starts"),
    ({"fade_out": -1}, ValueError, "fade_out=-1.0.*neither"),
    ({"arch_every": 0}, ValueError, "arch_every=0.*1 or more"),
    ({"arch_every": 2.0}, TypeError, "`arch_every` must be"),
    ({"arch_every": True}, TypeError, "`arch_every` must be"),
    ({"arch_learning_rate": 0}, ValueError, "arch_learning_rate=0.0.*positive"),
    ({"arch_learning_rate": float("inf"), "method": "sigmoid"}, ValueError, "arch_learning_rate=inf.*finite"),
    ({"arch_learning_rate": 1.5}, ValueError, "arch_learning_rate=1.5.*Frank-Wolfe"),
    ({"arch_learning_rate": 1e30, "method": "softmax"}, ValueError, "arch_learning_rate=1e.30.*such as 0.05"),
    ({"arch_learning_rate": "0.1"}, TypeError, "`arch_learning_rate` must be.*without quotes"),
    ({"arch_order": 3}, ValueError, "arch_order=3"),
    ({"arch_order": "2"}, TypeError, "`arch_order` must be"),
    ({"arch_split": 0}, ValueError, "arch_split=0.0.*arch_dataset"),
    ({"arch_split": 1}, ValueError, "arch_split=1.0.*arch_dataset"),
    ({"arch_batch_size": 0}, ValueError, "arch_batch_size=0"),
    ({"arch_batch_size": 2.0}, TypeError, "`arch_batch_size` must be"),
    ({"arch_seed": -1}, ValueError, "arch_seed=-1"),
    ({"arch_seed": 2**32}, ValueError, "arch_seed=4294967296.*below"),
    ({"arch_seed": None}, TypeError, "`arch_seed` must be"),
    ({"arch_seed": "7"}, TypeError, "`arch_seed` must be"),
    ({"fold_gates": 1}, TypeError, "`fold_gates` must be"),
    ({"base_model_id": 3}, TypeError, "`base_model_id` must be"),
    ({"base_model_id": "/home/alice/model"}, ValueError, "base_model_id='/home/alice/model'.*such as 'org/name'"),
]


@pytest.mark.parametrize(("options", "error", "message"), CONFIG, ids=[str(options) for options, *_ in CONFIG])
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        method_of(make_config(**options))
    assert_helpful(str(found.value), message)


def test_there_are_enough_of_them() -> None:
    assert len(CONFIG) >= 40
