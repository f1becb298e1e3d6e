"""Facts about devices that other modules decide by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from picotrain import hardware, parallel
from picotrain import planning as plan
from picotrain import run as runs
from picotrain.config import compose
from picotrain.errors import ConfigError

# Names as drivers report them; peak in TFLOPs of dense bf16 (None: not known, or a part of a card), compute capability.
GPUS = {
    "NVIDIA H100 80GB HBM3": (989.4, 9.0),
    "NVIDIA H100 PCIe": (756, 9.0),
    "NVIDIA H100 NVL": (835.5, 9.0),
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (None, 9.0),
    "NVIDIA H200": (989.4, 9.0),
    "NVIDIA H200 NVL": (835.5, 9.0),
    "NVIDIA H800": (989.4, 9.0),
    "NVIDIA H20": (148, 9.0),
    "NVIDIA H20Z": (None, None),
    "NVIDIA GH200 480GB": (989.4, 9.0),
    "NVIDIA GH200 144G HBM3e": (989.4, 9.0),
    "NVIDIA B200": (2250, 10.0),
    "NVIDIA GB200": (2500, 10.0),
    "NVIDIA B300": (None, 10.3),
    "NVIDIA A100-SXM4-80GB": (312, 8.0),
    "NVIDIA A100-PCIE-40GB": (312, 8.0),
    "NVIDIA A100 80GB PCIe": (312, 8.0),
    "A100-SXM4-40GB": (312, 8.0),
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": (None, 8.0),
    "GRID A100-10C": (None, 8.0),
    "GRID A100D-10C": (None, None),
    "NVIDIA A100X": (None, 8.0),
    "NVIDIA A800-SXM4-80GB": (312, 8.0),
    "NVIDIA RTX A1000 Laptop GPU": (None, 8.6),
    "NVIDIA RTX A1000": (None, 8.6),
    "NVIDIA RTX A4000": (None, 8.6),
    "NVIDIA RTX A6000": (154.8, 8.6),
    "NVIDIA A10": (125, 8.6),
    "NVIDIA A10G": (None, 8.6),
    "NVIDIA A16": (None, 8.6),
    "NVIDIA A30": (165, 8.0),
    "NVIDIA A40": (149.7, 8.6),
    "NVIDIA A40-48Q": (None, 8.6),
    "NVIDIA L4": (121, 8.9),
    "NVIDIA L40": (181.05, 8.9),
    "NVIDIA L40S": (362.05, 8.9),
    "NVIDIA L40G": (None, 8.9),
    "NVIDIA GeForce RTX 5090": (209.5, 12.0),
    "NVIDIA GeForce RTX 5090 D": (None, 12.0),
    "NVIDIA GeForce RTX 4090": (165.2, 8.9),
    "NVIDIA GeForce RTX 4090 D": (None, 8.9),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (None, 8.9),
    "NVIDIA GeForce RTX 3090": (71, 8.6),
    "NVIDIA GeForce RTX 3090 Ti": (None, 8.6),
    "NVIDIA RTX 6000 Ada Generation": (None, 8.9),
    "Quadro RTX 6000": (None, 7.5),
    "Tesla V100-SXM2-32GB": (None, 7.0),
    "Tesla T4": (None, 7.5),
    "h100": (989.4, 9.0),
    "RTX 4090": (165.2, 8.9),
    "Some CPU @ 3.00GHz": (None, None),
    "AMD EPYC 4090": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize("name", GPUS)
def test_a_device_has_the_peak_of_its_own_name_and_of_no_likeness(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "detect", hardware.cpu)
    tflops, capability = GPUS[name]
    assert hardware.peak_flops(name) == (tflops and tflops * 1e12)
    assert hardware.compute_capability(name) == capability


def test_peaks_are_what_the_chip_can_do_in_a_second():
    """SMs, dense bf16 FLOPs per SM and clock with fp32 accumulation, boost clock in GHz."""
    chips = {
        "A100": (108, 2048, 1.41), "A30": (56, 2048, 1.44), "A40": (84, 1024, 1.74), "RTX A6000": (84, 1024, 1.80),
        "A10": (72, 1024, 1.695), "RTX 3090": (82, 512, 1.695), "RTX 4090": (128, 512, 2.52), "RTX 5090": (170, 512, 2.407),
        "L40S": (142, 1024, 2.52), "L4": (58, 1024, 2.04), "H100": (132, 4096, 1.83), "H100 PCIe": (114, 4096, 1.62),
    }  # fmt: skip
    for name, (sms, flops, ghz) in chips.items():
        assert hardware.peak_flops(name) == pytest.approx(sms * flops * ghz * 1e9, rel=0.015), name


@pytest.mark.parametrize("more", ["Laptop GPU", "Ti", "D", "SUPER", "Max-Q", "MIG 1g.10gb", "-8Q"])
def test_a_relative_of_a_known_device_has_no_peak(more: str):
    assert [model for model, _, _ in hardware.PEAK_FLOPS if hardware.peak_flops(f"NVIDIA {model} {more}")] == []


def test_the_devices_of_our_presets_have_a_peak_and_a_capability():
    folder = Path(__file__).parents[1] / "conf/hardware"
    names = {name for file in folder.glob("*.yaml") if (name := yaml.safe_load(file.read_text()).get("name"))}
    assert len(names) >= 4
    assert all(hardware.peak_flops(name) and hardware.compute_capability(name) for name in names)


def test_this_machine_has_a_name_cores_and_memory():
    machine = hardware.cpu()
    assert machine.device == "cpu" and machine.name
    assert machine.cores >= 1
    assert machine.memory_bytes > 2**28


def test_a_gpu_is_read_from_the_drivers_own_listing(monkeypatch):
    listing = "NVIDIA H100 80GB HBM3, 81559, 9.0\nNVIDIA H100 80GB HBM3, 81559, 9.0\n"
    monkeypatch.setattr(hardware, "_run", lambda command: listing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = hardware._cuda()
    assert machine is not None
    assert (machine.count, machine.memory_bytes, machine.fast_bf16) == (2, 81559 * 2**20, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware._cuda().count == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware._cuda() is None


def test_a_gpu_without_fast_bf16_is_told_apart(monkeypatch):
    monkeypatch.setattr(hardware, "_run", lambda command: "Tesla V100-SXM2-32GB, 32768, 7.0\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware._cuda().fast_bf16 is False


def test_threads_wait_briefly_where_nobody_asked_for_anything_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for theirs, found in ({}, "GOMP_SPINCOUNT=500"), ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"), (
        {"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT=7",
    ):  # fmt: skip
        with mock.patch.dict(os.environ), mock.patch.dict(sys.modules):
            for name in hardware.WAITING_VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(theirs)
            sys.modules["torch"] = sys
            hardware.wait_briefly()
            assert {name: os.environ.get(name) for name in hardware.WAITING_VARIABLES if name in os.environ} == theirs
            del sys.modules["torch"]
            hardware.wait_briefly()
            assert hardware.waiting() == found


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch's Linux builds have")
def test_the_library_of_a_process_that_computes_reads_how_long_its_threads_are_to_spin():
    environment = {name: value for name, value in os.environ.items() if name not in hardware.WAITING_VARIABLES}
    command = [sys.executable, "-m", "picotrain.bench", "matmul", "--size", "8", "--repeats", "1", "--precision", "fp32"]
    told = subprocess.run(command, env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{hardware.SPINS}'" in told.stderr


def test_a_load_counts_where_it_leaves_too_few_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for load, threads, busy in ((0.3, 0, False), (3.0, 0, True), (3.0, 2, False), (7.5, 2, True), (7.5, 8, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert bool(hardware.others_compute(threads)) == busy, (load, threads)
    monkeypatch.delattr(os, "getloadavg")
    assert hardware.load() is None and hardware.others_compute() == ""


# -- the driver, and the torch that fits it


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: str = "12.8", gpu: str = "NVIDIA H100 80GB HBM3, 81559, 9.0") -> None:
    """A driver with one GPU, as far as its tool tells."""
    head = f"| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: {cuda} |"
    (folder / "nvidia-smi").write_text(f'#!/bin/sh\ncase "$*" in *query-gpu*) echo "{gpu}";; *) echo "{head}";; esac\n')
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "detect", lambda: hardware._cuda() or hardware.cpu())


@pytest.mark.parametrize(
    ("cuda", "capability", "builds"),
    [
        ("13.1", 9.0, ["cu130", "cu128", "cu126"]),
        ("12.9", 9.0, ["cu128", "cu126"]),
        ("12.2", 8.0, ["cu126"]),
        ("13.0", 7.0, ["cu126"]),  # a V100: newer builds have no code for it
        ("11.8", 8.0, []),
        ("", 8.0, []),
        ("N/A", 8.0, []),
    ],
)
def test_the_driver_decides_which_builds_of_torch_can_be_used(cuda, capability, builds):
    assert hardware.torch_builds(cuda, capability) == builds


@pytest.mark.parametrize(("cuda", "index"), [("12.2", "cu126"), ("12.8", "cu128"), ("13.0", "cu130")])
def test_a_torch_that_cannot_use_the_gpu_is_refused_before_anything_is_prepared(tmp_path, monkeypatch, tiny, cuda, index):
    (tmp_path / "bin").mkdir()
    nvidia_smi(tmp_path / "bin", monkeypatch, cuda)
    monkeypatch.setattr(hardware, "compiler_for_gpus", lambda: "")
    words = [word for word in tiny(tmp_path / "run") if not word.startswith("hardware")]
    config = plan.resolve(compose([*words, "hardware=1xh100"]), lambda message: None)
    monkeypatch.setattr(runs, "gather", lambda *_: pytest.fail("data were prepared"))
    with pytest.raises(ConfigError) as refused:
        runs.open_run(config, [], lambda message: None)
    message = str(refused.value)
    assert f"torch {torch.__version__}" in message and "570.86.15" in message and f"CUDA up to {cuda}" in message
    assert f"/whl/{index}" in message
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("codes", "capability", "usable"),
    [
        (["sm_80", "sm_90"], 9.0, True),
        (["sm_80"], 8.6, True),  # later ones of a generation run what was made for earlier ones
        (["sm_80", "sm_90"], 10.0, False),
        (["sm_80", "compute_90"], 12.0, True),
        (["sm_75", "sm_80"], 7.0, False),
        ([], 9.0, True),
    ],
)
def test_a_torch_without_code_for_the_gpu_is_found_too(monkeypatch, codes, capability, usable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    monkeypatch.setattr(hardware, "driver", lambda: ("570.86.15", "12.8"))
    message, hint = parallel.unusable_gpus("a GPU", capability)
    assert (message == hint == "") == usable
    assert usable or "has no code for a GPU" in message


def test_without_a_c_compiler_or_pythons_header_a_gpu_s_code_is_not_compiled_and_that_is_said(tmp_path, monkeypatch, tiny):
    (tmp_path / "bin").mkdir()
    nvidia_smi(tmp_path / "bin", monkeypatch)
    words = tiny(tmp_path / "run", "hardware=auto")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None if name in ("gcc", "clang", "cc", os.environ.get("CC")) else name)
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "a C compiler and Python.h" in hardware.compiler_for_gpus()
    said: list[str] = []
    assert plan.resolve(compose(words), said.append).hardware.compile is False
    assert any("a C compiler and Python.h" in line and "apt install gcc" in line for line in said)
    monkeypatch.setattr(parallel, "unusable_gpus", lambda *_: ("", ""))
    asked_for = plan.resolve(compose([*words, "hardware.compile=true"]), lambda message: None)
    with pytest.raises(ConfigError, match=r"hardware.compile: torch.compile needs a C compiler and Python.h .*apt install"):
        runs.check_machine(asked_for)
    (tmp_path / "Python.h").touch()
    monkeypatch.undo()
    nvidia_smi(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(hardware, "compiler_for_gpus", lambda: "")
    assert plan.resolve(compose(words), said.append).hardware.compile is True
