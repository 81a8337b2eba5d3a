"""A word-level tokenizer and small learnable datasets, made in code: nothing is downloaded.

All the texts talk about one small world in which every animal has one colour, one home and one food, so that a model
that learns can bring its loss far below that of a model that guesses.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
)


PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNK, CHAT_START, CHAT_END]

# One line per animal: its colour, its home and its food.
FACTS = {
    "fox": ("red", "forest", "eggs"),
    "bear": ("brown", "cave", "honey"),
    "frog": ("green", "pond", "flies"),
    "swan": ("white", "lake", "grass"),
    "crow": ("black", "tree", "corn"),
    "mouse": ("grey", "house", "cheese"),
    "lion": ("golden", "desert", "meat"),
    "whale": ("blue", "ocean", "fish"),
    "pig": ("pink", "farm", "apples"),
    "goat": ("silver", "mountain", "leaves"),
    "duck": ("yellow", "river", "bread"),
    "cat": ("orange", "garden", "milk"),
}
NAMES = ["anna", "ben", "carla", "david", "emma", "frank", "grace", "henry"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
TIMES = ["today", "yesterday", "once", "again", "early", "late"]
POSITIVE = ["good", "great", "lovely", "happy", "kind", "calm", "clever", "gentle"]
NEGATIVE = ["bad", "awful", "nasty", "sad", "cruel", "angry", "stupid", "rough"]

_OTHER_WORDS = """
. , ? ! : a an the this that it is are was were be been has have had do does did not and or but if then than so very
too also only in on at by near under over from to of for with without into out up down here there where what which who
how why when says said asks asked tells told see sees saw likes liked live lives lived eat eats ate finds found comes
came goes went wants wanted knows knew i you he she we they me him her us them my your his our their yes no please
thanks hello answer question colour home food animal animals people day night morning evening small big old young long
short one ten all many some none always never often user assistant system
""".split()

# ChatML; the generation markers say which tokens are the assistant's.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def vocabulary() -> dict[str, int]:
    """Every token with its id: the special tokens come first, with the padding token at 0."""
    words = [*SPECIAL_TOKENS, *FACTS, *(word for facts in FACTS.values() for word in facts)]
    words += [*NAMES, *NUMBERS, *TIMES, *POSITIVE, *NEGATIVE, *_OTHER_WORDS]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of whole words, with a ChatML-like chat template. Build models for it with
    `vocab_size=len(tokenizer)`."""
    backend = Tokenizer(WordLevel(vocabulary(), unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=[CHAT_START, CHAT_END],
        model_max_length=128,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


def _question(rng: random.Random) -> tuple[str, str, str]:
    """A question about an animal, its one right answer, and a wrong answer of the same kind."""
    animal = rng.choice(list(FACTS))
    other = rng.choice([name for name in FACTS if name != animal])
    kind = rng.randrange(3)
    question = [f"what colour is the {animal} ?", f"where does the {animal} live ?", f"what does the {animal} eat ?"]
    return question[kind], FACTS[animal][kind], FACTS[other][kind]


def lm_dataset(n: int = 64, seed: int = 0) -> Dataset:
    """Plain text in a `text` column: statements about the animals."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        animal = rng.choice(list(FACTS))
        colour, home, food = FACTS[animal]
        start = f"{rng.choice(TIMES)} {rng.choice(NAMES)} saw {rng.choice(NUMBERS)} animals ."
        middle = f"the {animal} is {colour} , it lives in the {home} and it eats {food} ."
        rows.append({"text": f"{start} {middle}"})
    return Dataset.from_list(rows)


def prompt_completion_dataset(n: int = 64, seed: int = 0) -> Dataset:
    """Questions in `prompt`, one-word answers in `completion`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        question, right, _ = _question(rng)
        rows.append({"prompt": f"{rng.choice(NAMES)} asks : {question} answer :", "completion": f" {right} ."})
    return Dataset.from_list(rows)


def chat_dataset(n: int = 64, seed: int = 0) -> Dataset:
    """Conversations of one or two questions and answers, in a `messages` column."""
    rng = random.Random(seed)
    rows = []
    for index in range(n):
        messages: list[dict[str, str]] = []
        for _ in range(1 + index % 2):
            question, right, _ = _question(rng)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": f"it is {right} ."})
        rows.append({"messages": messages})
    return Dataset.from_list(rows)


def preference_dataset(n: int = 64, seed: int = 0) -> Dataset:
    """Questions in `prompt`, the right answer in `chosen`, a wrong one in `rejected`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        question, right, wrong = _question(rng)
        rows.append({"prompt": f"{question} answer :", "chosen": f" {right} .", "rejected": f" {wrong} ."})
    return Dataset.from_list(rows)


def classification_dataset(n: int = 64, seed: int = 0) -> Dataset:
    """Tokenised opinions (`input_ids`, `attention_mask`) of different lengths, not padded. The `label` is 1 where the
    opinion is favourable, and the two labels come in turn."""
    rng = random.Random(seed)
    tokenizer = tiny_tokenizer()
    rows: list[dict[str, Any]] = []
    for index in range(n):
        label = index % 2
        opinion = rng.choice(POSITIVE if label else NEGATIVE)
        degree = "very " * rng.randrange(3)
        animal = rng.choice(list(FACTS))
        text = f"{rng.choice(NAMES)} said the {FACTS[animal][0]} {animal} was {degree}{opinion} {rng.choice(TIMES)} ."
        encoded = tokenizer(text)
        rows.append({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "label": label})
    return Dataset.from_list(rows)


def rows_of(count: int, start: int = 0) -> Dataset:
    """Rows for the classifier of one length, with a number in `row` to know them by."""
    rows = classification_dataset(count)
    return Dataset.from_list(
        [
            {"input_ids": row["input_ids"][:8], "attention_mask": [1] * 8, "label": row["label"], "row": start + index}
            for index, row in enumerate(rows)
        ]
    )


def token_rows(n: int = 24, shortest: int = 4) -> list[dict[str, list[int]]]:
    """Rows of a language model that are tokenized already, of five different lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = [shortest + 3 * (index % 5) for index in range(n)]
    return [{"input_ids": torch.randint(5, 60, (length,), generator=generator).tolist()} for length in lengths]
