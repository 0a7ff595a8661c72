"""Wrong and dangerous input of every data command: one line that names setting and value, and nothing is lost.

`{d}` in an argument is the folder of the case, which holds everything that FILES and `_folder` put there.
"""

import bz2
import gzip
import lzma
import os
import shutil
from pathlib import Path

import pytest

from megagrin.cli import run_command

GOOD = b'{"text": "def f(x):\\n    return x + 1\\n"}\n' * 40
FILES: dict[str, bytes] = {
    "good.jsonl": GOOD,
    "corpus.json": GOOD,
    "web_train.json": GOOD,
    "v_valid.json": GOOD,
    "run.json": b'{"learning_rate": 1e-3}\n',
    "list.json": b"[1, 2]\n",
    "sub/note.txt": b"precious\n",
    "other.idx": b"an index of something else\n",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "notext.jsonl": b'{"text": ""}\n',
    "cut.jsonl": GOOD + b'{"text": "x',
    "scalar.jsonl": b"3\n",
    "array.jsonl": b'["text"]\n',
    "otherkey.jsonl": b'{"content": "x"}\n',
    "number.jsonl": b'{"text": 5}\n',
    "null.jsonl": b'{"text": null}\n',
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "latin.jsonl": b'{"text": "\xe9"}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "utf16.jsonl": '{"text": "x"}\n'.encode("utf-16"),
    "latin.txt": b"caf\xe9\n",
    "binary.txt": bytes(range(256)),
    "cut.jsonl.gz": gzip.compress(GOOD, mtime=0)[:-9],
    "CUT.JSONL.GZ": gzip.compress(GOOD, mtime=0)[:-9],
    "none.jsonl.gz": b"",
    "plain.jsonl.gz": GOOD,
    "cut.jsonl.bz2": bz2.compress(GOOD)[:-9],
    "plain.jsonl.bz2": GOOD,
    "cut.jsonl.xz": lzma.compress(GOOD)[:-9],
    "hidden_gzip.jsonl": gzip.compress(b"bad\n", mtime=0),
    "hidden_bzip2.jsonl": bz2.compress(b"bad\n"),
    "hidden_xz.txt": lzma.compress(b"\xff"),
    "a.jsonl.zst": b"\x28\xb5\x2f\xfd\x04\x00",
    "hidden_zstd.jsonl": b"\x28\xb5\x2f\xfd\x04\x00",
    "named.zst": b"text\n",
    "a.parquet": b"PAR1....PAR1",
    "hidden_parquet.txt": b"PAR1....PAR1",
    "a.arrow": b"ARROW1\0\0",
    "hidden_arrow.txt": b"ARROW1\0\0",
    "a.zip": b"PK\x03\x04",
    "hidden_zip.jsonl": b"PK\x03\x04",
    "a.lz4": b"\x04\x22\x4d\x18",
    "a.7z": b"7z\xbc\xaf\x27\x1c",
    "a.avro": b"Obj\x01",
    "a.tar": b"a" + b"\0" * 256 + b"ustar\0",
    "hidden_tar.txt": b"a" + b"\0" * 256 + b"ustar\0",
    "a.tar.gz": gzip.compress(b"a" + b"\0" * 256 + b"ustar\0" + b"\0" * 255, mtime=0),
    "new\nline.jsonl": b"bad\n",
    "esc\x1b[31m.jsonl": b"bad\n",
    "empty.model": b"",
    "text.model": b"no model\n",
    "bare.bin": b"\1\0\2\0",
    "short.bin": b"",
    "short.idx": b"MMID",
    "odd.bin": b"",
    "odd.idx": b"X" * 34,
}
TRAIN = ["train-tokenizer", "{d}/good.jsonl", "--output", "{d}/new.model", "--vocab_size=270", "--num_threads=1"]
TOKENIZE = ["tokenize", "{d}/good.jsonl", "--output", "{d}/new", "--tokenizer", "{d}/t.model", "--workers=1"]
MERGE = ["merge", "{d}/code", "{d}/code", "--output", "{d}/new"]
OVER = "--overwrite=true"


