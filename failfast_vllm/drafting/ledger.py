"""The drafts of requests from one step to the next. NumPy only."""

from collections.abc import Iterable, Sequence

from failfast_vllm.drafting.records import Drafts, Round


class Ledger(dict[str, Round]):
    """The drafts that are open, by request: proposed, and not verified yet."""

    def open(
        self, req_ids: Sequence[str], drafts: Drafts, token_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Remember what a step has drafted.

        Args:
            token_ids: of each draft; left out where nobody wants them.
        """
        per_seq = (
            drafts.lens,
            drafts.first_lens,
            drafts.num_confidences,
            drafts.match_lens,
            drafts.num_passes,
            drafts.seq_rows,
        )
        for i, (length, first, num_judged, match_len, passes, rows) in enumerate(
            zip(*(values.tolist() for values in per_seq), strict=True)
        ):
            if not (rows or length):  # a round without a draft says what its passes took
                self.pop(req_ids[i], None)
                continue
            self[req_ids[i]] = Round(
                req_ids[i],
                num_drafted=length,
                num_first=first,
                confidences=drafts.confidences[i, :num_judged],
                match_len=match_len,
                num_passes=passes,
                num_rows=rows,
                token_ids=token_ids[i] if token_ids else (),
            )

    def settle(
        self,
        req_ids: Sequence[str],
        num_verified: Sequence[int],
        emitted: Sequence[Sequence[int]],
        known_lens: Sequence[int],
        *,
        step: int,
        plain: bool,
    ) -> list[Round]:
        """Close the draft of each request that was sampled; returns the rounds, in their order.

        Args:
            num_verified: per request, draft tokens that the target has verified.
            emitted: per request, accepted tokens and the bonus; none = it was not sampled.
            known_lens: per request, prompt and accepted tokens.
            step: the engine's number of it.
            plain: whether to return rounds without a draft, too.
        """
        rounds = []
        for req_id, verified, ids, known_len in zip(
            req_ids, num_verified, emitted, known_lens, strict=True
        ):
            if not ids:
                continue
            found = self.pop(req_id, None) or Round(req_id)
            found.num_verified = min(verified, found.num_drafted)
            if not (found.num_verified or plain):
                continue
            found.num_accepted = len(ids) - 1
            found.emitted, found.known_len = ids, known_len - len(ids)
            found.step, found.num_seqs = step, len(req_ids)
            rounds.append(found)
        return rounds

    def forget(self, req_ids: Iterable[str]) -> None:
        """The requests have ended."""
        for req_id in req_ids:
            self.pop(req_id, None)
