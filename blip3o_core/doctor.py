"""Is everything well? Versions, device and memory, checkpoints, a self-test; and what to do about each thing that is not.

Nothing heavy is imported before it is looked at, so that a broken library is a line of the report rather than its end.
"""

from __future__ import annotations

import gc
import getpass
import os
import platform
import re
import shutil
import subprocess
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import BUILT_IN_MODEL
from .errors import Blip3oError
from .units import format_bytes
from .versions import PROJECT_VERSION, VersionCheck, check_versions

if TYPE_CHECKING:
    from .checkpoints.layout import CheckpointFiles
    from .self_test import SelfCheck

BUILT_IN_NAME = "built-in: tiny"
# What a library that changed does to code that calls it. Anything else is a bug of ours and is not caught.
LIBRARY_ERRORS = (ImportError, AttributeError, TypeError, ValueError, LookupError, RuntimeError)
REPORT_BUG = (
    "Paste the output of blip3o doctor --json into a bug report; it names no folder, user or computer."
)
CHECK_FOLDER = "Check the folder, its permissions and its files."
CHECK_CONFIGURATION = (
    "Download its config.json and the folder of its decoder again. If that does not help, install libraries of the "
    f"versions that were tested (above). {REPORT_BUG}"
)
SMI_SECONDS = 5
# A tokenizer is one of these.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# Networks that every use but the variation of pictures has in the shards.
NEEDED = ("backbone", "dit")
# Every use also reads these: the published settings give the decoder a negative prompt.
ALWAYS_NEEDED = ("backbone", "tokenizer")
# What only the variation of pictures needs: a checkpoint downloaded to draw and answer comes without it.
OPTIONAL = "image_encoder"
NEW_PYTORCH = "pytorch.org, Get Started, tells the command"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or only worth knowing, and what to do about it."""

    is_wrong: bool
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}\n{self.remedy}"


ONLY_BUILT_IN = Finding(
    False,
    "No checkpoint but the built-in tiny model was looked at, which draws simple shapes only.",
    'Download one: blip3o download 8b FOLDER, or the node "Download BLIP3-o". Look at one that lies elsewhere: blip3o '
    "doctor FOLDER.",
)


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        free_bytes: of its own memory; None = not known.
        is_used: PyTorch can compute on it.
        capability: what it can do: "8.9" of NVIDIA, "gfx1100" of AMD; empty = not known.
    """

    name: str
    free_bytes: int | None
    total_bytes: int | None
    is_used: bool
    capability: str = ""


