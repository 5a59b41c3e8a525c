"""FailFast speculative decoding for vLLM (arXiv 2512.20573).

A diffusion LLM (Fast-dLLM v2) drafts many tokens per forward pass, the target verifies them
losslessly, and the draft length adapts per sequence in each step. docs/architecture.md is the tour.
"""

__version__ = "0.1.0"
METHOD = "failfast"  # of vLLM's speculative config; in its additional config the key of ours
