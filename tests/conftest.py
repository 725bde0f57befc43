import gc
import os

import pytest
from hypothesis import settings

# Tests use no network: a model id that is no folder must fail at once and not ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests leave the user's own cache alone.
os.environ["MODELATHE_CACHE"] = "none"
# Files of tests run side by side, on tiny models: more threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests share captured programs, millions of objects that stay: to walk through them as often as
# Python does by default takes a sixth of the time.
gc.set_threshold(100_000, 50, 100)
# The tokenizers' threads warn when a test forks after using them.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A busy machine is no failure, and a red run must be red again.
settings.register_profile("modelathe", deadline=None, derandomize=True)
settings.load_profile("modelathe")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite golden files that differ")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    """Whether golden files that differ are to be rewritten."""
    return bool(request.config.getoption("--accept"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
