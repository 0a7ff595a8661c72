"""One setting's value: from YAML or from the command line's text to the type that its annotation names."""

import dataclasses
import math
import re
import reprlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_INTEGER = re.compile(r"[-+]?\d+(_\d+)*")
_YAML_FLOAT = re.compile(r"^([-+]?)\.(inf|nan)$", re.IGNORECASE)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SIMPLE = {int: "an integer", float: "a number", bool: "true or false", str: "text (in quotes, where YAML reads another type)"}
_NULL = ("null", "~")
_LARGEST = 1 << 63

_show = reprlib.Repr()
_show.maxstring = _show.maxother = 200
_show.maxlevel = 2


def show(value: Any) -> str:
    """A value for a message: text in quotes, on one line, long ones shortened; null as YAML has it."""
    if value is None:
        return "null"
    # Digits beyond what Python turns into text are not worth showing either.
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _LARGEST.bit_length() * 2:
        return f"a number of about {int(value.bit_length() * math.log10(2))} digits"
    return _show.repr(value) if not isinstance(value, bool) else str(value).lower()


def one_line(text: str) -> str:
    """Text with every run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


def convert(hint: Any, value: Any) -> Any:
    """A raw value as the type that a setting has.

    Args:
        hint: int, float, bool, str, Path, a Literal, a tuple of one of these, or one of these or None.
        value: what YAML made of a recipe, or the text of the command line.

    Raises:
        ValueError: it is no such value; the message is the rule alone, to be put behind name and value.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value in _NULL:
            return None
        return convert(next(argument for argument in arguments if argument is not type(None)), value)
    if origin is Literal:
        for choice in arguments:
            if (type(value) is type(choice) and value == choice) or (isinstance(value, str) and value == str(choice)):
                return choice
        raise ValueError(f"must be one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _sequence(arguments[0], value)
    if hint is Path:
        return Path(convert(str, value))
    converted = _scalar(hint, value)
    if converted is None:
        raise ValueError(f"must be {_SIMPLE[hint]}")
    return converted


def _scalar(hint: Any, value: Any) -> Any:
    """The value as int, float, bool or str; None where it is none."""
    if hint is str:
        return value if isinstance(value, str) else None
    if hint is bool:
        return _BOOLEANS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if hint is float:
            # YAML reads 1e-3, without a dot, as text; .inf and .nan are YAML's own names.
            return float(_YAML_FLOAT.sub(r"\1\2", value) if isinstance(value, str) else value)
        if isinstance(value, str):
            return int(value) if _INTEGER.fullmatch(value) else None
    except (ValueError, OverflowError):
        return None
    return value if isinstance(value, int) else None


def _sequence(hint: Any, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        import yaml  # a command without lists runs where there is no PyYAML

        try:
            value = yaml.safe_load(value)
        except Exception:  # PyYAML lets through whatever its constructors raise
            value = None
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list like [a, b]")
    items = []
    for item in value:
        try:
            items.append(convert(hint, item))
        except ValueError as error:
            raise ValueError(f"holds {show(item)}, and each item {error}") from error
    return tuple(items)


def out_of_range(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, rule broken) of every number of a tree of dataclasses that is not finite, or too large for 64 bits."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{name}.")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                yield name, f"{name}: {item} must be a finite number"
            elif isinstance(item, int) and not -_LARGEST <= item < _LARGEST:
                yield name, f"{name}: {show(item)} must lie within 64 bits"
