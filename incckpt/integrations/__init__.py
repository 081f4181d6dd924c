"""Adapters for training frameworks, a module each. Importing incckpt imports none of them."""
