"""launch/multinode.sh and launch/local.sh for real.

Two agents on one address, two machines with addresses of their own, a restart, and the time a stopped rank gets.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch_helpers import ROOT, WAIT_S, last_step, wait_until

pytestmark = pytest.mark.slow
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a session of its own, output to `<name>.log`; kills what is left at the end."""
    started = []

    def start_process(name: str, command: list[str], **variables: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=environment | variables, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        started.append(process)
        return process

    yield start_process
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def free_port() -> int:
    """A port that no outgoing connection takes either, before the agent listens on it some seconds later."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port")


def agent(head: str, port: int, recipe: Path) -> list[str]:
    options = ["--head", head, "--port", str(port), "--nnodes", "2", "--nproc", "1", "--id", "test"]
    return [str(ROOT / "launch/multinode.sh"), *options, "--", "--config", str(recipe)]


def assert_trained(processes: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    codes = [process.wait(WAIT_S) for process in processes]
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert codes == [0, 0], logs
    assert "2 ranks: dp 2; experts edp 1 × ep 2" in logs
    assert last_step(tmp_path / "run") == 6


def test_two_agents_on_one_machine_train_together(start, recipe, tmp_path):
    port = free_port()
    assert_trained([start(name, agent("localhost", port, recipe), LOG_DIR=str(tmp_path / name)) for name in ("a", "b")], tmp_path)
    # torchrun kept the output of each rank.
    assert len(list(tmp_path.glob("[ab]/*/attempt_0/0/stdout.log"))) == 2


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[int, list[str]], list[str]]]:
    """Two network namespaces joined by a cable, each with its host name and address; (i, command) → command on machine i."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, iproute2 and unshare")
    tag = f"mg{os.getpid()}"
    names = [f"{tag}a", f"{tag}b"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)

    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.213.7.1 machine0\n10.213.7.2 machine1\n")

    def on_machine(index: int, command: list[str]) -> list[str]:
        enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec "${@:3}"'
        inside = ["bash", "-c", enter, "bash", str(tmp_path / "hosts"), f"machine{index}", *command]
        return ["ip", "netns", "exec", names[index], "unshare", "--mount", "--uts", *inside]

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
            for index, name in enumerate(names):
                ip("link", "set", name, "netns", name)
                for arguments in (f"addr add 10.213.7.{index + 1}/24 dev {name}", f"link set {name} up", "link set lo up"):
                    ip("-n", name, *arguments.split())
            subprocess.run(on_machine(0, ["true"]), check=True, capture_output=True, text=True, timeout=30)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        yield on_machine
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


def test_two_machines_with_their_own_addresses_train_together(start, recipe, tmp_path, machines):
    processes = [start(f"machine{i}", machines(i, agent("machine0", 29500, recipe))) for i in (0, 1)]
    assert_trained(processes, tmp_path)


def test_a_wrong_configuration_names_the_machine_and_starts_nothing(start, recipe, tmp_path):
    process = start("a", [*agent("localhost", free_port(), recipe), "--parallel.ep", "3"])
    assert process.wait(WAIT_S) == 2
    assert re.match(rf"{socket.gethostname()}: megagrin: error: 2 settings do not fit", (tmp_path / "a.log").read_text())


def test_a_killed_rank_is_restarted_and_the_run_continues(start, recipe, tmp_path):
    """Row 1 of the fault table, from the launcher's side: MAX_RESTARTS=1 survives one SIGKILL."""
    command = [str(ROOT / "launch/local.sh"), "--nproc", "2", "--", "--config", str(recipe)]
    process = start("a", [*command, "--train.steps=100", "--checkpoint.interval=5"], MAX_RESTARTS="1")
    log, checkpoint = tmp_path / "a.log", tmp_path / "run/checkpoints/step_00000005"
    wait_until(checkpoint.exists, lambda: process.poll() is None, log.read_text)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [child for child in children if b"megagrin.cli" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert process.wait(WAIT_S) == 0, log.read_text()
    assert "resumed  after step" in log.read_text()
    assert last_step(tmp_path / "run") == 100


@pytest.mark.parametrize(("allowed", "saved"), [(60, True), (1, False)])
def test_a_stopped_rank_may_save_for_as_long_as_shutdown_timeout_says(start, environment, tmp_path, allowed, saved):
    """Row 9 of the fault table: torchrun kills after 30 s unless told otherwise; here the save takes 5 s, or 35 s."""
    seconds = 35 if saved else 5
    (tmp_path / "rank.py").write_text(
        textwrap.dedent(f"""
            import pathlib, signal, sys, time

            def save(*_):
                time.sleep({seconds})
                pathlib.Path("{tmp_path}/saved").touch()
                sys.exit(0)

            signal.signal(signal.SIGTERM, save)
            pathlib.Path("{tmp_path}/ready").touch()
            time.sleep(200)
        """)
    )
    script = f'source "{ROOT}/launch/common.sh"; find_python "{ROOT}"; set_environment 1; run_torchrun --standalone "$0"'
    process = start("a", ["bash", "-euo", "pipefail", "-c", script, str(tmp_path / "rank.py")], SHUTDOWN_TIMEOUT=str(allowed))
    wait_until((tmp_path / "ready").exists, lambda: process.poll() is None, (tmp_path / "a.log").read_text)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) != 0
    assert (tmp_path / "saved").exists() == saved
