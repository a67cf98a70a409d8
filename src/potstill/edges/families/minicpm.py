"""MiniCPM 3: the head's input is divided by hidden_size / dim_model_base."""

from potstill.edges.families import Family, Logits, register

register(Family(("minicpm3",), lambda config: Logits(scale=config.dim_model_base / config.hidden_size)))
