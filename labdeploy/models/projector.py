"""What a planner reads of a projector: an encoder of images or sounds in a file of its own, llama.cpp's mmproj.

Sources are tools/mtmd/clip.cpp and clip-model.h of llama.cpp. What an encoder takes in at most is partly in the file
and partly in that code: `LIMITS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from labdeploy.errors import ModelError
from labdeploy.models.shape import total_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from labdeploy.models.gguf import GgufHeader, Tensor

ARCH = "clip"


@dataclass(frozen=True)
class Limit:
    """What clip.cpp fixes for a kind of projector: patches on a side that become one token, and tokens of an image.

    Where it fixes no tokens, an image has the side that the file says (image_size).
    """

    n_merge: int = 1
    image_max_tokens: int = 0


# load_hparams in clip.cpp; what the file says of merging goes before.
LIMITS: Mapping[str, Limit] = {
    "dots_ocr": Limit(2, 4096),
    "gemma3": Limit(4),
    "gemma4v": Limit(3, 280),
    "glm4v": Limit(2, 4096),
    "kimik25": Limit(2, 4096),
    "kimivl": Limit(2, 1024),
    "lfm2": Limit(2, 256),
    "lightonocr": Limit(1, 4096),
    "paddleocr": Limit(2, 4096),
    "phi4": Limit(1, 4096),
    "pixtral": Limit(1, 1024),
    "qwen2vl_merger": Limit(2, 4096),
    "qwen2.5vl_merger": Limit(2, 4096),
    "qwen3vl_merger": Limit(2, 4096),
    "youtuvl": Limit(2, 4096),
}
WINDOWED = frozenset(("qwen2.5vl_merger", "youtuvl"))
TURNED_IN_TWO = frozenset(("kimik25", "kimivl", "lightonocr", "llama4", "pixtral"))  # build_rope_2d in clip.cpp
# The model sees all of an image at once: attention among its tokens is not causal (mtmd_decode_use_non_causal).
WHOLE = frozenset(("gemma3", "gemma4v"))
MEASURED = frozenset(
    ("gemma3", "idefics3", "internvl", "mlp", "pixtral", "qwen2.5vl_merger", "qwen2vl_merger", "qwen3vl_merger")
)
MERGE_KEYS = ("clip.vision.projector.scale_factor", "clip.vision.spatial_merge_size")
MAX_PIXELS_KEY = "clip.vision.image_max_pixels"


@dataclass(frozen=True, eq=False)
class Projector:
    """An encoder beside a model. One equals itself alone, so that results can be kept by it."""

    kind: str
    """Its projector type, as llama.cpp names it."""
    name: str
    size_bytes: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    patch_size: int
    image_size: int
    """Side of the image in pixels that the file says; 0 of an encoder of sounds."""
    n_merge: int
    image_max_pixels: int
    """Pixels of the largest image that the encoder takes at once."""
    tensors: tuple[Tensor, ...]

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all its weights: they lie on one device."""
        return total_bytes(self.tensors)

    def n_patches(self, image_max_tokens: int | None = None) -> int:
        """Give the patches of the largest image, or of one of so many tokens."""
        side = self.patch_size * self.n_merge
        pixels = image_max_tokens * side * side if image_max_tokens and self.is_dynamic else self.image_max_pixels
        return -(-pixels // (self.patch_size * self.patch_size))

    @cached_property
    def n_out(self) -> int:
        """Width of the rows that go to the model: the largest side of what follows the encoder's layers."""
        after = [tensor.shape for tensor in self.tensors if tensor.name.startswith("mm.")]
        return max((min(shape[:2]) if len(shape) > 1 else shape[0] for shape in after), default=self.n_embd)

    @cached_property
    def n_taps(self) -> int:
        """How many layers give rows to the model: the last one, and those of a deepstack."""
        return 1 + sum(t.name.startswith("v.deepstack.") and t.name.endswith("fc2.weight") for t in self.tensors)

    @cached_property
    def is_gated(self) -> bool:
        """Whether its feed-forward networks have a gate."""
        return any(tensor.name.endswith("blk.0.ffn_gate.weight") for tensor in self.tensors)

    @property
    def has_windows(self) -> bool:
        """Whether patches of most layers see those of their window alone, which takes a mask."""
        return self.kind in WINDOWED

    @property
    def whole_image_tokens(self) -> int:
        """Tokens of an image that the model must get in one micro-batch; 0 where it may get them in several."""
        side = self.patch_size * self.n_merge
        return self.image_max_pixels // (side * side) if self.kind in WHOLE else 0

    @property
    def turns_in_two(self) -> bool:
        """Whether queries and keys are turned by row and by column apart, which copies them."""
        return self.kind in TURNED_IN_TWO

    @property
    def is_known(self) -> bool:
        """Whether what it takes was laid beside what llama.cpp says."""
        return self.kind in MEASURED

    @property
    def is_dynamic(self) -> bool:
        """Whether it takes images of any size, up to a limit, and not tiles of one size."""
        return LIMITS.get(self.kind, Limit()).image_max_tokens > 0


def is_projector(header: GgufHeader) -> bool:
    """Say whether a file holds a projector and no model."""
    return header.arch == ARCH


def projector(header: GgufHeader, where: str = "model") -> Projector:
    """Describe the projector of a header; `where` names it in errors. One with a part for sounds counts its images."""
    part = "vision" if f"{ARCH}.vision.block_count" in header.metadata else "audio"
    keys = _Keys(header, where, f"{ARCH}.{part}.")
    kind = str(header.metadata.get(f"{ARCH}.projector_type") or header.metadata.get(f"{keys.front}projector_type", ""))
    image_size = keys.optional("image_size", 0)
    limit = LIMITS.get(kind, Limit())
    n_merge = next((n for key in MERGE_KEYS if isinstance(n := header.metadata.get(key), int) and n > 0), limit.n_merge)
    patch_size = keys.optional("patch_size", 1)
    side = patch_size * n_merge
    limited = limit.image_max_tokens * side * side
    told = header.metadata.get(MAX_PIXELS_KEY, 0)
    return Projector(
        kind=kind,
        name=str(header.metadata.get("general.name", "")),
        size_bytes=header.size_bytes,
        n_layer=keys.count("block_count"),
        n_embd=keys.count("embedding_length"),
        n_ff=keys.count("feed_forward_length"),
        n_head=keys.count("attention.head_count"),
        patch_size=patch_size,
        image_size=image_size,
        n_merge=n_merge,
        image_max_pixels=int(told) if isinstance(told, int) and told else limited or image_size * image_size,
        tensors=header.tensors,
    )


@dataclass(frozen=True)
class _Keys:
    header: GgufHeader
    where: str
    front: str

    def count(self, key: str) -> int:
        value = self.header.metadata.get(self.front + key)
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise ModelError(f"{self.front}{key} must be a number from 1 on, not {value!r}", where=self.where)
        return value

    def optional(self, key: str, default: int) -> int:
        return self.count(key) if self.front + key in self.header.metadata else default
