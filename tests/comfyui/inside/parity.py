"""Runs inside ComfyUI's interpreter: our native objects against the published numbers and diffusers. Prints JSON.

Usage: parity.py COMFYUI_FOLDER REPOSITORY REFERENCE_FOLDER
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

COMFYUI, REPOSITORY, REFERENCE = map(Path, sys.argv[1:4])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(COMFYUI))
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.hooks  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import nodes  # noqa: E402, F401 - ComfyUI's own, before ours can be
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

spec = importlib.util.spec_from_file_location("comfyui_blip3o", REPOSITORY / "__init__.py")
sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint  # noqa: E402
from comfyui_blip3o.blip3o_core.checkpoints.load import load_dit  # noqa: E402
from comfyui_blip3o.blip3o_core.drawing.flow import sigma_schedule  # noqa: E402
from comfyui_blip3o.blip3o_core.drawing.sampling import FeatureSettings, sample_features, to_tokens  # noqa: E402
from comfyui_blip3o.blip3o_core.performance import linear  # noqa: E402
from comfyui_blip3o.nodes import load  # noqa: E402
from comfyui_blip3o.nodes.native import decoder as native_decoder
from comfyui_blip3o.nodes.native import dit as native_dit
from comfyui_blip3o.nodes.native import drawing

torch.set_num_threads(1)
FOLDER = str(REFERENCE / "checkpoint")
golden = load_file(REFERENCE / "golden.safetensors")
texts = json.loads((REFERENCE / "golden.json").read_text())
result: dict[str, float | bool] = {}


def record(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Largest difference in units of the reference's spread."""
    result[name] = ((ours.float() - theirs.float()).abs().max() / theirs.float().std()).item()


def check_dit() -> None:
    patcher = native_dit.load_dit_patcher(FOLDER, "fp32")
    network, sampling = patcher.model.diffusion_model, patcher.model.model_sampling
    record(
        "dit.velocity",
        network(golden["dit.x"], golden["dit.timestep"].float(), golden["dit.z"]),
        golden["dit.velocity"],
    )
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 30)
    result["sigmas of the simple schedule"] = (sigmas - sigma_schedule(30)).abs().max().item()
    published = (torch.from_numpy(np.linspace(1, 1 / 30, 30).astype(np.float32)) * 1000).long()
    result["timesteps are the published ones"] = torch.equal(
        patcher.model.process_timestep(sampling.timestep(sigmas[:-1])).long(), published
    )
    prompt, noise = golden["text.hidden_states"], golden["text.noise"]
    conds = [[[prompt, {}]], [[torch.zeros_like(prompt), {}]]]
    grid = comfy.sample.sample(
        patcher, noise, 30, 3.0, "euler", "simple", *conds, torch.zeros_like(noise), seed=0, disable_pbar=True
    )
    record("KSampler against published features", to_tokens(grid), golden["text.clip_features"])
    core = sample_features(
        load_dit(open_checkpoint(Path(FOLDER)), dtype=torch.float32),
        prompt,
        noise=noise,
        settings=FeatureSettings(steps=30),
    )
    record("KSampler against the core's sampler", to_tokens(grid), core)
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    result["partly loaded DiT casts at use"] = all(
        layer.comfy_cast_weights for layer in network.modules() if isinstance(layer, torch.nn.Linear)
    )
    velocity = network(golden["dit.x"], golden["dit.timestep"].float(), golden["dit.z"])
    record("dit.velocity, partly loaded", velocity, golden["dit.velocity"])


