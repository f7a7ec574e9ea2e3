"""PerceptualLoss: against torchmetrics and lpips with the same weights, its frozen state, its weight files
and its fallback.

The weights are seeded random numbers in torchvision's layout: no network, and every formula is exercised.
`offline` makes the network really unreachable (a proxy on a closed port) instead of replacing functions.
"""

import hashlib
import logging
import threading
import urllib.request
from copy import deepcopy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from lpips import LPIPS
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

from aiprod_ds.config.losses import PerceptualConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses import vgg
from aiprod_ds.losses.perceptual import PerceptualLoss, choose_frames
from aiprod_ds.losses.vgg import LAYERS, SHA256_PREFIX, WEIGHTS_NAME

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features
    state = {}
    for name, parameter in features.state_dict().items():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() == 4 else 0.01
        state[f"features.{name}"] = torch.randn(parameter.shape, generator=generator) * scale
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def lpips_loss(weights_file):
    return PerceptualLoss(PerceptualConfig(weights=str(weights_file)), allow_unverified_weights=True)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen reads the proxies once per process
    return tmp_path / "home" / "hub" / "checkpoints"


def _videos(batch=2, frames=2, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, frames, size, size)
    x = torch.rand(shape, generator=generator) * 2 - 1
    return (x + 0.1 * torch.randn(shape, generator=generator)).clamp(-1, 1).to(dtype), x.to(dtype)


def _images(video):
    return video.transpose(1, 2).flatten(0, 1)


def test_lpips_mode_agrees_with_torchmetrics(lpips_loss, weights_file):
    reference = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    _give_weights(reference.net, weights_file)
    y, x = _videos()

    # Same formula including the epsilon: fp32 rounding through 13 convolutions.
    assert lpips_loss(y, x).item() == pytest.approx(reference(_images(y), _images(x)).mean().item(), rel=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than a weight enum:UserWarning"
)
def test_lpips_mode_agrees_with_the_lpips_package(lpips_loss, weights_file):
    reference = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    _give_weights(reference.net, weights_file)
    y, x = _videos()

    # lpips divides by sqrt(sum f^2) + 1e-10; with features of order 1 our epsilon of 1e-8 under the root
    # changes the 8th digit.
    assert lpips_loss(y, x).item() == pytest.approx(reference(_images(y), _images(x)).mean().item(), rel=1e-4)


def test_vgg_mode_is_the_mean_squared_feature_distance(weights_file):
    config = PerceptualConfig(mode="vgg", weights=str(weights_file))
    loss = PerceptualLoss(config, layers=["relu2_2", "relu3_3"], allow_unverified_weights=True)
    features = torchvision.models.vgg16(weights=None).features.eval()
    _load_features(features, weights_file)
    y, x = _videos()
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    with torch.no_grad():
        inputs = [(_images(video) / 2 + 0.5 - mean) / std for video in (y, x)]
        expected = torch.stack(
            [nn.functional.mse_loss(*(features[: end + 1](i) for i in inputs)) for end in (8, 15)]
        ).mean()

    # fp32 rounding of the same convolutions.
    assert loss(y, x).item() == pytest.approx(expected.item(), rel=1e-4)


def test_identity_is_zero_and_distance_grows_with_the_error(lpips_loss):
    y, x = _videos()

    assert lpips_loss(x, x).item() == 0.0
    assert 0 < lpips_loss(x + 0.1 * (y - x), x).item() < lpips_loss(y, x).item()


@pytest.mark.parametrize("mode", ["lpips", "vgg"])
def test_gradients_are_finite_where_features_vanish(weights_file, mode):
    loss = PerceptualLoss(
        PerceptualConfig(mode=mode, weights=str(weights_file)), allow_unverified_weights=True
    )
    for parameter in loss.network.features.parameters():
        parameter.data.zero_()
    y = torch.zeros(1, 3, 1, 16, 16, requires_grad=True)

    loss(y, torch.ones(1, 3, 1, 16, 16)).backward()

    assert torch.isfinite(y.grad).all()


