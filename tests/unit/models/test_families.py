"""Families of transformers: tokens, levels per token, padding, frame rates, gradients, and what they
refuse."""

from __future__ import annotations

from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.flops import attention_flops, linear_flops
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2, video_bounds
from aiprod_ds.models.families.protocol import Family, require_token_timesteps
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.families.tokens import TokenGrid, latents_of, tokens_of
from aiprod_ds.models.families.wan import Wan

STRIDES = ModelStrides(spatial=32, temporal=8)
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)
with_token_levels = pytest.mark.parametrize(
    "module",
    [family for family in FAMILIES if family.has_token_timesteps],
    ids=lambda family: family.name,
    indirect=True,
)


def _transformer(family_type: type[Any], *, device: str = "cpu", **changes: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(diffusers, family_type.transformer_class)(**{**family_type.tiny_config(), **changes})


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _batch(family_type: type[Any]) -> dict[str, Tensor]:
    tensors = {
        "latents": _normal(2, 4, 2, 4, 4, seed=1),
        "prompt_embeds": _normal(2, 6, 16, seed=2),
        "prompt_attention_mask": torch.arange(6) < torch.tensor([[6], [4]]),
        "fps": torch.tensor([24.0, 12.0]),
    }
    return (
        {**tensors, "audio_latents": _normal(2, 2, 7, 4, seed=3)}
        if "audio" in family_type.modalities
        else tensors
    )


def _velocity(
    module: DiffusionModule, tensors: dict[str, Tensor], levels: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    tokens = module.family.tokens(tensors)
    noisy = {name: part.values for name, part in tokens.items()}
    timesteps = levels or {name: torch.full((len(values), 1), 0.5) for name, values in noisy.items()}
    velocity: dict[str, Tensor] = module(
        noisy, timesteps, tensors, {name: part.grid for name, part in tokens.items()}
    )
    return velocity


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def module(request: pytest.FixtureRequest) -> DiffusionModule:
    transformer = _transformer(request.param)
    return DiffusionModule(transformer, find_family(transformer, STRIDES))


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        # The same sums in another order; values of order 1 in fp32.
        torch.testing.assert_close(actual[name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((4, 2, 4, 6), (1, 1, 1)), ((4, 2, 4, 6), (2, 2, 3)), ((8, 5, 16), (1, 16)), ((64, 5), (1,))],
)
def test_tokens_come_back_as_the_latents(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    latents = _normal(3, *shape, seed=0)
    tokens = tokens_of(latents, patch)
    assert tokens.values.shape[:2] == (3, tokens.grid.num_tokens)
    assert torch.equal(latents_of(tokens.values, tokens.grid), latents)


def test_tokens_are_ordered_as_the_pipelines_order_them() -> None:
    video, sound = _normal(2, 4, 2, 4, 6, seed=0), _normal(2, 8, 5, 16, seed=0)
    packed = diffusers.LTXPipeline._pack_latents(video, patch_size=2, patch_size_t=2)
    assert torch.equal(tokens_of(video, (2, 2, 2)).values, packed)
    assert torch.equal(tokens_of(sound, (1, 16)).values, diffusers.LTX2Pipeline._pack_audio_latents(sound))


def test_a_grid_counts_tokens_of_frames() -> None:
    grid = TokenGrid(latent_shape=(4, 6, 8, 10), patch=(2, 2, 2))
    assert (grid.sizes, grid.num_tokens, grid.tokens_per_frame) == ((3, 4, 5), 60, 20)


@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 4), (2, 4, 0, 4, 4), (2, 4, 4)])
def test_latents_that_do_not_fit_the_patch_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"positive multiples of the patch \[1, 2, 2\] after C, got \[2, 4"):
        tokens_of(torch.zeros(shape), (1, 2, 2))


@with_token_levels
def test_one_level_per_sample_is_the_same_as_per_token(module: DiffusionModule) -> None:
    tensors = _batch(type(module.family))
    sizes = {name: part.grid.num_tokens for name, part in module.family.tokens(tensors).items()}
    per_sample = {name: torch.tensor([[0.3], [0.8]]) for name in sizes}
    per_token = {name: per_sample[name].expand(2, size) for name, size in sizes.items()}
    _assert_close(_velocity(module, tensors, per_token), _velocity(module, tensors, per_sample))


