"""``python -m benchmarks.suite``."""

from benchmarks.suite.command import main

if __name__ == "__main__":
    main()
