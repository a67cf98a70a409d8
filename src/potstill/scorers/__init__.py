"""What metrics, sources and the report share about text: equal forms, words of any script, the language of rows; no torch."""
