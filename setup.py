"""Package metadata. Build backend and tool settings live in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
ABOUT = runpy.run_path(str(ROOT / "failfast_vllm" / "__init__.py"))  # the version is there alone

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
    version=ABOUT["__version__"],
    description="FailFast speculative decoding for vLLM: a diffusion LLM drafts, vLLM verifies",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2512.20573"},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    keywords=["vllm", "speculative decoding", "diffusion language model", "inference"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[
        "failfast_kernels",
        "failfast_vllm",
        *(f"failfast_vllm.{room}" for room in ROOMS),
    ],
    package_dir={"failfast_kernels": "kernels/failfast_kernels"},
    package_data={
        "failfast_vllm": ["py.typed", "small_pair/*", "small_pair/*/*"],
    },
    install_requires=[
        "vllm>=0.32,<0.34",
        "torch",
        "transformers",
        "huggingface_hub",
        "triton",
        "safetensors",
        "numpy",
        "prometheus-client",
        "rich",
        "tqdm",
    ],
    extras_require={"bench": ["matplotlib"], "smollm2": ["gguf", "accelerate"]},
    entry_points={
        "vllm.general_plugins": ["failfast = failfast_vllm.plugin:register"],
        "console_scripts": ["failfast = failfast_vllm.tools.cli:main"],
    },
)
