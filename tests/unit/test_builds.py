"""Builds: their names and paths, which one a host names, and what speaks against a lock before anything is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tarfile
from typing import TYPE_CHECKING

import pytest

from labdeploy import builds, builds_install, builds_lock, lock
from labdeploy.builds import Facts
from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Lab

VLLM = """
models:
  qwen2.5-7b-awq: {path: Qwen2.5-7B-Instruct-AWQ}
hosts:
  gpu1:
    hardware:
      cpu: {cores: 8}
      ram: 64GiB
      gpus: [{name: RTX 3090, vram: 24GiB, compute_capability: "8.6"}]
%s
    services:
      chat: {runner: vllm, model: qwen2.5-7b-awq, port: 8000}
"""
TWO = ("0.32.0-11111111", "0.33.0-22222222")
GPU = Facts(driver="580.65.06", capabilities=("8.6",), room_mib=99_999, pythons=("3.12",))


def wheel_lock(folder: Path, variant: str = "cu130", version: str = "0.33.0", python: str = "3.12") -> builds.WheelLock:
    """Write a lock of two packages."""
    text = builds.head(version, variant, python, "vllm", torch_index=False)
    path = folder / builds.LOCKS / builds.lock_name(version, variant, python)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}vllm=={version} \\\n    --hash=sha256:00\nzope.interface==7.0\n")
    return builds.read_lock(path)


# --- which build a host's services name ---------------------------------------------------------------------------


def test_a_build_is_named_by_version_and_content(tmp_path: Path):
    """Another lock is another build, in a folder of its own."""
    found = wheel_lock(tmp_path)
    assert found.name == "0.33.0-" + hashlib.sha256(found.content).hexdigest()[:8]
    assert builds.program("vllm", found.name) == f"/opt/labdeploy/runners/vllm/{found.name}/bin/vllm"
    assert (found.shim, found.n_packages) == ("-", 2)


@pytest.mark.parametrize(
    ("written", "used", "expected"),
    [
        ("", None, "/opt/labdeploy/runners/vllm/current/bin/vllm"),
        ("", TWO[0], f"/opt/labdeploy/runners/vllm/{TWO[0]}/bin/vllm"),
        ("    runners: {vllm: 0.33.0}", TWO[0], f"/opt/labdeploy/runners/vllm/{TWO[1]}/bin/vllm"),
        ("    runners: {vllm: 0.40.0-abcdef01}", TWO[0], "/opt/labdeploy/runners/vllm/0.40.0-abcdef01/bin/vllm"),
        ("    runners: {vllm: /usr/bin/vllm}", TWO[0], "/usr/bin/vllm"),
    ],
)
def test_the_inventory_wins_then_the_lock_then_the_default(lab: Lab, written: str, used: str | None, expected: str):
    """A path, a build or a version in the inventory; else what `runner use` chose; else the default place."""
    lab.copy_lock()
    lab.path.write_text(VLLM % written)
    lock.set_builds(lab.folder / "inventory.lock.yaml", "gpu1", "vllm", installed=TWO, use=used)
    plan = lab.run("plan", "--json")
    assert plan.code == 0, plan.err
    assert f'"{expected}"' in plan.out


@pytest.mark.parametrize(
    ("written", "said", "hint"),
    [
        ("0.99.0", "no build 0.99.0 of vllm is known to be on gpu1", "labdeploy runner install gpu1 vllm 0.99.0"),
        ("0.31.0", "0.31.0 may be 0.31.0-33333333 or 0.31.0-44444444", "labdeploy runner use gpu1 vllm NAME"),
        ("../vllm", "is not a path", ""),
        ("/opt/../vllm", "is not a path", ""),
    ],
)
def test_a_version_that_means_no_build_is_refused(lab: Lab, written: str, said: str, hint: str):
    """Nothing is guessed: no build, or two, is an error with what to type."""
    lab.copy_lock()
    lab.path.write_text(VLLM % f"    runners: {{vllm: {written}}}")
    known = (*TWO, "0.31.0-33333333", "0.31.0-44444444")
    lock.set_builds(lab.folder / "inventory.lock.yaml", "gpu1", "vllm", installed=known, use=TWO[0])
    plan = lab.run("plan")
    assert plan.code == 2
    assert said in plan.err
    assert hint in plan.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.33.0-rc2", ""),
        ("b6401", ""),
        ("0.33.0+cu130", ""),
        ("../0.33.0", "is not a version"),
        ("-0.33.0", "is not a version"),
        ("", "is not a version"),
        ("0.33.0-0123abcd", "is the name of a build"),
    ],
)
def test_what_can_be_a_version_of_a_build(text: str, said: str):
    """A release candidate can, with the dash that Ollama writes; a path or a whole build's name cannot."""
    with pytest.raises(InventoryError, match=said) if said else contextlib.nullcontext():
        builds.require_version(text)


