"""
Batches split into micro-batches, so that a step with all modules needs less memory: the same loss and update up to
rounding.

Whether the loss of a batch is the mean over its rows, over its labels or a sum under a normaliser of its own, or none
of these, as where rows are compared with each other, cannot be read off a loss function. So it is tried out on the
first batch: the loss of the whole is compared with what each rule makes of the losses of its parts. If none fits,
batches are not split. Nor are they with the auxiliary loss of a mixture of experts, which is made of products of means
over all tokens, and so small that a wrong sum of it passes for rounding. Where several rules fit, up to rounding, the
best one holds, and they are compared again on the next batches of which they say different things.

A loss may itself wait for other processes (TRL's `SFTTrainer` gathers its metrics), so all of them try out and split
alike: what one finds in its own rows is agreed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..compat.transformers import noted_auxiliary_losses
from ..config import DiffoRAConfig
from ..core.agreement import is_main_process, shares, world_size
from ..core.rows import number_of_rows, take_rows, why_without_rows
from ..logging import get_logger
from .batches import IGNORED_LABEL
from .runtime import Runtime


logger = get_logger(__name__)

LossOf = Callable[[Any], float]


class MicroBatches:
    """
    Splits batches, once it is known how the losses of parts make up that of the whole.

    Args:
        parts (`int`): into how many parts a batch is split, or into its rows if it has fewer.
        asked (`bool`, *optional*, defaults to `True`): whether the user has asked for it, so that a batch that cannot
            be split is an error.
        model (`nn.Module`, *optional*): the model whose loss it is.
        runtime ([`~diffora_trainer.search.runtime.Runtime`], *optional*): several processes.

    Attributes:
        parts (`int`): into how many; 1 once it is known that batches cannot be split.
    """

    def __init__(
        self, parts: int, asked: bool = True, model: nn.Module | None = None, runtime: Runtime | None = None
    ) -> None:
        self.parts = self._wanted = parts
        self._asked, self._model, self._runtime = asked, model, runtime or Runtime()
        self._rules: Sequence[str] = _RULES
        self._errors = dict.fromkeys(_RULES, 0.0)  # each a part of the loss, summed over the batches tried out
        self._trials = 0
        self._untried, self._warned = True, False

    def split(self, batch: Any, loss_of: LossOf) -> list[tuple[Any, float]]:
        """
        The parts of a batch, with what the loss of each is multiplied with so that they sum up to that of the batch.

        Args:
            batch: a batch: a dictionary of tensors.
            loss_of (`Callable`): gives the loss of a batch, without a trace in the training; called until it is known
                how losses add up.

        Raises:
            ValueError: if it was asked for, and the loss of this batch is not a sum or mean of those of its parts, as
                with an auxiliary loss of routers.
        """
        if self.parts == 1:
            return [(batch, 1.0)]
        rows = number_of_rows(batch)
        parts = [] if rows is None else [take_rows(batch, chunk) for chunk in _chunks(rows, self.parts)]
        weights, *others = (_weights(rule, parts) for rule in self._rules)
        doubtful = any(other != weights for other in others)  # rules that have always agreed disagree for once
        # All at once: with several processes they wait for each other here, at each batch.
        broken, single, uneven, doubtful, empty = self._any(
            rows is None, rows == 1, len(parts) < self.parts, doubtful, not all(weights)
        )
        if broken or rows is None:
            self._refuse(why_without_rows(batch))
            return [(batch, 1.0)]
        if single or (world_size() > 1 and uneven):
            if self._untried and not self._warned:
                self._warn("there is one row in a batch" if single else "a batch has fewer rows than parts")
            return [(batch, 1.0)]
        if self._untried or doubtful:
            self._try_out(batch, rows, loss_of)
            weights = _weights(self._rules[0], parts)
            [empty] = self._any(not all(weights))
        if self.parts == 1 or self._untried or (world_size() > 1 and empty):
            return [(batch, 1.0)]
        # A mean over no labels is not a number, and no part of the mean of the whole.
        return [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]

    def _any(self, *found: bool) -> list[bool]:
        """Each of these, whether it holds on any process."""
        return [share > 0 for share in shares(found, self._runtime.reduce)]

    def _try_out(self, batch: Any, rows: int, loss_of: LossOf) -> None:
        with noted_auxiliary_losses(self._model) as auxiliary:
            whole = loss_of(batch)
        has_auxiliary, unknown = self._any(bool(auxiliary), not math.isfinite(whole))
        if has_auxiliary:
            names = ", ".join(sorted(auxiliary))
            self._refuse(
                f"the model returns an auxiliary loss of its routers ({names}), which is not a sum or mean over rows; "
                "with a `router_aux_loss_coef` of 0 there would be none in its loss"
            )
            return
        if unknown:
            return  # nothing can be said of such a batch
        # Equal parts do not tell a mean over rows from one over labels; one row and the rest do it better.
        splits = [_chunks(rows, self.parts), [range(1), range(1, rows)]]
        divided = [[take_rows(batch, chunk) for chunk in split] for split in splits]
        losses = [[loss_of(part) for part in parts] for parts in divided]
        self._trials += 1
        for rule in self._rules:
            found = [
                sum(weight * loss for weight, loss in zip(_weights(rule, parts), of_parts, strict=True) if weight)
                for parts, of_parts in zip(divided, losses, strict=True)
            ]
            # A loss may be zero.
            self._errors[rule] += max(abs(value - whole) for value in found) / (abs(whole) + 1e-4)
        errors = [self._errors[rule] / self._trials for rule in self._rules]
        best = min(filter(math.isfinite, errors), default=math.inf)
        best = best if best <= _TOLERANCE else -math.inf
        # Where all rows are of one length several rules fit alike; the first one is the most common. By rounding a
        # wrong one may fit best for once, so those that are not far behind have another chance.
        near = best + min(max(_ALIKE, 20 * best), _ROUNDING)
        worse = self._any(*(not error <= best + _ALIKE for error in errors))
        unfit = self._any(*(not error <= near for error in errors))
        order = sorted(zip(worse, unfit, self._rules, strict=True), key=lambda found: found[0])
        if rules := [rule for _, other, rule in order if not other]:
            self._rules, self._untried = rules[: None if self._trials < _TRIALS else 1], False
            return
        self._refuse(
            f"the loss of a batch ({whole:.6g}) is neither the sum nor a mean of those of its parts "
            f"({', '.join(f'{loss:.6g}' for loss in losses[0][:4])}), as where rows are compared with each other"
        )

    def _refuse(self, why: str) -> None:
        self.parts = 1
        if self._asked:
            raise ValueError(
                f"You passed `search_micro_batches={self._wanted}`, but {why}. Please leave it out, and use a smaller "
                "batch with more `gradient_accumulation_steps` instead."
            )
        self._warn(why)

    def _warn(self, why: str) -> None:
        self._warned = True
        if is_main_process():
            logger.warning(
                f"Batches are not split into micro-batches: {why}. Until the pruning a step needs the memory of all "
                "modules."
            )


def wanted_micro_batches(config: DiffoRAConfig, runtime: Runtime, model: nn.Module) -> MicroBatches:
    """
    What splits the batches of a run while all modules are there.

    Args:
        config ([`DiffoRAConfig`]): the options.
        runtime ([`~diffora_trainer.search.runtime.Runtime`]): whether the training loop splits its batches, so that it
            does so without being asked, and several processes.
        model (`nn.Module`): the model that is trained.
    """
    if config.search_micro_batches is not None:
        return MicroBatches(config.search_micro_batches, model=model, runtime=runtime)
    if config.max_step_memory is None or not runtime.splits_batches:
        return MicroBatches(1)
    # What a step makes grows with its rows, so that parts of this size stay within the limit.
    return MicroBatches(math.ceil(1 / config.max_step_memory - 1e-9), asked=False, model=model, runtime=runtime)


_RULES = ("sum", "shifted labels", "labels", "rows")
_TOLERANCE = 2e-3  # bfloat16 rounds differently in batches of another size
_ROUNDING, _ALIKE = 5e-4, 1e-6
"""How much worse than the best a rule may fit, as a part of the loss: to be compared again, and to hold before it."""
_TRIALS = 4  # batches that are tried out at most


def _weights(rule: str, parts: Sequence[Any]) -> list[float]:
    """What the loss of each part is multiplied with."""
    if rule == "sum":
        return [1.0] * len(parts)
    counts = [_count(rule, part) for part in parts]
    total = sum(counts)
    return [count / total if total else math.nan for count in counts]


def _count(rule: str, part: Any) -> int:
    labels = part.get("labels")
    if rule == "rows":
        return number_of_rows(part) or 0
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 2:
        return 0
    labels = labels[:, 1:] if rule == "shifted labels" else labels
    return int((labels != IGNORED_LABEL).sum())


def _chunks(rows: int, parts: int) -> list[range]:
    """Rows in as many parts, of sizes that differ by one at most."""
    parts = min(parts, rows)
    ends = [rows * number // parts for number in range(parts + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]
