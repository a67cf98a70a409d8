"""Engines: prompts in, samples with their log-probabilities out. `data/rollout.py` holds their protocol and its types."""

from potstill.rollouts.local import Local

__all__ = ["Local"]
