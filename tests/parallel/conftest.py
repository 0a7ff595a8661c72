"""Which comparisons with one process run in `make test`: a layout of each kind; all others are slow."""

from pathlib import Path

import pytest

FAST_FILES = ("test_layouts.py", "test_matrix.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark cases that start ranks as slow, but for those of FAST_FILES; before pytest selects by mark."""
    for item in items:
        here = item.path.parent == Path(__file__).parent
        if here and "gloo" in getattr(item, "fixturenames", ()) and item.path.name not in FAST_FILES:
            item.add_marker(pytest.mark.slow)
