"""Decoding rules compared, and people's harnesses."""
