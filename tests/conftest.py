"""What every test shares: one thread a process, no GPU, and nothing of what the shell that started it is about."""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import sys
import tempfile

# Flags of a run, another cluster, a job's rank, colours: the suite may run in a batch job, or on a cluster's node.
_INHERITED = re.compile(
    r"ANABRANCH_(?!TEST_CACHE$)|(SLURM|TORCHELASTIC|MASTER)_|(RAY_ADDRESS|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE"
    r"|(GLOO|NCCL)_SOCKET_IFNAME|(FORCE|NO)_COLOR|COLUMNS)$"
)
for variable in filter(_INHERITED.match, list(os.environ)):
    del os.environ[variable]

# Two cores are all the suite asks for, and it starts many processes, which inherit this.
# Read when torch and its libraries load: set before any test module imports them.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

# The suite starts hundreds of processes: the first compiles this project's modules, and the others read that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What is measured once and kept: not in the user's home. Processes that this one starts share it.
if "ANABRANCH_TEST_CACHE" not in os.environ:
    os.environ["ANABRANCH_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
        prefix="anabranch-test-"
    )
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Ray keeps the first token that a process sees: all clusters that a test process starts must have the same.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The same examples on every run, however slow the machine.
hypothesis.settings.register_profile("anabranch", deadline=None, derandomize=True)
hypothesis.settings.load_profile("anabranch")


_LONG = (
    "test_train.py",
    "test_parity.py",
    "test_cluster.py",
    "test_gross_run.py",
    "test_checkpoint.py",
    "test_fault_matrix.py",
    "test_families.py",
    "test_measure.py",
    "test_shared_basis.py",
    "test_step.py",
    "test_elastic.py",
    "test_bench.py",
    "test_peak_memory.py",
    "test_report.py",
    "test_profile.py",
    "test_cru_net.py",
    "test_packaging.py",
    "test_resnext.py",
    "test_image_folder.py",
    "test_plan_command.py",
    "test_hostile.py",
    "test_optimal.py",
)


def _opted_in(config: pytest.Config) -> bool:
    return "optin" in config.getoption("markexpr")


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m optin` no GPU is seen: what is tested is the same on every machine. torch looks when it is asked."""
    if not _opted_in(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test's random numbers are its own, whichever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Opt-in tests run with `-m optin` only; the longest files begin, so that no process waits for one at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    if not _opted_in(config):
        for item in items:
            if item.get_closest_marker("optin"):
                item.add_marker(pytest.mark.skip(reason="opt in: run it with -m optin"))