def change(base: list[str], **options: str | None) -> list[str]:
    """The arguments with other options; None leaves one out. Positional arguments are those of `inputs`."""
    given = options.pop("inputs", None)
    kept, pairs = [base[0], *(base[1:2] if given is None else [given])], {}
    arguments = iter(base[1:])
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            pairs[name] = value if equals else next(arguments)
        elif given is None and argument not in kept[1:]:
            kept.append(argument)
    pairs.update(options)  # type: ignore[arg-type]
    return kept + [f"--{name}={value}" for name, value in pairs.items() if value is not None]


Case = tuple[list[str], str]
BOTH = (("train", TRAIN), ("tokenize", TOKENIZE))
CASES: dict[str, Case] = {}


def add(name: str, argv: list[str], *expected: str) -> None:
    assert name not in CASES
    CASES[name] = (argv, "\0".join(expected))


# Commands and names of options.
add("no command", [], "data: no command given; one of train-tokenizer, tokenize")
add("unknown command", ["tokenise", "x"], "tokenise is no command")
add("empty command", [""], " is no command")
add("option as command", ["--output", "x"], "--output is no command")
for name, base in (*BOTH, ("merge", MERGE)):
    add(f"{name}: misspelt", [*base, "--ouput=x"], "--ouput: no such option", "did you mean --output?")
    add(f"{name}: unknown", [*base, "--zzz"], "--zzz: no such option", "--help")
    add(f"{name}: one dash", [*base, "-o", "x"], "-o: no such option")
    add(f"{name}: abbreviated", [*base, "--out=x"], "--out: no such option")
    add(f"{name}: no value", [*base, "--overwrite"], "overwrite: a value must follow --overwrite")
    add(f"{name}: an option as value", [*base, "--overwrite", "--help"], "overwrite: a value must follow --overwrite")
    add(f"{name}: twice", [*base, "--output", "{d}/y"], "output: given twice", "{d}/y")
    add(f"{name}: no output", change(base, output=None), "output: must be given")
    add(f"{name}: overwrite", [*base, "--overwrite=maybe"], "overwrite: 'maybe' is not true or false")
    add(f"{name}: overwrite number", [*base, "--overwrite=1"], "overwrite: '1' is not true or false")
    add(f"{name}: overwrite empty", [*base, "--overwrite="], "overwrite: '' is not true or false")
add("verify: nothing", ["verify"], "prefixes: must be given")
add("inspect: nothing", ["inspect"], "prefixes: must be given")
add("merge: nothing", ["merge", "--output={d}/new"], "prefixes: must be given")
add("tokenize: nothing", ["tokenize"], "inputs, --output, --tokenizer: must be given".replace("--", ""))
add("tokenize: no tokenizer", change(TOKENIZE, tokenizer=None), "tokenizer: must be given")
add("verify: tokenizer without value", ["verify", "{d}/code", "--tokenizer"], "tokenizer: a value must follow")
add("verify: tokenizer twice", ["verify", "{d}/code", "--tokenizer=a", "--tokenizer=b"], "tokenizer: given twice, as a and as b")

# Values.
for option, kind, values in (
    ("vocab_size", "an integer", ("many", "1.5", "", "null", "nan", "1e3", "true", "[1]")),
    ("num_threads", "an integer", ("two", "0.5", "")),
    ("input_sentence_size", "an integer", ("all", "1e400")),
    ("character_coverage", "a number", ("most", "nan", "inf", "")),
    ("format", "one of auto, jsonl, text", ("csv", "", "JSONL", "null")),
):
    for value in values:
        add(f"train: {option}={value}", [*change(TRAIN, **{option: value})], f"{option}: '{value}' is not {kind}")
