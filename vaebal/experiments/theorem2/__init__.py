"""Collapse is stationary, and a saddle."""
