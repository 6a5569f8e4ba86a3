"""The fixture `ranks`: worker processes shared by the whole test session, one group per world size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.harness import Ranks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel file is imported


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2).run(call, key=value)` runs `call` on two processes; they are started by the first call only."""
    torch.set_num_threads(1)
    groups: dict[int, Ranks] = {}

    def of(world_size: int) -> Ranks:
        if world_size not in groups:
            groups[world_size] = Ranks(world_size)
        return groups[world_size]

    yield of
    for group in groups.values():
        group.close()


@pytest.fixture(autouse=True)
def leaves_no_process_group() -> Iterator[None]:
    """`lorica.initialize` in this process makes a default process group, which the next test must not find."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
