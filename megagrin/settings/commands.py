"""A command's parser; settings of a run are read by config.py."""

import argparse
from typing import Any

from jsonargparse import ArgumentParser

from megagrin.settings.arguments import check, option_problems
from megagrin.settings.values import one_line


class CommandParser(ArgumentParser):
    """A parser of flat options: several errors at once, each as `--option: value and rule`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, "default_env": False} | kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As argparse's.

        Raises:
            ValueError: unknown or missing options, values of a wrong type.
        """
        argv = list(args or [])
        if not {"-h", "--help"} & set(argv):
            check(list(option_problems(self, argv)))
        try:
            return super().parse_args(argv, namespace, **kwargs)
        except (argparse.ArgumentError, TypeError) as error:
            raise ValueError(one_line(str(error))) from error
