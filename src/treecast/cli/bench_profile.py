"""`treecast bench --profile`: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .bench_options import OF_A_MESH, check_options, mesh_settings
from .output import stderr, stdout, write_json
from .up import running_mesh, termination_as_interrupt

if TYPE_CHECKING:
    from rich.table import Table

    from treecast.bench.mesh_phases import MeshProfile
    from treecast.bench.phases import StepProfile
    from treecast.services.local import MeshSettings

MEANING = {
    "linears": "products with the layers' weights",
    "attention": "attention; writes the rows' keys and values",
    "head": "logits of the rows that are wanted",
    "other layers": "norms, rotations, activations, embedding",
    "Python": "packing rows and pages for the pass",
    "pick": "the law's picks",
    "walk": "the walk along the tree, less its picks",
    "KV": "committing the accepted path",
    "collect": "waiting: for trees, and between requests",
    "plan": "admitting, dividing rows",
    "forward": "the pass on the engine's thread",
    "commit": "KV, speculators, streams",
    "streams": "left over: gRPC, router, SDK, event loop",
}


def write_profile(context: typer.Context) -> None:
    """Time the engine's steps, then a whole mesh, and print both.

    Raises:
        InvalidRequest: an option that a profile does not heed.
    """
    from treecast.bench.machine import describe_machine
    from treecast.bench.phases import profile_steps
    from treecast.checkpoints import ensure_folder
    from treecast.engine.loading import LoadOptions, resolve_dtype
    from treecast.engine.openmp import spin_briefly

    check_options(context, "--profile", OF_A_MESH)
    asked = context.params
    spin_briefly()
    settings = mesh_settings(asked)
    folder = ensure_folder(settings.model)
    options = LoadOptions(
        resolve_dtype(settings.dtype, settings.device),
        settings.numerics,
        settings.device,
        settings.torch_threads,
        weights=settings.weights,
    )
    with termination_as_interrupt():
        stderr().print("timing the engine's steps")
        steps = profile_steps(folder, options)
        stderr().print("timing a whole mesh")
        mesh = _profile_mesh(settings, folder, asked)
    if asked["as_json"]:
        write_json({"machine": describe_machine(), "steps": steps, "mesh": mesh})
        return
    stdout().print(step_table(steps))
    for step in steps:
        stdout().print(operator_table(step))
    stdout().print(mesh_table(mesh))


def _profile_mesh(settings: MeshSettings, model: Path, asked: dict[str, Any]) -> MeshProfile:
    from treecast.bench.mesh_phases import profile_mesh
    from treecast.bench.prompts import DEFAULT_PROMPTS, prompts_for, read_prompts
    from treecast.bench.run import time_answer
    from treecast.client import Client
    from treecast.sampling.params import SpeculationParams

    prompts = prompts_for(model, read_prompts(asked["prompts"] or DEFAULT_PROMPTS, asked["limit"]))
    with (
        running_mesh(settings) as mesh,
        Client(mesh.router_address, tls=mesh.client_files) as client,
    ):

        def answer_all() -> None:
            for prompt in prompts:
                time_answer(client, prompt, asked["max_tokens"], SpeculationParams())

        time_answer(client, prompts[0], 8, SpeculationParams())
        return profile_mesh(mesh, answer_all)


def step_table(steps: Sequence[StepProfile]) -> Table:
    """A row per phase, a column per number of rows."""
    from rich.table import Table

    table = Table(title="A step of the engine, ms (share); means of the steps with middling times")
    table.add_column("phase")
    for step in steps:
        table.add_column(f"{step.rows} row{'s' * (step.rows > 1)}", justify="right")
    table.add_column("what")
    for phase in steps[0].phases_ms:
        shares = [_share(step.phases_ms[phase], step.wall_ms) for step in steps]
        table.add_row(phase, *shares, MEANING[phase])
    table.add_row("all", *(f"{step.wall_ms:.2f}" for step in steps), "by the clock on the wall")
    return table


def operator_table(step: StepProfile) -> Table:
    """What torch itself says of a step."""
    from rich.table import Table

    table = Table(title=f"torch's operators, {step.rows} rows (the profiler slows small ones)")
    table.add_column("operator")
    table.add_column("calls", justify="right")
    table.add_column("ms", justify="right")
    for operator in step.operators:
        table.add_row(operator.name, f"{operator.calls:.0f}", f"{operator.ms:.2f}")
    return table


def mesh_table(mesh: MeshProfile) -> Table:
    """A row per phase."""
    from rich.table import Table

    table = Table(title=f"A step of the mesh, ms (share); mean of {mesh.steps:.0f} steps")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("what")
    for phase, ms in mesh.phases_ms.items():
        table.add_row(phase, _share(ms, mesh.wall_ms), MEANING[phase])
    table.add_row("all", f"{mesh.wall_ms:.2f}", "as clients saw it")
    return table


def _share(ms: float, of_ms: float) -> str:
    return f"{ms:.2f} ({100 * ms / of_ms:.0f}%)"
