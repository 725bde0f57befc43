"""Passes that other packages offer by entry point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from modelathe.ir import PassError
from modelathe.passes import REGISTRY, FoldNorms, all_passes, spec


@dataclass(frozen=True)
class Point:
    kind: Any
    name: str = "theirs"
    value: str = "their_package:Kind"

    def load(self) -> Any:
        return self.kind


class Mine(FoldNorms):
    name = "mine"


class Clash(FoldNorms):
    name = "fold-norms"


def install(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    points = {"modelathe.passes": [Point(kind)]}
    monkeypatch.setattr(spec, "entry_points", lambda group: points[group])


def test_an_installed_pass_is_listed_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Mine)
    assert all_passes() == {**REGISTRY, "mine": Mine}


@pytest.mark.parametrize(
    ("kind", "message"),
    [(int, "theirs .* is no pass"), (Clash, "two classes are called fold-norms")],
)
def test_an_installed_class_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: Any, message: str
) -> None:
    install(monkeypatch, kind)
    with pytest.raises(PassError, match=message):
        all_passes()
