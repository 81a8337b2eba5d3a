"""What is kept or pruned together: single modules, groups that are computed as one, or whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .grid import OTHER_ROW, Grid
from .text import some


FUSED = {
    "Llama, Qwen, Gemma, OPT, Bart": ("q_proj", "k_proj", "v_proj"),
    "BERT, RoBERTa, ViT": ("query", "key", "value"),
    "DeBERTa": ("query_proj", "key_proj", "value_proj"),
    "DistilBERT": ("q_lin", "k_lin", "v_lin"),
    "DeepSeek": ("q_a_proj", "kv_a_proj_with_mqa"),
    "T5": ("q", "k", "v"),
    "original Llama": ("wq", "wk", "wv"),
    "diffusers": ("to_q", "to_k", "to_v"),
    "MLP of Llama, Qwen, Gemma": ("gate_proj", "up_proj"),
    "MLP of T5 1.1": ("wi_0", "wi_1"),
    "MLP of Mixtral": ("w1", "w3"),
}
"""Names of modules of one parent that read the same input, which fused kernels and servers compute as one."""

CROSS_ATTENTION = frozenset({"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "attn2"})
"""What models call an attention whose query reads other states than key and value: of it only those two are one."""


def find_units(grid: Grid, unit: str, groups: Mapping[str, Sequence[str]] | None = None) -> list[int]:
    """
    The unit of each module of a grid.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        unit (`str`): `"module"`: each is one. `"group"`: those of one parent module that are computed as one, see
            `FUSED` and `CROSS_ATTENTION`, or that `groups` names. `"layer"`: those of a numbered layer.
        groups (`Mapping[str, Sequence[str]]`, *optional*): instead of `FUSED`, the modules of each group by their last
            names (`["q_proj", "k_proj"]`, of one parent), or by longer ends (`["self_attn.q_proj", "mlp.up_proj"]`, of
            one layer).

    Raises:
        ValueError: if a group names no module of the grid, or a module is in two groups.
    """
    keys = [_key(grid, index, unit, groups or FUSED) for index in range(len(grid))]
    if unit == "group" and groups:
        ends = {end for group in groups.values() for end in group}
        if missing := sorted(end for end in ends if not any(_ends(name, end) for name in grid.names)):
            raise ValueError(
                f"You passed `selection_groups` with {some(missing)}, but no LoRA module has that name. There are "
                f"{some(sorted({name.rsplit('.', 1)[-1] for name in grid.names}))}."
            )
    index = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [index[key] for key in keys]


def _key(grid: Grid, index: int, unit: str, groups: Mapping[str, Sequence[str]]) -> tuple[object, ...]:
    site = grid.sites[index]
    if unit == "layer" and grid.rows[site.row] != OTHER_ROW:
        return site.kind, site.row
    if unit == "group":
        matches = [(group, end) for group, ends in groups.items() for end in ends if _ends(site.name, end)]
        if len({group for group, _ in matches}) > 1:
            raise ValueError(
                f"You passed `selection_groups` in which {site.name!r} belongs to {matches[0][0]!r} and to "
                f"{matches[-1][0]!r}. Please name each module in one group."
            )
        if groups is FUSED and not CROSS_ATTENTION.isdisjoint(site.name.split(".")):
            matches = [(group, end) for group, end in matches if end != groups[group][0]]
        if matches:
            group, end = max(matches, key=lambda pair: len(pair[1]))
            return site.kind, site.row, group, site.name[: len(site.name) - len(end)]
    return site.kind, site.row, site.name


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
