"""The Klein–Gordon equation as Wang, Teng, Perdikaris (2021) train it, by each of their methods, and GradNorm.

python -m benchmarks.experiments.klein_gordon                 # three seeds, 40,000 steps: two hours
python -m benchmarks.experiments.klein_gordon --quick
"""

from benchmarks.experiments.command import main
from benchmarks.experiments.physics import published

EXPERIMENT = published("klein_gordon", "Klein–Gordon", __doc__ or "")

if __name__ == "__main__":
    main(EXPERIMENT)
