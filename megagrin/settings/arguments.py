"""The command line: `--key value` and `--key=value` read for what they say, and a parser whose errors are one line each."""

import argparse
import difflib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megagrin.settings.values import convert, show


@dataclass(frozen=True)
class Argument:
    """One option of a command line, or a word without one.

    Attributes:
        key: without its dashes; empty for a word that no option takes.
        values: what was given to it, in order.
    """

    key: str
    values: tuple[str, ...]


def read_arguments(argv: Sequence[str], flags: Iterable[str] = (), lists: Iterable[str] = ()) -> list[Argument]:
    """Split a command line; an option takes the next word, whatever it is, unless that begins with two dashes.

    Args:
        argv: arguments without the program's name.
        flags: keys that take only a word that says true or false, where other words may follow.
        lists: keys that take all words up to the next option.
    """
    found: list[Argument] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            found.append(Argument("", (word,)))
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        values = [value] if equals else []
        if key in lists:
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
        elif not equals and words and not words[0].startswith("--") and (key not in flags or words[0] in ("true", "false")):
            values.append(words.pop(0))
        found.append(Argument(key, tuple(values)))
    return found


def check(violations: Sequence[str]) -> None:
    """Refuse what is asked for when rules are broken.

    Raises:
        ValueError: names every violation, one a line.
    """
    if len(violations) == 1:
        raise ValueError(violations[0])
    if violations:
        raise ValueError("\n  ".join([f"{len(violations)} settings do not fit:", *violations]))


def describe(error: BaseException) -> str:
    """An error's text for a user: file and reason where the system refused a file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Put the name of the setting that led here in front of an error.

    Raises:
        ValueError: with the setting's name, for a ValueError or an OSError of the block.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = describe(error)
        named = ValueError(text if text.startswith(f"{setting}:") else f"{setting}: {text}")
        for note in getattr(error, "__notes__", []):
            named.add_note(note)
        raise named from error


def require_folder(setting: str, path: str | Path) -> None:
    """See that a folder can be written to, or be made, and leave nothing there.

    Raises:
        ValueError: with the setting's name: a file stands in its place, or the file system refuses.
    """
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{setting}: {str(path)!r} must name a folder")
    folder = Path(path).absolute()
    try:
        while not folder.is_dir():
            if os.path.lexists(folder):
                raise ValueError(f"{setting}: {path} must be a folder, and {folder} is not")
            if folder.name == os.pardir:  # made on the way, the missing folder would lead to files that were not looked at
                raise ValueError(f"{setting}: {path}: {folder.parent} does not exist, so `..` leads nowhere from there")
            folder = folder.parent
        # os.access says yes to root where the file system says no.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".megagrin-"):
            pass
    except OSError as error:
        raise ValueError(f"{setting}: {path} cannot be written to: {folder}: {error.strerror}") from error


def unknown(key: str, known: set[str], source: str) -> str:
    """That there is no such key, and the nearest one that there is."""
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    # The right key in a wrong section, or without one.
    near += sorted(name for name in known if "." in name and name.rsplit(".", 1)[-1] == leaf)
    close = difflib.get_close_matches(leaf, sorted({name.rsplit(".", 1)[-1] for name in known}), 1, 0.8)
    near += sorted(name for name in known if name.rsplit(".", 1)[-1] in close)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
    return f"{key}: no such key ({source}){hint}"


def option_problems(parser: argparse.ArgumentParser, argv: list[str]) -> Iterator[str]:
    """What is wrong with a command line of flat options, each as `--option: value and rule`."""
    actions = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    several = {key for key, action in actions.items() if action.nargs in ("+", "*")}
    flags = {key for key, action in actions.items() if action.nargs in ("?", 0)}
    takes_words = any(not action.option_strings for action in parser._actions)
    given = read_arguments(argv, flags if takes_words else (), several)
    for argument in given:
        if not argument.key:
            if not takes_words:
                yield f"{show(argument.values[0])}: an option is expected here, --help lists them"
        elif argument.key not in actions:
            yield unknown(f"--{argument.key}", {f"--{key}" for key in actions}, "command line")
        else:
            yield from _wrong_values(argument, actions[argument.key], argument.key in flags)
    present = {argument.key for argument in given}
    for key, action in actions.items():
        if action.required and not {option.removeprefix("--") for option in action.option_strings} & present:
            yield f"--{key}: must be given ({action.help})"


def _wrong_values(argument: Argument, action: argparse.Action, flag: bool) -> Iterator[str]:
    if not argument.values and not flag:
        yield f"--{argument.key}: a value must follow"
    hint = getattr(action, "_typehint", None) or action.type or str
    for value in argument.values:
        try:
            if isinstance(number := convert(hint, value), float) and not math.isfinite(number):
                raise ValueError("must be a finite number")
        except ValueError as error:
            yield f"--{argument.key}: {show(value)} {error}"