for option, kind, values in (
    ("workers", "an integer", ("two", "1.5", "", "null", "nan", "true")),
    ("timeout", "a number", ("soon", "nan", "inf", "")),
    ("valid_fraction", "a number", ("1/2", "nan", "true", "5%")),
    ("append_bos", "true or false", ("2", "", "ja")),
    ("append_eos", "true or false", ("maybe", "null")),
    ("on_error", "one of raise, skip", ("ignore", "")),
    ("format", "one of auto, jsonl, text", ("parquet",)),
):
    for value in values:
        add(f"tokenize: {option}={value}", change(TOKENIZE, **{option: value}), f"{option}: '{value}' is not {kind}")
for option, rule, values in (
    ("vocab_size", "must lie in [261, 16777216]", ("1", "200", "0", "-1", "2147483647", "99999999999999999999")),
    ("num_threads", "must lie in [0, 1024]", ("-1", "100000")),
    ("input_sentence_size", "must lie in [0, 9223372036854775807]", ("-1", "99999999999999999999")),
    ("character_coverage", "must lie in [0.98, 1]", ("0.0", "1.5", "-1.0", "0.5")),
    ("vocab_size", "is too large for this corpus", ("5000",)),
    ("vocab_size", "is too small", ("261",)),
):
    for value in values:
        add(f"train: {option}={value}", change(TRAIN, **{option: value}), f"{option}: {value} {rule}")
for option, rule, values in (
    ("workers", "must lie in [0, 1024]", ("-1", "100000", "99999999999999999999")),
    ("timeout", "must lie in (0, ", ("0.0", "-1.0", "1e+300")),
    ("valid_fraction", "must lie in [0, 1)", ("1.0", "-0.1", "1e+300")),
    ("valid_fraction", "of 40 documents leaves no token for", ("1e-09",)),
):
    for value in values:
        add(f"tokenize: {option}={value}", change(TOKENIZE, **{option: value}), f"{option}: {value} {rule}")

# Inputs.
BAD_FILES = {
    "empty.jsonl": "inputs: no text",
    "blank.jsonl": "inputs: no text",
    "notext.jsonl": "inputs: no text",
    "cut.jsonl": "{d}/cut.jsonl:41: malformed JSON",
    "scalar.jsonl": "{d}/scalar.jsonl:1: a line must hold a JSON object, not int",
    "array.jsonl": "{d}/array.jsonl:1: a line must hold a JSON object, not list",
    "otherkey.jsonl": "{d}/otherkey.jsonl:1: no key 'text'; the object has ['content']",
    "number.jsonl": "{d}/number.jsonl:1: key 'text' must hold a string, not int",
    "null.jsonl": "{d}/null.jsonl:1: key 'text' must hold a string, not NoneType",
    "deep.jsonl": "{d}/deep.jsonl:1: malformed JSON: nested too deeply",
    "latin.jsonl": "{d}/latin.jsonl:1: invalid UTF-8",
    "surrogate.jsonl": "{d}/surrogate.jsonl:1: key 'text': lone surrogate",
    "utf16.jsonl": "{d}/utf16.jsonl:1: invalid UTF-8",
    "latin.txt": "{d}/latin.txt: invalid UTF-8",
    "binary.txt": "{d}/binary.txt: invalid UTF-8",
    "cut.jsonl.gz": "cut.jsonl.gz: truncated or damaged gzip file",
    "CUT.JSONL.GZ": "CUT.JSONL.GZ: truncated or damaged gzip file",
    "none.jsonl.gz": "inputs: {d}/none.jsonl.gz: truncated or damaged gzip file: it is empty",
    "plain.jsonl.gz": "plain.jsonl.gz: truncated or damaged gzip file",
    "cut.jsonl.bz2": "cut.jsonl.bz2: truncated or damaged bzip2 file",
    "plain.jsonl.bz2": "plain.jsonl.bz2: truncated or damaged bzip2 file",
    "cut.jsonl.xz": "cut.jsonl.xz: truncated or damaged xz file",
    "hidden_gzip.jsonl": "hidden_gzip.jsonl:1: malformed JSON",
    "hidden_bzip2.jsonl": "hidden_bzip2.jsonl:1: malformed JSON",
    "hidden_xz.txt": "hidden_xz.txt: invalid UTF-8",
    "a.jsonl.zst": "inputs: {d}/a.jsonl.zst: is zstd; decompress it first",
    "hidden_zstd.jsonl": "inputs: {d}/hidden_zstd.jsonl: is zstd",
    "named.zst": "inputs: {d}/named.zst: is zstd",
    "a.parquet": "inputs: {d}/a.parquet: is parquet",
    "hidden_parquet.txt": "inputs: {d}/hidden_parquet.txt: is parquet",
    "a.arrow": "inputs: {d}/a.arrow: is an Arrow file",
    "hidden_arrow.txt": "inputs: {d}/hidden_arrow.txt: is an Arrow file",
    "a.zip": "inputs: {d}/a.zip: is a zip archive",
    "hidden_zip.jsonl": "inputs: {d}/hidden_zip.jsonl: is a zip archive",
    "a.lz4": "inputs: {d}/a.lz4: is lz4",
    "a.7z": "inputs: {d}/a.7z: is a 7z archive",
    "a.avro": "inputs: {d}/a.avro: is an Avro file",
    "a.tar": "inputs: {d}/a.tar: is a tar archive",
    "hidden_tar.txt": "inputs: {d}/hidden_tar.txt: is a tar archive",
    "a.tar.gz": "inputs: {d}/a.tar.gz: is a tar archive",
    "new\nline.jsonl": "{d}/new\\nline.jsonl:1: malformed JSON",
    "esc\x1b[31m.jsonl": "{d}/esc\\x1b[31m.jsonl:1: malformed JSON",
    "none.jsonl": "inputs: {d}/none.jsonl: no such file or folder",
    "*.nothing": "inputs: {d}/*.nothing: no file matches",
    "hollow": "inputs: {d}/hollow: no file matches",
    "loop": "inputs: {d}/loop: no such file or folder",
    "x" * 300: "File name too long",
    "fifo": "inputs: {d}/fifo: no such file or folder",
}
for file, message in BAD_FILES.items():
    for command, base in BOTH:
        add(f"{command}: input {file[:20]!r}", change(base, inputs=f"{{d}}/{file}"), message)
