"""The re-stated peers do what ours does on equal inputs; speed is for benchmarks/peers.py to say."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers
import restated
from peers import Sampling

from gambeson.sampling.contrastive import hard_negative
from gambeson.sampling.levels import TimestepLevels


def _embeddings():
    rows = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(3.0, dtype=torch.float64)
    both = [f(1 + 3 * rows[0] + rows[1]) for f in (torch.sin, torch.cos)]
    return [torch.nn.functional.normalize(z, dim=1) for z in both]


def test_hard_negatives_are_the_published_numbers():
    z1, z2 = _embeddings()
    assert float(restated.hard_negatives(z1, z2, 10.0, 0.1, 1.0)) == pytest.approx(1.939642250197, abs=1e-12)
    ours = hard_negative(z1, z2, temperature=0.5, tau_plus=0.3, beta=2.0, clamp=True).mean()
    assert float(restated.hard_negatives(z1, z2, 0.5, 0.3, 2.0)) == pytest.approx(float(ours), abs=1e-12)


def test_the_sub_sequence_is_the_authors():
    steps = restated.squared_timesteps()
    assert (len(steps), steps.count(0), len(set(steps)), sum(t >= 400 for t in set(steps))) == (200, 8, 187, 59)
    assert sorted(set(steps)) == TimestepLevels(kind="quad", steps=200).timesteps().tolist()
    peer = restated.GuidedDDIM(torch.nn.Identity(), torch.flatten, torch.nn.Identity(), sorted(set(steps)))
    assert peer.guided() == 58  # the first step is not (METHOD 1.2)


def test_guided_sampling_is_equal_and_guidance_matters():
    both = Sampling.build("cpu", True, torch.float64, batch=4)
    theirs = both.theirs()
    assert peers.difference(both.ours(), theirs) < 1e-10
    steps = sorted(set(restated.squared_timesteps()), reverse=True)[::24][::-1]
    peer = restated.GuidedDDIM(both.denoiser.network, both.encoder.features, both.encoder, steps, strength=0.0)
    assert peers.difference(peer(both.noise, both.labels), theirs) > 1e-3
    assert not any(p.requires_grad for p in both.encoder.parameters())


def test_unguided_ddim_of_a_point_comes_home():
    """One image x0: its exact eps, (x - sqrt(abar) x0) / sqrt(1 - abar), leads any noise back to it."""
    x0, power = torch.tensor([0.3, -0.7], dtype=torch.float64).reshape(1, 2, 1, 1), restated.alpha_bars()

    class Exact(torch.nn.Module):
        def forward(self, x, time, labels):
            a = power[round(float(time[0]) * 1000)]
            return (x - a.sqrt() * x0) / (1 - a).sqrt()

    peer = restated.GuidedDDIM(Exact(), torch.flatten, torch.nn.Identity(), [0, 10, 300, 799], strength=0.0)
    found = peer(torch.tensor([2.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1), None)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)
    assert math.isclose(float(power[0]), 1 - 1e-4)


def test_every_row_is_equal_and_the_last_line_is_json(capsys):
    told = peers.main(["--quick", "--rounds", "1"])
    assert {name: row["equal"] for name, row in told["rows"].items()} == dict.fromkeys(peers.ROWS, True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(told))
    assert 0 < told["rows"]["autoattack"]["robust"]["ours"] < 1
    assert all(row["times_as_fast"] for row in told["rows"].values())


def test_another_result_has_no_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "one_step", lambda *_: 0.5)
    asked = peers.Asked("cpu", True, 1, False, tmp_path)
    row = peers.training(asked)
    assert not row["equal"]
    assert "times_as_fast" not in row


def test_contents_see_a_label_that_moved():
    images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    assert peers.contents(iter([(images, labels)])) == peers.contents(iter([(images.flip(0), labels.flip(0))]))
    assert peers.contents(iter([(images, labels)])) != peers.contents(iter([(images, labels.flip(0))]))


def test_the_costliest_operation_is_named(tmp_path):
    a, asked = torch.rand(300, 300), peers.Asked("cpu", True, 1, True, tmp_path)
    found = peers.costs(asked, lambda: [a @ a for _ in range(20)] and a.sum())
    assert (found[0]["operation"], found[0]["calls"]) == ("aten::mm", 20)
    assert 0.5 < found[0]["share"] <= 1
