"""The verb `export` of the command line."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import LAYOUTS, Quiet, RunArgument, Thresholds, Trust, file_options, named, path
from .verbs import app, out


def _also(help: str) -> Any:
    return typer.Option(help=f"Also write {help}", parser=path)


def _plain(name: str) -> str:
    """Return a name that every server and Kubernetes allow."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower())[:50].strip("-")
    return found if found[:1].isalpha() else f"model-{found}".strip("-")


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Default: RUN/model.onnx, or RUN/stages.", parser=path)] = None,
    layout: Annotated[str, named("One file, or a folder with one file per stage: {}.", *LAYOUTS)] = "nested",
    thresholds: Thresholds = "default",
    free: Annotated[str, typer.Option(help="What is free: batch, or none for one sample per call.")] = "batch",
    triton: Annotated[Path | None, _also("a model repository for Triton.")] = None,
    openvino_server: Annotated[Path | None, _also("a folder for OpenVINO Model Server.")] = None,
    docker: Annotated[Path | None, _also("a folder with a Dockerfile.")] = None,
    kserve: Annotated[Path | None, _also("an InferenceService for KServe, a YAML file.")] = None,
    image: Annotated[str | None, typer.Option(help="The image that KServe runs. Default: named after RUN.")] = None,
    trust: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write one ONNX file with the exits inside, or one per stage. Its outputs are first compared with PyTorch's."""
    from ..deploy import other_servers
    from ..runs.run import open_run
    from ..runs.steps import export_run

    options = file_options(layout, thresholds, free)
    name = _plain(run.absolute().name)
    folders = (
        (triton, other_servers.triton_repository),
        (openvino_server, other_servers.openvino_server),
        (docker, other_servers.docker_context),
    )
    for place in (triton, openvino_server, docker, kserve):
        if place is not None:
            other_servers.check_new(place)
    written = export_run(open_run(run, trust=trust), output, progress=not quiet, **options)
    out.print(f"wrote {written}", soft_wrap=True)
    for folder, write in folders:
        if folder is not None:
            out.print(f"wrote {write(written, folder, name=name)}", soft_wrap=True)
    if kserve is not None:
        other_servers.kserve(kserve, image=image or f"{name}:latest", name=name)
        out.print(f"wrote {kserve}", soft_wrap=True)
