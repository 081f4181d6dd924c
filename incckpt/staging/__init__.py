"""What the caller of a save waits for: finding what changed, and copying it."""
