"""A model hub on 127.0.0.1: model info, resolve with redirects to a separate "CDN", ranges, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin")
SHARD_BYTES = 600_000


@dataclass
class FakeRepo:
    """Files of a repository; large ones are kept "in LFS", as on the real hub."""

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "0001"
    is_gated: bool = False


@dataclass
class Request:
    """A request for a file's content, and how many bytes of it were sent."""

    path: str
    range: str | None
    authorization: str | None
    by_cdn: bool
    sent: int = 0


@dataclass
class FakeHub:
    """The server's content, its faults, and what it was asked.

    Attributes:
        cuts: file -> positions (counted in the answer's body) at which the next answers break off, first come first.
        statuses: file -> HTTP statuses of the next answers, first come first.
        corrupt: file -> how many more times it is sent with a wrong byte.
        has_ranges: False = answers a range request with the whole file.
        lists_metadata: False = file names only, as some mirrors do.
        is_login_page: True = answers everything with a web page, as the network of a hotel does.
        info: laid over the answer about a repository; "entry" in it over each of its files.
        xet: True = large files carry the header of Xet storage.
    """

    repos: dict[str, FakeRepo] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    corrupt: dict[str, int] = field(default_factory=dict)
    has_ranges: bool = True
    lists_metadata: bool = True
    is_login_page: bool = False
    info: dict[str, object] = field(default_factory=dict)
    xet: bool = False
    requests: list[Request] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    endpoint: str = ""
    cdn: str = ""

    def sent(self, path: str) -> int:
        """Bytes of a file sent so far."""
        return sum(request.sent for request in self.requests if request.path == path)

    def ranges(self, path: str) -> list[str | None]:
        """Range headers of the requests for a file's bytes (not of those that were redirected)."""
        return [
            request.range
            for request in self.requests
            if request.path == path and request.by_cdn == _is_large(path)
        ]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """An empty hub, served until the end of the block."""
    hub = FakeHub()
    servers = [_Server(("127.0.0.1", 0), _handler(hub, is_cdn)) for is_cdn in (False, True)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def published_repo(*, has_image_encoder: bool = True, seed: int = 0) -> FakeRepo:
    """The published layout, with leftovers: shard 1 backbone, 2 backbone + EVA-CLIP, 3 EVA-CLIP only, 4 EVA-CLIP + DiT."""
    encoder = "model.gen_vision_tower.vision_tower.model."
    shards = {
        1: ["model.embed_tokens.weight", "visual.patch_embed.proj.weight"],
        2: ["model.layers.0.mlp.up_proj.weight", encoder + "cls_token"],
        3: [encoder + "blocks.0.attn.proj.weight", encoder + "blocks.1.attn.proj.weight"],
        4: [encoder + "blocks.2.attn.proj.weight", "model.dit.model.norm_out.linear_1.weight"],
    }
    weight_map = {
        key: f"model-{number:05d}-of-00004.safetensors"
        for number, keys in shards.items()
        for key in keys
        if has_image_encoder or not key.startswith(encoder)
    }
    files = {
        "config.json": b'{"model_type": "blip3o_qwen"}',
        "generation_config.json": b"{}",
        "preprocessor_config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "README.md": b"# read me",
        "trainer_state.json": b"{}",
        "training_args.bin": b"a pickle",
        "pytorch_model.bin": noise(1000, seed + 90),
        "diffusion-decoder/model_index.json": b"{}",
        "diffusion-decoder/README.md": b"# read me",
        "diffusion-decoder/pipeline_llava_gen.py": b"raise SystemExit",
        "diffusion-decoder/scheduler/scheduler_config.json": b"{}",
        "diffusion-decoder/tokenizer/tokenizer.json": b"{}",
        "diffusion-decoder/safety_checker_none/model.safetensors": noise(1000, seed + 91),
        "diffusion-decoder/unet/config.json": b'{"sample_size": 128}',
        "diffusion-decoder/unet/diffusion_pytorch_model.safetensors": noise(1000, seed + 92),
        "diffusion-decoder/unet/diffusion_pytorch_model.bf16.safetensors": noise(SHARD_BYTES, seed + 93),
        "diffusion-decoder/vae/config.json": b'{"latent_channels": 4}',
        "diffusion-decoder/vae/diffusion_pytorch_model.bf16.safetensors": noise(50_000, seed + 94),
    }
    for name in set(weight_map.values()):
        files[name] = noise(SHARD_BYTES, seed + int(name[6:11]))
    return FakeRepo(files)


def single_file_repo(*, has_image_encoder: bool) -> FakeRepo:
    """The published layout with all weights in one file and no index, as small checkpoints are saved."""
    repo = published_repo()
    repo.files = {name: data for name, data in repo.files.items() if not name.startswith("model")}
    keys = ["model.embed_tokens.weight", "model.dit.model.norm_out.linear_1.weight"]
    if has_image_encoder:
        keys.append("model.gen_vision_tower.vision_tower.model.cls_token")
    header = json.dumps({key: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for key in keys}).encode()
    repo.files["model.safetensors"] = struct.pack("<Q", len(header)) + header + noise(SHARD_BYTES, 7)
    return repo


def noise(count: int, seed: int) -> bytes:
    """Bytes that no two seeds share."""
    return hashlib.shake_128(str(seed).encode()).digest(count)


def git_sha1(data: bytes) -> str:
    """The hash `git hash-object` prints."""
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith(LARGE_SUFFIXES)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that stops half way resets the connection; that is no fault of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(hub: FakeHub, is_cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's delayed ACK

        def log_message(self, *args: object) -> None:
            """Keep the tests' output clean."""

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.calls.append(f"{self.command} {path}")
            parts = path.split("/")
            if hub.is_login_page:
                self.send_body(b"<html>Please log in.</html>", "text/html")
            elif is_cdn:
                repo = hub.repos["/".join(parts[:2])]
                self.send_content("/".join(parts[2:]), repo, with_body)
            elif parts[:2] == ["api", "models"]:
                self.send_info("/".join(parts[2:4]), parts[5:])
            elif parts[2:3] == ["resolve"]:
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            else:
                self.refuse(404, None)

        def send_info(self, name: str, revision: list[str]) -> None:
            repo = self.find(name, "/".join(revision) or "main")
            if repo is None:
                return
            siblings = []
            for path, data in repo.files.items():
                entry: dict[str, object] = {"rfilename": path}
                if "blobs=" in self.path and hub.lists_metadata:
                    entry |= {"size": len(data), "blobId": git_sha1(data)}
                    if _is_large(path):
                        sha256 = hashlib.sha256(data).hexdigest()
                        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
                siblings.append(entry | hub.info.get("entry", {}))
            body = json.dumps(
                {
                    "_id": "0",
                    "id": name,
                    "modelId": name,
                    "sha": repo.commit,
                    "tags": [],
                    "siblings": siblings,
                    **{key: value for key, value in hub.info.items() if key != "entry"},
                }
            ).encode()
            self.send_body(body, "application/json")

        def send_body(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def resolve(self, name: str, revision: str, path: str, with_body: bool) -> None:
            repo = self.find(name, revision)
            if repo is None:
                return
            if repo.is_gated and self.headers["Authorization"] is None:
                self.refuse(401, "GatedRepo")
            elif path not in repo.files:
                self.refuse(404, "EntryNotFound")
            elif _is_large(path):
                data = repo.files[path]
                sha256 = hashlib.sha256(data).hexdigest()
                hub.requests.append(self.request_for(path))
                self.send_response(302)
                self.send_header("X-Repo-Commit", repo.commit)
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Linked-Etag", f'"{sha256}"')
                if hub.xet:
                    self.send_header("X-Xet-Hash", sha256)
                    self.send_header("Link", f'<{hub.endpoint}/api/xet-read-token>; rel="xet-auth"')
                self.send_header("Location", f"{hub.cdn}/{name}/{path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send_content(path, repo, with_body)

        def send_content(self, path: str, repo: FakeRepo, with_body: bool) -> None:
            if hub.statuses.get(path) and with_body:
                self.refuse(hub.statuses[path].pop(0), None)
                return
            data = repo.files[path]
            request = self.request_for(path)
            start = 0
            if request.range and hub.has_ranges:
                start = int(request.range.removeprefix("bytes=").split("-")[0])
            body = data[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("ETag", f'"{git_sha1(data)}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not with_body:
                return
            if hub.corrupt.get(path, 0) > 0:
                hub.corrupt[path] -= 1
                body = body[:-1] + bytes([body[-1] ^ 1])
            if hub.cuts.get(path):
                body = body[: hub.cuts[path].pop(0)]
                self.close_connection = True
            hub.requests.append(request)
            # Counted before the last byte leaves: the client may look at the count as soon as it has that byte.
            request.sent = len(body)
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

        def request_for(self, path: str) -> Request:
            return Request(path, self.headers["Range"], self.headers["Authorization"], is_cdn)

        def find(self, name: str, revision: str) -> FakeRepo | None:
            repo = hub.repos.get(name)
            if repo is None:
                self.refuse(401, "RepoNotFound")
            elif revision not in ("main", repo.commit):
                self.refuse(404, "RevisionNotFound")
                repo = None
            return repo

        def refuse(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
