"""What makes a choice doubtful, in sentences for the log, the selection and the model card."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DiffoRAConfig
from ..core.budget import Budget
from ..core.costs import STEP_LIMITS, StepCosts
from ..core.text import some
from ..methods.base import SelectionMethod
from ..methods.build import scope_of
from .confidence import Confidence


TRAINED_BEFORE = (
    "The adapter was trained before this run, or its `lora_B` does not start at zero (`init_lora_weights`), so it "
    "could not begin with a smaller rank, and the cap kept or pruned whole modules: what the others had learned is "
    "gone. With a larger `max_trainable_parameters` fewer of them go; a new one with `init_lora_weights=True` begins "
    "at the rank that fits."
)
_TOO_FEW = "The search made too few steps to compare two halves of it"


@dataclass(frozen=True)
class Evidence:
    """
    What a choice rests on.

    Args:
        reached (`Tensor` of shape `(n,)` and dtype `torch.bool`): which gates ever had a gradient; of a
            method that takes none, which adapters were ever called.
        skipped_steps (`int`): architecture steps whose loss was not finite.
        confidence ([`~diffora_trainer.search.confidence.Confidence`]): how sure the choice is.
        in_ranks (`bool`): whether the budget is spent in ranks, evenly where there is no evidence.
        what (`str`, *optional*, defaults to `"modules"`): what the method has an entry for.
        kept (`Sequence[int]`, *optional*): the parameters that are kept of each module.
    """

    reached: Tensor
    skipped_steps: int
    confidence: Confidence
    in_ranks: bool
    what: str = "modules"
    kept: Sequence[int] = ()

    @property
    def unreached_share(self) -> float:
        """The part of the kept parameters that belongs to modules that nothing has reached."""
        lost = sum(count for count, reached in zip(self.kept, self.reached.tolist(), strict=False) if not reached)
        return lost / max(1, sum(self.kept))


def all_kept(budget: Budget, config: DiffoRAConfig, what: str) -> str | None:
    """
    That a budget keeps everything, so that there is nothing to choose, and why, where less was asked for.

    Args:
        budget ([`~diffora_trainer.core.budget.Budget`]): the budget.
        config ([`DiffoRAConfig`]): the options.
        what (`str`): what it has an entry for.

    Returns:
        `str` or `None`: a clause, if it does.
    """
    if not budget.keeps_all:
        return None
    why, by_layer = "", scope_of(config) == "layer"
    less = budget.cap is None and config.ratio < 1
    if budget.is_one_unit:
        why = ", which are kept or pruned together"
    elif less and budget.at_least_one:
        why = ", since at least one of each layer is kept" if by_layer else ", since at least one is kept"
    elif less and by_layer and int(torch.bincount(budget.group).max()) == 1:
        why = f", since each layer has one {what.removesuffix('s')}"
    elif less:
        why = f", since {config.ratio:g} of them is rounded to whole {what}{' in each layer' if by_layer else ''}"
    return f"the budget keeps all {len(budget)} {what}{why}"


def out_of_limits(config: DiffoRAConfig, costs: StepCosts, rows: Collection[int]) -> str:
    """
    A limit of a step that not even one module is within.

    Args:
        config ([`DiffoRAConfig`]): the options.
        costs ([`~diffora_trainer.core.costs.StepCosts`]): what was measured.
        rows (`Collection[int]`): the rows that have modules.
    """
    found, why = [], {"time": "the forward pass alone", "memory": "the logits and the loss alone"}
    for what, name in STEP_LIMITS.items():
        if (cost := getattr(costs, what)) is not None:
            least = min(cost.depth[row] for row in rows) / cost.all_modules
            found.append(
                f"`{name}={getattr(config, name):g}`, and a step with one module takes {least:.2f} of what one with "
                f"all modules does ({why[what]} may be most of it)"
            )
    return (
        f"You passed {' and '.join(found)}. No choice of modules can keep that. Please raise the limit, or leave it "
        f"out{' and use a smaller batch with more `gradient_accumulation_steps`' if costs.memory is not None else ''}."
    )


def doubts(
    method: SelectionMethod, names: Sequence[str], evidence: Evidence, nothing_to_choose: str | None
) -> tuple[str, ...]:
    """
    What a choice does not rest on: modules of which nothing was learned, too few steps, equal scores at the edge of
    the choice, and a budget that leaves nothing to choose. Empty if there is nothing to say.

    Args:
        method ([`~diffora_trainer.methods.base.SelectionMethod`]): what the choice is made by.
        names (`Sequence[str]`): names of the modules.
        evidence ([`Evidence`]): what it rests on.
        nothing_to_choose (`str` or `None`): why there is nothing to choose, if so (see [`all_kept`]).
    """
    count, missed = len(names), (~evidence.reached).nonzero().flatten().tolist()
    if nothing_to_choose is not None:
        return (f"There was nothing to choose: {nothing_to_choose}.",)
    in_ranks = evidence.in_ranks
    evenly = "so no module was favoured: the budget stays spread evenly over all of them."
    arbitrary = evenly if in_ranks else f"so the {evidence.what} are kept by their order in the model alone."
    if not method.steps and evidence.skipped_steps:
        return (
            f"The choice is arbitrary: not one of the {evidence.skipped_steps} architecture steps had a finite loss, "
            f"{arbitrary} Please look for the cause of the NaN or infinity, and start again.",
        )
    if not method.steps:
        return (f"The choice is arbitrary: no architecture step was made, {arbitrary}",)
    # Other scores are no gradients: all that can be said is which adapters took part in the loss.
    by_calls = not (method.searches or method.gradient_score or method.trains_gates)
    if len(missed) == count and not by_calls:
        return (
            f"The choice is arbitrary: the loss had a gradient of exactly 0 in all {count} gates, {arbitrary} "
            "`lora_B` starts at 0, and so do the gradients of the gates: with a learning rate of 0, an optimizer "
            "that does not hold the LoRA weights, or a loss whose minimum the model starts from, they stay there.",
        )
    notes = []
    effect = evidence.confidence.effect
    if in_ranks and not evidence.confidence.beyond_chance:
        notes.append(f"{evidence.confidence.doubt() or _TOO_FEW}, {evenly}")
    elif effect is not None and not effect.after < effect.before:
        notes.append(
            f"The LoRA did not lower the held-out loss before the choice: {effect.before:.4g} without it, "
            f"{effect.after:.4g} with all {count} modules. The run had nothing to learn, or had not begun to learn "
            "what carries over to held-out data, so the gates had little to go by. A later choice "
            "(`discretize_at`) or another learning rate may help."
        )
    elif doubt := evidence.confidence.doubt():
        notes.append(f"{doubt}, so the choice is hardly better than a random one of the same size.")
    elif method.searches and method.steps < 2:
        notes.append(f"{_TOO_FEW}, so nothing tells the choice from a random one of the same size.")
    if missed:
        share = (
            f"; {evidence.unreached_share:.0%} of the parameters that are kept are theirs"
            if evidence.unreached_share
            else ""
        )
        parts, what = ("LoRA", "was never called") if by_calls else ("gates", "never had a gradient")
        notes.append(
            f"The {parts} of {len(missed)} of {count} modules {what} "
            f"({some([names[index] for index in missed])}), so nothing was learned of these modules and they were "
            f"ranked without evidence{share}. They take no part in the loss, or a fused kernel computes their LoRA "
            "without calling `lora_A`."
        )
    if ties := method.num_boundary_ties():
        notes.append(
            f"{ties} {evidence.what} at the edge of the choice have equal scores. Those that stand first in the "
            "model are kept of them, as far as they fit."
        )
    return tuple(notes)
