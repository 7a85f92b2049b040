"""Shared settings: one thread per process unless the environment says otherwise, and a seed per test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with small networks on a busy machine, threads wait for each other

os.environ.setdefault(
    "ACCELERATE_USE_CPU", "true"
)  # tests train on the CPU also if there is a GPU; test_cuda.py uses the GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

from branchynet.data import archives
from helpers.networks import FAMILIES
from helpers.quick_exports import keep_tables

# Without deadlines, slow machines pass too; in CI, all runs draw the same examples.
settings.register_profile(
    "suite", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

keep_tables()


@pytest.hookimpl(tryfirst=True)  # also before fixtures of modules
def pytest_runtest_setup():
    """Seed all generators, so that a test does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Hide the machine's data sets and downloads from tests that do not request them."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(archives, "_cache", lambda name: cache / name)
    monkeypatch.delenv(archives.VARIABLE, raising=False)


@pytest.fixture(params=FAMILIES, ids=lambda f: f.__name__)
def family(request):
    """Each function that builds a random network, in turn."""
    return request.param


@pytest.fixture
def full_precision():
    """TF32 rounds to 10 bits, which is more than the oracle allows."""
    modules = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, allowed in zip(modules, before, strict=True):
        module.allow_tf32 = allowed