@dataclass(frozen=True)
class Machine:
    """What computes: cores, memory in bytes (None = not known), what PyTorch was built for ("CUDA 13.0", "ROCm 6.4", "MPS", "CPU
    only"; empty = not known), GPUs.
    """

    system: str
    cpu_cores: int
    free_bytes: int | None
    total_bytes: int | None
    pytorch_build: str = ""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        can: "draw", "answer" and "vary" -> whether every network of it is there and fits.
        problem: why it cannot be opened or used; empty = nothing.
        disk_free_bytes: on its disk; None = not known.
    """

    name: str
    can: dict[str, bool] = field(default_factory=dict)
    problem: str = ""
    disk_free_bytes: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; str() is for people, to_json() for bug reports.

    Attributes:
        folders: where each of the checkpoints lies; never in the JSON.
        tests: None = the self-test was not asked for or could not run.
    """

    version: str
    libraries: tuple[VersionCheck, ...]
    machine: Machine
    checkpoints: tuple[Checkpoint, ...]
    tests: tuple[SelfCheck, ...] | None
    test_seconds: float | None
    findings: tuple[Finding, ...]
    folders: tuple[Path, ...] = ()

    @property
    def is_well(self) -> bool:
        return not any(finding.is_wrong for finding in self.findings)

    def __str__(self) -> str:
        machine = self.machine
        lines = [f"BLIP3-o {self.version} on {machine.system}", "", "Versions"]
        width = max(len(check.name) for check in self.libraries)
        for check in self.libraries:
            tested = f"{check.oldest} to {check.newest}"
            lines.append(
                f"  {check.name:<{width}}  {check.installed or '-':<14}  {check.verdict} (tested: {tested})"
            )
        lines += ["", "Device"]
        if machine.pytorch_build:
            lines.append(f"  PyTorch for: {machine.pytorch_build}")
        lines.append(f"  CPU: {_count(machine.cpu_cores, 'core')}, {_memory(machine)}")
        for gpu in machine.gpus:
            capability = f", compute capability {gpu.capability}" if gpu.capability else ""
            used = "" if gpu.is_used else ", not used"
            lines.append(f"  GPU: {gpu.name}{capability}, {_memory(gpu)}{used}")
        if not machine.gpus:
            lines.append("  GPU: none")
        lines += ["", "Checkpoints"]
        width = max((len(each.name) for each in self.checkpoints), default=0)
        for each, folder in zip(self.checkpoints, self.folders, strict=True):
            lines.append(f"  {each.name:<{width}}  {_abilities(each)}")
            lines.append(f"  {'':<{width}}  in {folder}{_disk(each)}")
        if self.tests is not None:
            lines += ["", f"Self-test on the built-in model, {self.test_seconds:.1f} s"]
            width = max(len(test.what) for test in self.tests)
            lines += [f"  {test.what:<{width}}  {_outcome(test)}" for test in self.tests]
        wrong = [finding for finding in self.findings if finding.is_wrong]
        notes = [finding for finding in self.findings if not finding.is_wrong]
        for title, findings in (("Wrong", wrong), ("Worth knowing", notes)):
            if findings:
                lines += ["", title]
                lines += [_bullet(finding) for finding in findings]
        verdict = (
            f"{_count(len(wrong), 'thing')} {'is' if len(wrong) == 1 else 'are'} wrong."
            if wrong
            else "All is well."
        )
        return "\n".join([*lines, "", verdict])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without any path, user name or name of the computer."""
        whole = asdict(self)
        del whole["folders"]
        return anonymous({"is_well": self.is_well, **whole}, self.folders)


def diagnose(folders: Iterable[str | Path] | Mapping[str, Path] = (), *, self_test: bool = True) -> Diagnosis:
    """Look at everything.

    Args:
        folders: checkpoint folders, and folders that hold some at most two levels down; or name -> checkpoint folder. The
            built-in model is always looked at.
        self_test: compute on the built-in model, which takes seconds.
    """
    libraries = check_versions()
    findings = [
        Finding(check.is_wrong, f"{check.name} {check.installed or ''} is {check.verdict}.", check.remedy)
        if check.installed
        else Finding(True, f"{check.name} is not installed.", check.remedy)
        for check in libraries
        if check.remedy
    ]
    machine = look_at_machine(findings)
    named = dict(folders) if isinstance(folders, Mapping) else find_checkpoints(folders)
    if not named:
        findings.append(ONLY_BUILT_IN)
    named = {BUILT_IN_NAME: BUILT_IN_MODEL, **named}
    checkpoints = tuple(look_at_checkpoint(name, folder, findings) for name, folder in named.items())
    tests, seconds = run_tests(findings) if self_test else (None, None)
    return Diagnosis(
        PROJECT_VERSION,
        tuple(libraries),
        machine,
        checkpoints,
        tests,
        seconds,
        tuple(findings),
        tuple(named.values()),
    )


# --- device and memory -----------------------------------------------------------------------------------------------


def look_at_machine(findings: list[Finding]) -> Machine:
    """Cores, memory and GPUs; adds what is wrong with them to `findings`."""
    free: int | None = None
    total: int | None = None
    with suppress(ImportError):  # already among the versions
        import psutil

        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    system = f"{platform.system()} {platform.machine()}"
    build, gpus = _pytorch_and_gpus(findings)
    return Machine(system, os.cpu_count() or 1, free, total, build, tuple(gpus))


def _pytorch_and_gpus(findings: list[Finding]) -> tuple[str, list[Gpu]]:
    """What PyTorch was built for, and the GPUs, whether it can use them or not."""
    try:
        import torch
    except (ImportError, OSError) as error:  # not there, or a library that it loads is missing or broken
        findings.append(
            Finding(
                True,
                f"PyTorch cannot be loaded: {error}.",
                f"Install it again in the build for your device: {NEW_PYTORCH}.",
            )
        )
        return "", nvidia_gpus()
    build = _build(torch)
    if torch.cuda.is_available():
        return build, [_cuda_gpu(torch, index, findings) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return build, [Gpu("Apple GPU", None, None, True)]
    gpus = nvidia_gpus()
    if gpus:
        findings.append(_unused_gpu(gpus[0].name, torch))
    return build, gpus


def _build(torch: Any) -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return "MPS" if torch.backends.mps.is_built() else "CPU only"


def _cuda_gpu(torch: Any, index: int, findings: list[Finding]) -> Gpu:
    """Also of AMD: PyTorch's ROCm build calls them cuda."""
    about = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        capability = f"{about.major}.{about.minor}"
    else:
        capability = getattr(about, "gcnArchName", "").split(":")[0]
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # of the driver: the GPU is lost, or not even the context fits
        said = str(error).splitlines()[0]
        findings.append(
            Finding(
                True,
                f"The GPU {about.name} does not answer: {said}",
                "End other programs that use it, or start the computer again. If that does not help, update its driver.",
            )
        )
        return Gpu(about.name, None, about.total_memory, False, capability)
    return Gpu(about.name, free, total, True, capability)


