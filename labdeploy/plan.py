"""Fit the services of a host into what it has, together; pure, so that the same inventory gives the same plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from labdeploy import agreement
from labdeploy.errors import FitError, InventoryError, all_of
from labdeploy.machines import completed, differences
from labdeploy.runners import RUNNERS
from labdeploy.runners.base import Budget, GpuBudget, Request, ServicePlan, owned, require_known_flags
from labdeploy.schema import read_line

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from labdeploy.hardware import Gpu
    from labdeploy.inventory import Host, Service
    from labdeploy.models.book import ModelBook
    from labdeploy.models.model import ModelFacts
    from labdeploy.runners.base import Part


MOST_TO_PERMUTE = 3  # services of a host whose orders are all tried: 6
MOST_WAYS = 3
FEEDING_THREADS = 4  # of a model wholly on GPUs: with 4 it was faster than with 7 in llama.cpp's performance tips
LEAST_SELF_SIZED_CONTEXT_MIB = 1024  # what vLLM is left at least for its KV cache: 8192 tokens of an 8B model in bf16


@dataclass(frozen=True)
class HostPlan:
    """The plans of all services of a host, in the inventory's order, and what its devices hold."""

    host: Host
    services: tuple[ServicePlan, ...]
    warnings: tuple[str, ...] = ()
    """Where the inventory says of the hardware otherwise than the host did, so that the plan may be wrong."""

    @property
    def ram_usable_mib(self) -> int:
        """Main memory that plans may use."""
        return _usable(self.host.hardware.ram, self.host.reserve.ram)

    def vram_usable_mib(self, index: int) -> int:
        """Memory of a GPU that plans may use."""
        return _usable(self.host.hardware.gpus[index].vram, self.host.reserve.vram)

    @property
    def start_order(self) -> list[ServicePlan]:
        """The services in the order they start."""
        return sorted(self.services, key=_start_rank)

    @property
    def fits(self) -> bool:
        """Whether every service fits."""
        return all(service.fits for service in self.services)

    def planned_mib(self, device: str) -> float:
        """Sum what all services take on a device (`gpu0`, ... or `host`)."""
        return sum(service.memory[device].total_mib for service in self.services if device in service.memory)


def plan_hosts(hosts: Iterable[Host], book: ModelBook) -> list[HostPlan]:
    """Plan hosts. What spans several is planned on each alone, then once more with what all of them can.

    InventoryError where something cannot be served at all; it names everything of all hosts.
    """
    hosts = list(hosts)
    plans = all_of(functools.partial(plan_host, host, book) for host in hosts)
    if agreed := dict(agreement.disagreements(plans)):
        again = all_of(functools.partial(plan_host, agreement.with_settings(host, agreed), book) for host in hosts)
        plans = [agreement.with_reasons(plan, agreed) for plan in again]
    return agreement.with_ids(plans)


def plan_host(host: Host, book: ModelBook) -> HostPlan:
    """Plan the services of a host together.

    A service that does not fit still gets a plan, which says by how much and what would make it fit; `require_fit`
    refuses it. Hosts that are alike in all but name and address share their plans.
    """
    machine = book.machine(host.name)
    told = tuple(str(found) for found in differences(host, machine) if found.matters) if machine else ()
    host = completed(host, machine)
    known = _PLANNED.setdefault(book, {})
    alike = _what_plans_depend_on(host, book)
    if alike not in known:
        known[alike] = _plan_services(host, book)
    return HostPlan(host, known[alike], told)


_PLANNED: WeakKeyDictionary[ModelBook, dict[Hashable, tuple[ServicePlan, ...]]] = WeakKeyDictionary()


def _what_plans_depend_on(host: Host, book: ModelBook) -> Hashable:
    """Give all of a host that its plans depend on, for looking them up."""
    services = tuple(
        tuple(tuple(value.items()) if isinstance(value, dict) else value for value in vars(service).values())
        for service in host.services.values()
    )
    builds = tuple(
        (build.shown, build.devices, tuple(build.flags.items()))
        for runner in host.runners
        if (build := book.build(host, runner))
    )
    return host.hardware, host.reserve, host.models_dir, tuple(host.runners.items()), services, builds


def _plan_services(host: Host, book: ModelBook) -> tuple[ServicePlan, ...]:
    asked = all_of(functools.partial(_request, host, service, book) for service in host.services.values())
    requests = dict(zip(host.services, asked, strict=True))
    try:
        planned = _together(host, requests)
    except InventoryError:
        all_of(functools.partial(_plan, host, r, _budget(host, {}, requests)) for r in asked)
        raise
    misfits = [name for name, plan in planned.items() if not plan.fits]
    ways = {name: _ways_to_fit(host, requests, planned, name, book) for name in misfits}
    plans = {name: dataclasses.replace(plan, ways_to_fit=ways.get(name, ())) for name, plan in planned.items()}
    return tuple(plans[name] for name in host.services)


