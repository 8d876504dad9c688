"""Processes that come together by flags and as under SLURM, and those that cannot."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.processes import Cluster, find_cluster, join, joined

ROOT = Path(__file__).parents[2]

# A command as `evf_sam_jax.main` is one: it joins, then adds and gathers over all devices.
PROGRAM = """
import json, os, time
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from evf_sam_jax import processes
from evf_sam_jax.errors import run_app

def main(argv):
    options = flags.FLAGS
    cluster = processes.find_cluster(
        options.coordinator, options.process_count, options.process_index, os.environ
    )
    with processes.joined(cluster, options.join_timeout):
        if jax.process_index() == 1:
            time.sleep(float(os.environ.get("SECONDS_LATE", 0)))
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        rows = np.arange(2.0) + 2 * jax.process_index()  # one for each of the two devices here
        array = jax.make_array_from_process_local_data(
            NamedSharding(mesh, PartitionSpec("data")), rows
        )
        result = {
            "name": cluster.name,
            "first": jax.process_index() == 0,
            "devices": mesh.size,
            "sum": float(jax.jit(lambda x: x.sum())(array)),
            "rows": multihost_utils.process_allgather(array, tiled=True).tolist(),
        }
    print(json.dumps(result))

processes.define_flags()
run_app(main)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts the command on two CPU devices, without what a scheduler has set here."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_", "XLA_"))
    }
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=kept | settings | dict(environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def flag_arguments(port: int, count: int, index: int, timeout: int = 60) -> list[str]:
    return [
        f"--coordinator=127.0.0.1:{port}",
        f"--process_count={count}",
        f"--process_index={index}",
        f"--join_timeout={timeout}",
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, stdout, stderr)
        for process, (stdout, stderr) in zip(processes, outputs, strict=True)
    ]


def assert_joined(processes: list[subprocess.Popen[str]], name: str) -> None:
    for index, (status, stdout, stderr) in enumerate(finish(processes)):
        assert status == 0, stderr
        assert json.loads(stdout.splitlines()[-1]) == {  # gloo prints before it
            "name": name,
            "first": index == 0,
            "devices": 4,
            "sum": 6.0,
            "rows": [0.0, 1.0, 2.0, 3.0],
        }


def test_two_processes_by_flags() -> None:
    port = free_port()
    # The second one first: it has to wait until somebody listens.
    second = start(*flag_arguments(port, 2, 1))
    time.sleep(1)
    assert_joined([start(*flag_arguments(port, 2, 0)), second], "flags")


@pytest.mark.slow
def test_one_may_come_later_than_connections_are_waited_for() -> None:
    port = free_port()
    late = {"SECONDS_LATE": "35"}
    both = [start(*flag_arguments(port, 2, index), environ=late) for index in (0, 1)]
    assert_joined(both, "flags")


def slurm_step(index: int, port: int) -> dict[str, str]:
    """What srun sets for one of two tasks on this machine; jax would derive the port otherwise."""
    return {
        "SLURM_JOB_ID": "4321",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def test_two_processes_as_under_slurm() -> None:
    port = free_port()
    assert_joined([start(environ=slurm_step(index, port)) for index in (0, 1)], "SLURM")


def test_a_process_that_never_comes() -> None:
    # All at once, as each spends its time waiting.
    port = free_port()
    beginning = time.monotonic()
    results = finish(
        [
            start(*flag_arguments(free_port(), 2, 0, timeout=3)),
            start(*flag_arguments(port, 2, 1, timeout=3)),
            start("--join_timeout=3", environ=slurm_step(0, free_port())),
            start("--join_timeout=3", environ=slurm_step(1, free_port())),
        ]
    )
    assert time.monotonic() - beginning < 60  # four interpreters start and import jax
    assert [status for status, _, _ in results] == [2, 2, 2, 2], results
    zero, one, *slurm = [stderr for _, _, stderr in results]
    assert zero.startswith("error: process 0 of 2 waited 3 s at 127.0.0.1:")
    assert zero.endswith(" for process 1 (--join_timeout)\n") and zero.count("\n") == 1
    assert one == (
        f"error: process 1 of 2 waited 3 s at 127.0.0.1:{port} for process 0 (--join_timeout): "
        "Connection refused\n"
    )
    for stderr in slurm:  # of process 0, jax's own log of its end comes after it
        assert stderr.startswith(f"error: a process of SLURM on {socket.gethostname()} waited 3 s")
        assert "Check failure" not in stderr


def refusals(*clusters: Cluster, timeout: int) -> list[str]:
    """What each process is told that cannot join: jax is not reached, so threads do as well."""

    def refusal(cluster: Cluster) -> str:
        with pytest.raises(UserError) as raised:
            join(cluster, timeout)
        return str(raised.value)

    with ThreadPoolExecutor(len(clusters)) as threads:
        return list(threads.map(refusal, clusters))


def test_every_process_names_the_one_that_is_missing() -> None:
    address = f"127.0.0.1:{free_port()}"
    zero, one, three = (Cluster(address, 4, index, "flags") for index in (0, 1, 3))
    late = f"process 0 of 4 waited 3 s at {address} for process 2 (--join_timeout)"
    assert refusals(zero, one, three, timeout=3) == [late] * 3


def test_every_process_names_the_one_of_another_count() -> None:
    address = f"127.0.0.1:{free_port()}"
    counts = "--process_count: expected the same for all, found 2 for process 0 and 3 for process 2"
    clusters = Cluster(address, 2, 0, "flags"), Cluster(address, 3, 2, "flags")
    assert refusals(*clusters, timeout=20) == [counts] * 2


def test_every_process_names_an_index_given_twice() -> None:
    address = f"127.0.0.1:{free_port()}"
    zero, one = (Cluster(address, 3, index, "flags") for index in (0, 1))
    twice = "--process_index: expected each once, found 1 twice"
    assert refusals(zero, one, one, timeout=20) == [twice] * 3


def test_a_stranger_who_calls_is_not_counted() -> None:
    port = free_port()
    zero = Cluster(f"127.0.0.1:{port}", 2, 0, "flags")

    def call() -> None:
        for _ in range(50):
            with contextlib.suppress(ConnectionRefusedError):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            time.sleep(0.02)

    stranger = threading.Thread(target=call)
    stranger.start()
    [late] = refusals(zero, timeout=1)
    stranger.join()
    assert late.endswith("for process 1 (--join_timeout)")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        cluster = Cluster(f"127.0.0.1:{port}", 2, 0, "flags")
        expected = f"--coordinator: .*free port on this machine, found 127.0.0.1:{port}: Address"
        with pytest.raises(UserError, match=expected):
            join(cluster, 1)


def test_another_program_at_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):  # the server is closed at the end
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(b"SSH-2.0\n")
                        connection.recv(100)

        threading.Thread(target=answer, daemon=True).start()
        one = Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, "flags")
        [message] = refusals(one, timeout=1)
        server.shutdown(socket.SHUT_RDWR)
    assert message.endswith(
        "for process 0 (--join_timeout): what answers there is not process 0 of this run"
    )


