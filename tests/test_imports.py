"""Import direction: families <- config, policy <- drafter <- proposer <- plugin; kernels apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # module -> our modules it may import
    "failfast_vllm/__init__.py": set(),
    "failfast_vllm/families.py": set(),
    "failfast_vllm/checkpoint.py": {"failfast_vllm.families"},
    "failfast_vllm/trace.py": {"failfast_vllm"},
    "failfast_vllm/config.py": {
        "failfast_vllm.checkpoint",
        "failfast_vllm.families",
        "failfast_vllm.trace",
    },
    "failfast_vllm/simulate.py": {
        "failfast_vllm",
        "failfast_vllm.load",
        "failfast_vllm.trace",
    },
    "failfast_vllm/plan.py": {"failfast_vllm.config", "failfast_vllm.families"},
    "failfast_vllm/calibration.py": set(),
    "failfast_vllm/counts.py": set(),
    "failfast_vllm/metrics.py": {"failfast_vllm.counts"},
    "failfast_vllm/policy.py": {"failfast_vllm.calibration", "failfast_vllm.counts"},
    "failfast_vllm/learned_policy.py": {
        "failfast_vllm.calibration",
        "failfast_vllm.config",
        "failfast_vllm.policy",
    },
    "failfast_vllm/reuse.py": {"failfast_vllm.policy"},
    "failfast_vllm/paths.py": set(),
    "failfast_vllm/request.py": set(),
    "failfast_vllm/hf_config.py": set(),
    "failfast_vllm/cpu_sampling.py": set(),
    "failfast_vllm/kv_transfer.py": set(),
    "failfast_vllm/drafter.py": {
        "failfast_kernels",
        "failfast_vllm.blocks",
        "failfast_vllm.counts",
        "failfast_vllm.load",
        "failfast_vllm.paths",
        "failfast_vllm.policy",
        "failfast_vllm.reuse",
    },
    "failfast_vllm/attention.py": {"failfast_kernels", "failfast_vllm.families"},
    "failfast_vllm/model.py": {
        "failfast_vllm.attention",
        "failfast_vllm.checkpoint",
        "failfast_vllm.families",
    },
    "failfast_vllm/graphs.py": {"failfast_vllm.drafter"},
    "failfast_vllm/load.py": {"failfast_vllm.calibration"},
    "failfast_vllm/blocks.py": set(),
    "failfast_vllm/hosting.py": {
        "failfast_kernels",
        "failfast_vllm.attention",
        "failfast_vllm.blocks",
        "failfast_vllm.calibration",
        "failfast_vllm.config",
        "failfast_vllm.counts",
        "failfast_vllm.drafter",
        "failfast_vllm.families",
        "failfast_vllm.graphs",
        "failfast_vllm.learned_policy",
        "failfast_vllm.load",
        "failfast_vllm.paths",
        "failfast_vllm.policy",
        "failfast_vllm.ranks",
        "failfast_vllm.reuse",
        "failfast_vllm.trace",
    },
    "failfast_vllm/ranks.py": set(),
    "failfast_vllm/target_graphs.py": set(),
    "failfast_vllm/proposer.py": {
        "failfast_vllm.blocks",
        "failfast_vllm.drafter",
        "failfast_vllm.hosting",
        "failfast_vllm.paths",
        "failfast_vllm.policy",
        "failfast_vllm.ranks",
        "failfast_vllm.request",
    },
    "failfast_vllm/speculator.py": {
        "failfast_vllm.blocks",
        "failfast_vllm.drafter",
        "failfast_vllm.graphs",
        "failfast_vllm.hosting",
        "failfast_vllm.paths",
        "failfast_vllm.policy",
        "failfast_vllm.ranks",
        "failfast_vllm.request",
    },
    "failfast_vllm/hook_bodies.py": {"failfast_vllm", "failfast_vllm.plugin"},
    "failfast_vllm/plugin.py": {
        "failfast_vllm",
        "failfast_vllm.config",
        "failfast_vllm.families",
        "failfast_vllm.hf_config",
        "failfast_vllm.cpu_sampling",
        "failfast_vllm.hosting",
        "failfast_vllm.kv_transfer",
        "failfast_vllm.metrics",
        "failfast_vllm.proposer",
        "failfast_vllm.request",
        "failfast_vllm.speculator",
    },
}
WITHOUT_VLLM = {
    "failfast_vllm/hook_bodies.py",
    "failfast_vllm/trace.py",
    "failfast_vllm/simulate.py",
    "failfast_vllm/graphs.py",
    "failfast_vllm/load.py",
    "failfast_vllm/blocks.py",
    "failfast_vllm/cpu_sampling.py",
    "failfast_vllm/__init__.py",
    "failfast_vllm/families.py",
    "failfast_vllm/checkpoint.py",
    "failfast_vllm/plan.py",
    "failfast_vllm/calibration.py",
    "failfast_vllm/config.py",
    "failfast_vllm/counts.py",
    "failfast_vllm/learned_policy.py",
    "failfast_vllm/policy.py",
    "failfast_vllm/reuse.py",
    "failfast_vllm/request.py",
    "failfast_vllm/drafter.py",
    "failfast_vllm/hf_config.py",
}


def imported_modules(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_go_one_way(name):
    ours = {m for m in imported_modules(ROOT / name) if m.split(".")[0].startswith("failfast")}
    assert ours <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(WITHOUT_VLLM))
def test_the_core_knows_no_engine(name):
    assert not {m for m in imported_modules(ROOT / name) if m.split(".")[0] == "vllm"}


def test_kernels_import_nobody_of_ours():
    for path in (ROOT / "kernels" / "failfast_kernels").glob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert not roots & {"vllm", "failfast_vllm", "transformers"}, path


def test_every_module_has_a_rule():
    # commands may import anything
    rest = {"cli.py", "demo.py", "bench.py", "closed_loop.py", "offline.py", "plots.py"}
    found = {f"failfast_vllm/{p.name}" for p in (ROOT / "failfast_vllm").glob("*.py")}
    assert found - {f"failfast_vllm/{name}" for name in rest} == set(ALLOWED)
