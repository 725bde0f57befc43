"""Blocks that are alike: those that one choice of widths will do for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped(
    errors: Tensor, candidates: Sequence[tuple[int, ...]], most: int
) -> tuple[tuple[int, ...], ...]:
    """Return blocks in groups: those of one group have the same candidates and similar errors.

    Blocks are split by their candidates, then DBSCAN clusters the error vectors of each part.
    Its radius is the smallest one, for all parts, with which there are at most ``most`` groups (or
    as many as there are parts); a neighbourhood may be one block, so that none is noise.  The
    radius rule and the name of the algorithm are a reconstruction: the release of KVTuner has
    finished tables.

    Args:
        errors: [blocks, pairs].
        candidates: of each block, indices of pairs.
        most: at least 1.
    """
    number = {part: i for i, part in enumerate(dict.fromkeys(candidates))}
    parts = torch.tensor([number[one] for one in candidates])
    features = torch.stack([_only(row, own) for row, own in zip(errors, candidates, strict=True)])
    far = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    far = torch.where(parts[:, None] == parts[None, :], far, torch.inf)
    radii = far[far.isfinite()].sort().values  # the first is 0
    low, high = 0, len(radii) - 1
    while low < high:
        middle = (low + high) // 2
        few = int(dbscan(far, float(radii[middle])).max()) < most
        low, high = (low, middle) if few else (middle + 1, high)
    labels = dbscan(far, float(radii[low])).tolist()
    return tuple(
        tuple(i for i, one in enumerate(labels) if one == label) for label in range(max(labels) + 1)
    )


def dbscan(far: Tensor, radius: float) -> Tensor:
    """Return the cluster of each point, int64 [points], numbered in the order of first members.

    DBSCAN (Ester et al. 1996) where one point is enough for a neighbourhood: every point is a core
    point, and clusters are what steps of at most ``radius`` join.

    Args:
        far: distances, [points, points].
        radius: at least 0.
    """
    near = far <= radius
    labels = torch.arange(len(far))
    while True:
        least = torch.where(near, labels, len(far)).amin(1)
        if torch.equal(least, labels):
            first = labels == torch.arange(len(far))
            return (first.cumsum(0) - 1)[labels]
        labels = least


def _only(row: Tensor, own: tuple[int, ...]) -> Tensor:
    """Return errors with those of pairs that are no candidates at 0."""
    kept = torch.zeros_like(row)
    kept[list(own)] = row[list(own)]
    return kept
