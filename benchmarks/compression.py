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
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers_cases, peers_models, ps_hosts
from benchmarks.output import plots, spread, spread_of, table, write
from hpctrain.compression.codec import Codec, ErrorFeedback, make_codec
from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.world.launcher import detect

COUNT = 25_000_000
SLICE = 2**19  # values: 2 MiB
CODECS = ("fp16", "bf16", "int8", "topk:0.1", "topk:0.01", "topk:0.001")
HOSTS = 2
MODEL = "mlp_2M"
CHILD = (sys.executable, "-m", "benchmarks.compression", "--child")
Result = dict[str, Any]


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
        """All slices."""
        for index, (encoder, part, out) in enumerate(
            zip(self.encoders, self.parts, self.outs, strict=True)
        ):
            self.sizes[index] = encoder.encode(part, out)

    def decode(self) -> None:
        """All slices."""
        pieces = zip(self.outs, self.sizes, self.decoded.split(SLICE), strict=True)
        for out, size, decoded in pieces:
            self.codec.decode(out[:size], decoded)


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def break_even_gbps(count: int, encoded: int, encode: float, decode: float) -> float:
    """The rate of a network below which an encoding pays, in 10**9 bits a second.

    Args:
        count: Bytes of the gradient.
        encoded: Bytes of it when encoded.
        encode: Seconds.
        decode: Seconds.
    """
    return max(0.0, 8e-9 * (count - encoded) / (encode + decode))


def measure_codecs(names: Sequence[str], count: int, rounds: int) -> list[Result]:
    """All codecs, in one process with one thread."""
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[Result]] = {name: [] for name in names}
    errors = {}
    slices = {}
    for name in names:
        codec = make_codec(name)
        assert codec is not None
        slices[name] = Slices(codec, gradient)
        slices[name].encode()
        slices[name].decode()
        errors[name] = float((slices[name].decoded - gradient).norm() / gradient.norm())
    for _ in range(rounds):
        for name, each in slices.items():
            encode, decode = seconds_of(each.encode), seconds_of(each.decode)
            found[name].append(
                {
                    "encode_GBps": 4e-9 * count / encode,
                    "decode_GBps": 4e-9 * count / decode,
                    "break_even_Gbps": break_even_gbps(4 * count, sum(each.sizes), encode, decode),
                }
            )
    records = []
    for name, results in found.items():
        record = {"group": "codec", "codec": name, "values": count, "rounds": rounds}
        for key in results[0]:
            record |= spread_of(key, [each[key] for each in results])
        ratio = 4 * count / sum(slices[name].sizes)
        records.append({**record, "ratio": ratio, "error": errors[name]})
    return records


# What runs on the hosts.


def child(codecs: str, steps: str, rounds: str, folder: str) -> None:
    """A rank: trains with all codecs in turn; the first writes what it measured."""
    peers_cases.end_with_parent()
    launch = detect()
    peers_cases.take_cores(launch.rank, launch.size)
    place = peers_cases.Place(launch.rank, launch.size, "", torch.device("cpu"))
    found: dict[str, list[Result]] = {name: [] for name in codecs.split(",")}
    kind, dense = peers_models.MODELS[MODEL], torch.zeros(0)
    for _ in range(int(rounds)):
        for name, results in found.items():
            case = partial(peers_cases.ps, compression=name)
            record, moved = peers_cases.train(case, kind, place, int(steps))
            dense = moved if name == "none" else dense
            drift = float((moved - dense).norm() / dense.norm())
            results.append({"step_ms": statistics.median(record["times_ms"]), "drift": drift})
    if launch.rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))


def measure_steps(
    mbits: float, codecs: Sequence[str], steps: int, rounds: int, seconds: float
) -> list[Result]:
    """Training steps on hosts with links of so many Mbit/s: a record a codec.

    Raises:
        Error: They did not get through.
    """
    names = ["none", *codecs]
    with tempfile.TemporaryDirectory() as folder, ps_hosts.hosts(HOSTS, mbits) as cluster:
        command = [*CHILD, ",".join(names), str(steps), str(rounds), folder]
        done = cluster.mpirun([1] * HOSTS, command, seconds)
        file = Path(folder) / "result.json"
        if done.returncode or not file.exists():
            raise Error(f"steps at {mbits:g} Mbit/s: code {done.returncode}: {done.stdout[-300:]}")
        found = json.loads(file.read_text())
    return [step_record(mbits, name, found[name], found["none"]) for name in names]


def step_record(
    mbits: float, name: str, results: Sequence[Result], dense: Sequence[Result]
) -> Result:
    """Of a codec's rounds: independent variables first."""
    record: Result = {"group": "step", "codec": name, "link_Mbps": mbits, "ranks": HOSTS}
    record |= {"oversubscribed": cores() < HOSTS, "rounds": len(results)}
    pairs = zip(results, dense, strict=True)
    record |= spread_of("step_ms", [each["step_ms"] for each in results])
    record |= spread_of("speed_over_dense", [b["step_ms"] / a["step_ms"] for a, b in pairs])
    return {**record, "drift": statistics.median(each["drift"] for each in results)}


def show(records: Sequence[Result]) -> str:
    """A table for the codecs, and one for each network."""
    head = ["codec", "ratio", "error", "encode GB/s", "decode GB/s", "pays below Gbit/s"]
    rows = [head]
    for record in (each for each in records if each["group"] == "codec"):
        cells = [spread(record, key) for key in ("encode_GBps", "decode_GBps", "break_even_Gbps")]
        rows.append([record["codec"], f"{record['ratio']:.4g}", f"{record['error']:.2g}", *cells])
    parts = [table(rows)]
    for mbits in dict.fromkeys(each["link_Mbps"] for each in records if each["group"] == "step"):
        rows = [[f"{mbits:g} Mbit/s", "step ms", "speed over dense", "drift"]]
        for record in (each for each in records if each.get("link_Mbps") == mbits):
            star = "*" * record["oversubscribed"]
            cells = [spread(record, key) for key in ("step_ms", "speed_over_dense")]
            rows.append([record["codec"] + star, *cells, f"{record['drift']:.2g}"])
        parts.append(table(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codecs", type=lambda text: text.split(","), default=",".join(CODECS))
    parser.add_argument("--count", type=int, default=COUNT, help="values of the gradient")
    parser.add_argument("--rounds", type=int, default=5, help="of encoding and decoding")
    parser.add_argument(
        "--mbits", type=lambda text: [float(rate) for rate in text.split(",") if rate],
        default="100,1000", help="of the hosts' links; none: no steps",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="timed in each round")
    parser.add_argument("--step-rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each network")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots")
    options = parser.parse_args()
    if os.geteuid() != 0 and options.mbits:
        print("emulated hosts: skipped; they need root", flush=True)
        options.mbits = []
    torch.set_num_threads(1)
    try:
        records = measure_codecs(options.codecs, options.count, options.rounds)
        print(show(records), end="\n\n", flush=True)
        for mbits in options.mbits:
            records += measure_steps(
                mbits, options.codecs, options.steps, options.step_rounds, options.timeout
            )
    except Error as error:
        parser.error(str(error))
    print(show(records))
    if options.out is not None:
        write(options.out, "compression", records)
        plots(options.out, "compression")


if __name__ == "__main__":
    main()
