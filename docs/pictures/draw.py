"""The pictures of the documentation, as SVG text. Owns their look; what they say comes from the tables of the code.

    python docs/pictures/draw.py            write the six pictures beside this file

Stages, slots, shards, groups and life cycles are read from `lorica.plan`, `lorica.layout`, `lorica.mesh` and
`lorica.core.lifecycle`, so a picture cannot say something else than the code. Nothing but Lorica itself is needed.
`tests/pure/test_docs.py` fails when a picture is older than this file or than those tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypeVar
from xml.sax.saxutils import escape

from lorica.core.lifecycle import GRAD_MOVES, PARAM_MOVES
from lorica.layout import Entry, Layout, build_layout
from lorica.mesh import Mesh
from lorica.plan import STAGE

FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
INK, MUTED, FAINT, CARD = "#1f2933", "#5b6673", "#c9d1da", "#ffffff"


class Tint(NamedTuple):
    """A colour for filling, one for edges and text on white, one for large light areas."""

    fill: str
    edge: str
    light: str


PARAM = Tint("#5b9bd5", "#2c6aa3", "#dceaf7")
GRAD = Tint("#f0a04b", "#b5671a", "#fcebd8")
STATES = Tint("#6bb58a", "#2f7d52", "#dff2e7")
WORK = Tint("#9a86cf", "#6450a3", "#eae5f7")
IDLE = Tint("#e9edf1", "#8793a0", "#f4f6f8")


class Picture:
    """Shapes on a white card, in the order in which they are added."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, edge: str = "none", *, round: float = 3) -> None:
        """A box with its upper left corner at (x, y)."""
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}"'
        self._shapes.append(f'<rect {place} fill="{fill}" stroke="{edge}"/>')

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, at: str = "start", color: str = INK, bold: bool = False
    ) -> None:
        """One line; (x, y) is on the baseline at its start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}"'
        self._shapes.append(f'<text {place} fill="{color}"{weight}>{escape(text)}</text>')

    def lines(
        self, x: float, y: float, lines: Sequence[str], *, size: int = 13, at: str = "start", color: str = INK
    ) -> None:
        """Several lines of text, the first on the baseline y."""
        for number, line in enumerate(lines):
            self.text(x, y + number * (size + 5), line, size=size, at=at, color=color)

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = FAINT, *, wide: float = 1) -> None:
        """A straight line."""
        self._shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="{wide:g}"/>'
        )

    def path(self, path: str, color: str = MUTED, *, arrow: bool = True, wide: float = 1.4) -> None:
        """A curve in SVG's path language, with an arrow at its end."""
        head = f' marker-end="url(#arrow-{color[1:]})"' if arrow else ""
        self._shapes.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{wide:g}"{head}/>')

    def svg(self) -> str:
        """The picture as the text of an SVG file."""
        defs = [_hatching("hatch-grad", GRAD), _hatching("hatch-pad", IDLE)]
        body = "\n".join(self._shapes)
        defs += [_arrow_head(color) for color in _colors_of_arrows(body)]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" font-family="{FONT}">\n'
            f"<title>{escape(self.title)}</title>\n<defs>\n" + "\n".join(defs) + "\n</defs>\n"
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10" fill="{CARD}" '
            f'stroke="{FAINT}"/>\n{body}\n</svg>\n'
        )


def _hatching(name: str, tint: Tint) -> str:
    return (
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{tint.light}"/>'
        f'<line x1="0" y1="0" x2="0" y2="6" stroke="{tint.fill}" stroke-width="3"/></pattern>'
    )


def _arrow_head(color: str) -> str:
    return (
        f'<marker id="arrow-{color}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#{color}"/></marker>'
    )


def _colors_of_arrows(body: str) -> list[str]:
    return sorted({part[:6] for part in body.split("url(#arrow-")[1:]})


# -- 1. who holds what -------------------------------------------------------------------------------------------------

NUM_RANKS = 4
BAR_WIDTH, BAR_HEIGHT, BAR_GAP = 30, 64, 8


