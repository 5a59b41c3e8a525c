"""Engine environment for the whole suite: one process, small cache, no hub."""

import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; a second thread only waits for a core
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# these change how vLLM starts: a process of their own
if "TRITON_INTERPRET" not in os.environ:
    collect_ignore = ["interpreted"]


# over a minute: with two workers one would wait for the last of them
LONGEST = (
    "test_v2.py",
    "test_v2_requests.py",
    "test_http.py",
    "test_parallel.py",
    "test_lossless.py",
    "test_mixed_batches.py",
    "test_drafter_state.py",
    "test_policies_engine.py",
    "test_targets.py",
    "test_examples_served.py",
    "test_chaos.py",
    "test_fuzz_engine.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, then those with slow tests."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))

    def order(item):
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), -slow[item.path]

    items.sort(key=order)
