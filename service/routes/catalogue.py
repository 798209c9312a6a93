"""What there is to work with: recipes, the cluster, and what a run would take of it."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from mae_core.config import RunSpec
from mae_core.options import ARCH_SIZES
from mae_core.recipes import RecipeName, recipe_fields, recipe_for
from service import cluster, forecasts
from service.auth import USERS, Caller
from service.cluster import ClusterView, Devices
from service.forecasts import EstimateView
from service.projects import DEFAULT_PROJECT, ProjectName
from service.routes.answers import PROBLEMS, answer
from service.routes.state import DatabaseDep, RayDep, SettingsDep, StorageDep
from service.views import View

router = APIRouter(tags=["catalogue"], responses=PROBLEMS)
KINDS = ("pretrain", "probe", "finetune", "evaluate", "embed")
_USUAL = "base"  # the size of which a recipe's fields are told; others by what they have else


class Recipe(View):
    """What a spec has where its user says nothing: the sections of each kind, and what is other for some sizes of the model."""

    name: RecipeName
    default_for: list[str]
    kinds: dict[str, dict[str, Any]]
    by_size: dict[str, dict[str, dict[str, Any]]]


class RecipeList(View):
    recipes: list[Recipe]


@router.get("/recipes", response_model=RecipeList)
def list_recipes() -> Response:
    """The recipes, whole. A spec names one (`recipe`), or has the one that is the default for its model's size."""
    return answer(RecipeList(recipes=[_recipe("paper"), _recipe("small")]))


def _recipe(name: RecipeName) -> Recipe:
    usual = {kind: recipe_fields(name, kind=kind, size=_USUAL) for kind in KINDS}
    of_sizes = {size: {kind: recipe_fields(name, kind=kind, size=size) for kind in KINDS} for size in ARCH_SIZES}
    by_size = {size: {kind: fields for kind, fields in kinds.items() if fields != usual[kind]} for size, kinds in of_sizes.items()}
    return Recipe(
        name=name,
        default_for=[size for size in ARCH_SIZES if recipe_for(size) == name],
        kinds=usual,
        by_size={size: kinds for size, kinds in by_size.items() if kinds},
    )


@router.get("/cluster", response_model=ClusterView)
def get_cluster(
    caller: Annotated[Caller, Depends(USERS)],
    database: DatabaseDep,
    ray: RayDep,
    project: Annotated[ProjectName | None, Query(description="of an admin: whose runs are told one by one")] = None,
) -> Response:
    """Machines, devices, and which runs of the project hold them. 503 while Ray does not answer."""
    project = caller.project_of(project)
    has, nodes = ray.resources(), ray.nodes()
    with database.read() as session:
        runs, others = cluster.runs_of(session, project)
        waiting = cluster.num_waiting(session, project)
    return answer(
        ClusterView(
            total=Devices(num_cpus=has.num_cpus, num_gpus=has.num_gpus),
            used=Devices(num_cpus=has.used_cpus, num_gpus=has.used_gpus),
            nodes=nodes,
            runs=runs,
            other_runs=others,
            num_waiting=waiting,
        )
    )


@router.post("/estimates", response_model=EstimateView)
def estimate(
    spec: RunSpec,
    caller: Annotated[Caller, Depends(USERS)],
    database: DatabaseDep,
    storage: StorageDep,
    ray: RayDep,
    settings: SettingsDep,
    num_images: Annotated[int | None, Query(ge=1, le=10**12, description="that it trains on, for the hours; the digits' are known")] = None,
    project: Annotated[ProjectName | None, Query(description="of an admin: where the job would belong")] = None,
) -> Response:
    """Check a spec as if it was submitted, and say what its run would take, and whether the cluster has room for it. Nothing is kept."""
    place = caller.project_of(project) or DEFAULT_PROJECT
    return answer(forecasts.foretell(database, storage, ray, settings, spec, project=place, num_images=num_images))