def stages() -> Picture:
    """Who holds what at each stage: 4 ranks, three kinds of state."""
    picture = Picture(880, 590, "Who holds what: ZeRO stages 0 to 3 on 4 ranks")
    kinds = (("parameters", PARAM, "2Ψ"), ("gradients", GRAD, "2Ψ"), ("optimizer", STATES, "KΨ"))
    lefts = (150, 340, 530)
    for left, (kind, tint, _) in zip(lefts, kinds, strict=True):
        middle = left + (NUM_RANKS * (BAR_WIDTH + BAR_GAP) - BAR_GAP) / 2
        picture.text(middle, 34, kind, size=15, at="middle", color=tint.edge, bold=True)
        for rank in range(NUM_RANKS):
            x = left + rank * (BAR_WIDTH + BAR_GAP) + BAR_WIDTH / 2
            picture.text(x, 56, f"r{rank}", size=11, at="middle", color=MUTED)
    picture.text(720, 34, "bytes on one rank", size=13, bold=True, color=MUTED)
    for row, (stage, sharded) in enumerate(STAGE.items()):
        top = 66 + row * 116
        if row:
            picture.line(24, top - 8, 856, top - 8)
        picture.text(30, top + 30, f"stage {stage}", size=16, bold=True)
        picture.lines(30, top + 50, _what_is_sharded(sharded), size=11, color=MUTED)
        terms = []
        for left, (kind, tint, term), is_sharded in zip(lefts, kinds, sharded, strict=True):
            partial = kind == "gradients" and not is_sharded
            _bars(picture, left, top, tint, is_sharded=is_sharded, partial=partial)
            terms.append(term + "/P" * is_sharded)
            middle = left + (NUM_RANKS * (BAR_WIDTH + BAR_GAP) - BAR_GAP) / 2
            picture.text(middle, top + BAR_HEIGHT + 20, terms[-1], size=12, at="middle", color=MUTED)
        picture.lines(720, top + 26, [terms[0], f"+ {terms[1]}", f"+ {terms[2]}"], size=13)
    _stage_legend(picture, 540)
    return picture


def _what_is_sharded(sharded: tuple[bool, ...]) -> list[str]:
    names = [n for n, flag in zip(("parameters", "gradients", "optimizer"), sharded, strict=True) if flag]
    return ["sharded:", *reversed(names)] if names else ["nothing is", "sharded"]


def _bars(picture: Picture, left: float, top: float, tint: Tint, *, is_sharded: bool, partial: bool) -> None:
    part = BAR_HEIGHT / NUM_RANKS
    for rank in range(NUM_RANKS):
        x = left + rank * (BAR_WIDTH + BAR_GAP)
        picture.rect(x, top, BAR_WIDTH, BAR_HEIGHT, IDLE.light, FAINT)
        for number in range(NUM_RANKS):
            if not is_sharded or number == rank:
                fill = "url(#hatch-grad)" if partial else tint.fill
                picture.rect(x, top + number * part, BAR_WIDTH, part, fill, tint.edge, round=1)


def _stage_legend(picture: Picture, y: float) -> None:
    picture.line(24, y - 12, 856, y - 12)
    items = (
        (PARAM.fill, PARAM.edge, "held by this rank"),
        ("url(#hatch-grad)", GRAD.edge, "its own sum, until the accumulation boundary"),
        (IDLE.light, FAINT, "held by another rank"),
    )
    x = 30.0
    for fill, edge, label in items:
        picture.rect(x, y + 2, 18, 14, fill, edge)
        picture.text(x + 26, y + 14, label, size=12)
        x += 190 if label != items[1][2] else 330
    picture.text(
        30,
        y + 36,
        "r0 to r3: ranks. Ψ parameters, P ranks, bf16 (2 bytes each); AdamW: K = 10 (half a master 2, two moments 8)",
        size=12,
        color=MUTED,
    )


# -- 2. a plane --------------------------------------------------------------------------------------------------------

PLANE_RANKS = 4
PLANE_LAYOUT = build_layout(
    [Entry("weight [40, 25]", (40, 25), 0), Entry("bias [40]", (40,), 1), Entry("norm [500]", (500,), 1)], PLANE_RANKS
)


def plane() -> Picture:
    """One plane: slots, padding, param groups, shards."""
    layout = PLANE_LAYOUT
    picture = Picture(880, 330, "A plane: slots, padding, optimizer param groups and shards")
    left, scale = 130, 720 / layout.numel
    _plane_row(picture, layout, left, scale, top=84)
    _plane_groups(picture, layout, left, scale, top=30)
    _plane_shards(picture, layout, left, scale, top=170)
    picture.text(24, 112, "plane", size=14, bold=True)
    picture.text(24, 46, "param group", size=13, bold=True)
    picture.text(24, 194, "shards", size=14, bold=True)
    x = 130
    for fill, edge, label, step in (
        (PARAM.light, PARAM.edge, "a parameter's slot; starts at a multiple of 128", 320),
        ("url(#hatch-pad)", IDLE.edge, "padding", 180),
    ):
        picture.rect(x, 252, 18, 14, fill, edge)
        picture.text(x + 26, 264, label, size=12)
        x += step
    picture.text(
        130,
        292,
        "The parameter, gradient, master and moment planes of a unit all have this layout and this cut.",
        size=12,
    )
    picture.text(
        130, 311, "One all-gather, one reduce-scatter, one optimizer call per group: each a contiguous range.", size=12
    )
    return picture


