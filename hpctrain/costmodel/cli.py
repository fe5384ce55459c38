"""The command `hpctrain advise`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpctrain.costmodel.advise import Adviser


def command(config_of: Callable[[dict[str, Any]], Any]) -> click.Command:
    """Make the command `hpctrain advise`.

    Args:
        config_of: The resolved configuration, by the parameters of `hpctrain train`.
    """

    @click.command()
    @click.argument("task", required=False)
    @click.option("--nodes", type=click.IntRange(1), required=True, help="The most to look at.")
    @click.option(
        "--ranks-per-node", type=click.IntRange(1), default=1, show_default=True,
        help="Usually one a GPU.",
    )  # fmt: skip
    @click.option(
        "--network", "network_text", required=True, metavar="RATE[,KEY=VALUE...]",
        help="25Gbit[,latency=20us][,share=0.9][,local=12GB][,local-latency=2us]",
    )  # fmt: skip
    @click.option(
        "--strategy", "specs", multiple=True, metavar="NAME",
        help="Instead of those that hpctrain has; repeatable. ps:4+ssp:3, horovod+fp16, ...",
    )  # fmt: skip
    @click.option("--batch-size", metavar="N", help="Of a rank. Default: the task's.")
    @click.option("--data", "data_path", metavar="DIR", help="Shard set, as for training.")
    @click.option(
        "--speedup", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
        help="How many times as fast a rank there computes.",
    )  # fmt: skip
    @click.option(
        "--seconds", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True,
        help="To measure for.",
    )  # fmt: skip
    @click.option(
        "--fit", "fit_path", type=click.Path(path_type=Path), metavar="FILE",
        help="fit.json of `python -m benchmarks.fit`, instead of assumptions.",
    )  # fmt: skip
    @click.option(
        "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
        help="Write everything there, too.",
    )  # fmt: skip
    @click.option("--config", "config_path", metavar="FILE", help="TOML file of keys.")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key.")
    def advise(
        nodes: int,
        ranks_per_node: int,
        network_text: str,
        specs: tuple[str, ...],
        speedup: float,
        seconds: float,
        fit_path: Path | None,
        json_path: Path | None,
        **flags: Any,
    ) -> None:
        """Predict how fast TASK would train on a cluster that is not here, by each strategy.

        TASK is measured here, in one process and a few seconds; everything else is a model
        (docs/model.md). Every rank is taken to have the batch that was measured.

        \b
          hpctrain advise digits --nodes 8 --network 10Gbit
          hpctrain advise my_task.py --data shards/ --nodes 32 --ranks-per-node 4 \\
              --network 25Gbit,latency=10us --speedup 20
        """
        from hpctrain.costmodel.advise import Adviser, assumptions, read_fit, row_of, sweep
        from hpctrain.costmodel.inputs import Network, network_of
        from hpctrain.costmodel.measure import codec, measure
        from hpctrain.costmodel.strategies import Compression, strategy_of
        from hpctrain.files import write_text

        for spec in specs:
            strategy_of(spec, lambda name: Compression(name))  # mistakes are told at once
        network = network_of(network_text, Network(1.0))
        fits = read_fit(fit_path) if fit_path else {}
        config = config_of(flags)
        measured = measure(config, seconds, ranks_per_node)
        default = Network(1.0, local_bytes_per_second=measured.copy_bytes_per_second)
        network = network_of(network_text, default)
        adviser = Adviser(
            measured,
            network,
            assumptions(measured, network, network_text),
            fits,
            ranks_per_node=ranks_per_node,
            speedup=speedup,
        )
        coding = cache(lambda name: codec(name, measured.parameter_bytes))
        predictions = {
            count: adviser.named(count, specs, coding) if specs else adviser.usual(count, coding)
            for count in sweep(nodes)
        }
        _introduce(adviser, config.task)
        _table([row_of(each) for some in predictions.values() for each in some])
        verdict = adviser.verdict(predictions[nodes]) if predictions[nodes] else "nothing fits."
        click.echo(verdict)
        if json_path is not None:
            document = {
                "schema": 1,
                "task": config.task,
                "measured": measured._asdict(),
                "speedup": speedup,
                "network": vars(network),
                "assumed": {name: span._asdict() for name, span in adviser.assumed.items()},
                "fitted": {
                    kind: {name: span._asdict() for name, span in fit.items()}
                    for kind, fit in fits.items()
                },
                "predictions": [row_of(each) for some in predictions.values() for each in some],
                "verdict": verdict,
            }
            write_text(json_path, json.dumps(document, indent=2) + "\n")

    return advise


def _introduce(adviser: Adviser, task: str) -> None:
    """What was measured, and what is assumed."""
    from hpctrain.process import cores

    measured, network = adviser.measured, adviser.network
    times = {
        "forward": measured.forward_seconds,
        "backward": measured.backward_seconds,
        "update": measured.update_seconds,
    }
    shown = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
    click.echo(
        f"measured here   {task} on {measured.device}, {measured.threads} threads, "
        f"{measured.steps} steps of {measured.samples} samples: {shown}; "
        f"{measured.parameter_bytes / 1e6:.4g} MB of gradients"
    )
    if measured.load > cores():
        click.echo(
            f"beware          others compute here (load {measured.load:.1f} on {cores()} cores): "
            "times are too long"
        )
    if adviser.speedup != 1:
        click.echo(f"given           a rank there computes {adviser.speedup:g} times as fast")
    for name, span in adviser.assumed.items():
        if name != "reduce_seconds_per_byte":
            ends = f" ({span.good:.3g} to {span.bad:.3g})" if span.good != span.bad else ""
            click.echo(f"assumed         {name} {span.value:.3g}{ends}")
    click.echo(
        f"assumed         within a node {network.local_bytes_per_second / 1e9:.3g} GB/s, "
        f"{1e6 * network.local_latency_seconds:.3g} us; input keeps up; the network is idle"
    )
    for kind, fit in adviser.fits.items():
        fitted = ", ".join(f"{name} {span.value:.3g}" for name, span in fit.items())
        click.echo(f"fitted instead  {kind}: {fitted}")
    click.echo("\nPREDICTED, not measured; in brackets: with what is assumed at its ends")


def _table(rows: Sequence[dict[str, Any]]) -> None:
    from hpctrain.costmodel.advise import percent

    lines = [
        ["NODES", "RANKS", "STRATEGY", "STEP MS", "", "EFFICIENCY", "", "SAMPLES/S", "BOUND BY"]
    ]
    for row in rows:
        step = f"({1e3 * row['step_seconds_low']:.3g}..{1e3 * row['step_seconds_high']:.3g})"
        share = f"({percent(row['efficiency_low'])}..{percent(row['efficiency_high'])})"
        lines.append(
            [
                str(row["nodes"]), str(row["ranks"]), row["strategy"] + "~" * (not row["exact"]),
                f"{1e3 * row['step_seconds']:.3g}", step, percent(row["efficiency"]), share,
                f"{row['samples_per_second']:.4g}", row["bound"],
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo("~ does not take the steps that one rank would take with the whole batch\n")
