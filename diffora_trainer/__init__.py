"""DiffoRA for the Hugging Face trainers: choose the LoRA modules of a model while it trains."""

from .config import DiffoRAConfig
from .matrix import DifferentialAdaptationMatrix
from .search import ArchitectureSearch
from .selection import Selection
from .surgery import apply_selection
from .trainer import DiffoRAMixin, DiffoRASFTTrainer, DiffoRATrainer


__version__ = "0.1.0.dev0"

__all__ = [
    "ArchitectureSearch",
    "DiffoRAConfig",
    "DiffoRAMixin",
    "DiffoRASFTTrainer",
    "DiffoRATrainer",
    "DifferentialAdaptationMatrix",
    "Selection",
    "apply_selection",
]
