"""The cost model against published scaling efficiencies of Horovod on up to 512 GPUs.

    python -m benchmarks.published --out results

The measurements: servers of 4 P100 GPUs on 25 Gbit/s RoCE, tf_cnn_benchmarks, batches of 64. With
16 GPUs: the table of Horovod's README until its pull request 44 (2017-10); with 128: the README
since then (see Sergeev & Del Balso, arXiv:1802.05799); with 512: Horovod's docs/benchmarks.

What goes in, all published and none of it fitted to an efficiency:

- One GPU's images a second, on these servers: the README's table.
- Parameters and multiplications of each layer, from the networks' papers; see networks.py.
- Backward is 2/3 of a step: two products of matrices for each one of forward.
- 25 Gbit/s less the headers of RoCE v2 with 1024 bytes a packet, the most that fits into an
  Ethernet frame of 1500: 1024 of 1106 bytes (InfiniBand specification, annex A17; IEEE 802.3).
- Latency of a hop in NCCL's ring: 9.6 us between nodes, 5.7 us over PCIe (its file
  src/graph/tuning.cc of 2020, protocol Simple).
- PCIe 3.0 x16 within a server: 15.75 GB/s. Five times the network's, it never is the bound.
- Horovod looks for gradients every 5 ms, and fuses up to 64 MB (its docs/tensor-fusion; these were
  the defaults before 0.21).

- A synchronous step waits for the slowest GPU. GPUs of one model differ by 8 % (Sinha et al., "Not
  all GPUs are created equal", SC 2022, arXiv:2208.11035), here read as the range of a box plot's
  whiskers, of 5.4 standard deviations. Measured on later GPUs than these.

`network alone` leaves the last point out, `hardware` has it. Computing is slower beside NCCL's
kernels, too; how much, no published figure of these GPUs says. `contention` takes that from the
measurements with 16 GPUs, and from these alone, and predicts those with 128 and 512.

Prints tables; --out gets published.json, published.csv.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from benchmarks.harness.command import Arguments, Benchmark, Report
from benchmarks.harness.tables import table
from benchmarks.networks import NETWORKS, Layer
from hpctrain.costmodel.inputs import Buckets, Job, Machine, Network
from hpctrain.costmodel.step import predict
from hpctrain.costmodel.strategies import StrategyCost

BATCH, GPUS_PER_NODE = 64, 4
IMAGES_PER_SECOND = {"Inception V3": 134.4, "ResNet-101": 119.4, "VGG-16": 130.9}
ON_16 = {"Inception V3": 2022.6, "ResNet-101": 1746.2, "VGG-16": 1787.4}
MEASURED = {
    16: {name: speed / IMAGES_PER_SECOND[name] / 16 for name, speed in ON_16.items()},
    128: {"Inception V3": 0.90, "ResNet-101": 0.90, "VGG-16": 0.79},
    512: {"Inception V3": 0.90, "ResNet-101": 0.90, "VGG-16": 0.68},
}
NETWORK = Network(
    bytes_per_second=25e9 / 8,
    link_share=1024 / 1106,
    latency_seconds=9.6e-6,
    local_bytes_per_second=15.75e9,
    local_latency_seconds=5.7e-6,
)
STRATEGY = StrategyCost(kind="horovod", label="horovod")


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The machine of the publication, as far as it has to be assumed."""

    network: Network = NETWORK
    backward_share: float = 2 / 3
    cycle_seconds: float = 5e-3
    fusion_bytes: float = 64 * 2**20
    variation: float = 0.08

    @property
    def jitter(self) -> float:
        """Standard deviation of GPUs' times, where a box plot's whiskers span ``variation``."""
        return self.variation / (2 * 4 * NormalDist().inv_cdf(0.75))


def fused(layers: Sequence[Layer], backward: float, assumed: Assumptions) -> Buckets:
    """Return what Horovod all-reduces in one piece, and when: shares of backward and of all bytes.

    Gradients come from the last layer to the first, each after its share of the multiplications. At
    each cycle, those that have come are fused.
    """
    total = sum(layer.multiplications for layer in layers)
    size = sum(layer.parameters for layer in layers)
    buckets: list[tuple[float, float]] = []
    done, waiting, tick = 0.0, [], assumed.cycle_seconds

    def flush() -> None:
        piece = 0.0
        for bytes_ in waiting:
            if piece and piece + bytes_ > assumed.fusion_bytes:
                buckets.append((tick / backward, piece / 4 / size))
                piece = 0.0
            piece += bytes_
        if piece:
            buckets.append((tick / backward, piece / 4 / size))
        waiting.clear()

    for layer in reversed(layers):
        done += layer.multiplications / total * backward
        while tick < done:
            flush()
            tick += assumed.cycle_seconds
        waiting.append(4.0 * layer.parameters)
    flush()
    return tuple(buckets)