@with_token_levels
def test_the_level_of_one_token_counts_and_only_in_its_sample(module: DiffusionModule) -> None:
    tensors = _batch(type(module.family))
    sizes = {name: part.grid.num_tokens for name, part in module.family.tokens(tensors).items()}
    levels = {name: torch.full((2, size), 0.8) for name, size in sizes.items()}
    plain = _velocity(module, tensors, levels)
    levels["video"][0, 0] = 0.0
    conditioned = _velocity(module, tensors, levels)
    _assert_close({"second": conditioned["video"][1]}, {"second": plain["video"][1]})
    changed = (conditioned["video"][0] - plain["video"][0]).abs().amax(dim=1)
    assert changed[0] > 10 * changed[1:].max()  # its own modulation; the others see it through attention only


def test_padding_of_the_prompt_has_no_influence(module: DiffusionModule) -> None:
    tensors = _batch(type(module.family))
    expected = _velocity(module, tensors)
    mask = tensors["prompt_attention_mask"]
    other = tensors["prompt_embeds"].masked_fill(~mask.unsqueeze(2), 7.0)
    _assert_close(_velocity(module, {**tensors, "prompt_embeds": other}), expected)
    longer = {
        "prompt_embeds": torch.cat([other, torch.full((2, 3, 16), -5.0)], dim=1),
        "prompt_attention_mask": torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
    }
    _assert_close(_velocity(module, {**tensors, **longer}), expected)
    heard = other.clone()
    heard[:, 0] += 1
    assert not torch.allclose(
        _velocity(module, {**tensors, "prompt_embeds": heard})["video"], expected["video"], atol=1e-5
    )


def test_without_a_mask_the_whole_prompt_counts(module: DiffusionModule) -> None:
    tensors = _batch(type(module.family))
    whole = {**tensors, "prompt_attention_mask": torch.ones(2, 6, dtype=torch.bool)}
    without = {name: value for name, value in tensors.items() if name != "prompt_attention_mask"}
    _assert_close(_velocity(module, without), _velocity(module, whole))


def test_samples_do_not_see_each_other(module: DiffusionModule) -> None:
    tensors = _batch(type(module.family))
    together = _velocity(module, tensors)
    for index in range(2):
        alone = _velocity(module, {name: value[index : index + 1] for name, value in tensors.items()})
        _assert_close(alone, {name: values[index : index + 1] for name, values in together.items()})


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 5, 2)])
@pytest.mark.parametrize("changes", [{}, {"patch_size": 2, "patch_size_t": 2, "causal_offset": 3}])
def test_positions_of_ltx2_are_those_of_its_transformer(
    sizes: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    rope = _transformer(LTX2, **changes).rope
    rates = torch.tensor([24.0, 29.97]).view(-1, 1, 1)
    expected = rope.prepare_video_coords(2, *sizes, torch.device("cpu"), fps=rates)
    assert torch.equal(video_bounds(rope, sizes, rates), expected)


@pytest.mark.parametrize("family_type", [LTXVideo, LTX2], ids=lambda family: family.name)
def test_the_frame_rate_places_video_in_time(family_type: type[Any]) -> None:
    transformer = _transformer(family_type)
    module = DiffusionModule(transformer, find_family(transformer, STRIDES))
    tensors = _batch(family_type)
    other = _velocity(module, {**tensors, "fps": torch.tensor([24.0, 30.0])})["video"]
    assert torch.equal(other[0], _velocity(module, tensors)["video"][0])
    assert not torch.allclose(other[1], _velocity(module, tensors)["video"][1], atol=1e-5)


def test_gradients_reach_every_parameter(module: DiffusionModule) -> None:
    sum(
        values.square().mean() for values in _velocity(module, _batch(type(module.family))).values()
    ).backward()
    without = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_a_16_bit_transformer_keeps_exact_levels(module: DiffusionModule) -> None:
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["timestep"])

    module.to(torch.bfloat16).transformer.register_forward_pre_hook(keep, with_kwargs=True)
    tensors = _batch(type(module.family))
    levels = {name: torch.tensor([[0.6131], [0.7777]]) for name in module.family.modalities}
    velocity = _velocity(module, tensors, levels)
    assert all(values.dtype == torch.bfloat16 for values in velocity.values())
    assert torch.equal(seen[0].flatten(), torch.tensor([0.6131, 0.7777]) * 1000)
    assert all(torch.isfinite(values).all() for values in velocity.values())