def test_gradient_reaches_the_reconstruction_only(lpips_loss):
    y, x = (video.requires_grad_() for video in _videos(batch=1, frames=1, size=16))

    lpips_loss(y, x).backward()

    assert y.grad.abs().sum() > 0
    assert x.grad is None
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in lpips_loss.network.parameters()
    )


def test_nothing_of_the_network_shows_in_a_module_that_holds_the_loss(lpips_loss):
    holder = nn.Module()
    holder.loss = deepcopy(lpips_loss)
    holder.train().half()

    assert list(holder.parameters()) == []
    assert list(holder.buffers()) == []
    assert holder.state_dict() == {}
    assert not any(module.training for module in holder.loss.network.modules())
    assert {parameter.dtype for parameter in holder.loss.network.parameters()} == {torch.float32}


def test_the_network_stays_in_evaluation_mode(lpips_loss):
    lpips_loss.train()
    lpips_loss.network.train()

    assert not any(module.training for module in lpips_loss.network.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(lpips_loss, dtype):
    y, x = _videos(batch=1, dtype=dtype)
    expected = lpips_loss(y.float(), x.float())
    y.requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = lpips_loss(y, x)
    value.backward()

    assert value.dtype == torch.float32
    assert torch.equal(value.detach(), expected)
    assert y.grad.dtype == dtype


def test_chosen_frames_are_a_function_of_the_seed_and_differ_between_clips():
    frames = choose_frames(3, 20, 4, [5, 6, 5])

    assert torch.equal(frames[0], frames[2])
    assert not torch.equal(frames[0], frames[1])
    assert all(
        len(set(row)) == 4 and row == sorted(row) and set(row) <= set(range(20)) for row in frames.tolist()
    )
    assert torch.equal(choose_frames(1, 20, 4, [6])[0], frames[1])


@pytest.mark.parametrize("frames_per_clip", [0, 5, 9])
def test_all_frames_are_used_when_the_clip_has_no_more(frames_per_clip):
    assert choose_frames(2, 5, frames_per_clip, None) is None


def test_only_chosen_frames_count(weights_file):
    config = PerceptualConfig(weights=str(weights_file), frames_per_clip=1)
    loss = PerceptualLoss(config, allow_unverified_weights=True)
    y, x = _videos(batch=2, frames=6, size=16)
    picked = choose_frames(2, 6, 1, [3, 4]).flatten()
    same_elsewhere = x.clone()
    same_elsewhere[[0, 1], :, picked] = y[[0, 1], :, picked]

    assert torch.equal(loss(y, x, frame_seeds=[3, 4]), loss(same_elsewhere, x, frame_seeds=[3, 4]))
    with pytest.raises(DataError, match=r"choosing 1 of 6 frames needs 2 seeds, got None"):
        loss(y, x)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 1, 16, 16), (1, 3, 2, 16, 16)), "must have one shape"),
        (((1, 1, 1, 16, 16), (1, 1, 1, 16, 16)), r"must be \[B,3,T,H,W\]"),
        (((1, 3, 1, 8, 16), (1, 3, 1, 8, 16)), "H and W at least 16"),
        (((3, 1, 16, 16), (3, 1, 16, 16)), r"must be \[B,3,T,H,W\]"),
    ],
)
def test_unsuitable_videos_are_refused(lpips_loss, shapes, message):
    with pytest.raises(DataError, match=message):
        lpips_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_no_weights_is_an_error_that_names_the_ways_out(offline):
    with pytest.raises(DataError) as caught:
        PerceptualLoss(PerceptualConfig())

    for way_out in (
        "perceptual.weights",
        WEIGHTS_NAME,
        "torch hub cache",
        "network access",
        "perceptual.fallback: l2",
    ):
        assert way_out in str(caught.value)
    assert list(offline.iterdir()) == []


def test_fallback_is_mean_squared_error_with_one_warning(offline, caplog):
    with caplog.at_level(logging.WARNING):
        loss = PerceptualLoss(PerceptualConfig(fallback="l2"))
    y, x = _videos(size=8)

    assert loss.active_mode == "l2"
    assert loss.network is None
    torch.testing.assert_close(loss(y, x), nn.functional.mse_loss(y, x))
    loss(y, x)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "perceptual/mode=l2" in caplog.text


