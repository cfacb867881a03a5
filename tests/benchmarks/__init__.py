"""Every file operation beside its yardsticks, in the same run: ``python -m tests.benchmarks``."""
