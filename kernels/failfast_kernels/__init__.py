"""Masked-block attention over a paged KV cache, confidence of a draft token, prompt lookup.

Each operation is a specification in `reference` or `copy_match_reference` and a Triton launcher.
CUDA tensors go to Triton, which is imported at that moment; others go to the reference, unless
FAILFAST_TRITON=1 sends them to Triton's interpreter (which also needs TRITON_INTERPRET=1).
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from failfast_kernels import copy_match_reference, reference
from failfast_kernels.copy_match_reference import SuffixMatches as SuffixMatches
from failfast_kernels.reference import PaddedGroup as PaddedGroup
from failfast_kernels.reference import TokenConfidence as TokenConfidence
from failfast_kernels.reference import plan_padding as plan_padding

P = ParamSpec("P")
R = TypeVar("R")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` are Triton's; they need no `plan_padding`."""
    return tensor.is_cuda or os.environ.get("FAILFAST_TRITON") == "1"


def _at_home(specification: Callable[P, R], module: str) -> Callable[P, R]:
    """The operation, sent to its launcher in `module` where its first tensor is Triton's."""

    @functools.wraps(specification)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        home = specification
        if uses_triton(args[0]):  # type: ignore[arg-type]
            launchers = importlib.import_module(f"failfast_kernels.{module}")
            home = getattr(launchers, specification.__name__)
        return home(*args, **kwargs)

    return operation


block_diffusion_attention = _at_home(reference.block_diffusion_attention, "block_attention")
commit_kv = _at_home(reference.commit_kv, "block_attention")
confidence_argmax = _at_home(reference.confidence_argmax, "confidence")
match_suffixes = _at_home(copy_match_reference.match_suffixes, "copy_match")
continue_matches = _at_home(copy_match_reference.continue_matches, "copy_match")
