"""Memory of the encoder of images that llama-server loads beside a model (mmproj).

Laid beside llama.cpp 0.7.0 (build 11669) for ten projectors: tests/data/mmproj_truth.json. Weights are exact; the
compute buffer is an upper bound of what is reserved for an image of the same size, 1.1 to 1.5 times as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labdeploy.runners.llama_context import F16, F32, MIB

if TYPE_CHECKING:
    from labdeploy.models.projector import Projector
    from labdeploy.runners.llama_placement import LlamaMemorySettings

CHANNELS = 3  # of a picture
WIDTHS, TURNED_WIDTHS = 4, 8.5  # activations of a patch beside the feed-forward network, in widths of the encoder
WITHOUT_FLASH_ATTN = 6  # activations beside the scores, in widths of the encoder


def projector_mib(projector: Projector, settings: LlamaMemorySettings) -> float:
    """Weights, and the compute buffer of the largest image.

    llama-server reserves the buffer for a smaller image where the encoder takes any size, and lets it grow.
    """
    n_patches = projector.n_patches(settings.image_max_tokens)
    return (projector.weights_bytes + compute_bytes(projector, n_patches, flash_attn=settings.flash_attn)) / MIB


def image_mib(projector: Projector, settings: LlamaMemorySettings) -> float:
    """Give what an image takes on the host while a GPU reads it: pixels in f32."""
    return projector.n_patches(settings.image_max_tokens) * projector.patch_size**2 * CHANNELS * F32 / MIB


def compute_bytes(projector: Projector, n_patches: int, *, flash_attn: bool = True) -> int:
    """Return the compute buffer for an image of so many patches, in f32.

    At its fullest it holds, of each patch, the feed-forward network (twice where it has a gate), some activations of
    the encoder's width, the pixels, and what goes to the model: one row for each patch that is not merged, more where
    several layers are tapped (deepstack). Windows are masks of patches x patches, in f32 and as a copy in f16. Without
    flash attention the scores of all heads come on top. Source: clip_graph::build_vit and build_attn (clip.cpp).
    """
    told = projector.n_taps * projector.n_out // projector.n_merge**2
    widths = TURNED_WIDTHS if projector.turns_in_two else WIDTHS
    fed = (2 if projector.is_gated else 1) * projector.n_ff + int(widths * projector.n_embd)
    pixels = projector.patch_size**2 * CHANNELS
    row_bytes = F32 * (fed + pixels + told)
    if not flash_attn:
        scores = projector.n_head * n_patches + WITHOUT_FLASH_ATTN * projector.n_embd + pixels
        row_bytes = max(row_bytes, F32 * scores)
    mask_bytes = n_patches * (F32 + (F16 if flash_attn else 0)) if projector.has_windows else 0
    return n_patches * (row_bytes + mask_bytes)
