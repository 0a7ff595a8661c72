"""Text to token files with several processes: bounded memory, the same bytes for any number of workers, no silent end.

The parent cuts the input into blocks that depend on the input alone, workers turn blocks into tokens, and the parent
writes the results in order. At most two blocks per worker are in flight.

Array suffixes: T tokens of a block, N documents of a block.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megagrin.data_prep.corpus import (
    BLOCK_BYTES,
    Block,
    Format,
    expand_inputs,
    parse_document,
    raw_documents,
    read_blocks,
)
from megagrin.data_prep.files import check_name, named
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.layout import check_output_prefix, token_dtype
from megagrin.data_prep.sidecar import Provenance
from megagrin.data_prep.tokenizer import Tokenizer

_REPORTED_SKIPS = 10
_SHUTDOWN_SECONDS = 5.0
# More are a slip of the finger: each takes a Python process and its memory.
_MAX_WORKERS = 1024


@dataclass(frozen=True)
class TokenizeConfig:
    """Turning documents into token files.

    Args:
        output: prefix of the files to write: <output>.bin, .idx and .json.
        tokenizer: SentencePiece model file.
        text_key: key of the text in each JSON object.
        format: jsonl, text (one file is one document) or auto (by suffix: .jsonl, .ndjson and .json are jsonl).
        append_eos: end each document with the tokenizer's eos id.
        append_bos: start each document with the tokenizer's bos id.
        workers: processes, 0 for one per core, 1 for none beside this one. The output does not depend on it.
        on_error: stop at a document that cannot be read (raise), or count and report it (skip).
        valid_fraction: share of the documents, chosen by a hash of their position, that go to <output>_valid; the
            others then go to <output>_train.
        overwrite: replace existing token files.
        timeout: seconds to wait for one block of about 4 MB before the run is given up.
    """

    output: str
    tokenizer: str
    text_key: str = "text"
    format: Format = "auto"
    append_eos: bool = True
    append_bos: bool = False
    workers: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    valid_fraction: float = 0.0
    overwrite: bool = False
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= _MAX_WORKERS:
            raise ValueError(f"workers: {self.workers} must lie in [0, {_MAX_WORKERS}]")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"valid_fraction: {self.valid_fraction} must lie in [0, 1)")
        if not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout: {self.timeout} must lie in (0, {threading.TIMEOUT_MAX:g}]")


@dataclass
class TokenizeReport:
    """What a run did.

    Args:
        outputs: documents and tokens of each prefix written.
        empty: documents without text, written as empty documents.
        skipped: documents left out by on_error=skip.
        skip_messages: the first few reasons, with file and line.
        seconds: wall time.
    """

    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    empty: int = 0
    skipped: int = 0
    skip_messages: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Encoded:
    tokens_T: npt.NDArray[np.integer]
    lengths_N: npt.NDArray[np.int64]
    skipped: int
    skip_messages: list[str]
    consumed: int


def tokenize(inputs: Sequence[str], config: TokenizeConfig, *, block_bytes: int = BLOCK_BYTES) -> TokenizeReport:
    """Writes the token files of all documents of the inputs, in input order.

    Args:
        inputs: files, folders and globs.
        config: see there.
        block_bytes: input bytes one worker takes at a time.

    Raises:
        ValueError: bad inputs or documents (file and line named), no document at all, existing output, a worker that
            could not be started, died or did not answer in time. Nothing is left under the final names.
        OSError: a file cannot be read or written.
    """
    start = time.monotonic()
    files = expand_inputs(inputs)
    with named("tokenizer"):
        tokenizer = Tokenizer.load(config.tokenizer)
    _check_special_ids(config, tokenizer)
    prefixes = _output_prefixes(config)
    with named("output"):
        for prefix in prefixes:
            check_output_prefix(prefix, [*files, config.tokenizer], overwrite=config.overwrite)
    provenance = Provenance(tokenizer.vocab_size, tokenizer.sha256, config.append_bos, config.append_eos)
    config = replace(config, workers=config.workers or os.cpu_count() or 1)
    report = TokenizeReport()
    with ExitStack() as stack:
        progress = stack.enter_context(_progress_bar())
        bar = progress.add_task("tokenize", total=sum(path.stat().st_size for path in files))
        with named("output"):
            writers = [stack.enter_context(IndexedDatasetWriter(prefix, provenance)) for prefix in prefixes]
        blocks = read_blocks(files, config.format, block_bytes)
        # Closed here, so that the workers are gone before an error leaves this function.
        for encoded in stack.enter_context(closing(_encode_in_order(blocks, config))):
            _write(encoded, writers, config.valid_fraction)
            report.empty += int((encoded.lengths_N == 0).sum())
            report.skipped += encoded.skipped
            report.skip_messages += encoded.skip_messages[: _REPORTED_SKIPS - len(report.skip_messages)]
            progress.advance(bar, encoded.consumed)
        for writer in writers:
            if not writer.tokens:
                raise ValueError(_nothing_to_write(writer, sum(other.documents for other in writers), report, config))
        for writer in writers:  # all are on disk before the first is renamed
            writer.finish()
    report.outputs = {str(writer.prefix): (writer.documents, writer.tokens) for writer in writers}
    report.seconds = time.monotonic() - start
    return report


def _check_special_ids(config: TokenizeConfig, tokenizer: Tokenizer) -> None:
    for name, wanted, token in (
        ("append_bos", config.append_bos, tokenizer.bos_id),
        ("append_eos", config.append_eos, tokenizer.eos_id),
    ):
        if wanted and token < 0:
            raise ValueError(f"{name}: {config.tokenizer} has no such id; pass --{name}=false")


def _output_prefixes(config: TokenizeConfig) -> list[str]:
    with named("output"):  # `_train` would make a file's name of nothing and of a folder
        check_name(config.output)
    return [f"{config.output}_train", f"{config.output}_valid"] if config.valid_fraction > 0 else [config.output]


def _nothing_to_write(writer: IndexedDatasetWriter, documents: int, report: TokenizeReport, config: TokenizeConfig) -> str:
    if documents > writer.documents:
        return f"valid_fraction: {config.valid_fraction} of {documents} documents leaves no token for {writer.prefix}"
    first = f"; the first skipped: {report.skip_messages[0]}" if report.skip_messages else ""
    return f"inputs: no text in {documents} documents ({report.skipped} skipped){first}"


def _write(encoded: _Encoded, writers: list[IndexedDatasetWriter], valid_fraction: float) -> None:
    if len(writers) == 1:
        writers[0].add(encoded.tokens_T, encoded.lengths_N)
        return
    first = sum(writer.documents for writer in writers)
    is_valid_N = in_valid_split(np.arange(first, first + encoded.lengths_N.size, dtype=np.uint64), valid_fraction)
    is_valid_T = np.repeat(is_valid_N, encoded.lengths_N)
    train, valid = writers
    train.add(encoded.tokens_T[~is_valid_T], encoded.lengths_N[~is_valid_N])
    valid.add(encoded.tokens_T[is_valid_T], encoded.lengths_N[is_valid_N])


def in_valid_split(position_N: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Whether the documents at these positions of the corpus are for validation: a hash below `fraction`·2^64.

    The hash is the output function of SplitMix64 (Steele et al., OOPSLA 2014), so appending documents moves none.
    """
    z_N = (position_N + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z_N ^ (z_N >> np.uint64(31))) < np.uint64(int(fraction * 2.0**64))


