"""The `failfast` command: what is shipped, whether it can run here, and what it is worth.

Each command's module has its arguments and `run`, which returns the exit code and raises ValueError
or OSError where it refuses. Nothing heavy is imported before a command needs it. Results go to
stdout, all else to stderr.
Exit codes: 0 fine, 1 a check failed, 2 cannot run (bad arguments, missing models), 130 interrupted.
"""

import argparse
import errno
import os
import sys

import failfast_vllm
from failfast_vllm.tools import bench, demo, doctor, shipped, sizing, version

COMMANDS = {
    "version": (version, "Print the versions and the device that a bug report needs."),
    "models": (shipped, "Print the paths of the shipped models."),
    "doctor": (doctor, "Check that failfast can run here, and say what to do if not."),
    "demo": (demo, "Compare greedy decoding without and with failfast at batch size 1."),
    "bench": (bench, "Compare drafting methods by concurrency."),
    "plan": (sizing, "Count the memory that a drafter takes beside a target."),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        return 0
    except (ValueError, OSError) as error:
        code, reason = 2, " ".join(str(error).split()).removeprefix("failfast: ")
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()
            code, reason = 1, f"cannot write the output ({error.strerror})"
    print(f"failfast {args.command}: {reason}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """What is still buffered would raise again while the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    text = "FailFast speculative decoding for vLLM."
    parser = argparse.ArgumentParser(prog="failfast", description=text)
    parser.add_argument("--version", action="version", version=failfast_vllm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=module.run)
        if module is not bench:  # which writes files
            command.add_argument("--json", action="store_true", help="print one JSON object")
        if hasattr(module, "add_arguments"):
            module.add_arguments(command)
    return parser
