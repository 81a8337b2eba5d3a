"""Adapters on live models: the only readers of PEFT's inside."""

from . import lora as lora  # registers the kind of site that every search knows
