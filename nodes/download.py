"""The node that fetches a published checkpoint: only when it is run, continued where it stopped, every file checked."""

from __future__ import annotations

import time
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..blip3o_core.errors import BadInputError
from ..blip3o_core.units import format_bytes
from .native import host

CATEGORY = "BLIP3-o/load"
MODELS = {"BLIP3o-Model-8B": "8b", "BLIP3o-Model-4B": "4b"}
OTHER = "another repository"
USES = {"draw and answer": "generate", "draw, answer and encode images": "encode"}
REPORT_SECONDS = 0.2
PROGRESS_UNITS = 1000


class Download(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oDownload",
            display_name="Download BLIP3-o",
            category=CATEGORY,
            description="Show how large a published checkpoint is, or fetch it into models/blip3o. A download that was cut off "
            "continues where it stopped. Press R afterwards, then choose it in Load BLIP3-o.",
            search_aliases=["blip3o", "hub", "fetch", "install model", "huggingface"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*MODELS, OTHER],
                    default="BLIP3o-Model-8B",
                    tooltip="8B is the better one; 4B needs about 40 % less memory.",
                ),
                io.Combo.Input(
                    "use",
                    options=list(USES),
                    default="draw and answer",
                    tooltip="Encoding images (variation, blending) needs the image encoder, about 8 GB more.",
                ),
                io.Combo.Input(
                    "action",
                    options=["show what would be fetched", "download"],
                    default="show what would be fetched",
                    tooltip="Nothing is fetched before you choose download.",
                ),
                io.String.Input(
                    "repository",
                    default="",
                    optional=True,
                    placeholder="owner/name",
                    tooltip="Hub repository, only for another repository.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.String.Output("checkpoint", tooltip="Name to choose in Load BLIP3-o."),
                io.String.Output("report", tooltip="Files and sizes."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_output_node=True,
            # The disk and the hub change without the graph changing, and the node shows text under its own id.
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **unused: str) -> float:
        return float("nan")

    @classmethod
    def execute(cls, model: str, use: str, action: str, repository: str = "") -> io.NodeOutput:
        from ..blip3o_core.hub.download import plan_download, resolve_repo, run_download

        repo = repository.strip() if model == OTHER else MODELS[model]
        if not repo:
            raise BadInputError(
                "No repository is named.\nWrite owner/name into repository, or choose a model from the list."
            )
        # Both parts of the name, so that a stranger's repository never lands where another one's files lie.
        name = resolve_repo(repo).replace("/", "--") if model == OTHER else model
        folder = Path(folder_paths.get_folder_paths(host.MODEL_FOLDER)[0]) / name
        report = DownloadProgress(cls.hidden.unique_id)
        plan = plan_download(repo, folder, use=USES[use], on_check=report.check)
        text = str(plan)
        host.show_text(text, cls.hidden.unique_id)
        if action == "download":
            report.total = max(1, plan.total_bytes)
            report.done = {
                file.path: file.size if file.is_present else file.partial_bytes for file in plan.files
            }
            run_download(plan, on_progress=report)
            text = f'"{name}" is complete in "{folder}". Press R, then choose it in Load BLIP3-o.'
        return io.NodeOutput(name, text, ui=ui.PreviewText(text))


class DownloadProgress:
    """Bar and text on the node during a download; cancel stops it and keeps what has arrived."""

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.bar = host.StepProgress(PROGRESS_UNITS)
        self.total = 1
        self.done: dict[str, int] = {}
        self.reported = 0.0

    def check(self, file: str, done: int, size: int) -> None:
        """While files that are already there are compared with their checksums."""
        host.raise_if_interrupted()
        self._say(f"Checking {file}: {done / max(1, size):.0%}")

    def __call__(self, file: str, done: int, size: int) -> None:
        host.raise_if_interrupted()
        self.done[file] = done
        fetched = sum(self.done.values())
        if self._say(
            f"{file}: {done / max(1, size):.0%}, all files {fetched / self.total:.1%} of {format_bytes(self.total)}"
        ):
            self.bar(int(PROGRESS_UNITS * fetched / self.total))

    def _say(self, text: str) -> bool:
        if time.monotonic() - self.reported < REPORT_SECONDS:
            return False
        self.reported = time.monotonic()
        host.show_text(text, self.node_id)
        return True


NODES = [Download]
