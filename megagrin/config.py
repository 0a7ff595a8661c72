"""Recipes: YAML files and `--section.key=value` overrides into a tree of frozen dataclasses.

Later sources win: dataclass defaults, preset, recipes in the order given, overrides. A misspelt key is answered with the nearest
right one.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

T = TypeVar("T")


def build_parser(root: type, prog: str, description: str) -> ArgumentParser:
    """A parser with one argument group per section of `root`, `--config FILE` and `--print_config`."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe (YAML); may be given several times")
    parser.add_class_arguments(root, None, sub_configs=False)
    return parser


def parse(
    root: type[T],
    argv: list[str],
    prog: str,
    description: str,
    defaults: Callable[[Callable[[str], str | None]], dict[str, Any]] | None = None,
    extra: Callable[[ArgumentParser], None] | None = None,
) -> tuple[T, Namespace]:
    """Build a `root` from command-line arguments.

    Args:
        root: dataclass of dataclasses.
        argv: arguments without the program's name.
        prog: program name for help.
        description: first lines of help.
        defaults: given a function that looks a dotted key up in the sources, returns dotted keys to preset before parsing.
        extra: adds arguments that are not part of `root`.

    Returns:
        The configuration and the namespace with the extra arguments.

    Raises:
        ValueError: unknown key (names the nearest right one), value of a wrong type, unreadable recipe.
    """
    argv = _spell_out(argv, root)
    parser = build_parser(root, prog, description)
    if extra is not None:
        extra(parser)
    _check_keys(parser, argv)
    if defaults is not None:
        parser.set_defaults(defaults(lambda key: peek(argv, key)))
    try:
        namespace = parser.parse_args(argv)
        instance = parser.instantiate(namespace)
    except (ArgumentError, TypeError) as error:
        raise ValueError(_one_line(str(error))) from error
    names = [field.name for field in dataclasses.fields(root)]  # type: ignore[arg-type]
    config = root(**{name: instance[name] for name in names})
    # The parser lets null through in a file, as if the key had not been given.
    check([f"{key}: null is not a value of this setting" for key in _unexpected_nulls(config)])
    return config, instance


def _spell_out(argv: list[str], root: type) -> list[str]:
    """`--section=x` and `--section x` as `--section.kind=x`, for sections that have a kind."""
    hints = get_type_hints(root)
    kinds = {name for name, hint in hints.items() if "kind" in getattr(hint, "__dataclass_fields__", {})}
    spelled: list[str] = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        if spelled and spelled[-1].removeprefix("--") in kinds:
            spelled[-1] = f"{spelled[-1]}.kind={argument}"
        elif equals and option.removeprefix("--") in kinds:
            spelled.append(f"{option}.kind={value}")
        else:
            spelled.append(argument)
    return spelled


def save(config: Any, path: Path) -> None:
    """Write a resolved configuration as YAML that `--config` reads back."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    temporary.replace(path)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe as a dictionary.

    Raises:
        ValueError: the file is missing, is not YAML, or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: {path} is not a file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML: {_one_line(str(error))}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold sections of keys, not a {type(content).__name__}")
    return content


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


def check(violations: list[str]) -> None:
    """Refuse a configuration with broken rules.

    Raises:
        ValueError: names every violation, one a line.
    """
    if len(violations) == 1:
        raise ValueError(violations[0])
    if violations:
        raise ValueError("\n  ".join([f"{len(violations)} settings do not fit:", *violations]))


def _unexpected_nulls(config: Any, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            keys += _unexpected_nulls(value, f"{prefix}{field.name}.")
        elif value is None and type(None) not in get_args(hints[field.name]):
            keys.append(f"{prefix}{field.name}")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dictionary, those of sections included."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        flat[f"{prefix}{key}"] = value
    return flat


def _recipes(argv: list[str]) -> list[str]:
    files = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    files += [argv[place + 1] for place, argument in enumerate(argv[:-1]) if argument == "--config"]
    return files


def peek(argv: list[str], key: str) -> str | None:
    """The value that the last source gives a dotted key, before any parsing."""
    value = None
    for file in _recipes(argv):
        value = flatten(read_recipe(file)).get(key, value)
    for place, argument in enumerate(argv):
        if argument.startswith(f"--{key}="):
            value = argument.split("=", 1)[1]
        elif argument == f"--{key}" and place + 1 < len(argv):
            value = argv[place + 1]
    return value


def _check_keys(parser: ArgumentParser, argv: list[str]) -> None:
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    sections = {key.split(".")[0] for key in known if "." in key}
    known |= sections
    for argument in argv:
        key = argument.split("=", 1)[0].removeprefix("--")
        if argument.startswith("--") and key not in known:
            raise ValueError(_unknown(key, known, "command line"))
    for file in _recipes(argv):
        for key in flatten(read_recipe(file)):
            if key not in known:
                raise ValueError(_unknown(key, known, file))


def _unknown(key: str, known: set[str], source: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    # The right key in a wrong section, or without one.
    near += sorted(name for name in known if "." in name and name.rsplit(".", 1)[-1] == leaf)
    near += [
        name for name in known if name.rsplit(".", 1)[-1] in difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1]], 1, 0.8)
    ]
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
    return f"{key}: no such key ({source}){hint}"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
