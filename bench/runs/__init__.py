"""Whole runs: the demo, what its threads wait for, what its colours follow."""
