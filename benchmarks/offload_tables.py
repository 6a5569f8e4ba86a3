"""The tables of the offload comparison, from the results of its jobs. Measures nothing."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.gpu_rounds import Job
from benchmarks.gpu_tables import GIB, machine_line
from benchmarks.llama import SIZES, numel_of
from benchmarks.offload_engines import ENGINES
from benchmarks.offload_job import Case

HEAD = (
    "| parameters | engine | s / step | tok/s | % of floor | HBM GiB | reserved | host GiB | B / offloaded | start s "
    "| syncs | clipped | loss first, last | norm |"
)


class Row(NamedTuple):
    """The rounds of one engine at one case, put together."""

    seconds: float
    spread: float  # slowest round over fastest
    tokens_per_s: float
    allocated_bytes: int
    reserved_bytes: int
    host_bytes: int  # most of the job's processes, libraries included
    per_offloaded: float | None  # bytes of host memory beyond the libraries', by offloaded parameter
    start_s: float
    syncs: float
    clipped: str
    losses: list[float]
    norms: list[float]
    note: str
    num_rounds: int


def row_of(outcomes: list[dict[str, Any]]) -> Row | str | None:
    """A row; what went wrong if it never worked; None if it never ran."""
    good = [outcome for outcome in outcomes if "problem" not in outcome]
    if not good:
        return outcomes[0]["problem"] if outcomes else None
    first = good[0]
    if any(outcome["with"] != first["with"] for outcome in good):
        raise ValueError("--report: expected rounds of a row with the same options, got several. Fix: one by one.")
    times = [outcome["median_s"] for outcome in good]
    host = max(max(o["host"]["peak_bytes"], o["host_watch"]["most_rss_bytes"]) for o in good)
    states = host - min(o["host"]["libraries_bytes"] for o in good)
    failed = len(outcomes) - len(good)
    notes = [first["note"]] if first["note"] else []
    notes += [f"{failed} of {len(outcomes)} rounds failed"] if failed else []
    return Row(
        seconds=statistics.median(times),
        spread=max(times) / min(times),
        tokens_per_s=first["tokens"] / statistics.median(times),
        allocated_bytes=max(outcome["peak"]["allocated_bytes"] for outcome in good),
        reserved_bytes=max(outcome["peak"]["reserved_bytes"] for outcome in good),
        host_bytes=host,
        per_offloaded=states / first["offloaded_numel"] if first["offloaded_numel"] else None,
        start_s=statistics.median(outcome["start_s"] for outcome in good),
        syncs=max(sum(outcome["syncs"].values()) for outcome in good),
        clipped=f"{first['clipped']} of {len(first['norms'])}",
        losses=first["losses"],
        norms=first["norms"],
        note="; ".join(notes),
        num_rounds=len(good),
    )


def rows_by_case(results: dict[Job, dict[str, Any]]) -> dict[Case, dict[str, Row | str]]:
    """Rows by case, small models first, and engine, in the order of the list of engines."""
    cases = sorted({Case.parse(job.size) for job in results}, key=lambda case: numel_of(case.size))
    table: dict[Case, dict[str, Row | str]] = {}
    for case in cases:
        mine = [(job.engine, outcome) for job, outcome in results.items() if job.size == str(case)]
        made = {name: row_of([outcome for engine, outcome in mine if engine == name]) for name in ENGINES}
        table[case] = {name: row for name, row in made.items() if row is not None}
    return table


def cells_of(row: Row, floor: float | None) -> list[str]:
    """The cells behind the engine's name."""
    return [
        f"{row.seconds:.3f}",
        f"{row.tokens_per_s:,.0f}",
        f"{100 * floor / row.seconds:.1f}" if floor else "-",
        f"{row.allocated_bytes / GIB:.1f}",
        f"{row.reserved_bytes / GIB:.1f}",
        f"{row.host_bytes / GIB:.1f}",
        f"{row.per_offloaded:.1f}" if row.per_offloaded is not None else "-",
        f"{row.start_s:.1f}",
        f"{row.syncs:g}",
        row.clipped if row.norms else "-",
        f"{row.losses[0]:.4f}, {row.losses[-1]:.4f}",
        f"{row.norms[0]:.3f}" if row.norms else "-",
    ]


def tokens_of(case: Case) -> int:
    """Tokens of a step."""
    return SIZES[case.size].batch * SIZES[case.size].length * case.accumulation


def step_table(num_tokens: int, results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> str:
    """The Markdown of all cases with that many tokens a step: a line about the run, the table, its notes."""
    lines = [about(num_tokens, results, options), "", HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    notes: list[str] = []
    spreads: list[tuple[float, str, int]] = []
    for case, rows in rows_by_case(results).items():
        if tokens_of(case) != num_tokens:
            continue
        floor = rows.get("floor")
        for engine, row in rows.items():
            size = f"{numel_of(case.size) / 1e9:.2f} B"
            if isinstance(row, str):
                lines.append(f"| {size} | {engine} | {row.replace('|', '/')} |" + " |" * 11)
                continue
            notes += [f"[{len(notes) + 1}] {engine} at {size}: {row.note}."] if row.note else []
            name = engine + (f" [{len(notes)}]" if row.note else "")
            cells = cells_of(row, floor.seconds if isinstance(floor, Row) else None)
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + " |")
            spreads += [(row.spread, f"{engine} at {size}", row.num_rounds)] if row.num_rounds > 1 else []
    lines += ["", *notes] if notes else []
    return "\n".join([*lines, "", spread_line(spreads)])


def about(num_tokens: int, results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> str:
    """What was measured, and on what."""
    mine = [o for job, o in results.items() if "machine" in o and tokens_of(Case.parse(job.size)) == num_tokens]
    where = "; ".join(dict.fromkeys(machine_line(o["machine"] | {"allocator": ""}) for o in mine))
    return (
        f"{where}. {num_tokens:,} tokens a step, Llama-like, activation checkpointing, bf16 with exact fp32 masters, "
        f"AdamW, clipping 1.0; medians of {options['steps']} steps after {options['warmup']}."
    )


def spread_line(spreads: list[tuple[float, str, int]]) -> str:
    """How far rounds were apart."""
    if not spreads:
        return "One round."
    spread, name, _ = max(spreads)
    rounds = max(number for _, _, number in spreads)
    return f"{rounds} rounds; the largest spread between a row's rounds: {(spread - 1) * 100:.1f} % ({name})."


def tables(results: dict[Job, dict[str, Any]], options: dict[str, Any]) -> dict[str, str]:
    """One table for each number of tokens a step, by the name that its markers in a document have."""
    numbers = sorted({tokens_of(Case.parse(job.size)) for job in results})
    return {f"{number} tokens": step_table(number, results, options) for number in numbers}
