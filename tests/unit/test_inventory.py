"""The inventory as a whole: every problem in one run, names that point somewhere, and who is meant by what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import MODELS

from labdeploy import inventory, place
from labdeploy.errors import InventoryError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Lab

GOOD = """
hosts:
  gpu1:
    hardware: {cpu: {cores: 8}, ram: 64GiB, gpus: [{name: RTX 3090, vram: 24GiB}]}
    services:
      chat: {runner: llama-server, model: qwen, port: 8080}
  gpu2:
    address: 10.0.0.2
    ssh: {port: 2222}
    reserve: {ram: 4GiB}
    models_dir: /data
    runners: {llama-server: /opt/llama-server}
    hardware: {cpu: {cores: 8}, ram: 64GiB}
  box:
    hardware: {cpu: {cores: 4}, ram: 16GiB}
models: {qwen: {path: qwen.gguf}}
groups: {gpu: [gpu1, gpu2], rest: [box]}
defaults: {ssh: {user: admin, key: ./key}, reserve: {ram: 2GiB}}
"""


def with_services(*lines: str) -> str:
    """Write an inventory of one host with these services."""
    services = "\n".join(f"      {line}" for line in lines)
    hardware = "{cpu: {cores: 8}, ram: 64GiB, gpus: [{name: RTX 3090, vram: 24GiB}]}"
    return f"models: {{m: {{path: m.gguf}}}}\nhosts:\n  h:\n    hardware: {hardware}\n    services:\n{services}\n"


def test_defaults_fill_in_what_a_host_leaves_out(lab: Lab):
    """A host says what is different about it, key by key for SSH and runners."""
    found = lab.load(GOOD)
    one, two = found.host("gpu1"), found.host("gpu2")
    assert (one.name, one.address, one.models_dir) == ("gpu1", "gpu1", "/srv/models")
    assert (one.ssh.user, one.ssh.key, one.ssh.port) == ("admin", "./key", None)
    assert (two.address, two.ssh.user, two.ssh.port, two.models_dir) == ("10.0.0.2", "admin", 2222, "/data")
    assert two.reserve is not None
    assert two.reserve.ram == 4096
    assert (one.runners, two.runners["llama-server"]) == ({}, "/opt/llama-server")
    assert one.services["chat"].name == "chat"
    assert found.lock_path.name == "inventory.lock.yaml"


def test_all_problems_in_one_run(lab: Lab):
    """Each with its path, its line and the word that was meant; also those that only show across keys."""
    text = """\
defaults: {models_dir: models}
models:
  qwen: {path: ../qwen.gguf}
  tiny: {path: tiny.gguf}
hosts:
  gpu1:
    adress: 10.0.0.1
    hardware:
      cpu: {cores: 8, threads: many}
      ram: 64
      gpus:
        - {name: RTX 3090, vram: 24GB}
        - {vram: 12GiB}
    services:
      chat: {runner: lama-server, model: qwen, port: 8080}
      tiny: {runner: llama-server, model: tny, port: 8080, ctx_sise: 4096}
  gpu2:
    hardware: {cpu: {cores: 4}, ram: 8GiB}
    services:
      one: {runner: ollama, model: tiny, port: 11434}
      two: {runner: llama-server, model: tin, port: 11434, flags: [--ctx-size, 4096]}
groups:
  gpu: [gpu1, gpu3]
  gpu2: [gpu1]
