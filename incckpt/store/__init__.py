"""What stands where in a store, and in which order it is written, read and collected."""
