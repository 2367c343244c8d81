"""How builds of llama-server spell what a plan says: one table, read against the flags that a build knows.

The plan is written for 0.7.0. What a probed build does not know is said in its older spelling, or left out where that
changes nothing. Builds are told apart by the flags in their help and not by their numbers: distributions patch them.
Older spellings: common/arg.cpp of May and August 2025 (as llama-cpp-python 0.3.9 and 0.3.16 carry it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labdeploy.facts.build import Build

Flags = Mapping[str, bool]
"""Each spelling that a build knows, and whether a value follows it."""
Words = tuple[str, ...]


@dataclass(frozen=True)
class Older:
    """What to say to a build that lacks a flag, and what is lost by it."""

    words: Words = ()
    lost: str = ""


@dataclass(frozen=True)
class Feature:
    """One flag of the plan: whether it has a value, the change that brought it, and what older builds are told."""

    takes_value: bool
    since: str
    older: Callable[[str, Flags, Words], Older]
    """Given the value that the plan says, what the build knows, and the whole command line."""
    form_changed: bool = False
    """An older build may know it without a value."""
    came_with: str = ""
    """A flag without which it means something else."""


def _no_fit(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # what it does not have it need not be told to leave alone


def _flash_attn(value: str, known: Flags, _argv: Words) -> Older:
    if value == "on" and "--flash-attn" not in known:
        return Older(lost="it has no flash attention, so that compute memory grows with the context")
    return Older(("--flash-attn",) if value == "on" else ())


def _one_pool(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # it has no other way


def _own_pools(_value: str, known: Flags, argv: Words) -> Older:
    one_slot = argv[argv.index("--parallel") + 1] == "1" if "--parallel" in argv else False
    return Older() if one_slot or "--kv-unified" in known else Older(lost="all slots share one KV pool")


def _cache_ram(value: str, _known: Flags, _argv: Words) -> Older:
    return Older(lost="" if value == "0" else "it keeps no prompts in main memory")


def _checkpoints(value: str, known: Flags, _argv: Words) -> Older:
    return Older(("--swa-checkpoints", value)) if "--swa-checkpoints" in known else Older()


_LOAD_MODES: Mapping[str, Words] = {
    "auto": (),
    "mmap": (),
    "none": ("--no-mmap",),
    "mlock": ("--no-mmap", "--mlock"),
    "mmap+mlock": ("--mlock",),
}


def _load_mode(value: str, known: Flags, _argv: Words) -> Older:
    if value == "dio":
        direct = ("--direct-io",) if "--direct-io" in known else ("--no-mmap",)
        return Older(direct, lost="" if "--direct-io" in known else "it cannot read past the page cache")
    return Older(_LOAD_MODES[value])


def _n_cpu_moe(value: str, known: Flags, _argv: Words) -> Older:
    if "--override-tensor" not in known:
        raise InventoryError("it cannot keep experts in main memory", hint="update llama-server, or n_cpu_moe: 0")
    blocks = "|".join(map(str, range(int(value))))
    return Older(("--override-tensor", rf"blk\.({blocks})\.ffn_(up|down|gate)_(ch|)exps=CPU"))


def _device(value: str, _known: Flags, _argv: Words) -> Older:
    if value != "none":
        return Older(lost=f"it cannot be told to use {value} alone")
    return Older(("--gpu-layers", "0"), lost="with no layers on a GPU it still takes some of its memory")


def _drafting(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # a drafting model is enough to be told


def _draft_flag(*older: str) -> Callable[[str, Flags, Words], Older]:
    """Say a flag about the drafting model in the spelling of the builds before it."""

    def said(value: str, known: Flags, _argv: Words) -> Older:
        if flag := next((flag for flag in older if flag in known), None):
            return Older((flag, value))
        raise InventoryError("it cannot let another model draft", hint="update llama-server, or no spec_draft_model")

    return said


def _mmproj(_value: str, _known: Flags, _argv: Words) -> Older:
    raise InventoryError("it cannot read images", hint="update llama-server, or no mmproj")


def _swa_full(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # its cache has no windows


def _most_tokens(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older(lost="an image may become more tokens, and take more memory")


def _mmproj_offload(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # it offloads


def _log_verbosity(_value: str, _known: Flags, _argv: Words) -> Older:
    return Older()  # it says what it allocates as it is, and far too much at 4


FEATURES: Mapping[str, Feature] = {
    "--fit": Feature(takes_value=True, since="PR #16653, December 2025", older=_no_fit),
    "--flash-attn": Feature(takes_value=True, since="b6327, August 2025", older=_flash_attn, form_changed=True),
    "--kv-unified": Feature(takes_value=False, since="PR #14363, July 2025", older=_one_pool),
    "--no-kv-unified": Feature(takes_value=False, since="after PR #14363, July 2025", older=_own_pools),
    "--cache-ram": Feature(takes_value=True, since="PR #16391, October 2025", older=_cache_ram),
    "--ctx-checkpoints": Feature(takes_value=True, since="PR #15293, as --swa-checkpoints", older=_checkpoints),
    "--swa-full": Feature(takes_value=False, since="PR #13194, May 2025", older=_swa_full),
    "--load-mode": Feature(takes_value=True, since="PR #20834, 2026", older=_load_mode),
    "--n-cpu-moe": Feature(takes_value=True, since="PR #15077, August 2025", older=_n_cpu_moe),
    "--log-verbosity": Feature(takes_value=True, since="with --fit", older=_log_verbosity, came_with="--fit"),
    "--spec-type": Feature(takes_value=True, since="2026", older=_drafting),
    "--spec-draft-model": Feature(takes_value=True, since="2026", older=_draft_flag("--model-draft")),
    "--spec-draft-ngl": Feature(takes_value=True, since="2026", older=_draft_flag("--n-gpu-layers-draft", "-ngld")),
    "--spec-draft-n-max": Feature(takes_value=True, since="2026", older=_draft_flag("--draft-max", "--draft")),
    "--mmproj": Feature(takes_value=True, since="PR #12898, May 2025", older=_mmproj),
    "--mmproj-offload": Feature(takes_value=False, since="2026", older=_mmproj_offload),
    "--image-max-tokens": Feature(takes_value=True, since="PR #16921, November 2025", older=_most_tokens),
    "--device": Feature(takes_value=True, since="PR #10497, November 2024", older=_device),
}


def spoken(argv: Words, build: Build | None) -> tuple[Words, tuple[str, ...]]:
    """Say a command line as a build understands it; also what is lost by that, as warnings.

    Where nothing is known of the build, it is taken for one that the plan is written for.
    """
    if build is None or not build.flags:
        return argv, ()
    said, lost = [argv[0]], []
    for flag, value in _pairs(argv[1:]):
        feature = FEATURES.get(flag)
        if feature is None or _knows(build.flags, flag, feature):
            said += [flag] if value is None else [flag, value]
            continue
        older = _older(feature, (flag, value or ""), build, argv)
        said += older.words
        if older.lost:
            lost.append(f"{build.shown} has no {flag} ({feature.since}): {older.lost}")
    return tuple(said), tuple(lost)


def _older(feature: Feature, said: tuple[str, str], build: Build, argv: Words) -> Older:
    flag, value = said
    try:
        return feature.older(value, build.flags, argv)
    except InventoryError as error:
        raise InventoryError(f"{build.shown} has no {flag} ({feature.since}): {error.what}", hint=error.hint) from None


def _pairs(words: Words) -> Iterator[tuple[str, str | None]]:
    """Take a command line apart: flags of the table with their values, all other words one by one."""
    rest = iter(words)
    for word in rest:
        feature = FEATURES.get(word)
        yield word, next(rest, "") if feature and feature.takes_value else None


def _knows(known: Flags, flag: str, feature: Feature) -> bool:
    needed = {flag, feature.came_with or flag}
    return needed <= set(known) and (known[flag] == feature.takes_value or not feature.form_changed)
