"""`maestro estimate | cluster show | recipes`: what there is to work with, and what a run would take of it."""

from pathlib import Path
from typing import Annotated

import typer

from service.client_errors import Json
from service.console import JsonOption, ProjectOption, connect, print_fields, print_json, print_table
from service.job_commands import SpecArgument
from service.wording import age, duration, size


def estimate(
    spec: SpecArgument,
    num_images: Annotated[int | None, typer.Option(help="That it trains on, for the hours.", min=1)] = None,
    project: Annotated[str | None, typer.Option(help="Of an admin: where the job would belong.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a spec, and say what its run would take and whether the cluster has room for it. Nothing is submitted."""
    from service.spec_file import load_spec

    content = load_spec(spec, folder=Path.cwd())
    with connect() as client:
        found = client.estimate(content, num_images=num_images, project=project)
    if as_json:
        print_json(found)
        return
    print_fields(_estimated(found))


def _estimated(found: Json) -> list[tuple[str, str]]:
    memory, speed, hours, needs = (found[name] for name in ("memory_bytes_per_worker", "images_per_second", "hours", "needs"))
    return [
        ("parameters", f"{found['num_parameters'] / 1e6:.1f} M, of which {found['num_trained_parameters'] / 1e6:.1f} M are trained"),
        ("per image", f"{found['flops_per_image'] / 1e9:.2f} GFLOP"),
        ("memory", f"{size(memory)} for each worker" if memory is not None else "not known for GPUs"),
        ("speed", f"{speed:.0f} images/s on CPUs" if speed is not None else "not known for GPUs"),
        ("time", duration(hours * 3600) if hours is not None else "not known" + ("" if speed is None else "; give --num-images")),
        ("needs", f"{needs['num_cpus']:g} CPUs, {needs['num_gpus']:g} GPUs"),
        ("room", f"{found['fits']}: {found['detail']}"),
    ]


def show_cluster(project: ProjectOption = None, as_json: JsonOption = False) -> None:
    """Show machines, devices, and which runs hold them."""
    with connect() as client:
        found = client.cluster(project=project)
    if as_json:
        print_json(found)
        return
    total, used, others = found["total"], found["used"], found["other_runs"]
    typer.echo(
        f"{used['num_cpus']:g} of {total['num_cpus']:g} CPUs and {used['num_gpus']:g} of {total['num_gpus']:g} GPUs are used; "
        f"{found['num_waiting']} jobs wait"
    )
    rows = [("MACHINE", "HEAD", "CPUS", "GPUS")]
    rows += [
        (node["id"][:12], "yes" if node["is_head"] else "", f"{node['num_cpus']:g}", f"{node['num_gpus']:g}") for node in found["nodes"]
    ]
    print_table(rows)
    if found["runs"]:
        typer.echo()
        runs = [("JOB", "NAME", "ATTEMPT", "CPUS", "GPUS", "SINCE")]
        runs += [
            (run["job"], run["name"], str(run["attempt"]), f"{run['num_cpus']:g}", f"{run['num_gpus']:g}", age(run["since"]))
            for run in found["runs"]
        ]
        print_table(runs, shrinks=("NAME",), drops=("ATTEMPT",))
    if others["num_cpus"] or others["num_gpus"]:
        typer.echo(f"runs of other projects hold {others['num_cpus']:g} CPUs and {others['num_gpus']:g} GPUs")


def recipes(as_json: JsonOption = False) -> None:
    """Show the recipes: what a spec has where its user says nothing."""
    with connect() as client:
        found = client.recipes()
    if as_json:
        print_json(found)
        return
    import yaml

    for recipe in found:
        typer.echo(f"# {recipe['name']}, the default of {', '.join(recipe['default_for'])}")
        shown = {"kinds": recipe["kinds"], "by_size": recipe["by_size"]}
        typer.echo(yaml.safe_dump({recipe["name"]: shown}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100))


COMMANDS = (estimate, recipes)
