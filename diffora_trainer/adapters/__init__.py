"""Adapters on live models: what a search needs to know of PEFT's layers."""

from . import lora as lora  # registers the kind of site that every search knows, as the others do their layers


from . import dora as dora  # isort: skip
from . import embedding as embedding  # isort: skip
from . import starts as starts  # isort: skip
from . import weights as weights  # isort: skip
from . import other_types as other_types  # isort: skip
