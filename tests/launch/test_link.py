"""`fomoe_ext.link`: sites in network namespaces with shaped traffic, or with counted delays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import fomoe_ext
from fomoe_ext import cli
from fomoe_ext.config.links import parse_link
from fomoe_ext.launch.link import link_variable
from fomoe_ext.launch.namespace import NamespaceError, Network, address
from fomoe_ext.placement.wire import Link

HOME = str(Path(fomoe_ext.__file__).parent.parent)
COMMAND = [sys.executable, "-P", "-m", "fomoe_ext.link"]


def test_needs_no_torch():
    code = (
        "import sys, fomoe_ext.launch, fomoe_ext.launch.namespace; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], env=environment()).returncode == 0


# ---- sites on a link -----------------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    names = ("GLOO_SOCKET_IFNAME", "FOMOE_LINK", "FOMOE_LINK_MODE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PYTHONPATH": HOME, "OMP_NUM_THREADS": "1", **changes}


def arguments(code: str, sites: int = 2, link: str | None = "1gbit", *flags: str) -> list[str]:
    """The command that runs Python `code` on every site."""
    shaped = [] if link is None else ["--link", link]
    python = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    return [*COMMAND, "--sites", str(sites), *shaped, *flags, "--", *python]


def run(*given, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(*given), capture_output=True, text=True, env=env or environment(), timeout=150
    )


def lines_of(result: subprocess.CompletedProcess[str]) -> list:
    """The JSON lines that the sites wrote, sorted; fails unless the run succeeds."""
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(json.loads(line) for line in result.stdout.splitlines())


SHOW = """
    import json, os, socket
    names = ("RANK", "FOMOE_LINK", "GLOO_SOCKET_IFNAME")
    inside = [os.readlink("/proc/self/ns/net"), [name for _, name in socket.if_nameindex()]]
    line = [*map(os.environ.get, names), *inside, open("/proc/self/uid_map").read()]
    os.write(1, (json.dumps(line) + "\\n").encode())
"""


@pytest.fixture(scope="module")
def kernel():
    """Skips the test where the kernel cannot shape traffic."""
    try:
        Network(parse_link("1gbit"), 1).close()
    except NamespaceError as error:
        pytest.skip(f"no shaped links here: {error}")


def fake_tool(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which `name` is a shell script that can call the real `$real`."""
    real = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    script = folder / name
    script.write_text(f"#!/bin/sh\nreal={real}\n{textwrap.dedent(code)}")
    script.chmod(0o755)
    return environment(PATH=f"{folder}:{os.environ['PATH']}")


def test_every_site_has_a_namespace_and_an_interface(kernel):
    first, second = lines_of(run(SHOW, env=environment(GLOO_SOCKET_IFNAME="lo,eth7")))
    assert [first[0], second[0]] == ["0", "1"]
    assert first[1] == second[1] == link_variable(Link(1e9, 0.0), "kernel")
    assert first[2] == second[2] == "uplink,uplink"  # any number of process groups
    assert len({first[3], second[3], os.readlink("/proc/self/ns/net")}) == 3
    assert "uplink" in first[4]


EXCHANGE = """
    import json, os, select, socket, subprocess, sys, time
    size, addresses, receiver, folder = json.loads(sys.argv[1])
    site, sites = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ready = os.path.join(folder, "ready")
    if site == receiver:
        server = socket.create_server((addresses[site], 7000), backlog=sites)
        peers = [server.accept()[0] for _ in range(sites - 1) if open(ready, "w")]
        left = (sites - 1) * size
        start = time.monotonic()
        for peer in peers:
            peer.sendall(b"!")
        while left:
            for peer in select.select(peers, [], [])[0]:
                left -= len(peer.recv(1 << 16))
        os.write(1, (json.dumps(["took", time.monotonic() - start, left]) + "\\n").encode())
    else:
        while not os.path.exists(ready):
            time.sleep(0.01)
        peer = socket.create_connection((addresses[receiver], 7000))
        peer.recv(1)
        peer.sendall(bytes(size))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        show = ["tc", "-s", "-j", "qdisc", "show", "dev", "uplink"]
        qdisc, = json.loads(subprocess.check_output(show, env={**os.environ, "PATH": path}))
        line = [qdisc["kind"], qdisc["options"]["rate"], qdisc["bytes"], qdisc["drops"]]
        os.write(1, (json.dumps(["tc", *line]) + "\\n").encode())
"""


