"""From rows to a trained model: tokens, batches, objectives and the only optimiser loop."""
