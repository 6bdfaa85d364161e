"""optim.py: steps that are nearly orthogonal, those of a stack as of one bank, and the average."""

import copy

import pytest
import torch
from torch import nn

import models
import optim


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_orthogonalised_keeps_directions_and_evens_out_strengths(shape, dtype, error):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    strengths = torch.linspace(10, 1, min(shape))
    result = optim.orthogonalise(u * strengths @ v, dtype)
    assert result.dtype == torch.float32
    inner = u.T @ result @ v.T  # diagonal: the same directions
    assert (inner - inner.diag().diag()).abs().max() < error
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3


def test_the_products_of_orthogonalisation_are_those_of_newton_schulz():
    """The shortcut, products of small matrices, against the steps one by one on the large one."""
    torch.manual_seed(0)
    for shape in ((3, 12, 40), (40, 12), (16, 16)):
        matrices = torch.randn(shape, dtype=torch.float64)
        x = matrices.mT if shape[-2] > shape[-1] else matrices
        x = x / x.norm(dim=(-2, -1), keepdim=True)
        for _ in range(3):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.mT if shape[-2] > shape[-1] else x
        assert torch.allclose(optim.orthogonalise(matrices, torch.float64), x, atol=1e-6)


def test_directions_of_a_fiftieth_of_the_norm_are_brought_up():
    u, v = (torch.linalg.qr(torch.randn(32, 32, dtype=torch.double))[0] for _ in range(2))
    strengths = torch.tensor([1.0, *[0.02] * 15, *[1e-4] * 16], dtype=torch.double)
    result = optim.orthogonalise(u * strengths @ v, torch.double)
    found = torch.linalg.svdvals(result / 1)
    assert 0.7 < found[15] and found[0] < 1.2
    assert found[-1] / 1e-4 == pytest.approx(41, rel=0.02)


def test_what_has_no_gradient_stays_and_no_kind_need_be_there():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    optimizer = optim.Muon(network, 0.1, 0.05)  # no vector, no linear layer
    before = [p.detach().clone() for p in network.parameters()]
    network[0](torch.randn(2, 4, 8, 8)).sum().backward()
    optimizer.step()
    first, second = network.parameters()
    assert not torch.equal(first, before[0]) and torch.equal(second, before[1])


def test_a_copy_takes_the_same_steps_and_a_closure_computes_gradients():
    network = models.cnn(2, 16)
    own = network, optim.Muon(network, 0.1, 0.05, dtype=torch.bfloat16)
    twin = copy.deepcopy(own)
    for module, optimizer in (own, twin):
        def closure(module=module):
            loss = module(torch.ones(2, 3, 16, 16)).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        assert "dtype" not in optimizer.state_dict()["param_groups"][0]  # the machine's
    for ours, theirs in zip(network.parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is not None


def test_no_gradient_is_orthogonalised_to_no_step():
    assert not optim.orthogonalise(torch.zeros(4, 9)).any()


def test_a_step_of_all_banks_at_once_is_that_of_each_alone():
    torch.manual_seed(0)
    network, rate, decay, momentum, plain_rate = models.cnn(), 0.1, 0.05, 0.9, 5.0
    optimizer = optim.Muon(network, rate, decay, momentum, plain_rate)
    expected = {p: (p.detach().clone(), torch.zeros_like(p)) for p in network.parameters()}
    for _ in range(2):
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, (value, velocity) in expected.items():
            velocity.mul_(momentum).add_(p.grad)
            step, scale = p.grad + momentum * velocity, plain_rate
            if p.ndim == 4 and p.shape[1] > 3:
                matrix = optim.orthogonalise(step.reshape(len(p), -1))
                step = matrix.view_as(p) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                value.mul_(1 - rate * decay)
                scale = 1
            value.sub_(rate * scale * step)
    for p, (value, _) in expected.items():
        assert torch.allclose(p, value, atol=1e-4)


def test_the_average_is_a_mean_of_weights_and_statistics_of_the_latest_steps():
    module = nn.BatchNorm1d(2)
    average = optim.Average(module)
    values = [torch.tensor([step, -step]) ** 2 for step in map(float, range(1, 101))]
    for step, value in enumerate(values, 1):
        module.weight.data, module.running_mean = value.clone(), 2 * value
        average.update(module, average.next_share())
        if step == 1:  # what it began with counts for nothing
            assert torch.equal(average.module.weight, value)
    shares = [1 - (1 - 1 / step) ** 16 for step in range(1, 101)]
    expected, left = torch.zeros(2), 1.0
    for value, share in zip(reversed(values), reversed(shares), strict=True):  # shares sum to 1
        expected, left = expected + left * share * value, left * (1 - share)
    assert left == pytest.approx(0, abs=1e-6)
    assert torch.allclose(average.module.weight, expected, rtol=1e-4)
    assert torch.allclose(average.module.running_mean, 2 * expected, rtol=1e-4)
    assert not average.module.training and not average.module.weight.requires_grad
