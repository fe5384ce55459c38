"""What ps-lite takes for the round that ps_peers times: one server, one worker, on this host.

    apt install libzmq3-dev libprotobuf-dev protobuf-compiler
    git clone https://github.com/dmlc/ps-lite /tmp/ps-lite
    python -m benchmarks.ps_lite /tmp/ps-lite --rounds 20

It is copied, and built by its own Makefile with the libraries named above. Then its own benchmark
is run, whose server updates nothing, and a small program of ours, whose server does: in slices of
one key each, all of them on their way at once, with the calls that do not copy (ZPushPull). That is
how its documentation would have it, and it is several times as fast as its own benchmark sends
a key with every number. Our program runs over TCP, and over Unix sockets (DMLC_LOCAL). One line of
JSON for each case.

Also takes the sources of BytePS's ps-lite (https://github.com/bytedance/ps-lite), and then runs the
benchmark that comes with that alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import ROOT, module, scratch
from benchmarks.harness.tables import table_of, tell
from benchmarks.ps_peers import COUNT, LR, MOMENTUM, TOLERANCE, WARM_UP, Result
from hpctrain.errors import Error
from hpctrain.process import run

SLICE_COUNT = 2**18  # the fastest of 2**17, 2**18, 2**20, 2**22 and the whole
ROLES = ("scheduler", "server", "worker")
BYTEPS_KEYS = 25  # of 4 MB, as by BytePS's default
HINT = "`apt install g++ make libzmq3-dev libprotobuf-dev protobuf-compiler`, or give --prefix."
DRIVER = r"""
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include "ps/ps.h"

struct Shard { ps::SArray<float> weights, momentum; };

struct Server {
  float lr, momentum;
  std::unordered_map<ps::Key, Shard> shards;
  void operator()(const ps::KVMeta& meta, const ps::KVPairs<float>& data,
                  ps::KVServer<float>* server) {
    Shard& shard = shards[data.keys[0]];
    const size_t count = data.vals.size();
    if (shard.weights.empty()) {
      shard.weights.resize(count, 0);
      shard.momentum.resize(count, 0);
    }
    const float* __restrict__ g = data.vals.data();
    float* __restrict__ w = shard.weights.data();
    float* __restrict__ m = shard.momentum.data();
    for (size_t i = 0; i < count; ++i) {
      m[i] = momentum * m[i] + g[i];
      w[i] -= lr * m[i];
    }
    ps::KVPairs<float> reply;
    reply.keys = data.keys;
    reply.vals = shard.weights;  // a reference is sent from where it is
    server->Response(meta, reply);
  }
};

void work(size_t count, size_t slice, int rounds, float lr, float momentum) {
  ps::KVWorker<float> worker(0, 0);
  std::vector<float> gradient(count), weights(count);
  for (size_t i = 0; i < count; ++i) gradient[i] = 1 + i % 5;
  const size_t slices = (count + slice - 1) / slice;
  std::vector<ps::SArray<ps::Key>> keys(slices);
  std::vector<ps::SArray<float>> pushed(slices), pulled(slices);
  for (size_t k = 0; k < slices; ++k) {
    const size_t start = k * slice, size = std::min(slice, count - start);
    keys[k] = ps::SArray<ps::Key>(std::vector<ps::Key>{k});
    pushed[k].reset(gradient.data() + start, size, [](float*) {});
    pulled[k].reset(weights.data() + start, size, [](float*) {});
  }
  std::vector<int> waits(slices);
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t k = 0; k < slices; ++k)
      waits[k] = worker.ZPushPull(keys[k], pushed[k], &pulled[k]);
    for (int wait : waits) worker.Wait(wait);
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    std::printf("round %.6f\n", ms.count());
  }
  double velocity = 0, weight = 0, error = 0;
  for (int round = 0; round < rounds; ++round) {
    velocity = momentum * velocity + 1;
    weight -= lr * velocity;
  }
  for (size_t i = 0; i < count; ++i)
    error = std::max(error, std::fabs(weights[i] / (weight * (1 + i % 5)) - 1));
  std::printf("error %g\n", error);
  std::fflush(stdout);
}

