"""Settings of every test."""

from __future__ import annotations

import pytest


pytest.register_assert_rewrite("helpers")

import helpers  # noqa: E402, F401, before the libraries, which read once what it sets


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    from transformers import set_seed

    set_seed(0)
