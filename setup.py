"""Package metadata. Build backend and tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOMS = (
    "drafters",
    "drafting",
    "integration",
    "observe",
    "planning",
    "policies",
    "tools",
)

setup(
    name="failfast-vllm",
    version="0.1.0",
    description="FailFast speculative decoding for vLLM: a diffusion LLM drafts, vLLM verifies",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "failfast_kernels",
        "failfast_vllm",
        *(f"failfast_vllm.{room}" for room in ROOMS),
    ],
    package_dir={"failfast_kernels": "kernels/failfast_kernels"},
    package_data={
        "failfast_vllm": ["py.typed", "small_pair/*", "small_pair/*/*"],
    },
    install_requires=["vllm>=0.32,<0.34", "torch", "transformers", "triton", "safetensors"],
    extras_require={"bench": ["matplotlib"], "smollm2": ["gguf"]},
    entry_points={
        "vllm.general_plugins": ["failfast = failfast_vllm.plugin:register"],
        "console_scripts": ["failfast = failfast_vllm.tools.cli:main"],
    },
)
