"""Servers of the kinds that stores live on, run on loopback by the tests themselves."""
