"""An empty Triton backend named `cpu`: vLLM then finds Triton, whose interpreter needs none."""

from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return False


backends.setdefault("cpu", Backend(BaseBackend, NoDriver))
