"""Gemma: logits are bounded by a softcap, Gemma 2's and later ones (Gemma Team, arXiv:2408.00118, section 2)."""

from typing import Any

from potstill.edges.families import Family, Logits, register


def _logits(config: Any) -> Logits:
    return Logits(softcap=getattr(config, "final_logit_softcapping", None))


register(Family(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"), _logits))
