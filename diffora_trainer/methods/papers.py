"""How a paper is cited, and those that several methods implement. One of a single method stands in its file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """
    A paper.

    Args:
        name (`str`): what its method is called.
        url (`str`): its page.
        bibtex (`str`): its citation.
    """

    name: str
    url: str
    bibtex: str

    @property
    def link(self) -> str:
        """A Markdown link."""
        return f"[{self.name}]({self.url})"


DIFFORA = Paper(
    "DiffoRA",
    "https://huggingface.co/papers/2502.08905",
    """\
@article{jiang2025diffora,
    title  = {{DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection}},
    author = {Jiang, Tangyu and Wang, Haodi and Yuan, Chun},
    year   = 2025,
    eprint = {arXiv:2502.08905},
}""",
)
HETEROLORA = Paper(
    "HeteroLoRA",
    "https://huggingface.co/papers/2406.14956",
    """\
@article{zhang2024heterolora,
    title  = {{Unlocking the Global Synergies in Low-Rank Adapters}},
    author = {Zhang, Zixi and Zhang, Cheng and Gao, Xitong and Mullins, Robert D. and Constantinides, George A. and
              Zhao, Yiren},
    year   = 2024,
    eprint = {arXiv:2406.14956},
}""",
)
ZERO_COST = f"one of the zero-cost scores of {HETEROLORA.link} in an independent implementation"
