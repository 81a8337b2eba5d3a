"""Names of before of [`ArchitectureSearch`], for training loops that call it. They go in version 0.3."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor


class OldNames:
    """The old names."""

    if TYPE_CHECKING:
        method: Any

        def discretize(self, kept: Tensor | None = None) -> Tensor: ...

        def fade_out(self, progress: float) -> None: ...

    def decide(self, kept: Tensor | None = None) -> None:
        """Deprecated: [`discretize`]."""
        _warn_of_name("decide", "discretize")
        self.discretize(kept)

    def close(self, progress: float) -> None:
        """Deprecated: [`fade_out`]."""
        _warn_of_name("close", "fade_out")
        self.fade_out(progress)

    @property
    def matrix(self) -> Any:
        """Deprecated: [`method`]."""
        _warn_of_name("matrix", "method")
        return self.method


def _warn_of_name(old: str, new: str) -> None:
    warnings.warn(
        f"`ArchitectureSearch.{old}` is deprecated and will be removed in version 0.3. Please use `{new}`.",
        FutureWarning,
        stacklevel=3,
    )
