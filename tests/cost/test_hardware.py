"""Slices by name, and how fast their corners are."""

import importlib.util
import types

import jax
import pytest

from mmjax.cost import hardware

HERE = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize(("chip", "sizes", "links"), [
    ("v5e", (1, 1), 0), ("v5e", (2, 2), 2), ("v5e", (4, 4), 2), ("v5e", (8, 16), 3), ("v5e", (16, 16), 4),
    ("v5p", (2, 2, 1), 2), ("v5p", (2, 2, 2), 3), ("v5p", (4, 4, 4), 6), ("v5p", (4, 4, 2), 3)])
def test_links_of_a_corner(chip, sizes, links):
    chip = hardware.CHIPS[chip]
    assert hardware.links(chip, sizes) == links * chip.link


@pytest.mark.parametrize(("name", "ports", "both_ways"), [
    ("v4", 6, 600e9), ("v5e", 4, 400e9), ("v5p", 6, 1200e9), ("v6e", 4, 800e9)])
def test_links_are_what_is_published(name, ports, both_ways):
    """Google gives a chip's bandwidth over all its ports, in both directions together."""
    assert hardware.CHIPS[name].link * ports * 2 == both_ways


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:2x2x2", "v9:2x2", "4x4", "", "v5p:2x2"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match=f"topology = '{name}': a chip and its grid, such as v4:2x2x2, v5e:2x2"):
        hardware.find(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'mmjax\[tpu\]'"):
        hardware.find("v5e:4x4")


def test_the_devices_of_this_machine():
    here = hardware.find("local")
    assert here.devices == tuple(jax.devices()) and here.name == "local"
    if here.devices[0].platform == "cpu":
        assert here.chip is None and here.links is None and here.memory > 2**28


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="libtpu is not installed (extra `tpu`)")
@pytest.mark.parametrize(("name", "count"), [
    ("v5e:1x1", 1), ("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:2x2x2", 8), ("v4:2x2x2", 8), ("v6e:2x2", 4)])
def test_slices(name, count):
    found = hardware.find(name)
    assert len(found.devices) == count
    assert {device.device_kind for device in found.devices} <= set(found.chip.kinds)


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="libtpu is not installed (extra `tpu`)")
def test_a_slice_that_does_not_exist():
    with pytest.raises(ValueError, match="v5e:3x3.*libtpu knows no such slice"):
        hardware.find("v5e:3x3")


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40", None),
    ("cpu", None)])
def test_peak_by_kind_of_device(kind, peak):
    assert hardware.peak(types.SimpleNamespace(device_kind=kind)) == peak
