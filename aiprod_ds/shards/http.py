"""Shards on a web server that answers ranges: a storage that is only read.

Owns the protocol. Needs urllib3, which the extra `storage` installs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

from aiprod_ds.errors import DataError
from aiprod_ds.shards.storage import (
    DEFAULT_PATIENCE_SECONDS,
    INDEX,
    InterruptedTransferError,
    NoSuchFileError,
    transferred,
)

_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 1 << 20
_MAY_PASS = (408, 429, 500, 502, 503, 504)


class HttpStorage:
    """Files under a web address; a `Storage`.

    Args:
        address: Without the slash at its end.
    """

    is_remote = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.patience_seconds = DEFAULT_PATIENCE_SECONDS
        self._pools: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pools": {}}

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """See `Storage.read`."""

        def fetch(done: int) -> Iterator[bytes]:
            if size is not None and done >= size:
                return
            yield from self._stream(name, start + done, None if size is None else start + size)

        return transferred(
            fetch,
            size=size,
            where=f"{self.address}/{name}",
            is_reachable=self._is_reachable,
            patience_seconds=self.patience_seconds,
        )

    def sizes(self) -> None:
        """Returns None: web servers do not list files."""

    def write(self, name: str, file: Path) -> None:  # noqa: ARG002  the interface's
        """Refuses.

        Raises:
            DataError: Always.
        """
        raise DataError(f"{self.address}: cannot be written. Write to a folder or to s3://bucket/prefix.")

    def _is_reachable(self) -> bool:
        try:
            return any(self._stream(INDEX, 0, 1))
        except DataError:
            return False

    def _stream(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        import urllib3

        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
        url = f"{self.address}/{quote(name)}"
        try:
            response = self._pool().request("GET", url, headers=headers, preload_content=False)
            try:
                if response.status == 416:  # nothing follows
                    return
                self._check(response.status, name, start)
                yield from response.stream(_BLOCK_BYTES)
            finally:
                response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise InterruptedTransferError(type(error).__name__) from error

    def _check(self, status: int, name: str, start: int) -> None:
        where = f"{self.address}/{name}"
        if status in (404, 410):
            raise NoSuchFileError(f"{where}: must exist, got status {status} of its server.")
        if status in _MAY_PASS:
            raise InterruptedTransferError(f"status {status}")
        if status == 200 and start == 0:
            raise DataError(
                f"{where}: its server must answer ranges, got the whole file. Use another server."
            )
        if status != 206:
            raise DataError(f"{where}: must be readable, got status {status} of its server.")

    def _pool(self) -> Any:
        """Returns the connections of this process; those of a parent are not to be used in a fork."""
        import urllib3

        if os.getpid() not in self._pools:
            options: dict[str, Any] = {"timeout": _TIMEOUT_SECONDS, "retries": urllib3.Retry(0, redirect=5)}
            scheme, _, host = self.address.partition("://")
            proxy = getproxies().get(scheme)
            bypassed = proxy_bypass(host.partition("/")[0])
            made = urllib3.PoolManager(**options)
            if proxy is not None and not bypassed:
                made = urllib3.ProxyManager(proxy, **options)
            self._pools = {os.getpid(): made}
        return self._pools[os.getpid()]
