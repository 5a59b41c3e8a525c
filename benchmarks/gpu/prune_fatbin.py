"""Blank the GPU code in a shared library that one card cannot use, so that it compresses.

    python benchmarks/gpu/prune_fatbin.py IN.so OUT.so [ARCH]      ARCH is 90 (Hopper) by default

A fat binary is a container of entries, one per architecture: a header of 16 bytes (magic number,
version, header size, size of the entries), then the entries (kind, header size, size of the body,
architecture at byte 28). The driver chooses by these headers; they and all sizes stay, the bodies
of what it would not choose become zeros. Kept are the entries of ARCH; in a container without any,
those of the highest lower one of the same major version, else the highest PTX that ARCH can
compile; in doubt the whole container.
"""

import struct
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

MAGIC, MAX_VERSION, HEADER = 0xBA55ED50, 2, 16
PTX, CUBIN = 1, 2


class Entry(NamedTuple):
    """One architecture's code."""

    kind: int
    arch: int
    body: slice

    @property
    def num_bytes(self):
        return self.body.stop - self.body.start


def containers(data):
    """The entries of each container; none for one that is not understood."""
    magic = struct.pack("<I", MAGIC)
    at = data.find(magic)
    while at >= 0:
        end = at + 4  # the bytes may stand there by chance
        if at + HEADER <= len(data):
            _, version, header, size = struct.unpack_from("<IHHQ", data, at)
            if header == HEADER and version <= MAX_VERSION and at + header + size <= len(data):
                found = list(entries(data, at + header, at + header + size))
                yield found
                end = at + header + size if found else end
        at = data.find(magic, end)


def entries(data, at, end):
    found = []
    while at + 64 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        understood = kind in (PTX, CUBIN) and 32 <= header <= 4096 and 50 <= arch <= 130
        if not understood or at + header + size > end:
            return []
        found.append(Entry(kind, arch, slice(at + header, at + header + size)))
        at += header + size
    return found


def kept(found, arch):
    """Which entries of a container a card of `arch` may run."""
    cubins = [e for e in found if e.kind == CUBIN and e.arch // 10 == arch // 10 and e.arch <= arch]
    ptx = [e for e in found if e.kind == PTX and e.arch <= arch]
    usable = cubins or ptx
    best = max((e.arch for e in usable), default=None)
    return [e for e in usable if e.arch == best]


def prune(data, arch):
    """Blank `data` in place; returns {what: bytes}."""
    count = Counter()
    for found in containers(data):
        keep = kept(found, arch)
        for entry in found:
            name = f"{'PTX' if entry.kind == PTX else 'code'} of {entry.arch}"
            count[f"{'kept' if entry in keep else 'blanked'} {name}"] += entry.num_bytes
            if entry not in keep:
                data[entry.body] = bytes(entry.num_bytes)
    return count


def main():
    source, target, *rest = sys.argv[1:]
    data = bytearray(Path(source).read_bytes())
    for what, num_bytes in sorted(prune(data, int(rest[0]) if rest else 90).items()):
        print(f"  {what}: {num_bytes:,} bytes")
    Path(target).write_bytes(data)


if __name__ == "__main__":
    main()
