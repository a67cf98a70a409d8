"""The only optimiser loop, who shares its steps, and checkpoints: how a step is done; knows no loss by name."""
