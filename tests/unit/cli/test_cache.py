from __future__ import annotations

from pathlib import Path

import pytest

from modelathe.cli.cache import cache_folder


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MODELATHE_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, Path("/mine")),
        ({"MODELATHE_CACHE": ""}, None),
        ({"MODELATHE_CACHE": "none"}, None),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/modelathe")),
        ({"XDG_CACHE_HOME": "relative"}, Path("/home/me/.cache/modelathe")),
        ({}, Path("/home/me/.cache/modelathe")),
    ],
    ids=str,
)
def test_the_folder_is_the_users_choice_or_their_own(
    variables: dict[str, str], folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODELATHE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == folder
