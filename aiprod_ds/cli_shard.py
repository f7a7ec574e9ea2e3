"""The command `shard`: its arguments, and what it did in lines. Called by cli.py, which prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiprod_ds.cli_convert import number
from aiprod_ds.errors import ConfigError

if TYPE_CHECKING:
    from aiprod_ds.decode.record import Medium
    from aiprod_ds.shards.index import ShardIndex

_MOST_NAMES = 5
_EXAMPLES = """\
A run reads shards where it reads folders: data.train: s3://bucket/prefix, https://host/path or a folder.
Needs the extra `storage` for s3:// and https://: pip install 'aiprod_ds[storage]'. Credentials are boto3's:
AWS_PROFILE, AWS_ACCESS_KEY_ID and so on.

examples:
  aiprod-ds shard clips_latents s3://bucket/latents
  aiprod-ds shard clips/train.csv /mnt/shards/train --latents --shard-mb 500
  aiprod-ds shard clips s3://bucket/clips
  aiprod-ds shard music s3://bucket/music --sounds --endpoint-url http://localhost:9000
  aiprod-ds shard --index s3://bucket/latents
"""


def add_shard(commands: Any) -> argparse.ArgumentParser:
    """Adds `shard` to the subparsers and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "shard",
        help="pack a folder or table of latents or media into tar shards, on a disk or on S3",
        description="Packs latents, or media with their captions, into tar shards with an index beside them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="SOURCE", help="folder or table of latents or media"
    )
    parser.add_argument("destination", nargs="?", metavar="DESTINATION", help="empty folder or s3:// address")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--latents",
        action="store_true",
        help="pack the latents of these media (default where SOURCE holds latents/)",
    )
    kind.add_argument(
        "--sounds", action="store_true", help="pack media for their sound alone, for audio VAEs"
    )
    parser.add_argument(
        "--shard-mb",
        type=partial(number, least=1e-3, most=1e6),
        default=256.0,
        metavar="MB",
        help="the most that a shard holds (256)",
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="server with the protocol of S3")
    parser.add_argument("--index", metavar="SHARDS", help="make the index of shards anew and pack nothing")
    return parser


def run_shard(arguments: argparse.Namespace) -> Iterator[str]:
    """Does what `shard` was asked for and yields what it did.

    Raises:
        ConfigError: If the arguments do not fit each other.
        DataError: If something cannot be read or written.
    """
    if (arguments.index is None) == (arguments.destination is None) or (
        arguments.index is not None and arguments.source is not None
    ):
        raise ConfigError(
            "shard: takes SOURCE and DESTINATION, or --index SHARDS alone. Give one of the two."
        )
    from aiprod_ds.shards.storage import open_storage

    address = arguments.index if arguments.index is not None else arguments.destination
    storage = open_storage(address, endpoint_url=arguments.endpoint_url)
    if arguments.index is not None:
        from aiprod_ds.data.packed.packing import make_index  # loads torch, which takes seconds

        yield _told(make_index(storage), storage.address)
    else:
        yield from _pack(arguments, storage)


def _pack(arguments: argparse.Namespace, storage: Any) -> Iterator[str]:
    from aiprod_ds.data.packed.packing import holds_latents, pack_latents, pack_media

    source, shard_bytes = arguments.source, int(arguments.shard_mb * 1e6)
    if arguments.latents or (holds_latents(source) and not arguments.sounds):
        yield _told(pack_latents(source, storage, shard_bytes=shard_bytes), storage.address)
        return
    medium: Medium = "sound" if arguments.sounds else "video"
    index, left_out = pack_media(source, storage, medium=medium, shard_bytes=shard_bytes)
    yield _told(index, storage.address)
    if left_out:
        yield f"Left out: {len(left_out)}"
        yield from (f"  {item.path}: {item.reason}" for item in left_out[:_MOST_NAMES])


def _told(index: ShardIndex, address: str) -> str:
    megabytes = sum(size for _, size in index.shards) / 1e6
    return (
        f"{address}: {len(index.members)} files of {index.kind} in {len(index.shards)} shards, "
        f"{megabytes:.1f} MB"
    )