"""
    assert lab.problems(text) == [
        "1: defaults.models_dir: 'models' must be absolute",
        "3: models.qwen.path: '../qwen.gguf' must not hold '..'",
        ' 7: hosts.gpu1.adress: unknown key; did you mean "address"?'.strip(),
        "9: hosts.gpu1.hardware.cpu.threads: 'many' is not a whole number",
        "10: hosts.gpu1.hardware.ram: 64 has no unit; write 64GiB or 64MiB",
        "12: hosts.gpu1.hardware.gpus[0].vram: '24GB': unit 'GB' is not MiB, GiB or TiB; write 24GiB or 24MiB",
        "13: hosts.gpu1.hardware.gpus[1]: name is missing: as people call it: `RTX 3090`",
        (
            "15: hosts.gpu1.services.chat.runner: 'lama-server' is not one of llama-server, ollama, vllm, auto;"
            ' did you mean "llama-server"?'
        ),
        '16: hosts.gpu1.services.tiny.ctx_sise: unknown key; did you mean "ctx_size"?',
        "16: hosts.gpu1.services.tiny.model: 'tny' is not under models; did you mean \"tiny\"?",
        "16: hosts.gpu1.services.tiny.port: 8080 is already the port of chat on this host",
        "21: hosts.gpu2.services.two.model: 'tin' is not under models; did you mean \"tiny\"?",
        "21: hosts.gpu2.services.two.port: 11434 is already the port of one on this host",
        "21: hosts.gpu2.services.two.flags: --ctx-size is set by the plan; write ctx_size:",
        "23: groups.gpu: 'gpu3' is not a host; did you mean \"gpu2\"?",
        "24: groups.gpu2: is the name of a host too",
    ]


def test_a_host_with_a_problem_of_its_own_is_still_a_host(lab: Lab):
    """One typo is one problem: nothing that refers to the host or model is blamed for it."""
    text = GOOD.replace("address: 10.0.0.2", "adress: 10.0.0.2").replace("path: qwen.gguf", "path: /qwen.gguf")
    found = lab.problems(text)
    assert [problem.split(": ")[1] for problem in found] == ["hosts.gpu2.adress", "models.qwen.path"]


@pytest.mark.parametrize(
    ("keys", "name", "instead"),
    [
        ("runner: llama-server, env: {CUDA_VISIBLE_DEVICES: '1'}", "CUDA_VISIBLE_DEVICES", "write gpus:"),
        ("runner: vllm, env: {CUDA_VISIBLE_DEVICES: '1'}", "CUDA_VISIBLE_DEVICES", "write gpus:"),
        ("runner: ollama, env: {ROCR_VISIBLE_DEVICES: '1'}", "ROCR_VISIBLE_DEVICES", "write gpus:"),
        ("runner: llama-server, env: {LLAMA_ARG_CTX_SIZE: 1}", "LLAMA_ARG_CTX_SIZE", "write ctx_size:"),
        ("runner: ollama, env: {OLLAMA_GPU_OVERHEAD: 1}", "OLLAMA_GPU_OVERHEAD", "it reserves nothing"),
        ("runner: ollama, env: {LLAMA_API_KEY: x}", "LLAMA_API_KEY", "Ollama does not send it"),
        ("runner: vllm, env: {VLLM_API_KEY: x}", "VLLM_API_KEY", "a key in a unit is readable"),
        ("runner: vllm, env: {VLLM_PORT: 80}", "VLLM_PORT", "it is not the API's port"),
    ],
)
def test_what_would_undo_the_plan_is_refused(lab: Lab, keys: str, name: str, instead: str):
    """A variable wins over the plan, or loses to it, in silence; with `runner: auto` it shows when that is chosen."""
    service = f"services: {{a: {{model: qwen3-8b, port: 1, {keys}}}}}"
    (found,) = lab.problems(f"hosts: {{h: {{hardware: {{cpu: {{cores: 4}}, ram: 64GiB}}, {service}}}}}\n{MODELS}")
    assert found.startswith(f"1: hosts.h.services.a.env.{name}: cannot be set here; {instead}")


def test_what_would_undo_the_plan_is_refused_of_a_runner_that_was_chosen(lab: Lab):
    """Which one it is shows in the plan only."""
    for keys, said in (
        ("flags: [--ctx-size, 1]", "flags: --ctx-size is set by the plan; write ctx_size:"),
        ("env: {LLAMA_ARG_CTX_SIZE: 1}", "env.LLAMA_ARG_CTX_SIZE: cannot be set here; write ctx_size:"),
    ):
        with pytest.raises(InventoryError, match=f"h: a: {said}"):
            lab.plan("cpu: {cores: 4}, ram: 64GiB", a=f"model: qwen3-8b, port: 1, {keys}")


def test_a_service_with_a_bad_key_is_still_a_service(lab: Lab):
    """A bad port or model hides nothing else of it, and is not taken for another service's."""
    services = """\
      one: {runner: llama-server, model: qwn, port: many, flags: [--ctx-size, 1]}
      two: {runner: llama-server, model: "q/2", port: 0}
      three: {port: 8080}
"""
    text = f"hosts:\n  h:\n    hardware: {{cpu: {{cores: 4}}, ram: 8GiB}}\n    services:\n{services}"
    assert [problem.split(": ", 1)[1] for problem in lab.problems(text + "models: {qwen: {path: qwen.gguf}}")] == [
        "hosts.h.services.one.port: 'many' is not a whole number",
        "hosts.h.services.one.model: 'qwn' is not under models; did you mean \"qwen\"?",
        "hosts.h.services.one.flags: --ctx-size is set by the plan; write ctx_size:",
        (
            "hosts.h.services.two.model: 'q/2' is not a name under models (letters, digits, '.', '_' and '-', at most "
            "63, starting with a letter or digit)"
        ),
        "hosts.h.services.two.port: 0 is out of range; it must be from 1 to 65535",
        "hosts.h.services.three: model is missing: a name under models",
    ]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["a: {model: m, port: 80}", "b: {model: m, port: 80}"], "80 is already the port of a"),
        (["a: {model: m, port: 80, bind: 0.0.0.0}", "b: {model: m, port: 80}"], "80 is already the port of a"),
        (["a: {model: m, port: 80, bind: 10.0.0.1}", "b: {model: m, port: 80, bind: '::'}"], "80 is already the port"),
        (["a: {model: m, port: 80, bind: '::1'}", "b: {model: m, port: 80, bind: '0:0::1'}"], "80 is already the port"),
        (["a: {model: m, port: 80, bind: '::0'}", "b: {model: m, port: 80}"], "80 is already the port of a"),
        (["a: {model: m}"], "port is missing"),
        (["a: {port: 80}"], "model is missing"),
        (
            ["a: {model: m, port: 80, runner: llama-server, context_length: 4096}"],
            "setting of ollama, not of llama-server",
        ),
        (["a: {model: m, port: 80, runner: ollama, ctx_size: 4096}"], "is a setting of llama-server, not of ollama"),
        (["a: {model: m, port: 80, ctx_size: 4096}"], "write runner: llama-server to tune it"),
        (["a: {model: m, port: 80, prot: 81}"], 'did you mean "port"?'),
        (["a: {model: m, port: 80, runner: llama-server, flags: [--ctx_size=4]}"], "write ctx_size:"),
        (["a: {model: m, port: 80, runner: llama-server, flags: {c: 4}}"], "write ctx_size:"),
        (["a: {model: m, port: 80, runner: llama-server, flags: [-ngl, 9]}"], "write gpu_layers:"),
        (["a: {model: m, port: 80, runner: llama-server, flags: [--n-gpu-layers=9]}"], "write gpu_layers:"),
        (["a: {model: m, port: 80, runner: llama-server, flags: [--api-key, x]}"], "write api_key_file:"),
        (["a: {model: m, port: 80, runner: llama-server, flags: [--host=0.0.0.0]}"], "write bind:"),
        (["a: {model: m, port: 80, runner: vllm, flags: {max-model-len: 9}}"], "write max_model_len:"),
        (["a: {model: m, port: 80, runner: llama-server, gpus: [1]}"], "names GPU 1, the host has 1"),
        (["a: {model: m, port: 80, runner: ollama, gpus: [0, 3]}"], "names GPU 3, the host has 1"),
        (["txn: {model: m, port: 80}"], "labdeploy-txn.service is a unit of labdeploy itself"),
        (["recover: {model: m, port: 80}"], "labdeploy-recover.service is a unit of labdeploy itself"),
        (["../a: {model: m, port: 80}"], "is not a name"),
        (["a/b: {model: m, port: 80}"], "is not a name"),
        (['"a\\nb": {model: m, port: 80}'], "line break"),
    ],
)
def test_one_problem_of_services(lab: Lab, lines: list[str], wanted: str):
    """Each would fail on the host, minutes later, or serve something else than was meant."""
    found = lab.problems(with_services(*lines))
    assert len(found) == 1, found
    assert wanted in found[0]
    assert found[0].startswith(f"{5 + len(lines)}: hosts.h.services.")


