"""A generation is named by its content, and its bundle is what tar and sha256sum on any host read."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from typing import TYPE_CHECKING

from labdeploy.generation import Generation

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"systemd/labdeploy-b.service": b"[Service]\n", "systemd/labdeploy-a.service": b"", "plan.json": b"{}\n"}
PUSH = {"push_id": "20260101T000000Z-abcdef", "by": "me@here", "at": "2026-01-01T00:00:00Z", "version": "1"}


def test_the_same_files_have_the_same_hash():
    """Whatever the order they were rendered in, and whoever pushes them when: only so is a push of the same nothing."""
    other = Generation(dict(reversed(FILES.items())))
    assert Generation(FILES).content_hash == other.content_hash
    assert Generation(FILES).content_hash == hashlib.sha256(Generation(FILES).sums).hexdigest()
    assert Generation(FILES).sums.decode().splitlines()[0].endswith("  plan.json")


def test_any_change_changes_the_hash():
    """A byte, a name, one file less."""
    hashes = {
        Generation(files).content_hash
        for files in (
            FILES,
            FILES | {"plan.json": b"{} \n"},
            {**{k: v for k, v in FILES.items() if k != "plan.json"}, "plan2.json": b"{}\n"},
            {k: v for k, v in FILES.items() if k != "plan.json"},
        )
    }
    assert len(hashes) == 4


def test_the_bundle_is_the_same_bytes_every_time():
    """No clock, no user and no order of this machine gets into it."""
    bundle = Generation(FILES).bundle(**PUSH)
    assert Generation(dict(reversed(FILES.items()))).bundle(**PUSH) == bundle
    with tarfile.open(fileobj=io.BytesIO(bundle)) as tar:
        members = tar.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert {member.mode for member in members if member.isfile()} == {0o644}
    assert [member.name for member in members][:2] == ["systemd", "services"]


def test_a_bundle_without_services_still_has_their_folders():
    """A host whose last service is gone gets a generation too: the program lists both folders."""
    with tarfile.open(fileobj=io.BytesIO(Generation({"plan.json": b""}).bundle(**PUSH))) as tar:
        assert [member.name for member in tar.getmembers() if member.isdir()] == ["systemd", "services"]


def test_what_a_host_unpacks_is_what_was_packed(tmp_path: Path):
    """With its own tar and sha256sum, as apply.sh calls them; the manifest says who pushed what."""
    generation = Generation(FILES)
    subprocess.run(["tar", "-xf", "-", "-C", str(tmp_path)], input=generation.bundle(**PUSH), check=True)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)
    assert hashlib.sha256((tmp_path / "SHA256SUMS").read_bytes()).hexdigest() == generation.content_hash
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        "push_id": PUSH["push_id"],
        "by": "me@here",
        "at": PUSH["at"],
        "labdeploy": "1",
        "content": generation.content_hash,
    }
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == FILES


def test_long_names_fit_the_format():
    """A service name has up to 63 characters; ustar holds them."""
    files = {f"systemd/labdeploy-{'x' * 63}.service": b"1", f"services/{'x' * 63}": b"2"}
    with tarfile.open(fileobj=io.BytesIO(Generation(files).bundle(**PUSH))) as tar:
        assert set(files) <= set(tar.getnames())
