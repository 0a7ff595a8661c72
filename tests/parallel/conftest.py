"""Which comparisons with one process run in `make test`: a layout of each kind; all others are slow.

Of the slow ones, those of eight ranks are left to `make test-all`: on two cores each takes as long as four of the others, and
FAST_FILES have some of each kind.
"""

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
            callspec = getattr(item, "callspec", None)
            if callspec is not None and callspec.params.get("world_size") == 8:
                item.add_marker(pytest.mark.long)