# --- sharing a host -----------------------------------------------------------------------------------------------


def _together(
    host: Host, requests: Mapping[str, Request], *, fitting_is_enough: bool = False
) -> dict[str, ServicePlan]:
    """Plan services in every order worth trying, and take the best outcome; the first order is mostly good enough.

    So the order of the inventory decides nothing. With more services than MOST_TO_PERMUTE only a few orders are tried.
    """
    best: dict[str, ServicePlan] = {}
    for order in _orders(requests):
        planned = _planned_in(order, host, requests)
        if not best or _worth(planned) > _worth(best):
            best = planned
        enough = (
            (plan.fits and fitting_is_enough) or _is_well_placed(host, plan, requests[n]) for n, plan in best.items()
        )
        if all(enough):
            break
    return _in_start_order(best, requests)


def _orders(requests: Mapping[str, Request]) -> Iterator[tuple[str, ...]]:
    """List orders to plan in: large models first, for they fit fewer places; what takes what is left comes last."""
    names = sorted(requests, key=lambda name: (*_planning_rank(requests[name]), name))
    few = len(names) <= MOST_TO_PERMUTE
    orders = itertools.permutations(names) if few else (tuple(names[i:] + names[:i]) for i in range(len(names)))
    for order in orders:
        last = [name for name in order if RUNNERS[requests[name].runner].sizes_itself]
        ordered = (*(name for name in order if name not in last), *last)
        if ordered == order or not few:
            yield ordered


def _planned_in(order: tuple[str, ...], host: Host, requests: Mapping[str, Request]) -> dict[str, ServicePlan]:
    """Plan services one after the other.

    First everyone's least useful need is found, then each gets that and its share of what is left over, so that what
    one does not need the next ones have.
    """
    least: dict[str, ServicePlan] = {}
    for name in order if len(order) > 1 else ():
        budget = dataclasses.replace(_budget(host, least, requests), least=True)
        least[name] = _least_needed(_plan(host, requests[name], budget))
    threads = _threads(host, requests, least)
    planned: dict[str, ServicePlan] = {}
    for name in order:
        later = {other: least[other] for other in order[len(planned) + 1 :] if least[other].fits}
        budget = _budget(host, {**planned, **later}, requests)
        shared = _share(budget, least[name], list(later.values())) if later else budget
        n, why = threads[name]
        planned[name] = _plan(host, requests[name], dataclasses.replace(shared, threads=n, threads_why=why))
    return planned


def _worth(planned: Mapping[str, ServicePlan]) -> tuple[int, float, int]:
    """Compare outcomes: how many fit, then how much of the models is on GPUs, then how much context they hold."""
    gpu_mib = sum(m.model_mib for plan in planned.values() for device, m in plan.memory.items() if device != "host")
    return sum(plan.fits for plan in planned.values()), round(gpu_mib), sum(map(context_tokens, planned.values()))


def context_tokens(plan: ServicePlan) -> int:
    """Give the context that a plan has, whatever its runner calls it."""
    keys = ("ctx_size", "max_model_len", "context_length")
    return next((int(plan.settings[key].value) for key in keys if key in plan.settings), 0)


def _is_well_placed(host: Host, plan: ServicePlan, request: Request) -> bool:
    """Say whether no other order could place a service better: all on GPUs, or as the inventory says."""
    pinned = any(getattr(request.settings, key, None) is not None for key in ("gpus", "gpu_layers", "n_cpu_moe"))
    return plan.fits and (not plan.computes_on_cpu or pinned or not host.hardware.gpus)


