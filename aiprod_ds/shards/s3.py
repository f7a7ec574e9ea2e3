"""Shards in a bucket of Amazon S3 or of anything that speaks its protocol; the only importer of boto3.

Owns the client: credentials, region and profile are boto3's own (environment, `~/.aws`, the machine's role),
an endpoint is a setting or `AWS_ENDPOINT_URL`. Needs the extra `storage`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiprod_ds.errors import DataError, StorageError
from aiprod_ds.shards.storage import InterruptedTransferError, NoSuchFileError, RangeStorage, byte_range

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError as missing:
    raise DataError(
        "s3://: needs boto3, which is not installed. Install it: pip install 'aiprod_ds[storage]'"
    ) from missing

_BLOCK_BYTES = 1 << 20
_CONNECT_SECONDS, _READ_SECONDS = 5, 30
_ATTEMPTS = 2  # of a request, by the client itself; interrupted bodies are taken up by `transferred`
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_MAY_PASS = frozenset({"500", "503", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"})


class S3Storage(RangeStorage):
    """The objects of a bucket whose keys begin with a prefix and a slash; a `Storage`.

    Args:
        bucket: Its name.
        prefix: Without slashes around it; may be empty.
        endpoint_url: None: as boto3 finds it.
    """

    def __init__(self, bucket: str, prefix: str, *, endpoint_url: str | None = None) -> None:
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"))
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint_url = endpoint_url

    def sizes(self) -> dict[str, int]:
        """See `Storage.sizes`."""
        pages = self._connection().get_paginator("list_objects_v2")
        found: dict[str, int] = {}
        try:
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"):
                for entry in page.get("Contents", ()):
                    found[entry["Key"][len(self._prefix) :]] = entry["Size"]
        except (BotoCoreError, ClientError) as error:
            raise self._unreachable(error) from error
        return found

    def write(self, name: str, file: Path) -> None:
        """See `Storage.write`; large files go up in parts, of which none is seen before all are there."""
        try:
            self._connection().upload_file(str(file), self._bucket, f"{self._prefix}{name}")
        except (BotoCoreError, ClientError, boto3.exceptions.Boto3Error) as error:
            raise self._unreachable(error) from error

    def _stream(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        bytes_range = byte_range(start, end)
        key = f"{self._prefix}{name}"
        try:
            body = self._connection().get_object(Bucket=self._bucket, Key=key, Range=bytes_range)["Body"]
            yield from body.iter_chunks(_BLOCK_BYTES)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            if code == "InvalidRange":  # nothing follows
                return
            if code in _ABSENT:
                raise NoSuchFileError(f"{self.address}/{name}: must exist, got no such object.") from error
            if code in _MAY_PASS:
                raise InterruptedTransferError(code) from error
            raise self._unreachable(error) from error
        except (BotoCoreError, OSError) as error:
            raise self._interrupted(error) from error

    def _interrupted(self, error: BotoCoreError | OSError) -> DataError:
        # Without credentials or region no second attempt helps.
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "NoRegionError"):
            return self._unreachable(error)
        return InterruptedTransferError(type(error).__name__)

    def _unreachable(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.address}: must be a bucket that can be used, got: {_without_secrets(error)}. Check "
            "credentials, AWS_PROFILE, region and endpoint (data.storage.endpoint_url or AWS_ENDPOINT_URL)."
        )

    def _connect(self) -> Any:
        retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
        config = Config(connect_timeout=_CONNECT_SECONDS, read_timeout=_READ_SECONDS, retries=retries)
        try:
            return boto3.session.Session().client("s3", endpoint_url=self._endpoint_url, config=config)
        except (BotoCoreError, ValueError) as error:
            raise self._unreachable(error) from error


def _without_secrets(error: Exception) -> str:
    """Returns what happened in words that hold no key: services quote those that they refuse."""
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        return f"{error.operation_name}: {told.get('Code')}"
    return str(error) if isinstance(error, BotoCoreError) else type(error).__name__
