"""Fit the services of a host into what it has, together; pure, so that the same inventory gives the same plan."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labdeploy.errors import FitError, InventoryError
from labdeploy.runners import RUNNERS
from labdeploy.runners.base import Budget, GpuBudget, Request, ServicePlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from labdeploy.hardware import Gpu
    from labdeploy.inventory import Host, Service
    from labdeploy.models.book import ModelBook
    from labdeploy.models.model import ModelFacts


LEAST_SELF_SIZED_CONTEXT_MIB = 1024  # what vLLM is left at least for its KV cache: 8192 tokens of an 8B model in bf16


@dataclass(frozen=True)
class HostPlan:
    """The plans of all services of a host, in the inventory's order, and what its devices hold."""

    host: Host
    services: tuple[ServicePlan, ...]

    @property
    def ram_usable_mib(self) -> int:
        """Main memory that plans may use."""
        return _usable(self.host.hardware.ram, self.host.reserve.ram)

    def vram_usable_mib(self, index: int) -> int:
        """Memory of a GPU that plans may use."""
        return _usable(self.host.hardware.gpus[index].vram, self.host.reserve.vram)

    @property
    def fits(self) -> bool:
        """Whether every service fits."""
        return all(service.fits for service in self.services)

    def planned_mib(self, device: str) -> float:
        """Sum what all services take on a device (`gpu0`, ... or `host`)."""
        return sum(service.memory[device].total_mib for service in self.services if device in service.memory)


def plan_host(host: Host, book: ModelBook) -> HostPlan:
    """Plan the services of a host together.

    First everyone's least useful need is found, then each gets that and its share of what is left over: in the order
    of `_planning_rank`, so that what one does not need the next ones have. A service that does not fit still gets a
    plan, which says by how much; `require_fit` refuses it.
    """
    requests = {name: _request(host, service, book) for name, service in host.services.items()}
    order = sorted(requests, key=lambda name: _planning_rank(requests[name]))
    least: dict[str, ServicePlan] = {}
    for name in order if len(order) > 1 else ():
        budget = dataclasses.replace(_budget(host, least, requests), least=True)
        least[name] = _least_needed(_plan(host, requests[name], budget))
    planned: dict[str, ServicePlan] = {}
    for name in order:
        later = {other: least[other] for other in order[len(planned) + 1 :]}
        budget = _budget(host, {**planned, **later}, requests)
        shared = _share(budget, least[name], list(later.values())) if later else budget
        planned[name] = _plan(host, requests[name], shared)
    return HostPlan(host, tuple(_in_start_order(host, planned)))


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
        return own + max(0.0, free_mib - own) / (waiting + 1)

    gpus = tuple(dataclasses.replace(gpu, free_mib=allowed(gpu.id, gpu.free_mib)) for gpu in budget.gpus)
    return dataclasses.replace(budget, gpus=gpus, ram_mib=allowed("host", budget.ram_mib))


def _planning_rank(request: Request) -> tuple[bool, bool]:
    """Order services for planning: fixed sizes first, then what is tied to a GPU, then what takes what is left."""
    tied = any(getattr(request.settings, key, None) is not None for key in ("gpus", "gpu_layers"))
    return RUNNERS[request.runner].sizes_itself, not tied


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
    model = book.facts(service.model, host.models_dir or "")
    runner, why = choose_runner(service, model)
    return Request(
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
    )


def choose_runner(service: Service, model: ModelFacts) -> tuple[str, str]:
    """Pick the runner of a service and say why: as written, else by what the model is and what it is for."""
    if service.runner != "auto":
        return service.runner, "as the inventory says"
    if model.format == "safetensors":
        return "vllm", "only vLLM serves a Hugging Face snapshot folder"
    if service.purpose == "experiment":
        return "ollama", "for an experiment: models come and go without a push"
    if service.purpose == "throughput":
        return "llama-server", "vLLM would be the choice for throughput, but it does not load GGUF files"
    return "llama-server", "for a service: one model, every setting fixed, the least that can go wrong"


def _budget(host: Host, taken: Mapping[str, ServicePlan], requests: Mapping[str, Request]) -> Budget:
    """Give what is left of a host for a service after what others have taken."""
    n_services = len(requests)
    waiting = [r for n, r in requests.items() if n not in taken and RUNNERS[r.runner].sizes_itself]
    hardware = host.hardware
    cores = hardware.cpu.compute_cores
    threads = max(1, cores // max(1, n_services))
    kind = "physical" if cores == hardware.cpu.cores else "performance"
    share = f", shared by {n_services} services" if n_services > 1 else ""
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
        threads=threads,
        threads_why=f"{cores} {kind} cores{share}",
        cpu_features=hardware.cpu.features,
        disk_mib_per_s=hardware.disk_read,
        gpu_sharers=max(1, len(waiting)),
    )


def _taken(planned: Iterable[ServicePlan], device: str) -> float:
    return sum(service.memory[device].total_mib for service in planned if device in service.memory)


def _in_start_order(host: Host, planned: Mapping[str, ServicePlan]) -> Iterable[ServicePlan]:
    """Order services that measure a shared GPU while they start: each after those before it on that GPU.

    vLLM sizes its cache as "free before minus free after", so that two starting at once each see the other's.
    """
    before: list[ServicePlan] = []
    for name in host.services:
        service = planned[name]
        mine = {gpu.id for gpu in service.gpus}
        if mine and RUNNERS[service.runner].sizes_itself:
            others = tuple(other.unit for other in before if mine & {gpu.id for gpu in other.gpus})
            service = dataclasses.replace(service, after=others)
        before.append(service)
        yield service


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
        "memory": {device: _memory_json(device, part) for device, part in service.memory.items()},
        "memory_max_mib": service.memory_max_mib,
        "argv": list(service.argv),
        "env": dict(service.env),
    }


def _memory_json(device: str, part: Any) -> dict[str, float]:  # noqa: ANN401
    keys = [field.name for field in dataclasses.fields(part)]
    if device != "host":
        keys = [key for key in keys if key not in ("repack_mib", "cache_mib")]
    return {key: round(getattr(part, key), 2) for key in keys}


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