@pytest.mark.parametrize(
    "lines",
    [
        ["a: {model: m, port: 80, bind: 127.0.0.1}", "b: {model: m, port: 80, bind: 10.0.0.1}"],
        ["a: {model: m, port: 80}", "b: {model: m, port: 81}"],
        ["a: {model: m, port: 80, runner: llama-server, flags: [--jinja, --seed, -1]}"],
        ["a: {model: m, port: 80, runner: llama-server, gpus: [0]}"],
        ["a: &a {model: m, port: 80, runner: llama-server, ctx_size: 4096}", "b: {<<: *a, port: 81}"],
    ],
)
def test_services_without_a_problem(lab: Lab, lines: list[str]):
    """Nothing is refused that works."""
    assert lab.load(with_services(*lines)).host("h").services


def test_names_that_point_nowhere(lab: Lab):
    """Groups, runners and models, each at its own line."""
    text = (
        GOOD.replace("[box]", "[bix]")
        .replace("runners: {llama-server", "runners: {lama-server")
        .replace("model: qwen", "model: qwn")
    )
    assert lab.problems(text) == [
        "6: hosts.gpu1.services.chat.model: 'qwn' is not under models; did you mean \"qwen\"?",
        '12: hosts.gpu2.runners.lama-server: is not a runner; did you mean "llama-server"?',
        "17: groups.rest: 'bix' is not a host; did you mean \"box\"?",
    ]


