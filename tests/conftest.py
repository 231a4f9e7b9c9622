"""The order of the tests - first those that mostly wait for messages, so that another process has work meanwhile - and
what many of them use."""

import sys
from collections.abc import Iterator

import pytest
import torch

from apollo_optim.cli import shim

FIRST = ("test_sharded.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of tiny operations only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drop_in() -> Iterator[None]:
    """Our apollo_torch in front of an installed one, as PYTHONPATH would; later tests import what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "apollo_torch", raising=False)
        patch.syspath_prepend(str(shim.FOLDER))
        yield
        sys.modules.pop("apollo_torch", None)
