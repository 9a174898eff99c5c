"""Peak memory while a large checkpoint is loaded, measured in a process of its own."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from comfyui_blip3o.blip3o_core.checkpoints.keys import to_published_key
from comfyui_blip3o.blip3o_core.config import NextDiTConfig
from comfyui_blip3o.blip3o_core.models.backbone import Backbone
from comfyui_blip3o.blip3o_core.models.nextdit import NextDiT

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
LARGEST_SHARE = 1.2
# Loads two components, touches every page of every tensor, and prints the growth of the peak and the tensors' bytes.
MEASURE = """
import importlib.util, re, sys
from pathlib import Path
root, folder, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = importlib.util.spec_from_file_location("comfyui_blip3o", root / "__init__.py")
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
import torch
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import load_backbone, load_dit
from comfyui_blip3o.blip3o_core.models import backbone, nextdit
import accelerate

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

files = open_checkpoint(folder)
before = status("VmRSS")
networks = [load(files, dtype=getattr(torch, dtype, None)) for load in (load_backbone, load_dit)]
total = 0
for network in networks:
    for parameter in network.parameters():
        parameter.view(-1)[:: 4096 // parameter.element_size()].sum().item()
        total += parameter.nbytes
print(status("VmHWM") - before, total)
"""


def write_zeros(folder: Path) -> int:
    """A checkpoint of more than 2 GB of bf16 zeros in a sparse file; returns its bytes."""
    config = {**tiny_models.tiny_config(), "hidden_size": 1024, "intermediate_size": 4096}
    config |= {"num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4}
    config["rope_scaling"]["mrope_section"] = [16, 8, 8]
    config["vision_config"]["out_hidden_size"] = 1024
    dit_config = NextDiTConfig(layers=12, conditioning_dim=1024)
    with torch.device("meta"):
        networks = {
            "backbone": Backbone(config, vocab_size=151668, queries=64, tie_head=False),
            "dit": NextDiT(dit_config),
        }
    header, offset = {}, 0
    for component, network in networks.items():
        for key, tensor in network.state_dict().items():
            end = offset + 2 * tensor.numel()
            header[to_published_key(component, key)] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    return offset


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("dtype", ["as stored", "float16", "float32"])
def test_loading_takes_at_most_a_fifth_more_than_the_weights(tmp_path: Path, dtype: str) -> None:
    if available_memory() < 8 * GIB or shutil.disk_usage(tmp_path).free < 4 * GIB:
        pytest.skip("needs 8 GB of free memory and 4 GB of free disk")
    stored = write_zeros(tmp_path / "large")
    assert stored > 2 * 10**9
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), str(tmp_path / "large"), dtype],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert measured.returncode == 0, measured.stderr
    peak, weights = map(int, measured.stdout.split()[-2:])
    assert weights == stored * (2 if dtype == "float32" else 1)
    assert weights * 0.9 < peak < weights * LARGEST_SHARE
