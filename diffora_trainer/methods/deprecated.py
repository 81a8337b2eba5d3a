"""The class that relaxations were derived from before methods were registered. It will be removed in version 0.3."""

from __future__ import annotations

import warnings
from typing import ClassVar

from torch import Tensor

from ..core.budget import Budget
from .base import GradientMethod, SelectionMethod
from .registry import get_method, register_method


class DifferentialAdaptationMatrix(GradientMethod):
    """Deprecated: derive from [`~diffora_trainer.GradientMethod`] and register the class with `@register_method`."""

    relaxations: ClassVar[dict[str, type[DifferentialAdaptationMatrix]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        warnings.warn(
            f"`{cls.__name__}` is registered because it is derived from `DifferentialAdaptationMatrix`, which is "
            "deprecated and will be removed in version 0.3. Please derive it from `GradientMethod`, and put "
            f"`@register_method({cls.name!r})` before it.",
            FutureWarning,
            stacklevel=2,
        )
        cls.relaxations[cls.name] = cls
        register_method(cls.name)(cls)

    @classmethod
    def create(  # type: ignore[override]
        cls, relaxation: str | Budget, budget: object, learning_rate: float | None = None, seed: int = 0
    ) -> SelectionMethod:
        """
        Deprecated: `get_method(name)(budget, learning_rate, seed)`.

        Raises:
            ValueError: if the method learns no matrix.
            TypeError: if `budget` is none.
        """
        if isinstance(relaxation, Budget):  # as any method is made
            return super().create(relaxation, budget, seed)
        found = get_method("diffora" if relaxation == "budget" else relaxation)
        if not issubclass(found, GradientMethod):
            raise ValueError(
                f"You passed {relaxation!r} to `DifferentialAdaptationMatrix.create`, which makes methods that learn "
                f"gates, but {relaxation!r} scores the modules. Please make it with "
                f"`get_method({relaxation!r})(budget)`, from `diffora_trainer.methods.registry`."
            )
        if not isinstance(budget, Budget):
            raise TypeError(
                f"`budget` must be a `Budget`, got {type(budget).__name__}. Please pass one, from "
                "`diffora_trainer.core.budget`."
            )
        return found(budget, learning_rate, seed)

    def choose(self) -> Tensor:
        """Deprecated: [`discretize`]."""
        return self.discretize()
