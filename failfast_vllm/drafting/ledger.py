"""What is remembered of each request between its steps. NumPy only."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from failfast_vllm.drafting.records import Drafts, Round

MAX_REQUESTS = 4096  # preempted ones included; far more than an engine runs at once
T = TypeVar("T")


class PerRequest(Generic[T]):
    """A value per request, `initial` until it is set; the longest unused go first."""

    def __init__(self, initial: T) -> None:
        self.initial = initial
        self._values: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, req_id: str) -> T:
        return self._values.get(req_id, self.initial)

    def __setitem__(self, req_id: str, value: T) -> None:
        self._values[req_id] = value
        self._values.move_to_end(req_id)
        if len(self._values) > MAX_REQUESTS:
            self._values.popitem(last=False)

    def forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._values.pop(req_id, None)


class Ledger(PerRequest[Round | None]):
    """The drafts that are open: proposed, and not verified yet."""

    def __init__(self) -> None:
        super().__init__(None)

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
            drafts.ends_at_stop,
            drafts.num_passes,
            drafts.seq_rows,
        )
        for i, (length, first, num_judged, match_len, stops, passes, rows) in enumerate(
            zip(*(values.tolist() for values in per_seq), strict=True)
        ):
            if not (rows or length):  # a round without a draft says what its passes took
                self._values.pop(req_ids[i], None)
                continue
            self[req_ids[i]] = Round(
                req_ids[i],
                num_drafted=length,
                num_first=first,
                confidences=drafts.confidences[i, :num_judged],
                match_len=match_len,
                ends_at_stop=stops and length >= num_judged,
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
            found = self._values.pop(req_id, None) or Round(req_id)
            found.num_verified = min(verified, found.num_drafted)
            if not (found.num_verified or plain):
                continue
            found.num_accepted = len(ids) - 1
            found.emitted, found.known_len = ids, known_len - len(ids)
            found.step, found.num_seqs = step, len(req_ids)
            rounds.append(found)
        return rounds
