"""Benchmarks that anyone can run: `python -m experiments.benchmarks.<name>`."""