def test_all_state_is_the_transformers(module: DiffusionModule) -> None:
    assert {name.removeprefix("transformer.") for name in module.state_dict()} == set(
        module.transformer.state_dict()
    )


@each_family
def test_a_family_is_found_on_the_meta_device_and_behind_a_subclass(family_type: type[Any]) -> None:
    transformer = _transformer(family_type, device="meta")
    transformer.__class__ = type("Renamed", (type(transformer),), {})
    family = find_family(transformer, STRIDES)
    assert isinstance(family, family_type)
    blocks = family.repeated_blocks(transformer)
    lists = [list(part) for part in transformer.modules() if isinstance(part, nn.ModuleList)]
    assert list(blocks) in lists, "the whole of one list of modules"
    assert len(blocks) == 2


def test_sound_is_a_modality_where_there_is_any(module: DiffusionModule) -> None:
    assert module.family.modalities == (("video",) if module.family.sound is None else ("video", "audio"))


def test_an_unknown_transformer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"known family \(LTXVideoTransformer3DModel, .*\), got Linear\."):
        find_family(nn.Linear(1, 1), STRIDES)


@pytest.mark.parametrize(
    ("family_type", "changes", "message"),
    [
        (LTXVideo, {"out_channels": 8}, "must have out_channels equal to in_channels, got 8 and 4"),
        (Wan, {"in_channels": 12}, "must have out_channels equal to in_channels, got 4 and 12"),
        (Wan, {"image_dim": 8}, r"image encoder's inputs \(image_dim 8"),
        (LTX2, {"audio_out_channels": 4}, "must have out_channels equal to in_channels, got 4 and 8"),
        (
            LTX2,
            {"vae_scale_factors": (4, 8, 8)},
            r"in time, height and width \(\[8, 32, 32\]\), got \[4, 8, 8\]",
        ),
    ],
)
def test_variants_that_cannot_be_fed_are_refused(
    family_type: type[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_family(_transformer(family_type, **changes), STRIDES)


def test_latents_of_another_vae_are_refused(module: DiffusionModule) -> None:
    tensors = {**_batch(type(module.family)), "latents": torch.zeros(2, 6, 2, 4, 4)}
    with pytest.raises(
        DataError,
        match=r"latents: the transformer of '.*' takes \d+ values per token, got \d+ from latents \[2, 6",
    ):
        module.family.tokens(tensors)


def test_prompts_of_another_encoder_are_refused(module: DiffusionModule) -> None:
    tensors = {**_batch(type(module.family)), "prompt_embeds": torch.zeros(2, 6, 5)}
    with pytest.raises(
        DataError, match=r"prompt_embeds: the transformer of '.*' takes \[B, S, 16\], got \[2, 6, 5\]"
    ):
        _velocity(module, tensors)


@pytest.mark.parametrize(
    ("family_type", "missing"),
    [(LTXVideo, "fps"), (LTX2, "fps"), (LTX2, "audio_latents"), (Wan, "prompt_embeds"), (Wan, "latents")],
)
def test_a_missing_tensor_is_named(family_type: type[Any], missing: str) -> None:
    transformer = _transformer(family_type)
    module = DiffusionModule(transformer, find_family(transformer, STRIDES))
    tensors = {name: value for name, value in _batch(family_type).items() if name != missing}
    with pytest.raises(
        DataError, match=f"{missing}: the family {family_type.name!r} needs it in every sample, got"
    ):
        _velocity(module, tensors)


def test_sound_of_a_waveform_vae_is_placed_in_seconds() -> None:
    oobleck = {
        "audio_hop_length": 2048,
        "audio_sampling_rate": 44100,
        "audio_scale_factor": 1,
        "audio_in_channels": 64,
    }
    transformer = _transformer(LTX2, **oobleck, audio_out_channels=64)
    family = LTX2.of(transformer, STRIDES)
    assert family.sound.latents_per_second == 44100 / 2048
    tensors = {**_batch(LTX2), "audio_latents": _normal(2, 64, 7, seed=3)}
    assert family.tokens(tensors)["audio"].values.shape == (2, 7, 64)
    coordinates = transformer.audio_rope.prepare_audio_coords(1, 7, "cpu")
    expected = torch.arange(8) * 2048 / 44100  # start and end of each latent
    torch.testing.assert_close(coordinates[0, 0], torch.stack([expected[:-1], expected[1:]], dim=1))
    assert _velocity(DiffusionModule(transformer, family), tensors)["audio"].shape == (2, 7, 64)


def test_each_modality_has_its_own_level_and_hears_of_the_others() -> None:
    transformer = _transformer(LTX2)
    module = DiffusionModule(transformer, find_family(transformer, STRIDES))
    seen: dict[str, Any] = {}
    transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    levels = {"video": torch.full((2, 32), 0.9), "audio": torch.tensor([[0.2], [0.4]])}
    levels["video"][0, :16] = 0.0  # a given first frame
    _velocity(module, _batch(LTX2), levels)
    torch.testing.assert_close(seen["sigma"], torch.tensor([900.0, 900.0]))
    torch.testing.assert_close(seen["audio_sigma"], torch.tensor([200.0, 400.0]))
    assert seen["timestep"].shape == (2, 32)
    assert seen["audio_timestep"].shape == (2, 1)


def test_the_worked_number_of_operations() -> None:
    weight = nn.Parameter(torch.zeros(10, 100))
    attention = attention_flops(num_blocks=2, batch_size=3, num_queries=10, num_keys=10, width=4)
    assert linear_flops([weight], batch_size=3, num_tokens=10) + attention == 208_800
    weight.requires_grad_(False)
    assert linear_flops([weight], batch_size=3, num_tokens=10) == 120_000


def test_operations_of_both_streams_and_between_them() -> None:
    transformer = _transformer(LTX2)
    family = find_family(transformer, STRIDES)
    count = {
        tokens: family.flops_per_update(
            transformer, batch_size=1, num_tokens=dict(zip(("video", "audio"), tokens, strict=True))
        )
        for tokens in ((1, 0), (0, 1), (1, 1))
    }
    weights = sum(parameter.numel() for parameter in transformer.parameters())
    # Closed form: every parameter belongs to one stream; between them 2 attentions of width 16 in 2 blocks.
    assert count[1, 1] - count[1, 0] - count[0, 1] == 12 * 2 * 2 * 16
    assert count[1, 0] + count[0, 1] == 6 * weights + 12 * 2 * (24 + 16)


class PerSample(LTXVideo):
    """A family of a user whose transformer takes one level per sample."""

    name: ClassVar[str] = "per_sample"
    has_token_timesteps: ClassVar[bool] = False


@with_token_levels
def test_first_frame_conditioning_needs_levels_per_token(module: DiffusionModule) -> None:
    require_token_timesteps(module.family)
    family: Family = PerSample.of(_transformer(LTXVideo), STRIDES)
    with pytest.raises(ConfigError, match=r"first_frame_probability: must be 0 for the family 'per_sample'"):
        require_token_timesteps(family)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("blocks.0.attn1.to_q", "blocks.0.self_attn.q"),
        ("blocks.11.attn2.to_out.0", "blocks.11.cross_attn.o"),
        ("blocks.1.ffn.net.0.proj", "blocks.1.ffn.0"),
        ("blocks.1.ffn.net.2", "blocks.1.ffn.2"),
    ],
)
def test_wan_modules_have_their_original_names(name: str, original: str) -> None:
    assert find_family(_transformer(Wan, device="meta"), STRIDES).original_name(name) == original
