"""For tests, here and in other packages: is resuming exact, does a backend keep its contract, and what if one fails."""

from incckpt.testing.exact_resume import assert_exact_resume

__all__ = ["assert_exact_resume"]
