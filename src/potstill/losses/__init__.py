"""What is minimised: objectives over response tokens, and the output head fused with them."""
