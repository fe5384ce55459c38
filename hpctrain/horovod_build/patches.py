"""Patches of Horovod 0.28.1 that are applied before it is built, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import Error


@dataclass(frozen=True)
class Patch:
    """A patch: one text replaced in one file of the source tree, wherever it stands there."""

    name: str
    reason: str
    file: str
    old: str
    new: str


_CXX = (
    "torch's headers need C++17 since 2.1 (horovod issue 3996; mended upstream, not released), and "
    "C++20 since 2.14"
)
_NO_GPU = (
    "whoever asks for no GPU operations needs no CUDA toolkit, though torch has CUDA, and there is "
    "an nvcc on PATH"
)
_CHECKED = (
    "rank 0 goes on where MPI says that an exchange with the others failed, as it does when one of "
    "them is lost, and crashes over what was not received"
)

_ENVIRONMENT = (
    "horovodrun --gloo wrote its whole environment into arguments, which everybody on a host can "
    "read: a rank inherits it where it is started, and reads it from standard input on another "
    "host (but by Kubeflow's kubexec, which has none)"
)

_WAKE = (
    "the background thread sleeps until its next cycle, a millisecond, however much waits for it; "
    "now it is woken by what is enqueued, and does not sleep a whole cycle while a tensor waits "
    "for other ranks (but where GPU operations fuse tensors: those return before they are done, so "
    "only the cycle makes a tensor wait for others to be fused with)"
)

_GLOO_OF_MPI = (
    "with HOROVOD_CPU_OPERATIONS=gloo under MPI's controller no process set, nor the world's, has "
    "the Gloo context that its operations use: the first one was a segmentation fault"
)

PATCHES = (
    Patch(
        "cxx-standard",
        _CXX,
        "CMakeLists.txt",
        "CMAKE_CXX_STANDARD 14",
        "CMAKE_CXX_STANDARD $ENV{HOROVOD_CXX_STANDARD}",
    ),
    Patch(
        "cxx-standard-torch",
        _CXX,
        "horovod/torch/CMakeLists.txt",
        "CMAKE_CXX_STANDARD 14",
        "CMAKE_CXX_STANDARD $ENV{HOROVOD_CXX_STANDARD}",
    ),
    Patch(
        "cxx-standard-cuda",
        "the kernels include nothing of torch, and nvcc 13 knows C++17 and newer alone",
        "horovod/common/ops/cuda/CMakeLists.txt",
        "CMAKE_CUDA_STANDARD 11",
        "CMAKE_CUDA_STANDARD 17",
    ),
    Patch(
        "cxx-standard-gloo",
        _CXX,
        "third_party/gloo/CMakeLists.txt",
        "-std=c++11",
        "-std=c++$ENV{HOROVOD_CXX_STANDARD}",
    ),
    Patch(
        "no-gpu-no-cuda",
        _NO_GPU,
        "CMakeLists.txt",
        "check_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\n",
        """if(DEFINED ENV{HOROVOD_GPU_OPERATIONS})
    check_language(CUDA)
endif()
if(DEFINED ENV{HOROVOD_GPU_OPERATIONS} AND NOT CMAKE_CUDA_COMPILER)
""",
    ),
    Patch(
        "no-gpu-no-cuda-torch",
        _NO_GPU,
        "cmake/Modules/FindPytorch.cmake",
        'COMMAND ${PY_EXE} -c "import torch; from torch.utils.cpp_extension import CUDA_HOME; '
        "print(True if (",
        'COMMAND ${PY_EXE} -c "import os, torch; from torch.utils.cpp_extension import CUDA_HOME; '
        "print(True if ('HOROVOD_GPU_OPERATIONS' in os.environ and ",
    ),
    Patch(
        "mpich-of-debian",
        "where MPICH does not name itself, as Debian's, mpirun calls itself by its launcher's name",
        "horovod/runner/mpi_run.py",
        "elif 'MPICH' in output:",
        "elif 'MPICH' in output or 'HYDRA' in output:",
    ),
    Patch(
        "double-dash-binding",
        "Open MPI 5 reads single-dash options as a program name ('unable to find ... none'); "
        "Open MPI 4 and 5 both understand the double dash",
        "horovod/runner/mpi_run.py",
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
    ),
    Patch(
        "gloo-exit-code",
        "horovodrun --gloo ended every failure with a traceback of its own and exit code 1; the "
        "code of the first rank that failed is the truth (128 + n for signal n)",
        "horovod/runner/launch.py",
        "getLevelName(args.log_level))\n\n    _run(args)\n",
        """getLevelName(args.log_level))

    try:
        _run(args)
    except RuntimeError as error:
        code = str(error).rpartition('Exit code: ')[2].strip()
        if not code.lstrip('-').isdigit():
            raise
        print(error, file=sys.stderr)
        sys.exit(int(code) if int(code) > 0 else 128 - int(code))