def _encode_in_order(blocks: Iterator[Block], config: TokenizeConfig) -> Generator[_Encoded]:
    encode = partial(_encode_block, config=config)
    if config.workers == 1:
        yield from map(encode, blocks)
        return
    others = set(multiprocessing.active_children())
    # spawn: a forked child could inherit a lock that another thread of this process holds.
    with named("workers"):
        executor = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[tuple[Block, Future[_Encoded]]] = deque()
    block = Block(())
    try:
        for block in blocks:
            pending.append((block, _submit(executor, encode, block)))
            if len(pending) >= 2 * config.workers:
                block, future = pending.popleft()
                yield future.result(config.timeout)
        while pending:
            block, future = pending.popleft()
            yield future.result(config.timeout)
    except BrokenProcessPool as error:
        raise ValueError(f"{_describe(block)}: a worker process died (killed, or out of memory?)") from error
    except TimeoutError as error:
        raise ValueError(f"{_describe(block)}: no answer from the worker within timeout={config.timeout:g} s") from error
    finally:
        # Not shutdown(wait=True): that would wait for ever for a frozen worker, even one without work.
        executor.shutdown(wait=False, cancel_futures=True)
        _end_workers([process for process in multiprocessing.active_children() if process not in others])


def _submit(executor: ProcessPoolExecutor, encode: Callable[[Block], _Encoded], block: Block) -> Future[_Encoded]:
    try:
        with named("workers"):
            return executor.submit(encode, block)
    except Exception:
        # A worker's death closes the pool's pipes in another thread, also under a submit that is starting the next worker.
        # What that raises depends on the moment (seen: OSError "handle is closed", ValueError "bad value(s) in fds_to_keep"),
        # but the pool has called itself broken before it closes anything: then the next submit says so.
        with suppress(OSError):
            executor.submit(int)
        raise


def _end_workers(workers: list[BaseProcess]) -> None:
    deadline = time.monotonic() + _SHUTDOWN_SECONDS
    while alive := [worker for worker in workers if worker.is_alive()]:
        if time.monotonic() >= deadline:
            for worker in alive:
                worker.kill()
        wait([worker.sentinel for worker in alive], timeout=max(0.1, deadline - time.monotonic()))


def _describe(block: Block) -> str:
    if block.first_line:
        return f"{block.paths[0]}: near line {block.first_line}"
    return f"{', '.join(block.paths[:1])} and following"


def _start_worker() -> None:
    """In each worker: Ctrl-C is the parent's to handle, and no worker outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process always has a parent"

    def exit_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def _load_once(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def _encode_block(block: Block, *, config: TokenizeConfig) -> _Encoded:
    tokenizer = _load_once(config.tokenizer)
    text_key = config.text_key if block.first_line else None
    head = [tokenizer.bos_id] if config.append_bos else []
    tail = [tokenizer.eos_id] if config.append_eos else []
    dtype = token_dtype(tokenizer.vocab_size)
    parts: list[npt.NDArray[np.integer]] = [np.empty(0, dtype)]
    lengths: list[int] = []
    messages: list[str] = []
    skipped = 0
    for where, raw in raw_documents(block):
        try:
            ids = tokenizer.encode(parse_document(raw, text_key))
        except ValueError as error:
            message = f"{where}: {error}"
            if config.on_error == "raise":
                raise ValueError(message) from error
            skipped += 1
            messages += [message] if skipped <= _REPORTED_SKIPS else []
            continue
        # An empty document stays empty, as in Megatron's own preprocessing: it gets no bos and no eos.
        parts.append(np.array(head + ids + tail if ids else ids, dtype=dtype))
        lengths.append(parts[-1].size)
    return _Encoded(np.concatenate(parts), np.array(lengths, np.int64), skipped, messages, block.consumed)


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
