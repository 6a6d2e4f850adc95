"""The re-stated loop of benchmarks/ does what ours does when asked for the same, and as many operations as it says."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import layouts
from loops import ROWS, Bench, Usual
from training import Counted, forward_flops, random_set, random_store, warmed

from gambeson.models.wideresnet import WideResNetSpec
from gambeson.robustness.losses import TRADES
from gambeson.threat import ThreatModel
from gambeson.training.loop import Optimisation, TrainingState

NETWORK = WideResNetSpec(depth=10, width=1)
PLAN = Optimisation(steps=10, batch_size=6, learning_rate=0.1, warmup=0.0)
LOSS = TRADES(threat=ThreatModel(), steps=3, label_smoothing=0.1, attack_mode="train", statistics="both")


@pytest.mark.parametrize("backward", [True, False])
def test_one_step_of_the_usual_loop_is_one_of_ours(backward):
    data = random_set(6, side=8).train
    x, y = data.images, data.labels
    loop = Usual(NETWORK.build(3, 10, 1), PLAN, LOSS, data, True, backward)
    loop.step(0, x, y, torch.Generator().manual_seed(3))

    state = TrainingState.start(NETWORK.build(3, 10, 1), PLAN)
    state.model.train()
    PLAN.prepare(state.optimiser, 0)
    LOSS(state.model, x, y, torch.Generator().manual_seed(3)).mean().backward()
    state.optimiser.step()
    state.average(PLAN.averaging(1))
    for name, value in state.averaged.state_dict().items():
        torch.testing.assert_close(loop.average.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    start = NETWORK.build(3, 10, 1).state_dict()["logits.weight"]
    assert (loop.average.state_dict()["logits.weight"] - start).abs().max() > 1e-3


def test_crops_are_pieces_of_the_padded_image_and_mirrored_ones():
    data = random_set(40, side=16).train
    loop = Usual(NETWORK.build(3, 10), PLAN, LOSS, data, True, False)
    found = loop.augmented(data.images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(data.images, [2] * 4)
    kinds = set()
    for image, canvas in zip(found, padded, strict=True):
        places = [(t, s) for t in range(5) for s in range(5)]
        same = {f: [p for p in places if torch.equal(image.flip(2) if f else image, _crop(canvas, p))] for f in (0, 1)}
        assert len(same[0]) + len(same[1]) == 1
        kinds.add(0 if same[0] else 1)
    assert kinds == {0, 1}


def _crop(canvas, place):
    top, left = place
    return canvas[:, top : top + 16, left : left + 16]


def test_forward_operations_are_two_for_each_multiply_add():
    by_hand = 8 * 8 * 9 * 3 * 16 + 8 * 8 * 9 * 16 * 16 * 2  # first convolution, two of the first block
    by_hand += 4 * 4 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) + 2 * 2 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) + 64 * 10
    assert forward_flops(NETWORK.build(3, 10), 8) == 2 * by_hand


@pytest.mark.parametrize(("name", "equivalents"), [("usual", 37), ("usual_grad", 27), ("ours", 27)])
def test_rows_do_as_many_operations_as_they_say(name, equivalents, tmp_path):
    plan = Optimisation(steps=2, batch_size=4, learning_rate=1e-4)
    loss = TRADES(threat=ThreatModel(), steps=10, label_smoothing=0.1)
    store = random_store(tmp_path / "store", 40, side=16)
    bench = Bench("cpu", NETWORK, plan, loss, random_set(8, side=16), store, tmp_path)
    unit = forward_flops(NETWORK.build(3, 10), 16)
    row = warmed(bench, name, unit)
    assert equivalents - 0.15 < row.equivalents <= equivalents  # the images ask for no gradient in the outer passes
    assert next(row.steps) == 2
    assert ROWS[name].usual or list(tmp_path.glob(f"{name}-0"))


def test_counting_sees_the_weights_gradient():
    layer, x = torch.nn.Linear(3, 4), torch.ones(5, 3, requires_grad=True)
    with Counted() as counted:
        layer(x).sum().backward()
    assert counted.flops == 3 * 2 * 5 * 3 * 4


def test_a_folded_block_is_the_block_in_eval_mode_and_not_in_training():
    block = layouts.Block(8, 16, 2)
    for norm in (block.norm1, block.norm2):  # statistics of a network that has been trained
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
        torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(3))
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(layouts.Folded(block.eval())(x), block(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layouts.Folded(block)(x), block.train()(x), atol=1e-2)


def test_layouts_are_timed_in_turns_without_the_first_round():
    calls = []
    found = layouts.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