def check_decoder() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    decoder, vae = native_decoder.load_decoder_patcher(FOLDER, "fp32"), native_decoder.load_vae(FOLDER)
    folder = f"{FOLDER}/diffusion-decoder"
    options = {"variant": "bf16", "torch_dtype": torch.float32}
    theirs = UNet2DConditionModel.from_pretrained(f"{folder}/unet", **options)
    compare_unets("UNet call against diffusers", decoder.model, theirs)
    settings = texts["decode"]
    noise = golden["decode.noise"]
    factor = decoder.model.pixels_per_latent
    side = noise.shape[-1] * factor
    sigmas = drawing.published_sigmas(decoder, settings["steps"])
    features = comfy_grid(golden["text.clip_features"])
    positive, negative = drawing.decoder_conditioning(
        features, comfy_grid(golden["negative.clip_features"]), side, side
    )
    latents = drawing.run_sampler(
        decoder,
        noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0],
        sigmas,
        positive=positive,
        negative=negative,
        cfg=settings["guidance"],
        sampler="euler",
        seed=0,
    )
    # Ours come out unscaled, the published ones in the UNet's scale.
    scaled = decoder.model.latent_format.process_in(latents)
    record("decoder latents against the published ones", scaled, golden["decode.latents"])
    record("decoder picture against the published one", vae.decode(latents), golden["decode.image"])
    diffusers_vae = AutoencoderKL.from_pretrained(f"{folder}/vae", **options)
    compare_vaes("small VAE", vae, diffusers_vae)


