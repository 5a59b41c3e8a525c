"""A length policy that cuts drafts, which those of the package do not."""

from dataclasses import dataclass

from failfast_vllm.drafting.interfaces import Policy


@dataclass(frozen=True)
class Confidence(Policy):
    """The draft ends after the first token less probable than `threshold`."""

    threshold: float

    def extend(self, lens, confidences):
        fired = (confidences < self.threshold).cumsum(dim=1)
        num_before = (fired == 0).sum(dim=1)  # the first that fires
        return (num_before + 1).minimum(lens), num_before >= lens
