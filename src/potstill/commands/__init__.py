"""What each of the larger commands does, one file each; `cli` only reads the words."""