def _threads(
    host: Host, requests: Mapping[str, Request], least: Mapping[str, ServicePlan]
) -> dict[str, tuple[int, str]]:
    """Share the cores out: a service that is wholly on GPUs needs few, those that compute on the CPU get the rest.

    What the inventory says is taken off first. The threads of all services together are no more than the cores,
    while there are as many cores as services.
    """
    cpu = host.hardware.cpu
    cores, n = cpu.compute_cores, len(requests)
    told = f"{cores} {'physical' if cores == cpu.cores else 'performance'} core{'s' if cores > 1 else ''}"
    shared = f"{told}, shared by {n} services" if n > 1 else told
    asked = {name: getattr(request.settings, "threads", None) or 0 for name, request in requests.items()}
    free = [name for name in requests if not asked[name]]
    rest = cores - sum(asked.values())
    even = max(1, rest // max(1, len(free)))
    fed = [name for name in free if name in least and not least[name].computes_on_cpu]
    if not fed or len(fed) == len(free):
        return dict.fromkeys(requests, (even, shared))
    few = min(FEEDING_THREADS, even)
    others = max(1, (rest - few * len(fed)) // (len(free) - len(fed)))
    on_cpu = (others, f"{shared}; those wholly on GPUs get {few}")
    on_gpu = (few, f"few feed a GPU that does all the work; {shared}")
    return {name: on_gpu if name in fed else on_cpu for name in requests}


def _ways_to_fit(
    host: Host, requests: Mapping[str, Request], planned: Mapping[str, ServicePlan], name: str, book: ModelBook
) -> tuple[str, ...]:
    """Give up to three lines that make a service fit when written, least loss first: each was planned with.

    The runner offers lines in the order of what is lost; a smaller model of the inventory comes last.
    """
    offered = ((line, _with_line(requests[name], line)) for line in planned[name].offers())
    found: list[str] = []
    for line, changed in itertools.chain(offered, _smaller_models(host, requests[name], book)):
        if len(found) == MOST_WAYS or any(known.startswith("model: ") for known in found):
            break
        if line not in found and _helps(host, requests, planned, changed):
            found.append(line)
    return tuple(found)


def _with_line(request: Request, line: str) -> Request:
    """Change a request as a line written into its service would."""
    changes = read_line(RUNNERS[request.runner].settings, line)
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, **changes))


def _smaller_models(host: Host, request: Request, book: ModelBook) -> Iterator[tuple[str, Request]]:
    """Offer the inventory's models of the same format that are smaller, the largest first."""
    others = [facts for facts in book.known(host.models_dir or "") if facts.format == request.model.format]
    smaller = [facts for facts in others if facts.size_bytes < request.model.size_bytes]
    for facts in sorted(smaller, key=lambda facts: (-facts.size_bytes, facts.name)):
        yield f"model: {facts.name}", dataclasses.replace(request, model=facts)


def _helps(host: Host, requests: Mapping[str, Request], planned: Mapping[str, ServicePlan], changed: Request) -> bool:
    """Say whether a changed service fits, and takes no other's place."""
    try:
        after = _together(host, {**requests, changed.name: changed}, fitting_is_enough=True)
    except InventoryError:
        return False
    return after[changed.name].fits and all(plan.fits or not planned[name].fits for name, plan in after.items())


def _plan(host: Host, request: Request, budget: Budget) -> ServicePlan:
    try:
        plan = RUNNERS[request.runner].plan(request, budget)
    except InventoryError as error:
        raise InventoryError(error.what, where=f"{host.name}: {request.name}", hint=error.hint) from None
    return dataclasses.replace(plan, runner_why=request.runner_why)


def _least_needed(plan: ServicePlan) -> ServicePlan:
    """Cut the context of a service that takes what is left down to a useful least."""
    if not RUNNERS[plan.runner].sizes_itself:
        return plan
    parts = {
        device: dataclasses.replace(part, context_mib=min(part.context_mib, LEAST_SELF_SIZED_CONTEXT_MIB))
        for device, part in plan.memory.items()
    }
    return dataclasses.replace(plan, memory=parts)


def _share(budget: Budget, least: ServicePlan, later: list[ServicePlan]) -> Budget:
    """Leave a service, on each device, its least need and an equal share of what is left for those still to plan."""

    def allowed(device: str, free_mib: float) -> float:
        own = least.memory[device].total_mib if device in least.memory else 0.0
        waiting = sum(device in other.memory for other in later)
        return min(free_mib, own + max(0.0, free_mib - own) / (waiting + 1))

    gpus = tuple(dataclasses.replace(gpu, free_mib=allowed(gpu.id, gpu.free_mib)) for gpu in budget.gpus)
    return dataclasses.replace(budget, gpus=gpus, ram_mib=allowed("host", budget.ram_mib))


def _planning_rank(request: Request) -> tuple[bool, bool, int]:
    """Order services for planning: what is tied to a GPU first, the large before the small, vLLM last."""
    tied = any(getattr(request.settings, key, None) is not None for key in ("gpus", "gpu_layers"))
    return RUNNERS[request.runner].sizes_itself, not tied, -request.model.size_bytes


