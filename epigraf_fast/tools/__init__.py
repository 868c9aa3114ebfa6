"""The commands of `epigraf`, one file each, and what only they share."""
