"""Plans to files, byte for byte: Jinja templates, and the only places where a value is written into a unit."""

from __future__ import annotations

import functools
import json
import math
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
)

from labdeploy import plan as planning
from labdeploy.errors import InventoryError, LabdeployError
from labdeploy.runners.base import shown
from labdeploy.schema import CONTROL

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from labdeploy.plan import HostPlan
    from labdeploy.runners.base import GpuBudget, Memory, ServicePlan


# What a mistake in a user's template can raise while it is read or rendered.
TEMPLATE_MISTAKES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Escaped(str):
    """Text that is safe to stand in a unit as it is."""

    __slots__ = ()


# --- escaping: nothing else writes into a unit --------------------------------------------------------------------


def plain(value: object) -> Escaped:
    """Write the value of a plain setting: `%` doubled, never quoted; one line, no trailing backslash."""
    text = str(value)
    if isinstance(value, Escaped):
        return value
    if CONTROL.search(text) or text.endswith("\\"):
        raise LabdeployError(f"{text!r} cannot be written as a unit setting")
    return Escaped(text.replace("%", "%%"))


def word(text: str) -> Escaped:
    r"""Write one word of a command line: `\ " % $` escaped, quoted where systemd would split or read it."""
    return Escaped(_quoted(text).replace("$", "$$"))


def words(argv: Iterable[str]) -> Escaped:
    """Write a command line, one flag with its value to a line."""
    lines: list[list[str]] = [[]]
    for item in argv:
        if item.startswith("-") and lines[0]:
            lines.append([])
        lines[-1].append(word(item))
    return Escaped(" \\\n    ".join(" ".join(line) for line in lines))


def assignment(pair: tuple[str, str]) -> Escaped:
    """Write NAME=value for Environment=, where `$` means nothing."""
    return Escaped(_quoted(f"{pair[0]}={pair[1]}"))


def path(text: str) -> Escaped:
    """Write one path of a list of paths, where `$` means nothing."""
    return Escaped(_quoted(text))


def _quoted(text: str) -> str:
    if CONTROL.search(text):
        raise LabdeployError(f"{text!r} cannot be written into a unit: it holds a control character")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if re.fullmatch(r"[^\s'\"\\;]+", text) else f'"{escaped}"'


# --- what templates say -------------------------------------------------------------------------------------------


def _breakdown(part: Memory) -> str:
    """Say what a service takes on a device."""
    kinds = ("model", "context", "compute", "overhead", "repack", "cache", "mmproj", "draft")
    parts = [f"{kind} {getattr(part, kind + '_mib'):.0f}" for kind in kinds if getattr(part, kind + "_mib")]
    return f"{part.total_mib:.0f} = " + " + ".join(parts or ["0"])


def _uses_api(gpus: Iterable[GpuBudget], api: str) -> bool:
    return any(gpu.gpu.api == api for gpu in gpus)


def _device_nodes(gpus: Iterable[GpuBudget]) -> list[str]:
    """List the device nodes a service may open, by class: a node that appears late is still allowed.

    Names are those of /proc/devices: the NVIDIA driver renamed its class from nvidia-frontend to nvidia in 545.
    """
    makers = {gpu.gpu.maker for gpu in gpus}
    nodes: list[str] = []
    if "nvidia" in makers:
        classes = ("nvidia", "nvidiactl", "nvidia-frontend", "nvidia-uvm", "nvidia-caps", "nvidia-modeset")
        nodes += [f"char-{name}" for name in classes] + ["/dev/dxg"]
    if makers & {"amd", "intel"} or _uses_api(gpus, "vulkan"):
        nodes.append("char-drm")
    if _uses_api(gpus, "rocm"):
        nodes.append("char-kfd")
    return nodes


def _device_groups(gpus: Iterable[GpuBudget]) -> list[str]:
    """List the groups that own a GPU's device nodes; NVIDIA's are open to all."""
    return ["render", "video"] if {gpu.gpu.maker for gpu in gpus} & {"amd", "intel"} else []


def _protect_home(service: ServicePlan) -> str:
    """Hide home folders, but for reading where the model or the program lies in one."""
    models = (service.model_path, *(model.path for model in service.beside))
    paths = (*models, service.argv[0], service.facts.get("store", ""))
    in_home = [p for p in paths if p.startswith(("/home/", "/root/"))]
    return "read-only" if in_home else "yes"


def _ready_poll(service: ServicePlan) -> tuple[str, ...]:
    """Wait until the runner says it is ready, or has joined its span; give up at once when its process is gone."""
    asked = f"curl -fs -m 2 -o /dev/null {service.url}{service.health.ready_path}"
    ready = asked if service.answers else service.facts["joined"]
    poll = f"until {ready}; do kill -0 $MAINPID 2>/dev/null || exit 1; sleep 0.2; done"
    return ("/bin/sh", "-c", poll)


# --- files --------------------------------------------------------------------------------------------------------


