"""What moves the weights: Muon, and a mean of the weights over the steps.

    optimizer = optim.Muon(network, lr=0.03, weight_decay=0.05)
    average = optim.Average(network)                            # average.module: validated, kept
    ...
    optimizer.step()
    average.update(network, average.next_share())

This file imports nothing of the project: copy it alone and it works.
"""

import copy
from collections import defaultdict

import torch


def orthogonalise(matrices, dtype=torch.float32):
    """Nearly the orthogonal matrix nearest to each of `matrices` (..., m, n).

    Three Newton-Schulz steps x <- (3.4445 - 4.775 xx' + 2.0315 (xx')^2) x, of x with norm 1, bring
    singular values above 1/50 to 0.7..1.2, and multiply smaller ones by up to 41 (Jordan et al.
    2024, who take five; x' is the transpose). Each step is a polynomial in the small matrix xx'
    (m, m): these are multiplied first, and x once.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)  # (..., m, n), m <= n
    gram = x @ x.mT
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-14  # Frobenius norm's
    gram = gram / squares
    transform = torch.eye(gram.shape[-1], dtype=dtype, device=x.device) / squares.sqrt()
    for _ in range(3):
        polynomial = -4.7750 * gram + 2.0315 * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        transform = polynomial @ transform
        gram = polynomial @ gram @ polynomial
    x = transform @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, the step of every bank of filters (a convolution's weights) made
    orthogonal.

    A gradient is dominated by few directions; orthogonal, a step moves all of them alike (Jordan et
    al. 2024). All other weights (vectors, linear layers, filters of a photo's 3 channels) take the
    plain step, at `plain_lr` times the rate. Only the banks decay. Batch normalisation cancels
    their scale, but a larger scale makes a step smaller beside it, and decay keeps it from growing.
    Banks of one shape are a group, and one stack of matrices (torch.optim.Muon takes matrices
    alone, one after another).
    """

    def __init__(self, network, lr, weight_decay, momentum=0.9, plain_lr=5.0,
                 dtype=torch.float32):
        banks, plain = defaultdict(list), []
        for p in network.parameters():
            if p.requires_grad:
                (banks[p.shape] if p.ndim == 4 and p.shape[1] > 3 else plain).append(p)
        groups = [dict(params=bank, orthogonal=True, scale=1.0, weight_decay=weight_decay)
                  for bank in banks.values()]
        groups.append(dict(params=plain, orthogonal=False, scale=plain_lr, weight_decay=0.0))
        super().__init__(groups, dict(lr=lr, momentum=momentum))
        self.defaults["dtype"] = dtype  # this machine's: not saved
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["velocity"] = torch.zeros_like(p)

    # GradScaler (float16) sets the loss's scale, and whether a gradient overflowed, before a step:
    # tensors that stay on the device, so that nothing waits for their numbers.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter; a `_foreach` function takes a list of tensors at once.

        A group's "lr" may be a tensor without dimensions, so that a recorded step reads today's.
        closure: as torch's optimisers take it, computes gradients; its loss is returned.
        """
        with torch.enable_grad():
            closure_loss = closure() if closure else None
        loss_scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            momentum = group["momentum"]
            rate = group["lr"] * group["scale"]
            gradients = [p.grad for p in parameters]
            if loss_scale is not None:
                overflow = self.found_inf > 0
                gradients = [(g / loss_scale).masked_fill(overflow, 0) for g in gradients]
                rate = rate * ~overflow  # no step, and the velocity fades
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients)
            updates = torch._foreach_add(gradients, velocities, alpha=momentum)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            if group["orthogonal"]:
                filters, channels, height, width = parameters[0].shape
                # (banks, filters, weights), in the order of channels-last memory: nothing is moved
                matrices = torch.stack([u.permute(0, 2, 3, 1).flatten(1) for u in updates])
                matrices = orthogonalise(matrices, self.defaults["dtype"])
                matrices = matrices.unflatten(2, (height, width, channels))
                updates = list(matrices.permute(0, 1, 4, 2, 3).unbind())
                # So that each filter's step has a norm of about 1.
                rate = rate * max(1, filters / (channels * height * width)) ** 0.5
            torch._foreach_mul_(updates, rate)
            torch._foreach_sub_(parameters, updates)
        return closure_loss


class Average:
    """A copy of a module with a running mean of its weights and statistics.

    Step t counts about t^15, so mostly the latest tenth of all steps, whenever that is (Karras et
    al. 2024). Without it (share = 1: the latest weights) an accuracy is 3 to 8 points lower while
    the rate is high.
    """

    def __init__(self, module, steps=0):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.steps = steps  # taken so far

    def next_share(self):
        """What the weights of the next step count in the mean of all."""
        self.steps += 1
        return 1 - (1 - 1 / self.steps) ** 16  # the sum of all t^15 grows as t^16

    def update(self, module, share):
        """mean += share * (weights of `module` - mean)."""
        mean = floats(self.module)
        difference = torch._foreach_sub(floats(module), mean)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(mean, difference)


def floats(module):
    """Weights and statistics of a module, without their gradients."""
    tensors = (*module.parameters(), *module.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
