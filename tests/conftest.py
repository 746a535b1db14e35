"""Checks lorakit's signatures at run time, keeps libraries quiet and offline, and each test's environment its own."""

import os
from collections.abc import Iterator

import helpers.typecheck  # noqa: F401  the import hook finds it there
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
install_import_hook("lorakit", "helpers.typecheck.checker")
pytest_plugins = ["helpers.four_bits"]
settings.register_profile("lorakit", deadline=None)  # a busy machine is no failure
settings.load_profile("lorakit")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Takes back what a test has set: Dask's OMP_NUM_THREADS=1 would leave one core to all lessons that come after."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
