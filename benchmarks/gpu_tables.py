"""Tables of the results file of `make gpu`, one for each kind of record; no lines where there is no record."""

from typing import Any

OURS = "megagrin"


def number(value: float | None, share: bool = False) -> str:
    """Three digits, shares in per cent; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rate(found: dict[str, Any], part: str) -> str:
    if found.get("error"):
        return "" if part == "total" else str(found["error"]).replace("|", "/")
    rate = found[f"{part}_tflops"]
    return "–" if rate is None else f"{rate:.0f} ({100 * found[f'{part}_of_dense']:.0f} %)"


def layer_lines(record: Any, blocks: str) -> list[str]:
    """TFLOP/s of the layer by contestant."""
    if not record or not record["cases"]:
        return []
    names = list(dict.fromkeys(name for case in record["cases"] for name in case["contestants"]))
    head = [f"{name}, {part}" for name in names for part in ("forward", "with backward")]
    lines = [f"## The layer, {blocks}", "", "TFLOP/s, and per cent of D.", ""]
    lines += [f"| shape, routing | D | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for case in record["cases"]:
        rates = [_rate(case["contestants"].get(name, {"error": "–"}), part) for name in names for part in ("forward", "total")]
        dense = f"{case['dense_tflops']['forward']:.0f} / {case['dense_tflops']['total']:.0f}"
        lines.append(f"| {case['shape']['name']}, {case['routing']} | {dense} | {' | '.join(rates)} |")
    return [*lines, ""]


def around_lines(record: Any) -> list[str]:
    """Router, permutation and combine, and the products by themselves."""
    if not record or not record["cases"]:
        return []
    parts, kernels = list(record["cases"][0]["overhead_s"]), [row["kernel"] for row in record["cases"][0]["kernels"]]
    lines = [
        "Forward around the products, µs and share of the layer with its router; products alone, times `torch._grouped_mm`:",
        "",
    ]
    lines += [f"| shape, routing | {' | '.join([*parts, 'share', *kernels])} |", "|---" * (len(parts) + len(kernels) + 2) + "|"]
    for case in record["cases"]:
        shown = [f"{1e6 * case['overhead_s'][part]:.0f}" for part in parts] + [number(case["overhead_share"], share=True)]
        for row in case["kernels"]:
            ours, theirs = row["seconds"].get(OURS), row["seconds"].get("torch._grouped_mm")
            shown.append(f"{theirs / ours:.2f}" if ours and theirs else "–")
        lines.append(f"| {case['shape']['name']}, {case['routing']} | {' | '.join(shown)} |")
    return [*lines, ""]


def step_lines(records: list[tuple[str, Any]]) -> list[str]:
    """Training steps at full width."""
    lines = ["## Training steps", ""]
    lines += [
        "| step | layers | tokens | routing | ms | tokens/s | TFLOP/s | MFU | peak GiB | largest load | loss |",
        "|---" * 11 + "|",
    ]
    for name, record in records:
        for found in (record or {}).get("results", []):
            peak, mfu = number(found["peak_gib"]), number(found["mfu"], share=True)
            lines.append(
                f"| {name} | {record['model']['n_layers']} | {record['tokens']} | {found['routing']} | {found['step_ms']:.1f} | "
                f"{found['tokens_per_second']:.0f} | {found['tflops']:.0f} | {mfu} | {peak} | "
                f"{number(found['largest_load'], share=True)} | {found['loss']:.3f} |"
            )
    return [*lines, ""] if len(lines) > 4 else []


def quickstart_lines(record: Any) -> list[str]:
    """The quickstart's model."""
    if not record:
        return []
    return [
        "## The quickstart's model",
        "",
        f"{record['steps']} steps of {record['tokens']} bytes of the standard library: loss {record['first_loss']:.3f} -> "
        f"{record['last_loss']:.3f}, {record['step_ms']:.1f} ms a step, {record['tokens_per_second']:.0f} tokens/s.",
        "",
    ]


def profile_lines(record: Any) -> list[str]:
    """The kernels of one step by their time on the device."""
    if not record or not record.get("profile"):
        return []
    lines = ["## One step by kernel", "", "| kernel | ms | calls |", "|---|---|---|"]
    lines += [f"| `{row['name'][:90].replace('|', '/')}` | {row['ms']:.2f} | {row['calls']} |" for row in record["profile"]]
    return [*lines, ""]
