"""A suite of problems, many small trainings at once, to judge defaults by: ``python -m benchmarks.suite run``; see ``README.md``."""
