"""Facts about devices that other modules decide by."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest

from picotrain import hardware


def test_peak_flops_come_from_the_device_name_and_special_variants_win():
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert hardware.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert hardware.peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12


def test_an_unknown_device_has_no_peak():
    assert hardware.peak_flops("Some CPU @ 3.00GHz") is None


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