""",
    ),
    Patch(
        "gloo-stall-inspector",
        "reserve() leaves the vector empty, so the stall inspector loops over no ranks and never "
        "fires under the Gloo controller",
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_);",
        "global_ranks_.resize(size_);",
    ),
    Patch(
        "local-by-name",
        "Open MPI 5 does not know that processes started by MPI spawn share a host with others: "
        "MPI_COMM_TYPE_SHARED gives them and the others different groups, and Horovod's start "
        "hangs; with HOROVOD_LOCAL_BY_NAME set, hosts are told apart by their names instead",
        "horovod/common/mpi/mpi_context.cc",
        """  MPI_Comm_split_type(mpi_comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL,
                      &local_comm);
""",
        """  if (std::getenv("HOROVOD_LOCAL_BY_NAME") == nullptr) {
    MPI_Comm_split_type(mpi_comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL,
                        &local_comm);
  } else {
    const int length = MPI_MAX_PROCESSOR_NAME;
    int me, size, used;
    MPI_Comm_rank(mpi_comm, &me);
    MPI_Comm_size(mpi_comm, &size);
    std::vector<char> mine(length, 0), all(static_cast<size_t>(length) * size);
    MPI_Get_processor_name(mine.data(), &used);
    MPI_Allgather(mine.data(), length, MPI_CHAR, all.data(), length, MPI_CHAR,
                  mpi_comm);
    int first = 0;
    while (first < me && std::strncmp(mine.data(),
                                      &all[static_cast<size_t>(length) * first],
                                      length) != 0) {
      ++first;
    }
    MPI_Comm_split(mpi_comm, first, me, &local_comm);
  }
""",
    ),
    Patch(
        "gather-errors",
        _CHECKED,
        "horovod/common/mpi/mpi_controller.cc",
        """  MPI_Gather(MPI_IN_PLACE, 1, MPI_INT, recvcounts, 1, MPI_INT, RANK_ZERO,
             mpi_ctx_.mpi_comm);
""",
        """  if (MPI_Gather(MPI_IN_PLACE, 1, MPI_INT, recvcounts, 1, MPI_INT, RANK_ZERO,
                 mpi_ctx_.mpi_comm) != MPI_SUCCESS) {
    throw std::runtime_error("MPI_Gather failed, see MPI output for details.");
  }
""",
    ),
    Patch(
        "gatherv-errors",
        _CHECKED,
        "horovod/common/mpi/mpi_controller.cc",
        """  MPI_Gatherv(nullptr, 0, MPI_BYTE, buffer, recvcounts, displcmnts, MPI_BYTE,
              RANK_ZERO, mpi_ctx_.mpi_comm);
""",
        """  if (MPI_Gatherv(nullptr, 0, MPI_BYTE, buffer, recvcounts, displcmnts,
                  MPI_BYTE, RANK_ZERO, mpi_ctx_.mpi_comm) != MPI_SUCCESS) {
    throw std::runtime_error("MPI_Gather failed, see MPI output for details.");
  }
""",
    ),
    Patch(
        "broadcast-errors",
        _CHECKED,
        "horovod/common/mpi/mpi_controller.cc",
        """  MPI_Bcast(&encoded_response_length, 1, MPI_INT, RANK_ZERO, mpi_ctx_.mpi_comm);

  MPI_Bcast((void*)encoded_response.c_str(), encoded_response_length, MPI_BYTE,
            RANK_ZERO, mpi_ctx_.mpi_comm);
