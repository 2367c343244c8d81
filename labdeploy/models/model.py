"""What plans know of a model before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labdeploy.models.projector import Projector
    from labdeploy.models.safetensors import Snapshot
    from labdeploy.models.shape import ModelShape


@dataclass(frozen=True)
class ModelFacts:
    """A model of the inventory with its shape, and its place on one host."""

    name: str
    path: str
    size_bytes: int
    format: str
    """`gguf`, `safetensors` or `projector`."""
    shape: ModelShape | None = None
    """Of a GGUF file."""
    snapshot: Snapshot | None = None
    """Of a Hugging Face snapshot folder."""
    projector: Projector | None = None
    """Of a GGUF file that holds an encoder of images or sounds."""
