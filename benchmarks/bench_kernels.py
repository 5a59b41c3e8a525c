"""The Triton kernels beside what one would use instead, at the shapes of Qwen2.5-1.5B.

Needs a CUDA device; works without vLLM. Every candidate must first
agree with the reference in float32: ours failing ends the run, a rival failing leaves it out.
Inputs rotate through more memory than the L2 cache holds, all candidates take turns inside
captured graphs (where they can be captured), and a figure is the median.

    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json --plot roofline.png
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from cuda_timing import (
    copy_bytes_per_second,
    interleaved_us,
    matmul_flops_per_second,
    num_copies,
    provenance,
    require_cuda,
    table,
)

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 12, 2, 128
GROUP_SIZE = NUM_HEADS // NUM_KV_HEADS
VOCAB_SIZE, MASK_TOKEN_ID = 151_936, 151_665
PAGE_SIZE, BLOCK = 128, 32
SCALE = HEAD_DIM**-0.5
TOLERANCE = 2e-2  # bfloat16, outputs of order 1; the tests say why


class Attention:
    """`batch` sequences of `prefix` committed tokens and `rows` rows, in several copies.

    The pages also hold the keys of the rows themselves, because the rivals read them there; ours
    must not, and takes them from `key` and `value`.
    """

    def __init__(self, batch, prefix, rows):
        self.batch, self.prefix, self.rows = batch, prefix, rows
        self.num_keys = prefix + rows
        pages = -(-self.num_keys // PAGE_SIZE)
        self.kv_bytes = batch * prefix * NUM_KV_HEADS * 2 * HEAD_DIM * 2
        self.row_bytes = batch * rows * (2 * NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM * 2
        self.copies = num_copies(self.kv_bytes)

        def random(*shape):
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

        num_rows = batch * rows
        self.query = random(num_rows, NUM_HEADS, HEAD_DIM)
        self.key, self.value = random(2, num_rows, NUM_KV_HEADS, HEAD_DIM)
        self.table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        shape = (self.copies, batch * pages, PAGE_SIZE, NUM_KV_HEADS, 2 * HEAD_DIM)
        self.caches = random(*shape).transpose(2, 3)
        positions = torch.arange(prefix, self.num_keys, device="cuda")
        slots = self.table[:, positions // PAGE_SIZE].long(), positions % PAGE_SIZE
        own = torch.cat([self.key, self.value], -1).view(batch, rows, NUM_KV_HEADS, 2 * HEAD_DIM)
        for cache in self.caches:
            cache[slots[0], :, slots[1].expand_as(slots[0])] = own
        self.committed = torch.full((batch,), prefix, device="cuda")
        self.starts = torch.arange(batch + 1, device="cuda") * rows
        self.output = torch.empty_like(self.query)

    @property
    def flops(self):
        return 4 * self.batch * self.rows * self.num_keys * NUM_HEADS * HEAD_DIM

    def arguments(self, cache):
        return (
            self.query,
            self.key,
            self.value,
            cache,
            self.table,
            self.committed,
            self.starts,
            SCALE,
            BLOCK,
        )

    def ours(self):
        from failfast_kernels.block_attention import block_diffusion_attention

        def call(i):
            return block_diffusion_attention(*self.arguments(self.caches[i]), output=self.output)

        return call

    def torch_sdpa(self):
        """The package's reference: gathers the prefix, then SDPA with a mask."""
        from failfast_kernels.reference import block_diffusion_attention, plan_padding

        groups = plan_padding(
            self.table,
            self.committed,
            self.starts,
            PAGE_SIZE,
            GROUP_SIZE,
            self.query.dtype,
            BLOCK,
        )
        return lambda i: block_diffusion_attention(*self.arguments(self.caches[i]), groups=groups)

    def flex_attention(self):
        """Compiled, static shapes; reads keys that were gathered outside the timing."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        prefix = self.prefix

        def sees(b, h, q, k):
            return (k < prefix) | ((k - prefix) // BLOCK <= q // BLOCK)

        mask = create_block_mask(sees, None, None, self.rows, self.num_keys, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        heads_first = self.query.view(self.batch, self.rows, NUM_HEADS, HEAD_DIM).transpose(1, 2)
        gathered = []
        for cache in self.caches:
            tokens = cache[self.table.long()].transpose(2, 3).flatten(1, 2)[:, : self.num_keys]
            gathered.append(tokens.transpose(1, 2).contiguous().split(HEAD_DIM, -1))

        def call(i):
            keys, values = gathered[i]
            found = compiled(
                heads_first, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True
            )
            return found.transpose(1, 2).reshape(self.query.shape)

        return call

    def virtual_requests(self):
        """One non-causal request per diffusion block: (cu_seqlens_q, lengths, table)."""
        ends = [min(e, self.rows) for e in range(BLOCK, self.rows + BLOCK, BLOCK)]
        per_sequence = torch.tensor([0, *ends]).diff().repeat(self.batch)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), per_sequence.cumsum(0)])
        lengths = torch.tensor(ends).add(self.prefix).repeat(self.batch)
        tables = self.table.repeat_interleave(len(ends), 0)
        return starts.int().cuda(), lengths.int().cuda(), tables

    def flash_attn(self):
        """flash-attn's varlen kernel over the pages; its own keys were written beforehand."""
        from flash_attn import flash_attn_varlen_func

        starts, lengths, tables = self.virtual_requests()
        key_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()])
        pages = [c.transpose(1, 2).split(HEAD_DIM, -1) for c in self.caches]

        def call(i):
            return flash_attn_varlen_func(
                self.query,
                *pages[i],
                cu_seqlens_q=starts,
                cu_seqlens_k=key_starts,
                max_seqlen_q=min(self.rows, BLOCK),
                max_seqlen_k=self.num_keys,
                softmax_scale=SCALE,
                causal=False,
                block_table=tables,
            )

        return call

    def vllm_flash_attn(self):
        """vLLM's build of flash-attn, likewise."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        starts, lengths, tables = self.virtual_requests()
        pages = [c.transpose(1, 2).split(HEAD_DIM, -1) for c in self.caches]

        def call(i):
            return flash_attn_varlen_func(
                self.query,
                *pages[i],
                cu_seqlens_q=starts,
                seqused_k=lengths,
                max_seqlen_q=min(self.rows, BLOCK),
                max_seqlen_k=self.num_keys,
                softmax_scale=SCALE,
                causal=False,
                block_table=tables,
            )

        return call

    def vllm_unified_attention(self):
        """vLLM's Triton kernel, likewise."""
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        starts, lengths, tables = self.virtual_requests()
        pages = [c.transpose(1, 2).split(HEAD_DIM, -1) for c in self.caches]

        def call(i):
            unified_attention(
                q=self.query,
                k=pages[i][0],
                v=pages[i][1],
                out=self.output,
                cu_seqlens_q=starts,
                max_seqlen_q=min(self.rows, BLOCK),
                seqused_k=lengths,
                max_seqlen_k=self.num_keys,
                softmax_scale=SCALE,
                causal=False,
                window_size=(-1, -1),
                block_table=tables,
                softcap=0.0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
            )
            return self.output

        return call

    RIVALS = (
        "torch_sdpa",
        "flex_attention",
        "flash_attn",
        "vllm_flash_attn",
        "vllm_unified_attention",
    )

    def candidates(self, rivals=RIVALS):
        """{name: call} of those that can be built and agree with the reference."""
        from failfast_kernels.reference import block_diffusion_attention

        exact = [
            x.float() if x.is_floating_point() else x for x in self.arguments(self.caches[0])[:7]
        ]
        expected = block_diffusion_attention(*exact, SCALE, BLOCK)
        calls = {"ours": self.ours()}
        assert_agrees(calls["ours"](0), expected)
        for name in rivals:
            try:
                call = getattr(self, name)()
                assert_agrees(call(0), expected)
                calls[name] = call
            except Exception as error:  # a rival's absence or failure is a finding, not an end
                print(f"  {name} left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return calls


def assert_agrees(found, expected):
    error = float((found.float() - expected).abs().max())
    assert error <= TOLERANCE, f"differs from the reference by {error:.3g}"


def bench_attention(args, bandwidth):
    rows = []
    for batch in args.batch_sizes:
        for prefix in args.prefixes:
            for num_rows in args.rows:
                case = Attention(batch, prefix, num_rows)
                for name, us in interleaved_us(case.candidates(args.rivals), case.copies).items():
                    rate = (case.kv_bytes + case.row_bytes) / us * 1e6
                    rows.append(
                        {
                            "batch": batch,
                            "prefix": prefix,
                            "rows": num_rows,
                            "kernel": name,
                            "us": us,
                            "GB/s": rate / 1e9,
                            "of copy": rate / bandwidth,
                            "TFLOP/s": case.flops / us / 1e6,
                            "FLOP/B": case.flops / (case.kv_bytes + case.row_bytes),
                        }
                    )
    return rows


def bench_confidence(args, bandwidth):
    from failfast_kernels.confidence import confidence_argmax
    from failfast_kernels.reference import confidence_argmax as reference

    def softmax_max(logits):
        logits = logits[:, :MASK_TOKEN_ID].float()
        return F.softmax(logits, -1).max(-1)

    rows = []
    compiled = torch.compile(softmax_max)
    for num_rows in args.confidence_rows:
        num_bytes = num_rows * VOCAB_SIZE * 2
        copies = num_copies(num_bytes)
        logits = torch.randn(copies, num_rows, VOCAB_SIZE, device="cuda").mul_(3).bfloat16()
        expected = reference(logits[0], MASK_TOKEN_ID)
        found = confidence_argmax(logits[0], MASK_TOKEN_ID)
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-5, atol=0)
        calls = {
            "ours": lambda i, z=logits: confidence_argmax(z[i], MASK_TOKEN_ID),
            "torch": lambda i, z=logits: softmax_max(z[i]),
            "torch.compile": lambda i, z=logits: compiled(z[i]),
        }
        for name, us in interleaved_us(calls, copies).items():
            rate = num_bytes / us * 1e6
            rows.append(
                {
                    "rows": num_rows,
                    "kernel": name,
                    "us": us,
                    "GB/s": rate / 1e9,
                    "of copy": rate / bandwidth,
                }
            )
    return rows