int main(int, char** argv) {
  const size_t count = std::atol(argv[1]), slice = std::atol(argv[2]);
  const float lr = std::atof(argv[4]), momentum = std::atof(argv[5]);
  ps::Start(0);
  if (ps::IsServer()) {
    auto* server = new ps::KVServer<float>(0);
    server->set_request_handle(Server{lr, momentum, {}});
    ps::RegisterExitCallback([server]() { delete server; });
  }
  if (ps::IsWorker()) work(count, slice, std::atoi(argv[3]), lr, momentum);
  ps::Finalize(0, true);
}
"""


def is_byteps(tree: Path) -> bool:
    """Return whether it is BytePS's, which has another interface and another benchmark."""
    return (tree / "tests" / "test_benchmark.cc").exists()


def build(sources: Path, tree: Path, prefix: Path = Path("/usr")) -> None:
    """Copy the sources and build what is run.

    Raises:
        Error: Something is missing, or does not compile.
    """
    byteps = is_byteps(sources)
    test = "test_benchmark" if byteps else "test_kv_app_benchmark"
    if not (sources / "tests" / f"{test}.cc").exists():
        raise Error(f"{sources} has no ps-lite.", hint="give a checkout of dmlc/ps-lite.")
    shutil.copytree(sources, tree, dirs_exist_ok=True)
    # Its Makefile looks for its own builds of these, and would fetch what it does not find.
    deps = tree / "deps"
    protobuf = [] if byteps else ["include/google/protobuf", "bin/protoc"]
    for name in ["include/zmq.h", *protobuf]:
        if not (prefix / name).exists():
            raise Error(f"ps-lite needs {prefix / name}.", hint=HINT)
        (deps / name).parent.mkdir(parents=True, exist_ok=True)
        (deps / name).symlink_to(prefix / name)
    compile_with("make", "-C", str(tree), f"DEPS_PATH={deps}", "build/libps.a", f"tests/{test}")
    if not byteps:
        (tree / "driver.cc").write_text(DRIVER)
        flags = ["-std=c++17", "-O3", "-march=native", f"-I{tree}/include", f"-I{prefix}/include"]
        parts = [f"{tree}/driver.cc", f"{tree}/build/libps.a", f"-L{prefix}/lib"]
        libraries = ["-lprotobuf-lite", "-lzmq", "-pthread"]
        compile_with("g++", *flags, *parts, *libraries, "-o", f"{tree}/driver")


def compile_with(*command: str) -> None:
    """Run a compiler, or what runs it."""
    done = run(command, timeout_seconds=600)
    if done.returncode:
        raise Error(f"{command[0]} failed: {done.stdout.strip()[-500:]}", hint=HINT)


def cases_of(tree: Path) -> list[str]:
    """Return what can be measured with what was built."""
    if is_byteps(tree):
        return ["byteps_ps_lite_own"]
    return ["ps_lite_tcp", "ps_lite_ipc", "ps_lite_own"]


