"""Which tokens are padding, and which belong together, by what a model and its parts are called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..compat.peft import calls_around_hooks
from ..compat.transformers import feature_mask, is_pretrained
from ..logging import get_logger
from .context import ScoreContext


logger = get_logger(__name__)

_NOTED = ("attention_mask", "decoder_attention_mask", "labels", "position_ids", "cu_seq_lens_q")
_told: WeakSet[nn.Module] = WeakSet()
"""Models of which it was said that a mask, or the documents, do not fit."""


class TokenMasks:
    """
    Which tokens are not padding, while a model runs: by the `attention_mask` that it is called with, whatever the
    batch looks like, or that of the part of it (a `PreTrainedModel`) in which a module stands, so that a tower for
    images has none of the text. Where neither was called with one, that of the batch counts if it fits.

    In an encoder-decoder, `attention_mask` is that of what the encoder has read; that of the decoder is
    `decoder_attention_mask`, or follows from the labels, of which each token reads the one before it. For speech,
    where the mask is one of samples, the model says which states these become.

    Args:
        context ([`~diffora_trainer.methods.context.ScoreContext`]): the model.

    Attributes:
        batch: the batch that the model runs on.
    """

    def __init__(self, context: ScoreContext) -> None:
        self.batch: Any = None
        self._base: nn.Module = context.base_model
        self._calls: dict[nn.Module, dict[str, Any]] = {}
        self._owners: dict[nn.Module, list[nn.Module]] = {}
        """The parts of the model that have a mask of their own and that a module stands in, the innermost first."""
        self._readers: set[nn.Module] = set()
        """Modules that have read or returned states of the tokens of a batch."""
        self._handles: list[Any] = []
        above: dict[str, list[nn.Module]] = {}
        for name, module in self._base.named_modules():
            outer = above[name.rpartition(".")[0]] if name else []
            above[name] = self._owners[module] = outer
            if module is self._base or is_pretrained(module):
                above[name] = self._owners[module] = [module, *outer]
                self._watch(module, module)
        for module in context.model.modules():
            if calls_around_hooks(module, self._base):
                self._watch(module, self._base)

        config, get_encoder = getattr(self._base, "config", None), getattr(self._base, "get_encoder", None)
        self._two = bool(getattr(config, "is_encoder_decoder", False))
        encoder = get_encoder() if self._two and get_encoder is not None else None
        self._encoder = encoder if isinstance(encoder, nn.Module) else None
        self._in_encoder: set[nn.Module] = set()
        self._encoded: Tensor | None = None
        if self._encoder is not None:
            self._in_encoder = set(self._encoder.modules())
            self._handles.append(self._encoder.register_forward_hook(self._note_encoded))

    def _watch(self, module: nn.Module, owner: nn.Module) -> None:
        try:
            signature = inspect.signature(owner.forward)
        except (TypeError, ValueError):
            signature = inspect.Signature()
        note = partial(self._note_call, owner, signature)
        self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))

    def _note_call(
        self, owner: nn.Module, signature: inspect.Signature, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        given = dict(kwargs)
        if args:
            given |= dict(zip(signature.parameters, args, strict=False))
        self._calls[owner] = {name: given[name] for name in _NOTED if given.get(name) is not None}

    def _note_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        self._encoded = states.detach() if isinstance(states, Tensor) else None

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    def of(self, module: nn.Module, states: Tensor) -> Tensor | None:
        """
        Which tokens of states are not padding, `(batch, tokens)`, or `(batch * tokens,)` where the states are so
        flattened; `None` if all count. If there is padding, but the mask does not fit, the log says so once; not where
        the states are the same for all rows of a batch, as a table of relative positions in DeBERTa, which has none.

        Args:
            module (`nn.Module`): the module that reads or returns them.
            states (`Tensor` of shape `(batch, tokens, ...)` or `(batch * tokens, size)`): the states.
        """
        if states.ndim < 2:
            return None
        owner, mask = self._mask_at(module, states)
        if mask is not None:
            found = _fitted(owner, mask, states)
            if found is not None:
                self._readers.add(module)
            elif _are_tokens(states, mask) and not self._for_all_rows(module, states, mask) and not mask.bool().all():
                what = f"The `attention_mask` that the model was called with, {tuple(mask.shape)}, does"
                so = "padding tokens would be scored like any others. Please score on batches without padding"
                self._tell(module, states, what, so)
            return found
        for mask in self._others(module):
            found = _fitted(self._base, mask, states)
            if found is not None:
                return found
        return None

    def _for_all_rows(self, module: nn.Module, states: Tensor, mask: Tensor) -> bool:
        """Whether states that a mask does not fit are the same for all rows, and not the rows flattened into one."""
        flattened = len(mask) == 1 or states.shape[1] == mask.numel()
        return states.ndim > 2 and len(states) == 1 and (module in self._readers or not flattened)

    def documents(self, module: nn.Module, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        States in which each document has a row of its own, and which of their tokens are not padding (see [`of`]).
        Rows that hold several, as by `padding_free=True` and `packing=True`, are taken apart where the position ids
        begin anew, or by `cu_seq_lens_q`; if these do not fit the states, the log says so once. From such rows,
        documents of one token are left out: no loss depends on them, and padding to a multiple looks like them.

        Args:
            module (`nn.Module`): the module that reads or returns them.
            states (`Tensor` of shape `(batch, tokens, size)`): the states.
        """
        mask = self.of(module, states)
        seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        lengths = self._lengths(module, states, seen)
        parts = [part for part in states[seen].split(lengths) if len(part) > 1] if lengths else []
        if not parts:
            return states, mask
        apart = pad_sequence(parts, batch_first=True)
        ends = torch.tensor([len(part) for part in parts], device=states.device)
        return apart, torch.arange(apart.shape[1], device=states.device) < ends[:, None]

    def _lengths(self, module: nn.Module, states: Tensor, seen: Tensor) -> list[int]:
        """How many tokens the documents have, if a row holds several, of those that are not padding."""
        calls: list[Mapping[str, Any]] = [
            self._calls[owner] for owner in self._owners.get(module, []) if owner in self._calls
        ]
        calls += [self.batch] if isinstance(self.batch, Mapping) else []
        for positions in (call.get("position_ids") for call in calls):
            if not isinstance(positions, Tensor) or positions.shape != seen.shape:
                continue
            if lengths := _lengths_by_positions(positions.to(seen.device), seen):
                return lengths
        for borders in (call.get("cu_seq_lens_q") for call in calls):
            if not isinstance(borders, Tensor):
                continue
            if int(borders[-1]) == int(seen.sum()):
                return borders.diff().tolist() if len(borders) > len(seen) + 1 else []
            what = f"The documents of a batch (`cu_seq_lens_q`, of {int(borders[-1])} tokens) do"
            so = "all documents of a row would be scored as one. Please score on batches with one document a row"
            self._tell(module, states, what, so)
        return []

    def _mask_at(self, module: nn.Module, states: Tensor) -> tuple[nn.Module, Tensor | None]:
        """The mask of the part of the model in which a module stands, and that part."""
        if self._two and module not in self._in_encoder:
            if not self._are_encoded(states):
                return self._base, self._of_decoder()
            module = self._encoder or self._base
        for owner in self._owners.get(module, []):
            if owner not in self._calls:
                continue
            mask = self._calls[owner].get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return owner, mask
            if mask is None and is_pretrained(owner):
                break  # such as a tower for images; what is around it has a mask of other tokens
        return self._base, None

    def _others(self, module: nn.Module) -> Iterator[Tensor]:
        """Masks that may belong to a module which none was given to."""
        found = [self.batch.get("attention_mask")] if isinstance(self.batch, Mapping) and not self._two else []
        if not is_pretrained(self._base) and self._owners.get(module) == [self._base]:
            found += [call.get("attention_mask") for call in self._calls.values()]  # a head on a model of transformers
        return (mask for mask in found if isinstance(mask, Tensor) and mask.ndim == 2)

    def _are_encoded(self, states: Tensor) -> bool:
        """Cross-attention reads what the encoder gives, perhaps in another precision, or flattened."""
        encoded = self._encoded
        if encoded is None or encoded.shape[-1:] != states.shape[-1:] or encoded.numel() != states.numel():
            return False
        return torch.equal(encoded.to(states.device, states.dtype).reshape(states.shape), states)

    def _of_decoder(self) -> Tensor | None:
        mask, labels = self._given("decoder_attention_mask"), self._given("labels")
        if mask is not None or labels is None:
            return mask
        return torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], dim=1)

    def _given(self, name: str) -> Tensor | None:
        """What the model was called with, or else what the batch has: numbers of shape `(batch, tokens)`."""
        found = [call.get(name) for call in self._calls.values()]
        if isinstance(self.batch, Mapping):
            found.append(self.batch.get(name))
        return next((value for value in found if isinstance(value, Tensor) and value.ndim == 2), None)

    def _tell(self, module: nn.Module, states: Tensor, what: str, so: str) -> None:
        if self._base in _told:
            return
        _told.add(self._base)
        name = next((name for name, other in self._base.named_modules() if other is module), "")
        logger.warning(
            f"{what} not fit the states {tuple(states.shape)} at {name!r}, so {so}, or use a method that reads no "
            "states, such as 'snip'."
        )


