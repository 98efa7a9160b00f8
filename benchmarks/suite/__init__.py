"""Problems to judge defaults by, many small trainings at once: ``python -m benchmarks.suite run``; see ``README.md``."""
