"""Runs a recipe: the graph of its stages, what is done already, fingerprints, stopping and going on."""
