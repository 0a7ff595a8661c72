"""Which kernels work on this GPU: every op in a process of its own, with a time limit, before anything is measured.

    python benchmarks/gpu_probe.py --out FOLDER [--limit 45] [--smoke]

Writes FOLDER/ops.json after each op: what became of it, and the MEGAGRIN_KERNELS that switches off those whose process failed,
was ended by a signal or did not end. Status 1 where there is one. Results for the same environment (FOLDER/environment.json) are
kept. Imports nothing beyond the standard library: it outlives what it probes.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPS = ("grouped_gemm", "moe_mlp", "permute", "sparsemixer", "cross_entropy", "router_logits")


def read(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _state(status: int | None) -> str:
    if status is None:
        return "hung"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "ok" if status == 0 else f"failed with status {status}"


def _message(path: Path) -> str:
    """The last line of its output that is not part of a stack."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith(("File ", "Thread ", "Current thread ", "Timeout "))]
    return said[-1][:300] if said else "no output"


def choice(found: dict[str, dict[str, Any]]) -> str:
    """MEGAGRIN_KERNELS without the ops that did not pass."""
    return ",".join(["auto", *(f"-{op}" for op, result in found.items() if result["state"] != "ok")])


def probe(program: Path, arguments: list[str], limit_s: float, out: Path, environment: Any) -> dict[str, dict[str, Any]]:
    """Start all ops at once, most of whose time is compilation, and note how each one ends.

    Args:
        program: takes the name of an op and `arguments`.
        arguments: for the program.
        limit_s: seconds until what still runs is killed.
        out: folder of ops.json.
        environment: written beside the results.
    """
    found: dict[str, dict[str, Any]] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        running = {}
        for op in OPS:
            with (Path(name) / op).open("wb") as output:
                command = [sys.executable, str(program), op, *arguments]
                # In the group of this process: whoever ends that ends all of them.
                running[op] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while running:
            late = time.monotonic() - start > limit_s
            for op, process in list(running.items()):
                status = process.poll()
                if status is None and not late:
                    continue
                if status is None:
                    process.kill()
                    process.wait()
                message, seconds = _message(Path(name) / op), time.monotonic() - start
                found[op] = {"state": _state(status), "seconds": seconds, "message": message}
                print(f"{op}: {found[op]['state']} after {seconds:.0f} s: {message}", flush=True)
                if found[op]["state"] != "ok":
                    print((Path(name) / op).read_text(errors="replace")[-4000:], flush=True)
                del running[op]
                record = {"environment": environment, "kernels": choice(found), "ops": found}
                (out / "ops.json").write_text(json.dumps(record, indent=1) + "\n")
            time.sleep(0.1)
    return found


def main(argv: list[str]) -> int:
    """Probe, unless this environment has been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for ops.json")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds for all ops, which run side by side")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--program", type=Path, default=HERE / "gpu_op.py", help="what probes one op")
    options = parser.parse_args(argv)
    environment, old = read(options.out / "environment.json"), read(options.out / "ops.json")
    known = old is not None and environment is not None and old["environment"] == environment and set(old["ops"]) == set(OPS)
    # What hung may have been compiling, and finds what it compiled the next time.
    if known and all(result["state"] != "hung" for result in old["ops"].values()):
        print(f"probed before, with the same code on the same device: MEGAGRIN_KERNELS={old['kernels']}")
        return 0 if old["kernels"] == "auto" else 1
    (options.out / "ops.json").unlink(missing_ok=True)
    found = probe(options.program, ["--smoke"] if options.smoke else [], options.limit, options.out, environment)
    print(f"MEGAGRIN_KERNELS={choice(found)}")
    return 0 if choice(found) == "auto" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
