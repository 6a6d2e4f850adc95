"""Contrastive losses: golden numbers, every loss worked by hand on asymmetric rows, their formulas in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import f64, randn

from gambeson.sampling.contrastive import (
    Debiased,
    HardNegative,
    InfoNCE,
    InfoNCEPaper,
    SupervisedContrastive,
    debiased,
    hard_negative,
    info_nce,
    info_nce_paper,
    supervised_contrastive,
)
from gambeson.types import ContrastiveLoss

e, ln = math.exp, math.log
CDP = {"temperature": 10.0, "tau_plus": 0.1, "beta": 1.0}
LOSSES = [
    InfoNCE(temperature=0.5),
    InfoNCEPaper(temperature=0.5),
    Debiased(temperature=0.5, tau_plus=0.0),
    HardNegative(temperature=0.5, tau_plus=0.0),
    HardNegative(temperature=0.5, tau_plus=0.0, estimator="easy"),
    SupervisedContrastive(temperature=0.5),
]


def rows(*values):
    return torch.tensor(values, dtype=f64)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=1)


def same(losses, hand):
    assert losses.tolist() == pytest.approx(hand, abs=1e-12)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_golden_losses():
    """METHOD 5, from the authors' functions; the clamps do not bite there, so both forms give them."""
    i, j = torch.arange(4.0, dtype=f64)[:, None], torch.arange(3.0, dtype=f64)
    a, b = F.normalize(torch.sin(1 + 3 * i + j), dim=1), F.normalize(torch.cos(1 + 3 * i + j), dim=1)
    for clamp in (False, True):
        hard, easy = (hard_negative(a, b, **CDP, estimator=kind, clamp=clamp).mean() for kind in ("hard", "easy"))
        assert float(hard) == pytest.approx(1.939642250197, abs=1e-9)
        assert float(easy) == pytest.approx(1.936178630267, abs=1e-9)
    assert float(info_nce(a, b, temperature=0.1).mean()) == pytest.approx(3.192429932442, abs=1e-9)


# Two images. z1 = (1, 0), (0, 1); z2 = (.6, .8), (-.6, .8). Similarities: partners .6 and .8; z1_0 to z1_1: 0, to z2_1:
# -.6; z1_1 to z2_0: .8; z2_0 to z2_1: .28. So for the anchors z1_0, z1_1, z2_0, z2_1, at temperature 1:
Z1, Z2 = rows([1.0, 0.0], [0.0, 1.0]), rows([0.6, 0.8], [-0.6, 0.8])
POS = [e(0.6), e(0.8), e(0.6), e(0.8)]
NEG = [(1.0, e(-0.6)), (1.0, e(0.8)), (e(0.8), e(0.28)), (e(-0.6), e(0.28))]


def test_info_nce_by_hand():
    # z1 z2^T = [[.6, -.6], [.8, .8]]: the softmax runs over z2
    same(info_nce(Z1, Z2, temperature=1.0), [ln(1 + e(-0.6 - 0.6)), ln(1 + e(0.8 - 0.8))])
    # at temperature .5 all similarities double
    same(info_nce(Z1, Z2, temperature=0.5), [ln(1 + e(-2.4)), ln(2)])
    # given negatives (0, 1) twice and (-1, 0): similarities 0, 0, -1 to z1_0, and 1, 1, 0 to z1_1
    n = rows([0.0, 1.0], [0.0, 1.0], [-1.0, 0.0])
    hand = [ln(1 + (2 + e(-1)) / e(0.6)), ln(1 + (2 * e(1) + 1) / e(0.8))]
    same(info_nce(Z1, Z2, n, temperature=1.0), hand)
    # the first negative only for z1_0, the last two for z1_1
    allowed = torch.tensor([[True, False, False], [False, True, True]])
    same(info_nce(Z1, Z2, n, temperature=1.0, allowed=allowed), [ln(1 + 1 / e(0.6)), ln(1 + (e(1) + 1) / e(0.8))])


