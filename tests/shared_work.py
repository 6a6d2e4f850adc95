"""What two processes do together under torchrun for test_distributed; any failed assertion ends it with an error."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from gambeson import distributed
from gambeson.store import Workspace
from gambeson.training.batch_norm import SharedBatchNorm, average_statistics, share_batch_norm
from gambeson.training.loop import Optimisation, TrainingState, fit


def batch_norm_is_that_of_the_whole_batch() -> None:
    """Outputs, input gradients, parameter gradients and running statistics, parts of 3 and 2 images."""
    g = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(5, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    alone, shared = nn.BatchNorm2d(2).double(), nn.Sequential(nn.BatchNorm2d(2).double())
    with torch.no_grad():
        alone.weight.copy_(torch.tensor([0.5, 2.0]))
        shared[0].weight.copy_(alone.weight)
    share_batch_norm(shared)
    assert isinstance(shared[0], SharedBatchNorm)
    here = distributed.rank()
    whole = x.clone().requires_grad_()
    with distributed.apart():
        (alone(whole) * slope).sum().backward()
    part = x.tensor_split(2)[here].clone().requires_grad_()
    out = shared(part)
    (out * slope.tensor_split(2)[here]).sum().backward()
    gradients = [p.grad for p in shared.parameters() if p.grad is not None]
    distributed.add(gradients)
    assert whole.grad is not None
    assert alone.weight.grad is not None
    with torch.no_grad(), distributed.apart():
        again = nn.BatchNorm2d(2).double()
        again.weight.copy_(alone.weight)
        expected = again(x).tensor_split(2)[here]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(part.grad, whole.grad.tensor_split(2)[here])
    torch.testing.assert_close(gradients[0], alone.weight.grad)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(shared[0].state_dict()[name], value)


def sums_and_what_the_first_knows() -> None:
    here = distributed.rank()
    tensors = [torch.full((2,), 1.0 + here), torch.tensor([[10.0 * here]]), torch.tensor([here], dtype=torch.int64)]
    distributed.add(tensors)
    assert [t.flatten().tolist() for t in tensors] == [[3.0, 3.0], [10.0], [1]]
    means = [torch.tensor([float(here)])]
    distributed.average(means)
    assert means[0].item() == 0.5
    assert distributed.total(here + 1.5) == 4.0
    assert distributed.told({"who": here}) == {"who": 0}
    assert (distributed.world(), distributed.leads()) == (2, here == 0)
    with distributed.apart():
        assert (distributed.world(), distributed.rank(), distributed.total(7.0)) == (1, 0, 7.0)
    norm = nn.Sequential(nn.BatchNorm2d(1))
    norm[0].running_mean.fill_(here * 4.0)
    average_statistics(norm)
    assert norm[0].running_mean.item() == 2.0


def a_loss_that_is_not_finite_in_one_process_stops_both() -> None:
    """While batch norms are shared: nobody waits for the other, both are told, no weight is touched."""
    with tempfile.TemporaryDirectory() as place:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        share_batch_norm(model)
        state, before = TrainingState.start(model, Optimisation()), model[0].weight.detach().clone()
        images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(distributed.rank()))
        bad = torch.nan if distributed.rank() == 1 else 1.0
        walk = fit(state, Optimisation(steps=2), lambda step: model(images).sum(1) * bad, Workspace(Path(place)))
        with pytest.raises(ValueError, match="loss of step 0"):
            list(walk)
        assert torch.equal(model[0].weight, before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.joined():
        batch_norm_is_that_of_the_whole_batch()
        sums_and_what_the_first_knows()
        a_loss_that_is_not_finite_in_one_process_stops_both()
    distributed.leave(0)
