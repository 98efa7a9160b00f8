"""``python -m benchmarks.suite``."""

from benchmarks.suite.command import alone, main

if __name__ == "__main__":
    alone()
    main()
