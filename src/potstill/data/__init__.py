"""Rows to tokens, tokens to what a loss eats: prompts, the token store on disk, packed batches."""
