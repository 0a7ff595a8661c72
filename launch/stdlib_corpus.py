"""Collect the Python standard library's sources as jsonl: real text that every machine has."""

import argparse
import json
import sysconfig
from pathlib import Path

# Test suites and vendored data are large, repetitive, or hold deliberately broken files.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip"}


def main() -> None:
    """Write one `{"text": …, "path": …}` line per module, sorted by path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    root = Path(sysconfig.get_paths()["stdlib"])
    files, size = 0, 0
    partial = out.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as sink:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED & set(relative.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                sink.write(json.dumps({"text": text, "path": str(relative)}) + "\n")
                files, size = files + 1, size + len(text)
    if not files:
        raise SystemExit(f"megagrin: error: {root} holds no Python sources; is this Python installed without its library?")
    partial.replace(out)
    print(f"{files} files, {size / 1e6:.1f} MB of text from {root}")


if __name__ == "__main__":
    main()
