"""A model behind an address: OpenAI's API, its limits, and a page that compares models."""
