"""What is remembered of each request between its steps."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

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
