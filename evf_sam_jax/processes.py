"""How a run of several processes comes together: by flags, or as the machines' scheduler says.

`jax.distributed` joins the processes, but it ends a process with SIGABRT and a stack of addresses
when another one does not come in time, and with a segmentation fault when the coordinator's port
is taken. Both are ordinary mistakes of starting a run, so two things come before that:

- Processes that were given flags first meet over a plain socket at the coordinator's address
  (`_await_calls`, `_call`), where every process learns who is missing or was started wrongly.
- `jax.distributed.initialize` runs in a thread, and its own time-out is later than the one here.
"""

import contextlib
import dataclasses
import importlib.util
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evf_sam_jax.errors import UserError

T = TypeVar("T")

# What `jax.distributed.initialize` calls each; Kubernetes has no name there, so jax looks itself.
_JAX_NAMES = {"SLURM": "slurm", "TPU pod": "gketpu", "Kubernetes": None, "Open MPI": "ompi"}

# Value of --coordinator with which jax finds out all by itself, also by asking a machine's metadata
# server, which only a machine in a cloud has.
AUTO = "auto"

# How much later jax gives up than the run does, in seconds: its way to give up is SIGABRT.
_JAX_GIVES_UP_LATER = 60

# How long a caller at the coordinator's port has to say who it is, in seconds.
_GREETING_TIMEOUT = 5

# How process 0 begins its answer, so that another program at that port is not taken for it.
_GO, _STOP = "evf-sam go", "evf-sam stop "


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run; what is None, `jax.distributed` finds out.

    Attributes:
      coordinator: host:port at which process 0 waits for the others.
      count: number of processes.
      index: which of them this process is.
      name: how the cluster was found: "flags", "SLURM", "TPU pod", "Kubernetes", "Open MPI", or
        "auto" where jax shall find it.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    name: str


def define_flags() -> None:
    """The flags that say of which processes a run consists."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "host:port of process 0, for a run of several processes. It is found without this flag "
        "under srun, mpirun (Open MPI 4), on TPU pods of Kubernetes, and in its indexed jobs; "
        "'auto' on TPU VMs of Compute Engine.",
    )
    flags.DEFINE_integer("process_count", 0, "How many processes there are, with --coordinator.")
    flags.DEFINE_integer("process_index", -1, "Which of them this is, from 0, with --coordinator.")
    flags.DEFINE_integer(
        "join_timeout", 300, "For how many seconds processes wait for each other.", lower_bound=1
    )


def joined_by_flags() -> contextlib.AbstractContextManager[None]:
    """`joined` with the processes that the flags of `define_flags`, or the environment, name.

    Raises:
      UserError: as `find_cluster` and `joined`.
    """
    options = flags.FLAGS
    given = (options.coordinator, options.process_count, options.process_index)
    return joined(find_cluster(*given, os.environ), options.join_timeout)


def find_cluster(
    coordinator: str, count: int, index: int, environ: Mapping[str, str]
) -> Cluster | None:
    """The cluster that the flags name, otherwise the one that the environment variables show.

    Args:
      coordinator: value of `--coordinator`; empty where not given.
      count: value of `--process_count`; 0 where not given.
      index: value of `--process_index`; -1 where not given.
      environ: the environment variables.

    Returns:
      None for a run of this process alone.

    Raises:
      UserError: if some flags are missing or wrong, or the scheduler's variables are.
    """
    given = {
        "--coordinator": coordinator != "",
        "--process_count": count != 0,
        "--process_index": index != -1,
    }
    if not any(given.values()):
        return _detect(environ)
    if coordinator == AUTO and count == 0 and index == -1:
        return Cluster(None, None, None, AUTO)
    for flag, is_given in given.items():
        if not is_given:
            others = " and ".join(other for other in given if given[other])
            raise UserError(f"{flag}: expected a value beside {others}, found nothing")
    if _address(coordinator) is None:
        raise UserError(f"--coordinator: expected host:port, found {coordinator!r}")
    if count < 1:
        raise UserError(f"--process_count: expected a positive number, found {count}")
    if not 0 <= index < count:
        raise UserError(f"--process_index: expected 0 to {count - 1}, found {index}")
    return Cluster(coordinator, count, index, "flags")


def join(cluster: Cluster | None, timeout: int) -> None:
    """Waits for the other processes; from then on jax sees the devices of all of them.

    It comes before anything that makes jax look for devices. Under SLURM and Open MPI jax gives
    each process one GPU, the one of its number on its machine, unless JAX_LOCAL_DEVICE_IDS says
    otherwise.

    Args:
      cluster: None does nothing.
      timeout: seconds after which a process that still waits gives up.

    Raises:
      UserError: if another process does not come in time, was started with other flags, or jax
        cannot join them.
    """
    if cluster is None:
        return
    if cluster.coordinator is None or cluster.count is None or cluster.index is None:
        if cluster.name == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "--coordinator: expected it, --process_count and --process_index, or the package "
                "kubernetes to find them in an indexed job, found neither"
            )
        who = f"a process of {cluster.name} on {socket.gethostname()}"
        _initialize(who, timeout, cluster_detection_method=_JAX_NAMES.get(cluster.name))
        return
    if cluster.index == 0:
        _await_calls(cluster.coordinator, cluster.count, timeout)
    else:
        _call(cluster.coordinator, cluster.count, cluster.index, timeout)
    _initialize(
        f"process {cluster.index} of {cluster.count}",
        timeout,
        coordinator_address=cluster.coordinator,
        num_processes=cluster.count,
        process_id=cluster.index,
        # Otherwise jax asks the scheduler which devices to use although flags were given.
        cluster_detection_method="deactivate",
    )


@contextlib.contextmanager
def joined(cluster: Cluster | None, timeout: int) -> Iterator[None]:
    """A context in which the processes of a run are together; see `join`.

    An exception ends the process at once, after it has been reported: at a normal end jax would
    wait minutes for the others, who wait for this one.
    """
    join(cluster, timeout)
    try:
        if jax.process_count() > 1:
            _connect()
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)
    finally:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()


def _connect() -> None:
    """Makes the connections of collectives between processes, and among all devices.

    Otherwise the first collective makes them, for which another process must come within half a
    minute on CPUs, and ten on GPUs. Now all are here; later one of them may have been reading data.
    """
    multihost_utils.sync_global_devices("joined")
    devices = Mesh(np.array(jax.devices()), ("device",))  # of any slices, unlike jax.make_mesh
    ones = jax.make_array_from_process_local_data(
        NamedSharding(devices, PartitionSpec("device")), np.ones(jax.local_device_count())
    )
    jax.block_until_ready(jax.jit(jnp.sum)(ones))


def text_to_all(text: str) -> str:
    """The text that process 0 gives, on each process."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
    sent = content if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return multihost_utils.broadcast_one_to_all(sent).tobytes().decode()


