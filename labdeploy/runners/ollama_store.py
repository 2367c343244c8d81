"""A store of models as Ollama keeps one on disk, holding one model of the inventory without a second copy of it.

    FOLDER_OF_THE_MODEL/.ollama/SERVICE-HASH/
        blobs/sha256-...      the model (a hard link), its config, parameters and template
        manifests/registry.ollama.ai/library/MODEL/latest

HASH is of all that stands here, so a store never changes: other parameters are another store, which the unit of another
generation names. Going back a generation is going back to its store. ollama.sh makes and removes stores on hosts; only
there the sum of the model file is known, so the manifest holds a placeholder for it.

Names, media types and keys are those of Ollama 0.33 (manifest/manifest.go, types/model/config.go); 0.6 to 0.24 read
the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labdeploy.models.shape import ModelShape

FOLDER = ".ollama"  # beside the model: hard links need the same file system
MODEL_DIGEST = "@model-digest@"  # what ollama.sh replaces
_LIBRARY = "manifests/registry.ollama.ai/library"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.ollama.image."


@dataclass(frozen=True)
class Recipe:
    """What a store is made from: a model file with the parameters it is served with."""

    model: str
    path: str
    shape: ModelShape
    parameters: Mapping[str, Any]
    template: str | None

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the store beside the model itself, by their paths in it."""
        config = _json(_config(self.shape))
        texts = {"params": _json(dict(sorted(self.parameters.items())))} | (
            {"template": self.template.encode()} if self.template else {}
        )
        model = {"mediaType": _LAYER + "model", "digest": MODEL_DIGEST, "size": self.shape.size_bytes}
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _layer(_CONFIG, config),
            "layers": [model, *(_layer(_LAYER + kind, content) for kind, content in texts.items())],
        }
        blobs = {f"blobs/sha256-{_sha256(content)}": content for content in (config, *texts.values())}
        return {**blobs, f"{_LIBRARY}/{self.model}/latest": _json(manifest)}

    @property
    def request(self) -> bytes:
        """What to send to /api/create so that Ollama makes the same model by itself, out of a blob it was given."""
        body: dict[str, Any] = {
            "model": self.model,
            "files": {self.path.rpartition("/")[2]: MODEL_DIGEST},
            "parameters": self.parameters,
            "stream": False,
        }
        return _json(body | ({"template": self.template} if self.template else {}))

    @property
    def content_hash(self) -> str:
        """Names the store: of its files and of the model file's place."""
        content = (part for path, data in sorted(self.files.items()) for part in (path.encode(), data))
        return _sha256(b"\0".join((self.path.encode(), *content)))[:8]


def store_path(model_path: str, service: str, content_hash: str) -> str:
    """Give the place of a service's store on its host."""
    return f"{model_path.rpartition('/')[0]}/{FOLDER}/{service}-{content_hash}"


def _config(shape: ModelShape) -> dict[str, Any]:
    """Describe the model as `ollama create` does; it is shown by `ollama show` and decides nothing for a GGUF."""
    return {
        "model_format": "gguf",
        "model_family": shape.arch,
        "model_families": [shape.arch],
        "model_type": _count(shape.n_params),
        "file_type": shape.file_type,
        "architecture": "amd64",
        "os": "linux",
    }


def _count(n_params: int) -> str:
    """Write a number of parameters as Ollama does (format/format.go): 8B, 8.0B, 751.63M, 12K."""
    for unit, size, decimals in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if n_params >= size:
            return f"{n_params / size:.{decimals if n_params % size else 0}f}{unit}"
    return str(n_params)


def _layer(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{_sha256(content)}", "size": len(content)}


def _json(content: Mapping[str, Any]) -> bytes:
    """Write JSON as Go's encoder does, so that blobs are those that Ollama itself would write."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026").encode() + b"\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