def test_a_release_candidate_is_not_the_release(tmp_path: Path):
    """Neither its build nor its lock is taken for the one without the dash."""
    candidate = builds.name_of("0.33.0-rc2", "0" * 64)
    installed = (candidate, "0.33.0-11111111")
    assert builds.one_build("a", "ollama", "0.33.0-rc2", installed) == candidate
    assert builds.one_build("a", "ollama", "0.33.0", installed) == installed[1]
    release = wheel_lock(tmp_path)
    wheel_lock(tmp_path, version="0.33.0-rc2")
    assert builds.find_lock(tmp_path, "0.33.0", GPU).path == release.path


def test_the_lock_keeps_what_it_knows_of_models_and_other_hosts(tmp_path: Path):
    """A build is noted beside what was there."""
    path = tmp_path / "inventory.lock.yaml"
    lock.add_model(path, "m", {"format": "gguf"})
    lock.set_builds(path, "b", "vllm", installed=TWO, use=TWO[1])
    lock.set_builds(path, "a", "ollama", installed=["0.30.0-55555555"], use=None)
    found = lock.read(path)
    assert found["models"] == {"m": {"format": "gguf"}}
    assert builds.known(found, "b", "vllm") == (TWO, TWO[1])
    assert builds.known(found, "a", "ollama") == (("0.30.0-55555555",), None)
    assert builds.known(found, "c", "vllm") == ((), None)


# --- what a lock asks of a host -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "facts", "said", "hint"),
    [
        (
            "cu130",
            dataclasses.replace(GPU, driver="535.183.01"),
            "driver 535.183.01 is too old: cu130 needs 580",
            "cu129",
        ),
        ("cu129", dataclasses.replace(GPU, driver="470.1"), "cu129 needs 525.60.13", "install a newer driver"),
        ("cu130", dataclasses.replace(GPU, driver=None), "no NVIDIA driver is loaded", "--variant cpu"),
        ("cu130", dataclasses.replace(GPU, capabilities=("8.6", "6.1")), "capability 6.1", "llama-server"),
        (
            "cu130",
            dataclasses.replace(GPU, room_mib=8000),
            "needs 20480 MiB below /opt, 8000 MiB are free",
            "make room",
        ),
        ("cpu", Facts(arch="riscv64"), "no wheels of vLLM for riscv64", "llama-server"),
    ],
)
def test_what_would_not_run_is_said_before_a_byte_is_sent(
    tmp_path: Path, variant: str, facts: Facts, said: str, hint: str
):
    """Driver, compute capability, room and processor are compared with the lock's variant."""
    [(what, change)] = builds.refusals(wheel_lock(tmp_path, variant), facts)
    assert said in what
    assert hint in change


def test_nothing_speaks_against_a_host_that_suits(tmp_path: Path):
    """A GPU of 2020 with a driver of 2025 takes either CUDA; the check cannot refuse everything."""
    for variant in ("cu129", "cu130", "cpu"):
        assert not list(builds.refusals(wheel_lock(tmp_path, variant), GPU))


