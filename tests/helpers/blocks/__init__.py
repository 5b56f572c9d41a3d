"""Blocks of the random networks of the property tests."""
