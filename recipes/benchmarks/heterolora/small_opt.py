"""A small OPT with its own tokenizer, pre-trained briefly on training texts: for machines without the Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `splits` and `embedded`

from splits import DataArguments, load_splits  # noqa: E402


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

END = "</s>"
"""Before and after each text, and so what a classifier reads last. OPT too begins every text with it."""
PAD = "<pad>"


@dataclass
class SmallModelConfig:
    """
    The model that `model: small` stands for. Nothing here is read with another model.

    Args:
        pretraining_data (`list[str]`, *optional*):
            What the language model is trained on: `folder:column` or `folder:column,column` for each data set. The
            columns of a row follow each other as texts. Only training splits are read, and no labels.
        pretraining_steps (`int`, *optional*, defaults to `2000`):
            Steps of AdamW, with a tenth of warm-up and a linear decay.
        pretraining_batch_size (`int`, *optional*, defaults to `16`):
            Sequences in a step.
        pretraining_length (`int`, *optional*, defaults to `128`):
            Tokens in a sequence. Texts follow each other without gaps.
        pretraining_learning_rate (`float`, *optional*, defaults to `2e-3`):
            Highest learning rate.
        vocab_size (`int`, *optional*, defaults to `8000`):
            Size of the byte-pair vocabulary, which is learned from the same texts, in lower case.
        num_layers, hidden_size, num_heads (`int`, *optional*):
            Shape of the model; the feed-forward blocks are four times as wide.
        model_seed (`int`, *optional*, defaults to `0`):
            Seed of the weights and of the order of the texts.
    """

    pretraining_data: list[str] = field(default_factory=list)
    pretraining_steps: int = 2000
    pretraining_batch_size: int = 16
    pretraining_length: int = 128
    pretraining_learning_rate: float = 2e-3
    vocab_size: int = 8000
    num_layers: int = 8
    hidden_size: int = 128
    num_heads: int = 4
    model_seed: int = 0


def small_opt_folder(config: SmallModelConfig) -> str:
    """
    The folder of the small OPT, an ordinary checkpoint. The first call trains it and keeps it in the cache of the
    recipes (`DIFFORA_CACHE`, or `~/.cache/diffora_trainer`); later calls with the same options return the path.

    Raises:
        ValueError: if no data are named, or a data set lacks a column.
    """
    from embedded import _cache_folder, build_folder

    options = json.dumps(dataclasses.asdict(config), sort_keys=True)
    folder = _cache_folder() / f"small-opt-{hashlib.sha256(options.encode()).hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return str(folder)
    build_folder(folder, lambda building: _pretrain(config, building))
    return str(folder)


def read_texts(sources: Iterable[str]) -> list[tuple[str, ...]]:
    """
    The rows of the training splits of some data sets, each as the texts of its columns, without repetitions.

    Raises:
        ValueError: if a source names no column, or one that its data set does not have.
    """
    rows: dict[tuple[str, ...], None] = {}
    for source in sources:
        name, colon, columns = source.rpartition(":")
        if not colon:
            raise ValueError(f"`pretraining_data` names {source!r} without a column; write `folder:column`.")
        arguments = DataArguments(dataset_name=name, dataset_test_split="validation")
        train, _ = load_splits(arguments, seed=0)
        wanted = columns.split(",")
        if missing := [column for column in wanted if column not in train.column_names]:
            raise ValueError(f"{name} has no column {missing}; it has {train.column_names}.")
        for row in zip(*(train[column] for column in wanted), strict=True):
            texts = tuple(text.strip() for text in row)
            if all(texts):
                rows[texts] = None
    return list(rows)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer in lower case that puts the end mark before, between and after texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}",
        pair=f"{END} $A {END} $B:0 {END}:0",
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=END,
        eos_token=END,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _pretrain(config: SmallModelConfig, target: Path) -> None:
    """Train tokenizer and model, and write both."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    rows = read_texts(config.pretraining_data)
    if not rows:
        raise ValueError("`model: small` needs texts to learn from; name some in `pretraining_data`.")
    positions = max(256, config.pretraining_length)
    tokenizer = train_tokenizer((text for row in rows for text in row), config.vocab_size, positions)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(config.model_seed)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                word_embed_proj_dim=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                ffn_dim=4 * config.hidden_size,
                max_position_embeddings=positions,
                dropout=0.0,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        print(
            f"Pre-training an OPT of {model.num_parameters():,} parameters on {len(rows):,} rows of text, "
            f"{config.pretraining_steps} steps.",
            flush=True,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.pretraining_learning_rate, weight_decay=0.1)
        warmup = max(1, config.pretraining_steps // 10)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, (config.pretraining_steps - step) / config.pretraining_steps),
        )
        started, recent = time.perf_counter(), 0.0
        sequences = _sequences(config, rows, tokenizer)
        for step in range(1, config.pretraining_steps + 1):
            batch = next(sequences)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            recent = float(loss.detach()) if step == 1 else 0.98 * recent + 0.02 * float(loss.detach())
            if step % 100 == 0 or step == config.pretraining_steps:
                print(f"  step {step}: loss {recent:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _sequences(
    config: SmallModelConfig, rows: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Tensor]:
    """Batches without end: the texts in an order that is new in each pass, cut into sequences of equal length."""
    import torch

    end = tokenizer.eos_token_id
    encoded = tokenizer([text for row in rows for text in row], add_special_tokens=False)["input_ids"]
    texts = iter(encoded)
    documents = [[token for _ in row for token in (*next(texts), end)] for row in rows]
    rng = random.Random(config.model_seed)
    size = config.pretraining_batch_size * config.pretraining_length
    stream: list[int] = [end]
    while True:
        rng.shuffle(documents)
        for document in documents:
            stream.extend(document)
            while len(stream) >= size:
                yield torch.tensor(stream[:size]).view(config.pretraining_batch_size, -1)
                del stream[:size]
