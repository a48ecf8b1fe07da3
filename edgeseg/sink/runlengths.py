"""COCO's compressed run lengths of every value of a map, in one pass over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Runs", "runs_of"]

# Digits of five bits that a run length may have: 35 bits hold every frame there is.
_MOST_DIGITS = 7


@dataclass(frozen=True)
class Runs:
    """Where one value of a map is.

    ``pixels``: how many there are. ``counts``: COCO's compressed run lengths (maskApi.c of
    cocodataset/cocoapi), column by column, as pycocotools makes and takes them.
    """

    pixels: int
    counts: str


def runs_of(values: NDArray[Any]) -> dict[int, Runs]:
    """The runs of each value that is in ``values``, (height, width) integers, in their order.

    The whole map is gone through once, whatever the number of values.
    """
    if values.size == 0:
        return {}
    flat = values.ravel(order="F")
    begins = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(begins[1:], flat.size)
    # Runs of one value side by side, in the order of their places.
    order = np.argsort(flat[begins], kind="stable")
    begins, ends = begins[order], ends[order]
    owners = flat[begins]
    firsts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
    lasts = np.append(firsts[1:], owners.size) - 1
    gap_begins = np.concatenate([[0], ends[:-1]])
    gap_begins[firsts] = 0
    # Per value: gap, run, gap, run, ..., and the rest of the map where there is one.
    has_rest = ends[lasts] < flat.size
    sizes = 2 * (lasts - firsts + 1) + has_rest
    starts = np.cumsum(sizes) - sizes
    places = 2 * np.arange(owners.size) + np.repeat(starts - 2 * firsts, lasts - firsts + 1)
    counts = np.zeros(int(sizes.sum()), np.int64)
    counts[places] = begins - gap_begins
    counts[places + 1] = ends - begins
    counts[(starts + sizes - 1)[has_rest]] = (flat.size - ends[lasts])[has_rest]
    # From the fourth on, the difference to the one before the last.
    written = counts.copy()
    written[2:] -= counts[:-2]
    for early in range(3):
        at = (starts + early)[sizes > early]
        written[at] = counts[at]
    text, text_sizes = _digits(written)
    text_ends = np.cumsum(np.add.reduceat(text_sizes, starts))
    pixels = np.add.reduceat(ends - begins, firsts)
    found, begin = {}, 0
    for first, end, covered in zip(
        firsts.tolist(), text_ends.tolist(), pixels.tolist(), strict=True
    ):
        found[int(owners[first])] = Runs(covered, text[begin:end])
        begin = end
    return found


def _digits(numbers: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
    """The numbers as COCO writes them, one after the other, and how many letters each has.

    Digits of five bits, lowest first, in letters from 48 on; 32 says that more follow, and 16 in
    the last that the number is below zero.
    """
    # A number has as many digits as its two's complement needs.
    limits = 1 << (5 * np.arange(1, _MOST_DIGITS) - 1)
    magnitudes = np.where(numbers < 0, ~numbers, numbers)
    sizes = 1 + np.searchsorted(limits, magnitudes, side="right")
    widest = int(sizes.max())
    shifts = 5 * np.arange(widest)
    letters = (numbers[:, None] >> shifts) & 31
    place = np.arange(widest)
    letters += 48 + 32 * (place < sizes[:, None] - 1)
    text = letters.astype(np.uint8)[place < sizes[:, None]].tobytes().decode("ascii")
    return text, sizes
