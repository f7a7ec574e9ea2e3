"""From noise to latents: noise levels, Euler's method along the learned velocity, and classifier-free
guidance.

Owns the mathematics of sampling and knows no engine, no VAE and no file. Previews and the command that
samples call it. Shapes: B batch, C channels, L tokens, D values per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from aiprod_ds.models.families.protocol import LATENTS, Family
from aiprod_ds.models.families.tokens import latents_of

Predict = Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]]
"""The velocity eps - x0 of each modality at a state and a noise level."""


def noise_levels(num_forwards: int, *, shift: float) -> Tensor:
    """Returns the levels between which `num_forwards` intervals lie, [num_forwards + 1] fp32, from 1 down to
    0.

        s' = shift * s / (1 + (shift - 1) * s),   s = 1, 1 - 1/n, ..., 1/n, 0

    A shift above 1 spends more of the intervals on noisy states, where large pictures are decided; 1 leaves
    the levels evenly spaced. It is exp(mu) of a logit-normal distribution: the logit of every level grows by
    ln(shift).

    Worked number: 4 forwards with shift 3 are at 1, 0.9, 0.75, 0.5, 0.

    Source: Esser et al. 2024 (Stable Diffusion 3), eq. 23; diffusers 0.42.1,
    schedulers/scheduling_flow_match_euler_discrete.py.
    """
    even = torch.linspace(1.0, 0.0, num_forwards + 1, dtype=torch.float64)
    return (shift * even / (1.0 + (shift - 1.0) * even)).float()


def integrate(predict: Predict, start: Mapping[str, Tensor], levels: Tensor) -> dict[str, Tensor]:
    """Follows dx/ds = v from the first level to the last by Euler's method; one forward for each interval.

        x_{s'} = x_s + (s' - s) * v(x_s, s)

    Exact in one interval where v does not change along the way, as between one noise and one sample: x_s =
    (1-s)*x0 + s*eps has v = eps - x0. Otherwise the error falls with the number of intervals.

    Worked number: x = 5 and v = 3 from level 1 to 0: x = 2.

    Args:
        predict: Called once for each interval, with the state and the level at its noisy end.
        start: State of each modality at the first level, any float type; computed with in fp32.
        levels: [num_forwards + 1], as `noise_levels` makes them.

    Returns:
        The state of each modality at the last level, fp32.
    """
    state = {modality: value.float() for modality, value in start.items()}
    for level, next_level in pairwise(levels.tolist()):
        velocity = predict(state, level)
        state = {
            modality: value + (next_level - level) * velocity[modality].float()
            for modality, value in state.items()
        }
    return state


def guided(
    with_prompt: Mapping[str, Tensor], with_empty: Mapping[str, Tensor], *, scale: float
) -> dict[str, Tensor]:
    """Returns the velocity of classifier-free guidance, fp32 of each modality.

        v = v_empty + scale * (v_prompt - v_empty)

    Worked number: v_prompt = 3, v_empty = 1 and scale 4 give 9. Scale 1 gives v_prompt.

    Source: Ho and Salimans 2022, in the form of diffusers' pipelines.
    """
    return {
        modality: empty.float() + scale * (with_prompt[modality].float() - empty.float())
        for modality, empty in with_empty.items()
    }


def draw_noise(shapes: Mapping[str, tuple[int, ...]], seeds: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns normal noise for one clip, [1, *shape] fp32 of each modality, drawn on the CPU so that devices
    agree."""
    return {
        modality: torch.randn(1, *shape, generator=torch.Generator().manual_seed(seeds[modality]))
        for modality, shape in shapes.items()
    }


def sample_latents(  # noqa: PLR0913  what one clip is made of
    module: Callable[..., Mapping[str, Tensor]],
    family: Family,
    *,
    noise: Mapping[str, Tensor],
    fps: Tensor,
    prompt: Mapping[str, Tensor],
    empty_prompt: Mapping[str, Tensor] | None,
    levels: Tensor,
    guidance_scale: float,
    first_frame: Tensor | None = None,
    sound: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the latents that a transformer makes of noise.

    Args:
        module: Called as `DiffusionModule.forward` is: that module or the engine that holds it. Once for each
            interval, twice with an empty prompt.
        family: Cuts the noise into tokens and joins the latents again.
        noise: [B,C,...] of each modality, on the module's device.
        fps: [B] frames per second.
        prompt: What `Family.forward` wants to know of the prompts, with the axis B.
        empty_prompt: The same of the empty prompts; None: no guidance.
        levels: As `noise_levels` makes them.
        guidance_scale: No effect without an empty prompt.
        first_frame: Normalised video latents [B,C,1,...] that the clips begin with; at every level the
            transformer sees them clean, at noise level 0, as first frames that are given in training. Only
            for families with `has_token_timesteps` and patches of one latent frame.
        sound: Normalised audio latents in the shape of their noise, which stay as they are: the transformer
            sees them clean, at noise level 0. Only for families with sound.

    Returns:
        Normalised latents in the shape of `noise`, fp32.

    Raises:
        DataError: If a tensor is missing or does not fit the transformer.
    """
    tokens = family.tokens({LATENTS[modality]: value for modality, value in noise.items()})
    grids = {modality: cut.grid for modality, cut in tokens.items()}
    given = None if first_frame is None else _given_tokens(family, noise, first_frame)
    heard = None if sound is None else _sound_tokens(family, noise, sound)

    def predict(state: Mapping[str, Tensor], level: float) -> Mapping[str, Tensor]:
        timesteps = {
            modality: value.new_full((value.shape[0], 1), level) for modality, value in state.items()
        }
        if given is not None:
            state = {**state, "video": _with_given(state["video"], given)}
            timesteps["video"] = timesteps["video"].repeat(1, state["video"].shape[1])
            timesteps["video"][:, : given.shape[1]] = 0.0
        if heard is not None:
            state = {**state, "audio": heard}
            timesteps["audio"] = torch.zeros_like(timesteps["audio"])
        velocity = module(state, timesteps, {"fps": fps, **prompt}, grids)
        if empty_prompt is None:
            return velocity
        return guided(
            velocity, module(state, timesteps, {"fps": fps, **empty_prompt}, grids), scale=guidance_scale
        )

    final = integrate(predict, {modality: cut.values for modality, cut in tokens.items()}, levels)
    if given is not None:
        final["video"] = _with_given(final["video"], given)
    if heard is not None:
        final["audio"] = heard
    return {modality: latents_of(value, grids[modality]) for modality, value in final.items()}


def _given_tokens(family: Family, noise: Mapping[str, Tensor], first_frame: Tensor) -> Tensor:
    """Returns the tokens of the first latent frame, [B,L',D]: time comes first among tokens."""
    clean = {LATENTS[modality]: torch.zeros_like(value) for modality, value in noise.items()}
    clean[LATENTS["video"]][:, :, :1] = first_frame
    cut = family.tokens(clean)["video"]
    return cut.values[:, : cut.grid.tokens_per_frame]


def _sound_tokens(family: Family, noise: Mapping[str, Tensor], sound: Tensor) -> Tensor:
    clean = {LATENTS[modality]: torch.zeros_like(value) for modality, value in noise.items()}
    clean[LATENTS["audio"]].copy_(sound)
    return family.tokens(clean)["audio"].values


def _with_given(values_BLD: Tensor, given: Tensor) -> Tensor:
    return torch.cat([given.to(values_BLD.dtype), values_BLD[:, given.shape[1] :]], dim=1)
