"""Adapters on live models: what a search needs to know of PEFT's layers."""

from . import lora as lora  # registers the kind of site that every search knows, as the others do their layers


# The first class that fits a layer takes it, in this order. PiSSA and OLoRA come first, whatever else a layer is: only
# their class knows that a pruned module needs a part of its weight back, and refuses where it cannot tell which.
from . import starts as starts  # isort: skip
from . import dora as dora  # isort: skip
from . import embedding as embedding  # isort: skip
from . import weights as weights  # isort: skip
from . import other_types as other_types  # isort: skip