def require_fit(plans: Iterable[HostPlan]) -> None:
    """Raise one FitError that names every service that does not fit, by how much, and what would make it fit."""
    broken = [(p.host.name, service) for p in plans for service in p.services if not service.fits]
    if not broken:
        return
    what = "\n".join(f"{host}: {s.name}: does not fit: {'; '.join(s.shortfall)}" for host, s in broken)
    host, first = broken[0]
    ways = " or ".join(f"`{way}`" for way in first.ways_to_fit) or "a smaller model, or fewer services on this host"
    raise FitError(what, hint=f"hosts.{host}.services.{first.name}: {ways}")


def _usable(total: int, reserve: int | None) -> int:
    return max(0, total - (reserve or 0))


def _request(host: Host, service: Service, book: ModelBook) -> Request:
    """Join a service with its model, its runner's program and, where the runner is `auto`, the choice of one."""
    model = _served(host, service, book)
    runner, why = choose_runner(service, model)
    beside = {key: name for key, name in service.models.items() if key != "model"}
    request = Request(
        name=service.name,
        unit=service.unit or "",
        runner=runner,
        runner_why=why,
        model=model,
        binary=host.runners.get(runner, RUNNERS[runner].default_binary),
        bind=service.bind,
        port=service.port,
        settings=service.settings or RUNNERS[runner].settings(),
        flags=service.flags,
        env=service.env,
        api_key_file=service.api_key_file,
        build=book.build(host, runner),
        prefer=service.prefer,
        part=service.part,
        beside={key: book.facts(name, host.models_dir or "") for key, name in beside.items()},
    )
    if service.runner == "auto":  # else reading the inventory saw it
        for key, what in owned(service.flags, service.env, RUNNERS[runner]):
            raise InventoryError(f"{host.name}: {service.name}: {key}: {what}", hint=f"write runner: {runner} too")
    require_known_flags(request, host.name)
    return request


def _served(host: Host, service: Service, book: ModelBook) -> ModelFacts:
    try:
        return book.served(service.model, host.models_dir or "")
    except InventoryError as error:
        raise InventoryError(error.what, where=error.where or f"{host.name}: {service.name}", hint=error.hint) from None


def choose_runner(service: Service, model: ModelFacts) -> tuple[str, str]:
    """Pick the runner of a service and say why: as written, else by what the model is and what it is for."""
    if service.runner != "auto":
        return service.runner, "as the inventory says"
    if model.format == "safetensors":
        return "vllm", "only vLLM serves a Hugging Face snapshot folder"
    if service.purpose == "experiment":
        return "ollama", "for an experiment: whatever speaks to Ollama can use it"
    if service.purpose == "throughput":
        return "llama-server", "vLLM would be the choice for throughput, but it does not load GGUF files"
    return "llama-server", "for a service: one model, every setting fixed, the least that can go wrong"


def _budget(host: Host, taken: Mapping[str, ServicePlan], requests: Mapping[str, Request]) -> Budget:
    """Give what is left of a host for a service after what others have taken."""
    waiting = [r for n, r in requests.items() if n not in taken and RUNNERS[r.runner].sizes_itself]
    hardware = host.hardware
    return Budget(
        gpus=tuple(
            GpuBudget(
                index=i,
                api_index=sum(other.api == gpu.api for other in hardware.gpus[:i]),
                gpu=gpu,
                total_mib=gpu.vram,
                free_mib=_usable(gpu.vram, host.reserve.vram) - _taken(taken.values(), f"gpu{i}"),
            )
            for i, gpu in enumerate(hardware.gpus)
        ),
        ram_mib=_usable(hardware.ram, host.reserve.ram) - _taken(taken.values(), "host"),
        threads=hardware.cpu.compute_cores,
        threads_why="not shared yet",
        cpu_features=hardware.cpu.known_features,
        disk_mib_per_s=hardware.disk_mib_per_s,
        gpu_sharers=max(1, len(waiting)),
    )


def _taken(planned: Iterable[ServicePlan], device: str) -> float:
    """Sum what services take of a device; one that does not fit will not run, and keeps no other from fitting."""
    return sum(service.memory[device].total_mib for service in planned if device in service.memory and service.fits)


def _in_start_order(planned: Mapping[str, ServicePlan], requests: Mapping[str, Request]) -> dict[str, ServicePlan]:
    """Set the start order of services that measure a shared GPU: each after whatever else is on it.

    vLLM sizes its cache as "free before minus free after", and Ollama's llama-server puts on a GPU what fits when it
    loads: so fixed services come first, then Ollama, then vLLM, which takes what is left.
    """
    ordered: dict[str, ServicePlan] = {}
    for name in sorted(requests, key=lambda name: _start_rank(planned[name])):
        service = planned[name]
        mine = {gpu.id for gpu in service.gpus}
        others = [other.unit for other in ordered.values() if mine & {gpu.id for gpu in other.gpus}]
        after = tuple(others) if RUNNERS[service.runner].measures_gpu else ()
        ordered[name] = dataclasses.replace(service, after=after)
    return ordered


