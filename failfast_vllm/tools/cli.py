"""The `failfast` command: what is shipped, whether it can run here, and what it is worth.

Each command's module has its arguments and `run`, which returns the exit code. Nothing heavy is
imported before a command needs it. Results go to stdout, all else to stderr.
Exit codes: 0 fine, 1 a check failed, 2 cannot run (bad arguments, missing models), 130 interrupted.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable

import failfast_vllm
from failfast_vllm.tools import bench, demo, doctor, shipped, trace_report
from failfast_vllm.tools.arguments import UsageError, at_least_one, positive, refusals


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"failfast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"failfast {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        reason = f"cannot write the output ({error.strerror})"
        print(f"failfast {args.command}: {reason}", file=sys.stderr)
        _drop_output()
        return 1
    return code


def _drop_output() -> None:
    """What is still buffered would raise again while the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="failfast", description="FailFast speculative decoding for vLLM."
    )
    parser.add_argument("--version", action="version", version=failfast_vllm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_with_json(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        command = add(name, run, text)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    add_with_json("models", shipped.run, "Print the paths of the shipped models.")
    text = "Check that failfast can run here, and say what to do if not."
    add_with_json("doctor", doctor.run, text)
    text = "Compare greedy decoding without and with failfast at batch size 1."
    demo.add_arguments(add_with_json("demo", demo.run, text))
    bench.add_arguments(add("bench", bench.run, "Compare drafting methods by concurrency."))
    text = "Count a pair's memory and model (not measure) what it gains."
    _add_plan_arguments(add_with_json("plan", _plan, text))
    text = "Summarise rounds that a server has recorded, or record some."
    trace_report.add_arguments(add_with_json("trace", trace_report.run, text))
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", help="checkpoint directory, config.json or name"
    )
    parser.add_argument("--drafter", metavar="PATH_OR_ID", help="default: the family's own")
    parser.add_argument(
        "--diffusion-block-size", type=positive, metavar="N", help="as in the speculative config"
    )
    parser.add_argument("--gpu", default="H200", metavar="NAME", help="default: H200")
    parser.add_argument(
        "--concurrency", type=positive, metavar="N", help="one batch size; default: 1 to 64"
    )
    parser.add_argument(
        "--context-length", type=positive, default=1024, metavar="N", help="default: 1024"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="default: 1"
    )
    parser.add_argument(
        "--acceptance-length",
        type=at_least_one,
        metavar="X",
        help="tokens per round with the bonus; default: 6.6, as published",
    )
    parser.add_argument(
        "--passes-per-round",
        type=at_least_one,
        metavar="X",
        help="draft passes; default: as many as drafts of 13.9 tokens need",
    )


def _plan(args: argparse.Namespace) -> int:
    from failfast_vllm.tools import sizing

    with refusals():
        result = sizing.make_plan(
            args.target,
            args.drafter,
            diffusion_block_size=args.diffusion_block_size,
            gpu=args.gpu,
            concurrency=args.concurrency,
            context_len=args.context_length,
            tensor_parallel_size=args.tensor_parallel_size,
            acceptance_length=args.acceptance_length,
            passes_per_round=args.passes_per_round,
        )
    print(json.dumps(result.to_dict(), indent=2) if args.json else sizing.render(result))
    return 0
