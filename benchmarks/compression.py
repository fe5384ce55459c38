"""Codecs of the parameter server: how fast, how small, how wrong, and on which network they pay.

    python -m benchmarks.compression --out results

- codec: gradients of 25 million values, normally distributed, are encoded and decoded in slices of
  2 MiB on one core, as a worker and a server do, with error feedback where the strategy uses it.
  Rounds go over all codecs in turn. The error is that of one gradient, before feedback makes up for
  it: the norm of what is lost by the norm of what is sent.
- break_even_Gbps: sending dense takes 8 bytes / rate; sending encoded, that by the ratio, and
  encoding, and decoding, one after the other as no overlap hides anything. Below this rate of what
  lies between a worker and a server, encoding is worth its time.
- step: training steps of a perceptron of 2.1 million parameters on 2 workers, each on an emulated
  host with a server in its process (see ps_hosts.py; needs root), with each codec, at 100 Mbit/s
  and 1 Gbit/s. All in the same processes, in turn. Only gradients are encoded; weights come back
  dense. The drift is how far parameters end from those of the steps without a codec, by how far
  these have come.

Shown are the median over rounds, the least and the largest. Prints tables; --out gets
compression.json, compression.csv and plots (PNG, SVG). ``*``: more ranks than cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers_cases, peers_models, ps_hosts
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, words
from benchmarks.harness.processes import end_with_parent, module, scratch
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import FOOTNOTE, by_group, table_of
from hpctrain.compression.codec import Codec, ErrorFeedback, make_codec
from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.world.launcher import detect

COUNT = 25_000_000
SLICE = 2**19  # values: 2 MiB
CODECS = ("fp16", "bf16", "int8", "topk:0.1", "topk:0.01", "topk:0.001")
HOSTS = 2
MODEL = "mlp_2M"
CHILD = module("compression", "--child")


class Slices:
    """A gradient's slices, and what encodes and decodes them.

    Args:
        codec: How.
        gradient: Shape (n,), float32.
    """

    def __init__(self, codec: Codec, gradient: torch.Tensor) -> None:
        self.codec = codec
        self.parts = gradient.split(SLICE)
        self.decoded = torch.empty_like(gradient)
        self.outs = [
            torch.empty(codec.capacity(part.numel(), 4), dtype=torch.uint8) for part in self.parts
        ]
        self.sizes = [0] * len(self.parts)
        self.encoders: list[Any] = [
            ErrorFeedback(codec, part.numel(), part.dtype) if codec.feedback else codec
            for part in self.parts
        ]

    def encode(self) -> None:
        """Encode all slices."""
        for index, (encoder, part, out) in enumerate(
            zip(self.encoders, self.parts, self.outs, strict=True)
        ):
            self.sizes[index] = encoder.encode(part, out)

    def decode(self) -> None:
        """Decode all slices."""
        pieces = zip(self.outs, self.sizes, self.decoded.split(SLICE), strict=True)
        for out, size, decoded in pieces:
            self.codec.decode(out[:size], decoded)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def break_even_gbps(count: int, encoded: int, encode: float, decode: float) -> float:
    """Return the rate of a network below which an encoding pays, in 10**9 bits a second.

    Args:
        count: Bytes of the gradient.
        encoded: Bytes of it when encoded.
        encode: Seconds.
        decode: Seconds.
    """
    return max(0.0, 8e-9 * (count - encoded) / (encode + decode))


def measure_codecs(names: Sequence[str], count: int, rounds: int) -> list[Record]:
    """Return a record for each codec, measured in one process with one thread."""
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(0))
    errors, slices = {}, {}
    for name in names:
        codec = make_codec(name)
        assert codec is not None
        slices[name] = Slices(codec, gradient)
        slices[name].encode()
        slices[name].decode()
        errors[name] = float((slices[name].decoded - gradient).norm() / gradient.norm())

    def measure(each: Slices) -> Round:
        encode, decode = seconds_of(each.encode), seconds_of(each.decode)
        return {
            "encode_GBps": 4e-9 * count / encode,
            "decode_GBps": 4e-9 * count / decode,
            "break_even_Gbps": break_even_gbps(4 * count, sum(each.sizes), encode, decode),
        }

    found = in_turn({name: partial(measure, each) for name, each in slices.items()}, rounds)
    return [
        {
            **record_of({"group": "codec", "codec": name, "values": count}, results),
            "ratio": 4 * count / sum(slices[name].sizes),
            "error": errors[name],
        }
        for name, results in found.items()
    ]


# What runs on the hosts.


def child(codecs: str, steps: str, rounds: str, folder: str) -> None:
    """Train with all codecs in turn, as a rank; the first rank writes what it measured."""
    end_with_parent()
    launch = detect()
    peers_cases.take_cores(launch.rank, launch.size)
    place = peers_cases.Place(launch.rank, launch.size, "", torch.device("cpu"))
    kind, dense = peers_models.MODELS[MODEL], torch.zeros(0)

    def measure(name: str) -> Round:
        nonlocal dense
        case = partial(peers_cases.ps, compression=name)
        record, moved = peers_cases.train(case, kind, place, int(steps))
        dense = moved if name == "none" else dense
        drift = float((moved - dense).norm() / dense.norm())
        return {"step_ms": statistics.median(record["times_ms"]), "drift": drift}

    found = in_turn({name: partial(measure, name) for name in codecs.split(",")}, int(rounds))
    if launch.rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))


def measure_steps(
    mbits: float, codecs: Sequence[str], steps: int, rounds: int, seconds: float
) -> list[Record]:
    """Return a record of training steps for each codec, on hosts with links of so many Mbit/s.

    Raises:
        Error: They did not get through.
    """
    names = ["none", *codecs]
    with scratch() as folder, ps_hosts.hosts(HOSTS, mbits) as cluster:
        command = [*CHILD, ",".join(names), str(steps), str(rounds), str(folder)]
        done = cluster.mpirun([1] * HOSTS, command, seconds)
        file = folder / "result.json"
        if done.returncode or not file.exists():
            raise Error(f"steps at {mbits:g} Mbit/s: code {done.returncode}: {done.stdout[-300:]}")
        found = json.loads(file.read_text())
    return [step_record(mbits, name, found[name], found["none"]) for name in names]


def step_record(
    mbits: float, name: str, results: Sequence[Round], dense: Sequence[Round]
) -> Record:
    """Return the record of a codec's steps.

    Args:
        mbits: Of the hosts' links.
        name: Of the codec.
        results: Its rounds.
        dense: The same rounds without a codec.
    """
    variables = {"group": "step", "codec": name, "link_Mbps": mbits, "ranks": HOSTS}
    variables["oversubscribed"] = cores() < HOSTS
    ratio = "speed_over_dense"
    rounds = compared(results, dense, ratio, lambda one, base: base["step_ms"] / one["step_ms"])
    return record_of(variables, rounds)


def show(records: Sequence[Record]) -> str:
    """Return a table for the codecs, and one for each network."""
    codec = [record for record in records if record["group"] == "codec"]
    columns = (
        ("ratio", lambda record: f"{record['ratio']:.4g}"),
        ("error", lambda record: f"{record['error']:.2g}"),
        "encode_GBps", "decode_GBps", "break_even_Gbps",
    )  # fmt: skip
    parts = [table_of("codec", codec, "codec", columns)]
    for mbits, some in by_group(records, "link_Mbps"):
        columns = (
            "step_ms",
            "speed_over_dense",
            ("drift", lambda record: f"{record['drift']:.2g}"),
        )
        parts.append(table_of(f"{mbits:g} Mbit/s", some, "codec", columns))
    return "\n\n".join([*parts, FOOTNOTE])


def measure(arguments: Arguments) -> Report:
    """Measure the codecs alone, then steps on each network."""
    torch.set_num_threads(1)
    records = measure_codecs(arguments.codecs, arguments.count, arguments.rounds)
    for mbits in arguments.mbits:
        records += measure_steps(
            mbits, arguments.codecs, arguments.steps, arguments.step_rounds, arguments.timeout
        )
    return Report(records, show(records))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--codecs", type=words, default=",".join(CODECS))
    add("--count", type=count, default=COUNT, help="values of the gradient")
    add("--rounds", type=count, default=5, help="of encoding and decoding")
    add("--mbits", type=numbers(float), default="100,1000",
        help="of the hosts' links; none: no steps")  # fmt: skip
    add("--steps", type=count, default=5, help="timed in each round")
    add("--step-rounds", type=count, default=3)
    add("--timeout", type=float, default=180, help="seconds for each network")


def check(parser: argparse.ArgumentParser, arguments: Arguments) -> None:
    """Leave out what needs root where there is none."""
    if os.geteuid() != 0 and arguments.mbits:
        print("emulated hosts: skipped; they need root", flush=True)
        arguments.mbits = []


QUICK = {"codecs": "fp16,int8", "count": 1_000_000, "rounds": 2, "mbits": "1000", "steps": 2,
         "step_rounds": 1}  # fmt: skip
BENCHMARK = Benchmark("compression", __doc__, measure, options=options, check=check, quick=QUICK)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        BENCHMARK.run()
