"""Engine environment for the whole suite: one process, small cache, no hub."""

import os
from collections import Counter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; a second thread only waits for a core
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# these change how vLLM starts: a process of their own
if "TRITON_INTERPRET" not in os.environ:
    collect_ignore = ["interpreted"]


# over half a minute, the longest first: with two workers one would wait for the last of them
LONGEST = (
    "test_v2.py",
    "test_v2_requests.py",
    "test_ahead.py",
    "test_triton_kernels.py",
    "test_parallel.py",
    "test_examples_served.py",  # before test_http.py, which ends their server
    "test_http.py",
    "test_mixed_batches.py",
    "test_startup.py",
    "test_drafter_state.py",
    "test_planner_engine.py",
    "test_sampling.py",
    "test_chaos.py",
    "test_bench.py",
    "test_lossless.py",
    "test_gpu_kit.py",
    "test_policies_engine.py",
    "test_fuzz_engine.py",
    "test_cli.py",
    "test_targets.py",
)
ONE_SERVER = ("test_examples_served.py", "test_http.py")


def pytest_collection_modifyitems(items):
    """The longest files first, then those with slow tests."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))

    def order(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), -slow[item.path]

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile` one worker takes all files that share the server."""
    from xdist.scheduler import LoadFileScheduling

    class FilesOfAServer(LoadFileScheduling):
        def _split_scope(self, nodeid):
            path = super()._split_scope(nodeid)
            return "one server" if path.endswith(ONE_SERVER) else path

    return FilesOfAServer(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One `vllm serve` with failfast for all tests over HTTP that do not ask for another."""
    from http_server import started_by_systemd

    with started_by_systemd(tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running