def test_info_nce_paper_by_hand():
    # z1 z1^T is 0 off the diagonal: log(e^0) - .6 and - .8; the positive is not in the denominator
    same(info_nce_paper(Z1, Z2, temperature=1.0), [-0.6, -0.8])
    # a third anchor (.6, .8) with positive (0, 1): to it z1_0 has .6, z1_1 .8
    q, p = torch.cat([Z1, Z2[:1]]), torch.cat([Z2, Z1[1:]])
    hand = [ln(1 + e(0.6)) - 0.6, ln(1 + e(0.8)) - 0.8, ln(e(0.6) + e(0.8)) - 0.8]
    same(info_nce_paper(q, p, temperature=1.0), hand)
    n = rows([0.0, 1.0], [-1.0, 0.0])
    same(info_nce_paper(Z1, Z2, n, temperature=1.0), [ln(1 + e(-1)) - 0.6, ln(e(1) + 1) - 0.8])


def test_info_nce_with_classes_by_hand():
    """Three images, the first two of one class: only the third is their negative, both are its."""
    q, p, labels = torch.cat([Z1, Z2[:1]]), torch.cat([Z2, Z1[1:]]), torch.tensor([4, 4, 9])
    # keys p = (.6, .8), (-.6, .8), (0, 1). q_0: own .6, third 0. q_1: own .8, third 1. q_2 = (.6, .8): own .8, 1, .28
    hand = [ln(1 + e(0 - 0.6)), ln(1 + e(1 - 0.8)), ln(1 + (e(1) + e(0.28)) / e(0.8))]
    same(info_nce(q, p, temperature=1.0, labels=labels), hand)
    # queries: the third has .6 to the first, .8 to the second
    hand = [0.6 - 0.6, 0.8 - 0.8, ln(e(0.6) + e(0.8)) - 0.8]
    same(info_nce_paper(q, p, temperature=1.0, labels=labels), hand)


def test_debiased_by_hand():
    # Ng = (g1 + g2 - tau+ N pos) / (1 - tau+), N = 2, tau+ = .1; the floor 2/e = .736 is far
    hand = [ln(1 + (g1 + g2 - 0.2 * pos) / 0.9 / pos) for pos, (g1, g2) in zip(POS, NEG, strict=True)]
    same(debiased(Z1, Z2, temperature=1.0, tau_plus=0.1), hand)
    # tau+ = .6: z1_0 has (1 + .549 - 1.2 * 1.822) / .4 < 0 and sits on the floor; z2_0 has (2.226 + 1.323 - 2.187) / .4
    losses = debiased(Z1, Z2, temperature=1.0, tau_plus=0.6)
    assert float(losses[0]) == pytest.approx(ln(1 + 2 / e(1) / e(0.6)), abs=1e-12)
    assert float(losses[2]) == pytest.approx(ln(1 + (e(0.8) + e(0.28) - 1.2 * e(0.6)) / 0.4 / e(0.6)), abs=1e-12)


def test_hard_negative_by_hand():
    # beta = 1: sum(g^2) / mean(g) = 2 (g1^2 + g2^2) / (g1 + g2) in place of g1 + g2
    hand = [
        ln(1 + (2 * (g1**2 + g2**2) / (g1 + g2) - 0.2 * pos) / 0.9 / pos)
        for pos, (g1, g2) in zip(POS, NEG, strict=True)
    ]
    for clamp in (False, True):
        same(hard_negative(Z1, Z2, temperature=1.0, tau_plus=0.1, beta=1.0, clamp=clamp), hand)
    # easy: the plain sum, whatever tau+ and beta
    hand = [ln(1 + (g1 + g2) / pos) for pos, (g1, g2) in zip(POS, NEG, strict=True)]
    for clamp in (False, True):
        same(HardNegative(temperature=1.0, estimator="easy")(Z1, Z2, clamp=clamp), hand)
    # one image, negatives (0, 1) and (1, 0): g = 1, e for both anchors (1, 0)
    z, n = rows([1.0, 0.0]), rows([0.0, 1.0], [1.0, 0.0])
    ng = 2 * (1 + e(2)) / (1 + e(1))
    same(HardNegative(temperature=1.0, tau_plus=0.0)(z, z, n), [ln(1 + ng / e(1))] * 2)