def _plane_row(picture: Picture, layout: Layout, left: float, scale: float, top: float) -> None:
    for start, stop in layout.gaps:
        picture.rect(left + start * scale, top, (stop - start) * scale, 44, "url(#hatch-pad)", IDLE.edge, round=0)
    for slot in layout.slots:
        x, width = left + slot.start * scale, slot.numel * scale
        picture.rect(x, top, width, 44, PARAM.light, PARAM.edge, round=0)
        if width > 60:
            picture.text(x + 12, top + 27, slot.name, color=PARAM.edge, bold=True)  # left of the first shard border
        else:
            picture.text(x + width / 2, top - 7, slot.name, size=12, at="middle", color=PARAM.edge, bold=True)
        picture.text(x + 4, top + 59, str(slot.start), size=11, color=MUTED)
    picture.text(left + layout.numel * scale, top + 59, str(layout.numel), size=11, at="end", color=MUTED)


def _plane_groups(picture: Picture, layout: Layout, left: float, scale: float, top: float) -> None:
    names = ("0: weight decay", "1: none")
    for part in layout.group_ranges:
        x, width = left + part.start * scale + 2, (part.stop - part.start) * scale - 4
        picture.rect(x, top, width, 24, STATES.light, STATES.edge)
        picture.text(x + width / 2, top + 17, names[part.group], size=12, at="middle", color=STATES.edge)


def _plane_shards(picture: Picture, layout: Layout, left: float, scale: float, top: float) -> None:
    for rank in range(layout.num_shards):
        start, stop = layout.shard_range(rank)
        x, width = left + start * scale + 2, (stop - start) * scale - 4
        picture.rect(x, top, width, 40, GRAD.light, GRAD.edge)
        picture.text(x + width / 2, top + 17, f"rank {rank}", size=13, at="middle", color=GRAD.edge, bold=True)
        picture.text(x + width / 2, top + 33, f"[{start}, {stop})", size=11, at="middle", color=MUTED)
        if rank:
            picture.line(left + start * scale, 84, left + start * scale, top + 40, GRAD.edge, wide=1.4)


# -- 3. one step -------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Something that happens in one lane, from one row to another."""

    lane: str
    label: str
    start: float
    stop: float


TASKS = (
    Task("gather", "root", 0, 1),
    Task("gather", "1", 1, 2),
    Task("compute", "forward 1", 2, 3), Task("gather", "2", 2, 3),
    Task("compute", "forward 2", 3, 4), Task("gather", "3", 3, 4),
    Task("compute", "forward 3", 4, 5), Task("gather", "4", 4, 5),
    Task("compute", "forward 4", 5, 6),
    Task("compute", "loss", 6, 7),
    Task("compute", "backward 4", 7, 9), Task("gather", "3", 7, 8),
    Task("compute", "backward 3", 9, 11), Task("gather", "2", 9, 10), Task("reduce", "4", 9, 10.5),
    Task("compute", "backward 2", 11, 13), Task("gather", "1", 11, 12), Task("reduce", "3", 11, 12.5),
    Task("compute", "backward 1", 13, 15), Task("reduce", "2", 13, 14.5),
    Task("reduce", "1", 15, 16.5),
    Task("reduce", "root", 16.5, 17.5),
    Task("reduce", "norm", 17.5, 18.3),
    Task("update", "update 1", 18.3, 19.3), Task("update", "update 2", 19.3, 20.3),
    Task("update", "update 3", 20.3, 21.3), Task("update", "update 4", 21.3, 22.3),
    Task("update", "update root", 22.3, 23.3),
)  # fmt: skip
WHOLE = {"root": ((0, 17.5),), "1": ((1, 3), (11, 15)), "2": ((2, 4), (9, 13)), "3": ((3, 5), (7, 11)), "4": ((4, 9),)}
PHASES = (("forward", 0), ("backward", 7), ("step", 17.5))


