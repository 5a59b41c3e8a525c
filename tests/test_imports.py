"""Rooms import downwards only, and vLLM stays in the rooms that sit inside it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # each room may import those before it, and itself; rooms of a floor not each other
    {"failfast_kernels"},
    {"failfast_vllm.__init__", "failfast_vllm.errors"},
    {"failfast_vllm.drafting"},
    {"failfast_vllm.planning", "failfast_vllm.observe"},
    {"failfast_vllm.policies"},
    {"failfast_vllm.drafters"},
    {"failfast_vllm.config"},
    {"failfast_vllm.integration"},
    {"failfast_vllm.plugin"},
    {"failfast_vllm.tools"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
INSIDE_VLLM = ("failfast_vllm.integration", "failfast_vllm.plugin", "failfast_vllm.tools")
INSIDE_VLLM_TOO = {
    f"failfast_vllm/drafters/{n}.py" for n in ("model", "attention", "hosted", "parallel")
}
PATHS = sorted((ROOT / "failfast_vllm").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "failfast_kernels").glob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in PATHS]


def room_of(module):
    """`failfast_vllm.drafting.drafter` -> `failfast_vllm.drafting`; None: not ours."""
    parts = module.split(".")
    if parts[0] == "failfast_kernels":
        return parts[0]
    if parts[0] != "failfast_vllm":
        return None
    return ".".join([*parts, "__init__"][:2])


def imported(path):
    """The modules that a file imports: `from a import b` is `a.b` where that is one of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in names if is_module(name)}
            found |= ours | ({node.module} if names - ours else set())
    return found


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_down(name):
    own = room_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for module in imported(ROOT / name):
        room = room_of(module)
        if room not in (None, own):
            assert FLOOR_OF[room] < FLOOR_OF[own], f"{name} imports {module}"


@pytest.mark.parametrize("name", NAMES)
def test_few_rooms_know_vllm(name):
    if not name.removesuffix(".py").replace("/", ".").startswith(INSIDE_VLLM):
        known = any(module.split(".")[0] == "vllm" for module in imported(ROOT / name))
        assert not known or name in INSIDE_VLLM_TOO


def test_aliases_are_seen(tmp_path):
    """Catches `from failfast_vllm import X`, which a list of modules does not show."""
    path = tmp_path / "module.py"
    path.write_text(
        "from failfast_vllm import config as c\nfrom failfast_vllm.drafting import drafter"
    )
    assert imported(path) == {"failfast_vllm.config", "failfast_vllm.drafting.drafter"}


def test_kernels_import_nobody_of_ours():
    for path in KERNELS:
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & {"vllm", "failfast_vllm", "transformers"}, path


LONG = {  # functions over 40 lines: mostly signature and docstring, or the arguments of a launch
    "plan_padding",
    "block_diffusion_attention",
    "confidence_argmax",
    "make_plan",
    "closed_loop",
    "_search",
}


@pytest.mark.parametrize("path", [*PATHS, *KERNELS], ids=lambda path: path.stem)
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
            assert node.end_lineno - node.lineno < (90 if node.name in LONG else 40), node.name
