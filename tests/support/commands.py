"""What a command line did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout; an error when there is anything else."""
        return json.loads(self.out)

    def assert_refused(self) -> None:
        """Check that it failed with one cause and one remedy, and nothing on stdout."""
        assert (self.status, self.out) == (1, "")
        assert self.err.startswith("error: ")
        assert "\nremedy: " in self.err
        assert "Traceback" not in self.err
