"""Compare what the drafter computes from its committed blocks with a full recompute."""

import itertools

from engine import proposer

TOLERANCE = 1e-4  # float32, four layers; the order of sums differs between the two paths


def largest_error(llm, dense, run, every=1):
    """Run `run()` while drafter passes are checked; returns (max difference, checks).

    Args:
        every: one of so many sequences is checked, over all passes; wrong KV stays wrong.
    """
    drafter = proposer(llm).drafter
    forward, propose = drafter.model.forward, drafter.propose
    errors, current, numbers = [], [], itertools.count()

    def remembering_propose(step):
        current[:] = [step]
        return propose(step)

    def checking_forward(batch):
        hidden_states = forward(batch)
        step = current[0]
        tables = {tuple(row): i for i, row in enumerate(step.block_table.tolist())}
        bounds = batch.query_start_loc.tolist()
        for s, start in enumerate(batch.committed_lens.tolist()):
            if next(numbers) % every:
                continue
            i = tables[tuple(batch.block_table[s].tolist())]
            rows = slice(bounds[s], bounds[s + 1])
            prefix = step.token_ids[step.slots[i], :start].tolist()
            expected = dense.hidden_states(prefix + batch.input_ids[rows].tolist())[start:]
            errors.append((hidden_states[rows] - expected).abs().max().item())
        return hidden_states

    drafter.model.forward, drafter.propose = checking_forward, remembering_propose
    try:
        run()
    finally:
        drafter.model.forward, drafter.propose = forward, propose
    return max(errors), len(errors)
