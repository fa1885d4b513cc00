"""Catches: a model that writes into its inputs and is not given copies (values seen at construction, or later), and
copies that are kept in every graph of a model that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InconsistentDataError


class Writes(nn.Module):
    """Writes into its input, where autograd sees it or behind its back; perhaps only for large inputs."""

    def __init__(self, behind: bool, above: float = -1e9) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.behind, self.above = behind, above

    def forward(self, x: Tensor) -> Tensor:
        if float(x.max()) > self.above:
            (x.data if self.behind else x).mul_(2.0)
        return self.fc(x)


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g) + k, torch.randint(0, 2, (4,), generator=g)) for k in range(2)]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("above", [-1e9, 1.0])
def test_a_model_that_writes_gets_copies(behind: bool, above: float) -> None:
    """Also one that writes into the second batch alone."""
    model = Writes(behind, above)
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, data())
    expected = sum(F.cross_entropy(model(x), y) for x, y in data()).detach() / 2
    for _ in range(3):
        torch.testing.assert_close(risk(risk.theta), expected)
        torch.testing.assert_close(bnp.hessian(risk) @ risk.theta, bnp.hessian(risk) @ risk.theta)


def test_a_model_that_begins_to_write_is_refused() -> None:
    class Later(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if float(self.weight.abs().max()) > 10:
                x.mul_(2.0)
            return super().forward(x)

    risk = bnp.EmpiricalRisk(Later(3, 2), F.cross_entropy, data())
    with pytest.raises(InconsistentDataError, match="wrote into its inputs"):
        risk(100 * torch.ones_like(risk.theta))


SEEN: list[int] = []


class Notes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.data_ptr())
        return super().forward(x)


def test_inputs_are_not_copied_into_graphs() -> None:
    risk = bnp.EmpiricalRisk(Notes(3, 2), F.cross_entropy, data())
    H = bnp.hessian(risk)  # tried on copies
    SEEN.clear()
    _ = H @ risk.theta
    assert set(SEEN) == {batch.x.data_ptr() for batch in risk.batches}
