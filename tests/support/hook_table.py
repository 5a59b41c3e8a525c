"""All hooks as a Markdown table: what docs/architecture.md shows.

`python tests/support/hook_table.py` prints it.
"""

from failfast_vllm.integration.hooks import SUPPORTED_VLLM, all_hooks


def why_and_until(hook):
    """The first sentence of a body's docstring, and what makes the hook superfluous."""
    text = " ".join((hook.body.__doc__ or "").split())
    reason, _, condition = text.partition(" Goes when: ")
    return reason.partition(". ")[0].rstrip("."), condition.rstrip(".")


def table():
    """One row per hook, in the order in which their stages are installed."""
    rows = ["| function of vLLM | stage | why | goes when |", "|---|---|---|---|"]
    for hook in all_hooks():
        function = hook.path if "." in hook.path else ".".join(hook.name.split(".")[-2:])
        since = ".".join(map(str, hook.since))
        stage = f"{hook.stage}, from {since}" if hook.since > SUPPORTED_VLLM[0] else hook.stage
        why, condition = why_and_until(hook)
        rows.append(f"| `{function}` | {stage} | {why} | {condition} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
