"""nanochat: logits are bounded by a softcap."""

from potstill.edges.families import Family, Logits, register

register(Family(("nanochat",), lambda config: Logits(softcap=config.final_logit_softcapping)))
