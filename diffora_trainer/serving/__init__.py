"""Adapters in the form that a server needs."""

from .export import SERVERS, export


__all__ = ["SERVERS", "export"]
