"""
The output of the frozen layers of a model, kept for each row, so that from the second time on a row begins at the
lowest trained layer (AutoFreeze, https://huggingface.co/papers/2102.01386, section 4.2, does so for layers that it
freezes).

What may be kept depends on the model and its data, and cannot be read off them. So it is tried out on the first batch:
that the layers draw nothing at random, that nothing below them is trained, that a row does not depend on the others of
its batch, that all passes of a step give the same, that nothing but the next layer reads what a layer before the last
one gives, and that the loss is the same. Otherwise the cache is off, and says so. It is off with the auxiliary loss of
a mixture of experts too, to which the frozen layers add a part so small that without it the loss passes for a rounded
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import noted_auxiliary_losses
from ..core.isolation import isolated_random_state
from ..core.rows import take_rows, why_without_rows
from ..logging import get_logger
from .layers import Prefix, PrefixError
from .rows import Row, rows_of
from .store import Store


logger = get_logger(__name__)

_SAME, _ROUNDED = 1e-4, 3e-2
"""How much two results may differ, as a part of their size: of one computation, and of two in bfloat16."""


class PrefixCache:
    """
    The output of a model's frozen layers by rows.

    ```python
    cache = PrefixCache(model, loss_fn, MemoryStore(limit=4 * 2**30))
    model.train()  # what is kept, and whether it may be, is found out in the mode that the model is in
    for batch in batches:
        with cache.replay(batch):
            loss_fn(model, batch).backward()
    ```

    Args:
        model (`nn.Module`): the model; what of it is trained must stay as it is.
        loss_fn (`Callable`): `loss_fn(model, batch)` runs the model on a batch and gives the loss.
        store ([`~diffora_trainer.prefix.store.Store`]): where states are kept.

    Attributes:
        off (`str` or `None`): why nothing is kept.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Any], store: Store) -> None:
        self.model, self.store = model, store
        self.off: str | None = None
        self.asked, self.found = 0, 0
        self._loss_fn = loss_fn
        self._tried, self._full = False, False
        try:
            self.prefix: Prefix | None = Prefix.find(model)
        except PrefixError as error:
            self.prefix = None
            self._stop(str(error))

    @contextmanager
    def replay(self, batch: Any, rows: list[Row] | None = None) -> Iterator[None]:
        """
        Run the model on this batch for a while, forward and backward passes, without its frozen layers.

        Args:
            batch: the batch, as `loss_fn` takes it.
            rows (`list[Row]`, *optional*): what its rows are known by, if that is known.
        """
        states = None
        if self.off is None:
            try:
                states = self._look_up(batch, rows)
            except PrefixError as error:
                self._stop(str(error))
        if states is None or self.prefix is None:
            yield
            return
        with self.prefix.given(states):
            yield

    def describe(self) -> str:
        """How much is kept, and how often it was of use."""
        part = self.found / self.asked if self.asked else 0.0
        return f"{len(self.store):,} rows in {self.store.used / 2**30:.2f} GiB; {part:.0%} of the rows were found"

    def close(self) -> None:
        """Give back what is kept; the cache is off from now on."""
        self.store.close()
        self.off = self.off or "it is closed"

    def _look_up(self, batch: Any, rows: list[Row] | None) -> Tensor:
        rows = rows_of(batch) if rows is None else rows
        if rows is None:
            raise PrefixError(why_without_rows(batch))
        if not self._tried:
            self._try_out(batch, rows)
            self._tried = True
        return self._states(batch, rows)

    def _states(self, batch: Mapping[str, Any], rows: list[Row]) -> Tensor:
        """The states of all rows, those computed that are not known yet."""
        known = {row.key: self.store.get(row.key) for row in rows if row.key in self.store}
        self.asked, self.found = self.asked + len(rows), self.found + sum(row.key in known for row in rows)
        missing = list({row.key: index for index, row in enumerate(rows) if row.key not in known}.values())
        if missing:
            with torch.no_grad():
                fresh = self._output(take_rows(batch, missing) if len(missing) < len(rows) else batch)
            if len(missing) == len(rows):
                self._keep(rows, fresh.cpu())
                return fresh
            host = fresh.cpu()
            self._keep([rows[index] for index in missing], host)
            known |= {rows[index].key: _piece(host[number], rows[index]) for number, index in enumerate(missing)}
        return _assemble(known, rows, self._shape(batch, rows, known), self._device)

    def _keep(self, rows: list[Row], states: Tensor) -> None:
        for row, own in zip(rows, states, strict=True):
            if row.key not in self.store and not self.store.put(row.key, _piece(own, row)) and not self._full:
                self._full = True
                logger.warning(
                    f"The prefix cache is full: {len(self.store):,} rows in {self.store.used / 2**30:.2f} GiB. The "
                    "frozen layers are computed again for the others. A larger `prefix_cache_gib` gives more room."
                )

    def _output(self, batch: Any) -> Tensor:
        assert self.prefix is not None
        output = self.prefix.output(lambda: self._loss_fn(self.model, batch))
        self._device = output.device
        return output

    def _shape(self, batch: Mapping[str, Any], rows: list[Row], known: dict[bytes, Tensor]) -> tuple[int, int, int]:
        first = known[rows[0].key]
        tokens = batch.get("input_ids")
        length = tokens.shape[1] if rows[0].stop and isinstance(tokens, Tensor) else first.shape[0]
        return len(rows), length, first.shape[1]

    # Whether it may be done

    def _try_out(self, batch: Mapping[str, Any], rows: list[Row]) -> None:
        """
        Raises:
            PrefixError: if what is kept would not be what the layers compute.
        """
        assert self.prefix is not None
        with torch.enable_grad():
            first = self._output_twice(batch, rows)
        if first.requires_grad:
            raise PrefixError(f"something below {self.prefix.names[-1]} is trained")
        with isolated_random_state(first.device), torch.no_grad():
            if len(rows) > 1:
                alone = self._output(take_rows(batch, [0]))
                if _differ(_piece(alone[0], rows[0]), _piece(first[0], rows[0]), _ROUNDED):
                    raise PrefixError("what the frozen layers compute for a row depends on the others of its batch")
            pieces = {row.key: _piece(own, row).cpu() for row, own in zip(rows, first, strict=True)}
            states = _assemble(pieces, rows, tuple(first.shape), first.device)  # type: ignore[arg-type]
            whole = self._whole_loss(batch, first)
            try:
                with self.prefix.given(states):
                    replayed = self._loss(batch)
                with self.prefix.given(states, torch.full_like(states, torch.nan)):
                    unread = self._loss(batch)
            except Exception as error:
                raise PrefixError(f"the model does not run without them ({type(error).__name__}: {error})") from error
        if replayed.isfinite() and _differ(unread, replayed, _SAME):
            raise PrefixError(
                "the model reads what the frozen layers give before the last of them (a weighted sum of all layers, "
                "features taken from some), and only what the last one gives is kept"
            )
        if whole.isfinite() and _differ(replayed, whole, _SAME if first.dtype == torch.float32 else _ROUNDED):
            raise PrefixError(
                f"the loss is {float(whole):.6g} with the frozen layers, and {float(replayed):.6g} with what was kept "
                "of them"
            )

    def _output_twice(self, batch: Mapping[str, Any], rows: list[Row]) -> Tensor:
        """The output of the layers, if it is the same under other random numbers and has the shape of the batch."""
        with isolated_random_state(next(self.model.parameters()).device):
            first, second = self._output(batch), self._output(batch)
        tokens = batch.get("input_ids")
        length = tokens.shape[1] if rows[0].stop and isinstance(tokens, Tensor) else first.shape[1]
        if tuple(first.shape[:2]) != (len(rows), length):
            raise PrefixError(
                f"the frozen layers give {first.shape[0]} rows of {first.shape[1]} states for a batch of {len(rows)} "
                f"rows of {length} tokens"
            )
        if _differ(second, first, _SAME):
            raise PrefixError(
                "the frozen layers draw random numbers (dropout, noise on the embeddings), so that a row is not the "
                "same each time; it takes a base model with all dropout at 0"
            )
        return first

    def _whole_loss(self, batch: Any, first: Tensor) -> Tensor:
        """The loss with the frozen layers, if it is made of nothing else of them than this output."""
        assert self.prefix is not None
        with noted_auxiliary_losses(self.model) as auxiliary, self.prefix.noted() as outputs:
            whole = self._loss(batch)
        if auxiliary:
            raise PrefixError(
                f"the model returns an auxiliary loss of its routers ({', '.join(sorted(auxiliary))}), which is taken "
                "over all layers, the frozen ones too; with a `router_aux_loss_coef` of 0 there would be none in its "
                "loss"
            )
        if any(other.shape != first.shape or _differ(other, first, _SAME) for other in outputs):
            raise PrefixError(
                f"the loss runs the frozen layers {len(outputs)} times, not always on the same rows or with the same "
                "adapter"
            )
        return whole

    def _loss(self, batch: Any) -> Tensor:
        torch.manual_seed(0)  # what the other layers draw is the same with and without the frozen ones
        loss = self._loss_fn(self.model, batch)
        return (loss[0] if isinstance(loss, tuple) else loss).detach().float().cpu()

    def _stop(self, why: str) -> None:
        self.off = why
        self.store.close()
        logger.warning(f"The prefix cache is off: {why}. The training goes on without it.")


def _piece(states: Tensor, row: Row) -> Tensor:
    """The states of a row without its padding, of `(length, width)`."""
    return states[row.start : row.stop] if row.stop else states


def _assemble(pieces: dict[bytes, Tensor], rows: list[Row], shape: tuple[int, int, int], device: Any) -> Tensor:
    """The states of a batch of pieces on the CPU; padding, which no layer looks at, is 0."""
    pieces_of = [pieces[row.key] for row in rows]
    on_gpu = device.type == "cuda"
    states = torch.zeros(shape, dtype=pieces_of[0].dtype, pin_memory=on_gpu)
    for own, row, piece in zip(states, rows, pieces_of, strict=True):
        own[row.start : row.start + len(piece)] = piece
    return states.to(device, non_blocking=on_gpu)


def _differ(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    found, wanted = found.detach().float(), wanted.detach().float()
    return not bool((found - wanted).norm() <= tolerance * wanted.norm() + 1e-7)