def test_a_configured_file_is_never_replaced_by_the_fallback(offline, tmp_path, weights_file):
    with pytest.raises(DataError, match=r"perceptual\.weights: must be a file"):
        PerceptualLoss(PerceptualConfig(weights=str(tmp_path / "absent.pth"), fallback="l2"))
    found = hashlib.sha256(weights_file.read_bytes()).hexdigest()[: len(SHA256_PREFIX)]
    with pytest.raises(DataError, match=f"SHA-256 must begin with {SHA256_PREFIX} .* got {found}"):
        PerceptualLoss(PerceptualConfig(weights=str(weights_file), fallback="l2"))


def test_the_hash_is_that_of_torchvisions_file():
    assert (WEIGHTS_NAME, SHA256_PREFIX) == ("vgg16-397923af.pth", "397923af")


def test_a_damaged_cache_file_is_named(offline):
    offline.mkdir(parents=True)
    (offline / WEIGHTS_NAME).write_bytes(b"half a download")

    with pytest.raises(DataError, match=rf"{WEIGHTS_NAME}: SHA-256 must begin .* Delete it"):
        PerceptualLoss(PerceptualConfig(fallback="l2"))


@pytest.mark.parametrize("content", [b"", b"not a state dictionary"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"weights\.pth: must be torchvision's VGG16 state dictionary"):
        PerceptualLoss(PerceptualConfig(weights=str(path)), allow_unverified_weights=True)


@pytest.fixture
def mirror(weights_file, monkeypatch, tmp_path):
    """A server on this machine that has the weights, in place of torchvision's; returns the cache it is
    downloaded into."""
    handler = partial(SilentHandler, directory=str(weights_file.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setattr(vgg, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/{weights_file.name}")
    yield tmp_path / "hub" / "checkpoints"
    server.shutdown()
    server.server_close()


def test_a_download_is_checked_and_kept_in_the_cache(mirror, weights_file, monkeypatch):
    monkeypatch.setattr(vgg, "SHA256_PREFIX", hashlib.sha256(weights_file.read_bytes()).hexdigest()[:8])

    assert PerceptualLoss(PerceptualConfig()).active_mode == "lpips"
    assert [path.name for path in mirror.iterdir()] == [WEIGHTS_NAME]
    monkeypatch.setattr(vgg, "WEIGHTS_URL", "http://127.0.0.1:9/")
    assert PerceptualLoss(PerceptualConfig()).active_mode == "lpips"


def test_a_download_of_something_else_leaves_nothing_behind(mirror):
    with pytest.raises(DataError, match=r"download failed \(.*SHA-256 must begin with 397923af"):
        PerceptualLoss(PerceptualConfig())

    assert list(mirror.iterdir()) == []
    assert PerceptualLoss(PerceptualConfig(fallback="l2")).active_mode == "l2"


def test_layers_are_checked(weights_file):
    config = PerceptualConfig(mode="vgg", weights=str(weights_file))
    with pytest.raises(ConfigError, match="layers must be some of relu1_2"):
        PerceptualLoss(config, layers=["relu9_9"], allow_unverified_weights=True)
    with pytest.raises(
        ConfigError, match="layers has no effect in lpips mode: the heads of lpips take all five"
    ):
        PerceptualLoss(
            PerceptualConfig(weights=str(weights_file)), layers=["relu1_2"], allow_unverified_weights=True
        )
    assert list(LAYERS) == ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"]


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def _load_features(features, weights_file):
    state = torch.load(weights_file, weights_only=True)
    features.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})


def _give_weights(sliced_network, weights_file):
    state = torch.load(weights_file, weights_only=True)
    named = {name.removeprefix("features."): value for name, value in state.items()}
    slices = sliced_network.state_dict()
    sliced_network.load_state_dict({name: named[name.split(".", 1)[1]] for name in slices})
