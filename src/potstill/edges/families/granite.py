"""Granite: logits are divided by `logits_scaling`."""

from potstill.edges.families import Family, Logits, register

TYPES = ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid")
register(Family(TYPES, lambda config: Logits(scale=1 / config.logits_scaling)))
