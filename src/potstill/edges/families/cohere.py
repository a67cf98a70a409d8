"""Cohere's Command models: logits are multiplied by `logit_scale`."""

from potstill.edges.families import Family, Logits, register

register(Family(("cohere", "cohere2", "cohere2_moe"), lambda config: Logits(scale=config.logit_scale)))
