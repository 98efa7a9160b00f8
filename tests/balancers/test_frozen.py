"""Every balancer's weights after the same measurements, written down: no later change moves them unseen."""

import pytest

from tests.balancers.test_contract import BALANCERS, EPOCH, TASKS, TORCHJD, measurements, run
from tests.helpers import of_version_0_1

pytestmark = of_version_0_1

FROZEN = {
    "GradNorm": [24.7368884002, 3.61122992993, 0.608059257121],
    "GradNorm alpha": [17.6831551354, 3.28808557907, 0.5534731093],
    "GradNorm residuals": [2.77860843805, 1.0, 0.943276584536],
    "GradNorm Adam": [3.14394095816, 2.89211177767, 0.390523496057],
    "GradNorm every 3rd, mean of 2": [13.3704429221, 1.95336974013, 0.713488325049],
    "GradNorm 0.1": [1.17603206249, 1.11550875179, 0.708459185717],
    "GradNorm 0.1 defaults": [1.3916169513, 1.13917952006, 0.8381992232],
    "GradNorm paper": [1.17971678536, 1.15295990791, 0.667323306731],
    "GradNorm 0.1 closed form": [2.73536877389, 0.24245990882, 0.0221713172857],
    "GradNorm 0.1 scale=gradient": [1.3797590097, 1.30875109596, 0.831187325302],
    "GradNorm 0.1 scale=reference": [1.05425624013, 1, 0.63509962121],
    "GradNorm 0.1 every 3rd, mean of 2": [1.06343340718, 1.04362353478, 0.892943058038],
    "EqualWeights": [1, 1, 1],
    "FixedWeights": [0.25, 2, 1.5],
    "LossRatioBalancing": [1.27688774942, 0.698793091042, 1.02431915954],
    "LossRatioBalancing mean of 2": [1.20562840978, 0.806649796412, 0.987721793812],
    "UncertaintyWeighting": [0.674921960444, 1.07699427338, 0.381234872619],
    "UncertaintyWeighting revised": [0.673631335144, 0.642906243231, 0.381349943459],
    "DynamicWeightAverage": [0.987451196929, 0.926254782881, 1.08629402019],
    "DynamicTaskPrioritization": [0.0763571323976, 0.829511849796, 0.601591764532],
    "AdaptiveNormalizedLoss": [52.7128686807, 0.904025247631, 0.0243349772752],
    "LearningRateAnnealing": [10.7940300685, 1, 0.564084074237],
    "LearningRateAnnealing norm": [3064.89536193, 92.2100416739, 1.08171338811],
    "NTKWeighting": [5052182.14278, 817.795131658, 1.00122449563],
    "GramianWeighting": [57.0612112797, 0.535642070029, 0.0168608454933],
    "ScalarizerBalancer": [0.000793756684288, 0.0186627712101, 0.999825537205],
    "DualBalancing": [138.865809266, 4.28441450346, 0.633948387402],
    "SoftOptimalUncertainty": [1, 1.1377041635e-21, 1.39010123496e-22],
    "GO4Align": [450.649672024, 9.69135457682, 9.69135457682],
    "CoVWeighting": [0.759676301781, 1.24938039735, 0.990943300869],
    "RandomLossWeighting": [1.6518724582, 0.104387927023, 1.24373961478],
    "GeometricLoss": [10.3130534846, 0.438630207361, 0.0081874833278],
    "ReLoBRaLo": [2.62777266449, 0.0407982787909, 0.331429056716],
    "SoftAdapt": [1.17352574047, 1.82647422953, 2.99999997e-08],
    "SoftAdapt normalized": [1.45901301485, 1.53064350327, 0.0103434818792],
    "SoftAdapt loss-weighted": [0.00566126403727, 0.134290274646, 2.86004846132],
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_values(name):
    """After twelve of the contract's measurements; written down once, so that no later change moves them unseen."""
    weights = run(BALANCERS[name](), measurements(12)).weights_for(TASKS).tolist()
    assert weights == pytest.approx(FROZEN[name], rel=1e-9)


def test_every_balancer_has_a_frozen_value():
    assert set(FROZEN) == set(BALANCERS) - TORCHJD, "the numbers of another library are its own"
    assert EPOCH < 6, "two epochs at least, or DWA shows nothing"
