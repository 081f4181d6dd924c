"""Scripts in the manner of the frameworks' own examples; the documentation says how to change them."""
