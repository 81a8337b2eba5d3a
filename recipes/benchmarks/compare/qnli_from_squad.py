"""
Pairs of a question and a sentence, as QNLI has them, from local files of SQuAD: does the sentence hold the answer?

    python recipes/benchmarks/compare/qnli_from_squad.py ../shared/data/squad qnli

Reads `train` and `validation` of the first folder, as `.jsonl` or `.jsonl.gz`, and writes both to the second. For each
question there is one pair: in half of them, drawn at random, the sentence is another one of the same paragraph that
does not contain the answer's text. Where there is no such sentence, the question is left out.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any


SHORTEST = 30
"""Characters of the sentence of another pair: what is shorter is hardly one (an initial, a number)."""


def pair(row: dict[str, Any], draw: random.Random) -> dict[str, str] | None:
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    right, wrong = None, []
    for found in re.finditer(r"[^.!?]+[.!?]*\s*", row["context"]):
        sentence = found.group().strip()
        if found.start() <= start < found.end():
            right = sentence
        elif len(sentence) > SHORTEST and text not in sentence:
            wrong.append(sentence)
    if right is None or not wrong:
        return None
    other = draw.choice(wrong)
    holds = draw.random() < 0.5
    return {
        "question": row["question"],
        "sentence": right if holds else other,
        "label": "entailment" if holds else "not_entailment",
    }


def main(source: Path, target: Path) -> None:
    from datasets import load_dataset

    draw = random.Random(0)
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        files = [file for suffix in (".jsonl", ".jsonl.gz") if (file := source / f"{split}{suffix}").is_file()]
        if not files:
            raise FileNotFoundError(f"There is no {split}.jsonl or {split}.jsonl.gz in {source}.")
        rows = load_dataset("json", data_files=str(files[0]), split="train")
        pairs = [found for row in rows if (found := pair(row, draw)) is not None]
        with (target / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(found) + "\n" for found in pairs)
        print(f"{target / split}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
