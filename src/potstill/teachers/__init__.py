"""What a teacher says of rows, live or kept: its identity, the forms its words are kept in, the cache."""
