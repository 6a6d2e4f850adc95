"""What an evaluation takes: logits of any precision, its own journal only; and what it says to what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gambeson.robustness import AutoAttack
from gambeson.robustness.autoattack import attack_table
from gambeson.threat import ThreatModel

LINF = ThreatModel(epsilon=0.1)
X = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 5)).eval()


@pytest.fixture(scope="module")
def labels(net):
    return net(X).argmax(1)


def short(*names, **changes):
    return AutoAttack(threat=LINF, version="custom", attacks=names, steps=5, queries=20, **changes)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_another_dtype_are_taken(net, labels, kind):
    """As of a network that wraps itself in autocast: every attack climbs them; float64 ones give the same verdicts."""

    def cast(x):
        return net(x).to(kind)

    labels = cast(X).argmax(1)
    result = short(*attack_table(LINF))(cast, X, labels, batch_size=7)
    assert 0 <= result.robust.sum() < 20
    if kind == torch.float64:
        assert torch.equal(result.robust, short(*attack_table(LINF))(net, X, labels, batch_size=7).robust)


class Journal:
    """A state in memory, saved after every step."""

    def __init__(self):
        self.state = None

    def load(self):
        return copy.deepcopy(self.state)

    def due(self):
        return True

    def save(self, state):
        self.state = copy.deepcopy(state)


def test_a_journal_belongs_to_one_evaluation(net, labels):
    journal, attack = Journal(), short("apgd-ce", "square")
    found = attack(net, X, labels, journal=journal)
    again = attack.run_standard_evaluation(net, X, labels, journal=journal, say=lambda line: None)
    assert torch.equal(again, found.images)
    others = [
        (attack, net, X.flip(0), labels.flip(0)),
        (short("apgd-ce", "square", seed=1), net, X, labels),
        (attack, lambda x: -net(x), X, labels),
    ]
    for one, model, images, own in others:
        with pytest.raises(ValueError, match="journal: expected the state of this evaluation"):
            one(model, images, own, journal=journal)


BAD = {
    "one-hot labels": (lambda x, y: (x, torch.eye(5)[y]), r"labels.argmax\(1\)"),
    "float64 images": (lambda x, y: (x.double(), y), r"expected float32 images .* images.float\(\)"),
    "labels elsewhere": (lambda x, y: (x, y.to("meta")), "attack labels: expected on cpu, as the images, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_are_refused(net, labels, case):
    spoil, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        short("apgd-ce")(net, *spoil(X, labels))


def test_what_else_is_refused(net, labels):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        short("apgd-ce")(net, X, labels, batch_size=0)
    with pytest.raises(ValueError, match="one tensor of logits, got tuple"):
        short("apgd-ce")(lambda x: (net(x), x), X, labels)


def test_images_that_ask_for_gradients_come_back_without(net, labels):
    found = short("apgd-ce")(net, X.clone().requires_grad_(), labels)
    assert not found.images.requires_grad
    assert np.isfinite(found.rows["margin"].to_numpy()).all()
