"""A model hub, or a mirror of it: what its repositories hold, and the bytes of their files from any position on.

Listing, token, proxy and offline rules are huggingface_hub's. The bytes come over plain HTTP through its session: its own
file download starts a file anew in every process (since its version 1, and with Xet in any version), and a 5 GB shard
must continue where the last run stopped. Its `file_download.http_get` does continue, but is no documented part of the
library: before version 1 it tells nobody of the bytes that arrive, so nothing could stop it, and it gives up on a server that
is busy (500 to 504) or ends a body early.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from ..errors import BadInputError, Blip3oError, MissingFilesError
from ..untrusted import quote

logger = logging.getLogger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
CHUNK_BYTES = 2**16
HASH_CHUNK_BYTES = 4 * 2**20
TRIES_WITHOUT_PROGRESS = 5
RETRY_SECONDS = 1.0
# Every failure of the hub's HTTP library: requests (hub below 1.0) raises OSErrors, httpx and its heirs their HTTPError.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of one version of a repository.

    Attributes:
        repo: "owner/name".
        commit: the exact version.
        source: path inside the repository, as the server names it: not yet to be trusted.
        size: bytes; None = not known yet.
        sha256: of large files, as the hub states it.
        git_sha1: git's hash, which the hub states for small files.
    """

    repo: str
    commit: str
    source: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def checksum(self) -> str | None:
        return self.sha256 or self.git_sha1

    def has_content(self, pieces: Iterable[bytes]) -> bool:
        """Whether bytes have the stated checksum; True when the hub states none."""
        if not self.checksum:
            return True
        if self.sha256:
            digest = hashlib.sha256()
        else:  # git hashes a header before the content
            assert self.size is not None, "complete() tells the size"
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for piece in pieces:
            digest.update(piece)
        return digest.hexdigest() == self.checksum

    def is_at(self, path: Path, on_piece: Callable[[int], None] | None = None) -> bool:
        """Whether a file on the disk has the stated size and checksum.

        Args:
            on_piece: called with the number of bytes read so far, after each piece.
        """
        if not path.is_file() or path.stat().st_size != self.size:
            return False

        def pieces() -> Iterator[bytes]:
            done = 0
            with path.open("rb") as data:
                while piece := data.read(HASH_CHUNK_BYTES):
                    yield piece
                    done += len(piece)
                    if on_piece:
                        on_piece(done)

        return self.has_content(pieces())

    def damaged(self) -> MissingFilesError:
        """What a person is told when the file keeps arriving with other content than the hub states."""
        return MissingFilesError(
            f'"{self.source}" of {self.repo} arrived damaged twice: its checksum is not the one the hub states. '
            "The damaged file was deleted.\n"
            "Run the download again. If it happens again, something on the way changes the data: try another network or "
            f"disk, or another mirror (HF_ENDPOINT). (expected {self.checksum})"
        )


@dataclass(frozen=True)
class Listing:
    """All files of one version of a repository, by their path in it."""

    repo: str
    files: dict[str, RemoteFile]


class ConnectionTrouble(Exception):
    """A file could not be read to its end; `is_transient` = worth another try."""

    def __init__(self, error: Exception) -> None:
        super().__init__(" ".join(str(error).split()))
        self.error = error
        status = _status(error)
        refused = isinstance(error, (OfflineModeIsEnabled, RepositoryNotFoundError, EntryNotFoundError))
        self.is_transient = not refused and (status is None or status in TRANSIENT_STATUS)