for command, base in BOTH:
    add(f"{command}: empty input", change(base, inputs=""), "inputs: '' names no file")
    add(f"{command}: input twice", [base[0], "{d}/good.jsonl", *base[1:]], "inputs: {d}/good.jsonl is named twice")
    add(f"{command}: input and link", [base[0], "{d}/link.jsonl", *base[1:]], "inputs: {d}/good.jsonl is named twice")
    add(f"{command}: no such key", [*base, "--text_key=body"], "{d}/good.jsonl:1: no key 'body'; the object has ['text']")
    add(f"{command}: empty key", [*base, "--text_key="], "{d}/good.jsonl:1: no key ''")
    add(f"{command}: text as jsonl", [*change(base, inputs="{d}/sub/note.txt"), "--format=jsonl"], "note.txt:1: malformed JSON")

# Tokenizers.
for file, message in {
    "none.model": "no such tokenizer file",
    "": "no such tokenizer file",
    "sub": "no such tokenizer file",
    "empty.model": "not a SentencePiece model",
    "text.model": "not a SentencePiece model",
    "good.jsonl": "not a SentencePiece model",
}.items():
    path = f"{{d}}/{file}"
    add(f"tokenize: tokenizer {file}", change(TOKENIZE, tokenizer=path), "tokenizer: ", message)
    known = message if message.startswith("no such") else "made with another tokenizer"
    for command in ("verify", "inspect"):
        add(f"{command}: tokenizer {file}", [command, "{d}/code", "--tokenizer", path], "tokenizer: ", known)

