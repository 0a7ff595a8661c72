"""Recipes: YAML files and `--section.key=value` overrides into a tree of frozen dataclasses.

Later sources win: dataclass defaults, preset, recipes in the order given, and then the command line, wherever on it a value
stands. A misspelt key is answered with the nearest right one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from megagrin.settings.arguments import about, check, read_arguments, unknown
from megagrin.settings.recipe import read_recipe
from megagrin.settings.values import convert, show

__all__ = ["Option", "about", "changed_fields", "check", "parse", "read_recipe", "save"]

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """An option of a command that is no setting of the run: given on the command line only.

    Attributes:
        hint: type.
        default: value when it is not given.
        help: what it does.
    """

    hint: Any
    default: Any
    help: str


_GENERAL = {"help": Option(bool, False, "show this help"), "print_config": Option(bool, False, "print the resolved recipe")}


def parse(
    root: type[T],
    argv: Sequence[str],
    prog: str,
    description: str,
    defaults: Callable[[Callable[[str], Any]], dict[str, Any]] | None = None,
    extra: Mapping[str, Option] | None = None,
    finish: Callable[[T], T] = lambda config: config,
) -> tuple[T, dict[str, Any]]:
    """Build a `root` from command-line arguments.

    Args:
        root: dataclass of dataclasses.
        argv: arguments without the program's name.
        prog: program name for help.
        description: first lines of help.
        defaults: given a function that looks a key up in all sources, returns `section.key` values that every source overrides.
        extra: options beside the settings.
        finish: resolves what depends on several settings.

    Returns:
        The configuration, and the extra options by name.

    Raises:
        ValueError: unknown keys (with the nearest right one), values of a wrong type, unreadable recipes; all of them at once.
        SystemExit: after `--help` and `--print_config`.
    """
    extra = dict(extra or {})
    if {"-h", "--help"} & set(argv):
        _print_help(root, prog, description, extra)
        raise SystemExit(0)
    sections = {name: get_type_hints(section) for name, section in get_type_hints(root).items()}
    hints = {f"{section}.{key}": hint for section, keys in sections.items() for key, hint in keys.items()}
    options = {**_GENERAL, **extra}
    line, files, problems = _command_line(argv, hints, options)
    recipes = [(file, read_recipe(file)) for file in files]
    for file, values in recipes:
        problems += _strangers(values, set(hints), set(sections), file)
    given: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for source, values in [*recipes, ("command line", line)]:
        for key, value in values.items():
            hint = hints.get(key) or (options[key].hint if source == "command line" and key in options else None)
            if hint is not None:
                given.pop(key, None)
                wrong.pop(key, None)
                try:
                    given[key] = convert(hint, value)
                except ValueError as error:
                    wrong[key] = f"{key}: {show(value)} {error}"
    check([*problems, *wrong.values()])
    given = (defaults(given.get) if defaults is not None else {}) | given
    config = finish(root(**{name: section(**_of(given, name)) for name, section in get_type_hints(root).items()}))
    chosen = {key: given.get(key, option.default) for key, option in options.items()}
    if chosen["print_config"]:
        print(_as_yaml(config), end="")
        raise SystemExit(0)
    return config, {key: chosen[key] for key in extra}


def _of(given: dict[str, Any], section: str) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{section}.")}


def _command_line(
    argv: Sequence[str], hints: dict[str, Any], options: dict[str, Option]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Raw values by key, recipes in order, and what is wrong."""
    flags = [name for name, option in options.items() if option.hint is bool]
    values: dict[str, str] = {}
    files: list[str] = []
    problems: list[str] = []
    sections = {key.partition(".")[0] for key in hints}
    for argument in read_arguments(argv):
        # --engine=deepspeed for --engine.kind=deepspeed
        key = f"{argument.key}.kind" if f"{argument.key}.kind" in hints else argument.key
        if not key:
            problems.append(f"{show(argument.values[0])}: a setting is expected here, as --section.key=value")
        elif key not in hints and key not in options and key != "config":
            problems += _strangers({key: ""}, {*hints, *options, "config"}, sections, "command line")
        elif not argument.values and key not in flags:
            problems.append(f"{argument.key if key != 'config' else '--config'}: a value must follow (command line)")
        elif key == "config":
            files.append(argument.values[0])
        else:
            values[key] = argument.values[0] if argument.values else "true"
    return values, files, problems


def _strangers(values: Mapping[str, Any], known: set[str], sections: set[str], source: str) -> list[str]:
    """What is no setting: unknown keys, and sections that are no mapping (an empty one is none)."""
    problems = []
    for key, value in values.items():
        if key in sections and value is not None:
            shown = "" if value == "" else f" {show(value)}"
            problems.append(f"{key}:{shown} must be a section of keys, as {key}.<key> ({source})")
        elif key not in known and key not in sections:
            problems.append(unknown(key, known | sections, source))
    return problems


def _print_help(root: type, prog: str, description: str, extra: Mapping[str, Option]) -> None:
    parser = ArgumentParser(prog=prog, description=description, default_env=False)
    parser.add_argument("--config", type=str, help="recipe (YAML); may be given several times, later ones win")
    parser.add_argument("--print_config", action="store_true", help=_GENERAL["print_config"].help)
    for name, option in extra.items():
        kind: dict[str, Any] = (
            {"action": "store_true"} if option.hint is bool else {"type": option.hint, "default": option.default}
        )
        parser.add_argument(f"--{name}", help=option.help, **kind)
    parser.add_class_arguments(root, None, sub_configs=False)
    parser.print_help()


def _as_yaml(config: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config: Any, path: Path) -> None:
    """Write a resolved configuration as YAML that `--config` reads back."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_as_yaml(config))
    temporary.replace(path)


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old -> new` for every leaf that differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_fields(before, after, f"{path}.")
        elif before != after:
            changes.append(f"{path}: {before} -> {after}")
    return changes