def _start_rank(service: ServicePlan) -> tuple[bool, bool]:
    runner = RUNNERS[service.runner]
    return runner.sizes_itself, runner.measures_gpu


# --- as JSON ----------------------------------------------------------------------------------------------------


def to_json(plan: HostPlan) -> dict[str, Any]:
    """Give a host's plan as `plan --json` reports it and as each generation stores it."""
    return {
        "devices": [_device_json(plan, i, gpu) for i, gpu in enumerate(plan.host.hardware.gpus)],
        "ram": {
            "total_mib": plan.host.hardware.ram,
            "usable_mib": plan.ram_usable_mib,
            "planned_mib": math.ceil(plan.planned_mib("host")),
        },
        "services": {service.name: _service_json(service) for service in plan.services},
    }


def _device_json(plan: HostPlan, index: int, gpu: Gpu) -> dict[str, Any]:
    return {
        "id": f"gpu{index}",
        "name": gpu.name,
        "total_mib": gpu.vram,
        "usable_mib": plan.vram_usable_mib(index),
        "planned_mib": math.ceil(plan.planned_mib(f"gpu{index}")),
    }


def _service_json(service: ServicePlan) -> dict[str, Any]:
    return {
        "runner": service.runner,
        "runner_why": service.runner_why,
        "model": service.model,
        "unit": service.unit,
        "fits": service.fits,
        "shortfall": list(service.shortfall),
        "ways_to_fit": list(service.ways_to_fit),
        "warnings": list(service.warnings),
        "settings": {key: {"value": choice.value, "why": choice.why} for key, choice in service.settings.items()},
        "memory": {device: memory_json(device, part) for device, part in service.memory.items()},
        "memory_max_mib": service.memory_max_mib,
        "argv": list(service.argv),
        "env": dict(service.env),
        **({"metrics": {"url": f"{service.url}/metrics", "names": list(service.metrics)}} if service.metrics else {}),
        **({"span": _span_json(service.part, service.span_id)} if service.part else {}),
    }


def _span_json(part: Part, span_id: str) -> dict[str, Any]:
    return {"id": span_id, "rank": part.rank, "hosts": list(part.hosts)}


def memory_json(device: str, part: Any) -> dict[str, float]:  # noqa: ANN401
    """Give what a service takes of a device, in MiB, part by part."""
    keys = [field.name for field in dataclasses.fields(part)]
    if device != "host":
        keys = [key for key in keys if key not in ("repack_mib", "cache_mib")]
    told = {key: round(getattr(part, key), 2) for key in keys}
    return {key: mib for key, mib in told.items() if mib or key not in ("mmproj_mib", "draft_mib")}


def changes(before: HostPlan, after: HostPlan) -> dict[str, Any]:
    """Compare two plans of a host: settings by service, and planned memory by device, in MiB, before and after."""
    old, new = to_json(before), to_json(after)
    devices = {device["id"]: device["planned_mib"] for device in new["devices"]} | {"ram": new["ram"]["planned_mib"]}
    was = {device["id"]: device["planned_mib"] for device in old["devices"]} | {"ram": old["ram"]["planned_mib"]}
    return {
        "services": setting_changes(old, new),
        "planned_mib": {name: [was.get(name, 0), mib] for name, mib in devices.items() if mib != was.get(name, 0)},
    }


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name per service the settings that differ between two plans: `ctx_size 8192 -> 32768`."""
    changes: dict[str, list[str]] = {}
    old_services, new_services = before.get("services", {}), after.get("services", {})
    for name, new in new_services.items():
        old = old_services.get(name)
        if old is None:
            changes[name] = ["new"]
            continue
        old_settings, new_settings = old.get("settings", {}), new.get("settings", {})
        pairs = {
            key: (old_settings.get(key, {}).get("value"), new_settings.get(key, {}).get("value"))
            for key in {**old_settings, **new_settings}
        }
        pairs |= {key: (old.get(key), new.get(key)) for key in ("runner", "model")}
        found = [f"{key} {was} -> {now}" for key, (was, now) in pairs.items() if was != now]
        if found:
            changes[name] = found
    for name in old_services:
        if name not in new_services:
            changes[name] = ["removed"]
    return changes
