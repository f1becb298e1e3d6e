"""What is this machine: devices, memory, peak FLOPs, and whether bf16 is fast on it. No torch, nothing timed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Peak dense bf16 FLOPs per second with fp32 accumulation, without sparsity, from the vendors' data sheets. An entry counts for names
# of exactly these words, in any order, and words of ANY_MODEL: another word means another card, or a part of one. Where a sheet gives the
# figure "with sparsity" alone, this is half of it: 1,671e12 of H100 NVL and H200 NVL, 838e12 of the 5090 (of which fp32 accumulation, on a
# GeForce, is half again). Held against SMs x FLOPs per clock x boost clock where all three are public: A30 56 x 2048 x 1.44 GHz,
# A6000 84 x 1024 x 1.80, 5090 170 x 512 x 2.407, 4090 128 x 512 x 2.52, 3090 82 x 512 x 1.695, L40S 142 x 1024 x 2.52 (1 % above).
PEAK_FLOPS: tuple[tuple[str, float, str], ...] = (
    ("gb200", 2500e12, "NVIDIA GB200 NVL72 data sheet, of one of its GPUs"),
    ("b200", 2250e12, "NVIDIA Blackwell architecture brief"),
    ("gh200", 989.4e12, "NVIDIA GH200 data sheet: an H100 SXM's"),
    ("h200", 989.4e12, "NVIDIA H200 data sheet (SXM)"),
    ("h200 nvl", 835.5e12, "NVIDIA H200 data sheet (NVL): half of 1,671"),
    ("h100", 989.4e12, "NVIDIA H100 data sheet (SXM)"),
    ("h100 pcie", 756e12, "NVIDIA H100 data sheet (PCIe)"),
    ("h100 nvl", 835.5e12, "NVIDIA H100 data sheet (NVL): half of 1,671"),
    ("h800", 989.4e12, "an H100 SXM with slower links"),
    ("h20", 148e12, "no public data sheet; huggingface.co/hardware/h20"),
    ("a100", 312e12, "NVIDIA A100 data sheet, SXM and PCIe"),
    ("a100 pcie", 312e12, "NVIDIA A100 data sheet, SXM and PCIe"),
    ("a800", 312e12, "an A100 with slower links"),
    ("a800 pcie", 312e12, "an A100 with slower links"),
    ("a40", 149.7e12, "NVIDIA A40 data sheet"),
    ("a40 pcie", 149.7e12, "NVIDIA A40 data sheet"),
    ("a30", 165e12, "NVIDIA A30 data sheet"),
    ("a30 pcie", 165e12, "NVIDIA A30 data sheet"),
    ("a10", 125e12, "NVIDIA A10 data sheet"),
    ("a10 pcie", 125e12, "NVIDIA A10 data sheet"),
    ("l40s", 362.05e12, "NVIDIA L40S data sheet: 362.05, 733 with sparsity"),
    ("l40", 181.05e12, "NVIDIA L40 data sheet: 181.05, 362.1 with sparsity"),
    ("l4", 121e12, "NVIDIA L4 data sheet"),
    ("a6000", 154.8e12, "NVIDIA GA102 white paper: the A40's chip and rates at 1.80 instead of 1.74 GHz"),
    ("5090", 209.5e12, "NVIDIA RTX Blackwell architecture, GeForce RTX 5090: a quarter of 838"),
    ("4090", 165.2e12, "NVIDIA Ada GPU architecture, GeForce RTX 4090"),
    ("3090", 71e12, "NVIDIA GA102 white paper, GeForce RTX 3090"),
)

# What a driver adds to a model's name and says nothing of its speed: maker, memory, socket. (Not "PCIe": those are slower, or named above.)
ANY_MODEL = re.compile(r"nvidia|tesla|geforce|rtx|gpu|sxm\d?|\d+gb?|hbm\d?e?")

# Attention kernels by device, best first; the last works everywhere (see `picotrain.model.kernels`).
_ATTENTION = {"cuda": ("fa4", "fa3", "cudnn", "flash", "sdpa"), "cpu": ("blocked", "sdpa")}
_WINDOW_ATTENTION = {"cuda": ("fa4", "fa3", "flash", "flex", "banded"), "cpu": ("blocked", "banded")}
TRIED_ON = {"cuda"}  # where the first that works is taken; elsewhere all do
BLOCKED_TOKENS = 2048  # that a query sees at most: beyond, the probabilities that blocked attention keeps outweigh all else

# CUDA's compute capability (NVIDIA's list of CUDA GPUs), for GPUs that are not here, by a word of their name or words side by side. A
# part of a GPU has the whole one's.
COMPUTE_CAPABILITY: tuple[tuple[float, str], ...] = (
    (12.0, "rtx 5050|rtx 5060|rtx 5070|rtx 5080|rtx 5090|rtx pro"),
    (10.3, "b300|gb300"),
    (10.0, "b100|b200|gb200"),
    (9.0, "h20|h100|h200|h800|gh200"),
    (8.9, "l4|l20|l40|l40s|l40g|rtx 4050|rtx 4060|rtx 4070|rtx 4080|rtx 4090|ada"),
    (8.6, "a2|a10|a10g|a16|a40|rtx 3050|rtx 3060|rtx 3070|rtx 3080|rtx 3090|a2000|a3000|a4000|a5000|a5500|a6000"),
    (8.6, "rtx a500|rtx a1000"),
    (8.0, "a30|a100|a100x|a800"),
    (7.5, "t4|t4g|rtx 2060|rtx 2070|rtx 2080|quadro rtx"),
    (7.0, "v100|titan v"),
    (6.0, "p100"),
)
FP8_CAPABILITY = 8.9  # Ada: the first with fp8 matmuls
FP8_MULTIPLE = 16  # their dimensions are multiples of it (torch._scaled_mm)


@dataclass(frozen=True)
class Machine:
    """The devices of this node. `compute_capability` is CUDA's, e.g. 9.0; 0.0 elsewhere."""

    device: str  # "cuda", "mps" or "cpu"
    name: str
    count: int  # devices a run can use: GPUs, or 1
    memory_bytes: int  # per device; all of the machine's for cpu and mps
    compute_capability: float
    fast_bf16: bool
    cores: int

    @property
    def peak_flops(self) -> float | None:
        return peak_flops(self.name)


def peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOPs per second of a device by its name, None where no data sheet is in the table; of a part (MIG, vGPU), too."""
    words = sorted(word for word in _words(name) if not ANY_MODEL.fullmatch(word))
    return next((flops for model, flops, _ in PEAK_FLOPS if sorted(model.split()) == words), None)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9.]+", name.lower())


def attention_kernels(device: str) -> tuple[str, ...]:
    """Kernels for causal attention over the whole row on a device, best first."""
    return _ATTENTION.get(device, ("sdpa",))


def window_kernels(device: str) -> tuple[str, ...]:
    """Kernels for causal attention in a sliding window on a device, best first."""
    return _WINDOW_ATTENTION.get(device, ("banded",))


def untried_kernel(device: str, kernels: tuple[str, ...], window: int) -> str:
    """The one among a device's kernels that is taken without a trial, for queries that see `window` tokens."""
    if device in TRIED_ON:
        return kernels[-1]
    return next(name for name in kernels if name != "blocked" or window <= BLOCKED_TOKENS)


def compute_capability(name: str) -> float | None:
    """CUDA's compute capability of a GPU by its name: what the driver says of one that is here, else from the table; None: unknown."""
    machine = detect()
    if machine.device == "cuda" and machine.name == name:
        return machine.compute_capability
    words = f" {' '.join(_words(name))} "
    return next((capability for capability, models in COMPUTE_CAPABILITY if any(f" {m} " in words for m in models.split("|"))), None)


@lru_cache(maxsize=1)
def detect() -> Machine:
    """The machine this process runs on: NVIDIA GPUs if the driver lists any, else Apple's GPU, else the CPU."""
    return _cuda() or _mps() or cpu()


@lru_cache(maxsize=1)
def cpu() -> Machine:
    """The CPU, whatever else is there. bf16 counts as fast with AVX512-BF16 or AMX (mkldnn's bf16 matmuls use them)."""
    flags = _cpu_flags()
    fast = bool({"avx512_bf16", "amx_bf16"} & flags)
    return Machine("cpu", _cpu_name(), 1, _memory_bytes(), 0.0, fast, cores())


# Instruction sets that decide how fast a CPU multiplies matrices; flags of /proc/cpuinfo, x86's and ARM's.
_VECTOR_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
)
_CPU_KEYS = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part", "CPU revision")


@lru_cache(maxsize=1)
def cpu_identity() -> str:
    """What tells this kind of CPU from others of the same name ("AMD EPYC" is many, their speed differs by 2): vendor, family, model,
    stepping, vector instructions, threads a core. Where the system tells none of it (macOS), the name, which is exact there."""
    facts = _cpu_facts()
    if not (numbers := [facts[key] for key in _CPU_KEYS if facts.get(key)]):
        return _cpu_name()
    flags = [flag for flag in _VECTOR_FLAGS if flag in _cpu_flags()]
    siblings, own = (int(text) if (text := facts.get(key, "")).isdigit() else 0 for key in ("siblings", "cpu cores"))
    return f"{_cpu_name()} ({' '.join([*numbers, *flags])}, {siblings // own if own else 1} threads a core)"


