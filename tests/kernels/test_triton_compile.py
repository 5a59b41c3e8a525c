"""The Triton kernels compiled for a GPU that is not there: the compiler needs none.

It builds sm_90 code and rejects what Triton's interpreter (`tests/interpreted`) lets through.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SM90_SHARED_BYTES = 232_448  # 227 KiB, most that one block of an H100 or H200 may have


def test_the_package_needs_neither_triton_nor_a_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, failfast_kernels as k\n"
        "assert k.confidence_argmax(torch.tensor([[0.0, 1.0]]), 2).token_ids.tolist() == [1]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "FAILFAST_TRITON"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("name", ["bench_kernels", "bench_draft_pass", "tune_kernels"])
def test_gpu_scripts_say_that_there_is_no_gpu(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py")]
    # as a user runs it, with the script's folder on the path
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("this benchmark measures a CUDA device")


class OfflineDriver:
    """Stands in for a GPU: launches reach the compiler and no further."""

    devices = itertools.count(100)  # Triton keeps compiled kernels per device: each test anew

    def __init__(self):
        self.device = next(self.devices)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


class Compiler:
    """What the launchers asked Triton to compile since the fixture was set up."""

    def __init__(self):
        self.kernels = []  # of `triton.compiler.CompiledKernel`, one per launch
        self.keys = set()  # distinct specialisations

    def launch_attention(self, num_seqs, num_rows, dtype=torch.bfloat16, head_dim=128, **options):
        """Ten rows or so of 12 query heads on 2 KV heads, as in Qwen2.5-1.5B."""
        from failfast_kernels import block_attention

        page_size, max_pages = options.pop("page_size", 128), options.pop("max_pages", 64)
        rows = torch.empty(num_rows, 16, head_dim, dtype=dtype)
        query, key, value = rows.split([12, 2, 2], dim=1)
        cache = torch.empty(2, page_size, 2, 2 * head_dim, dtype=dtype).transpose(1, 2)
        # slices that start anywhere: an address that is no multiple of 16 must not matter
        numbers = torch.empty(2 * num_seqs + 2, dtype=torch.int64)
        committed, starts = numbers[1 : num_seqs + 1], numbers[num_seqs + 1 :]
        table = torch.empty(num_seqs, max_pages, dtype=torch.int32)
        block_attention.block_diffusion_attention(
            query, key, value, cache, table, committed, starts, 0.1, **options
        )
        return query, key, value, cache

    def launch_commit(self, num_rows, dtype=torch.bfloat16, head_dim=128):
        from failfast_kernels import block_attention

        rows = torch.empty(num_rows, 4, head_dim, dtype=dtype)
        cache = torch.empty(2, 32, 2, 2 * head_dim, dtype=dtype).transpose(1, 2)
        slots = torch.empty(num_rows + 1, dtype=torch.int64)[1:]
        block_attention.commit_kv(*rows.split([2, 2], dim=1), cache, slots)

    def launch_confidence(self, num_rows, num_columns=151_936, dtype=torch.bfloat16, **options):
        from failfast_kernels import confidence

        logits = torch.empty(num_rows, num_columns, dtype=dtype)
        confidence.confidence_argmax(logits, num_columns - 271, (num_columns - 271,), **options)

    def launch_match(self, num_seqs, max_len=40_960, dtype=torch.int32, max_match=8):
        from failfast_kernels import copy_match

        token_ids = torch.empty(2, max_len, dtype=dtype)
        numbers = torch.empty(2 * num_seqs + 1, dtype=torch.int64)
        slots, known_lens = numbers[1 : num_seqs + 1], numbers[num_seqs + 1 :]
        texts = token_ids, slots, known_lens
        found = copy_match.match_suffixes(*texts, 2, max_match, max_len)
        copy_match.continue_matches(*texts, found.starts, max_match, 2 * max_len, -max_match)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A `Compiler` that really compiles each launch for sm_90 and runs none."""
    triton = pytest.importorskip("triton")
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(driver, "_active", OfflineDriver())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compiler = Compiler()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiler.kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compiler


@pytest.fixture
def specialisations(offline, monkeypatch):
    """The same, but a compilation is only counted."""
    from triton.runtime.jit import JITFunction

    def count(self, key, *args):
        offline.keys.add((self.__name__, key))

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    return offline


def stack_bytes(kernel):
    """Bytes per thread that did not fit its registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def assert_builds(kernels):
    assert kernels
    for kernel in kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SM90_SHARED_BYTES
        assert stack_bytes(kernel) == 0, "the launch table asks for more registers than there are"


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "num_splits"), [(1, 16), (10, 1), (10, 16), (40, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_compiles_for_sm90(offline, dtype, head_dim, rows, num_splits):
    offline.launch_attention(4, 4 * rows, dtype, head_dim, num_splits=num_splits)
    assert len(offline.kernels) == (1 if num_splits == 1 else 2)
    assert_builds(offline.kernels)
    ptx = offline.kernels[0].asm["ptx"]
    if dtype != torch.float32:
        assert "mma" in ptx, "the products must run on the tensor cores"
        assert "cp.async" in ptx, "the pages must be prefetched"


@pytest.mark.parametrize("page_size", [32, 48])
def test_attention_compiles_for_tiles_across_pages(offline, page_size):
    options = {"page_size": page_size, "diffusion_block_size": 16}
    offline.launch_attention(4, 40, num_splits=1, **options)
    assert_builds(offline.kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_commit_and_confidence_compile_for_sm90(offline, dtype):
    offline.launch_commit(40, dtype)
    for num_splits in (1, 16):
        offline.launch_confidence(10, dtype=dtype, num_splits=num_splits)
    assert_builds(offline.kernels)
    loads = offline.kernels[1].asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", loads), "the logits must be read 16 bytes at a time"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prompt_lookup_compiles_for_sm90(offline, dtype):
    offline.launch_match(64, dtype=dtype)
    assert len(offline.kernels) == 3
    assert_builds(offline.kernels)


def test_the_copy_lane_compiles_nothing_while_serving(specialisations, monkeypatch):
    from failfast_vllm.drafting.copying import OwnText

    monkeypatch.setenv("FAILFAST_TRITON", "1")
    OwnText(50_000, torch.device("cpu")).warm_up()
    warm = set(specialisations.keys)
    assert len(warm) == 3
    specialisations.launch_match(9, max_len=333, max_match=8)
    assert set(specialisations.keys) == warm


def test_no_batch_shape_compiles_again(specialisations):
    """A server that has seen every class of `launch_table` compiles nothing more."""
    for num_seqs in range(1, 150):
        for rows in (1, 2, 10, 33, 100):
            specialisations.launch_attention(num_seqs, num_seqs * rows)
    attention = {key for key in specialisations.keys if key[0] == "_attention_kernel"}
    assert len(attention) == 3 * 3  # rows per tile x splits
    for num_rows in range(1, 400):
        specialisations.launch_commit(num_rows)
        specialisations.launch_confidence(num_rows, num_columns=8192 * 19)
        specialisations.launch_match(num_rows, max_len=100 + num_rows, max_match=2 + num_rows % 16)
    names = [name for name, _ in specialisations.keys]
    assert names.count("_commit_kernel") == 1
    for name in ("_match_kernel", "_select_kernel", "_continue_kernel"):
        assert names.count(name) == 1
    assert names.count("_confidence_kernel") == 4  # splits
