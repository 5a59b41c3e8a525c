"""Writes the SHA-256 of the file that pip takes behind each pin of cpu.txt, dev.txt and next.txt.

    .venv/bin/python requirements/lock.py

Run it after a pin has changed, on what the files are for: CPython 3.11 on Linux, x86-64, glibc 2.34
or newer. pip's configuration names the index; for torch's +cpu build set PIP_EXTRA_INDEX_URL to
https://download.pytorch.org/whl/cpu.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
REPORT = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def hashes(pins: list[str]) -> dict[str, str]:
    """SHA-256 by normal name, of what pip would install for `name==version`."""
    done = subprocess.run([*PIP, *REPORT, *pins], check=True, stdout=subprocess.PIPE)
    found = {}
    for item in json.loads(done.stdout)["install"]:
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[normal(item["metadata"]["name"])] = digest
    return found


def locked(text: str) -> str:
    """A requirements file of one pin a line, with the hashes that the index has now."""
    pins = re.findall(r"^[^#\s]\S+", text, re.M)
    found = hashes(pins)
    lines = []
    for line in text.splitlines():
        pin, *_ = line.split(" ")
        if pin in pins:
            line = f"{pin} --hash=sha256:{found[normal(pin.split('==')[0])]}"
        lines.append(line + "\n")
    return "".join(lines)


if __name__ == "__main__":
    for name in ("cpu.txt", "dev.txt", "next.txt"):
        path = Path(__file__).parent / name
        path.write_text(locked(path.read_text()))
