"""The nearest known name to a misspelt one. Knows no schema: it is given the candidates."""

from __future__ import annotations

from collections.abc import Collection

_TYPO = 2
_STEM = 4


def distance(left: str, right: str, limit: int) -> int:
    """Edits (insert, delete, replace, swap of neighbours) between two strings; `limit` + 1 if there are more.

    Source: optimal string alignment, the restricted form of Damerau 1964.
    """
    before: list[int] = []
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > limit and min(above) > limit:
            return limit + 1
        before, above = above, row
    return min(above[-1], limit + 1)


def nearest(name: str, candidates: Collection[str], within: int | None = None) -> str | None:
    """The candidate nearest to `name`, if it is near enough to be what was meant.

    `within` is the number of edits allowed; by default two, or a third of the name's length if that is more. Case and
    the difference between `-`, space and `_` count little. Failing that, the only candidate that contains `name`.
    """
    allowed = max(_TYPO, len(name) // 3) if within is None else within
    allowed = min(allowed, max(1, len(name) - 1))
    folded = _fold(name)
    scored = [
        (edits, distance(name, candidate, len(name)), candidate)
        for candidate in candidates
        if abs(len(candidate) - len(name)) <= allowed
        and (edits := distance(folded, _fold(candidate), allowed)) <= allowed
    ]
    if scored:
        return min(scored)[2]
    longer = [candidate for candidate in candidates if len(name) >= _STEM and folded in _fold(candidate)]
    return longer[0] if len(longer) == 1 else None


def _fold(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
