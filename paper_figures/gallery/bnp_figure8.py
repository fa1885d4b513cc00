"""Figure 8 of the BNP paper: its committed reproduction, not measured again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paper_figures.figures.paper_fig8 import NUMBERS
from paper_figures.frame import HERE, stored
from paper_figures.gallery import Entry, Row, Settings


def measure(settings: Settings) -> Iterator[Row]:
    """At the beginning, in the middle and at the end of the run without BNP, and of one with `P`."""
    data = stored("paper_fig8", HERE / "full")
    if data is None:  # an installed package has no committed data
        return
    for method, words, float32, certified in (
        ("vanilla", "without P", "float32", ("certified", "upper")),
        ("BNP", "with P", "float32, P", ("running", "running upper")),
    ):
        readings = data[f"published/{method}"]
        steps, printed = readings[:, np.isfinite(readings[1])]
        for point in settings["points"]:
            k = round(point * (len(data["steps"]) - 1))
            step = float(data["steps"][k])
            numbers = dict(zip(NUMBERS, data[f"measured/{method}"][0, k], strict=True))
            value, upper = (float(numbers[name]) for name in certified)
            yield Row(
                case=f"{words}, iteration {step:.0f}",
                printed=float(10 ** printed[np.abs(steps - step).argmin()]),
                reported=float(numbers[float32]),
                # With relative radii a of the largest and b >= a of the smallest singular value the upper bound is
                # value (1 + a)/(1 - b), squared, and (1 - a)/(1 + b) is not below the reciprocal of (1 + a)/(1 - b).
                lower=value**2 / upper,
                upper=upper,
                agrees=False,
            )


ENTRY = Entry(
    title="The Hessian of one output unit in training with and without BNP",
    source=(
        "S. Lange, K. Helfrich, Q. Ye, *Batch Normalization Preconditioning for Neural Network Training*, JMLR 23(72), "
        "2022, Figure 8, centre; the printed numbers were read off the curves at the nearest iteration."
    ),
    setting=(
        "ReLU perceptron with 100 and 100 hidden units on CIFAR-10, batch 60; 101 x 101 Hessian of the first output "
        "unit. The numbers are those of the figure `paper_fig8`."
    ),
    naive="`cond` of the matrix formed in float32. This is our inference: the paper does not state its procedure.",
    certified="`condition_number` by factor-svd of the 60 rows, without the features that are constant on the batch.",
    check="none here; `tests/test_paper_fig8.py` compares the measurement with independent computations.",
    why=(
        "A 101 x 101 Hessian from 60 rows has at least 41 zero eigenvalues. The plotted number is the largest "
        "eigenvalue over the rounding error of a zero. The ratio of nonzero eigenvalues is smaller than the printed "
        "numbers by factors of 1e3 to 1e19."
    ),
    presets={"quick": {"points": [0.0, 0.5, 1.0]}, "full": {"points": [0.0, 0.5, 1.0]}},
    measure=measure,
)
