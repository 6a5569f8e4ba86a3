"""The pictures of the documentation, as SVG text. Owns their look; what they say comes from the tables of the code.

    python docs/pictures/draw.py            write the pictures beside this file

Stages, slots, shards, groups and life cycles are read from `lorica.plan`, `lorica.layout`, `lorica.mesh` and
`lorica.core.lifecycle`, so a picture cannot say something else than the code. Nothing but Lorica itself is needed.
`tests/pure/test_docs.py` fails when a picture is older than this file or than those tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


# -- 7. three tiers ----------------------------------------------------------------------------------------------------

# Measured on one H200: docs/benchmarks-offload.md ("What the links carry"), docs/benchmarks-gpu.md (device memory).
LINK_ALONE, LINK_UP, LINK_DOWN, DISK_READ, DISK_WRITE, DEVICE_COPY = "55", "50", "51", "2.1", "2.5", "4,259"
CPU_ALONE, CPU_BESIDE = "4.2", "2.75"

RECORD_TIER = {1: "device", 2: "device", 3: "device", 4: "host", 5: "host", 6: "host", 7: "files", 8: "files"}
BYTE = 5  # pixels: rows are as high as they have bytes per parameter


class Shelf(NamedTuple):
    """One tier in the picture: its box, what it is called, who updates the records in it, where they begin."""

    tier: str
    top: float
    height: float
    title: str
    lines: tuple[str, ...]
    records: float


SHELVES = (
    Shelf("device", 64, 130, "device memory", ("updated by the GPU,", "in place"), 124),
    Shelf("host", 244, 94, "host memory", ("updated by the CPU, in", "place, or by the GPU,", "through the ring"), 266),
    Shelf("files", 388, 80, "files on NVMe", ("updated by the CPU,", "through its buffers"), 403),
)
GUESTS = (  # what is in a tier for a while only, or only if it is asked for
    (72, STATES, ("ring of chunks: records that stream,", "as long as there is memory left")),
    (112, PARAM, ("stage 3: units that are whole", "for a moment")),
    (152, IDLE, ("activations: the reserve is kept", "for them")),
    (252, PARAM, ("offload_param, stage 3: weights", "of the last units, or of all")),
    (296, STATES, ("buffers of the CPU; spare records", "for guesses")),
)


def tiers() -> Picture:
    """What lives in which tier, and how fast bytes get from one to the other."""
    picture = Picture(880, 556, "Three tiers: device memory, host memory, files")
    picture.text(246, 48, "unit", size=12, at="end", color=MUTED)
    for unit in RECORD_TIER:
        picture.text(_unit_x(unit) + 19, 48, str(unit), size=12, at="middle", bold=True, color=MUTED)
    for shelf in SHELVES:
        picture.rect(16, shelf.top, 848, shelf.height, IDLE.light, FAINT, round=8)
        picture.text(28, shelf.top + 25, shelf.title, size=15, bold=True)
        picture.lines(28, shelf.top + 46, shelf.lines, size=11, color=MUTED)
        own = [unit for unit, tier in RECORD_TIER.items() if tier == shelf.tier]
        _tier_row(picture, shelf.records, 10, STATES, "records 10 B", own)
    _tier_row(picture, 80, 2, PARAM, "weights 2 B", RECORD_TIER)
    _tier_row(picture, 102, 2, GRAD, "gradients 2 B", RECORD_TIER)
    for y, tint, lines in GUESTS:
        picture.rect(634, y, 220, 36, tint.light, tint.edge)
        picture.lines(643, y + 15, lines, size=10)
    link = f"PCIe: {LINK_UP} GB/s up and {LINK_DOWN} down at the same time; {LINK_ALONE} alone"
    _tier_link(picture, _unit_x(5) + 19, 198, 240, link)
    _tier_link(picture, _unit_x(7) + 41, 342, 384, f"disk: {DISK_READ} GB/s read, {DISK_WRITE} written")
    notes = (
        "Heights: bytes per parameter in bf16 with AdamW. Which unit's record lives where is the planner's choice.",
        f"Speeds: measured on one H200, whose own memory copies {DEVICE_COPY} GB/s. On 16 threads the CPU updates",
        f"{CPU_ALONE} thousand million parameters a second alone, {CPU_BESIDE} while both directions of PCIe are busy.",
    )
    picture.lines(28, 496, notes, size=12, color=MUTED)
    return picture


def _unit_x(unit: int) -> float:
    return 256 + (unit - 1) * 44


def _tier_row(picture: Picture, y: float, num_bytes: int, tint: Tint, label: str, units: Iterable[int]) -> None:
    height = num_bytes * BYTE
    picture.text(246, y + height / 2 + 4, label, size=11, at="end", color=tint.edge)
    for unit in units:
        picture.rect(_unit_x(unit), y, 38, height, tint.fill, tint.edge, round=1)


def _tier_link(picture: Picture, x: float, top: float, bottom: float, label: str) -> None:
    picture.path(f"M{x - 6:g} {bottom:g} L{x - 6:g} {top:g}", STATES.edge, wide=2)
    picture.path(f"M{x + 6:g} {top:g} L{x + 6:g} {bottom:g}", STATES.edge, wide=2)
    picture.text(x + 20, (top + bottom) / 2 + 4, label, size=12, color=STATES.edge)


# -- 8. one step with offloaded records --------------------------------------------------------------------------------

VERDICT, FORWARD, BACKWARD = 7.7, 8.1, 13.9  # when they begin, in units of one unit's backward; this is a schematic
OFFLOAD_TASKS = (
    *(Task("compute", str(unit), 7 - unit, 8 - unit) for unit in range(7, 0, -1)),
    Task("norm", "norm", 7, VERDICT),
    Task("resident", "1", VERDICT, 7.9), Task("resident", "2", 7.9, FORWARD),
    *(Task("compute", str(unit), FORWARD + 0.75 * (unit - 1), FORWARD + 0.75 * unit) for unit in range(1, 7)),
    Task("wait", "", 12.6, 13.15), Task("compute", "7", 13.15, BACKWARD), Task("compute", "7", BACKWARD, 14.9),
    Task("up", "3", 0.3, 1.8), Task("up", "4", 1.8, 3.3), Task("up", "5", 8.8, 10.3),
    Task("up", "3", 11.5, 13), Task("up", "4", 13.4, 14.9),
    Task("update", "3", FORWARD, 8.45), Task("update", "4", 8.45, 8.8), Task("update", "5", 10.3, 10.65),
    Task("down", "3", 8.45, 9.95), Task("down", "4", 9.95, 11.45), Task("down", "5", 11.45, 12.95),
    Task("fetch", "6", FORWARD, 8.7), Task("fetch", "7", 8.7, 9.3),
    Task("cpu", "6", 8.7, 10.65), Task("cpu", "7", 10.65, 12.75),
    Task("send", "6", 10.65, 11.05), Task("send", "7", 12.75, 13.15),
    Task("guess fetch", "7", 1.1, 1.7), Task("guess fetch", "6", 2.1, 2.7),
    Task("guess", "7", 1.7, 3.7), Task("guess", "6", 3.7, 5.7), Task("guess", "swap", VERDICT, 8.5),
    Task("guess send", "6", 8.5, 8.9), Task("guess send", "7", 8.9, 9.3),
)  # fmt: skip
LANES: dict[str, tuple[float, Tint]] = {
    "compute": (66, WORK), "norm": (66, GRAD), "resident": (66, STATES), "wait": (66, IDLE),
    "up": (134, STATES), "update": (166, STATES), "down": (198, STATES),
    "fetch": (266, GRAD), "cpu": (298, STATES), "send": (330, PARAM),
    "guess fetch": (398, GRAD), "guess": (430, STATES), "guess send": (462, PARAM),
}  # fmt: skip
LANE_LABELS = {
    "compute": "compute stream",
    "up": "records up", "update": "update", "down": "records down",
    "fetch": "gradients, weights down", "cpu": "CPU thread", "send": "weights up",
    "guess fetch": "gradients, weights down", "guess": "CPU thread", "guess send": "weights up",
}  # fmt: skip
TRANSFERS = {"up", "down", "fetch", "send", "guess fetch", "guess send"}  # in full colour
LANE_GROUPS = (
    (124, "units 3 to 5: records in host memory, updated by the GPU, in a ring with room for two"),
    (256, "units 6 and 7: updated by the CPU"),
    (388, "the same, if host memory is left: a guess, written beside the old records"),
)
LANE_REMARKS = (
    ("up", 3.45, "ring full; what is near is unchanged"),
    ("down", 0.3, "before the verdict nothing is written over"),
    ("update", 10.85, "3, 4 up: next step"),
    ("guess", 8.65, "if right: new and old records change places"),
    ("guess send", 9.45, "if wrong: dropped, and the CPU works as above"),
)


def offload_step() -> Picture:
    """When records travel and are updated: on the device, through its ring, by the CPU, by the CPU with guesses."""
    picture = Picture(880, 580, "One step with offloaded records (schematic)")
    for y, text in LANE_GROUPS:
        picture.line(16, y - 19, 864, y - 19)
        picture.text(28, y, text, size=12, bold=True, color=STATES.edge)
    for lane, label in LANE_LABELS.items():
        picture.text(172, LANES[lane][0] + 16, label, size=11, at="end", color=MUTED)
    for begin, stop, label in (
        (0, 7, "backward of step t"), (FORWARD, BACKWARD, "forward of step t + 1"), (BACKWARD, 14.9, "backward")
    ):  # fmt: skip
        middle = (_time_x(begin) + _time_x(stop)) / 2
        picture.text(middle, 56, label, size=12, at="middle", bold=True, color=WORK.edge)
    for task in OFFLOAD_TASKS:
        _lane_box(picture, task)
    for lane, time, remark in LANE_REMARKS:
        picture.text(_time_x(time), LANES[lane][0] + 16, remark, size=11, color=MUTED)
    _verdict_and_wait(picture)
    notes = (
        "A schematic, not a measured trace; not to scale. Time runs to the right; numbers are units. The records of",
        "units 1 and 2 are on the device and are updated behind the norm. The forward of a unit waits for its own",
        "update and for no other: here only 7 is late. What travels home goes on beside forward and backward.",
    )
    picture.lines(28, 518, notes, size=12, color=MUTED)
    return picture


def _time_x(time: float) -> float:
    return 182 + time * 45.5


def _lane_box(picture: Picture, task: Task) -> None:
    y, tint = LANES[task.lane]
    x, width = _time_x(task.start), _time_x(task.stop) - _time_x(task.start)
    fill = "url(#hatch-pad)" if task.lane == "wait" else tint.fill if task.lane in TRANSFERS else tint.light
    picture.rect(x + 0.5, y, width - 1, 24, fill, tint.edge, round=2)
    picture.text(x + width / 2, y + 16, task.label, size=11, at="middle")


def _verdict_and_wait(picture: Picture) -> None:
    verdict, ready, y = _time_x(VERDICT), _time_x(13.15), LANES["send"][0] + 12
    picture.line(verdict, 36, verdict, 492, GRAD.edge, wide=1.4)
    picture.text(verdict, 28, "the verdict: norm, clipping, finite or not", size=12, at="middle", color=GRAD.edge)
    picture.path(f"M{ready:g} {y:g} H{ready + 6:g} V{LANES['compute'][0] + 27:g}", PARAM.edge)
    picture.text(ready + 12, y + 4, "7 waits", size=11, color=PARAM.edge)


# -- files -------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[], Picture]] = {
    "stages.svg": stages,
    "plane.svg": plane,
    "step.svg": step,
    "units.svg": units,
    "mesh.svg": mesh,
    "lifecycles.svg": lifecycles,
    "tiers.svg": tiers,
    "offload_step.svg": offload_step,
}


def main() -> None:
    """Write every picture beside this file."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
