"""passes and backends: what the classes say about themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from modelathe.backends import ALL_BACKENDS
from modelathe.cli.tables import read_table
from modelathe.passes import ALL_PASSES

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("layer", "table", "kinds"),
    [("passes", "ALL_PASSES", ALL_PASSES), ("backends", "ALL_BACKENDS", ALL_BACKENDS)],
)
def test_the_table_read_from_source_is_what_the_classes_say(
    cli: Cli, layer: str, table: str, kinds: tuple[type[Any], ...]
) -> None:
    told = cli(layer, "--json").json
    keys = ("name", "summary", "fidelity")
    assert read_table(layer, table) == [{k: one[k] for k in keys if k in one} for one in told]
    assert [one["name"] for one in told] == [kind.name for kind in kinds]


@pytest.mark.parametrize("kind", [*ALL_PASSES, *ALL_BACKENDS], ids=lambda kind: kind.name)
def test_each_is_shown_with_all_of_its_options(cli: Cli, kind: type[Any]) -> None:
    command = "backends" if kind in ALL_BACKENDS else "passes"
    shown = cli(command, kind.name)
    told = cli(command, kind.name, "--json").json
    assert shown.status == 0
    assert told["summary"] in shown.out
    for option in told["options"]:
        assert option["name"] in shown.out
        assert option["doc"], f"{kind.name}: {option['name']} has no entry under Attributes"


def test_a_pass_outside_this_package_is_shown_by_its_import_path(cli: Cli) -> None:
    path = "modelathe.passes.canonicalize:Canonicalize"
    assert cli("passes", path, "--json").json == cli("passes", "canonicalize", "--json").json
    refused = cli("passes", "modelathe.passes:PassContext")
    assert refused.status != 0
    assert "must be a frozen dataclass that derives from Pass" in refused.err


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys; from modelathe.cli import main; main(['passes']); main(['backends']);"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "quantize-weights" in done.stdout
    assert "onnx" in done.stdout