# Token files.
for command in ("verify", "inspect", "merge"):
    tail = ["--output={d}/new"] if command == "merge" else []
    for prefix, message in {
        "{d}/nope": "prefixes: {d}/nope.idx: no such file",
        "": "prefixes: .idx: no such file",
        "{d}": "prefixes: {d}.idx: no such file",
        "{d}/": "prefixes: {d}/.idx: no such file",
        "{d}/code.bin": "prefixes: {d}/code.bin.idx: no such file",
        "{d}/bare": "prefixes: {d}/bare.idx: no such file",
        "{d}/short": "prefixes: {d}/short.idx: 4 bytes, but a header alone has 34",
        "{d}/odd": "prefixes: {d}/odd.idx: starts with",
        "{d}/trunc": "prefixes: {d}/trunc.bin: ",
        "{d}/foreign": "prefixes: {d}/foreign.json: expected exactly the fields",
        "{d}/" + "x" * 300: "File name too long",
    }.items():
        add(f"{command}: prefix {prefix[:16]}", [command, prefix, *tail], message)
add("merge: no sidecar", ["merge", "{d}/code", "{d}/plain", "--output={d}/new"], "prefixes: {d}/plain.json: no such file")

# Outputs: what they must not replace, even when told to overwrite.
for command, base in (*BOTH, ("merge", MERGE)):
    for output, message in {
        "": "output: '' must end in the name of a file",
        "{d}/": "output: '{d}/' must end in the name of a file",
        "{d}/new/": "output: '{d}/new/' must end in the name of a file",
        ".": "output: '.' must end in the name of a file",
        "{d}/..": "output: '{d}/..' must end in the name of a file",
        "{d}/sub": "output: {d}/sub is a folder; name a file in it",
        "{d}/missing/../good.jsonl": "{d}/missing does not exist, so `..` leads nowhere from there",
        "{d}/good.jsonl/new": "{d}/good.jsonl is not a folder",
        "{d}/loop/new": "{d}/loop is not a folder",
        "/dev/null/new": "/dev/null is not a folder",
        "{d}/" + "x" * 300: "File name too long",
    }.items():
        add(f"{command}: output {output[:22]}", [*change(base, output=output), OVER], "output: ", message)
for output in ("good.jsonl", "link.jsonl", "hard.jsonl", "sub/../good.jsonl", "back.jsonl/good.jsonl", "busy.model"):
    message = "output: {d}/" + ("busy.model.tmp" if output == "busy.model" else output)
    add(f"train: replaces {output}", [*change(TRAIN, output=f"{{d}}/{output}"), OVER], message, " is the input {d}/good.jsonl")
add("train: exists", change(TRAIN, output="{d}/t.model"), "output: {d}/t.model exists; pass --overwrite=true")
add("train: dangling", change(TRAIN, output="{d}/loop"), "output: {d}/loop exists; pass --overwrite=true")
add("train: fifo", [*change(TRAIN, output="{d}/fifo"), OVER], "output: {d}/fifo is no regular file")
add("train: device", [*change(TRAIN, output="/dev/null"), OVER], "output: /dev/null is no regular file")
add("train: temporary folder", change(TRAIN, output="{d}/dirtmp"), "output: {d}/dirtmp.tmp is a folder")
for fraction in ("0.0", "0.5"):
    split = change(TOKENIZE, valid_fraction=fraction, overwrite="true")
    add(f"tokenize: nothing {fraction}", change(split, output=""), "output: '' must end in the name of a file")
    add(f"tokenize: a folder {fraction}", change(split, output="{d}/new/"), "output: '{d}/new/' must end in the name of a file")
