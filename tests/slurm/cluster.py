"""A real Slurm cluster on this machine, for tests: slurmctld, a slurmd a node, munge.

As root every node is a host of its own, in namespaces: network, processes, mounts, host name. A
host can be killed, as by a power cut, its cable be cut, and both be mended. Otherwise there are
several slurmd on this host, whose nodes can be set down.

Everything lives in one PID namespace (as root), or in processes that are ended by their PID files;
state is in a folder of its own, so that several clusters can be up at once.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil

from hpctrain.process import run, search_path
from tests.waiting import SECONDS, wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NETWORK = "10.78.0"
BRIDGE = "02:00:00:00:00:fe"
CRED_SECONDS = 5  # a requeued job waits for so long; less counts as 120
SPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")


def missing():
    """What a cluster needs and this machine lacks; empty where nothing."""
    found = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=found) is None]
    return ", ".join(lacking)


def has_pmix():
    """Whether srun --mpi=pmix can find its library; Debian's package forgets a name for it."""
    return (PMIX / "libpmix.so").exists() or not (PMIX / "libpmix.so.2").exists()


def can_have_hosts():
    """Whether nodes can be hosts of their own here."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return run(["unshare", *SPACES, "--fork", "true"], timeout_seconds=10).returncode == 0


class Cluster:
    """Nodes n1, n2, ... of ``cores`` cores each, with two fake GPUs, in partition ``debug``."""

    def __init__(self, nodes, cores=2, slurmd_timeout=10, hosts=None, cred_seconds=CRED_SECONDS):
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.cores = cores
        self.hosts = can_have_hosts() if hosts is None else hosts
        self.folder = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))  # unix sockets: short
        self.folder.chmod(0o755)
        self._timeout = slurmd_timeout
        self._cred_seconds = cred_seconds
        self._anchors = {}
        self._started = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI_COMM"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": search_path() + ":/usr/sbin:/sbin",
            # More ranks than cores, and one machine for all.
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "self,sm,tcp",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # MPI's files are named after process numbers, which are small on each host and the
            # same again after its loss. So each host has a folder of its own under this name.
            "TMPDIR": str(self.folder / "own"),
        }

    # Up and down.

    def up(self):
        """Start everything; returns when all nodes are idle."""
        for name in ("state", "spool", "log", "munge", "tmp", "own"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._configure()
        if self.hosts:
            self._raise_hosts()
        else:
            self._munge(self.folder / "munge", ())
            self._daemon("slurmctld", (), "slurmctld")
            for name in self.names:
                self._slurmd(name)
        self.wait_idle()
        return self

    def down(self):
        """End everything, and remove the state."""
        if self.hosts:
            for anchor in self._anchors.values():
                with contextlib.suppress(ProcessLookupError):
                    anchor.kill()
                anchor.wait()
        else:
            pids = [int(p.read_text()) for p in self.folder.rglob("*.pid") if p.read_text().strip()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not any(map(_alive, pids)), "the daemons to end", seconds=20)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self):
        folder, user = self.folder, getpass.getuser()
        if self.hosts:
            controller = f"ctl({NETWORK}.1)"
            address = f"NodeAddr={NETWORK}.[11-{10 + len(self.names)}]"
            ports = "SlurmctldPort=6817"
            munge = "/run/munge/munge.sock"
        else:
            here = socket.gethostname().partition(".")[0]
            first = _free_ports(len(self.names) + 1)
            controller = f"{here}(127.0.0.1)"
            last = first + len(self.names)
            address = f"NodeHostname={here} NodeAddr=127.0.0.1 Port=[{first + 1}-{last}]"
            ports = f"SlurmctldPort={first}"
            munge = folder / "munge" / "munge.sock"
        many = f"n[1-{len(self.names)}]"
        (folder / "gres.conf").write_text(f"NodeName={many} Name=gpu File=/dev/null,/dev/zero\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={controller}
{ports}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire={self._cred_seconds}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
TmpFS={folder}/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={self._timeout}
InactiveLimit=0
KillWait=5
MinJobAge=300
Waittime=0
TCPTimeout=2
MessageTimeout=10
JobRequeue=1
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName={many} {address} CPUs={self.cores} Boards=1 SocketsPerBoard=1 \
CoresPerSocket={self.cores} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=2:00:00 State=UP
PartitionName=small Nodes=n1 MaxTime=0:10:00 State=UP
""")
        for name in self.names:
            (folder / "spool" / name).mkdir()
            (folder / "tmp" / name).mkdir()

    def _munge(self, folder, inside):
        command = [
            *inside, "munged", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ]  # fmt: skip
        _do(command, self.environment)

    def _daemon(self, program, inside, log, *arguments):
        _do([*inside, program, "-f", self.environment["SLURM_CONF"], *arguments], self.environment)

    def _slurmd(self, name):
        self._daemon("slurmd", self._inside(name), name, "-N", name)

    # Hosts.

    def _raise_hosts(self):
        table = "".join(f"{NETWORK}.{10 + n} {name}\n" for n, name in enumerate(self.names, 1))
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{NETWORK}.1 ctl\n{table}")
        self._raise("ctl")
        controller = self._inside("ctl")
        # Without an address of its own a bridge has that of a port, and another one when that port
        # is lost; then the other hosts' packets go astray until somebody asks for theirs.
        _do([*controller, "ip", "link", "add", "eth0", "address", BRIDGE, "type", "bridge"])
        _do([*controller, "ip", "address", "add", f"{NETWORK}.1/24", "dev", "eth0"])
        _do([*controller, "ip", "link", "set", "eth0", "up"])
        self._daemon("slurmctld", controller, "ctl")
        for name in self.names:
            self.start(name)

    def _raise(self, name):
        """Make a host; its first process keeps it up."""
        keep = self.folder
        boot = (
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && "
            f"mkdir -p /run/munge && cp {keep}/munge/munge.key /run/munge/ && "
            "chmod 400 /run/munge/munge.key && chmod 755 /run /run/munge && "
            f"mount --bind {keep}/hosts /etc/hosts && mount -t tmpfs tmpfs {keep}/own && "
            "ip link set lo up && echo up && "
            # It also waits for orphans.
            "trap exit TERM; while :; do sleep 3600 & wait $!; done"
        )
        anchor = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *SPACES, "--fork", "--kill-child",
             "--mount-proc", "--propagation", "private", "bash", "-c", boot],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**self.environment, "HOSTNAME": name}, start_new_session=True,
        )  # fmt: skip
        line = anchor.stdout.readline().strip()
        assert line == "up", f"host {name} does not come up: {line}"
        self._anchors[name] = anchor
        self._munge("/run/munge", self._inside(name))

    def first(self, name):
        """The host's first process, as this host counts it."""
        anchor = self._anchors[name].pid
        children = Path(f"/proc/{anchor}/task/{anchor}/children").read_text().split()
        return int(children[0])

    def _inside(self, name):
        if not self.hosts:
            return ()
        first = self.first(name)
        return ("nsenter", "-t", str(first), *SPACES, "--")

    def start(self, name):
        """Switch a host on, or on again."""
        number = self.names.index(name) + 1
        self._raise(name)
        outer, inner = self.first("ctl"), self.first(name)
        controller = self._inside("ctl")
        with contextlib.suppress(AssertionError):
            _do([*controller, "ip", "link", "delete", f"port{number}"])
        # A PID is looked up among this process's own.
        _do(["nsenter", "-t", str(outer), "--net", "ip", "link", "add", f"port{number}", "type",
             "veth", "peer", "eth0", "netns", str(inner)])  # fmt: skip
        _do([*controller, "ip", "link", "set", f"port{number}", "master", "eth0", "up"])
        _do([*self._inside(name), "ip", "address", "add", f"{NETWORK}.{10 + number}/24", "dev",
             "eth0"])  # fmt: skip
        _do([*self._inside(name), "ip", "link", "set", "eth0", "up"])
        self._slurmd(name)

    def enter(self, name, *arguments):
        """Run a command on a host, as its root; it must succeed, and what it starts may stay."""
        _do([*self._inside(name), *arguments], self.environment)

    def kill(self, name):
        """Lose a node at once: a power cut, or (several slurmd on one host) set down."""
        if self.hosts:
            self._anchors[name].kill()
            self._anchors[name].wait()
        else:
            self.call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def mend(self):
        """Bring back whatever nodes were lost; returns when all are idle."""
        for name in self.names:
            if self.hosts and self._anchors[name].poll() is not None:
                self.start(name)
        down = self.call("sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N")
        for name in set(down.split()):
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait_idle()

    def cut(self, name):
        """Pull a host's cable."""
        number = self.names.index(name) + 1
        _do([*self._inside("ctl"), "ip", "link", "set", f"port{number}", "down"])

    def heal(self, name):
        """Put it back."""
        number = self.names.index(name) + 1
        _do([*self._inside("ctl"), "ip", "link", "set", f"port{number}", "up"])

    @contextlib.contextmanager
    def silent(self):
        """Stop the controller meanwhile: afterwards it does what it was asked for."""
        config = str(self.folder / "slurm.conf")
        (controller,) = (
            each
            for each in psutil.process_iter(["name", "cmdline"])
            if each.info["name"] == "slurmctld" and config in (each.info["cmdline"] or ())
        )
        controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            controller.send_signal(signal.SIGCONT)

    # Use.

    def command(self, *arguments):
        """A command as it is started on the controller's host, where one would log in."""
        return [*self._inside("ctl"), *map(str, arguments)]

    def call(self, *arguments, cwd=None, timeout_seconds=SECONDS, env=None):
        """Run a command there; it must succeed."""
        done = self.run(*arguments, cwd=cwd, timeout_seconds=timeout_seconds, env=env)
        assert done.returncode == 0, f"{arguments}: {done.returncode}: {done.stdout}"
        return done.stdout

    def run(self, *arguments, cwd=None, timeout_seconds=SECONDS, env=None):
        """Run a command there."""
        # Into the folder as the host sees it: nsenter --wd would keep this one's mount of it.
        go = ("sh", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd()))
        command = self.command(*go, *arguments)
        return run(
            command, timeout_seconds=timeout_seconds,
            env={**self.environment, **(env or {})},
        )  # fmt: skip

    def wait_idle(self, count=None):
        """Return when so many nodes, or all, are idle."""
        count = len(self.names) if count is None else count
        states = ("sinfo", "--noheader", "--partition=debug", "--states=idle", "--format=%D")

        def idle():
            said = self.run(*states).stdout
            return sum(int(word) for word in said.split() if word.isdigit()) >= count

        wait_until(idle, f"{count} idle nodes", tell=lambda: self.run("sinfo", "--Node").stdout)

    def field(self, job, name):
        """What ``scontrol show job`` says; asked again if a busy machine has cut the answer off."""
        ask = ("scontrol", "--oneliner", "show", "job", str(job))
        done = self.run(*ask)
        words = (self.call(*ask) if done.returncode == -signal.SIGPIPE else done.stdout).split()
        return dict(word.partition("=")[::2] for word in words).get(name, "")

    def wait_for(self, job, *states, seconds=SECONDS):
        """Return when a job is in one of these states; which."""

        def state():
            return self.field(job, "JobState")

        wait_until(lambda: state() in states, f"job {job} to be {' or '.join(states)}",
                   seconds=seconds, tell=lambda: f"it is {state()}")  # fmt: skip
        return state()


def _free_ports(count):
    """The first of so many free ports."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _do(command, environment=None):
    done = run([str(part) for part in command], timeout_seconds=SECONDS, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}"
