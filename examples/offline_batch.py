"""Answer a batch of prompts without a server, and say how many draft tokens were accepted.

    python offline_batch.py --model Qwen/Qwen2.5-7B-Instruct < prompts.txt    # a prompt per line

Needs vLLM with failfast; takes vLLM's engine flags. `failfast models` prints the path of a small
model that needs no download.
Exercised: `make test` runs this file with the shipped small pair, on a CPU.
"""

import sys

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(
        model="Qwen/Qwen2.5-7B-Instruct",
        speculative_config={"method": "failfast"},
        disable_log_stats=False,  # else nothing is counted
    )
    llm = LLM(**vars(parser.parse_args()))
    chats = [[{"role": "user", "content": line.strip()}] for line in sys.stdin if line.strip()]
    for output in llm.chat(chats, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False):
        print(output.outputs[0].text, end="\n\n")
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    accepted = counts["vllm:spec_decode_num_accepted_tokens"]
    print(f"{accepted} of {drafted} draft tokens accepted")


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
