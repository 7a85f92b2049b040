"""What all tests share: one thread a process, unless the environment says otherwise, and draws of their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads for small networks on a busy machine wait for each other

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that tests train alike beside a GPU; test_cuda.py takes it

import pytest
import torch
from hypothesis import HealthCheck, settings

from branchynet.data import archives
from helpers.networks import FAMILIES

# How fast the machine is decides nothing, and in CI all runs draw the same examples.
settings.register_profile(
    "suite", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before fixtures of modules too
def pytest_runtest_setup():
    """What a test draws does not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees the machine's data sets or downloads, unless it says so."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(archives, "_cache", lambda name: cache / name)
    monkeypatch.delenv(archives.VARIABLE, raising=False)


@pytest.fixture(params=FAMILIES, ids=lambda f: f.__name__)
def family(request):
    """The random networks, one kind after the other."""
    return request.param