def efficiency(name: str, gpus: int, contention: float, assumed: Assumptions) -> float:
    """Return what is predicted: images a second, by as many GPUs as fast as one alone."""
    layers = NETWORKS[name]
    seconds = BATCH / IMAGES_PER_SECOND[name]
    backward = assumed.backward_share * seconds
    job = Job(
        parameter_bytes=4.0 * sum(layer.parameters for layer in layers),
        forward_seconds=seconds - backward,
        backward_seconds=backward,
        ranks=gpus,
        ranks_per_node=GPUS_PER_NODE,
        samples=BATCH,
        buckets=fused(layers, backward, assumed),
        jitter=assumed.jitter,
    )
    return predict(job, STRATEGY, assumed.network, Machine(contention=contention)).efficiency


def contention_on_16(assumed: Assumptions) -> float:
    """Return the contention nearest to the measurements with 16 GPUs, by least squares."""
    candidates = np.linspace(0, 1, 101)
    errors = [
        sum((efficiency(name, 16, c, assumed) - of) ** 2 for name, of in MEASURED[16].items())
        for c in candidates
    ]
    return float(candidates[int(np.argmin(errors))])


def variants() -> dict[str, Assumptions]:
    """Return what else could be assumed, one thing at a time."""

    def network(**changes: float) -> Assumptions:
        return Assumptions(network=dataclasses.replace(NETWORK, **changes))

    halves = {"latency_seconds": 0.5 * 9.6e-6, "local_latency_seconds": 0.5 * 5.7e-6}
    plateau = {"latency_seconds": 1.9 * 9.6e-6, "local_latency_seconds": 1.9 * 5.7e-6}
    return {
        "as above": Assumptions(),
        "4096 bytes a packet": network(link_share=4096 / 4178),
        "80 % of the link": network(link_share=0.8),
        "half the latency": network(**halves),
        "1.9 times it (NCCL's plateau)": network(**plateau),
        "backward 60 %": Assumptions(backward_share=0.60),
        "backward 75 %": Assumptions(backward_share=0.75),
        "a cycle of 1 ms": Assumptions(cycle_seconds=1e-3),
        "a cycle of 20 ms": Assumptions(cycle_seconds=20e-3),
        "GPUs all alike": Assumptions(variation=0.0),
        "GPUs differ by 4 %": Assumptions(variation=0.04),
        "GPUs differ by 22 %": Assumptions(variation=0.22),
    }


def comparison() -> tuple[float, list[dict[str, Any]]]:
    """Return the contention estimated with 16 GPUs, and a record for each point."""
    assumed, alike = Assumptions(), Assumptions(variation=0.0)
    contention = contention_on_16(assumed)
    return contention, [
        {
            "model": name,
            "gpus": gpus,
            "measured": measured,
            "network_alone": efficiency(name, gpus, 0.0, alike),
            "hardware": efficiency(name, gpus, 0.0, assumed),
            "contention": efficiency(name, gpus, contention, assumed),
            "fitted_to": gpus == 16,
        }
        for gpus, of in MEASURED.items()
        for name, measured in of.items()
    ]


def sensitivity() -> list[dict[str, Any]]:
    """Return efficiencies on 512 GPUs, from hardware figures, under other assumptions."""
    return [
        {"variant": variant, **{name: efficiency(name, 512, 0.0, assumed) for name in NETWORKS}}
        for variant, assumed in variants().items()
    ]


def measure(arguments: Arguments) -> Report:
    """Compare predictions with what was published."""
    contention, records = comparison()
    columns = ("network_alone", "hardware", "contention")
    heads = [text for column in columns for text in (column.replace("_", " "), "off by")]
    rows = [["model", "GPUs", "measured", *heads]]
    for each in records:
        cells = [each["model"], str(each["gpus"]), f"{each['measured']:.1%}"]
        for column in columns:
            points = 100 * (each[column] - each["measured"])
            cells += [f"{each[column]:.1%}", f"{points:+.1f}"]
        rows.append([*cells[:-1], "(fitted)" if each["fitted_to"] else cells[-1]])
    others = sensitivity()
    shown = [[each["variant"], *(f"{each[name]:.1%}" for name in NETWORKS)] for each in others]
    text = f"{table(rows)}\ncontention, from 16 GPUs: {contention:.2f}\n\n"
    text += table([["512 GPUs, hardware", *NETWORKS], *shown])
    return Report(records, text, {"contention": contention, "sensitivity": others})


BENCHMARK = Benchmark("published", __doc__, measure, plots=False)

if __name__ == "__main__":
    BENCHMARK.run()
