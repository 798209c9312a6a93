"""What there is to work with: recipes, and the cluster."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from mae_core.options import ARCH_SIZES
from mae_core.recipes import RecipeName, recipe_fields, recipe_for
from service import cluster
from service.auth import USERS, Caller
from service.cluster import ClusterView, Devices
from service.projects import ProjectName
from service.routes.answers import PROBLEMS, answer
from service.routes.state import DatabaseDep, RayDep
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
