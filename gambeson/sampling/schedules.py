"""The schedules of `gambeson.schedules`, under the name of the room that uses them most."""

from gambeson.schedules import (
    AlphaBar,
    Timesteps,
    alpha_bar_from_sigma,
    cosine_alpha_bar,
    ddim_sigmas,
    ddim_timesteps,
    karras_sigmas,
    linear_alpha_bar,
    sigma_from_alpha_bar,
)

__all__ = [
    "AlphaBar",
    "Timesteps",
    "alpha_bar_from_sigma",
    "cosine_alpha_bar",
    "ddim_sigmas",
    "ddim_timesteps",
    "karras_sigmas",
    "linear_alpha_bar",
    "sigma_from_alpha_bar",
]
