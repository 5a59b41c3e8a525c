"""Do torch, Triton and vLLM's extensions work on this card? One kernel of each runs.

python benchmarks/gpu/probe.py [--json PATH]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

BFLOAT16_ERROR = 3e-2  # of outputs of order 1


def assert_close(found, expected):
    error = float((found.float() - expected.float()).abs().max())
    assert error <= BFLOAT16_ERROR, f"differs by {error:.3g}"
    return f"largest error {error:.3g}"


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def card():
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    text = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {free >> 30} of {total >> 30} GiB"
    assert (major, minor) == (9, 0), f"not a Hopper card: {text}"
    return text


def triton_kernel():
    from failfast_kernels import block_attention

    key, value = random(2, 3, 2, 64)
    cache = torch.zeros(1, 2, 32, 128, device="cuda", dtype=torch.bfloat16)
    block_attention.commit_kv(key, value, cache, torch.tensor([4, -1, 0], device="cuda"))
    expected = torch.cat([key[0], value[0]], -1)
    return assert_close(cache[0, :, 4], expected)


def vllm_platform():
    from vllm.platforms import current_platform

    assert current_platform.is_cuda(), f"vLLM sees {type(current_platform).__name__}"
    current_platform.import_kernels()
    return str(current_platform.get_device_capability())


def vllm_rms_norm():
    from vllm import _custom_ops

    x, weight = random(64, 3584), random(3584)
    found = torch.empty_like(x)
    _custom_ops.rms_norm(found, x, weight, 1e-6)
    # by the largest weight: rounding is relative
    expected = F.rms_norm(x.float(), (3584,), weight.float(), 1e-6)
    return assert_close(found / weight.abs().max(), expected / weight.abs().max())


def vllm_silu():
    x = random(64, 2048)
    found = torch.empty(64, 1024, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(found, x)
    gate, up = x.float().chunk(2, -1)
    expected = F.silu(gate) * up
    scale = expected.abs().clamp(min=1)  # rounding is relative
    return assert_close(found / scale, expected / scale)


def vllm_flash_attention_3():
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    num_rows, num_keys, page_size = 11, 200, 32
    query = random(num_rows, 28, 128)
    keys, values = random(2, 8, page_size, 4, 128)
    found = flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=num_rows,
        cu_seqlens_q=torch.tensor([0, num_rows], device="cuda", dtype=torch.int32),
        max_seqlen_k=num_keys,
        seqused_k=torch.tensor([num_keys], device="cuda", dtype=torch.int32),
        causal=True,
        block_table=torch.arange(8, device="cuda", dtype=torch.int32)[None],
        fa_version=3,
    )
    k, v = (x.flatten(0, 1)[:num_keys].float().transpose(0, 1) for x in (keys, values))
    mask = torch.ones(num_rows, num_keys, device="cuda", dtype=torch.bool)
    mask = mask.tril(num_keys - num_rows)
    expected = F.scaled_dot_product_attention(
        query.float().transpose(0, 1)[None], k[None], v[None], mask, enable_gqa=True
    )
    return assert_close(found, expected[0].transpose(0, 1))


CHECKS = (card, triton_kernel, vllm_platform, vllm_rms_norm, vllm_silu, vllm_flash_attention_3)


def probe(checks):
    """{check: what it found, or its error}, and the names of those that failed."""
    found, failed = {}, []
    for check in checks:
        try:
            found[check.__name__] = check()
        except Exception as error:  # whatever a binary that does not fit may raise
            found[check.__name__] = f"FAILED: {type(error).__name__}: {error}"[:500]
            failed.append(check.__name__)
        print(f"{check.__name__}: {found[check.__name__]}", flush=True)
    return found, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found, failed = probe(CHECKS)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("failed: " + ", ".join(failed) if failed else "all fine")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
