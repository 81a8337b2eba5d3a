"""The bi-level search over a PEFT model and a loss function. It works without any Trainer."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .config import DiffoRAConfig
from .distributed import check_agreement, fingerprint
from .gates import Gates, as_if_cut, checkpoints_activations
from .grid import OTHER_ROW, ModuleGrid
from .isolation import quiet
from .matrix import DifferentialAdaptationMatrix, ScoreMatrix
from .proxies import ScoreFunction, check_finite, check_score_function, module_scores, scale_free
from .selection import Selection, short_names
from .timing import REPEATS, StepTimes, measure_step_times, timed


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
        ValueError: if the adapter cannot be searched (see [`~diffora_trainer.grid.ModuleGrid.from_model`]), no module
            fits the budget, or only one of `score_function` and `method="custom"` is passed.
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
        self.matrix = make_matrix(self.grid, self.config)
        self.gates = Gates(model, self.grid)
        self.skipped_steps = 0
        self.times: StepTimes | None = None
        self.decided: Tensor | None = None
        self._loss_fn = loss_fn
        self._reduce = reduce or (lambda values: values)
        self._loss_scale = loss_scale or (lambda: 1.0)
        self._score_function = score_function
        self.pending_losses: list[float] = []
        self.last_loss: float | None = None
        self._checkpointing = False
        self._closing: Tensor | None = None

    def begin(self) -> None:
        """
        Attach the gates to the model. From here on the weights train under the gates of [`draw_gates`].

        Raises:
            ValueError: if the model checkpoints activations in the reentrant way.
        """
        # Activation checkpointing only works in training mode, and without it an architecture step needs more memory
        # than a training step has. Otherwise evaluation mode is better: dropout is noise in the gates' gradient.
        self._checkpointing = checkpoints_activations(self.model)
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
        allowed = budget.within([times.depth[row] for row in self.grid.row_of], limit)
        self.matrix = make_matrix(self.grid, self.config, allowed)
        self.gates.set_evaluation(self.matrix.evaluation_gates())

    def step_seconds(self, batch: Any) -> float:
        """Seconds of a training step (forward and backward pass) of the model as it is: the least of a few."""
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return min(self._time(batch, weights) for _ in range(REPEATS + 1))

    def _seconds(self, batch: Any, kept: Sequence[int]) -> float:
        with as_if_cut(self.model, [self.grid.names[index] for index in kept], self.grid.adapter_name) as weights:
            return self._time(batch, weights)

    def _time(self, batch: Any, weights: list[nn.Parameter]) -> float:
        def step() -> None:
            loss = self._loss(batch)
            torch.autograd.grad(loss, weights, allow_unused=True)

        with self._quiet(training=True), self.gates.override(None):
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
        """Set the gates of the next training step. Call it before each forward pass of a training batch."""
        self.gates.set_training(self._training_gates())

    def _training_gates(self) -> Tensor | None:
        return self.matrix.training_gates() if self._closing is None else self._closing

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
        with self._quiet():
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
        self.matrix.step(gradient)
        self.gates.set_evaluation(self.matrix.evaluation_gates())
        self.pending_losses.append(value)
        self.last_loss = value
        return value

    def score(self, batches: Sequence[Any]) -> Tensor:
        """
        Score all modules once, by another `method` than `"diffora"`: what is chosen from then on. See
        [`~diffora_trainer.proxies`] for the formulas. Like an architecture step, this leaves no trace in weights,
        gradients, modes and random streams, also when it fails.

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
        with self._quiet(training=False), self.gates.override(None):
            for module in self.model.modules():
                if getattr(module, "gradient_checkpointing", False):
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
        with self._quiet(training=False), torch.no_grad():
            for batch in batches:
                with self.gates.override(self._training_gates()) if relaxed else nullcontext():
                    losses.append(self._loss(batch).detach().float().cpu().reshape(1))
        return float(self._reduce(torch.cat(losses).mean().reshape(1)))

    def finish(self, step: int | None = None) -> Selection:
        """
        Discretize the matrix and take the gates off the model. What is kept is decided here; to carry it out, pass the
        result to [`~diffora_trainer.surgery.apply_selection`].

        Args:
            step (`int`, *optional*): present optimizer step, for the record.

        Raises:
            ValueError: on every process, if they would not all keep the same modules.
        """
        selection = self.select(step)
        self.check_choice(torch.tensor(selection.kept))
        self.gates.detach()
        return selection

    def select(self, step: int | None = None) -> Selection:
        """The selection that a cut would make now. Changes nothing."""
        kept = (self.matrix.choose() if self.decided is None else self.decided).tolist()
        # A selected module goes on under the gate that its weights were trained for; an unselected one may become the
        # start of a shared pair, and then acts on modules that it was not trained for: its small relaxed gate fits.
        relaxed, trained = self.matrix.values(), self.matrix.evaluation_gates()
        selected = trained if trained is not None and self.config.fold_gates else torch.ones(len(kept))
        factors = torch.where(torch.tensor(kept), selected, relaxed).tolist()
        return Selection(
            rows=self.grid.rows,
            columns=self.grid.columns,
            modules=self.grid.names,
            positions=self.grid.positions,
            parameters=self.grid.parameters,
            scores=tuple(self.matrix.scores().tolist()),
            gates=tuple(self.matrix.values().tolist()),
            factors=tuple(factors),
            kept=tuple(kept),
            shared=self._sharing(kept),
            step=step,
            times=self._predicted_times(kept),
            config=self.config.to_dict(),
            versions=library_versions(),
            shortcuts=self.grid.shortcuts,
        )

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
        What to log: the DAM's entropy and gates, and the mean architecture loss since the last call. Of a method that
        scores: the scores, once there are any.
        """
        scored = isinstance(self.matrix, ScoreMatrix)
        if scored and not self.matrix.steps:
            return {}
        values, what = (self.matrix.scores(), "score") if scored else (self.matrix.values(), "gate")
        report = {} if scored else {"diffora/entropy": self.matrix.entropy()}
        report[f"diffora/{what}_min"] = float(values.min())
        report[f"diffora/{what}_mean"] = float(values.mean())
        report[f"diffora/{what}_max"] = float(values.max())
        if len(self.grid.columns) <= _MAX_LOGGED_KINDS:
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

    def _quiet(self, training: bool | None = None) -> AbstractContextManager[None]:
        return quiet(self.model, self.gates.device, self._checkpointing if training is None else training)


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
        budget.allow(allowed)
    if config.method != "diffora":
        return ScoreMatrix(budget, seed=config.arch_seed)
    return DifferentialAdaptationMatrix.create(
        config.relaxation, budget, config.arch_learning_rate, seed=config.arch_seed
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
