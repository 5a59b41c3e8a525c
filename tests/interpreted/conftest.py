"""Tests that need Triton on a CPU: kernels and vLLM's V2 runner under Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

vLLM chooses its V2 runner only where it finds Triton, and finds it on a CPU only as a backend named
`cpu`. An empty one will do, since the interpreter needs none. For tests only: a step takes 80 ms.
"""

import triton_on_cpu  # noqa: F401
