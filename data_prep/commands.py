"""`megagrin data train-tokenizer | tokenize | verify | inspect | merge`."""

import sys
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megagrin.data_prep.files import named, printable
from megagrin.data_prep.indexed import IndexedDataset, merge
from megagrin.data_prep.layout import check_output_prefix, pair_paths
from megagrin.data_prep.options import parse
from megagrin.data_prep.sidecar import sidecar_path
from megagrin.data_prep.tokenize import TokenizeConfig, tokenize
from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from megagrin.data_prep.verify import check_tokenizer, summary, verify

_PREVIEW_TOKENS = 200


def main(argv: list[str]) -> int:
    """Runs one of the data commands.

    Args:
        argv: the arguments after `megagrin data`.

    Returns:
        0.

    Raises:
        ValueError: a wrong option, or what the command found wrong, in one line.
        OSError: a file cannot be read or written.
    """
    try:
        command, options = parse(*_parser(), argv)
        _RUN[command](options.as_dict())
    except ValueError as error:
        raise ValueError(printable(str(error))) from error
    return 0


def _parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="megagrin data", description="From text to token files.", allow_abbrev=False, exit_on_error=False, default_env=False
    )
    commands = parser.add_subcommands()
    parsers: dict[str, ArgumentParser] = {}

    def command(name: str, about: str, positional: str, about_positional: str) -> ArgumentParser:
        sub = ArgumentParser(description=about, allow_abbrev=False, exit_on_error=False, default_env=False)
        sub.add_argument(positional, nargs="+", type=str, help=about_positional)
        commands.add_subcommand(name, sub, help=about)
        parsers[name] = sub
        return sub

    inputs = "files, folders or globs; .jsonl, .ndjson, .json (one object per line) or plain text; .gz, .bz2 or .xz of these"
    prefixes = "prefixes of token files: paths without .bin and .idx"
    command("train-tokenizer", "Train a SentencePiece BPE tokenizer.", "inputs", inputs).add_class_arguments(TokenizerConfig)
    command("tokenize", "Turn documents into token files.", "inputs", inputs).add_class_arguments(TokenizeConfig)
    for name, about in (
        ("verify", "Check structure, sizes, checksums and ids of token files."),
        ("inspect", "Show counts, document lengths and the first document of token files."),
    ):
        command(name, about, "prefixes", prefixes).add_argument(
            "--tokenizer", type=str | None, default=None, help="the SentencePiece model the tokens were made with"
        )
    joined = command("merge", "Join token files of one tokenizer.", "prefixes", prefixes)
    joined.add_argument("--output", type=str, required=True, help="prefix of the files to write")
    joined.add_argument("--overwrite", type=bool, default=False, help="replace existing token files")
    return parser, parsers


def _train_tokenizer(options: dict[str, Any]) -> None:
    inputs = options.pop("inputs")
    tokenizer = train_tokenizer(inputs, TokenizerConfig(**options))
    print(f"{printable(tokenizer.path)}: {tokenizer.vocab_size} pieces, SHA-256 {tokenizer.sha256}")


def _tokenize(options: dict[str, Any]) -> None:
    inputs = options.pop("inputs")
    report = tokenize(inputs, TokenizeConfig(**options))
    for message in report.skip_messages:
        print(f"skipped {printable(message)}", file=sys.stderr)
    for prefix, (documents, tokens) in report.outputs.items():
        print(f"{printable(prefix)}: {documents:,} documents, {tokens:,} tokens")
    total = sum(tokens for _, tokens in report.outputs.values())
    rate = total / max(report.seconds, 1e-9)
    print(f"{report.skipped:,} skipped, {report.empty:,} empty, {report.seconds:.1f} s, {rate:,.0f} tokens/s")


def _verify(options: dict[str, Any]) -> None:
    for prefix in options["prefixes"]:
        report = verify(prefix, options["tokenizer"])
        ids = "any vocabulary" if report.vocab_size is None else f"vocabulary {report.vocab_size:,}"
        checksums = "checksums equal" if report.checksums else "no checksums recorded"
        print(
            f"{printable(prefix)}: {report.documents:,} documents, {report.tokens:,} tokens, "
            f"largest id {report.max_token_id} ({ids}), {checksums}: good"
        )


def _inspect(options: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    for prefix in options["prefixes"]:
        with named("prefixes"):
            dataset = IndexedDataset(prefix)
        with named("tokenizer"):
            tokenizer = _tokenizer_of(dataset, options["tokenizer"])
        table = Table("", escape(printable(prefix)))
        for row in summary(dataset):
            table.add_row(*row)
        console.print(table)
        first = next((document for document in dataset if document.size), None)
        if tokenizer is None or first is None:
            continue
        text = tokenizer.decode(first[:_PREVIEW_TOKENS].tolist())
        console.print(f"first document ({min(first.size, _PREVIEW_TOKENS):,} of {first.size:,} tokens):")
        console.print(text, markup=False, highlight=False)


def _tokenizer_of(dataset: IndexedDataset, path: str | None) -> Tokenizer | None:
    if path is None:
        return None
    check_tokenizer(dataset, path)
    return Tokenizer.load(path)


def _merge(options: dict[str, Any]) -> None:
    prefixes: list[str] = options["prefixes"]
    with named("output"):
        sources = [path for prefix in prefixes for path in (*pair_paths(prefix), sidecar_path(prefix))]
        check_output_prefix(options["output"], sources, overwrite=options["overwrite"])
    merge(prefixes, options["output"])
    dataset = IndexedDataset(options["output"])
    print(f"{printable(options['output'])}: {dataset.documents:,} documents, {dataset.tokens:,} tokens")


_RUN = {"train-tokenizer": _train_tokenizer, "tokenize": _tokenize, "verify": _verify, "inspect": _inspect, "merge": _merge}
