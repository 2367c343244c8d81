"""What a runner is to labdeploy: settings in, a plan for one service out. Each runner is one module beside this."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from labdeploy.errors import InventoryError
from labdeploy.schema import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from labdeploy.facts.build import Build
    from labdeploy.hardware import Gpu
    from labdeploy.models.model import ModelFacts
    from labdeploy.models.shape import ModelShape

Prefer = Literal["speed", "context"]
MOST_GPUS_TO_COMBINE = 6  # 63 sets; a host with more is one of equal cards


def shown(value: Any) -> str:  # noqa: ANN401
    """Write a setting's value as the inventory would."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value) or "none"
    return str(value)


def reachable(bind: str) -> str:
    """Give the address at which a host reaches what listens on `bind`: a wildcard is reached over loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104 (a lookup, not a bind)


@dataclass(frozen=True)
class Choice:
    """A setting and why it is so."""

    value: Any
    why: str

    @property
    def shown(self) -> str:
        """The value as the inventory would write it."""
        return shown(self.value)


@dataclass(frozen=True)
class Memory:
    """What one service takes on one device, in MiB; the first three as llama.cpp's memory breakdown names them.

    In main memory only: `repack_mib` is a copy of weights in the CPU's own layout (the pages of the file that it was
    made from can be dropped and are not counted), `cache_mib` what cached prompts may grow to. `mmproj_mib` and
    `draft_mib` are all that an encoder of images and a model that drafts take beside the model.
    """

    model_mib: float = 0.0
    context_mib: float = 0.0
    compute_mib: float = 0.0
    overhead_mib: float = 0.0
    repack_mib: float = 0.0
    cache_mib: float = 0.0
    mmproj_mib: float = 0.0
    draft_mib: float = 0.0

    @property
    def beside_mib(self) -> float:
        """What models beside the one that is served take."""
        return self.mmproj_mib + self.draft_mib

    @property
    def total_mib(self) -> float:
        """All of it."""
        fixed = self.model_mib + self.context_mib + self.compute_mib + self.overhead_mib + self.beside_mib
        return fixed + self.repack_mib + self.cache_mib


@dataclass(frozen=True)
class GpuBudget:
    """A GPU and what is still free on it for the service being planned."""

    index: int
    api_index: int
    """Its index among the GPUs of its host that the same runtime (CUDA, ROCm, Vulkan) lists."""
    gpu: Gpu
    total_mib: int
    free_mib: float

    @property
    def id(self) -> str:
        """Its name in plans: `gpu0`."""
        return f"gpu{self.index}"


@dataclass(frozen=True)
class Budget:
    """What a service may take of its host."""

    gpus: tuple[GpuBudget, ...]
    ram_mib: float
    threads: int
    threads_why: str
    cpu_features: tuple[str, ...]
    disk_mib_per_s: int = 100
    least: bool = False
    """Plan the least that is useful, to see what must be left for this service: no grown context, no prompt cache."""
    gpu_sharers: int = 1
    """How many services that size themselves to the GPU (vLLM) still have to share what is free."""


@dataclass(frozen=True)
class Part:
    """One host's part of a service that spans several; the first host is its head, and only the head answers."""

    rank: int
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    """Where the hosts reach each other, in the order of the hosts."""

    @property
    def is_head(self) -> bool:
        """Whether this host is the one that answers."""
        return self.rank == 0

    @property
    def address(self) -> str:
        """This host's own."""
        return self.addresses[self.rank]


@dataclass(frozen=True)
class Request:
    """One service as asked for: the common keys, the runner's own settings, the model and the files' places."""

    name: str
    unit: str
    runner: str
    runner_why: str
    model: ModelFacts
    binary: str
    bind: str
    port: int
    settings: Any
    flags: tuple[str, ...]
    env: Mapping[str, str]
    api_key_file: str | None
    prefer: Prefer | None = None
    """What to give up last where not everything fits; None where the inventory does not say."""
    build: Build | None = None
    """The program that was probed at `binary`; None where none was."""
    part: Part | None = None
    """Which part of a service that spans hosts this is."""
    beside: Mapping[str, ModelFacts] = field(default_factory=dict)
    """Models that it needs beside the one it serves, by the setting that names them."""

    @property
    def all_bytes(self) -> int:
        """Bytes of all files that it reads when it starts."""
        return self.model.size_bytes + sum(model.size_bytes for model in self.beside.values())


def owned(flags: Iterable[str], env: Iterable[str], runner: Runner) -> Iterator[tuple[str, str]]:
    """Name what a service passes on though the plan sets it: the key where it stands, and what to write instead."""
    for word in flags:
        flag = _flag_of(word)
        if word.startswith("-") and flag in runner.owned_flags:
            yield "flags", f"{flag} is set by the plan; {runner.owned_flags[flag]}"
    for name in env:
        if name in runner.owned_env:
            yield f"env.{name}", f"cannot be set here; {runner.owned_env[name]}"


def _flag_of(word: str) -> str:
    """Give the flag of a word as runners' help spells it: no value after `=`, no underscores."""
    return word.partition("=")[0].replace("_", "-")


