"""From a nested state to JSON and byte ranges, and back."""
