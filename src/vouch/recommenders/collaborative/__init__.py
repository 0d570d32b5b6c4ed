"""Recommenders that look at who took what, not at the order."""