""",
        """  if (MPI_Bcast(&encoded_response_length, 1, MPI_INT, RANK_ZERO,
                mpi_ctx_.mpi_comm) != MPI_SUCCESS ||
      MPI_Bcast((void*)encoded_response.c_str(), encoded_response_length,
                MPI_BYTE, RANK_ZERO, mpi_ctx_.mpi_comm) != MPI_SUCCESS) {
    throw std::runtime_error(
        "MPI_Broadcast failed, see MPI output for details.");
  }
""",
    ),
    Patch(
        "local-by-name-headers",
        "for the patch local-by-name",
        "horovod/common/mpi/mpi_context.cc",
        "#include <cassert>\n",
        "#include <cassert>\n#include <cstdlib>\n#include <cstring>\n",
    ),
    Patch(
        "gloo-start-fails",
        "a rank that is lost while the others start Gloo throws in a thread of theirs, which "
        "aborts them, too; it is to be an error of hvd.init(), as later failures of its start are",
        "horovod/common/operations.cc",
        """    global_gloo_context.Initialize(ParseGlooIface());
  }
""",
        """    try {
      global_gloo_context.Initialize(ParseGlooIface());
      if (state.control_operation == LibType::GLOO) {
        state.process_set_table.Initialize(global_gloo_context);
      }
    } catch (const std::exception& ex) {
      LOG(ERROR) << "Horovod could not be initialized: " << ex.what();
      state.process_set_table.Finalize(global_gloo_context, SHUT_DOWN_ERROR);
      global_gloo_context.Finalize();
      state.initialization_failed = true;
      return;
    }
  }
""",
    ),
    Patch(
        "gloo-unbound-sends",
        "a send that waits in a connection's queue when that fails is never told, where its buffer "
        "is an unbound one, as all of Gloo's collectives have: it waits until Gloo's timeout",
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        """      op.buf->signalException(ex);
    }
  }
""",
        """      op.buf->signalException(ex);
    }
    NonOwningPtr<UnboundBuffer> ubuf(op.ubuf);
    if (ubuf) {
      ubuf->signalException(ex);
    }
  }
""",
    ),
    Patch(
        "start-again",
        "a start that failed once made all later ones fail",
        "horovod/common/operations.cc",
        """    // Reset initialization flag
    horovod_global.initialization_done = false;
""",
        """    // Reset initialization flags
    horovod_global.initialization_done = false;
    horovod_global.initialization_failed = false;
""",
    ),
    Patch(
        "gloo-environment",
        _ENVIRONMENT,
        "horovod/runner/gloo_run.py",
        """                          if env_util.is_exportable(key)]),
""",
        """                          if env_util.is_exportable(key) and
                          (env_util.is_kubeflow_mpi() or os.environ.get(key) != value)]),
""",
    ),
    Patch(
        "gloo-environment-elsewhere",
        _ENVIRONMENT,
        "horovod/runner/gloo_run.py",
        """            local_command = quote('cd {pwd} > /dev/null 2>&1 ; {command}'
                                  .format(pwd=os.getcwd(), command=command))
            command = get_remote_command(local_command,
                                         host=host_name,
                                         port=settings.ssh_port,
                                         identity_file=settings.ssh_identity_file)
""",
        """            exports = tempfile.NamedTemporaryFile('w')
            exports.writelines('export %s=%s\\n' % (key, quote(value))
                               for key, value in os.environ.items()
                               if key.isidentifier() and env_util.is_exportable(key))
            exports.flush()
            local_command = quote('. /dev/stdin ; cd {pwd} > /dev/null 2>&1 ; {command}'
                                  .format(pwd=os.getcwd(), command=command))
            command = get_remote_command(local_command,
                                         host=host_name,
                                         port=settings.ssh_port,
                                         identity_file=settings.ssh_identity_file)
            command += ' < ' + quote(exports.name)
