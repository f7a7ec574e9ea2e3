"""Shards on a web server that answers ranges: a storage that is only read.

Owns the protocol. Needs urllib3, which the extra `storage` installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

from aiprod_ds.errors import DataError
from aiprod_ds.shards.storage import InterruptedTransferError, NoSuchFileError, RangeStorage, byte_range

_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 1 << 20
_MAY_PASS = (408, 429, 500, 502, 503, 504)


class HttpStorage(RangeStorage):
    """Files under a web address; a `Storage`.

    Args:
        address: Without the slash at its end.
    """

    def sizes(self) -> None:
        """Returns None: web servers do not list files."""

    def write(self, name: str, file: Path) -> None:  # noqa: ARG002  the interface's
        """Refuses.

        Raises:
            DataError: Always.
        """
        raise DataError(f"{self.address}: cannot be written. Write to a folder or to s3://bucket/prefix.")

    def _stream(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        import urllib3

        headers = {"Range": byte_range(start, end), "Accept-Encoding": "identity"}
        url = f"{self.address}/{quote(name)}"
        try:
            response = self._connection().request("GET", url, headers=headers, preload_content=False)
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

    def _connect(self) -> Any:
        import urllib3

        options: dict[str, Any] = {"timeout": _TIMEOUT_SECONDS, "retries": urllib3.Retry(0, redirect=5)}
        scheme, _, host = self.address.partition("://")
        proxy = getproxies().get(scheme)
        bypassed = proxy_bypass(host.partition("/")[0])
        if proxy is not None and not bypassed:
            return urllib3.ProxyManager(proxy, **options)
        return urllib3.PoolManager(**options)
