"""Where commands keep what is worth keeping from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MODELATHE_CACHE"


def cache_folder() -> Path | None:
    """Return the folder that ``MODELATHE_CACHE`` names, else the user's own; it need not exist.

    The user's own is ``$XDG_CACHE_HOME/modelathe`` or ``~/.cache/modelathe``.  None where the
    variable is empty or ``none``, and where the user has no home.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen in ("", "none") else Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # not set, or to be ignored, as that standard says
        base = Path(os.path.expanduser("~/.cache"))
    return base / "modelathe" if base.is_absolute() else None