""",
    ),
    Patch(
        "gloo-environment-import",
        "for the patch gloo-environment-elsewhere",
        "horovod/runner/gloo_run.py",
        "import sys\nimport threading\n",
        "import sys\nimport tempfile\nimport threading\n",
    ),
    Patch(
        "wake-state",
        _WAKE,
        "horovod/common/global_state.h",
        """namespace horovod {
namespace common {

""",
        """namespace horovod {
namespace common {

// Ends the background thread's sleep between two cycles. A call that comes
// while the thread is awake ends its next sleep: none is lost.
class Wakeup {
public:
  void Notify() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      notified_ = true;
    }
    changed_.notify_one();
  }

  // Returns whether a call came before that time.
  bool SleepUntil(std::chrono::steady_clock::time_point time) {
    std::unique_lock<std::mutex> guard(mutex_);
    bool notified =
        changed_.wait_until(guard, time, [this] { return notified_; });
    notified_ = false;
    return notified;
  }

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool notified_ = false;
};

""",
    ),
    Patch(
        "wake-headers",
        "for the patch wake-state",
        "horovod/common/global_state.h",
        "#include <queue>\n#include <thread>\n",
        "#include <chrono>\n#include <condition_variable>\n#include <mutex>\n#include <queue>\n"
        "#include <thread>\n",
    ),
    Patch(
        "wake-members",
        _WAKE,
        "horovod/common/global_state.h",
        """  std::chrono::steady_clock::time_point last_cycle_start;
""",
        """  std::chrono::steady_clock::time_point last_cycle_start;

  Wakeup wakeup;

  // Whether what is enqueued wakes the background thread.
  std::atomic_bool wakes_at_enqueue{true};

  // When the thread was last woken, or did what had been enqueued.
  std::chrono::steady_clock::time_point last_progress;
""",
    ),
    Patch(
        "wake-at-exit",
        "for the patch wake-members: an exit does not wait for the next cycle either",
        "horovod/common/global_state.h",
        "      shut_down = true;\n",
        "      shut_down = true;\n      wakeup.Notify();\n",
    ),
    Patch(
        "wake-at-shutdown",
        "for the patch wake-members: hvd.shutdown() does not wait for the next cycle either",
        "horovod/common/operations.cc",
        "    horovod_global.shut_down = true;\n",
        "    horovod_global.shut_down = true;\n    horovod_global.wakeup.Notify();\n",
    ),
    Patch(
        "wake-or-fuse",
        _WAKE,
        "horovod/common/operations.cc",
        """  // Override the cycle time.
""",
        """#if HAVE_GPU
  state.wakes_at_enqueue =
      state.parameter_manager.TensorFusionThresholdBytes() == 0;
#endif

  // Override the cycle time.
""",
    ),
    Patch(
        "wake-at-enqueue",
        _WAKE,
        "horovod/common/operations.cc",
        "process_set.tensor_queue.AddToTensorQueue(e, message);\n",
        "process_set.tensor_queue.AddToTensorQueue(e, message);\n  WakeBackgroundThread();\n",
    ),
    Patch(
        "wake-at-enqueue-multi",
        _WAKE,
        "horovod/common/operations.cc",
        "process_set.tensor_queue.AddToTensorQueueMulti(entries, messages);\n",
        "process_set.tensor_queue.AddToTensorQueueMulti(entries, messages);\n"
        "  WakeBackgroundThread();\n",
    ),
    Patch(
        "wake-waiting",
        _WAKE,
        "horovod/common/tensor_queue.h",
        """  void RemoveJoinTensor();
""",
        """  void RemoveJoinTensor();

  // Whether tensors, or a join, wait for what other ranks do.
  bool Waiting() const {
    std::lock_guard<std::mutex> guard(mutex_);
    return !tensor_table_.empty();
  }
""",
    ),
    Patch(
        "wake-progress",
        _WAKE,
        "horovod/common/operations.cc",
        "        PerformOperation(response, process_set);\n",
        "        PerformOperation(response, process_set);\n"
        "        state.last_progress = std::chrono::steady_clock::now();\n",
    ),
    Patch(
        "wake-sleep",
        _WAKE,
        "horovod/common/operations.cc",
        """bool RunLoopOnce(HorovodGlobalState& state) {
  // This delay determines thread frequency and communication message latency
  auto start_time = std::chrono::steady_clock::now();
  auto sleep_duration = state.last_cycle_start +
                        std::chrono::microseconds(long(
                            state.parameter_manager.CycleTimeMs() * 1000.)) -
                        start_time;
  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {
    std::this_thread::sleep_for(sleep_duration);
  }
  state.last_cycle_start = std::chrono::steady_clock::now();
""",
        """void WakeBackgroundThread() {
  if (horovod_global.wakes_at_enqueue) {
    horovod_global.wakeup.Notify();
  }
}

bool AnythingWaits(HorovodGlobalState& state) {
  for (auto process_set_id : state.process_set_table.Ids()) {
    if (state.process_set_table.Get(process_set_id).tensor_queue.Waiting()) {
      return true;
    }
  }
  return false;
}

// Sleep until the next cycle, or until something is enqueued. Each cycle is a
// collective, in which this thread meets those of the other ranks. So while
// something waits for them it comes there again soon, to be there when they
// come; but the longer it has waited in vain, the more of the time it sleeps,
// and leaves its core to others.
void SleepBetweenCycles(HorovodGlobalState& state) {
  auto now = std::chrono::steady_clock::now();
  std::chrono::steady_clock::duration cycle = std::chrono::microseconds(
      long(state.parameter_manager.CycleTimeMs() * 1000.));
  auto next = state.last_cycle_start + cycle;
  if (state.wakes_at_enqueue && AnythingWaits(state)) {
    next = now + std::min(cycle, (now - state.last_progress) / 16);
  }
  while (state.wakeup.SleepUntil(next)) {
    // What was enqueued may have been seen, and done, in the last cycle.
    if (state.shut_down || AnythingWaits(state)) {
      state.last_progress = std::chrono::steady_clock::now();
      return;
    }
  }
}

bool RunLoopOnce(HorovodGlobalState& state) {
  SleepBetweenCycles(state);
  state.last_cycle_start = std::chrono::steady_clock::now();
""",
    ),
    Patch(
        "gloo-of-mpi",
        _GLOO_OF_MPI,
        "horovod/common/process_set.cc",
        """  if (mpi_context.GetMPICommunicator(Communicator::GLOBAL) != MPI_COMM_NULL) {
    // The running process is part of this process set.
""",
        """  if (mpi_context.GetMPICommunicator(Communicator::GLOBAL) != MPI_COMM_NULL) {
#if HAVE_GLOO
    if (ParseCPUOpsFromEnv() == LibType::GLOO) {
      gloo_context.Enable();
      gloo_context.InitializeFromMPI(mpi_context, ParseGlooIface());
    }
#endif // HAVE_GLOO
    // The running process is part of this process set.
""",
    ),
    Patch(
        "gloo-of-mpi-header",
        "for the patch gloo-of-mpi",
        "horovod/common/process_set.cc",
        '#include "process_set.h"\n',
        '#include "process_set.h"\n#include "utils/env_parser.h"\n',
    ),
    Patch(
        "gloo-of-mpi-alone",
        "the world's process set has a Gloo context by the patch gloo-of-mpi: one more is not used",
        "horovod/common/operations.cc",
        """  if (global_mpi_context.IsEnabled()) {
    // Initialize gloo context if mpi context is available
""",
        """  if (state.control_operation == LibType::MPI) {
    // Each process set makes its own, by MPI.
  } else if (global_mpi_context.IsEnabled()) {
    // Initialize gloo context if mpi context is available
""",
    ),
    Patch(
        "gloo-of-mpi-fails",
        "what goes wrong where Gloo is started by MPI is an error of hvd.init(), too",
        "horovod/common/operations.cc",
        """      state.process_set_table.Initialize(global_mpi_context);
    }
""",
        """      try {
        state.process_set_table.Initialize(global_mpi_context);
      } catch (const std::exception& ex) {
        LOG(ERROR) << "Horovod could not be initialized: " << ex.what();
        state.process_set_table.Finalize(global_mpi_context, SHUT_DOWN_ERROR);
        global_mpi_context.Finalize(mpi_ctx_manager);
        state.initialization_failed = true;
        return;
      }
    }
""",
    ),
)


def apply(source: Path) -> None:
    """Apply every patch to an unpacked source tree.

    Raises:
        Error: A text to replace is not there, so this is not the release the patches are for.
    """
    for patch in PATCHES:
        file = source / patch.file
        text = file.read_text(encoding="utf-8")
        if patch.old not in text:
            raise Error(
                f"patch '{patch.name}' does not fit {patch.file}.",
                hint="the patches are for Horovod 0.28.1; is the source another version?",
            )
        file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")
