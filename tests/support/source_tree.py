"""The checkout: its files without what builds and tests have left, and what its Makefile runs."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked():
    """Paths that git knows or would add, relative to the root; None: this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted(path for path in done.stdout.split("\0") if path and (ROOT / path).is_file())


def copy_to(folder, paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


def commands_of(target):
    """The commands, split into words, that `make target` runs in a fresh checkout.

    Asked as if no other make ran these tests: it would lend its settings and print its folders.
    """
    lent = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "TORCH_INDEX")
    environment = {name: value for name, value in os.environ.items() if name not in lent}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
