"""Calls that would wait for a GPU."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__")
MASKED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class MaskedIndexing(TorchDispatchMode):
    """Indexing with a mask waits for how many elements it has."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in MASKED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


class Waits(list):
    paused = False


@contextlib.contextmanager
def counted():
    """The calls that would wait for the device."""
    waits = Waits()
    with pytest.MonkeyPatch.context() as patch:

        def count(name):
            original = getattr(torch.Tensor, name)

            def counting(self, *args, **kwargs):
                blocks = name != "to" or (
                    not kwargs.get("non_blocking")
                    and any(isinstance(a, torch.device | str) for a in (*args, *kwargs.values()))
                )
                if blocks and not waits.paused:
                    waits.append(name)
                waits.paused, before = True, waits.paused  # what it calls is the same wait
                try:
                    return original(self, *args, **kwargs)
                finally:
                    waits.paused = before

            patch.setattr(torch.Tensor, name, counting)

        for name in (*WAITING, "to"):
            count(name)
        patch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("a copy that waits"))
        with MaskedIndexing(waits):
            yield waits