def comfy_grid(tokens: torch.Tensor) -> torch.Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def compare_unets(name: str, model: native_decoder.FeatureDecoder, theirs: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    width = theirs.config.cross_attention_dim
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = torch.randn(2, 64, width, generator=generator)
    timesteps = torch.tensor([500.0, 20.0])
    sizes = torch.tensor([[1024, 1024, 0, 0, 96.0, 128.0]]).expand(2, -1)
    expected = theirs(
        latents, timesteps, tokens, added_cond_kwargs={"text_embeds": tokens.mean(1), "time_ids": sizes}
    ).sample
    positive, _ = drawing.decoder_conditioning(comfy_grid(tokens), None, 96, 128)
    adm = model.encode_adm(device="cpu", **positive[0][1])
    record(name, model.diffusion_model(latents, timesteps, context=tokens, y=adm), expected)


def compare_vaes(name: str, ours: comfy.sd.VAE, theirs: torch.nn.Module) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    record(f"{name} decodes as diffusers", ours.decode(latents), expected)
    side = expected.shape[1]
    picture = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    encoded = theirs.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    record(f"{name} encodes as diffusers", ours.encode(picture), encoded)


def check_sdxl_shapes() -> None:
    """The published shapes: three levels, 32 norm groups, SDXL's autoencoder; narrow UNet, random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        for path in Path(FOLDER).iterdir():
            if path.name != "diffusion-decoder":
                (folder / path.name).symlink_to(path)
        decoder = folder / "diffusion-decoder"
        (decoder / "scheduler").mkdir(parents=True)
        scheduler = Path(FOLDER) / "diffusion-decoder" / "scheduler" / "scheduler_config.json"
        (decoder / "scheduler" / "scheduler_config.json").write_text(scheduler.read_text())
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(64, 128, 256),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=(2, 4, 8),
            cross_attention_dim=96,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=96 + 6 * 256,
            use_linear_projection=True,
            sample_size=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        for network, part in ((unet, "unet"), (vae, "vae")):
            network.eval().save_pretrained(decoder / part)
        compare_unets(
            "UNet of SDXL's topology", native_decoder.load_decoder_patcher(str(folder), "fp32").model, unet
        )
        ours = native_decoder.load_vae(str(folder))
        result["SDXL's VAE is ComfyUI's own network"] = not isinstance(
            ours.first_stage_model, native_decoder.Autoencoder
        )
        compare_vaes("SDXL's VAE", ours, vae)


def check_backbone() -> None:
    for dtype in ("fp32", "bf16", "fp8"):
        handle = load.load_backbone_handle(Path(FOLDER), dtype)
        patcher = handle.patcher
        positive, negative, blank = drawing.encode_prompt(handle, texts["caption"], "", None)
        record(f"conditioning in {dtype}", positive, golden["text.hidden_states"])
        if dtype == "fp32":
            record("blank prompt of the decoder", blank, golden["negative.hidden_states"])
            result["empty negative prompt is zeros"] = not negative.any()
            picture = (
                torch.from_numpy(np.array(Image.open(REFERENCE / "image.png").convert("RGB"))).float() / 255
            )
            seen, _, _ = drawing.encode_prompt(
                handle, "Please reconstruct the given image.", "", picture[None]
            )
            record("picture in the prompt", seen, golden["i2i.hidden_states"])
            patcher.load(torch.device("cpu"), lowvram_model_memory=1)
            partly, _, _ = drawing.encode_prompt(handle, texts["caption"], "", None)
            record("conditioning, partly loaded", partly, golden["text.hidden_states"])
        plain = [
            type(layer).__name__
            for layer in patcher.model.modules()
            if any(True for _ in layer.parameters(recurse=False))
            and not hasattr(layer, "comfy_cast_weights")
            and not any(True for _ in layer.children())
        ]
        result[f"no plain layer left in {dtype}"] = not plain


def check_image_encoder() -> None:
    handle = load.load_image_encoder_handle(Path(FOLDER), "fp32")
    picture = Image.open(REFERENCE / "eva_image.png").convert("RGB")
    record("image features", comfy_grid(handle.pipeline.encode_images([picture])), golden["eva.pooled"])


def check_lora() -> None:
    """A patch on the DiT: merged, applied while partly loaded, and removed again."""
    patcher = native_dit.load_dit_patcher(FOLDER, "fp32")
    network = patcher.model.diffusion_model
    call = (golden["dit.x"], golden["dit.timestep"].float(), golden["dit.z"])
    key = "layers.0.attn1.to_q.weight"
    weight = network.state_dict()[key]
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(4, weight.shape[1], generator=generator),
        torch.randn(weight.shape[0], 4, generator=generator),
    )
    expected = weight + 0.5 * (up @ down) * (2.0 / 4)
    tensors = {
        f"diffusion_model.{key[:-7]}.lora_{name}.weight": value
        for name, value in (("up", up), ("down", down))
    }
    tensors[f"diffusion_model.{key[:-7]}.alpha"] = torch.tensor(2.0)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/test.safetensors")
        import folder_paths

        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        patched, _, report = load.apply_lora("test.safetensors", patcher, None, 0.5, 1.0)
    result["report counts the weights"] = "1 of 1" in report
    patched.load(torch.device("cpu"), lowvram_model_memory=1)
    partly = network(*call)
    patched.unpatch_model(torch.device("cpu"))
    patched.load(torch.device("cpu"), full_load=True)
    record("LoRA merged into the weight", network.state_dict()[key], expected)
    record("LoRA merged against partly loaded", network(*call), partly)
    patched.unpatch_model(torch.device("cpu"))
    record("weights after the LoRA is gone", network.state_dict()[key], weight)
    result["a LoRA changes the velocity"] = not torch.allclose(partly, golden["dit.velocity"], atol=1e-3)


def check_loader_text() -> None:
    """The loader tells sizes, how the device copes, and the time."""
    files = open_checkpoint(Path(FOLDER))
    text = load.memory_text(files, "fp32", 24 * 2**30)
    half = load.memory_text(files, "bf16", 2**30)
    result["the loader names every network and the time"] = all(
        word in text
        for word in ("backbone:", "dit:", "decoder:", "float32", "each network fits", " s from this disk")
    )
    result["the loader tells of a device that is too small"] = "layer by layer" in half and "bfloat16" in half


def check_kept_context() -> None:
    """The context of a prompt is made once per run, and anew where the weights may have changed."""
    patcher = native_dit.load_dit_patcher(FOLDER, "fp32")
    network = patcher.model.diffusion_model
    calls: list[int] = []
    network.caption_projection.register_forward_hook(lambda *unused: calls.append(1))
    prompt, noise = golden["text.hidden_states"], golden["text.noise"]
    lora = {"layers.0.attn2.to_v": torch.ones_like(network.layers[0].attn2.to_v.weight)}
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=0.5, strength_clip=0.0)
    hook.weights = {f"diffusion_model.{key}.weight": ("diff", (value,)) for key, value in lora.items()}
    hook.need_weight_init = False
    hooks.add(hook)

    def run(model: object, batch: int = 1, **options: object) -> torch.Tensor:
        calls.clear()
        conds = [[[prompt, dict(options)]], [[torch.zeros_like(prompt), {}]]]
        start = noise.expand(batch, -1, -1, -1)
        return comfy.sample.sample(
            *(model, start, 6, 3.0, "euler", "simple", *conds, torch.zeros_like(start)),
            seed=0,
            disable_pbar=True,
        )

    plain = run(patcher)
    result["one context for all steps"] = len(calls) == 1
    batch = run(patcher, 3)
    result["one context for a batch"] = len(calls) == 1
    record("each of a batch draws the same", batch, plain.expand(3, -1, -1, -1))
    result["no context outlives its run"] = len(vars(network)["_contexts"]) == 0
    patched = patcher.clone()
    patched.add_patches(hook.weights, 0.5)
    with_lora = run(patched)
    result["a patch changes what the same conditioning draws"] = not torch.allclose(
        with_lora, plain, atol=1e-3
    )
    patched_dit = load_dit(open_checkpoint(Path(FOLDER)), dtype=torch.float32)
    for key, value in lora.items():
        patched_dit.get_parameter(f"{key}.weight").add_(0.5 * value)
    core = sample_features(patched_dit, prompt, noise=noise, settings=FeatureSettings(steps=6))
    record("a patched run against the core's sampler", to_tokens(with_lora), core)
    record("the run after a patch is the one before it", run(patcher), plain)
    hooked = run(patcher, hooks=hooks)
    result["a hooked prompt is encoded at every step"] = len(calls) > 6
    both = patcher.clone()
    result["a hook changes what the prompt draws"] = not torch.allclose(hooked, run(both), atol=1e-3)
    with torch.inference_mode(False), torch.enable_grad():
        calls.clear()
        x, timestep, context = (
            golden["dit.x"].clone(),
            golden["dit.timestep"].float().clone(),
            golden["dit.z"],
        )
        for _ in range(2):
            network(x, timestep, context.clone())
        result["training keeps no context"] = len(calls) == 2 and len(vars(network)["_contexts"]) == 0


def check_cpu_layers() -> None:
    """On the CPU linear layers that neither cast nor patch go to oneDNN."""
    patcher = native_dit.load_dit_patcher(FOLDER, "fp32")
    inputs = (golden["dit.x"], golden["dit.timestep"].float(), golden["dit.z"])
    network = patcher.model.diffusion_model
    result["the CPU's linear layers are the core's"] = all(
        isinstance(layer, linear.OneDNNLinear)
        for layer in network.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    before, linear.WORTHWHILE_PRODUCTS = linear.WORTHWHILE_PRODUCTS, 0
    record("dit.velocity by oneDNN", network(*inputs), golden["dit.velocity"])
    linear.WORTHWHILE_PRODUCTS = before


def check_compiled() -> None:
    """Core's node TorchCompileModel, without the last stage that makes machine code."""
    patcher = native_dit.load_dit_patcher(FOLDER, "fp32")
    prompt, noise = golden["text.hidden_states"], golden["text.noise"]
    compiled = patcher.clone()
    set_torch_compile_wrapper(model=compiled, backend="aot_eager")

    def run(model: object) -> torch.Tensor:
        conds = [[[prompt, {}]], [[torch.zeros_like(prompt), {}]]]
        start = torch.zeros_like(noise)
        return comfy.sample.sample(
            *(model, noise, 6, 3.0, "euler", "simple", *conds, start), seed=0, disable_pbar=True
        )

    stats = torch._dynamo.utils.counters["stats"]
    before = dict(stats)
    record("core's compile node draws the same", run(compiled), run(patcher))
    operations = stats["calls_captured"] - before.get("calls_captured", 0)
    result["core's compile node compiles the network"] = operations > 100
    graphs = stats["unique_graphs"]
    run(compiled)
    result["core's compile node compiles once"] = stats["unique_graphs"] == graphs


with torch.inference_mode():
    for check in (
        check_dit,
        check_kept_context,
        check_cpu_layers,
        check_compiled,
        check_loader_text,
        check_decoder,
        check_sdxl_shapes,
        check_backbone,
        check_image_encoder,
        check_lora,
    ):
        check()
sys.stdout.write("RESULT " + json.dumps(result) + "\n")
