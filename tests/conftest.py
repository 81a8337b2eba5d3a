"""Settings of every test."""

from __future__ import annotations

import gc

import pytest


pytest.register_assert_rewrite("helpers")

import helpers  # noqa: E402, F401, before the libraries, which read once what it sets


@pytest.fixture(autouse=True, scope="session")
def frozen_libraries() -> None:
    """Each run of a trainer collects garbage: let it not look through all that was imported, for 0.3 s each time."""
    import helpers.trainers  # noqa: F401, and with it all libraries

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    from transformers import set_seed

    set_seed(0)
