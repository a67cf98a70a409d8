"""What every other room stands on: errors, components, artifacts, progress. Imports nothing heavy."""