def _unused_gpu(name: str, torch: Any) -> Finding:
    if torch.version.cuda is None:
        return Finding(
            True,
            f"There is an NVIDIA GPU ({name}), but PyTorch {torch.__version__} is a build without CUDA: everything runs on "
            "the CPU, many times slower.",
            f"Install PyTorch in its CUDA build with the Python that runs this program: {NEW_PYTORCH}.",
        )
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Finding(
            False,
            f"There is an NVIDIA GPU ({name}), but the environment variable CUDA_VISIBLE_DEVICES hides it.",
            "Remove that variable to use the GPU.",
        )
    return Finding(
        True,
        f"There is an NVIDIA GPU ({name}), but PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it.",
        f"Update the NVIDIA driver and start the computer again; or install PyTorch for an older CUDA: {NEW_PYTORCH}.",
    )


def nvidia_gpus() -> list[Gpu]:
    """GPUs that the NVIDIA driver knows, whether PyTorch can use them or not; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer has no GPU to offer
        return []
    gpus = []
    for line in said.splitlines():
        name, *sizes = [part.strip() for part in line.rsplit(",", 2)]
        if len(sizes) == 2 and all(size.isdigit() for size in sizes):
            free, total = (int(size) * 2**20 for size in sizes)
            gpus.append(Gpu(name, free, total, False))
    return gpus


# --- checkpoints -----------------------------------------------------------------------------------------------------


def find_checkpoints(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Name -> checkpoint folder, of folders that are one or hold some at most two levels down.

    A folder that is not there, that cannot be read or that holds none is named too, for look_at_checkpoint to tell.
    """
    found: dict[str, Path] = {}
    for given in map(Path, folders):
        try:
            folder = given.expanduser()
        except RuntimeError:  # "~name", and nobody of that name is known
            folder = given.absolute()
        for each in _checkpoints_inside(folder) or [folder]:
            name = each.name or str(each)
            number = sum(known.split(" (")[0] == name for known in found)
            found[f"{name} ({number + 1})" if number else name] = each
    return found


def _checkpoints_inside(folder: Path) -> list[Path]:
    """Those in a folder that is none itself; none where it cannot be read, which looking at it will tell."""
    try:
        from .checkpoints.layout import is_checkpoint_folder

        if (folder / "config.json").is_file():
            return []
        configs = [config for depth in ("*", "*/*") for config in sorted(folder.glob(f"{depth}/config.json"))]
    except (ImportError, OSError):
        return []
    return [config.parent for config in configs if is_checkpoint_folder(config.parent)]


