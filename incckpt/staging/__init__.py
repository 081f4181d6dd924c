"""The part of a save that its caller waits for: finding what changed, and copying it."""
