"""Reads a recipe (launch/recipes/*.yaml) without a YAML library: a machine for `make gpu` has none."""

from pathlib import Path

Value = str | int | float | bool


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def read(path: Path) -> dict[str, dict[str, Value]]:
    """Sections of `name: value` lines, two spaces deep, and comments: all that recipes are made of.

    Raises:
        ValueError: a line that is neither.
    """
    sections: dict[str, dict[str, Value]] = {}
    section: dict[str, Value] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition(" #")[0].rstrip()
        if not text or text.startswith("#"):
            continue
        name, colon, value = text.strip().partition(":")
        indent, value = len(text) - len(text.lstrip()), value.strip()
        plain = colon and name.isidentifier() and not value.startswith(tuple("\"'[{&*|>!"))
        if not plain or (indent, bool(value)) not in ((0, False), (2, True)):
            raise ValueError(f"{path}:{number}: {line!r} must be `section:` or `  name: value` with a plain value")
        if indent == 0:
            section = sections.setdefault(name, {})
        else:
            section[name] = _value(value)
    return sections
