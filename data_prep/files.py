"""Files of the data commands: what an output may not replace is known before any work, and errors carry the setting's name."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def printable(text: str) -> str:
    """A text on one line: line ends, control characters and undecodable bytes of a file's name are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Puts the setting that named a file in front of what is wrong with the file.

    Raises:
        ValueError: instead of a ValueError or OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{setting}: {error.filename}: {error.strerror}" if error.filename else f"{setting}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def temporary_path(path: Path) -> Path:
    """`<path>.tmp`, under which a file is written until it is whole. Such names belong to the commands."""
    return Path(f"{path}.tmp")


def open_new(path: Path) -> BinaryIO:
    """Opens a new file in place of what may be left there by a killed run; what a link points to is not touched."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def check_name(output: str | Path) -> None:
    """Refuses what cannot be the name, or the first part of the name, of a file.

    Raises:
        ValueError: the name is empty, ends like a folder's or is a folder's, or holds a NUL.
    """
    text = str(output)
    if "\0" in text:
        raise ValueError(f"{text!r} must not hold a NUL")
    if os.path.basename(text) in ("", os.curdir, os.pardir):
        raise ValueError(f"{text!r} must end in the name of a file")
    if os.path.isdir(text):
        raise ValueError(f"{text} is a folder; name a file in it, such as {os.path.join(text, 'web')}")


def check_targets(targets: Sequence[Path], sources: Iterable[str | Path]) -> None:
    """Refuses files that must not be written, before any work is done.

    Files are compared as the system knows them: by device and inode, so by way of links, of other spellings of a path and of
    capitals where these do not count.

    Args:
        targets: files that will be written, by way of their temporary names.
        sources: files that are read; those that do not exist do not matter here.

    Raises:
        ValueError: a target is a source or no regular file, or its folder cannot be written.
    """
    known = {_identity(Path(source)): source for source in sources if os.path.exists(source)}
    for target in targets:
        for path in (target, temporary_path(target)):
            if path.is_dir():
                raise ValueError(f"{path} is a folder")
            if path.exists() and _identity(path) in known:
                raise ValueError(f"{path} is the input {known[_identity(path)]}; an output must not replace what is read")
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is no regular file")
        _check_folder(target)


def check_absent(targets: Iterable[Path]) -> None:
    """A ValueError that names the first target that exists, be it a link to nothing."""
    for target in targets:
        if os.path.lexists(target):
            raise ValueError(f"{target} exists; pass --overwrite=true to replace it")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _check_folder(path: Path) -> None:
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        if folder.name == os.pardir:  # made on the way, the missing folder would lead to a file that was not looked at
            raise ValueError(f"{path}: {folder.parent} does not exist, so `..` leads nowhere from there")
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {folder} is not writable")


def make_folder(path: Path) -> list[Path]:
    """Creates the folder of a file.

    Returns:
        The folders that were missing, innermost first, for `remove_empty` when the work fails.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders that hold nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
