"""The fixture `trained`: finished training runs, shared by the tests of this room that compare them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.equivalence.training import Trained
from tests.harness import Ranks


@pytest.fixture(scope="session")
def trained(ranks: Callable[[int], Ranks]) -> Trained:
    """Runs of the engine and of the oracle, each computed once in this session."""
    return Trained(ranks)
