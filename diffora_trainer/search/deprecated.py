"""Names of before of [`ArchitectureSearch`] and [`SelectionRun`], for training loops that call them, until 0.3."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .runtime import Runtime


class OldNames:
    """The old names of [`ArchitectureSearch`]."""

    if TYPE_CHECKING:
        method: Any

        def discretize(self, kept: Tensor | None = None) -> Tensor: ...

        def fade_out(self, progress: float) -> None: ...

    def decide(self, kept: Tensor | None = None) -> None:
        """Deprecated: [`discretize`]."""
        _warn_of_name("ArchitectureSearch.decide", "discretize")
        self.discretize(kept)

    def close(self, progress: float) -> None:
        """Deprecated: [`fade_out`]."""
        _warn_of_name("ArchitectureSearch.close", "fade_out")
        self.fade_out(progress)

    @property
    def matrix(self) -> Any:
        """Deprecated: [`method`]."""
        _warn_of_name("ArchitectureSearch.matrix", "method")
        return self.method


class OldRunNames:
    """The old names of [`SelectionRun`]."""

    if TYPE_CHECKING:

        @property
        def should_stop(self) -> bool: ...

    @property
    def finished(self) -> bool:
        """Deprecated: [`should_stop`]."""
        _warn_of_name("SelectionRun.finished", "should_stop")
        return self.should_stop


def old_runtime(runtime: Runtime, **passed: Any) -> Runtime:
    """A runtime with what was passed to [`ArchitectureSearch`] beside it, which is deprecated."""
    changed = {name: value for name, value in passed.items() if value is not None}
    if not changed:
        return runtime
    arguments = ", ".join(f"{name}=..." for name in changed)
    warnings.warn(
        f"`ArchitectureSearch({arguments})` is deprecated and will be removed in version 0.3. Please pass "
        f"`runtime=Runtime({arguments})`, from `diffora_trainer.search.runtime`.",
        FutureWarning,
        stacklevel=3,
    )
    return replace(runtime, **changed)


def _warn_of_name(old: str, new: str) -> None:
    warnings.warn(
        f"`{old}` is deprecated and will be removed in version 0.3. Please use `{new}`.",
        FutureWarning,
        stacklevel=3,
    )