def step() -> Picture:
    """One step at stage 3: four units and the root, one unit gathered ahead."""
    top, row = 84, 23
    picture = Picture(880, 678, "One step at stage 3, from top to bottom")
    lanes = {
        "gather": (130, 110, PARAM),
        "compute": (260, 190, WORK),
        "update": (260, 190, STATES),
        "reduce": (470, 110, GRAD),
    }
    for x, width, label, color in (
        (130, 110, "all-gather", PARAM.edge), (260, 190, "compute", WORK.edge), (470, 110, "reduce", GRAD.edge)
    ):  # fmt: skip
        picture.text(x + width / 2, 66, label, at="middle", bold=True, color=color)
    picture.text(185, 36, "wire", size=12, at="middle", color=MUTED)
    picture.text(525, 36, "wire", size=12, at="middle", color=MUTED)
    picture.text(728, 36, "whole on this rank", size=12, at="middle", color=MUTED)
    for name, begin in PHASES:
        picture.text(28, top + begin * row + 17, name, size=14, bold=True)
        picture.line(24, top + begin * row - 0.5, 856, top + begin * row - 0.5)
    for task in TASKS:
        x, width, tint = lanes[task.lane]
        height = (task.stop - task.start) * row - 3
        y = top + task.start * row + 1
        fill = tint.light if task.lane in ("compute", "update") else tint.fill
        picture.rect(x, y, width, height, fill, tint.edge)
        picture.text(x + width / 2, y + height / 2 + 4.5, task.label, size=12, at="middle")
    for column, (unit, spans) in enumerate(WHOLE.items()):
        x = 630 + column * 42
        picture.text(x + 14, 66, unit, size=12, at="middle", bold=True, color=PARAM.edge)
        for begin, end in spans:
            picture.rect(x, top + begin * row + 1, 28, (end - begin) * row - 3, PARAM.light, PARAM.edge)
    picture.line(24, top + 23.3 * row + 2, 856, top + 23.3 * row + 2)
    notes = (
        "Time runs downwards; units 1 to 4 are blocks, the root is the rest of the model. One unit is gathered ahead.",
        "The last unit stays whole between its forward and its backward: it is needed again at once.",
    )
    picture.lines(28, 642, notes, size=12, color=MUTED)
    return picture


# -- 4. units of a GPT -------------------------------------------------------------------------------------------------

TREE = (
    (0, "GPT", "root", "the model"),
    (1, "embedding", "embedding", "38.6 M: a large leaf"),
    (1, "positions", "root", "0.8 M: below 2^20"),
    (1, "blocks", "", "a ModuleList"),
    (2, "0", "blocks.0", "7.1 M: a block"),
    (2, "1", "blocks.1", ""),
    (2, "...", "", ""),
    (2, "11", "blocks.11", ""),
    (1, "norm", "root", "small"),
    (1, "head", "head", "38.6 M, not tied: a large leaf"),
)


def units() -> Picture:
    """A module tree and the units that it is cut into."""
    picture = Picture(880, 430, "How a GPT is cut into units")
    picture.text(40, 36, "module tree", size=15, bold=True, color=MUTED)
    picture.text(560, 36, "units, each with its planes", size=15, bold=True, color=MUTED)
    centers: dict[str, float] = {}
    order = ["embedding", "blocks.0", "blocks.1", "blocks.11", "head", "root"]
    for number, name in enumerate(order):
        y = 56 + number * 56
        is_root = name == "root"
        tint = STATES if is_root else PARAM
        picture.rect(560, y, 290, 40, tint.light, tint.edge)
        picture.text(574, y + 25, name, bold=True, color=tint.edge)
        what = {"root": "whole for all of forward and backward"}.get(name, "whole while it runs")
        picture.text(840, y + 25, what, size=11, at="end", color=MUTED)
        centers[name] = y + 20
    parents: list[float] = []  # the lower edge of the box above, by depth
    for number, (depth, name, unit, note) in enumerate(TREE):
        y, x = 56 + number * 33, 40 + depth * 34
        middle = y + 12.5
        parents[depth:] = [y + 25.0]
        if depth:
            picture.path(f"M{x - 22} {parents[depth - 1]:g} V{middle:g} H{x}", IDLE.edge, arrow=False, wide=1)
        picture.rect(x, y, 410 - x, 25, IDLE.light, IDLE.edge)
        picture.text(x + 10, y + 17, name, size=13)
        picture.text(400, y + 17, note, size=11, at="end", color=MUTED)
        if unit and depth:
            color = STATES.edge if unit == "root" else PARAM.edge
            picture.path(f"M410 {middle:g} C480 {middle:g} 490 {centers[unit]:g} 556 {centers[unit]:g}", color)
    picture.text(
        40,
        412,
        "Tied head and embedding: both modules use the parameter, so it belongs to the root.",
        size=12,
        color=MUTED,
    )
    return picture


