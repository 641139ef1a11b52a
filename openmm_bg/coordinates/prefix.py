"""Rigid motions composed from the seed of a tree to each of its atoms, in O(log N) rounds instead of one per level.

The tree is cut into paths: each atom is continued by its child with the largest subtree. Along a long path (a
backbone) the partial products are a parallel prefix (Brent and Kung, IEEE Trans. Comput. C-31, 260, 1982): twice the
products of a loop, in 2 log2 L rounds instead of L. What hangs on it (side chains) is short and goes level by level,
everywhere at once. A round reads whole rows and writes one contiguous block, so that neither the rounds nor the memory
traffic grow faster than the atoms do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Paths of at least this many atoms are scanned: below it a loop needs no more rounds.
LONG = 16


@dataclass(frozen=True)
class Schedule:
    """Order of the atoms in memory and the rounds that make them global.

    Parameters
    ----------
    slots
        [N] node in each slot; the roots come first, in the order given.
    rounds
        (start, stop, sources): what the slots of [start, stop) hold is to be multiplied from the left by what the
        slots ``sources`` [stop - start] hold; no source lies in [start, stop).
    """

    slots: list[int]
    rounds: list[tuple[int, int, list[int]]]


def _paths(parent: Sequence[int]) -> list[list[int]]:
    """Nodes with a parent, cut into paths; a parent stands before its children in the numbering."""
    n = len(parent)
    size = [1] * n
    heavy = [-1] * n
    for node in reversed(range(n)):
        if parent[node] >= 0:
            size[parent[node]] += size[node]
    for node in range(n):
        above = parent[node]
        if above >= 0 and parent[above] >= 0 and (heavy[above] < 0 or size[node] > size[heavy[above]]):
            heavy[above] = node
    paths = []
    for node in range(n):
        if parent[node] >= 0 and (parent[parent[node]] < 0 or heavy[parent[node]] != node):
            path = [node]
            while heavy[path[-1]] >= 0:
                path.append(heavy[path[-1]])
            paths.append(path)
    return paths


def _twos(p: int) -> int:
    """How often 2 divides p."""
    return (p & -p).bit_length() - 1


def build_schedule(parent: Sequence[int], long: int = LONG) -> Schedule:
    """Schedule of a forest.

    Parameters
    ----------
    parent
        [N] parent of each node, -1 for a root; roots first, and each parent before its children.
    long
        Number of nodes from which a path is scanned.
    """
    n = len(parent)
    paths = _paths(parent)
    path_of = {node: k for k, path in enumerate(paths) for node in path}
    # Scanned paths: the long ones and all that they hang on, which must be complete before them.
    scanned: set[int] = set()
    for k, path in enumerate(paths):
        if len(path) < long:
            continue
        above: int | None = k
        while above is not None and above not in scanned:
            scanned.add(above)
            above = path_of.get(parent[paths[above][0]])
    generation: dict[int, int] = {}
    for k in sorted(scanned):  # a path's head has a higher number than the node it hangs on
        above = path_of.get(parent[paths[k][0]])
        generation[k] = 0 if above is None else generation[above] + 1
    slots = [node for node in range(n) if parent[node] < 0]
    rounds: list[tuple[int, int, list[int]]] = []
    slot_of = {node: i for i, node in enumerate(slots)}
    for g in range(max(generation.values(), default=-1) + 1):
        chosen = [paths[k] for k in sorted(scanned) if generation[k] == g]
        _scan(chosen, parent, slots, slot_of, rounds)
    # the rest, level by level above what is complete
    level: dict[int, int] = {}
    by_level: list[list[int]] = []
    for node in range(n):
        if node not in slot_of:
            level[node] = level.get(parent[node], -1) + 1
            if level[node] == len(by_level):
                by_level.append([])
            by_level[level[node]].append(node)
    for nodes in by_level:
        start = len(slots)
        for node in nodes:
            slot_of[node] = len(slots)
            slots.append(node)
        rounds.append((start, len(slots), [slot_of[parent[node]] for node in nodes]))
    return Schedule(slots, rounds)


def _scan(
    paths: list[list[int]],
    parent: Sequence[int],
    slots: list[int],
    slot_of: dict[int, int],
    rounds: list[tuple[int, int, list[int]]],
) -> None:
    """Append slots and rounds of some paths whose heads' parents are complete.

    Position p of a path (from 1) holds, after the way up, the product of the 2^k positions that end there, 2^k being
    the largest power of two in p; on the way down it gets the product of all before. Slots are sorted by k, those that
    are complete on the way up (p = 2^k) last, so that the targets of every round are one block.
    """
    longest = max(map(len, paths))
    blocks: list[tuple[int, int, int]] = []  # for each k: start, start of p = 2^k, stop
    where: list[dict[int, int]] = [{} for _ in paths]  # position -> slot
    owner: dict[int, tuple[int, int]] = {}
    for k in range(longest.bit_length()):
        members = [(i, p) for i, path in enumerate(paths) for p in range(1, len(path) + 1) if _twos(p) == k]
        members.sort(key=lambda m: m[1] == 2**k)
        start = len(slots)
        for i, p in members:
            where[i][p] = len(slots)
            owner[len(slots)] = (i, p)
            slot_of[paths[i][p - 1]] = len(slots)
            slots.append(paths[i][p - 1])
        whole = sum(p == 2**k for _, p in members)
        blocks.append((start, len(slots) - whole, len(slots)))
    end = len(slots)

    def sources(start: int, stop: int, back: int) -> list[int]:
        return [where[i][p - back] for i, p in (owner[slot] for slot in range(start, stop))]

    _, heads, after = blocks[0]
    rounds.append((heads, after, [slot_of[parent[paths[owner[slot][0]][0]]] for slot in range(heads, after)]))
    for k in range(len(blocks) - 1):
        start = blocks[k + 1][0]
        rounds.append((start, end, sources(start, end, 2**k)))
    for k in reversed(range(len(blocks))):
        start, stop, _ = blocks[k]
        if stop > start:
            rounds.append((start, stop, sources(start, stop, 2**k)))
