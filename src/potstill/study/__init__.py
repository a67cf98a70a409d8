"""What was measured, and what may be said of it: records, bootstrap, verdicts, caveats. Decides; draws nothing."""
