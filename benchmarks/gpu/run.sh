#!/bin/bash
# Run phases of the GPU kit, in any folder: run.sh PHASE... [--seconds N] [--out DIR]; see README.md.
exec "${PYTHON:-python3}" "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/phases.py" "$@"
