"""A real ComfyUI as a child process, with this checkout as a node pack, and a client for its HTTP and WebSocket API."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.path.expanduser(os.environ.get("COMFYUI_PATH", "~/ComfyUI")))
START_SECONDS = 180
RUN_SECONDS = 300
JSON_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME = 1, 2, 8, 9
PREVIEW_EVENTS = (1, 4)
TEXT_EVENT = 3


def comfyui_python() -> str:
    """The interpreter that ComfyUI runs with: COMFYUI_PYTHON, or a virtual environment inside its folder, or this one."""
    candidates = [COMFYUI / name / "bin" / "python" for name in ("venv", ".venv")]
    found = next((str(path) for path in candidates if path.exists()), None)
    return os.environ.get("COMFYUI_PYTHON") or found or os.sys.executable


def make_base_folder(folder: Path) -> Path:
    """A fresh ComfyUI base folder whose only node pack is this checkout."""
    for name in ("models/blip3o", "models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "custom_nodes" / "ComfyUI-BLIP3o").symlink_to(ROOT)
    return folder


class Server:
    """A running ComfyUI.

    Args:
        base: its base folder.
        options: further command-line options.
        environment: further environment variables.
    """

    def __init__(self, base: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.base = base
        self.log_path = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [comfyui_python(), str(COMFYUI / "main.py"), "--base-directory", str(base), "--cpu"]
        command += [
            "--port",
            str(self.port),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
            *options,
        ]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        variables.setdefault("OMP_NUM_THREADS", "1")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=COMFYUI, env=variables, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def memory_bytes(self) -> int:
        """Resident memory of the server process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, prompt: dict[str, Any], client: str | None = None, **extra: Any) -> str:
        """Queue an API graph; its id. Fails with the validation error if it is refused."""
        answer = self.post(
            "/prompt", {"prompt": prompt, "extra_data": extra, "client_id": client or uuid.uuid4().hex}
        )
        assert "prompt_id" in answer, json.dumps(answer, indent=1)
        assert not answer["node_errors"], answer["node_errors"]
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a prompt when it has ended, however it ended."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if history:
                return history[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(f"prompt still running:\n{self.log()[-2000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Outputs by node id of a graph that must succeed."""
        entry = self.wait(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", error_of(entry)
        return entry["outputs"]

    def image(self, reference: dict[str, str]) -> bytes:
        """Bytes of a picture that an output names."""
        query = "&".join(f"{key}={reference[key]}" for key in ("filename", "subfolder", "type"))
        return self.get_bytes(f"/view?{query}")


def error_of(entry: dict[str, Any]) -> str:
    """Message of a prompt that failed; empty when none did."""
    for name, data in entry["status"]["messages"]:
        if name == "execution_error":
            return data["exception_message"]
    return ""


def cached_nodes(entry: dict[str, Any]) -> set[str]:
    """Ids of the nodes that were not run again."""
    return {
        node
        for name, data in entry["status"]["messages"]
        if name == "execution_cached"
        for node in data["nodes"]
    }


class Socket:
    """The WebSocket of one client: events as ("json", dict) and ("preview" | "text" | "binary", bytes)."""

    def __init__(self, server: Server) -> None:
        self.client = uuid.uuid4().hex
        self.connection = socket.create_connection(("127.0.0.1", server.port), timeout=RUN_SECONDS)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self.connection.sendall(
            f"GET /ws?clientId={self.client} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.connection.makefile("rb")
        while self.stream.readline().strip():
            pass

    def events(self) -> Iterator[tuple[str, Any]]:
        while True:
            kind, payload = self._message()
            if kind == CLOSE_FRAME:
                return
            if kind == JSON_FRAME:
                yield "json", json.loads(payload)
            elif kind == BINARY_FRAME:
                event = struct.unpack(">I", payload[:4])[0]
                name = "preview" if event in PREVIEW_EVENTS else "text" if event == TEXT_EVENT else "binary"
                yield name, payload[4:]

    def until_done(self, prompt_id: str) -> Iterator[tuple[str, Any]]:
        """Events up to the end of a prompt."""
        for kind, data in self.events():
            yield kind, data
            if kind == "json" and data["type"] in (
                "execution_success",
                "execution_error",
                "execution_interrupted",
            ):
                if data["data"]["prompt_id"] == prompt_id:
                    return

    def close(self) -> None:
        self.stream.close()
        self.connection.close()

    def _message(self) -> tuple[int, bytes]:
        kind, payload, is_last = 0, b"", False
        while not is_last:
            first, second = self.stream.read(2)
            is_last, opcode, length = bool(first & 0x80), first & 0x0F, second & 0x7F
            if length == 126:
                length = struct.unpack(">H", self.stream.read(2))[0]
            elif length == 127:
                length = struct.unpack(">Q", self.stream.read(8))[0]
            data = self.stream.read(length)
            if opcode == PING_FRAME:
                is_last = False
                continue
            kind, payload = kind or opcode, payload + data
        return kind, payload
