"""Falcon-H1: logits are multiplied by `lm_head_multiplier`."""

from potstill.edges.families import Family, Logits, register

register(Family(("falcon_h1",), lambda config: Logits(scale=config.lm_head_multiplier)))
