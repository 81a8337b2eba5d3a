"""Private and version-dependent names of accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import GradientState


@contextmanager
def beside_the_training_loader() -> Iterator[None]:
    """
    Read from a data loader that accelerate has prepared without its taking that for the one that is trained on, by
    whose end it knows when accumulated gradients are due: `GradientState.dataloader_references` in all versions (seen
    in accelerate 1.15), and `_shared_state`, which is empty before there is an `Accelerator`. Goes when only the
    loop's own loader counts.
    """
    if not GradientState._shared_state:
        yield
        return
    state = GradientState()
    references = state.dataloader_references
    try:
        yield
    finally:
        state.dataloader_references = references
