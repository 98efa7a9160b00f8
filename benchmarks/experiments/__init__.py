"""Published problems and real data, several seeds, one command each: ``python -m benchmarks.experiments.helmholtz``.

An experiment is a file that says which problems and methods there are and how one fit is made; ``command`` runs what is
asked for, ``records`` keeps what came of it. They stand on the examples' problems.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # scripts, no package
