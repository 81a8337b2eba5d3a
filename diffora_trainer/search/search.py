"""The bi-level search over a PEFT model and a loss function. It works without any Trainer."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.backward import input_embeddings, suspend_input_gradients
from ..adapters.gates import Gates, checkpoints_activations, pruned_view
from ..adapters.grid import OTHER_ROW, ModuleGrid, parameters_of, searched_modules
from ..compat import checkpoints
from ..config import DiffoRAConfig
from ..core.agreement import check_agreement, fingerprint, is_main_process
from ..core.budget import Budget
from ..core.isolation import side_effect_free
from ..core.selection import Selection, sanitize, short_names
from ..logging import get_logger
from ..methods.matrix import DifferentialAdaptationMatrix, ScoreMatrix
from ..methods.scores import ScoreFunction, check_finite, check_score_function, module_scores, scale_free
from .timing import REPEATS, StepTimes, measure_step_times, timed


logger = get_logger(__name__)

LossFunction = Callable[[nn.Module, Any], Tensor]

_MAX_LOGGED_KINDS = 16
_NO_GATE = (
    "The loss does not depend on any gate, so nothing can be learned about the modules. Please let `loss_fn` run "
    "the model that it is given, without `torch.no_grad` and not only in its backward pass; of a trainer, that is its "
    "`compute_loss`, or `compute_architecture_loss` where an architecture step needs another loss."
)


class ArchitectureSearch:
    """
    Learns which LoRA modules of a model to keep (DiffoRA, https://huggingface.co/papers/2502.08905).

    The two levels alternate: your loop steps the LoRA weights on training batches, and [`step`] moves the matrix on
    held-out batches. An architecture step touches neither the weights, nor their gradients, nor any random stream of
    PyTorch, NumPy or Python.

    ```python
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss)
    search.begin()
    for step, batch in enumerate(train_batches, start=1):
        search.draw_gates()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if warmup < step <= cut:
            search.step(next(held_out_batches))
        if step == cut:
            selection = search.finish()
            apply_selection(model, selection, optimizer, scheduler)
    ```

    With another `method` than `"diffora"` there are no architecture steps: call [`score`] once, before [`finish`].
    Shortcuts that the model has (see [`~diffora_trainer.add_shortcuts`]) are chosen among as well.

    Args:
        model (`PeftModel`): a model with an active LoRA adapter.
        config ([`DiffoRAConfig`], *optional*): the options; what concerns a Trainer's schedule and data is not read.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        adapter_name (`str`, *optional*): which adapter to search; defaults to the active one.
        reduce (`Callable`, *optional*): averages a float32 CPU tensor over all processes, so that all of them take the
            same decisions. Defaults to the identity.
        loss_scale (`Callable`, *optional*): gives the factor by which the loss is multiplied before its gradient is
            taken, and by which the gradient is divided again: the loss scaler's, in float16. Defaults to 1.
        score_function (`Callable`, *optional*): for `method="custom"`: `score_function(model, batches)` gives a
            dictionary from the name of each LoRA module to its score; higher is kept.

    Raises:
        TypeError: if the model is not a `PeftModel`, or its adapter not LoRA.
        ValueError: if the adapter cannot be searched (see [`ModuleGrid.from_model`]), no module
            fits the budget, only one of `score_function` and `method="custom"` is passed, or step time is to be saved
            (`cost="time"`) where the input embeddings are trained too.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DiffoRAConfig | None = None,
        *,
        loss_fn: LossFunction,
        adapter_name: str | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        loss_scale: Callable[[], float] | None = None,
        score_function: ScoreFunction | None = None,
    ) -> None:
        if not isinstance(config, (DiffoRAConfig, type(None))):
            raise TypeError(f"`config` must be a `DiffoRAConfig`, got {type(config).__name__}.")
        if not callable(loss_fn):
            raise TypeError(
                f"`loss_fn` must be a function of the model and a batch, got {type(loss_fn).__name__}. Please pass "
                "one, such as `lambda model, batch: model(**batch).loss`."
            )
        self.model = model
        self.config = config or DiffoRAConfig()
        check_score_function(self.config.method, score_function)
        self.grid = ModuleGrid.from_model(model, adapter_name)
        if self.grid.shortcuts and self.config.weight_sharing != "none":
            raise ValueError(
                f"You passed `weight_sharing={self.config.weight_sharing!r}` for a model with shortcuts. What is "
                "saved beside shortcuts shares no matrices. Please set `weight_sharing='none'`, or call "
                "`remove_shortcuts(model)`."
            )
        if self.config.cost == "time":
            _check_ends_early(model, self.grid.adapter_name)
        self.matrix = make_matrix(self.grid, self.config)
        self.gates = Gates(model, self.grid)
        self.skipped_steps = 0
        self.times: StepTimes | None = None
        self.decided: Tensor | None = None
        self._loss_fn = loss_fn
        self._reduce = reduce or (lambda values: values)
        self._loss_scale = loss_scale or (lambda: 1.0)
        self._score_function = score_function
        self.reached = torch.zeros(len(self.grid), dtype=torch.bool)
        """Which gates ever had a gradient."""
        self.effect: tuple[float, float] | None = None
        """Held-out loss without the modules and with all of them, when the choice was made (see `measure_effect`)."""
        self.pending_losses: list[float] = []
        self.last_loss: float | None = None
        self._checkpointing = False
        self._closing: Tensor | None = None

    def begin(self) -> None:
        """
        Attach the gates to the model. From here on the weights train under the gates of [`draw_gates`].

        What makes the output of the embeddings require a gradient is suspended, so that a backward pass goes no deeper
        than the lowest module that is trained. Only reentrant checkpointing would need it: to train the model in that
        way later, call its `enable_input_require_grads()` again.

        Raises:
            ValueError: if the model checkpoints activations in the reentrant way.
        """
        # Activation checkpointing only works in training mode, and without it an architecture step needs more memory
        # than a training step has. Otherwise evaluation mode is better: dropout is noise in the gates' gradient.
        self._checkpointing = checkpoints_activations(self.model)
        suspend_input_gradients(self.model)
        self.gates.attach()
        self.gates.set_evaluation(self.matrix.evaluation_gates())

    def check_agreement(self, record: str) -> None:
        """
        Make sure that all processes hold the same record of what they search, before they wait for each other.

        Args:
            record (`str`): what must be equal.

        Raises:
            ValueError: on every process, if any two differ.
        """
        check_agreement(
            fingerprint(record),
            self._reduce,
            "what to search: modules, options, schedule or the number of held-out rows",
            "Please start all of them with the same script, arguments and data.",
        )

    def check_choice(self, kept: Tensor) -> None:
        """Raise a `ValueError` on every process if they would not all keep the same modules, `(n,)` bools."""
        check_agreement(
            kept,
            self._reduce,
            "which modules to keep",
            "Please make sure that all of them read the same data and files.",
        )

    def measure_times(self, batch: Any) -> StepTimes:
        """
        Time training steps of different depths, and restrict the search to modules with which a step stays under
        `max_step_time`. Call it after the warm-up, before the first [`step`]; only with `cost="time"`.

        Like an architecture step, this leaves no trace in weights, gradients and random streams.

        Args:
            batch: a batch of the size of a training batch, as `loss_fn` takes it.
        """
        numbered = [row != OTHER_ROW for row in self.grid.rows]
        times = measure_step_times(lambda kept: self._seconds(batch, kept), self.grid.row_of, numbered)
        # All processes must restrict the search alike.
        flat = self._reduce(torch.tensor([times.all_modules, times.per_module, *times.depth])).tolist()
        self.restrict(StepTimes(flat[0], tuple(flat[2:]), flat[1]))
        assert self.times is not None
        return self.times

    def restrict(self, times: StepTimes) -> None:
        """Restrict the search by measured times, and start the matrix anew."""
        self.times = times
        budget = self.matrix.budget
        others = times.per_module * (budget.expected_count - 1)
        limit = self.config.max_step_time * times.spread(budget.expected_count) - others
        allowed = budget.max_depth_mask([times.depth[row] for row in self.grid.row_of], limit)
        self.matrix = make_matrix(self.grid, self.config, allowed)
        self.gates.set_evaluation(self.matrix.evaluation_gates())

    def step_seconds(self, batch: Any) -> float:
        """Seconds of a training step (forward and backward pass) of the model as it is: the least of a few."""
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return min(self._time(batch, weights) for _ in range(REPEATS + 1))

    def _seconds(self, batch: Any, kept: Sequence[int]) -> float:
        with pruned_view(self.model, [self.grid.names[index] for index in kept], self.grid.adapter_name):
            # With what is trained beside the LoRA, such as a head: the backward pass goes down to the lowest of all.
            return self._time(batch, [parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def _time(self, batch: Any, weights: list[nn.Parameter]) -> float:
        def step() -> None:
            loss = self._loss(batch)
            torch.autograd.grad(loss, weights, allow_unused=True)

        with self._side_effect_free(training=True), self.gates.override(None):
            return timed(step, self.gates.device)

    def decide(self, kept: Tensor | None = None) -> None:
        """
        Make the choice, ahead of the cut: what the matrix learns from here on does not change it any more. [`close`]
        then closes the gates of the others.

        Args:
            kept (`Tensor` of shape `(n,)` and dtype `torch.bool`, *optional*): a choice that was made before, when a
                run is resumed.

        Raises:
            ValueError: on every process, if they would not all keep the same modules.
        """
        decided = self.matrix.choose() if kept is None else kept
        self.check_choice(decided)
        self.decided = decided

    def close(self, progress: float) -> None:
        """
        Set the gates of the modules that will go, for training and evaluation. Those that stay are left open.

        Args:
            progress (`float`): 0 leaves all gates open, at 1 the model computes what it will after the cut.

        Raises:
            ValueError: if the choice is not made yet.
        """
        if self.decided is None:
            raise ValueError("Nothing can be closed before the choice is made: call `decide` first.")
        self._closing = torch.where(self.decided, 1.0, 1.0 - progress)
        self.gates.set_evaluation(self._closing)

    def draw_gates(self) -> None:
        """
        Set the gates of the next training step. Call it before each forward pass of a training batch.

        Raises:
            TypeError: if the relaxation leaves the gates open and its class does not say so.
        """
        self.gates.set_training(self._training_gates())

    def _training_gates(self) -> Tensor | None:
        if self._closing is not None:
            return self._closing
        gates = self.matrix.training_gates()
        if gates is None and not self.matrix.trains_open:
            raise TypeError(
                f"`training_gates` of {type(self.matrix).__name__} returned None, which leaves all gates open, but "
                "its `trains_open` is False, so the gates of the modules that go would not be closed before the cut. "
                "Please set `trains_open = True` in the class, or return gates."
            )
        return gates

    def step(self, batch: Any, train_batch: Any = None, learning_rate: float | None = None) -> float | None:
        """
        One architecture step: the gradient of the held-out loss with respect to the gates moves the matrix.

        Args:
            batch: a held-out batch, as `loss_fn` takes it.
            train_batch (*optional*): a training batch; needed for `arch_order=2`.
            learning_rate (`float`, *optional*): present learning rate of the weights; needed for `arch_order=2`.

        Returns:
            `float` or `None`: the held-out loss, or `None` if it or its gradient was not finite. Such a step is
            counted in `skipped_steps` and never reaches the matrix.

        Raises:
            ValueError: if `arch_order=2` lacks its training batch or learning rate, or the loss does not depend on any
                gate.
        """
        if self.config.arch_order == 2 and (train_batch is None or learning_rate is None):
            raise ValueError(
                "`arch_order=2` looks one training step ahead, so `step` needs `train_batch` and `learning_rate`. "
                "Please pass both, or set `arch_order=1`."
            )
        gates = self.matrix.search_gates().detach()
        with self._side_effect_free():
            if self.config.arch_order == 1:
                loss, (gradient,) = self._gradients(batch, gates, [])
            else:
                assert learning_rate is not None
                loss, gradient = self._unrolled(batch, train_batch, learning_rate, gates)
        # The one transfer from the device in an architecture step; loss and gradient travel together.
        report = self._reduce(torch.cat([gradient.float().cpu(), loss.detach().float().cpu().reshape(1)]))
        gradient, value = report[:-1], float(report[-1])
        if not torch.isfinite(report).all():
            self.skipped_steps += 1
            return None
        self.reached |= gradient != 0
        self.matrix.step(gradient)
        self.gates.set_evaluation(self.matrix.evaluation_gates())
        self.pending_losses.append(value)
        self.last_loss = value
        return value

    def score(self, batches: Sequence[Any]) -> Tensor:
        """
        Score all modules once, by another `method` than `"diffora"`: what is chosen from then on. See
        [`~diffora_trainer.methods.scores`] for the formulas. Like an architecture step, this leaves no trace in
        weights, gradients, modes and random streams, also when it fails.

        Over several processes the scores are averaged.

        Args:
            batches (`Sequence`): the scoring batches, as `loss_fn` takes them.

        Returns:
            `Tensor` of shape `(n,)`: the scores in the order of the grid.

        Raises:
            ValueError: if the method is `"diffora"`, a score is not finite, or all scores tie.
        """
        method, matrix, batches = self.config.method, self.matrix, list(batches)
        if not isinstance(matrix, ScoreMatrix):
            raise ValueError(
                "You called `score` with `method='diffora'`, which learns from architecture steps. Please call "
                "`step`, or choose another `method`."
            )
        if not batches:
            raise ValueError("There is no batch to score the modules on. Please pass at least one.")
        with self._side_effect_free(training=False), self.gates.override(None):
            for module in self.model.modules():
                if checkpoints(module):
                    module.training = True  # it checkpoints in no other mode; its parts stay in evaluation
            scores, ties = module_scores(
                method,
                self.model,
                self.grid,
                gates=self.gates,
                loss=self._loss,
                batches=batches,
                scale=self._loss_scale(),
                seed=self.config.arch_seed,
                draw=matrix.steps,
                function=self._score_function,
                reduce=self._reduce,
            )
        scores, ties = self._reduce(torch.stack([scores, ties]))
        if self.config.normalize_scores:
            sizes = torch.tensor(self.grid.parameters, dtype=torch.float64)
            scores, ties = scores / sizes, ties / sizes
        check_finite(method, self.grid, scores)
        if self.grid.shortcuts and self.config.shortcut_ranking == "combined":
            scores = scale_free(method, self.grid, scores)
        # Of a score that is a gradient, exactly 0 means that none has arrived.
        self.reached |= (scores != 0) | torch.tensor(method not in ("grad_norm", "snip"))
        matrix.set_scores(scores, ties)
        return matrix.scores()

    def held_out_loss(self, batches: Iterable[Any], relaxed: bool = False) -> float:
        """
        Mean loss over batches, in evaluation mode and without gradients; it leaves no trace in the training.

        Args:
            batches (`Iterable`): as `loss_fn` takes them.
            relaxed (`bool`, *optional*, defaults to `False`): under the gates that the weights are trained with, drawn
                anew for each batch, instead of those of evaluation.
        """
        losses = []
        with self._side_effect_free(training=False), torch.no_grad():
            for batch in batches:
                with self.gates.override(self._training_gates()) if relaxed else nullcontext():
                    losses.append(self._loss(batch).detach().float().cpu().reshape(1))
        return float(self._reduce(torch.cat(losses).mean().reshape(1)))

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
        with_all = self.held_out_loss(batches)
        with self.gates.override(torch.zeros(len(self.grid))):
            without = self.held_out_loss(batches)
        if math.isfinite(without) and math.isfinite(with_all):
            self.effect = (without, with_all)
        return with_all

    def finish(self, step: int | None = None) -> Selection:
        """
        Discretize the matrix and take the gates off the model. What is kept is decided here; to carry it out, pass the
        result to [`apply_selection`]. What makes the choice doubtful is logged as a warning,
        and stands in the selection's `notes`.

        Args:
            step (`int`, *optional*): present optimizer step, for the record.

        Raises:
            ValueError: on every process, if they would not all keep the same modules.
        """
        selection = self.select(step)
        self.check_choice(torch.tensor(selection.kept))
        self.gates.detach()
        if is_main_process():
            for note in selection.notes:
                logger.warning(note)
        return selection

    def select(self, step: int | None = None) -> Selection:
        """The selection that a cut would make now. Changes nothing."""
        kept = (self.matrix.choose() if self.decided is None else self.decided).tolist()
        # A selected module goes on under the gate that its weights were trained for; an unselected one may become the
        # start of a shared pair, and then acts on modules that it was not trained for: its small relaxed gate fits.
        relaxed, trained = self.matrix.values(), self.matrix.evaluation_gates()
        scores = self.matrix.scores()
        selected = trained if trained is not None and self.config.fold_gates else torch.ones(len(kept))
        factors = torch.where(torch.tensor(kept), selected, relaxed).tolist()
        return Selection(
            rows=self.grid.rows,
            columns=self.grid.columns,
            modules=self.grid.names,
            positions=self.grid.positions,
            parameters=self.grid.parameters,
            scores=tuple(scores.tolist()),
            gates=tuple(self.matrix.values().tolist()),
            factors=tuple(factors),
            kept=tuple(kept),
            shared=self._sharing(kept),
            step=step,
            times=self._predicted_times(kept),
            config=self.config.to_dict(),
            versions=library_versions(),
            shortcuts=self.grid.shortcuts,
            gains=tuple((scores if (ties := self.matrix.tie_breaker()) is None else ties).tolist()),
            notes=self.doubts(),
        )

    @property
    def keeps_all(self) -> bool:
        """Whether the budget has room for every module, so that there is nothing to choose."""
        return len(self.grid) == int(self.matrix.budget.choose(torch.zeros(len(self.grid))).sum())

    def doubts(self) -> tuple[str, ...]:
        """
        What the choice does not rest on, in sentences: modules of which nothing was learned, equal scores at the edge
        of the choice, and a budget that leaves nothing to choose. Empty if there is nothing to say.
        """
        count, missed = len(self.grid), (~self.reached).nonzero().flatten().tolist()
        if self.keeps_all:
            return (
                f"There was nothing to choose: the budget keeps all {count} modules"
                + (
                    ", since at least one of each layer is kept."
                    if self.config.max_trainable_parameters is None and self.config.selection_ratio < 1
                    else "."
                ),
            )
        arbitrary = "so the modules are kept by their order in the model alone."
        if not self.matrix.steps and self.skipped_steps:
            return (
                f"The choice is arbitrary: not one of the {self.skipped_steps} architecture steps had a finite loss, "
                f"{arbitrary} Please look for the cause of the NaN or infinity, and start again.",
            )
        if not self.matrix.steps:
            return (f"The choice is arbitrary: no architecture step was made, {arbitrary}",)
        if len(missed) == count:
            return (
                f"The choice is arbitrary: the loss had a gradient of exactly 0 in all {count} gates, {arbitrary} "
                "`lora_B` starts at 0, and so do the gradients of the gates: with a learning rate of 0, an optimizer "
                "that does not hold the LoRA weights, or a loss whose minimum the model starts from, they stay there.",
            )
        notes = []
        if self.effect is not None and not self.effect[1] < self.effect[0]:
            without, with_all = self.effect
            notes.append(
                f"The LoRA did not lower the held-out loss before the choice: {without:.4g} without it, "
                f"{with_all:.4g} with all {count} modules. The run had nothing to learn, or had not begun to learn "
                "what carries over to held-out data, so the gates had little to go by. A later choice "
                "(`discretize_at`) or another learning rate may help."
            )
        if missed:
            names = ", ".join(sanitize(self.grid.names[index]) for index in missed[:3])
            notes.append(
                f"The gates of {len(missed)} of {count} modules never had a gradient ({names}"
                f"{', ...' if len(missed) > 3 else ''}), so nothing was learned of these modules and they were ranked "
                "without evidence. They take no part in the loss, or a fused kernel computes their LoRA without "
                "calling `lora_A`."
            )
        if undecided := self.matrix.num_boundary_ties():
            notes.append(
                f"{undecided} modules at the edge of the choice have equal scores. Those that stand first in the "
                "model are kept of them."
            )
        return tuple(notes)

    def _predicted_times(self, kept: Sequence[bool]) -> dict[str, float]:
        if self.times is None:
            return {}
        rows = [row for row, keep in zip(self.grid.row_of, kept, strict=True) if keep]
        return {
            "all_modules": self.times.all_modules,
            "spread_over_all_layers": self.times.spread(len(rows)),
            "predicted": self.times.predict(rows),
        }

    def metrics(self) -> dict[str, float]:
        """
        What to log: the DAM's entropy and gates (of each kind too with `log_gates_by_kind`), and the mean architecture
        loss since the last call. Of a method that scores: the scores, once there are any.
        """
        scored = isinstance(self.matrix, ScoreMatrix)
        if scored and not self.matrix.steps:
            return {}
        values, what = (self.matrix.scores(), "score") if scored else (self.matrix.values(), "gate")
        report = {} if scored else {"diffora/entropy": self.matrix.entropy()}
        report[f"diffora/{what}_min"] = float(values.min())
        report[f"diffora/{what}_mean"] = float(values.mean())
        report[f"diffora/{what}_max"] = float(values.max())
        if self.config.log_gates_by_kind and len(self.grid.columns) <= _MAX_LOGGED_KINDS:
            table = self.matrix.as_matrix(
                self.grid.position_tensor, (len(self.grid.rows), len(self.grid.columns)), values
            )
            for column, value in zip(short_names(self.grid.columns), table.nanmean(dim=0).tolist(), strict=True):
                report[f"diffora/{what}/{column}"] = value
        if self.pending_losses:
            report["diffora/arch_loss"] = sum(self.pending_losses) / len(self.pending_losses)
            self.pending_losses.clear()
        if self.skipped_steps:
            report["diffora/skipped_steps"] = float(self.skipped_steps)
        return report

    def _sharing(self, kept: Sequence[bool]) -> tuple[tuple[str, ...], ...]:
        """Groups of unselected modules with equal shapes; the best-scored of each group comes first."""
        if self.config.weight_sharing == "none":
            return ()
        scores = self.matrix.scores().tolist()
        groups: dict[tuple[Any, ...], list[tuple[float, int]]] = {}
        for index, (row, shape) in enumerate(zip(self.grid.row_of, self.gates.shapes, strict=True)):
            if not kept[index]:
                key = (row if self.config.weight_sharing == "layer" else None, *shape)
                groups.setdefault(key, []).append((-scores[index], index))
        return tuple(
            tuple(self.grid.names[index] for _, index in sorted(group)) for group in groups.values() if len(group) > 1
        )

    def _loss(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"The loss function returned {found}, but one number is needed. Please return a tensor of one "
                "element, such as `model(**batch).loss`."
            )
        return loss

    def _gradients(self, batch: Any, gates: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """Loss of a batch at some gates, and its gradients with respect to the gates and the weights."""
        leaf = gates.clone().to(self.gates.device).requires_grad_()
        with self.gates.override(leaf):
            loss = self._loss(batch)
            if not loss.requires_grad:
                raise ValueError(_NO_GATE)
            scale = self._loss_scale()
            # `torch.autograd.grad` leaves every `.grad` alone, and computes nothing that only the weights need.
            found = torch.autograd.grad(loss * scale, [leaf, *weights], allow_unused=True)
        if found[0] is None:
            raise ValueError(_NO_GATE)
        gradients = [
            torch.zeros_like(x) if g is None else g / scale for g, x in zip(found, [leaf, *weights], strict=True)
        ]
        return loss.detach(), gradients

    def _unrolled(self, batch: Any, train_batch: Any, learning_rate: float, gates: Tensor) -> tuple[Tensor, Tensor]:
        """DARTS' second-order gradient by finite differences (https://huggingface.co/papers/1806.09055, eqs. 7, 8)."""
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        backup = [weight.detach().clone() for weight in weights]

        def place(directions: Sequence[Tensor], length: float) -> None:
            with torch.no_grad():
                for weight, start, direction in zip(weights, backup, directions, strict=True):
                    weight.copy_(start).add_(direction, alpha=length)

        try:
            _, (_, *descent) = self._gradients(train_batch, gates, weights)
            place(descent, -learning_rate)
            loss, (gradient, *ahead) = self._gradients(batch, gates, weights)
            norm = float(
                torch.sqrt(sum((g.float().square().sum() for g in ahead), torch.zeros((), device=loss.device)))
            )
            if norm == 0 or not math.isfinite(norm):  # nothing to correct, or a step that will be skipped
                return loss, gradient
            epsilon = 0.01 / norm
            place(ahead, epsilon)
            _, (above,) = self._gradients(train_batch, gates, [])
            place(ahead, -epsilon)
            _, (below,) = self._gradients(train_batch, gates, [])
        finally:
            with torch.no_grad():
                for weight, start in zip(weights, backup, strict=True):
                    weight.copy_(start)
        return loss, gradient - learning_rate * (above - below) / (2 * epsilon)

    def _side_effect_free(self, training: bool | None = None) -> AbstractContextManager[None]:
        return side_effect_free(self.model, self.gates.device, self._checkpointing if training is None else training)


def make_matrix(
    grid: ModuleGrid, config: DiffoRAConfig, allowed: Tensor | None = None
) -> DifferentialAdaptationMatrix:
    """The matrix of a grid under a configuration's budget, of all modules or the allowed ones."""
    budget = Budget(
        grid.row_of,
        grid.parameters,
        ratio=config.selection_ratio,
        scope=config.selection_scope,
        cap=config.max_trainable_parameters,
        kinds=grid.is_shortcut if config.shortcut_ranking == "separated" else None,
        # A PEFT adapter has to have a module, or it could not be loaded.
        required=[not shortcut for shortcut in grid.is_shortcut],
    )
    if allowed is not None:
        budget.restrict(allowed)
    if config.method != "diffora":
        return ScoreMatrix(budget, seed=config.arch_seed)
    return DifferentialAdaptationMatrix.create(
        config.relaxation, budget, config.arch_learning_rate, seed=config.arch_seed
    )


def _check_ends_early(model: nn.Module, adapter_name: str) -> None:
    """Raise a `ValueError` if the backward pass of a model goes through all layers, whatever is kept."""
    searched = {p for one in searched_modules(model, adapter_name).values() for p in parameters_of(one, adapter_name)}
    embeddings = {p for module in input_embeddings(model) for p in module.parameters() if p.requires_grad} - searched
    if trained := [name for name, parameter in model.named_parameters() if parameter in embeddings]:
        raise ValueError(
            f"You passed `cost='time'` for a model whose input embeddings are trained ({trained[0]!r}), so each "
            "backward pass goes through all layers down to them, and no choice of modules makes it shorter. Please "
            "set `cost='parameters'`, or leave the embeddings out of `modules_to_save` and `trainable_token_indices`."
        )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a result."""
    names = ("diffora-trainer", "torch", "transformers", "peft", "trl", "accelerate")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
