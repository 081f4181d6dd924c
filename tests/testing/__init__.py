"""Tests of `incckpt.testing`."""
