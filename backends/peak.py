"""How much memory opening and running an artifact adds, in a process that does nothing else.

Run as a program (``python -m modelathe.backends.peak FOLDER THREADS MODULE``, of the artifact's
backend) it prints that number.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from ..ir.errors import StorageError
from .manifest import read_manifest
from .session import Session, backend_of, open_artifact
from .workload import run_once

_STATUS = Path("/proc/self/status")


def peak_memory(session: Session) -> int | None:
    """Return bytes of resident memory that opening and running the artifact adds at its peak.

    None where the system does not tell (it is read from /proc).

    Raises:
        StorageError: the process that measures it failed.
    """
    threads = str(session.settings.get("threads", 0))
    module = backend_of(session.folder, session.manifest).__module__
    # -P: the working directory must not be searched for modules.
    command = [sys.executable, "-P", "-m", __name__, str(session.folder.resolve()), threads, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout.split()
    if done.returncode or not words:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StorageError(f"measuring the memory of {session.folder} failed: {last}")
    return int(words[-1]) if words[-1].isdigit() else None


def resident(*, peak: bool) -> int | None:
    """Return resident bytes of this process, now or at the peak; None where that is not known."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def main() -> None:
    """Print the bytes that the artifact of the command line adds."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    importlib.import_module(sys.argv[3])
    # What code takes is not memory of the model.
    for module in backend_of(folder, read_manifest(folder)).runtime:
        importlib.import_module(module)
    before = resident(peak=False)
    run_once(open_artifact(folder, threads=threads))
    after = resident(peak=True)
    sys.stdout.write("unknown\n" if before is None or after is None else f"{after - before}\n")


if __name__ == "__main__":
    main()