def run_case(tree: Path, name: str, rounds: int, *, timeout_seconds: float = 120) -> Result:
    """Measure a case in processes of its own.

    Args:
        tree: What was built.
        name: Of ``cases_of``.
        rounds: To be timed; ``ps_lite_own`` has one.
        timeout_seconds: After it, all processes of the case are killed.

    Returns:
        As for ``ps_peers.run_case``, and whether the server updates anything.
    """
    total = WARM_UP + rounds
    record: Result = {"benchmark": "ps_lite", "case": name, "bytes": 4 * COUNT}
    record["server_updates"] = not name.endswith("_own")
    if name == "byteps_ps_lite_own":
        length = -(-4 * COUNT // (8 * BYTEPS_KEYS)) * 8
        settings = {"NUM_KEY_PER_SERVER": BYTEPS_KEYS, "LOG_DURATION": 1, "TOTAL_DURATION": total}
        command = [f"{tree}/tests/test_benchmark", str(length), "0", "1"]  # push and pull
        text = roles(command, settings, timeout_seconds)
        record["bytes"] = length * BYTEPS_KEYS
        goodputs = re.findall(r"goodput: ([\d.]+) Gbps", text)
        times = [8e-6 * record["bytes"] / float(goodput) for goodput in goodputs][WARM_UP:]
    elif name == "ps_lite_own":
        text = roles([f"{tree}/tests/test_kv_app_benchmark"], {}, timeout_seconds)
        parts = re.findall(r"num = (\d+), (?:Push|Pull) average time cost: ([\d.]+)ms", text)
        record["bytes"] = 4 * int(parts[0][0]) if parts else 0
        times = [sum(float(milliseconds) for _, milliseconds in parts)] if len(parts) == 2 else []
    else:
        numbers = map(str, (COUNT, SLICE_COUNT, total, LR, MOMENTUM))
        settings = {"DMLC_LOCAL": int(name == "ps_lite_ipc")}
        text = roles([f"{tree}/driver", *numbers], settings, timeout_seconds)
        times = [float(value) for value in re.findall(r"round ([\d.]+)", text)][WARM_UP:]
        for error in re.findall(r"error (\S+)", text):
            record["error"] = error = float(error)
            if not error < TOLERANCE:
                record["failed"] = f"wrong parameters: relative error {error:g}"
    record.update(rounds=len(times), times_ms=times)
    if not times or (record["server_updates"] and "error" not in record):
        why = text.strip()[-300:] or f"nothing printed within {timeout_seconds:g} s"
        return {**record, "failed": why}
    return {**record, "best_ms": min(times), "median_ms": statistics.median(times)}


def roles(command: Sequence[str], settings: Mapping[str, int], timeout_seconds: float) -> str:
    """Return what a scheduler, a server and a worker print that run the same command."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ROLES]
        ports = [each.getsockname()[1] for each in free]
    variables = {
        "DMLC_NUM_WORKER": 1,
        "DMLC_NUM_SERVER": 1,
        "DMLC_GROUP_SIZE": 1,
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": ports[0],
        "DMLC_NODE_HOST": "127.0.0.1",
        **settings,
    }
    try:
        return run(
            module("ps_lite", "--roles", json.dumps(ports), *command),
            timeout_seconds=timeout_seconds,
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            cwd=ROOT,
        ).stdout
    finally:
        for port in ports:  # the Unix sockets, which it leaves behind
            Path(f"/tmp/{port}").unlink(missing_ok=True)


def start_roles(ports: Sequence[int], command: Sequence[str]) -> None:
    """Run a command as each role until all are done; whoever kills this group ends them all."""
    started = [
        subprocess.Popen(command, env={**os.environ, "DMLC_ROLE": role, "PORT": str(port)})
        for role, port in zip(ROLES, ports, strict=True)
    ]
    for process in started:
        process.wait()


def measure(arguments: Arguments) -> Report:
    """Build, and measure what can be measured with that."""
    records = []
    with scratch() as tree:
        build(arguments.sources, tree, arguments.prefix)
        for name in cases_of(tree):
            records.append(
                run_case(tree, name, arguments.rounds, timeout_seconds=arguments.timeout)
            )
            tell(records[-1])
    return Report(records, table_of("case", records, "case", ("median_ms", "best_ms", "error")))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("sources", type=Path, help="folder with a checkout")
    add("--prefix", type=Path, default=Path("/usr"), help="of zeromq and protobuf")
    add("--rounds", type=count, default=20)
    add("--timeout", type=float, default=120, help="seconds for each case")


BENCHMARK = Benchmark("ps_lite", __doc__, measure, options=options, quick={"rounds": 3})

if __name__ == "__main__":
    if sys.argv[1:2] == ["--roles"]:
        start_roles(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        BENCHMARK.run()