def plot(rows, bandwidth, peak, path):
    """Roofline: attained TFLOP/s over FLOP per byte, under the two measured ceilings."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = plt.subplots(figsize=(7, 5))
    intensities = [2.0**i for i in range(11)]
    ceiling = [min(bandwidth * i, peak) / 1e12 for i in intensities]
    axes.loglog(intensities, ceiling, color="black", label="measured copy and matmul")
    for name in dict.fromkeys(row["kernel"] for row in rows):
        points = [row for row in rows if row["kernel"] == name]
        axes.scatter(
            [p["FLOP/B"] for p in points], [p["TFLOP/s"] for p in points], s=12, label=name
        )
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 32, 42])
    parser.add_argument("--confidence-rows", type=int, nargs="+", default=[10, 64, 320, 1024])
    rivals = Attention.RIVALS
    parser.add_argument("--rivals", nargs="*", choices=rivals, default=rivals, help="default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    facts = provenance()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    bandwidth, peak = copy_bytes_per_second(), matmul_flops_per_second()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s, matmul: {peak / 1e12:.0f} TFLOP/s", flush=True)
    attention = bench_attention(args, bandwidth)
    print(table(attention), flush=True)
    confidence = bench_confidence(args, bandwidth)
    print(table(confidence))
    if args.plot:
        plot(attention, bandwidth, peak, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        measured = {"copy_bytes_per_second": bandwidth, "matmul_flops_per_second": peak}
        results = {
            "provenance": facts,
            **measured,
            "attention": attention,
            "confidence": confidence,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
