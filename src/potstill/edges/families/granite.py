"""Granite: logits are divided by `logits_scaling`."""

from potstill.edges.families import Family, Logits, register

register(Family(("granite", "granite_swa"), lambda config: Logits(scale=1 / config.logits_scaling)))
