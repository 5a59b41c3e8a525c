"""An empty Triton backend named `cpu`: vLLM then finds Triton, whose interpreter needs none.

None where there is a GPU: Triton would ask this backend, too, whether the card is its own.
"""

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return False


if not torch.cuda.is_available():
    backends.setdefault("cpu", Backend(BaseBackend, NoDriver))