def comfyui_models() -> list[Path]:
    """models/blip3o of the ComfyUI in whose custom_nodes this project lies, or in whose folder the program was started.

    Left out where no checkpoint lies there. Folders of extra_model_paths.yaml are known to ComfyUI alone.
    """
    project, here = Path(__file__).absolute().parents[1], Path.cwd()
    roots = [project.parents[1]] if project.parent.name == "custom_nodes" else []
    roots += [folder for folder in (here, *here.parents) if (folder / "custom_nodes").is_dir()]
    folders = dict.fromkeys((root / "models" / "blip3o").resolve() for root in roots)
    return [folder for folder in folders if _checkpoints_inside(folder)]


def look_at_checkpoint(name: str, folder: Path, findings: list[Finding]) -> Checkpoint:
    """What a checkpoint can do; adds what is wrong with it to `findings`."""
    free = _free_on_disk(folder)
    try:
        from .checkpoints.info import describe_checkpoint
        from .checkpoints.layout import open_checkpoint
        from .checkpoints.memory_plan import USES

        components = describe_checkpoint(open_checkpoint(folder))["components"]
        problems = {part: each["problem"] for part, each in components.items() if each["problem"]}
        if problem := _tokenizer_problem(folder):
            problems["tokenizer"] = problem
    except (Blip3oError, OSError) as error:
        finding = _finding(True, error, CHECK_FOLDER)
    except _library_errors() as error:
        finding = _stopped(f'Looking at "{name}"', error, CHECK_CONFIGURATION)
    else:
        for part, problem in problems.items():
            _add(findings, _finding(part != OPTIONAL, Blip3oError(problem)))
        can = {use: problems.keys().isdisjoint((*parts, *ALWAYS_NEEDED)) for use, parts in USES.items()}
        needed = [problem.splitlines()[0] for part, problem in problems.items() if part != OPTIONAL]
        return Checkpoint(name, can, needed[0] if needed else "", free)
    _add(findings, finding)
    return Checkpoint(name, {}, finding.what, free)


def _tokenizer_problem(folder: Path) -> str:
    from .language.prompts import TextTokenizer

    try:
        TextTokenizer(folder)
    except Blip3oError as error:
        return str(error)
    return ""


def _library_errors() -> tuple[type[Exception], ...]:
    """LIBRARY_ERRORS, and what configurations of transformers raise for a value of a wrong type."""
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:  # older ones do not check
        return LIBRARY_ERRORS
    return (*LIBRARY_ERRORS, StrictDataclassError)


def _finding(is_wrong: bool, error: Exception, remedy: str = REPORT_BUG) -> Finding:
    """Our errors say what to do on their second line."""
    what, *rest = str(error).splitlines()
    return Finding(is_wrong, what, " ".join(rest) or remedy)


def _add(findings: list[Finding], finding: Finding) -> None:
    """Each cause is told once, however much it stops."""
    if all(each.what != finding.what for each in findings):
        findings.append(finding)


def _stopped(
    work: str,
    error: Exception,
    remedy: str = f"Libraries of the versions that were tested (above) mend this mostly. {REPORT_BUG}",
) -> Finding:
    """A library did something else than the one that was tested, or was given something else."""
    if isinstance(error, ImportError):
        what = f"A library that is needed cannot be loaded: {error}."
        return Finding(True, what, "Install it again, in a version that was tested (above).")
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    said = " ".join(str(error).split())
    return Finding(True, f"{work} stopped with {type(error).__name__} in {where}: {said}", remedy)