class Hub:
    """The model hub, or a mirror of it, at one address.

    Args:
        endpoint: the address; None = HF_ENDPOINT, else the public hub.

    Raises:
        BadInputError: the address is no web address.
        MissingFilesError: offline mode is on.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        # The library reads both variables once, at its import; a notebook or a launcher may set them later.
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise BadInputError(
                f'The hub\'s address "{self.endpoint}" does not start with http:// or https://.\n'
                "Correct HF_ENDPOINT, or unset it to use the public hub."
            )
        is_offline = os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "TRUE", "YES", "ON")
        if is_offline or constants.HF_HUB_OFFLINE:
            raise _offline()

    def listing(self, repo: str, revision: str | None = None) -> Listing:
        """All files of a repository; size and checksum where the server lists them."""
        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except (
            json.JSONDecodeError
        ) as error:  # first: in one version of the library it is a network error too
            raise self._no_hub(error) from error
        except NETWORK_ERRORS as error:
            raise self._explain(error, repo, revision) from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # The library reads dates and lists out of the answer without asking what they are.
            raise self._no_hub(error) from error
        commit = info.sha or revision or constants.DEFAULT_REVISION
        if not isinstance(commit, str):
            raise self._no_hub(f"its version is {quote(commit)}")
        files = {}
        for entry in info.siblings or ():
            size = entry.lfs.size if entry.lfs else entry.size
            if not isinstance(entry.rfilename, str) or not (size is None or _is_size(size)):
                raise self._no_hub(f"it lists {quote(entry.rfilename)} with the size {quote(size)}")
            files[entry.rfilename] = RemoteFile(
                repo,
                commit,
                entry.rfilename,
                size,
                _valid(SHA256, entry.lfs.sha256) if entry.lfs else None,
                None if entry.lfs else _valid(GIT_SHA1, entry.blob_id),
            )
        return Listing(repo, files)

    def _no_hub(self, reason: object) -> MissingFilesError:
        return MissingFilesError(
            f'"{self.endpoint}" does not answer like a model hub.\n'
            f"Check HF_ENDPOINT, and whether a proxy or a login page of your network is in between. ({reason})"
        )

    def complete(self, file: RemoteFile) -> RemoteFile:
        """The file with size and checksum; a mirror that does not list them states them per file."""
        if file.size is not None and file.checksum:
            return file
        try:
            metadata = get_hf_file_metadata(self._url(file), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        except NETWORK_ERRORS as error:
            raise self._explain(error, file.repo, file.commit, file.source) from error
        size = metadata.size if file.size is None else file.size
        if size is None:
            raise MissingFilesError(
                f'"{self.endpoint}" does not say how large "{file.source}" of {file.repo} is.\n'
                "Use another mirror (HF_ENDPOINT), or unset HF_ENDPOINT to use the public hub."
            )
        sha256, git_sha1 = _valid(SHA256, metadata.etag), _valid(GIT_SHA1, metadata.etag)
        return replace(file, size=size, sha256=sha256, git_sha1=git_sha1)

    def read(self, file: RemoteFile, is_enough: Callable[[bytearray], bool] = lambda data: False) -> bytes:
        """A small file, or the start of a large one until `is_enough`, into memory, unchecked."""
        failures = 0
        while True:
            data = bytearray()
            try:
                with contextlib.closing(self.chunks(file, 0)) as chunks:
                    for _, chunk in chunks:
                        data += chunk
                        if is_enough(data):
                            break
                return bytes(data)
            except ConnectionTrouble as trouble:
                failures += 1
                self.wait_or_raise(trouble, file, failures)

    def chunks(self, file: RemoteFile, start: int) -> Generator[tuple[int, bytes], None, None]:
        """(position in the file, bytes) from `start` on, or from 0 when the server cannot continue a file.

        Raises:
            ConnectionTrouble: the connection failed, or ended before the file did.
        """
        assert file.size is not None, "complete() tells the size"
        # A compressed body has no place to continue from.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with _open_stream(self._url(file), headers) as (status, body):
                position = start if status == 206 else 0
                for chunk in body:
                    chunk = chunk[: file.size - position]
                    yield position, chunk
                    position += len(chunk)
                    if position == file.size:
                        return
            if position < file.size:
                raise ConnectionError(f"the connection ended after {position} of {file.size} bytes")
        except NETWORK_ERRORS as error:
            raise ConnectionTrouble(error) from error

    def wait_or_raise(self, trouble: ConnectionTrouble, file: RemoteFile, failures: int) -> None:
        """Wait a little before the next try, or explain the trouble when no try is left.

        Args:
            failures: how many tries in a row brought nothing.
        """
        if not trouble.is_transient or failures >= TRIES_WITHOUT_PROGRESS:
            raise self._explain(trouble.error, file.repo, file.commit, file.source) from trouble.error
        logger.info("%s: %s. Trying again.", file.source, trouble)
        time.sleep(RETRY_SECONDS * failures)

    def _url(self, file: RemoteFile) -> str:
        return hf_hub_url(file.repo, file.source, revision=file.commit, endpoint=self.endpoint)

    def _explain(
        self, error: Exception, repo: str, revision: str | None, source: str | None = None
    ) -> Blip3oError:
        page = f"{self.endpoint}/{repo}"
        what = f'"{source}" of {repo}' if source else f'the file list of "{repo}"'
        status = _status(error)
        detail = " ".join(str(error).split())[:300]
        login = 'log in with "hf auth login" or set HF_TOKEN'
        if isinstance(error, OfflineModeIsEnabled):
            return _offline()
        if isinstance(error, GatedRepoError):
            return MissingFilesError(
                f'Repository "{repo}" is gated: its owner gives access to people who ask for it.\n'
                f"Open {page}, accept the conditions, then {login}, and run the download again."
            )
        if isinstance(error, RevisionNotFoundError):
            return BadInputError(
                f'Repository "{repo}" has no revision "{revision}".\n'
                f"Leave the revision out to get the newest version, or look up its branches and tags at {page}."
            )
        if isinstance(error, RepositoryNotFoundError):
            return BadInputError(
                f'There is no repository "{repo}" at {self.endpoint}, or it is private.\n'
                f"Check the spelling. For a private one, {login}."
            )
        if isinstance(error, EntryNotFoundError) or status == 404:
            return MissingFilesError(
                f"The hub names {what}, but does not have it.\n"
                f"Try again later, or another revision. ({detail})"
            )
        if status in (401, 403):
            return MissingFilesError(
                f"The hub refused access to {what}.\n"
                f"Your token may have expired or lack the right to read it: {login}. ({detail})"
            )
        if status == 429:
            return MissingFilesError(
                f"The hub asks to slow down (too many requests) at {what}.\n"
                f"Wait some minutes and run the download again; it continues. To get a higher limit, {login}."
            )
        if status is not None:
            return MissingFilesError(
                f"The hub answered the request for {what} with error {status}.\n"
                f"Run the download again later; it continues where it stopped. ({detail})"
            )
        return MissingFilesError(
            f"Could not read {what} from {self.endpoint}: the connection failed.\n"
            "Check the internet connection and proxy, or set HF_ENDPOINT to a mirror, and run the download again; it "
            f"continues where it stopped. ({type(error).__name__}: {detail})"
        )


@contextlib.contextmanager
def _open_stream(url: str, headers: dict[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(HTTP status, body in pieces as they arrive) of a GET through the hub library's session."""
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    session: Any = get_session()
    if huggingface_hub.__version__.startswith("0."):  # a session of requests
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response.status_code, response.iter_content(CHUNK_BYTES)
        return
    with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()  # the error's text is in the body
        hf_raise_for_status(response)
        yield response.status_code, response.iter_bytes()


def _valid(pattern: re.Pattern[str], checksum: object) -> str | None:
    return checksum if isinstance(checksum, str) and pattern.fullmatch(checksum) else None


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _status(error: Exception) -> int | None:
    """HTTP status of an answer that came; None when none came."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def _offline() -> MissingFilesError:
    return MissingFilesError(
        "Offline mode is on (HF_HUB_OFFLINE=1), so nothing can be downloaded.\n"
        "Unset HF_HUB_OFFLINE and run the download again, or name a folder that already holds the checkpoint."
    )