def on_first_process(work: Callable[[], T], workdir: os.PathLike[str] | str) -> T | None:
    """What process 0 does for all; the others wait for it, and stop where it cannot.

    Args:
      workdir: the run's directory, for the sentence of the others.

    Returns:
      On process 0 what the work gives, elsewhere None.

    Raises:
      UserError: `work` raised it, on process 0 as it is.
    """
    return on_each_process(lambda: work() if jax.process_index() == 0 else None, workdir)


def on_each_process(work: Callable[[], T], workdir: os.PathLike[str] | str) -> T:
    """What each process does of its own; all wait for each other, and stop where one cannot.

    Args:
      workdir: the run's directory, for the sentence of the others.

    Raises:
      UserError: `work` raised it, where it did as it is.
    """
    result, problem = None, ""
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(bool(problem)))
        if failed.any() and not problem:
            index = int(failed.argmax())
            problem = f"--workdir {workdir}: process {index} cannot use it and says why"
    if problem:
        raise UserError(problem)
    return cast(T, result)


def _detect(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that `jax.distributed` can find by these variables, asked for in its order."""
    # Before SLURM: what mpirun starts in a SLURM job also has SLURM's variables, those of mpirun.
    if "OMPI_COMM_WORLD_SIZE" in environ:
        if _number(environ, "OMPI_COMM_WORLD_SIZE") == 1:
            return None
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError(
                "--coordinator: expected it, --process_count and --process_index under Open MPI 5 "
                "or newer, found nothing"
            )
        return Cluster(None, None, None, "Open MPI")

    # A batch script has most of these variables too, but is one process: only srun sets the step's.
    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    if all(f"SLURM_{name}" in environ for name in slurm):
        if _number(environ, "SLURM_NTASKS") == 1:
            return None
        return Cluster(None, None, None, "SLURM")

    # Before Kubernetes, on whose TPU pods both are set.
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        slices = _number(environ, "MEGASCALE_NUM_SLICES", "1")
        if len(hosts.split(",")) * slices == 1:
            return None
        _number(environ, "TPU_WORKER_ID")  # jax needs it
        return Cluster(None, None, None, "TPU pod")

    # Without an index, the pods are not parts of one run.
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster(None, None, None, "Kubernetes")
    return None


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name, default)
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name}: expected a number in the environment, found {value!r}")
    return int(value)


def _address(coordinator: str) -> tuple[str, int] | None:
    """Host and port of `host:port` or `[IPv6]:port`; None if it is neither."""
    host, _, port = coordinator.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        return None
    return host, int(port)


def _await_calls(coordinator: str, count: int, timeout: int) -> None:
    """Process 0: waits for a call of every other process, then answers all of them alike."""
    deadline = time.monotonic() + timeout
    callers: list[socket.socket] = []
    missing = list(range(1, count))
    problem = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(coordinator, count))
        while missing and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                names = ", ".join(map(str, missing))
                problem = (
                    f"process 0 of {count} waited {timeout} s at {coordinator} for "
                    f"{'process' if len(missing) == 1 else 'processes'} {names} (--join_timeout)"
                )
                break
            try:
                caller.settimeout(_GREETING_TIMEOUT)
                index, its_count = map(int, _read_line(caller).split())
            except (OSError, ValueError):
                caller.close()  # not a process of a run, but, say, a port scanner
                continue
            callers.append(caller)
            if its_count != count:
                problem = (
                    f"--process_count: expected the same for all, found {count} "
                    f"for process 0 and {its_count} for process {index}"
                )
            elif index not in missing:
                problem = f"--process_index: expected each once, found {index} twice"
            else:
                missing.remove(index)
        answer = _GO if problem is None else _STOP + problem
        for caller in callers:
            with contextlib.suppress(OSError):  # it is gone: jax will miss it
                caller.sendall(f"{answer}\n".encode())
    if problem is not None:
        raise UserError(problem)


def _listen(coordinator: str, count: int) -> socket.socket:
    """Opens the coordinator's port on all interfaces, as jax does with the same port later."""
    address = _address(coordinator)
    assert address is not None  # `find_cluster` has checked it
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        return socket.create_server(
            ("", address[1]), family=family, backlog=count, dualstack_ipv6=ipv6
        )
    except OSError as error:
        raise UserError(
            f"--coordinator: expected a free port on this machine, found {coordinator}: "
            f"{error.strerror}"
        ) from error


def _call(coordinator: str, count: int, index: int, timeout: int) -> None:
    """Any other process: calls process 0 until it is there, and waits for its answer."""
    address = _address(coordinator)
    assert address is not None  # `find_cluster` has checked it
    deadline = time.monotonic() + timeout
    left = float(timeout)
    while True:
        try:
            with socket.create_connection(address, timeout=max(left, 1)) as connection:
                connection.sendall(f"{index} {count}\n".encode())
                # Process 0 answers when all are there or its own time is over, which has begun
                # before this connection; to leave earlier would make it wait for nothing.
                connection.settimeout(timeout + 2 * _GREETING_TIMEOUT)
                answer = _read_line(connection)
            if answer == _GO:
                return
            if answer.startswith(_STOP):
                raise UserError(answer.removeprefix(_STOP))
            raise ConnectionError("what answers there is not process 0 of this run")
        except OSError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"process {index} of {count} waited {timeout} s at {coordinator} for process 0 "
                    f"(--join_timeout): {error.strerror or error}"
                ) from error
        time.sleep(min(left, 1))


def _read_line(connection: socket.socket) -> str:
    with connection.makefile("rb") as lines:
        return lines.readline(10_000).decode(errors="replace").strip("\n")


def _initialize(
    who: str,
    timeout: int,
    *,
    cluster_detection_method: str | None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Runs `jax.distributed.initialize` in a thread that the end of the process does not await."""
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method=cluster_detection_method,
                initialization_timeout=timeout + _JAX_GIVES_UP_LATER,
            )
        except Exception as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=initialize, daemon=True).start()
    try:
        error = outcome.get(timeout=timeout)
    except queue.Empty:
        raise UserError(
            f"{who} waited {timeout} s for the other processes (--join_timeout)"
        ) from None
    if error is not None:
        reason = " ".join(str(error).split())
        raise UserError(f"{who} could not join the other processes: {reason}") from error
