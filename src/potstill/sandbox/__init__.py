"""Programs that a model wrote, run and judged: hostile by assumption. Standard library only."""
