"""Pack FOLDER into ARCHIVE.tar.xz and check that it can travel: pack.py FOLDER ARCHIVE.

One transfer holds the checkout and one archive, in at most 64 MiB.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 64 << 20  # bytes


def tree_bytes(root=ROOT):
    """Size of the files of the checkout that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    paths = [root / name.decode() for name in names if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_size(archive_bytes, checkout_bytes):
    """A line about the size; raises SystemExit beyond the limit."""
    total = archive_bytes + checkout_bytes
    text = f"{archive_bytes:,} bytes, {total:,} with the checkout, of {LIMIT:,}"
    if total > LIMIT:
        raise SystemExit(f"{text}: too many for one transfer; put less into it")
    return text


def deterministic(member):
    """Nothing of the machine that packs."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main():
    folder, archive = map(Path, sys.argv[1:])
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name, filter=deterministic)
    print(f"{archive}: {check_size(archive.stat().st_size, tree_bytes())}")


if __name__ == "__main__":
    main()
