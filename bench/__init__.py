"""Measurements; nothing imports them but their tests."""
