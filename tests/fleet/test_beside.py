"""A llama-server with an encoder of images and a model that drafts beside its own, on a real host."""

from __future__ import annotations

import base64
import json
import struct
import sys
import urllib.request
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import Lab

from labdeploy import sandbox
from labdeploy.tiny_model import write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1]))
import gguf_maker
import mmproj_maker

if TYPE_CHECKING:
    from conftest import MakeHost

ENCODER = mmproj_maker.Encoder("gemma3", 2, 64, 128, 2, 14, 56, 256, n_merge=4)
MODELS = {"eyes": "eyes.gguf", "draft": "draft.gguf"}


class Seeing(Lab):
    """A lab whose service sees and drafts."""

    def inventory(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Name both models beside the usual one."""
        inventory = super().inventory(settings | {"mmproj": "eyes", "spec_draft_model": "draft"})
        local = {name: {"path": file, "local": str(self.folder / file)} for name, file in MODELS.items()}
        return inventory | {"models": inventory["models"] | local}

    def ask_about_an_image(self) -> dict[str, Any]:
        """Send an image with a question, and give the answer."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}}
        content = [image, {"type": "text", "text": "What is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        url = f"http://{self.host.address}:{self.port}/v1/chat/completions"
        asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
        return found


def png(side: int = 56) -> bytes:
    """Give a picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([row, 100, 200]) * side for row in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def lab(make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> Seeing:
    """Return a lab with one fresh host that has all three files."""
    host = make_host("sid")
    gguf_maker.write(tmp_path / "eyes.gguf", mmproj_maker.metadata(ENCODER), mmproj_maker.tensors(ENCODER))
    write_tiny_model(tmp_path / "draft.gguf")
    for file in MODELS.values():
        sandbox.copy_in(host, tmp_path / file, f"/srv/models/{file}")
    return Seeing(tmp_path, [host], tiny_model)


def test_it_sees_and_drafts(lab: Seeing) -> None:
    """It answers about an image, its log says who drafts, and its own buffers are those of the plan."""
    lab.push_ok()
    assert lab.ask_about_an_image()["choices"]
    said = lab.on_host("journalctl", "--no-pager", "-o", "cat", "-u", "labdeploy-chat.service")
    assert "adding speculative implementation 'draft-simple'" in said
    assert "loaded multimodal model, '/srv/models/eyes.gguf'" in said
    host = lab.run("status", "--json").json["hosts"][lab.host.name]["services"]["chat"]["memory"]["host"]
    assert host["planned"]["draft_mib"] > 1
    assert host["planned"]["mmproj_mib"] > 0
    for part in ("model_mib", "context_mib", "compute_mib"):
        assert host["real"][part] == pytest.approx(host["planned"][part], abs=1), part


def test_a_file_beside_the_model_that_is_not_there_stops_nothing(lab: Seeing) -> None:
    """The push is refused with the path and what to type, and the old service goes on."""
    lab.push_ok()
    lab.on_host("rm", "/srv/models/draft.gguf")
    lab.set(ctx_size=1024)
    ended = lab.push()
    assert ended.code == 2
    assert "model file /srv/models/draft.gguf is not there" in ended.err
    assert f"labdeploy models push {lab.host.name} ./draft.gguf" in ended.err
    assert lab.complete()
    lab.on_host("sh", "-c", "echo short >/srv/models/draft.gguf")
    assert "/srv/models/draft.gguf has 6 bytes, the plan is for" in lab.push().err
