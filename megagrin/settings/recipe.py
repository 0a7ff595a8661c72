"""Reading a recipe: a YAML file of sections, each a mapping of settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megagrin.settings.values import one_line, show


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe.

    Returns:
        Raw values by `section.key`; a section that is no mapping under its own name.

    Raises:
        ValueError: the file is missing, is not YAML, holds no mapping of sections, or gives a key more than once.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: {path} is not a file")
    try:
        text = path.read_text()
        content, twice = _load(text)
    except OSError as error:
        raise ValueError(f"--config: {path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"--config: {path} has a value that contains itself (by an anchor), or is nested too deeply") from error
    except Exception as error:  # PyYAML lets through whatever its constructors raise
        raise ValueError(f"--config: {path} is not valid YAML: {one_line(str(error))}") from error
    if content is None:
        raise ValueError(f"--config: {path} holds no settings")
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold sections of keys, not {show(content)}")
    if twice:
        raise ValueError("; ".join(f"--config: {path}, {text}" for text in twice))
    return _flatten(content)


def _load(text: str) -> tuple[Any, list[str]]:
    """What the YAML holds, and which keys it gives twice (looked at first: constructing spreads merged keys over the nodes)."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        twice = list(_duplicates(node, {}))
        return loader.construct_document(node), twice
    finally:
        loader.dispose()


def _duplicates(node: yaml.Node, seen: dict[str, int], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """`line n: key is given before, on line m` for sections and their keys; YAML itself would take the last one."""
    if not isinstance(node, yaml.MappingNode) or depth > 1:
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            yield f"line {line}: {name} was given before, on line {seen[name]}"
        seen[name] = line
        yield from _duplicates(value, seen, f"{name}.", depth + 1)


def _flatten(content: dict[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, keys in content.items():
        if isinstance(keys, dict) and keys:
            flat |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            flat[str(section)] = None if keys == {} else keys
    return flat