def _free_on_disk(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


# --- self-test -------------------------------------------------------------------------------------------------------


def run_tests(findings: list[Finding]) -> tuple[tuple[SelfCheck, ...] | None, float | None]:
    """The self-test and its seconds; (None, None) when it cannot run, which `findings` then tells."""
    try:
        from .self_test import run_self_test

        checks, seconds = run_self_test()
    except (Blip3oError, OSError) as error:
        findings.append(_finding(True, error, "Install the project again."))
        return None, None
    except LIBRARY_ERRORS as error:
        _add(findings, _stopped("The self-test", error))
        return None, None
    tests = tuple(checks)
    failed = [test for test in tests if test.problem]
    names = ", ".join(test.what for test in failed)
    if failed and all(test.is_on_gpu for test in failed):
        findings.append(
            Finding(
                True,
                f"The GPU computes something else than the CPU, where all is as recorded: {names}; {failed[0].problem}.",
                "Update the GPU's driver, or install PyTorch in a build for this GPU and its compute capability (above): "
                f"{NEW_PYTORCH}. Until then, everything can be run with --device cpu (in ComfyUI: --cpu).",
            )
        )
    elif failed:
        findings.append(
            Finding(
                True,
                f"This computer computes something else than what was recorded: {names}. Pictures and answers cannot be trusted.",
                "Install the newest tested versions of torch, transformers and diffusers (above); on a GPU, update its driver. "
                f"{REPORT_BUG}",
            )
        )
    return tests, seconds


# --- for people, and for bug reports -----------------------------------------------------------------------------------


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _memory(holder: Machine | Gpu) -> str:
    if holder.total_bytes is None:
        return "memory not known" if isinstance(holder, Machine) else "shares the computer's memory"
    if holder.free_bytes is None:
        return f"{format_bytes(holder.total_bytes)} memory"
    return f"{format_bytes(holder.free_bytes)} of {format_bytes(holder.total_bytes)} memory free"


def _disk(checkpoint: Checkpoint) -> str:
    free = checkpoint.disk_free_bytes
    return "" if free is None else f", {format_bytes(free)} free on its disk"


def _abilities(checkpoint: Checkpoint) -> str:
    if not checkpoint.can:
        return "not usable"
    able = [use for use, can in checkpoint.can.items() if can]
    unable = [use for use, can in checkpoint.can.items() if not can]
    words = f"can {', '.join(able)}" if able else "can do nothing yet"
    return f"{words}; cannot {', '.join(unable)}" if unable and able else words


def _outcome(test: SelfCheck) -> str:
    if test.problem:
        return f"WRONG: {test.problem}"
    if test.difference is None:
        return "as recorded"
    return f"fine ({test.difference:.1g} of {test.tolerance:g} allowed)"


def _bullet(finding: Finding) -> str:
    first, *rest = str(finding).splitlines()
    return "\n".join([f"- {first}", *(f"  {line}" for line in rest)])


def anonymous(value: Any, folders: Iterable[Path] = ()) -> Any:
    """The same JSON-ready value, every text without paths, user name and name of the computer.

    Args:
        folders: known folders, whose names may hold spaces.
    """
    known = {
        str(place)
        for folder in folders
        for place in (folder.parent, folder.absolute().parent, folder.resolve().parent)
    }
    known |= {str(Path.cwd()), str(Path(__file__).resolve().parents[2]), os.path.expanduser("~")}
    places = sorted((each for each in known if len(Path(each).parts) > 1), key=len, reverse=True)
    return _anonymous(value, places, _own_names())


def _own_names() -> dict[str, str]:
    """Word -> what stands for it."""
    names = {platform.node(): "COMPUTER", platform.node().split(".")[0]: "COMPUTER"}
    names[Path(os.path.expanduser("~")).name] = "USER"
    try:
        names[getpass.getuser()] = "USER"
    except (OSError, KeyError, ImportError):  # no name is known, so none can be told
        pass
    return {name: stand_in for name, stand_in in names.items() if len(name) > 1}


def _anonymous(value: Any, places: list[str], names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _anonymous(each, places, names) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_anonymous(each, places, names) for each in value]
    if not isinstance(value, str):
        return value
    for place in places:
        value = value.replace(place, "...")
    # Any other absolute path keeps its last part: of libraries, links and system folders. Addresses of pages stay.
    value = re.sub(r'(["\'])(?:/|[A-Za-z]:[\\/]|\\\\)[^"\']*[\\/]([^"\']*)\1', r"\1.../\2\1", value)
    value = re.sub(r'(?<![\w:/.])(?:/|[A-Za-z]:[\\/]|\\\\)[^\s"\'<>|]*[\\/]', ".../", value)
    for name, stand_in in names.items():
        value = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", stand_in, value)
    return value


# --- one line when a program starts ----------------------------------------------------------------------------------


def start_up_report(checkpoints: Mapping[str, Path], device: str = "") -> tuple[str, list[str]]:
    """(a line about everything, what is wrong with its remedy); from headers and JSON alone, in milliseconds.

    Whether tensors fit is not looked at, and nothing is computed: that is what `diagnose` is for. PyTorch is imported.

    Args:
        checkpoints: name -> folder, the built-in model left out.
        device: what computes and its memory, in words.
    """
    warnings = [
        f"{check.name} {check.installed or ''} is {check.verdict}. {check.remedy}"
        for check in check_versions()
        if check.is_wrong
    ]
    head = f"BLIP3-o {PROJECT_VERSION}: {'not ready' if warnings else 'ready'}."
    tail = f" Device: {device}." if device else ""
    if not checkpoints:
        return f"{head} Checkpoints: the built-in tiny model.{tail}", warnings
    states = []
    with _no_collection():
        for name, folder in checkpoints.items():
            state, finding = _quick_state(folder)
            states.append(f"{name} ({state})")
            if finding is not None:
                warnings.append(str(finding))
    return f"{head} Checkpoints: {', '.join(states)}.{tail}", warnings


@contextmanager
def _no_collection() -> Iterator[None]:
    """The thousands of entries of a header would make Python look through all that PyTorch has loaded: twice as long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _quick_state(folder: Path) -> tuple[str, Finding | None]:
    """In a few words, and what is wrong."""
    from .checkpoints.layout import DECODER_NETWORKS, open_checkpoint

    state = "not usable"
    try:
        files = _open_quickly(folder)
        missing = _missing_shards(files)
        if missing:
            state = f"{missing} of {len(set(files.promised.values()))} weight files missing"
        if missing or not all(map(files.has_component, NEEDED)):
            thorough = open_checkpoint(folder)
            for component in NEEDED:
                thorough.component_tensors(component)
        state = "no tokenizer"
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            return state, _finding(True, Blip3oError(_tokenizer_problem(folder)))
        state = "no decoder: answers only"
        for network in DECODER_NETWORKS:
            files.decoder_config(network)
            files.decoder_tensors(network)
    except (Blip3oError, OSError) as error:
        return state, _finding(True, error, CHECK_FOLDER)
    except LIBRARY_ERRORS as error:  # a damaged file must not keep the nodes from loading
        return state, _stopped(f'Looking at "{folder.name}"', error, CHECK_CONFIGURATION)
    return "complete", None


def _open_quickly(folder: Path) -> CheckpointFiles:
    """As open_checkpoint, without asking of thousands of tensors to which network each belongs where an index lists them."""
    from .checkpoints.layout import INDEX_NAME, CheckpointFiles, open_checkpoint, read_weight_map
    from .checkpoints.safetensor_files import read_header
    from .untrusted import read_json

    if not (folder / INDEX_NAME).is_file():
        return open_checkpoint(folder)
    promised = read_weight_map(folder / INDEX_NAME)
    shards = (folder / name for name in sorted(set(promised.values())))
    tensors = {key: info for path in shards if path.is_file() for key, info in read_header(path)[0].items()}
    return CheckpointFiles(folder, read_json(folder / "config.json"), tensors, promised)


def _missing_shards(files: CheckpointFiles) -> int:
    """Of those that drawing and answering need: a download for them leaves out a shard that holds EVA-CLIP alone."""
    from .checkpoints.keys import to_component_key

    keys: dict[str, list[str]] = {}
    for key, shard in files.promised.items():
        keys.setdefault(shard, []).append(key)

    def is_needed(shard: str) -> bool:
        places = map(to_component_key, keys[shard])
        return any(place is not None and place.component in NEEDED for place in places)

    return sum(not (files.folder / shard).is_file() and is_needed(shard) for shard in keys)
