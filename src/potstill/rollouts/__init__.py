"""Engines: prompts in, rollouts with their log-probabilities out."""