def cores() -> int:
    """CPU cores this process may use (affinity masks of containers and schedulers included)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# How OpenMP threads wait. libgomp, which torch's Linux builds bring, lets a thread that has nothing to do spin 300,000 times before it
# sleeps: the fastest while every thread has a core, and a tenth of that speed where another process wants one. 500 reaches 0.8 of the
# better of spinning and sleeping under any load (docs/performance.md).
SPINS = 500
WAITING_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the first wins over the second


def wait_briefly() -> None:
    """Let OpenMP threads of this process, and of those it starts, spin only briefly while they wait. A user's own setting wins.

    To be called before torch is imported, since libgomp reads the environment when it is loaded; afterwards it does nothing.
    libomp (macOS) has another variable, was not measured, and is left alone.
    """
    if sys.platform == "linux" and "torch" not in sys.modules and not any(name in os.environ for name in WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def waiting() -> str | None:
    """How OpenMP threads were asked to wait, e.g. GOMP_SPINCOUNT=500; None: as the library does by itself."""
    return next((f"{name}={os.environ[name]}" for name in WAITING_VARIABLES if name in os.environ), None)


def load() -> float | None:
    """Processes that computed or wanted a core, averaged over the last minute, of the whole machine; None: the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def others_compute(threads: int = 0) -> str:
    """The load in words if it leaves fewer cores than `threads` want (0: all), "" if not. Ask before this process computes."""
    found, there = load(), os.cpu_count() or 1
    if found is None or found <= max(0.5, 0.1 * there) + max(0, there - (threads or there)):
        return ""
    return f"load {found:.1f} on {there} cores"


def has_compiler() -> bool:
    """Whether torch.compile can build CPU code here: it calls a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def compiler_for_gpus() -> str:
    """What torch.compile lacks here to build code for a GPU, in words, with what brings it; "" for nothing.

    Triton compiles the calls of its kernels with a C compiler against Python's own header.
    """
    lacks = []
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")):
        lacks.append("a C compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacks.append("Python.h")
    if not lacks:
        return ""
    version = "{}.{}".format(*sys.version_info)
    return f"{' and '.join(lacks)} (Debian, Ubuntu: apt install gcc python{version}-dev; Fedora: dnf install gcc python3-devel)"


# Where PyTorch's builds for a CUDA version are. A driver runs what was built for its own CUDA version or an older one, and for any 12.x
# from its first 12.x on (NVIDIA's minor version compatibility).
TORCH_WHEELS = "https://download.pytorch.org/whl"
_BUILDS = (("cu130", (13, 0)), ("cu128", (12, 8)), ("cu126", (12, 0)))
_BUILDS_FOR_OLD_GPUS = ("cu126",)  # the only ones with code for what is older than Turing (V100, P100)
_TURING = 7.5


def driver() -> tuple[str, str]:
    """The NVIDIA driver's version and the newest CUDA version it runs, as nvidia-smi heads its table; "" where it does not say."""
    text = _run(["nvidia-smi"])
    found = [re.search(rf"(?:{words}) Version:\s*([\d.]+)", text) for words in ("Driver|KMD", "CUDA|CUDA UMD")]
    version, cuda = (match[1] if match else "" for match in found)
    return version, cuda


def torch_builds(cuda: str, capability: float | None = None) -> list[str]:
    """PyTorch's builds, newest first, that a driver of this CUDA version and a GPU of this compute capability can use."""
    if not (match := re.match(r"(\d+)(?:\.(\d+))?", cuda)):
        return []
    version = int(match[1]), int(match[2] or 0)
    old = capability is not None and 0 < capability < _TURING
    return [name for name, least in _BUILDS if least <= version and (name in _BUILDS_FOR_OLD_GPUS or not old)]


def _cuda() -> Machine | None:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    lines = _run(query).strip().splitlines()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(lines) if visible is None else min(len(lines), len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))
    if not count:
        return None
    name, memory_mib, capability = (part.strip() for part in lines[0].split(","))
    return Machine("cuda", name, count, int(memory_mib) * 2**20, float(capability), float(capability) >= 8.0, cores())


def _mps() -> Machine | None:
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    return Machine("mps", _cpu_name(), 1, _memory_bytes(), 0.0, False, cores())


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_flags() -> set[str]:
    facts = _cpu_facts()
    return set((facts.get("flags") or facts.get("Features", "")).split())


def _cpu_name() -> str:
    sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return _cpu_facts().get("model name") or _run(sysctl).strip() or platform.processor() or platform.machine()


def _cpu_facts() -> dict[str, str]:
    """What Linux says of its first core, {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").lstrip().split("\n\n", 1)[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
