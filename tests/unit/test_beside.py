"""What a llama-server loads beside its model: an encoder of images, and a model that drafts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import TOP
from test_llama_flags import NEW, OLD, build_of

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gguf_maker
import mmproj
import mmproj_maker

from labdeploy import probe, report_models
from labdeploy.errors import InventoryError
from labdeploy.models import gguf
from labdeploy.models.book import ModelBook
from labdeploy.models.projector import projector
from labdeploy.models.shape import model_shape
from labdeploy.runners.llama_flags import spoken
from labdeploy.runners.llama_memory import LlamaMemorySettings, memory

if TYPE_CHECKING:
    from conftest import Lab

ROWS = mmproj.load()
CPU = "cpu: {cores: 8}, ram: 64GiB"
EYES = "runner: llama-server, model: gemma3-27b, mmproj: gemma3-27b-mmproj, port: 8080"
QUICK = "runner: llama-server, model: qwen3-8b, spec_draft_model: qwen3-4b, port: 8080"
MIB = 2**20
TOKENIZER_MIB = 16384 * 400 / MIB


def card(vram: str) -> str:
    """Write a machine with one GPU."""
    return f'{CPU}, gpus: [{{name: RTX 4090, vram: {vram}, compute_capability: "8.9"}}]'


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join((row.name, *row.flags)))
def test_an_encoder_is_planned_as_llama_server_says(row: mmproj.Row):
    """Weights to the last digit; its buffer never too small, and half as large again at most."""
    assert row.projector.weights_bytes / MIB == pytest.approx(row.weights_mib, abs=0.01)
    assert row.compute_mib <= row.planned_compute_mib <= 1.55 * row.compute_mib


@pytest.mark.parametrize("name", mmproj_maker.SHAPES)
def test_the_lock_keeps_all_of_an_encoder(name: str):
    """What is planned from the lock is what is planned from the file."""
    header = mmproj_maker.header(name)
    before, after = (vars(projector(each)) for each in (header, gguf.from_lock(gguf.to_lock(header))))
    assert set(before.pop("tensors")) == set(after.pop("tensors"))
    assert before == after


@pytest.mark.parametrize(
    ("name", "side", "asked"),
    [
        ("gemma3-4b", 896, 896),
        ("smolvlm2-2b", 384, 384),
        ("qwen3-vl-8b", 2048, 1024),
        ("qwen2.5-vl-7b", 1792, 896),
        ("pixtral-12b", 512, 512),
        ("mistral-small-3.1", 896, 896),
    ],
)
def test_the_largest_image_is_counted(name: str, side: int, asked: int):
    """By what llama.cpp lets through; `image_max_tokens` matters only to encoders that take images of any size."""
    found = projector(mmproj_maker.header(name))
    assert found.n_patches() == pytest.approx((side / found.patch_size) ** 2, rel=0.05)
    assert found.n_patches(1024) == pytest.approx((asked / found.patch_size) ** 2, rel=0.05)


BIG = model_shape(
    gguf_maker.dense(gguf_maker.Dense("llama", 2048, 16384, 8, gguf_maker.Heads(16, 4, 128), 8192)).header()
)
SMALL = model_shape(
    gguf_maker.dense(gguf_maker.Dense("llama", 1024, 16384, 4, gguf_maker.Heads(8, 4, 128), 3072)).header()
)
DRAFTING = LlamaMemorySettings(
    8192, cache_type_k="q8_0", cache_type_v="q8_0", cache_ram_mib=64, ctx_checkpoints=0, draft=SMALL, draft_tokens=3
)


def test_a_draft_on_the_cpu_is_planned_as_llama_server_says():
    """Its tables, 0.7.0, two slots: model 44 + 261 repacked, 68, 72; the draft 22 + 27, 64 in f16, 32."""
    host = memory(BIG, dataclasses.replace(DRAFTING, parallel=2)).host
    assert (int(host.model_mib), int(host.repack_mib), int(host.context_mib)) == (44, 261, 68)
    assert host.compute_mib == pytest.approx(72.1, abs=0.5)
    assert host.draft_mib == pytest.approx(22.1 + 27 + 64 + 32 + TOKENIZER_MIB, abs=1.5)


def test_a_draft_on_a_gpu_is_planned_as_llama_server_says():
    """Its tables, 0.7.0, 5 of 9 layers: 156, 34, 89 there; of the draft all layers: 40, 64, 34."""
    on_gpu = dataclasses.replace(DRAFTING, n_gpus=1, gpu_api="vulkan", gpu_layers=5, draft_gpu_layers=5, repack=False)
    taken = memory(BIG, on_gpu)
    gpu = taken.gpus[0]
    assert (int(gpu.model_mib), int(gpu.context_mib), int(gpu.compute_mib)) == (156, 34, 89)
    pools_mib = 20 + 1.6  # see gpu_overhead_mib; the process has its context on the GPU already
    assert gpu.draft_mib == pytest.approx(40.2 + 64 + 34 + pools_mib, abs=1)
    assert int(taken.host.compute_mib) == 24
    assert taken.host.draft_mib == pytest.approx(9 + 16 + TOKENIZER_MIB, abs=1.5)


# --- plans --------------------------------------------------------------------------------------------------------


def test_an_encoder_takes_its_part_of_the_gpu(lab: Lab):
    """Weights and scratch are on the GPU, so the model has less context there than alone."""
    alone = lab.plan(card("24GiB"), a=EYES.replace("mmproj: gemma3-27b-mmproj, ", "")).services[0]
    seeing = lab.plan(card("24GiB"), a=EYES).services[0]
    assert seeing.fits
    assert seeing.memory["gpu0"].mmproj_mib == pytest.approx(816.6 + 149.6, abs=2)
    assert seeing.memory["gpu0"].total_mib <= 24 * 1024 - 512
    assert seeing.settings["ctx_size"].value < alone.settings["ctx_size"].value
    assert "--mmproj /srv/models/mmproj-gemma-3-27b-it-f16.gguf --mmproj-offload" in " ".join(seeing.argv)


def test_without_a_gpu_both_are_in_main_memory(lab: Lab):
    """And llama-server is told so."""
    eyes, quick = (lab.plan(CPU, a=keys).services[0] for keys in (EYES, QUICK))
    assert eyes.memory["host"].mmproj_mib > 816
    assert "--no-mmproj-offload" in eyes.argv
    assert quick.memory["host"].draft_mib > 2500
    assert quick.argv[quick.argv.index("--spec-draft-ngl") + 1] == "0"


def test_what_the_inventory_says_of_them_wins(lab: Lab):
    """Each setting has its flag."""
    keys = f"{QUICK}, spec_draft_ngl: 5, spec_draft_n_max: 8, mmproj: gemma3-27b-mmproj, mmproj_offload: false"
    plan = lab.plan(card("24GiB"), a=f"{keys}, image_max_tokens: 512").services[0]
    assert "--spec-draft-ngl 5 --spec-draft-n-max 8" in " ".join(plan.argv)
    assert "--no-mmproj-offload --image-max-tokens 512" in " ".join(plan.argv)


@pytest.mark.parametrize("keys", [EYES, QUICK])
def test_more_vram_is_never_worse_with_them(lab: Lab, keys: str):
    """And no plan that fits takes more than there is."""
    seen = []
    for mib in range(4096, 33 * 1024, 1792):
        plan = lab.plan(card(f"{mib}MiB"), a=keys).services[0]
        assert plan.fits
        assert all(part.total_mib <= mib - 512 for device, part in plan.memory.items() if device != "host")
        layers = plan.settings["gpu_layers"].value if plan.gpus else 0
        seen.append((layers, plan.settings["ctx_size"].value if layers else 0))
    assert seen == sorted(seen)
    assert seen[-1][0] > seen[0][0]


@pytest.mark.parametrize(
    ("keys", "way"),
    [
        (f"{EYES}, gpu_layers: 63, ctx_size: 8192", "mmproj_offload: false"),
        (f"{QUICK}, gpu_layers: 37, ctx_size: 32768", "spec_draft_ngl: 0"),
    ],
)
def test_ways_to_fit_name_them(lab: Lab, keys: str, way: str):
    """Where leaving them to the CPU makes room, that is offered, and then it fits."""
    plans = {mib: lab.plan(card(f"{mib}MiB"), a=keys).services[0] for mib in range(8192, 24576, 512)}
    offered = [mib for mib, plan in plans.items() if way in plan.ways_to_fit]
    assert offered
    assert all(lab.plan(card(f"{mib}MiB"), a=f"{keys}, {way}").services[0].fits for mib in offered)


def test_an_image_that_no_batch_holds_is_told(lab: Lab):
    """Gemma sees an image at once: 256 tokens, and batches of 128."""
    warnings = lab.plan(card("24GiB"), a=f"{EYES}, ubatch_size: 128").services[0].warnings
    assert any("256 tokens of an image at once" in warning for warning in warnings)
    assert not any("at once" in warning for warning in lab.plan(card("24GiB"), a=EYES).services[0].warnings)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("model: gemma3-27b, mmproj: qwen3-4b", "mmproj: qwen3-4b is no encoder"),
        ("model: gemma3-27b-mmproj", "is an encoder of images or sounds, which answers nothing"),
        ("model: qwen3-8b, spec_draft_model: gemma3-27b-mmproj", "gemma3-27b-mmproj is no GGUF model"),
        ("model: qwen3-8b, spec_draft_model: qwen2.5-7b-awq", "qwen2.5-7b-awq is no GGUF model"),
    ],
)
def test_a_model_in_the_wrong_place_is_an_error(lab: Lab, keys: str, what: str):
    """It says which, and what to write."""
    with pytest.raises(InventoryError, match=what) as caught:
        lab.plan(card("24GiB"), a=f"runner: llama-server, port: 1, {keys}")
    assert caught.value.where == "h: a"
    assert caught.value.hint


@pytest.mark.parametrize("runner", ["llama-server", "ollama", "vllm", "auto"])
def test_an_encoder_is_served_by_no_runner(lab: Lab, runner: str):
    """Each says the same of it; and `pick` does not offer it."""
    with pytest.raises(InventoryError, match="answers nothing by itself"):
        lab.plan(card("24GiB"), a=f"runner: {runner}, port: 1, model: gemma3-27b-mmproj")
    lab.copy_lock()
    ran = lab.run("pick", "--model", "gemma3-27b-mmproj")
    assert (ran.code, "answers nothing by itself" in ran.err) == (2, True)
    assert "gemma3-27b-mmproj" not in [
        facts.name for facts in ModelBook(lab.load(lab.path.read_text()), lab.lock()).known("")
    ]


def test_a_name_that_is_no_model_is_a_problem_of_the_inventory(lab: Lab):
    """With its line, and a near one."""
    text = """
    hosts:
      h:
        services:
          a: {runner: llama-server, port: 1, model: chat, mmproj: eyez, spec_draft_model: none}
    models:
      chat: {path: c.gguf}
      eyes: {path: e.gguf}
    """
    assert lab.problems(text) == [
        "5: hosts.h.services.a.mmproj: 'eyez' is not under models; did you mean \"eyes\"?",
        "5: hosts.h.services.a.spec_draft_model: 'none' is not under models",
    ]


def test_hosts_are_asked_for_them(lab: Lab):
    """`probe` reads their headers, and `models ls` says who wants them."""
    inventory = lab.host(card("24GiB"), a=EYES, b=QUICK.replace("8080", "8081"))
    paths = probe.model_paths(inventory, inventory.hosts["h"])
    assert set(paths) == {"gemma3-27b", "gemma3-27b-mmproj", "qwen3-8b", "qwen3-4b"}
    wanted = report_models.wanted(inventory.hosts["h"], paths)
    assert (wanted[paths["gemma3-27b-mmproj"]], wanted[paths["qwen3-4b"]]) == ("a", "b")


# --- builds -------------------------------------------------------------------------------------------------------

DRAFT = ("--spec-type", "draft-simple", "--spec-draft-model", "/m/d.gguf", "--spec-draft-ngl", "9")
SEES = ("--mmproj", "/m/e.gguf", "--mmproj-offload", "--image-max-tokens", "512")


def test_the_build_of_the_plan_knows_these_flags():
    """0.7.0, by its own help."""
    words = ("llama-server", *DRAFT, "--spec-draft-n-max", "3", *SEES, "--no-mmproj-offload")
    assert set(words[1::2]) & {"--spec-type", "--mmproj"}
    assert {word for word in words if word.startswith("--")} <= set(NEW.flags)
    assert spoken(words, NEW) == (words, ())


def test_an_older_build_is_told_of_the_draft_in_its_words():
    """Spring 2025: --model-draft and its kin, and no types."""
    known = dict.fromkeys(("--model-draft", "--n-gpu-layers-draft", "--draft-max"), True)
    older = dataclasses.replace(OLD, flags={**OLD.flags, **known})
    said, lost = spoken(("llama-server", *DRAFT, "--spec-draft-n-max", "3"), older)
    assert said == ("llama-server", "--model-draft", "/m/d.gguf", "--n-gpu-layers-draft", "9", "--draft-max", "3")
    assert lost == ()


def test_a_build_that_reads_no_images_is_an_error():
    """Before May 2025 llama-server had no --mmproj."""
    blind = build_of("cpu-only-sid", without=("--mmproj",))
    with pytest.raises(InventoryError, match="it cannot read images"):
        spoken(("llama-server", *SEES), blind)


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_says_what_an_encoder_takes(lab: Lab, tmp_path: Path):
    """In text, and in JSON; and adds it to the lock."""
    lab.write("hosts: {}\nmodels: {eyes: {path: e.gguf}}\n")
    file = mmproj_maker.write(tmp_path / "e.gguf", "gemma3-4b")
    ran = lab.run("inspect", str(file), "--add", "eyes")
    assert ran.code == 0
    assert "810 weights, 150 scratch" in ran.out
    assert "896x896 pixels" in ran.out
    assert max(map(len, ran.out.replace(str(tmp_path), "").splitlines())) <= 80
    assert '"memory_mib": {' in lab.run("--json", "inspect", str(file)).out
    assert "clip.projector_type: gemma3" in (lab.folder / "inventory.lock.yaml").read_text()


def test_the_page_names_every_setting():
    """docs/planning.md says how each is chosen."""
    page = (TOP / "docs" / "planning.md").read_text()
    assert all(f"`{key}`" in page for key in ("mmproj", "mmproj_offload", "image_max_tokens", "spec_draft_model"))
    assert all(f"`{key}`" in page for key in ("spec_draft_ngl", "spec_draft_n_max"))
