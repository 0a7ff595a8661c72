"""Names of files in messages, and folders that are made on the way."""

from pathlib import Path

import pytest

from megagrin.data_prep.files import check_absent, make_folder, printable, remove_empty


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/b c.txt", "a/b c.txt"),
        ("Müller/数.jsonl", "Müller/数.jsonl"),
        ("a\nb", "a\\nb"),
        ("a\x1b[2J", "a\\x1b[2J"),
        ("\udcff", "\\udcff"),
    ],
)
def test_only_what_a_terminal_cannot_show_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_folders_made_on_the_way_go_again_when_empty(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a" / "b" / "corpus.bin")
    assert made == [tmp_path / "a" / "b", tmp_path / "a"]
    (tmp_path / "a" / "other").write_text("")
    remove_empty(made)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "other"]
    assert make_folder(tmp_path / "a" / "x") == []


def test_a_link_to_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    check_absent([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="link exists; pass --overwrite=true"):
        check_absent([tmp_path / "nothing", tmp_path / "link"])
