from __future__ import annotations

import pytest
import torch

from modelathe.passes.cache.clusters import dbscan, grouped

ERRORS = torch.tensor([[0.1, 0.5], [0.3, 0.5], [0.31, 0.52], [0.9, 0.5], [0.29, 0.49]])
SAME = ((0, 1),) * 5


@pytest.mark.parametrize(
    ("most", "groups"),
    [
        (1, ((0, 1, 2, 3, 4),)),
        (2, ((0, 1, 2, 4), (3,))),
        (3, ((0,), (1, 2, 4), (3,))),
        (4, ((0,), (1, 4), (2,), (3,))),
        (5, ((0,), (1,), (2,), (3,), (4,))),
        (9, ((0,), (1,), (2,), (3,), (4,))),
    ],
)
def test_there_are_at_most_so_many_groups_of_near_blocks(
    most: int, groups: tuple[tuple[int, ...], ...]
) -> None:
    assert grouped(ERRORS, SAME, most) == groups
    assert grouped(ERRORS.clone(), SAME, most) == groups


def test_blocks_with_other_candidates_are_never_in_one_group() -> None:
    candidates = ((0,), (0, 1), (0, 1), (0,), (0, 1))
    assert grouped(ERRORS, candidates, 1) == ((0, 3), (1, 2, 4))


def test_errors_of_pairs_that_are_no_candidates_do_not_matter() -> None:
    errors = torch.tensor([[0.1, 7.0], [0.1, 0.0], [0.2, 0.0]])
    assert grouped(errors, ((0,),) * 3, 2) == ((0, 1), (2,))


def test_clusters_are_joined_by_steps_and_numbered_by_their_first_member() -> None:
    places = torch.tensor([0.0, 9.0, 1.0, 2.0, 8.5])
    far = (places[:, None] - places[None, :]).abs()
    assert dbscan(far, 1.0).tolist() == [0, 1, 0, 0, 1]
    assert dbscan(far, 0.0).tolist() == [0, 1, 2, 3, 4]
