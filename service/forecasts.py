"""What a run would take, before it is submitted: `mae_core.estimates` over the spec as a job would have it, against the cluster."""

from typing import Any, Literal

from mae_core import estimates
from mae_core.config import EmbedSpec, EvaluateSpec, Spec
from mae_core.options import DIGITS
from service import jobs
from service.admission import Needs
from service.cluster import Devices
from service.db import Database
from service.errors import Invalid, RayUnreachable
from service.ray_jobs import RayJobs
from service.settings import Settings
from service.storage import Storage
from service.views import View

NUM_DIGITS = 1797

Room = Literal["now", "later", "never", "unknown"]


class EstimateView(View):
    """Parameters are exact (without a classifier's head); memory and speed are of CPUs, from a model that was measured; null: not known.

    `needs` is what the run needs to start. `fits` in this cluster: now; later, when others have ended; never, as it is; or unknown.
    """

    spec: dict[str, Any]
    num_parameters: int
    num_trained_parameters: int
    flops_per_image: float
    memory_bytes_per_worker: float | None
    images_per_second: float | None
    hours: float | None
    needs: Devices
    fits: Room
    detail: str


def foretell(
    database: Database, storage: Storage, ray: RayJobs, settings: Settings, spec: Spec, *, project: str, num_images: int | None
) -> EstimateView:
    """Invalid as a submission would be, and where neither spec nor encoder says the model."""
    resolved = jobs.resolve(database, storage, settings, spec, project=project)
    if resolved.model is None:
        raise Invalid("model", "neither the spec nor its encoder says it here; give model (arch and image_size)")
    found = estimates.estimate(resolved, resolved.model)
    fits, detail = _room(ray, resolved)
    resources, fewest = resolved.resources, resolved.worker_counts()[0]
    return EstimateView(
        spec=resolved.model_dump(mode="json"),
        num_parameters=found.num_parameters,
        num_trained_parameters=found.num_trained_parameters,
        flops_per_image=found.flops_per_image,
        memory_bytes_per_worker=found.memory_bytes_per_worker,
        images_per_second=found.images_per_second,
        hours=_hours(resolved, found.images_per_second, num_images),
        needs=Devices(num_cpus=fewest * resources.cpus_per_worker, num_gpus=fewest * resources.gpus_per_worker),
        fits=fits,
        detail=detail,
    )


def _hours(spec: Spec, images_per_second: float | None, num_images: int | None) -> float | None:
    """Of all steps; start, decoding that does not keep up, evaluations and exports come to that."""
    if num_images is None and spec.data.source == DIGITS:
        num_images = int(NUM_DIGITS * (1 - spec.data.validation_fraction))
    if num_images is None or images_per_second is None:
        return None
    if isinstance(spec, EvaluateSpec | EmbedSpec) or getattr(spec.data, "transform", True) is None:
        epochs = 1  # images are encoded once
    else:
        epochs = spec.optim.epochs
    return epochs * num_images / images_per_second / 3600


def _room(ray: RayJobs, spec: Spec) -> tuple[Room, str]:
    """Whether there is room for the fewest workers: each on one machine."""
    resources, fewest = spec.resources, spec.worker_counts()[0]
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    try:
        nodes, has = ray.nodes(), ray.resources()
    except RayUnreachable as error:
        return "unknown", error.detail
    places = sum(int(min(node.num_cpus / cpus, node.num_gpus / gpus if gpus else node.num_cpus)) for node in nodes)
    each = f"{cpus} CPUs" + (f" and {gpus} GPU" if gpus else "")
    if places < fewest:
        return "never", f"{fewest} workers with {each} each; the cluster's machines have room for {places}"
    free = Needs(has.num_cpus, has.num_gpus).less(Needs(has.used_cpus, has.used_gpus))
    needs = Needs(fewest * cpus, fewest * gpus)
    detail = f"{fewest} workers with {each} each; free are {free.num_cpus:g} CPUs and {free.num_gpus:g} GPUs"
    return ("now" if needs.fits(free) else "later"), detail
