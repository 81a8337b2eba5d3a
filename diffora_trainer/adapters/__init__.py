"""Adapters on live models: the only readers of PEFT's inside."""