# -- 5. a mesh ---------------------------------------------------------------------------------------------------------


def mesh() -> Picture:
    """MiCS: four ranks as two replicas of two shards."""
    grid = Mesh.build(4, dp_shard=2)
    picture = Picture(880, 400, "MiCS: 4 ranks as 2 replicas of 2 shards")
    lefts, tops, width, height = (210, 530), (60, 240), 170, 96
    for column, letter in enumerate("AB"):
        picture.text(lefts[column] + width / 2, 38, f"holds shard {letter}", at="middle", bold=True, color=PARAM.edge)
    for rank in range(grid.world_size):
        position = grid.coordinate(rank)
        x, y = lefts[position["dp_shard"]], tops[position["dp_replicate"]]
        picture.rect(x, y, width, height, IDLE.light, IDLE.edge, round=6)
        picture.text(x + 14, y + 24, f"rank {rank}", bold=True)
        for number, tint in enumerate((PARAM, GRAD, STATES)):
            for part in range(2):
                fill = tint.fill if part == position["dp_shard"] else CARD
                picture.rect(x + 14 + part * 71, y + 36 + number * 18, 71, 14, fill, tint.edge, round=1)
    for number, group in enumerate(grid.groups("dp_shard")):
        y = tops[number] + height // 2
        picture.text(28, y - 4, f"shard group {number}", bold=True)
        picture.text(28, y + 14, "ranks " + ", ".join(map(str, group)), size=12, color=MUTED)
        _both_ways(picture, lefts[0] + width + 8, y, lefts[1] - 8, y, PARAM.edge)
        picture.text(455, y - 26, "all-gather", size=12, at="middle", color=PARAM.edge)
        picture.text(455, y - 10, "reduce-scatter", size=12, at="middle", color=PARAM.edge)
        picture.text(455, y + 20, "every micro-batch", size=11, at="middle", color=MUTED)
    for column, group in enumerate(grid.groups("dp_replicate")):
        x = lefts[column] + width // 2
        _both_ways(picture, x, tops[0] + height + 6, x, tops[1] - 6, GRAD.edge)
        picture.text(x + 12, 194, "all-reduce the gradient shard", size=12, color=GRAD.edge)
        picture.text(x + 12, 211, "once per step, ranks " + ", ".join(map(str, group)), size=11, color=MUTED)
    for number, (tint, label) in enumerate(((PARAM, "parameters"), (GRAD, "gradients"), (STATES, "optimizer"))):
        picture.rect(210 + number * 130, 362, 18, 14, tint.fill, tint.edge)
        picture.text(236 + number * 130, 374, label, size=12)
    return picture


def _both_ways(picture: Picture, x1: float, y1: float, x2: float, y2: float, color: str) -> None:
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    picture.path(f"M{middle_x:g} {middle_y:g} L{x1:g} {y1:g}", color)
    picture.path(f"M{middle_x:g} {middle_y:g} L{x2:g} {y2:g}", color)


# -- 6. life cycles ----------------------------------------------------------------------------------------------------

BUFFER_MOVES = {"FREE": {"GIVEN"}, "GIVEN": {"FLYING"}, "FLYING": {"FREE"}}  # comm/slots.py, which needs torch

S = TypeVar("S", bound=Enum)
State = str


class Machine(NamedTuple):
    """A table of moves, and where its states stand: x, y of each box."""

    title: str
    place: str
    tint: Tint
    moves: dict[State, set[State]]
    boxes: dict[State, tuple[float, float]]
    meanings: dict[State, str]
    routes: dict[tuple[State, State], str]
    labels: tuple[tuple[float, float, str, str], ...]


def _by_name(moves: Mapping[S, set[S]]) -> dict[State, set[State]]:
    return {state.name: {other.name for other in others} for state, others in moves.items()}


def lifecycles() -> Picture:
    """The legal states of a parameter plane, a gradient plane and a staging buffer."""
    picture = Picture(880, 510, "Life cycles: parameter plane, gradient plane, staging buffer")
    for machine in (_param_machine(40), _grad_machine(204), _buffer_machine(404)):
        _draw_machine(picture, machine)
    picture.line(24, 156, 856, 156)
    picture.line(24, 372, 856, 372)
    return picture