def exchange(folder: Path, sites: int, link: str, size: int) -> tuple[float, list]:
    """Seconds that site 0 takes to receive `size` bytes from each other site; tc's figures."""
    given = json.dumps([size, [address(i) for i in range(sites)], 0, str(folder)])
    lines = lines_of(
        subprocess.run(
            [*arguments(EXCHANGE, sites, link), given],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=150,
        )
    )
    kind, seconds, missing = lines.pop()
    assert kind == "took" and missing == 0
    return seconds, lines


@pytest.mark.parametrize("rate", [10e6, 40e6])
def test_the_kernel_shapes_what_a_site_sends(kernel, tmp_path, rate):
    size = 400_000
    seconds, ((_, shaper, told_rate, sent, drops),) = exchange(tmp_path, 2, f"{rate}bit", size)
    assert shaper == "tbf" and told_rate == rate / 8 and drops == 0
    assert size < sent < 1.1 * size  # headers; nothing went another way
    # A busy machine only makes it slower, and no shaping at all would be some hundred times faster.
    assert seconds > 0.9 * 8 * size / rate


def test_the_kernel_shapes_what_a_site_receives(kernel, tmp_path):
    size, rate = 800_000, 6e6
    seconds, sent = exchange(tmp_path, 3, f"{rate}bit", size)
    assert len(sent) == 2
    alone = 8 * size / rate  # what one sender's uplink takes
    ahead = 0.25  # a receiver may run ahead by so many seconds of its rate
    assert seconds > 0.9 * (2 * alone - ahead) > 1.2 * alone


GLOO = """
    import json, os, torch, torch.distributed as dist
    site, sites = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=os.environ["FOMOE_RENDEZVOUS"], rank=site, world_size=sites
    )
    values = torch.full([50_000], site + 1.0)
    dist.all_reduce(values)
    dist.barrier()  # who hears of it has all that was sent before
    (counters,) = [line for line in open("/proc/net/dev") if "uplink:" in line]
    sent = int(counters.split()[9])
    os.write(1, (json.dumps([values.unique().tolist(), sent]) + "\\n").encode())
    dist.destroy_process_group()
"""


def test_torch_distributed_meets_over_the_link(kernel):
    for values, sent in lines_of(run(GLOO, 2, "100mbit,1ms")):
        assert values == [3.0]
        assert sent > 200_000  # 2 (n - 1) / n of the tensor


def test_a_user_namespace_is_made_where_the_network_alone_is_not_allowed(kernel, tmp_path):
    refuse = """
        [ "$1" = --user ] && touch "$0.user"
        [ -e "$0.user" ] && exec $real "$@"
        echo "not allowed" >&2
        exit 1
    """
    env = fake_tool(tmp_path, "unshare", refuse)
    lines = lines_of(run(SHOW, 2, "1gbit,1ms", env=env))
    inside = {line[-1] for line in lines}
    assert inside != {Path("/proc/self/uid_map").read_text()}
    assert all(int(line[-1].split()[2]) == 1 for line in lines)  # one user is mapped, as root
    assert all(line[1].endswith((";rate", ";kernel")) for line in lines)
    assert (tmp_path / "unshare.user").exists()


