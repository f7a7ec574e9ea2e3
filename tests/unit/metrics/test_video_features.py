"""The network behind rFVD: what it is shown, where it comes from, and what is refused."""

import sys
import warnings

import pytest
import torch

from aiprod_ds.config.video_vae import FvdConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import file_sha256
from aiprod_ds.metrics.video_features import VideoFeatures, load_features, prepared

FACTORY = """\
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv3d(3, 4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, video):
        return self.drop(self.mix(video)).mean((2, 3, 4))


def flat() -> nn.Module:
    return lambda video: video.mean(1)


def nothing() -> nn.Module:
    return None


def failing() -> nn.Module:
    raise KeyError("x")
"""


class LikeI3D(torch.nn.Module):
    """Has the arguments of the I3D in common use."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = True,
        resize: bool = True,
        return_features: bool = False,
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("features of prepared clips are asked for")
        if x.shape[2] < 10:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return x.mean(dim=[2, 3, 4])


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    (tmp_path / "networks_of_my_own.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "networks_of_my_own"
    sys.modules.pop("networks_of_my_own", None)


@pytest.fixture
def i3d_file(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form of file is old, and what there is
        torch.jit.script(LikeI3D()).save(str(path))
    return path


def _config(path):
    return FvdConfig(network=str(path), sha256=file_sha256(path), size=12)


def test_frames_are_scaled_by_the_shorter_side_and_cut_in_the_middle():
    wide = torch.zeros(1, 3, 2, 8, 16)
    wide[..., 4:12] = 1.0

    assert torch.equal(prepared(wide, 8), torch.ones(1, 3, 2, 8, 8))
    assert torch.equal(prepared(wide.transpose(3, 4), 8), torch.ones(1, 3, 2, 8, 8))
    assert prepared(wide, 224).shape == (1, 3, 2, 224, 224)
    assert prepared(torch.zeros(1, 3, 2, 333, 91), 224).shape == (1, 3, 2, 224, 224)


def test_scaling_agrees_with_torch_and_keeps_frames_apart():
    video = torch.rand(2, 3, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    frame = torch.nn.functional.interpolate(video[:, :, 2], size=(6, 6), mode="bilinear", align_corners=False)

    assert torch.equal(prepared(video, 6)[:, :, 2], frame)


def test_a_torchscript_file_is_called_like_i3d(i3d_file):
    features = load_features(_config(i3d_file), num_frames=16)
    video = torch.full((2, 3, 16, 12, 12), 0.5)

    assert features.num_features == 3
    found = features(video)
    assert (found.dtype, found.shape) == (torch.float64, (2, 3))
    assert torch.equal(found, torch.full((2, 3), 0.5).double())


def test_clips_that_are_too_short_for_the_network_are_found_by_a_trial(i3d_file):
    with pytest.raises(ConfigError) as caught:
        load_features(_config(i3d_file), num_frames=5)
    assert "evaluation.measures.fvd.network: must make features of a clip [1,3,5,12,12]" in str(caught.value)
    assert "Kernel size" in str(caught.value)


def test_a_network_of_ones_own_is_the_same_each_time_and_draws_nothing(own_networks):
    config = FvdConfig(network=f"{own_networks}:Tiny", size=8)
    before = torch.get_rng_state()
    first, second = (load_features(config, num_frames=3) for _ in range(2))
    video = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    assert torch.equal(first(video), second(video))
    assert first.num_features == 4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("nowhere.pt", "must be a file, got 'nowhere.pt', which is none. Ways out: name a local copy"),
        ("/owner/name/file.pt", "must be a file, got '/owner/name/file.pt', which is none"),
        ("no_such_module:make", "evaluation.measures.fvd.network: must be importable"),
        ("os:abort", "evaluation.measures.fvd.network: must make a torch module: be a class of"),
        ("networks_of_my_own:failing", "which fails (KeyError: 'x'). Correct it."),
        ("networks_of_my_own:nothing", "must make a network, got NoneType"),
        ("networks_of_my_own:flat", r"must make features [1,F] of a clip [1,3,3,8,8], got [1, 3, 8, 8]"),
    ],
)
def test_what_makes_no_features_is_refused(own_networks, network, message):
    with pytest.raises(ConfigError) as caught:
        load_features(FvdConfig(network=network, size=8), num_frames=3)
    assert message in str(caught.value)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"must be a TorchScript file, got .*weights\.pt"):
        load_features(_config(path), num_frames=3)


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_torchscript_file_of_another_hash_is_not_read(i3d_file, sha256):
    with pytest.raises(
        ConfigError, match=r"must be a file with the SHA-256 .* set .*fvd\.sha256 to what it has"
    ):
        load_features(FvdConfig(network=str(i3d_file), sha256=sha256, size=12), num_frames=16)


def test_a_hash_has_no_effect_on_an_import_path():
    with pytest.raises(ConfigError, match="sha256: has no effect on an import path, got 'module:make'"):
        FvdConfig(network="module:make", sha256="0" * 64)


def test_a_hub_file_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_features(FvdConfig(network="owner/name/i3d_torchscript.pt"), num_frames=16)
    assert "must be a file or one of a hub repository, got 'owner/name/i3d_torchscript.pt'" in str(
        caught.value
    )


def test_a_network_is_frozen():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 16, 5), torch.nn.Dropout(0.9))
    features = VideoFeatures(network, size=4, num_frames=2, where="test")
    video = torch.rand(1, 3, 2, 4, 4)

    assert torch.equal(features(video), features(video))
    assert not any(parameter.requires_grad for parameter in network.parameters())
