"""Facts about devices that other modules decide by."""

from __future__ import annotations

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
