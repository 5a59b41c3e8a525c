"""Unpack the carried archives FOLDER/*/*.tar.xz into SITE, each once: unpack.py FOLDER SITE."""

import compileall
import sys
import tarfile
from pathlib import Path


def unpack(folder, site):
    """Returns a line per archive; raises SystemExit where there is none."""
    archives = sorted(folder.glob("*/*.tar.xz"))
    if not archives:
        raise SystemExit(
            f"{folder} holds no archive; run benchmarks/gpu/prepare.sh where there is a network, "
            "and carry .gpu/a and .gpu/b over"
        )
    site.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        facts = archive.stat()
        mark, identity = site / f"{archive.name}.unpacked", f"{facts.st_size} {facts.st_mtime_ns}"
        if mark.exists() and mark.read_text(encoding="utf-8") == identity:
            yield f"{archive.name}: unpacked before"
            continue
        with tarfile.open(archive) as file:
            file.extractall(site, filter="data")
        mark.write_text(identity, encoding="utf-8")
        compileall.compile_dir(site, quiet=2, workers=0)  # engines start side by side
        yield f"{archive.name}: {facts.st_size:,} bytes unpacked"


if __name__ == "__main__":
    for line in unpack(Path(sys.argv[1]), Path(sys.argv[2])):
        print(line, flush=True)
