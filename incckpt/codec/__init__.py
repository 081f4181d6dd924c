"""From raw bytes to the bytes of an object, and back."""