def _draw_machine(picture: Picture, machine: Machine) -> None:
    top = min(y for _, y in machine.boxes.values())
    picture.text(28, top + 4, machine.title, size=14, bold=True, color=machine.tint.edge)
    picture.text(28, top + 22, machine.place, size=11, color=MUTED)
    if set(machine.routes) != {(a, b) for a, others in machine.moves.items() for b in others}:
        raise ValueError(
            f"{machine.title}: expected a route for every move of the table, got {sorted(machine.routes)}."
        )
    for state, (x, y) in machine.boxes.items():
        picture.rect(x, y, 150, 44, machine.tint.light, machine.tint.edge, round=8)
        picture.text(x + 75, y + 19, state, size=12, at="middle", bold=True)
        picture.text(x + 75, y + 35, machine.meanings[state], size=11, at="middle", color=MUTED)
    for route in machine.routes.values():
        picture.path(route, machine.tint.edge)
    for x, y, at, label in machine.labels:
        picture.text(x, y, label, size=11, at=at, color=machine.tint.edge)


def _param_machine(y: int) -> Machine:
    return Machine(
        "parameter plane", "core/lifecycle.py", PARAM, _by_name(PARAM_MOVES),
        {"SHARDED": (210, y), "UNSHARDING": (430, y), "FULL": (650, y)},
        {"SHARDED": "this rank's shard", "UNSHARDING": "being gathered", "FULL": "can be used"},
        {
            ("SHARDED", "UNSHARDING"): f"M360 {y + 22} H427",
            ("UNSHARDING", "FULL"): f"M580 {y + 22} H647",
            ("FULL", "SHARDED"): f"M725 {y + 44} V{y + 76} H285 V{y + 47}",
        },
        (
            (393, y + 14, "middle", "unshard"), (613, y + 14, "middle", "wait"),
            (505, y + 92, "middle", "reshard: free the storage"),
        ),
    )  # fmt: skip


def _grad_machine(y: int) -> Machine:
    return Machine(
        "gradient plane", "core/lifecycle.py", GRAD, _by_name(GRAD_MOVES),
        {"IDLE": (210, y), "REDUCING": (430, y), "ACCUMULATING": (650, y), "READY": (430, y + 96)},
        {
            "IDLE": "nothing since the step", "REDUCING": "being reduced",
            "ACCUMULATING": "a sum of micro-steps", "READY": "for the optimizer",
        },
        {
            ("IDLE", "REDUCING"): f"M360 {y + 22} H427",
            ("REDUCING", "ACCUMULATING"): f"M580 {y + 14} H647",
            ("ACCUMULATING", "REDUCING"): f"M650 {y + 31} H583",
            ("ACCUMULATING", "READY"): f"M725 {y + 44} V{y + 118} H583",
            ("READY", "IDLE"): f"M430 {y + 118} H285 V{y + 47}",
            ("ACCUMULATING", "IDLE"): f"M725 {y} V{y - 22} H285 V{y - 3}",
            ("READY", "REDUCING"): f"M505 {y + 96} V{y + 47}",
        },
        (
            (393, y + 14, "middle", "launch"), (613, y + 8, "middle", "wait"),
            (615, y + 46, "middle", "launch"), (735, y + 84, "start", "complete"),
            (296, y + 108, "start", "after the step"), (505, y - 27, "middle", "dropped by zero_grad"),
            (514, y + 76, "start", "launch"),
        ),
    )  # fmt: skip


def _buffer_machine(y: int) -> Machine:
    return Machine(
        "staging buffer", "comm/slots.py", STATES, BUFFER_MOVES,
        {"FREE": (210, y), "GIVEN": (430, y), "FLYING": (650, y)},
        {"FREE": "recycled", "GIVEN": "being packed", "FLYING": "peers read it"},
        {
            ("FREE", "GIVEN"): f"M360 {y + 22} H427",
            ("GIVEN", "FLYING"): f"M580 {y + 22} H647",
            ("FLYING", "FREE"): f"M725 {y + 44} V{y + 66} H285 V{y + 47}",
        },
        ((393, y + 14, "middle", "staging"), (613, y + 14, "middle", "reduce"), (505, y + 82, "middle", "waited for")),
    )  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[], Picture]] = {
    "stages.svg": stages,
    "plane.svg": plane,
    "step.svg": step,
    "units.svg": units,
    "mesh.svg": mesh,
    "lifecycles.svg": lifecycles,
}


def main() -> None:
    """Write every picture beside this file."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
