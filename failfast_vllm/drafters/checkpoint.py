"""What a drafter's weight files must hold, checked before vLLM builds a model. No vLLM, no torch.

vLLM ignores much of what is refused here: a tensor without a place, one that two shards hold. Files
are judged by their safetensors headers alone, in milliseconds; the weights while vLLM loads them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from failfast_vllm.drafters.errors import echo, reason
from failfast_vllm.drafters.families import Family
from failfast_vllm.drafters.layout import Shape, expected_shapes

INDEX = "model.safetensors.index.json"
DTYPES = ("F16", "BF16", "F32")
# buffers of old checkpoints; vLLM's AutoWeightsLoader drops the same ones
ROTARY_BUFFERS = (
    "rotary_pos_emb.inv_freq",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def check_files(path: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse weight files that vLLM could not load completely; raises ValueError.

    As in vLLM an index chooses the files, and all that they hold is loaded, whatever it says of
    single tensors; without one every `.safetensors` file counts.
    """
    files = {p.name: p for p in path.glob("*.safetensors") if not p.name.startswith(".")}
    if (path / INDEX).is_file():
        files = _choose(path / INDEX, files)
    shapes = expected_shapes(family, config)
    holders: dict[str, str] = {}  # tensor -> its file
    for shard, file in sorted(files.items()):
        for name, dtype, shape in read_header(file):
            if name in holders:
                raise ValueError(
                    f"failfast: the drafter's {file} holds {name!r}, which {holders[name]!r} also "
                    "holds; remove the file that does not belong to the checkpoint."
                )
            holders[name] = shard
            if _is_wanted(f"the drafter's {file}", name, shape, shapes) and dtype not in DTYPES:
                raise ValueError(
                    f"failfast: the drafter's {file} must have {name!r} as {', '.join(DTYPES)}; "
                    f"got {echo(dtype)}. Use unquantised weights."
                )
    check_complete(str(path), holders, shapes)


def _choose(index: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """The files that an index names; raises ValueError."""
    weight_map = read_json(index, "download it again.").get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(
            f"failfast: the drafter's {index} must have a 'weight_map' from tensors to files; "
            f"got {echo(weight_map)}. Download it again."
        )
    for name, shard in weight_map.items():
        if shard not in files:
            raise ValueError(
                f"failfast: the drafter's {index} puts {name!r} into {shard!r}, which is "
                "not there; download the checkpoint again."
            )
    return {shard: files[shard] for shard in weight_map.values()}


def check_complete(source: str, names: Iterable[str], shapes: Mapping[str, Shape]) -> None:
    """Refuse a checkpoint without one of its tensors; raises ValueError."""
    missing = shapes.keys() - set(names)
    if missing:
        raise ValueError(
            f"failfast: the drafter {source!r} lacks {len(missing)} of its {len(shapes)} tensors "
            f"(got no {min(missing)!r}); give a complete checkpoint."
        )


def check_tensors(
    source: str, weights: Iterable[tuple[str, Any]], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Any]]:
    """Pass on the tensors on their way into the model; raises ValueError at the first bad one.

    This is what a checkpoint from the hub meets, and what the weights of every one meet.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise ValueError(
                f"failfast: the drafter {source!r} holds {name!r} twice; "
                "remove the file that does not belong to the checkpoint."
            )
        seen.add(name)
        if not _is_wanted(f"the drafter {source!r}", name, tuple(tensor.shape), shapes):
            continue
        # NaN spreads to both; isfinite would build tensors of the same size
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise ValueError(
                f"failfast: the drafter {source!r} must have finite weights; got NaN or infinity "
                f"in {name!r}. Download it again."
            )
        yield name, tensor
    check_complete(source, seen, shapes)


def _is_wanted(where: str, name: str, shape: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Whether a tensor is one to load; raises ValueError if it has no place in the model."""
    if any(buffer in name for buffer in ROTARY_BUFFERS):
        return False
    # of a tied checkpoint too: vLLM uses it where it differs from the embedding
    is_head = name == "lm_head.weight"
    expected = shapes["model.embed_tokens.weight"] if is_head else shapes.get(name)
    if expected is None:
        raise ValueError(
            f"failfast: {where} holds {name!r}, for which its config.json has no place; "
            "use the config.json of the same checkpoint."
        )
    if shape != expected:
        raise ValueError(
            f"failfast: {where} must have {name!r} of shape {list(expected)}; "
            f"got {echo(list(shape))}. Use the config.json of the same checkpoint."
        )
    return True


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """What a file says, or nothing where it is no object; raises ValueError with the remedy."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a file")  # a pipe would be read for ever
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"failfast: cannot read the drafter's {file} ({reason(error)}); {remedy}"
        ) from None
    return found if isinstance(found, dict) else {}


def read_header(file: Path) -> Iterator[tuple[str, str, Shape]]:
    """(name, dtype, shape) of the tensors that a safetensors file declares; raises ValueError."""
    try:
        if not file.is_file():  # a pipe would be read for ever
            raise OSError("it is not a file")
        with safe_open(file, framework="np") as header:
            for name in header.keys():  # noqa: SIM118 - it is no mapping
                entry = header.get_slice(name)
                yield name, entry.get_dtype(), tuple(entry.get_shape())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"failfast: the drafter's weight file {file} is damaged ({reason(error)}); "
            "download it again."
        ) from None