@pytest.mark.parametrize("has_netem", [True, False])
def test_the_latency_is_left_to_the_kernel_where_it_has_netem(kernel, tmp_path, has_netem):
    """Of the machine's `tc` only tbf is used: it replaces netem, which may be missing."""
    use = "s/netem delay .*/tbf rate 10gbit burst 1000000 limit 1000000/"
    tc = f"""
        input=$(cat)
        echo "$input" >> {tmp_path}/asked
        case "$input" in
        *netem*) {"true" if has_netem else "echo Unknown netem >&2; exit 1"} ;;
        esac
        echo "$input" | sed '{use}' | $real "$@"
    """
    lines = lines_of(run(SHOW, 2, "1gbit,50ms", env=fake_tool(tmp_path, "tc", tc)))
    mode = "kernel" if has_netem else "rate"
    assert {line[1] for line in lines} == {link_variable(Link(1e9, 0.05), mode)}
    asked = (tmp_path / "asked").read_text()
    assert asked.count("netem delay 50000us") == 2
    assert asked.count("dev uplink root tbf rate 1000000000bit") == 2
    assert asked.count("root tbf rate 1000000000bit") == (2 if has_netem else 4)


# ---- fallback ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool, code, reason",
    [
        ("unshare", "echo 'unshare: no, not here' >&2; exit 1", "unshare: no, not here"),
        ("ip", "echo 'Unknown device type.' >&2; exit 2", "ip: Unknown device type."),
        ("tc", "echo 'Unknown qdisc.' >&2; exit 2", "tc: Unknown qdisc."),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="scripts in the place of Linux's tools")
def test_delays_are_counted_where_the_kernel_cannot_shape(tmp_path, tool, code, reason):
    env = fake_tool(tmp_path, tool, code)
    result = run(SHOW, 2, "1gbit,50ms", env=env)
    for line in lines_of(result):
        assert line[1] == link_variable(Link(1e9, 0.05), "counted") and line[2] == "lo"
        assert line[3] == os.readlink("/proc/self/ns/net")
    assert "link 1 Gbit/s, 50 ms: delays are counted" in result.stderr
    if shutil.which("unshare") and shutil.which("nsenter"):
        assert reason in result.stderr
    result = run(SHOW, 2, "1gbit,50ms", env={**env, "FOMOE_LINK_MODE": "kernel"})
    assert result.returncode == 2 and result.stdout == "" and "counted" not in result.stderr


def test_counting_can_be_forced():
    result = run(SHOW, 2, "1gbit,50ms", env=environment(FOMOE_LINK_MODE="counted"))
    for line in lines_of(result):
        assert line[1] == link_variable(Link(1e9, 0.05), "counted")
        assert line[3] == os.readlink("/proc/self/ns/net")
    assert result.stderr == ""


def test_without_a_link_nothing_is_said():
    env = environment(FOMOE_LINK=link_variable(Link(1e9, 0.0), "counted"))
    for line in lines_of(run(SHOW, 2, None, env=env)):
        assert line[1] is None and line[3] == os.readlink("/proc/self/ns/net")


@pytest.mark.parametrize(
    "link, mode, message",
    [("fast", "auto", "link must be a bandwidth"), ("1gbit", "always", "FOMOE_LINK_MODE must be")],
)
def test_bad_arguments_are_named(link, mode, message):
    result = run(SHOW, 2, link, env=environment(FOMOE_LINK_MODE=mode))
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr


# ---- launching -----------------------------------------------------------------------------------


@pytest.fixture(params=["kernel", "counted"])
def mode(request):
    """The environment in which sites have namespaces, and one in which they have none."""
    if request.param == "kernel":
        request.getfixturevalue("kernel")
    return environment(FOMOE_LINK_MODE=request.param)


@pytest.fixture
def start():
    """Starts a launcher and returns when both of its sites have written their process's number."""
    launchers: list[subprocess.Popen[str]] = []
    pids: list[int] = []

    def start(code: str, env: dict[str, str]) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            arguments(code),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        launchers.append(process)
        assert process.stdout is not None
        pids.extend(int(process.stdout.readline().split()[0]) for _ in range(2))
        return process, pids

    yield start
    for process in launchers:
        if process.poll() is None:  # the test failed
            for pid in [*pids, process.pid]:
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def require_gone(pids: list[int], within_s: float = 20.0) -> None:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + within_s
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, "a site is still running"
        time.sleep(0.02)