def test_the_lock_that_suits_the_host_is_taken(tmp_path: Path):
    """The newest CUDA that the driver carries; on a host without a GPU the one for CPUs."""
    for variant in builds.VARIANTS:
        wheel_lock(tmp_path, variant)
    old = dataclasses.replace(GPU, driver="550.54.15")
    for facts, variant in ((GPU, "cu130"), (old, "cu129"), (Facts(), "cpu")):
        assert builds.find_lock(tmp_path, "0.33.0", facts).variant == variant
    with pytest.raises(InventoryError, match=r"no lock of vLLM 0\.34\.0"):
        builds.find_lock(tmp_path, "0.34.0", GPU)


def test_a_file_that_is_no_lock_is_refused(tmp_path: Path):
    """Its first lines say what it is for; without them nothing can be checked."""
    (tmp_path / "x.txt").write_text("vllm==0.33.0\n")
    with pytest.raises(InventoryError, match="is not a lock that labdeploy wrote"):
        builds.read_lock(tmp_path / "x.txt")
    with pytest.raises(InventoryError, match="cannot be read"):
        builds.read_lock(tmp_path / "none.txt")


def test_wheels_are_found_by_normal_names_and_the_missing_named(tmp_path: Path):
    """`zope.interface` is `zope_interface` in a file name."""
    found = wheel_lock(tmp_path)
    (tmp_path / "zope_interface-7.0-py3-none-any.whl").touch()
    with pytest.raises(InventoryError, match=r"1 of 2 wheels are not in .*: vllm==0\.33\.0"):
        builds.wheels_of(found, tmp_path)
    (tmp_path / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl").touch()
    assert len(builds.wheels_of(found, tmp_path)) == 2


# --- archives -----------------------------------------------------------------------------------------------------


def test_a_folder_is_packed_the_same_each_time(tmp_path: Path):
    """So the same files are the same build, whenever they were written."""
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "llama-server").write_text("#!/bin/sh\n")
    (_, one), (_, two) = (builds_install._packed(tmp_path / name, None) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("name", "sha256", "said"),
    [
        ("llama.zip", "0" * 64, "is not one of .tar.gz, .tgz"),
        ("llama.tar.gz", None, "needs the sha256"),
        ("none.tar.gz", "0" * 64, "does not exist"),
    ],
)
def test_an_archive_that_cannot_be_taken_is_refused_here(tmp_path: Path, name: str, sha256: str | None, said: str):
    """Nothing of it reaches a host."""
    (tmp_path / "llama.zip").touch()
    with tarfile.open(tmp_path / "llama.tar.gz", "w:gz"):
        pass
    with pytest.raises(InventoryError, match=said):
        builds_install._packed(tmp_path / name, sha256)


# --- making a lock ------------------------------------------------------------------------------------------------


def test_uv_makes_a_lock_with_hashes_from_a_folder_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real uv, without the net: each package with its version and sha256, below the lines that say what for."""
    wheel = tmp_path / "vllm-0.33.0-py3-none-any.whl"
    make_wheel(wheel, "vllm", "0.33.0")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    made = builds_lock.make_lock(
        tmp_path, "0.33.0", variant="cpu", python="3.12", package="vllm", find_links=[str(tmp_path)]
    )
    assert made.path == tmp_path / "runners" / "vllm-0.33.0-cpu-py312.lock.txt"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert f"vllm==0.33.0 \\\n    --hash=sha256:{digest}" in made.content.decode()
    with pytest.raises(InventoryError, match=r"uv cannot resolve vllm 0\.34\.0"):
        builds_lock.make_lock(
            tmp_path, "0.34.0", variant="cpu", python="3.12", package="vllm", find_links=[str(tmp_path)]
        )


def make_wheel(path: Path, name: str, version: str) -> None:
    """Write the smallest wheel there is."""
    import zipfile  # noqa: PLC0415

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("entry", [5, {"vllm": 5}, {"vllm": {"use": 5}}, {"vllm": {"installed": "x"}}, {"vllm": None}])
def test_builds_of_the_lock_that_are_none_are_one_error(entry: object):
    """Whoever edits the lock by hand is told where."""
    with pytest.raises(InventoryError, match=r"builds\.h\.vllm: in the lock: expected"):
        builds.known({"builds": {"h": entry}}, "h", "vllm")