def test_a_shared_problem_is_told_with_its_line(lab: Lab):
    """A mistake behind an anchor is told where it stands."""
    text = "x: &gpu {name: RTX 3090, vram: 24}\n"
    problems = lab.problems(text + "hosts:\n  a: {hardware: {cpu: {cores: 1}, ram: 1GiB, gpus: [*gpu]}}\n")
    assert problems[0].startswith("1: x: unknown key")
    assert problems[1].startswith("1: hosts.a.hardware.gpus[0].vram: 24 has no unit")


@pytest.mark.parametrize("text", ["[]", "hosts", "hosts: []", "hosts: {a: 3}", "hosts: {a: []}", "{}", "hosts: null"])
def test_an_inventory_of_the_wrong_form(lab: Lab, text: str):
    """It is told as a problem, with a line."""
    assert lab.problems(text)[0].startswith("1: ")


def test_problems_as_people_see_them(lab: Lab):
    """One `error:` line each, then one hint; exit code 2."""
    lab.write(GOOD.replace("cores: 4", "cores: x").replace("port: 8080", "port: 99999"))
    ran = lab.run("plan")
    assert (ran.code, ran.out) == (2, "")
    first, second, empty, hint = ran.err.splitlines()
    assert first.startswith("error: inventory.yaml:6: hosts.gpu1.services.chat.port: 99999 is out of range")
    assert second.startswith("error: inventory.yaml:15: hosts.box.hardware.cpu.cores: 'x' is not")
    assert not empty
    assert hint.startswith("hint: labdeploy ")


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ([], ["gpu1", "gpu2", "box"]),
        (["box", "gpu1"], ["gpu1", "box"]),
        (["gpu"], ["gpu1", "gpu2"]),
        (["gpu*"], ["gpu1", "gpu2"]),
        (["gpu[2-9]"], ["gpu2"]),
        (["re?t"], ["box"]),
        (["*"], ["gpu1", "gpu2", "box"]),
        (["gpu", "gpu1", "gpu1"], ["gpu1", "gpu2"]),
    ],
)
def test_who_is_meant(lab: Lab, patterns: list[str], wanted: list[str]):
    """Names, groups and globs; each host once, in the order of the inventory."""
    assert [host.name for host in lab.load(GOOD).select(patterns)] == wanted


@pytest.mark.parametrize(("pattern", "near"), [("gpu11", "gpu1"), ("bx", "box"), ("", ""), ("zzz*", "")])
def test_a_pattern_that_means_nobody_is_an_error(lab: Lab, pattern: str, near: str):
    """A typo must not push to nobody and say it is done."""
    found = lab.load(GOOD)
    with pytest.raises(InventoryError, match="no host or group is named") as caught:
        found.select(["box", pattern])
    assert (f'did you mean "{near}"' in str(caught.value)) == bool(near)


def test_an_empty_group_says_that_it_is_empty(lab: Lab):
    """It is there, so `no group is named so` would send one looking for a typo."""
    found = lab.load(GOOD.replace("rest: [box]", "rest: []"))
    with pytest.raises(InventoryError, match="group rest has no hosts"):
        found.select(["rest"])


def test_where_the_inventory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As given, else the environment's, else the nearest upwards; else the error says how to name one."""
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.delenv(place.ENV_NAME, raising=False)
    with pytest.raises(InventoryError, match=r"no inventory\.yaml in .* or above it") as caught:
        place.find(None)
    assert "labdeploy -i PATH" in caught.value.hint
    (tmp_path / "inventory.yaml").write_text(GOOD)
    assert place.find(None) == tmp_path / "inventory.yaml"
    (tmp_path / "a" / "inventory.yaml").write_text(GOOD)
    assert place.find(None) == tmp_path / "a" / "inventory.yaml"
    monkeypatch.setenv(place.ENV_NAME, str(tmp_path / "inventory.yaml"))
    assert place.find(None) == tmp_path / "inventory.yaml"
    assert place.find(deep / "x.yaml") == deep / "x.yaml"


def test_the_shipped_inventory_is_one(lab: Lab):
    """It is what people start from: four machines, all three runners."""
    from conftest import TOP  # noqa: PLC0415

    found = inventory.load(TOP / "inventory.yaml")
    assert len(found.hosts) == 4
    runners = {service.runner for host in found.hosts.values() for service in host.services.values()}
    assert runners == {"llama-server", "ollama", "auto"}
    assert lab.folder.is_dir()
