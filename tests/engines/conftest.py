"""What every case of DeepSpeed would wait for until its time is up is said at once."""

import pytest

from megagrin.engines.builds import CPU_OPERATORS, OFFLOAD_OPERATORS, stale_locks


@pytest.fixture(scope="session", autouse=True)
def _no_dead_build() -> None:
    assert not stale_locks((*OFFLOAD_OPERATORS, *CPU_OPERATORS))
