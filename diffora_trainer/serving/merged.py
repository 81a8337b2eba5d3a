"""The whole model, with an adapter merged into its weights, and what prepares its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..compat.transformers import own_input_embeddings
from ..core.base_model import output_folder
from ..logging import get_logger
from .loading import base_source, load
from .mergeable import check_biases, check_merges, check_tied, unmergeable


logger = get_logger(__name__)


def write_merged(folder: Path, target: Path, config: Any, base_model: Any) -> None:
    """
    Write the base model of an adapter with the adapter in its weights, and its processor or tokenizer.

    Args:
        folder (`Path`): the adapter.
        target (`Path`): an empty folder.
        config (`PeftConfig`): the adapter's.
        base_model (`str`, *optional*): folder or Hub id of the base model, where it is not where the adapter says.

    Raises:
        ValueError: if the adapter cannot be merged, or not without losing a part of it.
    """
    check_merges(config)
    model = load(folder, config, base_model)
    check_biases(config, model)
    untied = _untie(model)
    check_tied(model, _parts_of_embeddings(model))
    try:
        merged = model.merge_and_unload()
    except NotImplementedError as error:  # PEFT's, of layers that have the method and cannot
        raise unmergeable(config) from error
    if untied:  # one weight still, where PEFT merges one change into both (trained tokens, `ensure_weight_tying`)
        tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        for part in (merged.config, merged.config.get_text_config()):
            part.tie_word_embeddings = tied
    merged.save_pretrained(target)
    _write_processor(folder, base_source(config, base_model), target)


def _write_processor(folder: Path, base: tuple[Any, dict[str, str]], target: Path) -> None:
    from transformers import ProcessorMixin

    name, revision = base
    own, of_base = _processor(output_folder(folder)), _processor(name, **revision)
    if own is None and of_base is None:
        logger.warning(
            f"Neither the adapter nor {name} has a tokenizer or processor; please add it to the merged model."
        )
    # Beside its adapter a trainer may have saved a part of the processor alone, such as a tokenizer that has grown.
    partial = isinstance(of_base, ProcessorMixin) and not isinstance(own, ProcessorMixin)
    for found in [of_base, own] if own is None or partial else [own]:
        if found is not None:
            found.save_pretrained(target)


def _processor(source: Any, **revision: str) -> Any:
    """What prepares the inputs of a model, or `None`: a processor, a part of one, or a tokenizer."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    for kind in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor, AutoTokenizer):
        try:
            found = kind.from_pretrained(source, **revision)
            # A tokenizer that is not there can be made of nothing, as that of Whisper.
            if getattr(getattr(found, "tokenizer", found), "vocab_size", None) != 0:
                return found
        # There is none, one that cannot be read here, or a part of one, at which some of them stumble.
        except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError):
            continue
    return None


def _untie(model: Any) -> bool:
    """
    Give the input and the output embeddings of a model weights of their own where an adapter acts on one of them:
    merged into the weight that both share, it would change both.

    Returns:
        `bool`: whether they were tied and an adapter acts on them, so that they may differ once it is merged.

    Raises:
        ValueError: if the model ties more than these two.
    """
    base = model.get_base_model()
    if not (embeddings := _embeddings(base)):
        return False
    adapted = [part for part in embeddings if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not adapted or not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return False
    if None in embeddings or base.config.is_encoder_decoder:
        raise ValueError(
            f"The adapter acts on the embeddings of {type(base).__name__}, which shares their weight with other "
            "layers, so a merged model cannot hold it. Please load the adapter with PEFT."
        )
    for part in adapted:
        if isinstance(part, BaseTunerLayer):
            layer: Any = part.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return True


def _embeddings(base: Any) -> list[Any]:
    """The input and the output embeddings of a model; nothing of one that has none, as of audio."""
    inputs = own_input_embeddings(base)
    return [] if inputs is None else [inputs, base.get_output_embeddings()]


def _parts_of_embeddings(model: Any) -> set[nn.Module]:
    """What [`_untie`] has dealt with."""
    return {part for found in _embeddings(model.get_base_model()) if found is not None for part in found.modules()}
