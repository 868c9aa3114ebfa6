"""The ops by themselves: right first, then timed, on real shapes."""
