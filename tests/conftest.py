"""What every test runs under: no model hub, one thread a worker, the same random numbers each time."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SARAC_CACHE"] = "off"  # what a test measures, it measures; those about the cache say where it is
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the commands that tests start inherit it
os.environ.setdefault("MPLBACKEND", "agg")

import functools
import gc
import random

import hypothesis
import numpy as np
import pytest
import torch
from once import share_tables

share_tables()
# Workers share the cores; and a sum over two threads has other last bits than a sum over one.
torch.set_num_threads(1)


class TorchRandom:
    """torch's global generator in the form that hypothesis seeds, so that an example that failed fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it by a weak reference
hypothesis.register_random(TORCH_RANDOM)
hypothesis.settings.register_profile("local", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Workers share no fixture: the tests of a file with one for the whole module go to one worker, the others to any."""
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _shares(config.rootpath / file) else nodeid

    return Shared(config, log)


@functools.cache
def _shares(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")


def pytest_collection_finish() -> None:
    """What is imported stays: among its half a million objects a collection of garbage takes 0.3 s, and exports start many."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed every generator before a test's fixtures draw from it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is the one that other libraries draw from
    torch.manual_seed(0)
