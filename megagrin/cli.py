"""`megagrin <command> …`: finds the command and turns errors of use into one line and a non-zero exit code."""

import atexit
import importlib
import os
import sys
import traceback
from typing import NoReturn

from megagrin.settings.arguments import describe

COMMANDS = {
    "train": ("megagrin.training.loop", "main", "train a model (under torchrun for more than one process)"),
    "data": ("megagrin.data_prep.commands", "main", "train a tokenizer, write, verify and inspect token files"),
    "generate": ("megagrin.inference.generate", "main", "continue a prompt with a trained model"),
    "export-hf": ("megagrin.hf.folder", "main_export", "write a checkpoint as a Hugging Face PhimoeForCausalLM folder"),
    "import-hf": ("megagrin.hf.folder", "main_import", "read a Hugging Face PhimoeForCausalLM folder into a checkpoint"),
    "convert-checkpoint": (
        "megagrin.training.convert",
        "main",
        "between native checkpoints and DeepSpeed's own (under torchrun)",
    ),
    "kernels": ("megagrin.planning.kernel_tuning", "main", "measure kernel block sizes on this GPU"),
    "plot": ("megagrin.observe.plot", "main", "draw loss curve and expert load of a run"),
}
EXIT_USAGE = 2


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<20}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: megagrin <command> [options]", "", *lines, "", "megagrin <command> --help shows a command's options."]
    )


def run_command(name: str, argv: list[str]) -> int:
    """Run a command; errors of use become one line on stderr and exit code 2, with the traceback under `--debug`."""
    debug = "--debug" in argv
    try:
        module, function, _ = COMMANDS[name]
        main = getattr(importlib.import_module(module), function)
        return main([argument for argument in argv if argument != "--debug"]) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        # Before the process group is joined every rank meets the same error; one of them says it. Later ones carry their rank.
        ranks = [note for note in getattr(error, "__notes__", []) if note.startswith("rank ")]
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        if ranks and several:
            print(f"megagrin: error: {ranks[0]}: {describe(error)}", file=sys.stderr)
        elif os.environ.get("RANK", "0") == "0":
            print(f"megagrin: error: {describe(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("megagrin: interrupted", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `megagrin` command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else EXIT_USAGE
    if argv[0] not in COMMANDS:
        print(f"megagrin: error: {argv[0]}: no such command\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(argv[0], argv[1:])


def entry() -> NoReturn:
    """What the `megagrin` script and `python -m megagrin.cli` run: `main`, and then for ranks an end without finalizing Python.

    gloo's threads may still hold the tensors of a finished collective while Python finalizes; dropping them takes the GIL, and
    the process that ended well aborts with `terminate called without an active exception` (pytorch issue 190489; seen in 2 of
    16 runs on two busy cores, torch 2.13). `destroy_process_group` does not end those threads.
    """
    try:
        status = main()
        sys.stdout.flush()
        runtime = sys.modules.get("megagrin.distributed.runtime")
        if runtime is None or not runtime.joined:
            sys.exit(status)
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except OSError as error:
        status = EXIT_USAGE
        print(f"megagrin: error: standard output: {describe(error)}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