def test_output_goes_to_log_files_and_the_exit_code_is_passed_on(mode, tmp_path):
    code = """
        import os, sys, time
        print("site", os.environ["RANK"], flush=True)
        if os.environ["RANK"] == "1":
            sys.exit("it broke")
        time.sleep(60)
    """
    result = run(code, 2, "1gbit", "--log-dir", str(tmp_path / "logs"), env=mode)
    assert result.returncode == 1 and result.stdout == "site 0\n"
    assert (tmp_path / "logs/site-1.log").read_text().splitlines() == ["site 1", "it broke"]
    assert "site 1 ended with exit code 1" in result.stderr and "  it broke\n" in result.stderr


def test_a_killed_site_is_blamed_and_the_others_end(mode, start):
    code = """
        import os, time
        os.write(1, f"{os.getpid()} {os.environ['RANK']}\\n".encode())
        time.sleep(1 if os.environ["RANK"] == "0" else 60)
        os._exit(75)
    """
    process, sites = start(code, mode)
    victim = next(p for p in sites if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "site 1 was killed by SIGKILL" in err
    require_gone(sites)


STOPS = """
    import os, signal, sys, time
    def stop(number, frame):
        os.write(1, b"asked\\n")
        if sys.argv[1:] != ["stubborn"]:
            sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    os.write(1, f"{os.getpid()}\\n".encode())
    while True:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGHUP], ids=lambda kind: kind.name)
def test_signals_are_passed_on(mode, start, kind):
    process, sites = start(STOPS, mode)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "asked\nasked\n"
    require_gone(sites)


def test_a_second_signal_kills(mode, start):
    process, sites = start(STOPS.replace('["stubborn"]', "[]"), mode)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["asked\n", "asked\n"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    require_gone(sites)


def test_a_killed_launcher_leaves_nothing_behind(mode, start):
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")

    def host() -> list[list[str]]:
        names = Path("/run/netns")
        named = sorted(p.name for p in names.iterdir()) if names.is_dir() else []
        return [named, sorted(os.listdir("/sys/class/net"))]

    def in_use() -> set[str]:
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            for link in (process / "ns/net", *process.glob("fd/*")):
                try:
                    found.add(os.readlink(link))
                except OSError:
                    continue
        return found

    before = host()
    process, sites = start(STOPS, mode)
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in sites}
    held = {os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
    namespaces |= {name for name in held if name.startswith("net:")}
    own = os.readlink("/proc/self/ns/net")
    assert len(namespaces - {own}) == (3 if mode["FOMOE_LINK_MODE"] == "kernel" else 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert sorted(map(int, children)) == sorted(sites)  # no helper is left but the sites
    process.kill()
    process.communicate(timeout=60)
    require_gone(sites)
    assert not (namespaces - {own}) & in_use()
    assert host() == before


def test_the_sites_of_a_job_get_its_link(monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr(
        "fomoe_ext.train.command.launch", lambda *given, **_: got.append(given) or 0
    )
    (tmp_path / "text.txt").write_text("A text that is long enough. " * 1000)
    flags = ["--sites", "3", "--replication", "1", "--num-experts", "9", "--seq-len", "64"]
    flags += ["--data", str(tmp_path / "text.txt"), "--cache-dir", str(tmp_path / "cache")]
    for i, link in enumerate([[], ["--link", "200mbit,50ms"]]):
        run_dir = ["--run-dir", str(tmp_path / str(i))]
        assert cli.main(["train", *flags, *link, *run_dir]) == 0
    assert [(given[1], given[3]) for given in got] == [(3, None), (3, Link(2e8, 0.05))]
