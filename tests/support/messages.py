"""Every error and warning of the product as a template: `…` stands for what differs."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = {"ValueError", "RuntimeError", "ArgumentTypeError"}
# generators of problems: where the sentence stands in what they yield
PROBLEMS = {"Problems": 0}
VARIABLE = re.compile(r"(…\W?\s*)*…")


def templates():
    """[(file:line, template)] of what the package, the kernels included, raises or warns of."""
    found = []
    for folder in ("failfast_vllm", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef):
                    for node, sentence in _sentences(function):
                        text = _template(sentence, _assigned(function))
                        found.append((f"{path.relative_to(ROOT)}:{node.lineno}", tidy(text)))
    return found


def tidy(text):
    text = re.sub(r"\s+", " ", text).removeprefix("failfast: ")
    return VARIABLE.sub("…", text).strip(" …'\"`")


def _sentences(function):
    index = PROBLEMS.get(ast.unparse(function.returns)) if function.returns else None
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ERRORS or name in ("refusal", "warning", "_warn_once"):
                yield node, node.args[0]
            elif name == "Check" and len(node.args) >= 3:  # of `failfast doctor`
                yield node, node.args[2]
        elif (
            isinstance(node, ast.Yield) and index is not None and isinstance(node.value, ast.Tuple)
        ):
            yield node, node.value.elts[index]


def _assigned(function):
    """{name: the text it holds} of a function's variables that hold texts."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                if isinstance(name, ast.Name) and _template(value, {}).strip("…"):
                    found.setdefault(name.id, []).append((node.lineno, value))
    return found


def _template(node, assigned):
    if isinstance(node, ast.Constant):
        return re.sub(r"%\w", "…", node.value) if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, assigned) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _template(node.value, assigned)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, assigned) + _template(node.right, assigned)
    if isinstance(node, ast.Name) and node.id in assigned:  # the last one before; one that
        # extends itself, as in `must = f"{must} have"`, is for the next statement alone
        before = [
            value
            for line, value in assigned[node.id]
            if line <= node.lineno
            and (node.lineno - line <= 1 or f"{{{node.id}}}" not in ast.unparse(value))
        ]
        rest = {name: values for name, values in assigned.items() if name != node.id}
        return _template(before[-1], rest) if before else "…"
    return "…"