def test_conditional_hard_negative_by_hand():
    """Five anchors in classes of 3 and 2: the three have 2 x 2 negatives each, the two 2 x 3."""
    labels = torch.tensor([0, 1, 0, 0, 1])
    z = F.one_hot(labels, 2).double()
    # images of a class alike: similarity 1 to the partner, 0 to the others, so Ng = 4 or 6
    three, two = ln(1 + 4 / e(1)), ln(1 + 6 / e(1))
    hand = [two if label else three for label in labels.tolist()] * 2
    numbers = {"temperature": 1.0, "tau_plus": 0.0, "beta": 1.0, "labels": labels}
    same(hard_negative(z, z, **numbers), hand)
    # asymmetric: class 0 is (2, 0), (1, 0), (1, 0); class 1 is (0, 1), (1, 1); z2 = z1
    z = rows([2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0])
    hand = [
        ln(1 + 4 * (1 + e(2 * 2)) / (1 + e(2)) / e(4)),  # 0: to (0, 1) 0, to (1, 1) 2, both twice; pos e^4
        ln(1 + 6 * 3 / 3 / e(1)),  # 1: 0 to each of the three, twice; pos e^1
        ln(1 + 4 * (1 + e(2)) / (1 + e(1)) / e(1)),  # 2: to (0, 1) 0, to (1, 1) 1; pos e^1
        ln(1 + 4 * (1 + e(2)) / (1 + e(1)) / e(1)),  # 3: as 2
        ln(1 + 6 * (e(4) + 2 * e(2)) / (e(2) + 2 * e(1)) / e(2)),  # 4: to (2, 0) 2, to (1, 0) 1, 1; pos e^2
    ]
    for clamp in (False, True):
        same(hard_negative(z, z, **numbers, clamp=clamp), hand * 2)
    # the floor is N e^(-1/T), with the anchor's own N
    z = rows([3.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [-3.0, 0.0])  # g = e^-9 < e^-1
    hand = [ln(1 + (6 if label else 4) / e(1) / e(9)) for label in labels.tolist()] * 2
    same(hard_negative(z, z, **numbers), hand)


def test_supervised_contrastive_by_hand():
    """a, b of class 0, c of class 1; partners A, B, C. For a: sim to b 0, c -1, A .6, B 0, C 0; and so on."""
    z1, z2 = rows([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]), rows([0.6, 0.8], [0.0, 1.0], [0.0, -1.0])
    hand = [
        ln(3 + e(-1) + e(0.6)) - 0.6 / 3,  # a: positives b, A, B
        ln(2 + e(0.8) + e(1) + e(-1)) - 1.8 / 3,  # b: a 0, c 0, A .8, B 1, C -1; positives a, A, B
        ln(3 + e(-1) + e(-0.6)),  # c: a -1, b 0, A -.6, B 0, C 0; positive C
        ln(e(0.6) + 2 * e(0.8) + e(-0.6) + e(-0.8)) - 2.2 / 3,  # A: a .6, b .8, c -.6, B .8, C -.8; positives a, b, B
        ln(2 + e(1) + e(0.8) + e(-1)) - 1.8 / 3,  # B: as b
        ln(2 + 2 * e(-1) + e(-0.8)),  # C: a 0, b -1, c 0, A -.8, B -1; positive c
    ]
    labels = torch.tensor([5, 5, 2])
    same(supervised_contrastive(z1, z2, temperature=1.0, labels=labels), hand)
    # given negatives: (0, 1) for all, (1, 0) for c alone; the positives stay in the sum
    n, allowed = rows([0.0, 1.0], [1.0, 0.0]), torch.tensor([[True, False], [True, False], [True, True]])
    hand = [ln(2 + e(0.6) + 1) - 0.2, ln(1 + e(0.8) + 2 * e(1)) - 0.6, ln(1 + 1 + e(-1))]
    losses = supervised_contrastive(z1, z2, temperature=1.0, labels=labels, negatives=n, allowed=allowed)
    same(losses[:3], hand)


# --- formulas ----------------------------------------------------------------------------------------------------


def loops(z1, z2, t, tau, beta, labels=None, floor=True, clamp=0.0):
    """METHOD 1.2 in plain loops, without logs."""
    z, b, out = torch.cat([z1, z2]).detach(), len(z1), []
    for a in range(2 * b):
        others = [k for k in range(2 * b) if k % b != a % b and (labels is None or labels[k % b] != labels[a % b])]
        pos = e(float(z[a] @ z[(a + b) % (2 * b)]) / t)
        g = [max(e(float(z[a] @ z[k]) / t), clamp) for k in others]
        n, weights = len(g), [v**beta for v in g]
        ng = (sum(w * v for w, v in zip(weights, g, strict=True)) / (sum(weights) / n) - tau * n * pos) / (1 - tau)
        out.append(-ln(max(pos / (pos + max(ng, n * e(-1 / t) if floor else 0.0)), clamp)))
    return out


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("t", "tau"), [(10.0, 0.1), (0.5, 0.0), (0.5, 0.3), (0.3, 0.9)])
def test_hard_negative_is_its_formula(t, tau, beta):
    z1 = unit(5, 3, seed=1)
    z2 = F.normalize(torch.linspace(-1, 1, 5, dtype=f64)[:, None] * z1 + 0.5 * randn(5, 3, seed=2), dim=1)
    numbers = {"temperature": t, "tau_plus": tau, "beta": beta}
    ours = hard_negative(z1, z2, **numbers)
    same(ours, loops(z1, z2, t, tau, beta))
    if beta == 0:
        assert torch.equal(debiased(z1, z2, temperature=t, tau_plus=tau), ours)
    if tau == 0.9:  # some anchors sit on the floor, some do not
        free = loops(z1, z2, t, tau, beta, floor=False)
        assert 0 < sum(abs(f - o) > 1e-9 for f, o in zip(free, ours.tolist(), strict=True)) < 10
    if tau == 0:
        labels = torch.tensor([0, 0, 1, 0, 1])
        same(hard_negative(z1, z2, **numbers, labels=labels), loops(z1, z2, t, tau, beta, labels))


