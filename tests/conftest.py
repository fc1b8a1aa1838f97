"""Settings of the test run: one thread, warnings are errors, the same hypothesis examples on every CI run."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors are slower with more, much so on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and so does a thread that spins while it waits for another
cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
if os.path.isabs(cache):  # not where there is no home
    os.environ.setdefault("MPLCONFIGDIR", f"{cache}/matplotlib")  # its list of fonts can take long to make
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # what is remembered between runs must not reach into the tests
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=25, **common)
settings.register_profile("ci", max_examples=25, derandomize=True, **common)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # torch's own forward-mode differentiation calls what torch itself has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def auto_is_the_cpu(request):
    """`--device auto` is the CPU, here and in processes that a test starts, but in test_gpu.py."""
    with pytest.MonkeyPatch.context() as patched:
        if request.path.name != "test_gpu.py":
            patched.setenv("CUDA_VISIBLE_DEVICES", "")
            patched.setattr(torch.cuda, "is_available", lambda: False)
        yield