def require_known_flags(request: Request, host: str) -> None:
    """Refuse flags of the inventory that the probed build does not know: it would end at once when it starts."""
    build = request.build
    unknown = [flag for flag in _flag_words(request.flags, build.flags) if not _knows(build, flag)] if build else []
    if build and unknown:
        at = f"hosts.{host}.services.{request.name}.flags"
        lines = [f"{at}: {flag} is no flag of {build.shown}{did_you_mean(flag, build.flags)}" for flag in unknown]
        raise InventoryError("\n".join(lines), hint=f"labdeploy probe {host}  # if another build is there now")


def _flag_words(words: tuple[str, ...], known: Mapping[str, bool]) -> Iterator[str]:
    """Give the words that are flags: not the values of those before them, and not negative numbers."""
    is_value = False
    for word in words:
        flag = _flag_of(word)
        if not is_value and re.match(r"--?[A-Za-z]", flag):
            yield flag
        is_value = not is_value and "=" not in word and known.get(flag, False)


def _knows(build: Build, flag: str) -> bool:
    """Tell whether a build knows a flag; argparse (vLLM) takes the start of one, and a key of a JSON value after it."""
    if not build.flags or flag in build.flags:
        return True
    whole = flag.partition(".")[0]
    return build.path.endswith("vllm") and any(known.startswith(whole) for known in build.flags)


@dataclass(frozen=True)
class Health:
    """How to tell that a service serves: where it says it is ready, and the model to ask for one token."""

    ready_path: str
    """Empty where nothing answers: a worker of a span."""
    model: str
    deadline_s: int
    n_ctx: int | None = None
    gpu_layers: int | None = None
    """As many layers must be on GPUs, by its own log."""


@dataclass(frozen=True, eq=False)
class ServicePlan:
    """Everything about one service that its unit is rendered from; equal only to itself, so that it can be a key."""

    name: str
    unit: str
    """The name of its systemd unit."""
    runner: str
    model: str
    bind: str
    port: int
    settings: Mapping[str, Choice]
    memory: Mapping[str, Memory]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    gpus: tuple[GpuBudget, ...]
    health: Health
    stop_timeout_s: int
    model_path: str
    """The file or folder it reads on the host; empty where the runner keeps models in a store of its own."""
    model_bytes: int
    beside: tuple[ModelFacts, ...] = ()
    """Models that it needs beside that one, each a file."""
    api_key_file: str | None = None
    proof: tuple[str, ...] = ()
    """Command line of a start that only counts its memory and says so, where the runner can; it is ended there."""
    runner_why: str = ""
    """Why this runner: as written, or chosen for `runner: auto`."""
    after: tuple[str, ...] = ()
    """Units of this host that must be up before it starts."""
    shortfall: tuple[str, ...] = ()
    """Why it does not fit, each with the numbers; empty when it fits."""
    offers: Callable[[], Iterable[str]] = tuple
    """Gives lines with which it would fit the budget that it was planned with, least loss first; each costs a plan."""
    ways_to_fit: tuple[str, ...] = ()
    """Lines that make it fit beside the host's other services, each planned with; empty when it fits."""
    warnings: tuple[str, ...] = ()
    cpu_layers: bool = False
    """Whether layers or experts of it are computed on the CPU though it has GPUs."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Anything more the runner's template says."""
    host_facts: Mapping[str, str] = field(default_factory=dict)
    """Anything more the program on the host needs to know of it."""
    host_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that travel with its generation, by their path below the host's folder."""
    metrics: tuple[str, ...] = ()
    """Names under which Prometheus finds the figures that matter most, at /metrics."""
    part: Part | None = None
    """Which part of a service that spans hosts this is."""
    span_id: str = ""
    """Names all parts of the span as they were planned together, so that each part changes when one does."""

    @property
    def answers(self) -> bool:
        """Whether it answers requests: a worker of a span does not."""
        return self.part is None or self.part.is_head

    @property
    def does(self) -> str:
        """Say in a line what it does."""
        if self.part and self.part.rank:
            return f"serves {self.model} with {self.part.hosts[0]}, which answers"
        return f"serves {self.model} on {self.bind} port {self.port}"

    @property
    def url(self) -> str:
        """Where the host itself reaches it."""
        address = reachable(self.bind)
        return f"http://{f'[{address}]' if ':' in address else address}:{self.port}"

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the CPU works on every token, so that more threads make it faster."""
        return self.cpu_layers or not self.gpus

    @property
    def memory_max_mib(self) -> int:
        """The unit's MemoryMax: what the plan counts in main memory, a quarter more, and 256 MiB for the rest."""
        return math.ceil(self.memory["host"].total_mib * 1.25 + 256)

    @property
    def fits(self) -> bool:
        """Whether every device can hold it."""
        return not self.shortfall


def as_asked(value: Any) -> Choice | None:  # noqa: ANN401
    """Wrap a value of the inventory, which always wins; None where it says nothing."""
    return None if value is None else Choice(value, "as the inventory says")


def prefer_choice(prefer: Prefer | None) -> Choice:
    """Say what a service gives up last."""
    return as_asked(prefer) or Choice("speed", "layers on the GPU first, then context; context gives up layers for it")


