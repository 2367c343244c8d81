"""What a llama-server loads beside the model it serves: an encoder of images or sounds, and a model that drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy.errors import InventoryError
from labdeploy.runners.base import Choice, as_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from labdeploy.models.projector import Projector
    from labdeploy.models.shape import ModelShape
    from labdeploy.runners.base import Request
    from labdeploy.runners.llama_placement import LlamaMemorySettings
    from labdeploy.runners.llama_server import LlamaServerSettings
    from labdeploy.runners.llama_tuning import Layout

MOST_IMAGE_TOKENS = 4096  # of the encoders that take images of any size, the most that one of them allows
VOCABULARIES_DIFFER = 128  # more than that llama.cpp does not take for the same vocabulary (common/speculative.cpp)
DRAFT_TOKENS = 3  # llama-server's own --spec-draft-n-max


@dataclass(frozen=True)
class Models:
    """What one llama-server loads: the model it serves, and what it needs beside that."""

    shape: ModelShape
    projector: Projector | None = None
    draft: ModelShape | None = None


def models_of(request: Request) -> Models:
    """Give the models of a service, each of the kind that its key wants."""
    encoder, drafts = request.beside.get("mmproj"), request.beside.get("spec_draft_model")
    if encoder and not encoder.projector:
        what = f"mmproj: {encoder.name} is no encoder of images or sounds, but a model"
        raise InventoryError(what, hint="name its mmproj file; most are published beside the model")
    if drafts and not drafts.shape:
        raise InventoryError(
            f"spec_draft_model: {drafts.name} is no GGUF model", hint="name a small model of its family"
        )
    return Models(_shape(request), encoder.projector if encoder else None, drafts.shape if drafts else None)


def _shape(request: Request) -> ModelShape:
    if request.model.shape is None:
        raise InventoryError(
            f"llama-server serves GGUF files, and model {request.model.name} is a Hugging Face snapshot folder",
            hint="write runner: vllm, or name a GGUF file of the model",
        )
    return request.model.shape


def choices(asked: LlamaServerSettings, layout: Layout) -> dict[str, Choice]:
    """Give the settings of what is loaded beside the model."""
    settings = layout.settings
    found: dict[str, Choice | None] = {}
    if settings.projector:
        found["mmproj"] = as_asked(asked.mmproj)
        found["mmproj_offload"] = as_asked(asked.mmproj_offload) or (
            Choice(True, "it is many times faster on a GPU") if layout.gpus else Choice(False, "no GPU to put it on")  # noqa: FBT003
        )
        found["image_max_tokens"] = as_asked(asked.image_max_tokens)
    if settings.draft:
        found["spec_draft_model"] = as_asked(asked.spec_draft_model)
        n = settings.draft_gpu_layers if layout.gpus else 0
        why = "all of it: a draft must be fast" if layout.gpus else "no GPU to put layers on"
        found["spec_draft_ngl"] = as_asked(asked.spec_draft_ngl) or Choice(n, why)
        found["spec_draft_n_max"] = as_asked(asked.spec_draft_n_max) or Choice(DRAFT_TOKENS, "llama-server's default")
    return {key: choice for key, choice in found.items() if choice}


def words(request: Request, value: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what is loaded beside the model; where `--device` is none, so is theirs."""
    said: list[str] = []
    if encoder := request.beside.get("mmproj"):
        said += ["--mmproj", encoder.path, "--mmproj-offload" if value["mmproj_offload"] else "--no-mmproj-offload"]
    if "image_max_tokens" in value:
        said += ["--image-max-tokens", str(value["image_max_tokens"])]
    if drafts := request.beside.get("spec_draft_model"):
        said += ["--spec-type", "draft-simple", "--spec-draft-model", drafts.path]
        said += ["--spec-draft-ngl", str(value["spec_draft_ngl"])]
        said += ["--spec-draft-n-max", str(value["spec_draft_n_max"])]
    return tuple(said)


def ways_to_fit(asked: LlamaServerSettings, models: Models, tuned: Callable[..., object | None]) -> Iterator[str]:
    """Give what makes images coarser or slower to read, and drafts slower."""
    takes_any_size = models.projector and models.projector.is_dynamic
    smaller = [n for n in (1024, 256) if n < (asked.image_max_tokens or MOST_IMAGE_TOKENS)] if takes_any_size else []
    if found := next((n for n in smaller if tuned(image_max_tokens=n)), None):
        yield f"image_max_tokens: {found}"
    if models.projector and asked.mmproj_offload is not False and tuned(mmproj_offload=False):
        yield "mmproj_offload: false"
    if models.draft and asked.spec_draft_ngl != 0 and tuned(spec_draft_ngl=0):
        yield "spec_draft_ngl: 0"


def warnings(settings: LlamaMemorySettings, shape: ModelShape) -> Iterator[str]:
    """Say where the models may not fit together, or are planned by the general formula."""
    draft = settings.draft
    if draft and abs(draft.n_vocab - shape.n_vocab) > VOCABULARIES_DIFFER:
        yield f"the drafting model knows {draft.n_vocab} tokens, the model {shape.n_vocab}: they may not fit together"
    if draft and not draft.known_arch:
        yield f"architecture {draft.arch} of the drafting model is planned by the general formula"
    yield from _image_warnings(settings)
    if settings.projector and not settings.projector.is_known:
        yield f"an encoder of kind {settings.projector.kind or 'unknown'} is planned by the general formula"


def _image_warnings(settings: LlamaMemorySettings) -> Iterator[str]:
    """Warn where an image that the model must see at once is larger than a batch: llama-server would end."""
    if settings.projector and (whole := settings.projector.whole_image_tokens):
        n = min(whole, settings.image_max_tokens or whole)
        if n > (batch := min(settings.ubatch_size, settings.batch_size)):
            yield f"this model must get the {n} tokens of an image at once, and batches hold {batch}: it will end"
