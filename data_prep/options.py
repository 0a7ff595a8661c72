"""Options of the data commands: what is wrong with them is one line that names option, value and rule."""

import difflib
import re

from jsonargparse import ArgumentError, ArgumentParser, Namespace

_KINDS = {"<class 'int'>": "an integer", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}


def parse(parser: ArgumentParser, commands: dict[str, ArgumentParser], argv: list[str]) -> tuple[str, Namespace]:
    """The command's name and its options.

    Args:
        parser: has the commands as subcommands and does not exit on errors.
        commands: the subcommands' parsers.
        argv: arguments of `megagrin data`.

    Raises:
        ValueError: no such command or option, an option given twice or without a value, or a value of another type.
    """
    names = ", ".join(commands)
    if not argv:
        raise ValueError(f"data: no command given; one of {names}")
    if argv[0] not in commands and argv[0] not in ("-h", "--help"):
        raise ValueError(f"data: {argv[0]} is no command; one of {names}")
    if argv[0] in commands:
        _check_names(argv[0], commands[argv[0]], argv[1:])
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(_explain(str(error), argv)) from error
    return parsed.subcommand, parsed[parsed.subcommand]


def _check_names(command: str, parser: ArgumentParser, argv: list[str]) -> None:
    known = [option for action in parser._actions for option in action.option_strings]
    given: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            return
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.partition("=")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"megagrin data {command} --help lists all"
            raise ValueError(f"{option}: no such option of data {command}; {hint}")
        if option in ("-h", "--help"):
            return
        value = value if equals else next(arguments, "--")
        name = option.removeprefix("--")
        if not equals and value.startswith("--"):
            raise ValueError(f"{name}: a value must follow {option}")
        if name in given:
            raise ValueError(f"{name}: given twice, as {given[name]} and as {value}")
        given[name] = value


def _explain(message: str, argv: list[str]) -> str:
    message = " ".join(message.split())
    command = argv[0]
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"{missing[1].replace(f'{command}.', '')}: must be given to data {command}"
    wrong = re.search(r'key "(?:[\w-]+\.)?(\w+)".*Expected a (.*)\. Got value: ?(.*)', message)
    if wrong is None:
        return message
    name, kind = wrong[1], wrong[2]
    literal = re.search(r"Literal\[(.*)\]", kind)
    rule = f"one of {literal[1].replace(chr(39), '')}" if literal else _KINDS.get(kind, kind)
    # The value as it was typed: the parser shows what it made of it.
    options = [place for place, argument in enumerate(argv) if argument.partition("=")[0] == f"--{name}"]
    value = argv[options[-1]].partition("=")[2] if "=" in argv[options[-1]] else argv[options[-1] + 1]
    return f"{name}: {value!r} is not {rule}"
