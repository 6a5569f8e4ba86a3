"""The tables of the GPU comparison, from the results of its jobs. Measures nothing."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.gpu_engines import ENGINES
from benchmarks.gpu_job import CEILINGS
from benchmarks.gpu_rounds import Job
from benchmarks.llama import SIZES, numel_of

GIB = 2**30
BYTES_PER_PARAMETER = 28  # of one AdamW step: bf16 gradient, fp32 master and two moments in; those and bf16 out


class Row(NamedTuple):
    """The rounds of one engine at one size, put together."""

    seconds: float
    spread: float  # slowest round over fastest
    allocated_bytes: int
    reserved_bytes: int
    syncs: float
    losses: list[float]
    note: str
    num_rounds: int


def row_of(outcomes: list[dict[str, Any]]) -> Row | str | None:
    """A row; what went wrong if it never worked; None if it never ran."""
    good = [outcome for outcome in outcomes if "problem" not in outcome]
    if not good:
        return outcomes[0]["problem"] if outcomes else None
    times = [outcome["median_s"] for outcome in good]
    failed = len(outcomes) - len(good)
    notes = [outcome["note"] for outcome in good if outcome["note"]][:1]
    notes += [f"{failed} of {len(outcomes)} rounds failed"] if failed else []
    return Row(
        seconds=statistics.median(times),
        spread=max(times) / min(times),
        allocated_bytes=max(outcome["peak"]["allocated_bytes"] for outcome in good),
        reserved_bytes=max(outcome["peak"]["reserved_bytes"] for outcome in good),
        syncs=max(sum(outcome["syncs"].values()) for outcome in good),
        losses=good[0]["losses"],
        note="; ".join(notes),
        num_rounds=len(good),
    )


def median_of(outcomes: list[dict[str, Any]], key: str) -> float | None:
    """The median of a number over the outcomes that have it."""
    values = [outcome[key] for outcome in outcomes if key in outcome]
    return statistics.median(values) if values else None


def of(value: float, reference: float | None) -> str:
    """A ratio; a dash where there is no reference."""
    return f"{value / reference:.3f}" if reference else "-"


def size_table(size: str, results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> str:
    """The Markdown of one size: a line about the run, the table, its notes."""
    rows = {
        engine: row_of([outcome for job, outcome in results.items() if (job.size, job.engine) == (size, engine)])
        for engine in ENGINES
    }
    seconds = {engine: row.seconds for engine, row in rows.items() if isinstance(row, Row)}
    copy = median_of([outcome for job, outcome in results.items() if job.engine == CEILINGS], "copy_bytes_per_s")
    bound = None
    if copy and "floor" in seconds:
        bound = seconds["floor"] + BYTES_PER_PARAMETER * numel_of(size) / copy
    lines = [
        about(size, results, options, copy, bound),
        "",
        "| engine | s / step | of floor | of hand-written | of bound | peak GiB | reserved GiB | host syncs / step "
        "| loss first, last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for engine, row in rows.items():
        if row is None:
            continue
        if isinstance(row, str):
            lines.append(f"| {engine} | {row.replace('|', '/')} |" + " |" * 7)
            continue
        cells = [
            engine + (f" [{len(notes) + 1}]" if row.note else ""),
            f"{row.seconds:.4f}",
            of(row.seconds, seconds.get("floor")),
            of(row.seconds, seconds.get("hand-written")),
            of(row.seconds, bound),
            f"{row.allocated_bytes / GIB:.1f}",
            f"{row.reserved_bytes / GIB:.1f}",
            f"{row.syncs:g}",
            f"{row.losses[0]:.4f}, {row.losses[-1]:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        notes += [f"[{len(notes) + 1}] {engine}: {row.note}."] if row.note else []
    lines += ["", *notes, ""] if notes else [""]
    lines.append(spread_line(rows))
    return "\n".join(lines)


def about(
    size: str, results: dict[Job, dict[str, Any]], options: dict[str, Any], copy: float | None, bound: float | None
) -> str:
    """What was measured, on what, and what the columns mean."""
    shape = SIZES[size]
    where = "; ".join(dict.fromkeys(machine_line(o["machine"]) for o in results.values() if "machine" in o))
    limit = ""
    if copy and bound:
        limit = (
            f" Bound: floor + {BYTES_PER_PARAMETER} bytes a parameter at the copy bandwidth of {copy / 1e9:,.0f} GB/s "
            f"= {bound:.4f} s."
        )
    return (
        f"{where}. {numel_of(size):,} parameters ({'Hugging Face ' if options['model'] == 'hf' else ''}Llama, "
        f"{shape.num_blocks} layers, width {shape.dim}, FFN {shape.ffn}, vocabulary {shape.vocabulary}), "
        f"{shape.batch} x {shape.length} tokens a step, bf16 with fp32 masters, AdamW, clipping 1.0; medians of "
        f"{options['steps']} steps after {options['warmup']}.{limit}"
    )


def machine_line(it: dict[str, Any]) -> str:
    """The device and the versions."""
    versions = [f"{name} {it[name]}" for name in ("torch", "triton", "deepspeed") if it.get(name)]
    cuda = [f"CUDA {it['cuda']}"] if it["cuda"] else []
    allocator = [f"allocator {it['allocator']}"] if it["allocator"] else []
    return ", ".join([it["device"], *versions, *cuda, *allocator, it["date"]])


def spread_line(rows: dict[str, Row | str | None]) -> str:
    """How far rounds were apart."""
    several = {engine: row for engine, row in rows.items() if isinstance(row, Row) and row.num_rounds > 1}
    if not several:
        return "One round."
    engine, row = max(several.items(), key=lambda item: item[1].spread)
    rounds = max(row.num_rounds for row in several.values())
    return f"{rounds} rounds; the largest spread between an engine's rounds: {(row.spread - 1) * 100:.1f} % ({engine})."


def ceiling_table(results: dict[Job, dict[str, Any]]) -> str | None:
    """The Markdown of what the device can do and how close the optimizer kernels come."""
    outcomes = [outcome for job, outcome in results.items() if job.engine == CEILINGS and "problem" not in outcome]
    if not outcomes:
        return None
    copy, product = median_of(outcomes, "copy_bytes_per_s"), median_of(outcomes, "matmul_flop_per_s")
    assert copy is not None and product is not None
    lines = [
        f"{machine_line(outcomes[0]['machine'])}. Device-to-device copy {copy / 1e9:,.0f} GB/s (read plus written), "
        f"bf16 matrix product {product / 1e12:,.0f} TFLOP/s.",
        "",
        "| optimizer kernel alone, on one plane | bytes a parameter | ms per 1e9 parameters | GB/s | of copy |",
        "|---|---|---|---|---|",
    ]
    for index, first in enumerate(outcomes[0]["optimizers"]):
        if "problem" in first:
            lines.append(f"| {first['kernel']} | {first['problem']} |" + " |" * 3)
            continue
        rate = statistics.median(outcome["optimizers"][index]["bytes_per_s"] for outcome in outcomes)
        milliseconds = first["bytes_per_parameter"] * 1e9 / rate * 1e3
        lines.append(
            f"| {first['kernel']} | {first['bytes_per_parameter']} | {milliseconds:.2f} | {rate / 1e9:,.0f} "
            f"| {rate / copy:.3f} |"
        )
    return "\n".join(lines)


def tables(results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> dict[str, str]:
    """All tables by the name that their markers in a document have."""
    sizes = dict.fromkeys(job.size for job in results if job.engine != CEILINGS)
    suffix = " hf" if options["model"] == "hf" else ""
    made = {f"{size}{suffix}": size_table(size, results, options) for size in sizes}
    top = ceiling_table(results)
    return ({CEILINGS: top} if top else {}) | made
