"""What the environment says of the ranks, before any process group is joined."""

import pytest

from megagrin.distributed.runtime import RuntimeConfig, world_size_from_environment


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_a_world_without_ranks_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"^WORLD_SIZE: '{text}' must be a positive integer$"):
        world_size_from_environment()


def test_a_process_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_environment() == 1
    monkeypatch.setenv("WORLD_SIZE", "512")
    assert world_size_from_environment() == 512
    assert RuntimeConfig().timeout_minutes == 30
