"""One unit for bytes: memory, weights, downloads and disks are counted alike."""

from pathlib import Path

import pytest
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.match import needed_tensors
from comfyui_blip3o.blip3o_core.checkpoints.memory_plan import parse_memory
from comfyui_blip3o.blip3o_core.hub.client import RemoteFile
from comfyui_blip3o.blip3o_core.hub.download import DownloadPlan, PlannedFile
from comfyui_blip3o.blip3o_core.units import format_bytes
from comfyui_blip3o.cli import main
from published_shapes import write_published_shapes


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (2**20 - 1, "1.0 MB"),
        (2**30 - 1, "1.00 GB"),
        (16_580_000_000, "15.44 GB"),
        (3 * 2**40, "3.00 TB"),
    ],
)
def test_sizes_are_written_for_people(count: int, words: str) -> None:
    assert format_bytes(count) == words


@pytest.mark.parametrize("text", ["8.00 GB", "512.0 MB", "15.44 GB"])
def test_a_size_that_is_printed_can_be_typed_again(text: str) -> None:
    assert format_bytes(parse_memory(text)) == text


def test_a_network_has_one_size_in_info_plan_and_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_published_shapes(tmp_path / "8B")
    tensors = needed_tensors(open_checkpoint(folder), "backbone").values()
    size = sum(info.nbytes for info in tensors)
    assert size == pytest.approx(16.58e9, abs=0.01e9)
    words = "15.44 GB"
    lines = {}
    for name, options in {"info": [], "plan": ["--plan", "48GB"]}.items():
        assert main(["info", str(folder), *options]) == 0
        out = capsys.readouterr().out.splitlines()
        lines[name] = next(line for line in out if line.split()[0] == "backbone")
    remote = RemoteFile("a/b", "0" * 40, "backbone.safetensors", size, None)
    download = DownloadPlan(
        "a/b", tmp_path, "generate", "http://hub", (PlannedFile(remote, "backbone.safetensors"),)
    )
    lines["download"] = str(download).splitlines()[0]
    for name, line in lines.items():
        assert words in line, (name, line)


@pytest.mark.parametrize("command", ["info", "download"])
def test_the_help_says_what_a_gb_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "2^30 bytes" in " ".join(capsys.readouterr().out.split())
