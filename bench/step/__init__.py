"""Whole training steps, and what they wait for."""