def too_much(device: str, need_mib: float, free_mib: float) -> Iterator[str]:
    """Say by how much a device is too small, where it is."""
    if need_mib > free_mib:
        free = max(0.0, free_mib)  # what others need at least may be more than there is
        yield f"{device} needs {need_mib:.0f} MiB, {free:.0f} MiB are free: {need_mib - free:.0f} MiB too much"


def gpu_sets(allowed: tuple[GpuBudget, ...]) -> list[tuple[GpuBudget, ...]]:
    """List the sets of GPUs to try for one service: small sets first, of one size the emptiest first, all GPUs last.

    Every subset of up to six GPUs; of more only the emptiest ones, each set in the order of the host.
    """
    emptiest = sorted(allowed, key=lambda gpu: (-gpu.free_mib, gpu.index))
    if len(allowed) <= MOST_GPUS_TO_COMBINE:
        sets = [chosen for n in range(1, len(allowed) + 1) for chosen in itertools.combinations(emptiest, n)]
    else:
        sets = [(gpu,) for gpu in emptiest] + [tuple(emptiest[:n]) for n in range(2, len(allowed) + 1)]
    sets.sort(key=lambda gpus: (len(gpus), -sum(gpu.free_mib for gpu in gpus)))
    return [tuple(sorted(gpus, key=lambda gpu: gpu.index)) for gpus in sets]


def checkpoints(shape: ModelShape, *, swa_full: bool = False) -> Choice:
    """Bound llama.cpp's context checkpoints: only models that cannot rewind their context keep any, up to 32 a slot."""
    if (shape.has_swa and not swa_full) or shape.is_recurrent:
        return Choice(8, "this model cannot rewind its context; 32, the default, would take four times the RAM")
    return Choice(0, "this model can rewind its context without them")


def uncounted(request: Request, flags: AbstractSet[str]) -> Iterator[str]:
    """Warn of those of a service's flags that change what its runner allocates, and that no setting stands for."""
    found = [word for word in request.flags if _flag_of(word) in flags]
    if found:
        yield f"flags: {' '.join(found)} moves or takes memory that this plan does not count"


def credential_path(request: Request) -> str:
    """Give the file in which the service finds its API key: where systemd puts LoadCredential=api-key."""
    return f"/run/credentials/{request.unit}/api-key"


class Runner(Protocol):
    """One program that serves models."""

    @property
    def name(self) -> str:
        """What inventories call it."""

    @property
    def settings(self) -> type:
        """A dataclass of `schema.setting` fields: the keys its services may have beside the common ones."""

    @property
    def default_binary(self) -> str:
        """Where its program is, unless the inventory says otherwise."""

    @property
    def owned_flags(self) -> Mapping[str, str]:
        """Flags the plan sets itself, each with the inventory key to write instead."""

    @property
    def owned_env(self) -> Mapping[str, str]:
        """Environment variables that would change what was planned, each with what to write instead."""

    @property
    def sizes_itself(self) -> bool:
        """Whether it takes what is left of a GPU (vLLM), so that it is planned after the others."""

    @property
    def measures_gpu(self) -> bool:
        """Whether it looks at what is free on a GPU when it starts or loads, so that it must start after the others."""

    def plan(self, request: Request, budget: Budget) -> ServicePlan:
        """Choose the settings of a service within a budget, and say what it will take."""


def start_timeout_s(model_bytes: int, disk_mib_per_s: int, *, base_s: int) -> int:
    """Give the seconds a start may take: program start plus reading the model from its disk, to full 10 s."""
    return -(-(base_s + model_bytes // (max(1, disk_mib_per_s) * 2**20)) // 10) * 10


# Variables that say which GPUs there are, as `device_env` does: a service's own value would undo that.
DEVICE_ENV = {
    "CUDA_VISIBLE_DEVICES": "write gpus:",
    "CUDA_DEVICE_ORDER": "write gpus:",
    "HIP_VISIBLE_DEVICES": "write gpus:",
    "ROCR_VISIBLE_DEVICES": "write gpus:",
    "GGML_VK_VISIBLE_DEVICES": "write gpus:",
}


def device_env(gpus: tuple[GpuBudget, ...], host_has_gpus: bool) -> dict[str, str]:
    """Name the GPUs a process may see, by UUID where known: indices move when a card is added.

    The variables are those of the CUDA, ROCm and ggml Vulkan runtimes. A process that shall see none on a host
    that has some is told so in each of them.
    """
    if not host_has_gpus:
        return {}
    if not gpus:
        return {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}
    env: dict[str, str] = {}
    cuda = [g.gpu.uuid or str(g.api_index) for g in gpus if g.gpu.api == "cuda"]
    rocm = [str(g.api_index) for g in gpus if g.gpu.api == "rocm"]
    vulkan = [str(g.api_index) for g in gpus if g.gpu.api == "vulkan"]
    if cuda:
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(cuda)}
    if rocm:
        env["ROCR_VISIBLE_DEVICES"] = ",".join(rocm)
    if vulkan:
        env["GGML_VK_VISIBLE_DEVICES"] = ",".join(vulkan)
    return env
