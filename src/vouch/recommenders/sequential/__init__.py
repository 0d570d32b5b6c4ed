"""Recommenders that look at the order of a history."""