@pytest.mark.parametrize("kind", ["hard", "easy"])
def test_the_authors_clamps(kind):
    """Equal values and gradients where no clamp bites; the letter of the formula where they do."""
    z1, z2 = unit(5, 3, seed=1).requires_grad_(), unit(5, 3, seed=2)
    values = [hard_negative(z1, z2, **CDP, estimator=kind, clamp=c) for c in (False, True)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(v.sum(), z1)[0] for v in values]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
    numbers = {"temperature": 0.1, "tau_plus": 0.1, "beta": 1.0, "estimator": kind}
    if kind == "hard":  # at T = .1 similarities below -.92 are clamped, and so are ratios of opposite partners
        literal = loops(z1, z2, 0.1, 0.1, 1.0, clamp=1e-4)
        same(hard_negative(z1, z2, **numbers, clamp=True), literal)
        assert (hard_negative(z1, z2, **numbers) - torch.tensor(literal)).abs().max() > 1e-3
    # anchors and partners opposite, negatives alike: pos / (pos + Ng) < 1e-4
    z1 = rows([1.0, 0.0], [1.0, 0.001], [1.0, 0.002]).requires_grad_()
    z2 = -z1.detach()
    clamped = hard_negative(z1, z2, **numbers, clamp=True)
    same(clamped, [-ln(1e-4)] * 6)
    assert not torch.autograd.grad(clamped.sum(), z1)[0].any()
    free = hard_negative(z1, z2, **numbers)
    assert torch.autograd.grad(free.sum(), z1)[0].abs().min() > 0


