"""Whole training steps: their time, their launches, planes in part."""