def render_host(plan: HostPlan, environment: Environment) -> dict[str, bytes]:
    """Render every file of a host: path below the host's folder to its bytes.

    `systemd/UNIT` is installed as it is; `services/NAME` is what the program on the host needs to know of a service
    (how to tell that it serves); `units` lists units and their services in the order they start; `plan.json` is the
    plan, kept with the generation. Hosts that share their plans share their files.
    """
    rendered = _RENDERED.setdefault(environment, {})
    alike = (plan.services, plan.host.hardware, plan.host.reserve)
    if alike not in rendered:
        rendered[alike] = _files(plan, environment)
    return dict(rendered[alike])


_RENDERED: WeakKeyDictionary[Environment, dict[Hashable, dict[str, bytes]]] = WeakKeyDictionary()


def _files(plan: HostPlan, environment: Environment) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for service in plan.services:
        files[f"systemd/{service.unit}"] = _unit(service, environment).encode()
        files[f"services/{service.name}"] = _service_facts(service, plan).encode()
        files |= service.host_files
    files["units"] = "".join(f"{service.unit} {service.name}\n" for service in plan.start_order).encode()
    files["plan.json"] = (json.dumps(planning.to_json(plan), indent=1) + "\n").encode()
    return files


def environment(inventory_folder: Path | None = None) -> Environment:
    """Give a Jinja environment in which a template beside the inventory overrides ours of the same name.

    Ours can always be had as `shipped/NAME`, so that a template may extend the one it overrides.
    """
    own = [FileSystemLoader(inventory_folder / "templates")] if inventory_folder else []
    shipped = FileSystemLoader(_shipped_templates())
    return _configured(
        Environment(  # noqa: S701 (units are not HTML; `finalize` escapes every value)
            loader=ChoiceLoader([*own, shipped, PrefixLoader({"shipped": shipped})]),
            undefined=StrictUndefined,
            finalize=plain,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
    )


def _configured(environment: Environment) -> Environment:
    environment.filters |= {
        "words": words,
        "word": word,
        "assignment": assignment,
        "path": path,
        "shown": shown,
        "breakdown": _breakdown,
        "api": _uses_api,
        "device_nodes": _device_nodes,
        "device_groups": _device_groups,
        "protect_home": _protect_home,
        "ready_poll": _ready_poll,
    }
    return environment


@functools.cache
def _shipped_templates() -> Path:
    """Find our templates: inside the installed package, or at the top of a checkout."""
    inside = Path(__file__).parent / "templates"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "templates"


def _unit(service: ServicePlan, environment: Environment) -> str:
    name = f"{service.runner}.service.j2"
    try:
        text = environment.get_template(name).render(plan=service)
    except TemplateNotFound as error:
        raise InventoryError(f"no template named {error.name}", where=service.name) from None
    except TEMPLATE_MISTAKES as error:
        raise InventoryError(f"template error: {error}", where=_template_line(error, name)) from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _template_line(error: Exception, name: str) -> str:
    """Say where in a template it went wrong: a syntax error knows, for others Jinja puts templates in the traceback."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename or error.name or name}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else name


def _service_facts(service: ServicePlan, plan: HostPlan) -> str:
    """Write the facts of a service as `key=value` lines; the host program reads them as data, never as code."""
    health, url = service.health, service.url
    facts = {
        "unit": service.unit,
        "ready": url + health.ready_path if service.answers else "",
        "completions": url + "/v1/completions" if service.answers else "",
        "models": url + "/v1/models" if service.answers else "",
        "body": json.dumps({"model": health.model, "prompt": "Hello", "max_tokens": 1}),
        "n_ctx": health.n_ctx or "",
        "layers": health.gpu_layers or "",
        "deadline_s": health.deadline_s,
        "bind": service.bind,
        "port": service.port if service.answers else 0,
        "gpu": ",".join(sorted({gpu.gpu.api for gpu in service.gpus})),
        "devices": " ".join(gpu.id for gpu in service.gpus),
        "groups": " ".join(_device_groups(service.gpus)),
        "binary": service.argv[0],
        "model": service.model_path,
        "model_bytes": service.model_bytes,
        "served": health.model,
        "api_key_file": service.api_key_file or "",
        **service.host_facts,
    }
    proof = [
        *(("env", f"{name}={value}") for name, value in service.env.items()),
        *(("proof", w) for w in service.proof),
    ]
    beside = [("beside", f"{model.size_bytes} {model.path}") for model in service.beside]
    lines = [*facts.items(), *beside, *_device_facts(service, plan), *(proof if service.proof else ())]
    for key, value in lines:
        if CONTROL.search(str(value)):
            raise LabdeployError(f"{key}={value!r} cannot be a line of facts: it holds a control character")
    return "".join(f"{key}={value}\n" for key, value in lines)


def _device_facts(service: ServicePlan, plan: HostPlan) -> Iterator[tuple[str, str]]:
    """Give for each device what plans may use of it, and the service's model, context, compute, rest and caches."""
    for device, part in service.memory.items():
        usable = plan.ram_usable_mib if device == "host" else plan.vram_usable_mib(int(device.removeprefix("gpu")))
        figures = (
            part.model_mib,
            part.context_mib,
            part.compute_mib,
            part.overhead_mib + part.repack_mib + part.beside_mib,
            part.cache_mib,
        )
        yield "device", " ".join([device, str(usable), *(str(math.ceil(mib)) for mib in figures)])
