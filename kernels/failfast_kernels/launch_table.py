"""Launch configurations of the Triton kernels, one per shape class. Imports no Triton.

Nothing else decides: no autotuning and no device query, so a server compiles each class once.
"""

from collections.abc import Sequence
from typing import NamedTuple


class AttentionLaunch(NamedTuple):
    """Of one program of the attention kernel."""

    block_n: int  # keys per step
    num_warps: int
    num_stages: int  # depth of the software pipeline over the keys


class ConfidenceLaunch(NamedTuple):
    """Of one program of the confidence kernel."""

    block_n: int  # columns per step
    num_warps: int


def num_splits(classes: Sequence[int], num_programs: int, most: int) -> int:
    """The smallest class of splits, at most `most`, with which `num_programs` fill the device."""
    wanted = next((s for s in classes if s * num_programs >= TARGET_PROGRAMS), classes[-1])
    return max(s for s in classes if s <= min(wanted, most))


# Below this line `benchmarks/tune_kernels.py` writes.

PROVENANCE = "chosen by hand; on an H200 those of (128, 2, 64) and the splits beat what was tried"

# (head_dim class, bytes per element, packed rows per program); a smaller head_dim uses the next
# class. The shapes of float32 are small because its exact products run outside the tensor cores.
ATTENTION = {
    (64, 2, 16): AttentionLaunch(64, 4, 3),
    (64, 2, 64): AttentionLaunch(64, 4, 3),
    (64, 2, 128): AttentionLaunch(64, 8, 3),
    (128, 2, 16): AttentionLaunch(64, 4, 3),
    (128, 2, 64): AttentionLaunch(64, 4, 2),
    (128, 2, 128): AttentionLaunch(64, 8, 2),
    (64, 4, 16): AttentionLaunch(32, 8, 2),
    (64, 4, 32): AttentionLaunch(32, 8, 2),
    (128, 4, 16): AttentionLaunch(32, 8, 2),
    (128, 4, 32): AttentionLaunch(16, 8, 2),
}

# bytes per element
CONFIDENCE = {
    2: ConfidenceLaunch(4096, 8),
    4: ConfidenceLaunch(4096, 8),
}

# Programs that a launch should have before it stops splitting prefixes or columns.
TARGET_PROGRAMS = 256
# A shorter piece of a prefix is not worth a merge.
MIN_SPLIT_KEYS = 256