@pytest.mark.parametrize("batch", [8, 6000])
@pytest.mark.parametrize("temperature", [10.0, 0.01])
def test_losses_and_gradients_stay_finite(batch, temperature):
    """The authors' clamp of the ratio at 1e-4 kills every gradient from about 5,000 images on; logs do not."""
    z1 = F.normalize(randn(batch, 3, dtype=torch.float32), dim=1).requires_grad_()
    z2 = F.normalize(z1.detach() + 0.1, dim=1)
    part = slice(0, 100) if batch > 500 else slice(None)  # a strip of the big batch: negatives for 100 anchors
    negatives = torch.cat([z1, z2]) if batch > 500 else None

    def gradient(clamp):
        loss = HardNegative(temperature=temperature)(z1[part], z2[part], negatives, clamp=clamp)
        assert clamp or loss.isfinite().all()
        return torch.autograd.grad(loss.sum(), z1)[0][part]

    assert gradient(False).isfinite().all()
    if temperature == 10:  # at .01 these pairs are long since solved
        assert (gradient(False).abs().sum(1) > 0).all()
        assert bool(gradient(True).any()) == (batch == 8)


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(range(6)), kind=st.sampled_from(LOSSES), classes=st.booleans(), seed=st.integers(0, 99))
def test_the_order_of_a_batch_does_not_matter(order, kind, classes, seed):
    q, p, order = unit(6, 3, seed=seed), unit(6, 3, seed=seed + 1), torch.tensor(order)
    labels = torch.tensor([0, 0, 1, 2, 1, 0]) if classes or kind.supervised else None
    straight = kind(q, p, None, labels)
    mixed = kind(q[order], p[order], None, None if labels is None else labels[order])
    torch.testing.assert_close(mixed.reshape(-1, 6), straight.reshape(-1, 6)[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES, ids=str)
def test_negatives_given_by_hand_are_the_batch(kind):
    """The rest of the batch, handed over as negatives with what is allowed of them, gives the same losses."""
    q, p, labels = unit(6, 3, seed=4), unit(6, 3, seed=5), torch.tensor([0, 0, 1, 2, 1, 0])
    keys = {InfoNCE: p, InfoNCEPaper: q}.get(type(kind), torch.cat([q, p]))
    allowed = (labels[:, None] != labels).repeat(1, len(keys) // 6)
    given = kind(q, p, keys, labels if kind.supervised else None, allowed=allowed)
    torch.testing.assert_close(given, kind(q, p, None, labels), rtol=0, atol=1e-12)


# --- errors ------------------------------------------------------------------------------------------------------

Z, ONE, FOUR = unit(4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4)
T1 = {"temperature": 1.0, "tau_plus": 0.1, "beta": 1.0}
NOBODY = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: info_nce(Z[:1], Z[:1], temperature=1.0), "at least 2 images"),
        (lambda: info_nce_paper(Z[:1], Z[:1], temperature=1.0), "at least 2 images"),
        (lambda: hard_negative(Z[:1], Z[:1], **T1), "at least 2 images"),
        (lambda: debiased(Z[:1], Z[:1], temperature=1.0, tau_plus=0.1), "at least 2 images"),
        (lambda: supervised_contrastive(Z[:1], Z[:1], temperature=1.0, labels=ONE[:1]), "at least 2 images"),
        (lambda: info_nce(Z, Z, temperature=0.0), "temperature > 0"),
        (lambda: SupervisedContrastive(temperature=-1.0), "temperature > 0"),
        (lambda: HardNegative(beta=-1.0), "beta >= 0"),
        (lambda: Debiased(tau_plus=1.0), "tau_plus < 1"),
        (lambda: hard_negative(Z, Z, **(T1 | {"tau_plus": 1.0})), "tau_plus < 1"),
        (lambda: hard_negative(Z, Z, **T1, labels=FOUR), "tau_plus=0"),
        (lambda: Debiased()(Z, Z, None, FOUR), "tau_plus=0"),
        (lambda: info_nce(Z, Z, Z, temperature=1.0, labels=FOUR), "expected no negatives"),
        (lambda: HardNegative(tau_plus=0.0)(Z, Z, Z, FOUR), "expected no negatives"),
        (lambda: info_nce(Z, Z, temperature=1.0, allowed=~NOBODY), "negatives together with"),
        (lambda: info_nce(Z, Z, Z, temperature=1.0, allowed=NOBODY), "got none for anchor 0 of 4"),
        (lambda: info_nce(Z, Z, temperature=1.0, labels=ONE), "at least 2 classes"),
        (lambda: HardNegative(tau_plus=0.0)(Z, Z, None, ONE), "at least 2 classes"),
        (lambda: SupervisedContrastive()(Z, Z, None, ONE), "at least 2 classes"),
        (lambda: SupervisedContrastive()(Z, Z), "expected labels"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_components_are_contrastive_losses_and_their_reprs_their_records():
    for kind in LOSSES:
        assert isinstance(kind, ContrastiveLoss)
        assert eval(repr(kind)) == kind
