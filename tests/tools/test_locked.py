"""Requirements with hashes: each pin has one, pip checks it, and `lock.py` writes it."""

import re
import runpy
import subprocess
import sys

import pytest

from source_tree import ROOT, commands_of

REQUIREMENTS = ROOT / "requirements"
PINNED = [*sorted(REQUIREMENTS.glob("*.txt")), REQUIREMENTS / "next/sdist.txt"]
PIN = re.compile(r"[a-z0-9][a-z0-9.-]*==[\w.+]+ --hash=sha256:[0-9a-f]{64}")


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.name)
def test_every_pin_has_a_hash(path):
    """Catches a pin that was added or changed by hand without `lock.py`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    for pin in pins:
        assert PIN.fullmatch(pin), pin
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize("target", [".venv/.ready", ".venv-next/.ready", "wheel"])
def test_pip_checks_the_hashes(target):
    """Catches a command of the Makefile that installs from an index without them."""
    pips = [words for words in commands_of(target) if "pip" in words]
    from_index = [words for words in pips if "--requirement" in words]
    local = [words for words in pips if "--requirement" not in words]
    assert from_index
    assert all("--require-hashes" in words and "--no-deps" in words for words in from_index)
    assert all(words[-1].startswith((".", "dist/")) for words in local)
    assert all("--no-deps" in words for words in local)


def test_lock_replaces_hashes_and_nothing_else(monkeypatch):
    """Catches a script that loses comments, pins or names with dots, or asks for old hashes."""
    lock = runpy.run_path(str(REQUIREMENTS / "lock.py"))
    asked = []

    def hashes(pins):
        asked.extend(pins)
        return {"ruamel-yaml": "a" * 64, "torch": "b" * 64}

    monkeypatch.setitem(lock["locked"].__globals__, "hashes", hashes)
    old = f"# about\nruamel.yaml==0.19.1 --hash=sha256:{'0' * 64}\n# more\ntorch==2.13.0+cpu\n"
    assert lock["locked"](old) == (
        f"# about\nruamel.yaml==0.19.1 --hash=sha256:{'a' * 64}\n"
        f"# more\ntorch==2.13.0+cpu --hash=sha256:{'b' * 64}\n"
    )
    assert asked == ["ruamel.yaml==0.19.1", "torch==2.13.0+cpu"]


def test_pip_refuses_another_file(tmp_path):
    """Catches a pip, or a form of the files, that does not check; nothing is downloaded."""
    (tmp_path / "pin-1.0-py3-none-any.whl").write_bytes(b"not what was locked")
    pin = tmp_path / "pin.txt"
    pin.write_text(f"pin==1.0 --hash=sha256:{'0' * 64}\n")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--no-index"]
    where = ["--dry-run", "--find-links", str(tmp_path), "--requirement", str(pin)]
    done = subprocess.run([*pip, *where], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "DO NOT MATCH THE HASHES" in done.stderr