SPLIT = change(TOKENIZE, output="{d}/web", valid_fraction="0.5", overwrite="true")
IS_INPUT = "is the input {d}/"
add("tokenize: own corpus", [*change(TOKENIZE, inputs="{d}/corpus.json", output="{d}/corpus"), OVER], "corpus.json " + IS_INPUT)
add("tokenize: own corpus, plain", change(TOKENIZE, inputs="{d}/corpus.json", output="{d}/corpus"), "corpus.json " + IS_INPUT)
add("tokenize: own train", change(SPLIT, inputs="{d}/web_train.json"), "output: {d}/web_train.json " + IS_INPUT)
add("tokenize: own valid", change(SPLIT, inputs="{d}/v_valid.json", output="{d}/v"), "output: {d}/v_valid.json " + IS_INPUT)
add("tokenize: foreign train", SPLIT, "output: {d}/web_train.json exists and is not the sidecar")
add("tokenize: own link", [*change(TOKENIZE, output="{d}/linked"), OVER], "output: {d}/linked.json " + IS_INPUT + "good.jsonl")
add("tokenize: own tokenizer", [*change(TOKENIZE, output="{d}/model"), OVER], "output: {d}/model.bin " + IS_INPUT + "t.model")
add(
    "tokenize: own temporary", [*change(TOKENIZE, output="{d}/busy"), OVER], "output: {d}/busy.bin.tmp " + IS_INPUT + "good.jsonl"
)
for command, base in (("tokenize", TOKENIZE), ("merge", MERGE)):
    for flag in ("true", "false"):
        told = change(base, overwrite=flag)
        foreign = " exists and is not the sidecar of token files"
        add(f"{command}: foreign run.json {flag}", change(told, output="{d}/run"), "output: {d}/run.json" + foreign)
        add(f"{command}: list.json {flag}", change(told, output="{d}/list"), "output: {d}/list.json" + foreign)
        add(
            f"{command}: other.idx {flag}", change(told, output="{d}/other"), "output: {d}/other.idx exists and is no token index"
        )
    add(f"{command}: exists", change(base, output="{d}/old"), "output: {d}/old.bin exists; pass --overwrite=true")
    add(f"{command}: only bin", change(base, output="{d}/bare"), "output: {d}/bare.bin exists; pass --overwrite=true")
    add(f"{command}: only sidecar", change(base, output="{d}/lone"), "output: {d}/lone.json exists; pass --overwrite=true")
    add(f"{command}: bin is a folder", [*change(base, output="{d}/dirbin"), OVER], "output: {d}/dirbin.bin is a folder")
for output in ("code", "./code", "sub/../code", "same", "copy"):
    where = "{d}/" + (output if output != "./code" else "code")
    name = f"{where}.idx" if output == "copy" else f"{where}.bin"
    add(f"merge: replaces {output}", [*change(MERGE, output=f"{{d}}/{output}"), OVER], f"output: {name} is the input {{d}}/code.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, token_file: str, tokenizer_path: Path) -> Path:
    """What the cases name: FILES, token files, and links of every kind."""
    d = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (d / name).parent.mkdir(exist_ok=True)
        (d / name).write_bytes(content)
    for name in ("code", "old", "plain", "trunc", "foreign"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(f"{token_file}.{suffix}", d / f"{name}.{suffix}")
    (d / "plain.json").unlink()
    (d / "trunc.bin").write_bytes((d / "trunc.bin").read_bytes()[:-2])
    (d / "foreign.json").write_bytes(b"{}")
    shutil.copy(token_file + ".json", d / "lone.json")
    shutil.copy(tokenizer_path, d / "t.model")
    for name in ("hollow", "dirbin.bin", "dirtmp.tmp"):
        (d / name).mkdir()
    for name in ("link.jsonl", "linked.json"):
        (d / name).symlink_to("good.jsonl")
    for name in ("hard.jsonl", "busy.model.tmp", "busy.bin.tmp"):
        os.link(d / "good.jsonl", d / name)
    (d / "back.jsonl").symlink_to(".")
    (d / "loop").symlink_to("nowhere")
    (d / "same.bin").symlink_to("code.bin")
    os.link(d / "code.idx", d / "copy.idx")
    (d / "model.bin").symlink_to("t.model")
    os.mkfifo(d / "fifo")
    return d


def contents(folder: Path) -> dict[str, object]:
    """Every name below a folder with what it is and holds."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        kind: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else path.lstat().st_mode
        found[str(path.relative_to(folder))] = (kind, path.lstat().st_ino)
    return found


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 250


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_lost(
    case: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    argv, expected = CASES[case]
    before = contents(folder)
    status = run_command("data", [argument.replace("{d}", str(folder)) for argument in argv])
    captured = capfd.readouterr()
    assert status == 2, captured
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("megagrin: error: ")
    for part in expected.replace("{d}", str(folder)).split("\0"):
        assert part in captured.err
    assert contents(folder) == before
