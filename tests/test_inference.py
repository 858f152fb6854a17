"""What is evaluated gives the same bits whatever was being trained."""

import pytest
import torch
from helpers import output, problems, tiny_model
from torch import nn

from prunedm.evaluation.loss import denoising_loss
from prunedm.networks.inference import evaluating


@pytest.mark.parametrize("wanting", ["all", "none", "some"])
def test_a_loss_does_not_depend_on_what_is_trained(wanting):
    """Of a model with attention, whose linear layers read what is not contiguous."""
    denoiser, batch = tiny_model().denoiser, problems().batch(range(8))
    wanted = denoising_loss(denoiser.requires_grad_(False), [batch]).per_problem_N
    for k, parameter in enumerate(denoiser.parameters()):
        parameter.requires_grad_({"all": True, "none": False, "some": k % 2 == 0}[wanting])
    assert torch.equal(denoising_loss(denoiser, [batch]).per_problem_N, wanted)
    with evaluating(denoiser):
        mine = output(denoiser)
    with evaluating(denoiser.requires_grad_(False)):
        assert torch.equal(output(denoiser), mine)


def test_the_network_is_as_it_was_also_after_an_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout()))
    network[2].eval()  # frozen by hand: a plain .train() would wake it
    network[0].bias.requires_grad_(False)

    def fails() -> None:
        with evaluating(network):
            assert not any(module.training for module in network.modules())
            assert not any(parameter.requires_grad for parameter in network.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [m.training for m in network.modules()] == [True, True, True, False, False]
    assert [p.requires_grad for p in network.parameters()] == [True, False]
