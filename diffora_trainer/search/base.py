"""What a search knows at any moment: its model under gates, its method, and what that has found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import extra_sites_of, site_kind
from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.budget import Budget
from ..core.components import Components
from ..core.costs import Ceiling, StepCosts, ceilings
from ..core.ranks import RankBudget
from ..methods.base import SelectionMethod
from ..methods.build import make_method, module_budget
from ..methods.registry import get_method
from .component_budget import check_not_cancelling, find_component_budget
from .confidence import Comparison, Confidence, SplitHalf, paired
from .diagnosis import all_kept, out_of_limits
from .losses import GatedModel, LossFunction, finite_mean
from .micro_batches import wanted_micro_batches
from .rank_plan import RankPlan
from .rank_rules import find_rank_plan, refuse
from .runtime import Runtime
from .step_costs import StepMeter


class SearchBase(GatedModel):
    """
    The state of a search.

    Args:
        model (`PeftModel`): the model.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): its sites.
        config ([`DiffoRAConfig`]): the options.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        runtime ([`~diffora_trainer.search.runtime.Runtime`]): several processes and a loss scaler.
    """

    def __init__(
        self, model: nn.Module, adapters: AdapterGrid, config: DiffoRAConfig, loss_fn: LossFunction, runtime: Runtime
    ) -> None:
        super().__init__(model, adapters, loss_fn, runtime)
        self.config = config
        self.freezes = config.unselected == "freeze"
        self.meter = StepMeter(self, self.freezes)
        self.costs: StepCosts | None = None
        self.ceilings: tuple[Ceiling, ...] = ()
        self.micro_batches = wanted_micro_batches(config, runtime, model)
        # Training losses add up in another way: the Trainer divides them by the labels of all accumulated batches.
        self.training_micro_batches = wanted_micro_batches(config, runtime, model)
        self.component_budget: RankBudget | None = None
        self.rank_plan: RankPlan | None = None
        if get_method(config.method).tells_ranks:
            self.component_budget, self.why_whole_modules = find_component_budget(config, adapters)
        else:
            self.rank_plan, self.why_whole_modules = find_rank_plan(config, adapters)
        self.trained_before = False  # known once the weights are there: see `settle_ranks`
        self.kept: Tensor | None = None
        self._told: tuple[tuple[int, ...], ...] = ()
        self.ranks: tuple[int, ...] = self.grid.ranks
        if self.rank_plan is not None:
            self.set_ranks(self.rank_plan.start)
        if self.components is not None:
            self.gates.give_each_component_one(self.components)
        self.method: SelectionMethod = self.make_method()
        self.reached = torch.zeros(len(self.gates), dtype=torch.bool)
        self.effect: Comparison | None = None
        self.early_losses: tuple[float, ...] = ()
        self.progress: Comparison | None = None
        self.halves = SplitHalf.empty(len(self.gates))
        self.skipped_steps = 0
        self.pending_losses: list[float] = []
        self.last_loss: float | None = None

    @property
    def chooses_ranks(self) -> bool:
        """Whether modules may be left with a part of their components."""
        return self.rank_plan is not None or self.component_budget is not None

    @property
    def components(self) -> Components | None:
        """What the method has an entry for, where that are single components and not whole modules."""
        return None if self.rank_plan is None else self.rank_plan.components

    @property
    def nothing_to_choose(self) -> str | None:
        """Why there is nothing to choose, as a clause: the budget keeps everything. `None` if something goes."""
        if self.component_budget is not None:  # something can go, if only what is worth nothing
            return None
        return all_kept(self.method.budget, self.config, "modules" if self.components is None else "components")

    def mean_of_modules(self, values: Tensor) -> Tensor:
        """Numbers of the entries of the method as one for each module, `(..., n)`: their mean."""
        return values if self.components is None else self.components.mean(values)

    def sum_of_modules(self, values: Tensor) -> Tensor:
        """Numbers of the entries of the method as one for each module, `(..., n)`: their sum."""
        return values if self.components is None else self.components.sum(values)

    @property
    def _separate_kinds(self) -> list[str]:
        asked = extra_sites_of(self.config).items()
        return [name for name, options in asked if site_kind(name).separately(options)]

    @property
    def ranks_kinds_apart(self) -> bool:
        """Whether different kinds of site have budgets of their own."""
        return bool(self._separate_kinds)

    @property
    def base_model(self) -> Any:
        """The model without what PEFT has put around it."""
        model: Any = self.model
        return model.get_base_model()

    def make_method(self) -> SelectionMethod:
        """The method, under the budget and what the limits of a step leave of it."""
        if self.rank_plan is not None:
            budget = self.rank_plan.matrix_budget(self.grid.row_of)
        elif self.component_budget is not None:
            # That is the budget, of which each unit of rank has to fit, and not each module.
            budget = Budget(self.grid.row_of, self.grid.parameters)
        else:
            budget = module_budget(self.config, self.grid, self.adapters.in_adapter, self._separate_kinds)
            if self.ceilings:
                budget.limit(self.ceilings)
        method = make_method(self.config, budget)
        method.inspect(self.base_model, self.adapters.sites)
        method.prepare(self.grid, self.component_budget)  # `None` where the matrix has the ranks
        return method

    def limit(self, costs: StepCosts) -> None:
        """
        Restrict the search by what was measured, and start the matrix anew.

        Raises:
            ValueError: if not even one module is within the limits.
        """
        limits = [(getattr(costs, what), limit) for what, limit in self.config.step_limits.items()]
        known = [(cost, limit) for cost, limit in limits if cost is not None]
        self.costs, self.ceilings = costs, ceilings(known, self.grid.row_of)
        if not self.ceilings:
            raise ValueError(out_of_limits(self.config, costs, set(self.grid.row_of)))
        self.method = self.make_method()
        self.gates.set_evaluation(self.method.evaluation_gates())

    def settle_ranks(self) -> None:
        """
        Before the first step: an adapter whose `lora_B` is not zero, as one that was trained before, cannot begin with
        a smaller rank. Whole modules are chosen of it, which the log and the notes tell, or, if ranks were asked for
        or the method has no other way, a `ValueError` is raised.
        """
        if self.component_budget is not None and self.config.discretize_at == 0:
            check_not_cancelling(self.adapters.sites, self.method.name)
        ranks = self.method.start_ranks() if self.rank_plan is None else self.ranks
        if ranks is None:
            return
        sites = zip(self.adapters.sites, ranks, strict=True)
        trained = [site.name for site, rank in sites if site.has_effect_beyond(rank)]
        if not trained:
            return
        reason = (
            f"the adapter of {trained[0]!r} was trained before, or its `lora_B` does not start at zero "
            "(`init_lora_weights`), so it cannot begin with a smaller rank"
        )
        if self.rank_plan is None:
            raise ValueError(
                f"You passed `method={self.method.name!r}`, but {reason}. Please use another method, such as "
                "'adalora', which begins with all ranks, or begin with a new adapter."
            )
        if self.config.selection_granularity != "auto":
            refuse(self.config.selection_granularity, reason)
        self.why_whole_modules = reason
        self.fall_back_to_modules(trained_before=True)

    def fall_back_to_modules(self, trained_before: bool) -> None:
        """
        Keep or prune whole modules, where the budget cannot be spent in ranks.

        Args:
            trained_before (`bool`): whether that is since the adapter was trained before, which the notes tell.
        """
        if self.rank_plan is not None:
            self.trained_before = trained_before
            self.rank_plan, self.ranks = None, self.grid.ranks
            self.gates.set_masks([None] * len(self.grid))
            self.method = self.make_method()

    def set_ranks(self, ranks: tuple[int, ...], faded: float = 0.0) -> None:
        """
        Let only so many components of each adapter take part, and those that took part before the choice as far as
        they have not faded out.
        """
        assert self.rank_plan is not None
        self.ranks = ranks
        self.gates.set_masks(self.rank_plan.masks(self.kept, ranks, faded))

    @property
    def confidence(self) -> Confidence:
        """How sure a choice would be now."""
        gains, groups = self.method.budget.compared(self.halves.sums)
        # Compared as modules: the components of one compete in one group, and are not independent evidence.
        gains, groups = self.mean_of_modules(gains), self.mean_of_modules(groups.double())
        return Confidence(SplitHalf(gains, self.halves.steps).agreement(groups), self.effect, self.progress)

    def measure_effect(self, batches: Iterable[Any]) -> float:
        """
        Measure what the modules have learned: the held-out loss without them and with all of them. A choice among
        modules that lower nothing is noise, and the selection says so in its `notes`. Call it right before the choice;
        like [`held_out_loss`] it leaves no trace.

        Args:
            batches (`Iterable`): as `loss_fn` takes them.

        Returns:
            `float`: the held-out loss with all modules, under the gates of evaluation.
        """
        batches = list(batches)
        with_all = self.held_out_losses(batches)
        with self.gates.override(torch.zeros(len(self.gates), dtype=torch.float32)):
            without = self.held_out_losses(batches)
        self.effect = paired(without, with_all) or self.effect
        if len(self.early_losses) == len(with_all):
            self.progress = paired(torch.tensor(self.early_losses, dtype=torch.float32), with_all)
        return finite_mean(with_all)

    def measure_early(self, batches: Iterable[Any]) -> None:
        """
        Measure the held-out loss after a third of the search, which [`measure_effect`] compares with that of the same
        batches at the choice, of those in which both are finite.

        Args:
            batches (`Iterable`): as `loss_fn` takes them.
        """
        losses = self.held_out_losses(batches)
        self.early_losses = tuple(losses.tolist()) if bool(losses.isfinite().any()) else ()

    def commit(self, kept: Tensor, ranks: tuple[int, ...]) -> None:
        """
        Make a choice the final one.

        Args:
            kept (`Tensor` of dtype `torch.bool`): which entries of the method stay.
            ranks (`tuple[int, ...]`): the ranks of the modules.

        Raises:
            ValueError: if the method says itself which components stay, and these are of other modules.
        """
        if self.component_budget is not None:
            told = self.method.kept_components()
            if kept.tolist() != [bool(own) for own in told]:
                raise ValueError(
                    f"You passed a choice of modules with `method={self.method.name!r}`, which says itself which "
                    "components of each it keeps, and by its scores these are of other modules. Please restore them "
                    "first (`method.load_state_dict`), or let the method choose: `discretize()`."
                )
            self._told = told
        self.kept = kept
        if self.rank_plan is not None:
            self.set_ranks(ranks)

    @property
    def told_components(self) -> tuple[tuple[int, ...], ...]:
        """Which components stay, of a method that says so itself: from the choice on those that it said then."""
        return self.method.kept_components() if self.kept is None else self._told

    @property
    def keeps_function(self) -> bool:
        """Whether the model computes the same before and after the pruning: nothing moves, or nothing leaves it."""
        if self.freezes or self.rank_plan is None:
            return self.freezes
        before = self.rank_plan.masks(None, self.rank_plan.start, faded=0.0)
        after = self.rank_plan.masks(*choice_of(self), faded=1.0)
        return all(
            own is other if own is None or other is None else torch.equal(own, other)
            for own, other in zip(before, after, strict=True)
        )

    def kept_components(self, kept: Tensor, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Which components a choice leaves of each module; nothing if they are the first ones of all."""
        if self.component_budget is not None:
            found = self.told_components
        else:
            found = () if self.components is None else self.components.indices(kept, ranks)
        return () if all(own == tuple(range(len(own))) for own in found) else found


def choice_of(search: SearchBase) -> tuple[Tensor, tuple[int, ...]]:
    """
    What a pruning would leave now: which entries of the method, bools, and the ranks of the modules, 0 for one that
    goes.
    """
    kept, ranks = search.kept, search.grid.ranks
    if search.rank_plan is not None:
        if kept is not None:
            return kept, search.ranks
        return search.rank_plan.choose(search.method, evident=search.confidence.beyond_chance)
    if search.component_budget is not None:
        ranks = tuple(map(len, search.told_components))
        return torch.tensor(ranks) > 0, ranks
    if kept is None:
        kept = search.method.discretize()
    return kept, tuple(rank if keep else 0 for rank, keep in zip(ranks, kept.tolist(), strict=True))
