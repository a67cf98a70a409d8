"""The only room that touches transformers, the hub and the machine; everything heavy is imported inside functions."""
