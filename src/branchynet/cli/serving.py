"""The verb `serve` of the command line."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .options import RUNTIMES, named, path
from .verbs import app


def _option(help: str, name: str | None = None) -> Any:
    return typer.Option(*([name] if name else []), help=help)


@app.command()
def serve(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A run, a file or folder that export wrote, or a folder of these.", parser=path
        ),
    ],
    host: Annotated[str | None, _option("Address to listen at. Default: 127.0.0.1, this machine alone.")] = None,
    port: Annotated[int | None, _option("Port; 0 takes a free one. Default: 8000.")] = None,
    grpc_port: Annotated[int | None, _option("Port of gRPC; 0 takes a free one. Default: no gRPC.")] = None,
    max_batch: Annotated[int | None, _option("Most samples in a batch. Default: 64.")] = None,
    batch_us: Annotated[float | None, _option("Most microseconds that a batch is expected to take.")] = None,
    max_wait_ms: Annotated[float | None, _option("How long samples wait for others. Default: 0.")] = None,
    queue: Annotated[int | None, _option("Most unanswered samples of a model. Default: 1024.")] = None,
    queue_ms: Annotated[float | None, _option("Most expected milliseconds in the queue. Default: 1000.")] = None,
    threads: Annotated[int | None, _option("Threads per operator. Default: 1.")] = None,
    runtime: Annotated[str | None, named("Runtime: {}.", *RUNTIMES, metavar="NAME")] = None,
    timeout_s: Annotated[float | None, _option("Deadline of a request in seconds. Default: 30.")] = None,
    max_body: Annotated[int | None, _option("Most bytes of a request. Default: 32 MiB.")] = None,
    client_s: Annotated[float | None, _option("How long a client may take to send. Default: 10 seconds.")] = None,
    connections: Annotated[int | None, _option("Most open connections. Default: 10000.")] = None,
    drain_s: Annotated[float | None, _option("How long to answer accepted requests at the end. Default: 30.")] = None,
    api_key_file: Annotated[str | None, _option("File with the API key that requests must send.")] = None,
    manage: Annotated[bool | None, typer.Option("--manage", help="Let clients load and unload models.")] = None,
    monitor: Annotated[bool | None, _option("Watch for drift where a record lies beside a model.")] = None,
    budget_us: Annotated[float | None, _option("Hold the mean cost per sample by moving the thresholds.")] = None,
    budget_limit: Annotated[str | None, _option("Policy with a promise that bounds the move.")] = None,
    certificate: Annotated[str | None, _option("Certificate for TLS.")] = None,
    private_key: Annotated[str | None, _option("Its private key.")] = None,
    ray: Annotated[bool | None, typer.Option("--ray", help="Run the stages on a Ray cluster.")] = None,
    min_replicas: Annotated[int | None, _option("On a cluster: least processes per stage. Default: 1.")] = None,
    max_replicas: Annotated[int | None, _option("On a cluster: most processes per stage. Default: 4.")] = None,
    cpus: Annotated[float | None, _option("On a cluster: CPUs of each process. Default: as many as threads.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these options.", parser=path)] = None,
) -> None:
    """Serve models over HTTP and gRPC until Ctrl-C."""
    given = {name: value for name, value in locals().items() if name not in ("model", "config")}
    from ..extras import needed_by

    with needed_by("branchynet serve", extra="serve"):
        from ..serve.server import serve as run
        from ..serve.settings import read_settings
    run(model, read_settings(config, **cast(Any, given)))
