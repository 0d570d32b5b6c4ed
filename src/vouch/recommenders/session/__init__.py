"""Recommenders of sessions: short anonymous visits, in which the next click is asked for."""
