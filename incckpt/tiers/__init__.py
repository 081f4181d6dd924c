"""Two tiers: a local store that saves go to, and the bucket's that they are copied to behind the training's back."""
