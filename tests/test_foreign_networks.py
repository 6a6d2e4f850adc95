"""The networks of other projects, written by us, give the numbers of the published code (see foreign_files)."""

import pytest
import torch
from foreign_files import EDM_LABELS, GOLDEN, REAL, agrees, golden_denoiser, golden_output, manifest, pattern

from gambeson.errors import UserError
from gambeson.models.adm_unet import ADMUNetSpec
from gambeson.models.ddim_unet import DDIMUNetSpec
from gambeson.models.denoiser import VP
from gambeson.models.song_unet import SongUNetSpec


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", GOLDEN)
def test_networks_give_the_numbers_of_the_published_code(name: str, dtype: torch.dtype, relative: float) -> None:
    facts = GOLDEN[name]["small"]
    expected = facts[str(dtype).removeprefix("torch.")]
    denoiser = golden_denoiser(name, dtype)
    assert sum(p.numel() for p in denoiser.network.parameters()) == GOLDEN[name]["parameters"]["small"]
    output = golden_output(name, denoiser, facts, dtype)
    assert output.dtype == dtype
    assert agrees(output, expected.get("F", expected), relative)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_sizes_have_the_published_names_shapes_and_counts(name: str) -> None:
    spec, classes, _ = REAL[name]
    with torch.device("meta"):
        network = spec.build(3, classes)
    assert manifest(name, network) == GOLDEN[name]["real_keys"]
    assert sum(p.numel() for p in network.parameters()) == GOLDEN[name]["parameters"]["real"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_sizes_give_the_published_numbers(name: str) -> None:
    facts = GOLDEN[name]["real"]
    output = golden_output(name, golden_denoiser(name, torch.float32, REAL), facts, torch.float32)
    assert agrees(output, facts["float32"].get("F", facts["float32"]), 1e-4)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_edm_denoises_as_the_published_code_with_and_without_labels(dtype: torch.dtype, relative: float) -> None:
    facts = GOLDEN["song_unet"]["small"]
    expected = facts[str(dtype).removeprefix("torch.")]
    denoiser = golden_denoiser("song_unet", dtype)
    x, sigma = pattern(facts["input_shape"], dtype), torch.tensor(facts["sigma"], dtype=dtype)
    with torch.no_grad():
        assert agrees(denoiser(x, sigma, EDM_LABELS), expected["D"], relative)
        with pytest.raises(ValueError, match="expected labels"):  # trained without label dropout
            denoiser(x, sigma)
        denoiser.conditional_only = False
        assert agrees(denoiser(x, sigma), expected["D_with_class_labels_None"], relative)


@pytest.mark.parametrize("name", ["ddim_unet", "adm_unet"])
def test_vp_denoisers_turn_the_published_eps_into_x0(name: str) -> None:
    """At the table's sigma_t: x0-hat = x - sigma eps(x / sqrt(1 + sigma^2), t), with the golden eps."""
    facts = GOLDEN[name]["small"]
    denoiser = golden_denoiser(name, torch.float64)
    assert isinstance(denoiser.preconditioning, VP)
    sigma = denoiser.preconditioning.table[torch.tensor(facts["t"])]
    x = pattern(facts["input_shape"], torch.float64) * (1 + sigma**2).sqrt()[:, None, None, None]
    with torch.no_grad():
        clean = denoiser(x, sigma, torch.tensor(facts["y"]) if "y" in facts else None)
    expected = x[0].flatten()[:8] - sigma[0] * torch.tensor(facts["float64"]["first8"], dtype=torch.float64)
    assert torch.allclose(clean[0].flatten()[:8], expected, rtol=1e-9)


def test_networks_refuse_labels_they_cannot_use_and_lack_none_they_need() -> None:
    x, t, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected no labels"):
        DDIMUNetSpec(width=32, multipliers=(1,), attention=()).build(3, 0)(x, t, labels)
    adm = ADMUNetSpec(width=32, multipliers=(1,), blocks=1, attention=(), head_width=32)
    with pytest.raises(ValueError, match="expected labels 0 to 4"):
        adm.build(3, 5)(x, t, None)
    with pytest.raises(ValueError, match="expected no labels"):
        adm.build(3, 0)(x, t, labels)
    with pytest.raises(ValueError, match="expected no labels"):
        SongUNetSpec(resolution=8, width=8, multipliers=(1,), blocks=1).build(3, 0)(x, t, labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIMUNetSpec(width=48),
        lambda: DDIMUNetSpec(attention=(4,)),
        lambda: DDIMUNetSpec().build(3, 10),
        lambda: DDIMUNetSpec().check((3, 28, 28)),
        lambda: ADMUNetSpec(width=32),
        lambda: SongUNetSpec(resolution=30),
        lambda: SongUNetSpec().check((3, 64, 64)),
    ],
)
def test_impossible_architectures_are_refused(make) -> None:
    with pytest.raises(UserError, match="expected"):
        make()
