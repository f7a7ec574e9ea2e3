"""Encoding into shards: what is written is packed, a second run leaves the shards, other entries are not
mixed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.encode.run import run_encoding
from aiprod_ds.encode.summary import summary_text
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.shards.opening import open_shards

pytestmark = pytest.mark.slow

NEEDS = LatentNeeds(strides=ModelStrides(spatial=4, temporal=2))
T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def _config(folder: Path, **changes: Any) -> EncodeConfig:
    values = {
        "data": {
            "media": str(folder / "clips.csv"),
            "num_workers": 0,
            "max_failed_fraction": 0.5,
            "shards": {"output": str(folder / "shards"), "shard_mb": 0.01},
        },
        "video": {"model": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"}, "precision": "fp32"},
        "text": {"source": "T5EncoderModel", "config": T5, "precision": "fp32", "max_tokens": 24},
        "shapes": [{"resolution": "16x16", "duration": {"frames": 4}}],
        **changes,
    }
    return EncodeConfig.model_validate(values)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A table of three clips of which one cannot be read."""
    folder = tmp_path / "media"
    clips = write_synthetic_clips(folder, num_clips=3, frames=12, height=32, width=48)
    clips[1].write_bytes(b"")
    rows = "".join(f"{clip.name},clip {number}\n" for number, clip in enumerate(clips))
    (folder / "clips.csv").write_text(f"video,caption\n{rows}")
    return folder


def test_what_is_encoded_is_packed(media: Path) -> None:
    summary = run_encoding(_config(media))
    shards = open_shards(str(media / "shards"), StorageConfig())
    assert shards is not None
    packed, found = scan_latents(shards, NEEDS), scan_latents(summary.output_dir, NEEDS)
    assert packed.records == found.records
    assert [record.path for record in packed.records] == ["clip_00000.mp4", "clip_00002.mp4"]
    files = {str(path.relative_to(summary.output_dir)) for path in summary.output_dir.rglob("*.safetensors")}
    assert set(shards.members) == files
    assert (
        summary.shards
        == f"Packed 5 files into {len(list((media / 'shards').glob('*.tar')))} shards: {shards}"
    )
    assert summary.shards in summary_text(summary)

    stamps = {path.name: path.stat().st_mtime_ns for path in (media / "shards").iterdir()}
    run_encoding(_config(media))
    assert {path.name: path.stat().st_mtime_ns for path in (media / "shards").iterdir()} == stamps

    with pytest.raises(DataError, match="must be empty"):
        run_encoding(_config(media, shapes=[{"resolution": "16x24", "duration": {"frames": 4}}]))


def test_an_endpoint_without_an_address_is_refused() -> None:
    data = {"media": "x", "shards": {"output": "folder", "endpoint_url": "http://localhost:9000"}}
    with pytest.raises(ConfigError, match="has no effect without an s3:// address"):
        _config(Path("x"), data=data)
