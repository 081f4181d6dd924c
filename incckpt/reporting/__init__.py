"""A run as one page of HTML: what was learned, what was stored, how long training waited."""
