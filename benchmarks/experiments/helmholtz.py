"""The Helmholtz equation as Wang, Teng, Perdikaris (2021) train it, by each of their methods and GradNorm.

python -m benchmarks.experiments.helmholtz                 # three seeds, 40,000 steps: an hour
python -m benchmarks.experiments.helmholtz --quick
"""

from benchmarks.experiments.command import main
from benchmarks.experiments.physics import published

EXPERIMENT = published("helmholtz", "Helmholtz", __doc__ or "")

if __name__ == "__main__":
    main(EXPERIMENT)
