"""The order of the tests: first those that mostly wait for messages, so that another process has work meanwhile."""

import pytest

FIRST = ("test_sharded.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
