"""The papers that methods of this package implement, and how to cite them."""

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
ADALORA = Paper(
    "AdaLoRA",
    "https://huggingface.co/papers/2303.10512",
    """\
@article{zhang2023adalora,
    title  = {{AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning}},
    author = {Zhang and others},
    year   = 2023,
    eprint = {arXiv:2303.10512},
}""",
)
PRILORA = Paper(
    "PRILoRA",
    "https://huggingface.co/papers/2401.11316",
    """\
@article{benedek2024prilora,
    title  = {{PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation}},
    author = {Benedek, Nadav and Wolf, Lior},
    year   = 2024,
    eprint = {arXiv:2401.11316},
}""",
)
GELORA = Paper(
    "GeLoRA",
    "https://huggingface.co/papers/2412.09250",
    """\
@article{eddib2024gelora,
    title  = {{GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning}},
    author = {Ed-dib, Abdessalam and Datbayev, Zhanibek and Aboussalah, Amine Mohamed},
    year   = 2024,
    eprint = {arXiv:2412.09250},
}""",
)
EVA = Paper(
    "EVA",
    "https://huggingface.co/papers/2410.07170",
    """\
@article{paischer2024eva,
    title  = {{Parameter Efficient Fine-tuning via Explained Variance Adaptation}},
    author = {Paischer, Fabian and others},
    year   = 2024,
    eprint = {arXiv:2410.07170},
}""",
)
ALETHEIA = Paper(
    "Aletheia",
    "https://huggingface.co/papers/2604.15351",
    """\
@article{saket2026aletheia,
    title  = {{Aletheia: Gradient-Guided Layer Selection for Efficient LoRA Fine-Tuning Across Architectures}},
    author = {Saket, Abdulmalek},
    year   = 2026,
    eprint = {arXiv:2604.15351},
}""",
)
CKA = Paper(
    "Layer-wise LoRA with CKA",
    "https://huggingface.co/papers/2602.05988",
    """\
@article{ogawa2026layerwise,
    title  = {{Layer-wise LoRA fine-tuning: a similarity metric approach}},
    author = {Ogawa, Keith Ando and others},
    year   = 2026,
    eprint = {arXiv:2602.05988},
}""",
)
ALORA = Paper(
    "ALoRA",
    "https://huggingface.co/papers/2403.16187",
    """\
@article{liu2024alora,
    title  = {{ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models}},
    author = {Liu, Zequan and Lyn, Jiawen and Zhu, Wei and Tian, Xing and Graham, Yvette},
    year   = 2024,
    eprint = {arXiv:2403.16187},
}""",
)
SORA = Paper(
    "SoRA",
    "https://huggingface.co/papers/2311.11696",
    """\
@article{ding2023sora,
    title  = {{Sparse Low-rank Adaptation of Pre-trained Language Models}},
    author = {Ding, Ning and Lv, Xingtai and others},
    year   = 2023,
    eprint = {arXiv:2311.11696},
}""",
)
BEAMLORA = Paper(
    "BeamLoRA",
    "https://huggingface.co/papers/2502.13604",
    """\
@article{gu2025beamlora,
    title  = {{BeamLoRA: Beam-Constraint Low-Rank Adaptation}},
    author = {Gu, Naibin and Zhang, Zhenyu and others},
    year   = 2025,
    eprint = {arXiv:2502.13604},
}""",
)
ZERO_COST = f"one of the zero-cost scores of {HETEROLORA.link} in an independent implementation"
