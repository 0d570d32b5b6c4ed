"""Layers and losses that more than one room uses."""