def test_alone_there_is_nothing_to_join_or_leave() -> None:
    with joined(None, 1):
        pass


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "expected"),
    [
        ("", 2, 0, "--coordinator: expected a value beside --process_count and --process_index"),
        ("a:1", 0, 0, "--process_count: expected a value beside --coordinator and"),
        ("a:1", 2, -1, "--process_index: expected a value beside --coordinator and"),
        ("a:1", 0, -1, "--process_count: expected a value beside --coordinator, found nothing"),
        ("a", 2, 0, "--coordinator: expected host:port, found 'a'"),
        (":1", 2, 0, "--coordinator: expected host:port"),
        ("a:", 2, 0, "--coordinator: expected host:port"),
        ("a:http", 2, 0, "--coordinator: expected host:port"),
        ("a:65536", 2, 0, "--coordinator: expected host:port"),
        ("::1:5", 2, 0, "--coordinator: expected host:port"),
        ("a:1", -2, 0, "--process_count: expected a positive number, found -2"),
        ("a:1", 2, 2, "--process_index: expected 0 to 1, found 2"),
        ("a:1", 2, -2, "--process_index: expected 0 to 1, found -2"),
    ],
)
def test_flags_that_name_no_cluster(
    coordinator: str, count: int, index: int, expected: str
) -> None:
    with pytest.raises(UserError, match=f"^{expected}"):
        find_cluster(coordinator, count, index, {})


@pytest.mark.parametrize("coordinator", ["node1:1234", "10.0.0.1:1234", "[::1]:1234"])
def test_flags_come_before_the_environment(coordinator: str) -> None:
    found = find_cluster(coordinator, 2, 1, slurm_step(0, 1))
    assert found == Cluster(coordinator, 2, 1, "flags")


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


SLURM = slurm_step(1, 1)
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_SIZE": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (without(SLURM, "SLURM_STEP_NODELIST"), None),  # a batch script, not a step of srun
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | OPEN_MPI, "Open MPI"),
        (TPU, "TPU pod"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
        (TPU | {"TPU_PROCESS_ADDRESSES": "host-0:8471"}, None),
        (KUBERNETES, "Kubernetes"),
        (without(KUBERNETES, "JOB_COMPLETION_INDEX"), None),
        (TPU | KUBERNETES, "TPU pod"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"} | KUBERNETES, None),
    ],
)
def test_clusters_in_the_environment(environ: dict[str, str], name: str | None) -> None:
    expected = None if name is None else Cluster(None, None, None, name)
    assert find_cluster("", 0, -1, environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLURM | {"SLURM_NTASKS": "2(x2)"}, r"SLURM_NTASKS: expected a number .*'2\(x2\)'"),
        (without(TPU, "TPU_WORKER_ID"), "TPU_WORKER_ID: expected a number .*found ''"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "--coordinator: expected it, .* under Open MPI 5"),
    ],
)
def test_environments_that_jax_could_not_use(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=f"^{expected}"):
        find_cluster("", 0, -1, environ)


def test_jax_may_find_out_all_by_itself() -> None:
    assert find_cluster("auto", 0, -1, {}) == Cluster(None, None, None, "auto")
    with pytest.raises(UserError, match="--process_index: expected a value beside"):
        find_cluster("auto", 2, -1, {})
