"""One process working on one run: its attempt, its saves in the background, its restores."""