def _lengths_by_positions(positions: Tensor, seen: Tensor) -> list[int]:
    """Of position ids, `(batch, tokens)`, of which a row holds several runs: how long all of these are."""
    rows, own = seen.nonzero()[:, 0], positions[seen]
    if not len(own):
        return []
    first = positions.gather(1, seen.int().argmax(dim=1, keepdim=True))[rows, 0]
    begins = own == first
    begins[1:] |= (own[1:] < own[:-1]) | (rows[1:] != rows[:-1])
    borders = [*begins.nonzero()[:, 0].tolist(), len(own)]
    return torch.tensor(borders).diff().tolist() if len(borders) > len(rows.unique()) + 1 else []


def _fitted(owner: nn.Module, mask: Tensor, states: Tensor) -> Tensor | None:
    """A mask, `(batch, tokens)`, in the shape of states; `None` if it does not fit them."""
    mask, rows = mask.to(states.device), len(mask)
    if states.ndim > 2:
        if mask.shape == states.shape[:2]:
            return mask.bool()
        return feature_mask(owner, mask, states.shape[1]) if len(states) == rows else None
    if mask.numel() == len(states):
        return mask.bool().flatten()
    found = feature_mask(owner, mask, len(states) // rows) if len(states) % rows == 0 else None
    return None if found is None else found.flatten()


def _are_tokens(states: Tensor, mask: Tensor) -> bool:
    """Whether states are not one for each row, as those after a pooler."""
    return states.shape[1] > 1 if states.ndim > 2 else len(states) != len(mask)
