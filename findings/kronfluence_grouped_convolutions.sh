#!/usr/bin/env bash
# kronfluence 1.0.1: influence scores of a grouped convolution come from gradients that no such layer has.
#
# `nn.Conv2d` is supported and no value of `groups` refused. For the Kronecker factors the library averages a layer's
# input over the groups, an approximation that leads to one factor instead of one per group. It uses the same averaged
# input for the gradient of every example: output channels of group 2 get the mean of all groups' inputs where the chain
# rule has the input of group 2. Scores of every strategy are made from these gradients. Measured here with strategy
# "identity", whose scores are inner products of plain gradients, to be compared with torch's to rounding: with one
# group they agree. With two or four (a depthwise layer, as in MobileNet, EfficientNet and ConvNeXt) pairwise and self
# influence are off by half, 7 to 18 percent of the pairs have the wrong sign, and all scores equal to rounding those of
# gradients made with the group means. No error and no warning: the shapes fit, since a grouped kernel has one group's
# input channels only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.2.6 packaging==25.0 tqdm==4.67.1 pyyaml==6.0.3 psutil==7.1.3 safetensors==0.6.2
pip --no-deps kronfluence==1.0.1 accelerate==1.15.0 einops==0.8.2 einconv==0.1.0 opt_einsum==3.4.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import TensorDataset

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
print("torch", version("torch"), "kronfluence", version("kronfluence"))
N, CHANNELS, CLASSES = 8, 4, 3
draw = torch.Generator().manual_seed(0)
x, y = torch.randn(N, CHANNELS, 6, 6, generator=draw), torch.randint(CLASSES, (N,), generator=draw)


def loss(net, x, y):
    return nn.functional.cross_entropy(net(x), y, reduction="sum")


class Classify(Task):
    """The loss as objective and as measurement; influence through the convolution's parameters only."""

    def compute_train_loss(self, batch, model, sample=False):
        return loss(model, *batch)

    def compute_measurement(self, batch, model):
        return loss(model, *batch)

    def get_influence_tracked_modules(self):
        return ["0"]


def network(groups):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3, groups=groups), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)
    )


def by_kronfluence(groups):
    """Scores of all pairs and of every example with itself."""
    task, data, double = Classify(), TensorDataset(x, y), torch.float64
    model = prepare_model(network(groups), task)
    analyzer = Analyzer(f"groups_{groups}", model, task, cpu=True, output_dir="results", disable_tqdm=True)
    analyzer.fit_all_factors("factors", data, per_device_batch_size=N, factor_args=FactorArguments(strategy="identity"))
    options = ScoreArguments(score_dtype=double, per_sample_gradient_dtype=double, precondition_dtype=double)
    analyzer.compute_pairwise_scores("pairs", "factors", data, data, per_device_query_batch_size=N, score_args=options)
    analyzer.compute_self_scores("self", "factors", data, score_args=options)
    return analyzer.load_pairwise_scores("pairs")["all_modules"], analyzer.load_self_scores("self")["all_modules"]


def by_torch(groups):
    """Gradients of the convolution's parameters, one example after the other."""
    net = network(groups)
    parameters = list(net[0].parameters())
    rows = [torch.autograd.grad(loss(net, x[i : i + 1], y[i : i + 1]), parameters) for i in range(N)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def with_group_means(groups):
    """The same, with the mean of the groups' inputs in the place of each group's own."""
    net = network(groups)
    z = net[0](x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(loss(net[1:], z, y), z)
    mean = x.unflatten(1, (groups, -1)).mean(dim=1)
    patches, dz = nn.functional.unfold(mean, 3), dz.flatten(2)
    return torch.cat([torch.einsum("nop,nip->noi", dz, patches).flatten(1), dz.sum(dim=2)], dim=1)


def off(A, B):
    return float((A - B).norm() / B.norm())


for groups in (1, 2, 4):
    pairs, own = by_kronfluence(groups)
    right, averaged = by_torch(groups), with_group_means(groups)
    others = ~torch.eye(N, dtype=torch.bool)
    signs = float((pairs.sign() != (right @ right.T).sign())[others].double().mean())
    print(f"groups={groups}: pairwise influence off by {off(pairs, right @ right.T):.2g}, wrong sign in {signs:.0%} of "
          f"pairs, self influence off by {off(own, right.square().sum(dim=1)):.2g}; from the gradients with group "
          f"means by {off(pairs, averaged @ averaged.T):.1g} and {off(own, averaged.square().sum(dim=1)):.1g}")
    assert off(pairs, averaged @ averaged.T) < 1e-12 and off(own, averaged.square().sum(dim=1)) < 1e-12
    if groups == 1:
        assert off(pairs, right @ right.T) < 1e-12 and off(own, right.square().sum(dim=1)) < 1e-12
    else:
        assert off(pairs, right @ right.T) > 0.4 and off(own, right.square().sum(dim=1)) > 0.4 and signs > 0.05
print("as described")
PYTHON
