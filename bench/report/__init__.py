"""Result files as tables: README.md and docs/benchmarks.md."""
