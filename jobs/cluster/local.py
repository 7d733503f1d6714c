"""The commands of `pointsman cluster`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.endings import user_errors

if TYPE_CHECKING:
    from cluster.local_nodes import LocalCluster


def up(
    nodes: Annotated[int, typer.Option(help="Number of nodes, the head included.", min=1, max=64)] = 3,
    cpus: Annotated[int, typer.Option(help="CPUs of each node, made up where the machine has fewer.", min=1)] = 2,
    gpus: Annotated[int, typer.Option(help="Made-up GPUs of each node: to be booked, not to compute on.", min=0)] = 0,
) -> None:
    """Start a Ray cluster of several nodes on this machine, on loopback; it stays until `pointsman cluster down`."""
    with user_errors():
        from cluster.local_nodes import LocalNode, start

        typer.echo(f"starting {nodes} nodes, some seconds each ...")
        _show(start([LocalNode(cpus, gpus)] * nodes))


def status() -> None:
    """Show the cluster that `up` has started; exit code 1 if there is none."""
    with user_errors():
        from cluster.local_nodes import running

        if (cluster := running()) is None:
            typer.echo("no cluster runs; start one with `pointsman cluster up`")
            sys.exit(1)
        _show(cluster)


def down() -> None:
    """End the cluster that `up` has started, and nothing else."""
    with user_errors():
        from cluster.local_nodes import stop

        cluster = stop()
        typer.echo("no cluster runs" if cluster is None else f"ended {len(cluster.nodes)} nodes")


def _show(cluster: "LocalCluster") -> None:
    cpus, gpus = (sum(getattr(node, name) for node in cluster.nodes) for name in ("cpus", "gpus"))
    lost = f"; {cluster.lost} lost, which does not come back" if cluster.lost else ""
    typer.echo(
        f"{len(cluster.nodes)} nodes with {cpus} CPUs and {gpus} made-up GPUs together{lost}, logs in {cluster.folder}"
    )
    typer.echo(f"  pointsman doctor CONFIG --address {cluster.dashboard}   # or learn, add, predict, ...: a job on it")
    typer.echo(f"  RAY_ADDRESS={cluster.address} pointsman learn CONFIG   # this process as the driver")
    typer.echo("  pointsman cluster down")
