"""One whole draft pass of the 1.5B drafter's shape: captured CUDA graph beside eager launches.

Random weights in plain torch, our attention, commit and confidence; the small operations between
the products go through `torch.compile` unless told otherwise. Needs a CUDA device, works without
vLLM. The floors are the bytes and products of the pass over the rates that the same run measures
for a copy and for a large product.

    python benchmarks/bench_draft_pass.py --json benchmarks/results/draft_pass.json
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import failfast_kernels
from cuda_timing import (
    copy_bytes_per_second,
    interleaved_us,
    matmul_flops_per_second,
    provenance,
    require_cuda,
    table,
)
from failfast_kernels import reference

PAGE_SIZE, BLOCK = 128, 32
ERROR = 5e-2  # of the last hidden states' norm: 28 layers of bfloat16 rounding in another order


class Shape(NamedTuple):
    """Defaults: Fast-dLLM v2 1.5B, which has Qwen2.5-1.5B's shape."""

    num_layers: int = 28
    hidden_size: int = 1536
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 8960
    vocab_size: int = 151_936
    mask_token_id: int = 151_665


def add_norm(hidden_states, delta, weight):
    hidden_states = hidden_states + delta
    return hidden_states, F.rms_norm(hidden_states, weight.shape, weight, 1e-6)


def rotate(x, cos, sin):
    """Rotary positions: x [num_rows, heads, head_dim], cos and sin [num_rows, 1, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def silu_product(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class DraftPass:
    """`num_seqs` sequences of `prefix` committed tokens, `rows` rows each."""

    def __init__(
        self, shape, num_seqs, rows, prefix, compiled, device="cuda", dtype=torch.bfloat16
    ):
        self.shape = shape

        def random(*size, scale=0.02):
            return torch.randn(*size, device=device, dtype=dtype).mul_(scale)

        width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.embedding = random(shape.vocab_size, shape.hidden_size)
        self.norm = torch.ones(shape.hidden_size, device=device, dtype=dtype)
        self.layers = [
            {
                "qkv": random(width + 2 * kv_width, shape.hidden_size),
                "bias": random(width + 2 * kv_width),
                "o": random(shape.hidden_size, width),
                "gate_up": random(2 * shape.intermediate_size, shape.hidden_size),
                "down": random(shape.hidden_size, shape.intermediate_size),
            }
            for _ in range(shape.num_layers)
        ]
        pages = -(-(prefix + rows) // PAGE_SIZE)
        size = (num_seqs * pages, PAGE_SIZE, shape.num_kv_heads, 2 * shape.head_dim)
        self.caches = [random(*size, scale=1.0).transpose(1, 2) for _ in self.layers]
        table = torch.randperm(num_seqs * pages, device=device).int().view(num_seqs, pages)
        self.batch = (
            table,
            torch.full((num_seqs,), prefix, device=device),
            torch.arange(num_seqs + 1, device=device) * rows,
        )
        num_rows = num_seqs * rows
        self.slots = torch.full((num_rows,), -1, device=device)  # nothing commits, the launch stays
        self.input_ids = torch.randint(shape.vocab_size, (num_rows,), device=device)
        positions = prefix + torch.arange(rows, device=device).repeat(num_seqs)
        halves = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = positions[:, None] / 1e6**halves
        angles = torch.cat([angles, angles], -1)[:, None]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.kv_bytes = num_seqs * prefix * 2 * kv_width * dtype.itemsize * shape.num_layers
        weights = [w for layer in self.layers for w in layer.values()] + [self.embedding]
        self.weight_bytes = sum(w.numel() for w in weights) * dtype.itemsize
        self.flops = 2 * num_rows * sum(w.numel() for w in weights)
        small = (add_norm, rotate, silu_product)
        self.small = [torch.compile(f, dynamic=False) for f in small] if compiled else small

    def hidden_states(self, kernels=failfast_kernels):
        """[num_rows, hidden_size] after the last norm."""
        shape = self.shape
        add_norm, rotate, silu_product = self.small
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        residual = F.embedding(self.input_ids, self.embedding)
        residual, x = add_norm(residual, 0.0, self.norm)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = F.linear(x, layer["qkv"], layer["bias"])
            query, key, value = qkv.unflatten(-1, (-1, shape.head_dim)).split(heads, 1)
            query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
            kernels.commit_kv(key, value, cache, self.slots)
            attended = kernels.block_diffusion_attention(
                query, key, value, cache, *self.batch, shape.head_dim**-0.5, BLOCK
            )
            residual, x = add_norm(residual, F.linear(attended.flatten(1), layer["o"]), self.norm)
            x = F.linear(silu_product(F.linear(x, layer["gate_up"])), layer["down"])
            residual, x = add_norm(residual, x, self.norm)
        return x

    def run(self):
        mask = self.shape.mask_token_id
        logits = F.linear(self.hidden_states(), self.embedding)
        return failfast_kernels.confidence_argmax(logits, mask, (mask,))

    def assert_agrees(self):
        """The kernels and the references lead to the same hidden states."""
        expected = self.hidden_states(reference).float()
        error = (self.hidden_states().float() - expected).norm() / expected.norm()
        assert float(error) <= ERROR, f"differs from the reference by {float(error):.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--no-compile", action="store_true", help="plain torch between products")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    facts = provenance()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    bandwidth, peak = copy_bytes_per_second(), matmul_flops_per_second()
    rows = []
    for num_seqs in args.num_seqs:
        draft = DraftPass(Shape(), num_seqs, args.rows, args.prefix, not args.no_compile)
        draft.assert_agrees()
        call = {"pass": lambda i, draft=draft: draft.run()}
        graph_us = interleaved_us(call, 1)["pass"]
        eager_us = interleaved_us(call, 1, graphs=False)["pass"]
        rows.append(
            {
                "sequences": num_seqs,
                "rows": num_seqs * args.rows,
                "graph ms": graph_us / 1e3,
                "eager ms": eager_us / 1e3,
                "memory floor ms": (draft.weight_bytes + draft.kv_bytes) / bandwidth * 1e3,
                "product floor ms": draft.flops / peak * 1e3,
            }
        )
        del draft, call
        torch.cuda.empty_cache()
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        measured = {"copy_bytes_per_second": bandwidth, "matmul_flops_per_second": peak}
        results = {"provenance": facts, **measured, "prefix": args.prefix, "rows": rows}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
