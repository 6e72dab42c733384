"""What the files of the lab share: the README's commands, namespaces, dockerd, machines that boot, how they run.

The lab shows what needs more than the self-check: dockerd, machines that boot, long runs. Each file
beside this one is unittest and runs by itself, as root: `python3 .ci/lab/dockerd.py`, with -v and -k.
GIPAM_SUITE=trixie has dockerd 26.1.5 and Python 3.13, GIPAM_SUITE=forky, the default, 28.5.2 and 3.14.
What is missing is a failure here, and named with its remedy. Ctrl-C waits for the test that runs.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Callable, NamedTuple, Sequence

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from test_gipam import DEADLINE_S, GIPAM, HERE, conclude, dial  # noqa: E402

SUITE = os.environ.get("GIPAM_SUITE") or "forky"  # whose dockerd and Python are shown
BASE_V4 = "10.2.0.0/16"
BASE_V6 = "2001:db8:0:100::/56"
DOCKER = {"trixie": 26, "forky": 28}[SUITE]  # the version of its dockerd
BRIDGE = "com.docker.network.bridge."
ROUTED = ("-o", BRIDGE + "gateway_mode_ipv4=routed", "-o", BRIDGE + "gateway_mode_ipv6=routed") if DOCKER >= 27 \
    else ("-o", BRIDGE + "enable_ip_masquerade=false")
SOCKET = "/run/docker/plugins/gipam.sock"
DOCKER_DEADLINE_S = 90.0  # dockerd waits 15 s for each network whose plugin does not answer
PACKAGES = {"etcd": "etcd-server", "etcdctl": "etcd-client", "etcdutl": "etcd-server", "ip": "iproute2",
            "nsenter": "util-linux", "ss": "iproute2", "unshare": "util-linux"}  # of the same name are others


def require(*commands: str) -> None:
    """Fail, with the remedy, unless root runs this and has these commands."""
    if os.geteuid() != 0:
        raise AssertionError("the lab needs root: run it with sudo")
    missing = sorted(command for command in commands if shutil.which(command) is None)
    if missing:
        packages = " ".join(sorted({PACKAGES.get(command, command) for command in missing}))
        raise AssertionError(f"{', '.join(missing)}: not found: apt-get install {packages}")


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of condition()."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s:g} s in vain: {what}")
        time.sleep(0.05)


# === The README ===================================================================================


class Block(NamedTuple):
    """A fenced block: its part and chapter, what stands behind its first fence, the text."""

    part: str
    chapter: str
    kind: str
    text: str

    def script(self) -> str:
        """Return its commands as they are run where the project was copied to."""
        return "cd /root/gipam\n" + self.text


def read_blocks() -> list[Block]:
    """Return the blocks of README.md, in order."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    blocks, titles = [], [""] * 7
    for match in re.finditer(r"^(#+) (.*)$|^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        if match[1] is not None:
            level = len(match[1])
            titles[level:] = [match[2]] * (7 - level)
        else:
            blocks.append(Block(titles[2], titles[-1], match[3], match[4]))
    return blocks


# === Running ======================================================================================


def main() -> int:
    """Run the tests of the file that was started, then print what CI reads; a skip is a failure."""
    result = unittest.main(module="__main__", exit=False, catchbreak=True).result
    for test, reason in result.skipped:
        print(f"skipped: {test}: {reason}")
    failed = len(result.failures + result.errors) + len(result.skipped)
    return conclude(max(0, result.testsRun - failed), failed, 0)


# === Namespaces and processes =====================================================================

# It says its pid in the /proc of the caller. As first process it reaps: a dead containerd that
# nobody waits for would block the next dockerd.
HOLDER = "read pid rest < /proc/self/stat; %s\necho $pid; exec env --ignore-signal=CHLD cat"


class CommandError(Exception):
    """A command failed; str() is what it was and said."""


def run(*command: str, env: dict[str, str] | None = None, for_s: float = DOCKER_DEADLINE_S) -> str:
    """Return what a command prints. Raises: CommandError, also if it does not end in that time."""
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              encoding="utf-8", timeout=for_s)
    except subprocess.TimeoutExpired as error:
        raise CommandError(str(error)) from None
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def works(call: Callable[..., object], *arguments: Any) -> bool:
    """Tell whether a command succeeds, such as works(docker, "version")."""
    try:
        call(*arguments)
    except CommandError:
        return False
    return True


class Namespaces:
    """Namespaces of these kinds, e.g. "--net"; with "--pid" what lives in them ends with them."""

    def __init__(self, *kinds: str, setup: str) -> None:
        require("ip", "mount", "nsenter", "unshare")
        fork = ["--fork", "--kill-child"] if "--pid" in kinds else []
        self.holder = subprocess.Popen(
            ["unshare", *kinds, *fork, "sh", "-ec", HOLDER % setup], encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.holder.stdout
        self.pid = self.holder.stdout.readline().strip()
        self.inside = ("nsenter", "-t", self.pid, *kinds, "--")
        if not self.pid:
            raise AssertionError("gets no namespaces: run it in a privileged container")

    def close(self) -> None:
        self.holder.communicate(timeout=DOCKER_DEADLINE_S)  # the holder reads the end of its input

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Run a command there and return what it prints. Raises: CommandError."""
        return run(*self.inside, *command, env=env)


def children(pid: str) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return file.read().split()


class Process:
    """A process whose output goes to a log."""

    def __init__(self, log: str, *command: str, env: dict[str, str] | None = None) -> None:
        self.log, self.command = log, command
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=file, env=env)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, unless it has ended, and return the exit status."""
        self.send(number)
        return self.process.wait(DOCKER_DEADLINE_S)

    def send(self, number: int) -> None:
        """Send the signal, unless it has ended; nsenter --pid has it as its child."""
        if self.is_running() and "--pid" not in self.command:
            self.process.send_signal(number)
        elif self.is_running():
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                for pid in children(str(self.process.pid)):
                    os.kill(int(pid), number)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait for the condition; fail at once if the process ends before."""
        with contextlib.suppress(AssertionError):
            until(lambda: condition() or not self.is_running(), "start", DOCKER_DEADLINE_S)
            if self.is_running():
                return
        raise AssertionError("it did not come up:\n" + self.read_log()[-4000:])

    def read_log(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()


class Disk:
    """A disk that is written over others, which stay as they are: 3 ms to make."""

    def __init__(self, *lower: str) -> None:
        self.disk = tempfile.mkdtemp(prefix="gipam-disk-", dir="/var/tmp")
        for name in ("upper", "work", "root"):
            os.mkdir(os.path.join(self.disk, name))
        self.mount = f"mount -t overlay overlay -o lowerdir={':'.join(lower)},upperdir={self.disk}/upper," \
                     f"workdir={self.disk}/work {self.disk}/root\n"


def make_tree(suite: str = SUITE) -> str:
    """Return the Debian tree that disks lie on; it is made once."""
    require("bash", "debootstrap", "ip", "mount", "nsenter", "unshare")
    made = subprocess.run([os.path.join(HERE, ".ci", "tree"), suite], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return made.stdout.strip()


# A tree becomes the root. The checkout and the disk are there under the names that they have outside.
ENTER = """
cd {disk}/root; for name in dev sys; do mount --rbind /$name $name; done
mkdir -p .{here} .{disk}; mount -o bind,ro {here} .{here}; mount --bind {disk} .{disk}
mount -t proc proc proc; mount -t tmpfs tmpfs run; mkdir .old; pivot_root . .old; umount -l .old; cd /
ip link set lo up; mkdir -p /etc/docker
"""


class Sandbox(Disk):
    """Mount, network and process namespaces in a tree: everything has its usual path there, several do not meet.

    All of it ends with the namespaces' first process, which ends with the test's.
    """

    def __init__(self, suite: str = SUITE) -> None:
        super().__init__(make_tree(suite))
        self.env = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        self.namespaces = Namespaces("--mount", "--net", "--pid", setup=self.mount + ENTER.format(here=HERE, disk=self.disk))
        self.processes: list[Process] = []

    def close(self) -> None:
        self.namespaces.close()
        for process in self.processes:
            process.process.wait()
        shutil.rmtree(self.disk)

    def path(self, path: str) -> str:
        """Return how a path in the sandbox is called outside."""
        return f"/proc/{self.namespaces.pid}/root{path}"

    def spawn(self, *command: str) -> Process:
        """Start a process in the sandbox."""
        process = Process(os.path.join(self.disk, command[0] + ".log"), *self.namespaces.inside, *command, env=self.env)
        self.processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Run a command in the sandbox and return what it prints. Raises: CommandError."""
        return self.namespaces.run(*command, env=self.env)

    def run_lines(self, lines: str) -> None:
        self.run("sh", "-ec", lines)


# === dockerd ======================================================================================

# An image with a static busybox. SIGKILL stops its containers at once: as first process busybox
# would ignore SIGTERM.
MAKE_IMAGE = """
cd $(mktemp -d); mkdir bin; cp $(command -v busybox) bin
for name in cat httpd ip nc ping sh sleep true wget; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["sleep", "1000000"]' -c 'STOPSIGNAL SIGKILL' - bb; rm -r "$PWD"
"""


class Docker(Sandbox):
    """One dockerd and one gipam in a sandbox."""

    def __init__(self, *options: str) -> None:
        """Make the sandbox; options are further ones of gipam's, e.g. other bases."""
        super().__init__()
        self.options, self.leases = options, os.path.join(self.disk, "leases.json")
        containerd = self.spawn("containerd", "--config", "/dev/null", "--root", self.disk + "/containerd")
        containerd.wait_until(lambda: os.path.exists(self.path("/run/containerd/containerd.sock")))
        self.dockerd: Process | None = None
        self.gipam: Process | None = None
        self.wires = 0

    def close(self) -> None:
        name = os.path.basename(self.disk)
        super().close()
        for top in glob.glob(f"/sys/fs/cgroup/{name}") + glob.glob(f"/sys/fs/cgroup/*/{name}"):
            for path, _, _ in os.walk(top, topdown=False):
                os.rmdir(path)

    # -- the sandbox

    def wire(self) -> tuple[str, str]:
        """Make two connected interfaces, parents for macvlan networks."""
        self.wires += 1
        near, far = f"wire{self.wires}a", f"wire{self.wires}b"
        self.run_lines(f"ip link add {near} type veth peer name {far}\n"
                       f"ip link set {near} up; ip link set {far} up")
        return near, far

    # -- dockerd and gipam

    def start_dockerd(self, *options: str, wait: bool = True) -> None:
        self.dockerd = self.spawn(
            "dockerd", "--data-root", self.disk + "/data",
            "--exec-opt", "native.cgroupdriver=cgroupfs",
            "--cgroup-parent", "/" + os.path.basename(self.disk), *options)
        if wait:
            self.wait_for_dockerd()

    def wait_for_dockerd(self) -> None:
        assert self.dockerd is not None
        self.dockerd.wait_until(lambda: works(self, "version"))
        if "bb" not in self("images", "--format", "{{.Repository}}").split():
            self.run_lines(MAKE_IMAGE)

    def is_gipam_there(self) -> bool:
        with contextlib.suppress(OSError):
            dial(self.path(SOCKET)).close()
            return True
        return False

    def start_gipam(self, *variables: str) -> None:
        self.gipam = self.spawn("env", *variables, *self.command())
        self.gipam.wait_until(self.is_gipam_there)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of gipam, e.g. of `gipam.py check`."""
        return ["python3", GIPAM, "-v6", BASE_V6, "-v4", BASE_V4, "-file", self.leases, "-unix", *self.options, *arguments]

    def check(self, *arguments: str, grace_s: int = 0) -> list[str]:
        """Return what `check` finds, as "kind: text", sorted; its exit status must agree."""
        command = self.command("check", "--json", "--grace", str(grace_s), *arguments)
        done = subprocess.run([*self.namespaces.inside, *command], stdout=subprocess.PIPE,
                              env=self.env, encoding="utf-8", timeout=DOCKER_DEADLINE_S)
        findings = json.loads(done.stdout)["findings"]
        if done.returncode != int(not all(finding["is_fixed"] for finding in findings)):
            raise AssertionError(f"check ends with {done.returncode} and finds {findings}")
        return sorted(f"{finding['kind']}: {finding['text']}" for finding in findings)

    def stop(self, *names: str, number: int = signal.SIGTERM) -> None:
        """End "dockerd", "gipam" or both with the signal."""
        for name in names:
            getattr(self, name).stop(number)

    def start(self) -> None:
        """Start what does not run: gipam first, as it is at boot."""
        if self.gipam is None or not self.gipam.is_running():
            self.start_gipam()
        if self.dockerd is None or not self.dockerd.is_running():
            self.start_dockerd()

    def kill_and_start(self) -> None:
        self.stop("gipam", "dockerd", number=signal.SIGKILL)
        self.start()

    def replace_lease_file(self, text: str = "", *variables: str, number: int = signal.SIGTERM) -> None:
        """Put another in its place, or nothing, while gipam is down."""
        self.stop("gipam", number=number)
        for name in glob.glob(self.leases + "*"):
            os.unlink(name)
        if text:
            with open(self.leases, "w", encoding="utf-8") as file:
                file.write(text)
        self.start_gipam(*variables)

    def read_lease_file(self) -> str:
        """Return it as an operator would copy it: gipam is down meanwhile, so that all is in it."""
        self.stop("gipam")
        with open(self.leases, encoding="utf-8") as file:
            text = file.read()
        self.start_gipam()
        return text

    # -- the docker command

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a docker command without waiting for it."""
        return subprocess.Popen(
            [*self.namespaces.inside, "docker", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.env, encoding="utf-8")

    def end(self, command: subprocess.Popen[str]) -> str:
        """Return what it printed. Raises: CommandError."""
        out, err = command.communicate(timeout=DOCKER_DEADLINE_S)
        if command.returncode != 0:
            raise CommandError(err.strip())
        return out.strip()

    def __call__(self, *arguments: str) -> str:
        """Run e.g. docker("network", "create", ...). Raises: CommandError."""
        return self.end(self.begin(*arguments))

    def at_once(self, *commands: Sequence[str]) -> None:
        """Run docker commands side by side. Raises: CommandError."""
        for command in [self.begin(*words) for words in commands]:
            self.end(command)

    def inspect(self, kind: str, *names: str) -> list[dict[str, Any]]:
        return list(json.loads(self(kind, "inspect", *names))) if names else []

    def network(self, name: str, *options: str, containers: Sequence[str] = ()) -> None:
        """Create a network of gipam's, and start containers on it."""
        self("network", "create", "--ipam-driver", "gipam", *options, name)
        for container in containers:
            self.container(container, name)

    def container(self, name: str, network: str, *options: str) -> None:
        self("run", "-d", "--name", name, "--network", network, *options, "bb")

    def endpoint(self, container: str, network: str) -> dict[str, Any]:
        return dict(self.inspect("container", container)[0]["NetworkSettings"]["Networks"][network])

    def address(self, container: str, network: str, v6: bool = False) -> str:
        """Return the container's address as docker shows it; "" for none."""
        return str(self.endpoint(container, network)["GlobalIPv6Address" if v6 else "IPAddress"])

    def running_addresses(self) -> list[str]:
        """Return every address of every running container, doubles included, in CIDR form."""
        return [cidr for container in self.running() for cidr in endpoint_addresses(container)]

    def subnets(self, *networks: str) -> list[str]:
        return [config["Subnet"] for network in self.inspect("network", *networks)
                for config in network["IPAM"]["Config"] or []]

    def remove_everything(self) -> None:
        self.start()
        containers = self("ps", "-aq").split()
        if containers:
            self("rm", "-f", *containers)
        networks = self("network", "ls", "-q", "--filter", "type=custom").split()
        for network in sorted(self.inspect("network", *networks), key=lambda it: it["ConfigOnly"]):
            self("network", "rm", network["Id"])

    # -- what each side believes

    def pools(self) -> list[dict[str, Any]]:
        """Return what gipam holds, by its command: a TCP socket cannot be reached from outside."""
        return list(json.loads(self.run(*self.command("status", "--json", "--leases")))["pools"])

    def held_by_gipam(self) -> dict[str, set[str]]:
        """Return subnet -> addresses held in it."""
        held: dict[str, set[str]] = {}
        for pool in self.pools():
            held.setdefault(pool["subnet"], set()).update(lease["address"] for lease in pool["addresses"])
        return held

    def kernel_addresses(self, containers: list[dict[str, Any]]) -> list[list[str]]:
        """Return what the bridges of networks have, then each container, sorted, in CIDR form."""
        script = 'ip -j addr show type bridge; for pid; do nsenter -t "$pid" -n ip -j addr; done'
        pids = (str(container["State"]["Pid"]) for container in containers)
        return [sorted(f"{info['local']}/{info['prefixlen']}" for interface in json.loads(line)
                       if not interface.get("ifname", "docker").startswith("docker")  # docker0
                       for info in interface["addr_info"] if info["scope"] == "global")
                for line in self.run("sh", "-ec", script, "sh", *pids).splitlines()]

    def running(self) -> list[dict[str, Any]]:
        return self.inspect("container", *self("ps", "-q").split())

    def disagreements(self) -> list[str]:
        """Return each difference between what the kernel has, docker shows and gipam holds."""
        running = self.running()
        shown = list(map(endpoint_addresses, running))
        bridges, *containers = self.kernel_addresses(running)
        held = {f"{lease['address']}/{pool['subnet'].split('/')[1]}": lease["kind"]
                for pool in self.pools() for lease in pool["addresses"]}
        real = set(itertools.chain(*containers))
        endpoints = {cidr for cidr, kind in held.items() if kind == "endpoint"}
        return [*(f"only gipam has {cidr}" for cidr in sorted(endpoints - real)),
                *(f"gipam lacks {cidr}" for cidr in sorted({*real, *bridges} - set(held))),
                *(f"docker shows {its} where the kernel has {have}"
                  for its, have in zip(shown, containers) if its != have)]


def endpoint_addresses(container: dict[str, Any]) -> list[str]:
    """Return what `docker inspect` shows as a container's addresses, in CIDR form, sorted."""
    return sorted(f"{settings[address]}/{settings[prefixlen]}"
                  for settings in container["NetworkSettings"]["Networks"].values()
                  for address, prefixlen in (("IPAddress", "IPPrefixLen"),
                                             ("GlobalIPv6Address", "GlobalIPv6PrefixLen"))
                  if settings[address])


class DockerCase(unittest.TestCase):
    """The tests of a class share one dockerd and one gipam; each leaves nothing behind."""

    maxDiff = None
    options: tuple[str, ...] = ()
    docker: Docker

    @classmethod
    def setUpClass(cls) -> None:
        cls.docker = Docker(*cls.options)
        cls.addClassCleanup(cls.docker.close)

    def setUp(self) -> None:
        self.docker.start()
        self.addCleanup(self.leave_nothing_behind)
        until(self.is_import_done, "import")  # of the first start, else it would meet the test

    def is_import_done(self) -> bool:
        with open(self.docker.leases, encoding="utf-8") as file:
            return "Import" not in json.load(file)

    def leave_nothing_behind(self) -> None:
        self.docker.remove_everything()
        left_over = self.docker.held_by_gipam()
        if left_over:  # it shall not fail the next test too
            self.docker.replace_lease_file()
        self.assertEqual(left_over, {}, "left over after the last network rm")

    def assert_agreement(self, addresses: int | None = None) -> None:
        """Docker, gipam and the kernel agree, as soon as the last releases are through.

        The kernel knows what is used, and `check` compares networks. No container or bridge has an
        address of another; running containers have so many.
        """
        with contextlib.suppress(AssertionError):
            until(lambda: not self.docker.disagreements(), "agreement", 10)
        self.assertEqual(self.docker.disagreements(), [])
        self.assertEqual(self.docker.check(), [])
        self.assert_no_address_is_twice(addresses)

    def assert_no_address_is_twice(self, addresses: int | None = None) -> None:
        bridges, *containers = self.docker.kernel_addresses(self.docker.running())
        found = list(itertools.chain(*containers))
        self.assertEqual(len(found), len(found) if addresses is None else addresses, found)
        found = [cidr.split("/")[0] for cidr in found + bridges]
        self.assertEqual(sorted(found), sorted(set(found)))

    def assert_found_and_mended(self, *findings: str) -> None:
        """`check` finds exactly these; --fix mends them, a second check is clean; Docker agrees."""
        self.assertEqual(self.docker.check(), sorted(findings))
        self.assertEqual(self.docker.check("--fix"), sorted(findings))
        self.assert_agreement()

    def assert_refused(self, words: str, *arguments: str) -> None:
        with self.assertRaises(CommandError) as caught:
            self.docker(*arguments)
        self.assertIn(words, str(caught.exception))

    def assert_reaches(self, container: str, address: str) -> None:
        ping = ("exec", container, "ping", "-c", "1", "-W", "1", address)
        until(lambda: works(self.docker, *ping), f"{container} reaches {address}")


# === Machines that boot ===========================================================================

# What a person copies to the machine.
FILES = [f"{path}:/root/gipam/{os.path.basename(path)}" for path in (
    GIPAM, os.path.join(HERE, "gipam.env"), os.path.join(HERE, "gipam.service"))]


def find_boot() -> str:
    """Return the script that boots a tree, which is beside this checkout."""
    for path in (os.path.join(HERE, "..", "shared", "boot-systemd"), "/work/shared/boot-systemd"):
        if os.access(path, os.X_OK):
            return os.path.realpath(path)
    raise AssertionError(f"booting a machine needs {path}")


ROUTER = r"""
ip link add lan type bridge mcast_snooping 0; ip link set lan up
ip addr add 192.0.2.1/24 dev lan; ip addr add 2001:db8:ffff::1/64 dev lan nodad
ip addr add 198.51.100.2/32 dev lo; ip addr add 2001:db8:eeee::2/128 dev lo
echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
mkdir -p www/cgi-bin; printf '#!/bin/sh\necho; echo $REMOTE_ADDR | sed "s/::ffff://; s/[][]//g"\n' > www/cgi-bin/who; chmod +x www/cgi-bin/who
busybox httpd -h /www
"""


class Router(Sandbox):
    """What machines are plugged into: their segment is its bridge "lan", and its lo is what lies beyond.

    It runs what a tree has: curl, ping, radvd, bird. `ping -I 2001:db8:eeee::2 ADDRESS` comes from beyond. Under
    each address of its, http://198.51.100.2/cgi-bin/who answers with the address that it is asked from.
    """

    def __init__(self, setup: str = ROUTER) -> None:
        super().__init__("forky")
        self.cables = 0
        self.run_lines(setup)

    def plug_in(self, pid: str, name: str = "eth0") -> None:
        """Give the machine of this process a device whose other end is in the bridge."""
        self.cables += 1
        inside = ("nsenter", "-t", pid, "--net", "--")
        run(*inside, "ip", "link", "add", name, "type", "veth", "peer", "name", f"cable{self.cables}", "netns",
            self.namespaces.pid)
        self.run("ip", "link", "set", f"cable{self.cables}", "master", "lan", "up")

    def advertise(self, *prefixes: str) -> Process:
        """Let radvd say each second that this is the router, and that these prefixes are on the wire."""
        with open(self.path("/etc/radvd.conf"), "w", encoding="ascii") as file:
            file.write("interface lan { AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4;"
                       + "".join(f"prefix {prefix} {{ }};" for prefix in prefixes) + "};\n")
        return self.spawn("radvd", "-n", "-C", "/etc/radvd.conf")


def cable(lines: str) -> str:
    """Return a script that installs a unit: at each boot, as soon as eth0 is there, it runs these lines."""
    return f"""
printf %s {shlex.quote(lines)} > /usr/local/sbin/cable
printf '%s\\n' [Unit] DefaultDependencies=no Before=network-pre.target Wants=network-pre.target After=local-fs.target \\
  [Service] Type=oneshot RemainAfterExit=yes TimeoutStartSec=60 \\
  "ExecStart=bash -ec 'until ip link set eth0 up; do sleep 0.05; done 2> /dev/null; . /usr/local/sbin/cable'" \\
  [Install] WantedBy=multi-user.target > /etc/systemd/system/cable.service
systemctl enable cable
"""


class Machine(Disk):
    """A Debian machine with Docker, of the tree (`Machine(make_tree("forky"))`) or on another's disk.

    With a router, it is plugged into that at each boot, as eth0, and cable() says what it does then.
    """

    def __init__(self, *lower: str, router: Router | None = None) -> None:
        super().__init__(*lower)
        self.router = router
        self.process: subprocess.Popen[str] | None = None

    def boot(self, *files: str, end: str = "cut") -> None:
        """Boot, with files (SOURCE:PATH) put there first. It will end by poweroff, or as if by a power cut."""
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-ec", self.mount + 'exec "$0" "$@"',
             find_boot(), f"{self.disk}/root", *files, "--", "bash", "-c", "echo is up; read"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, "BOOT_END": end})
        assert self.process.stdout
        if self.router is not None:
            self.router.plug_in(until(self.find_init, "systemd"))
        if self.process.stdout.readline() != "is up\n":
            raise AssertionError("the machine did not boot")
        self.pid = self.find_init()

    def find_init(self) -> str:
        """Return the id of its first process; "" as long as it has none."""
        with contextlib.suppress(OSError):
            for child in children(str(self.process.pid)) if self.process else ():
                for init in children(child):
                    if os.readlink(f"/proc/{init}/exe").endswith("/systemd"):
                        return init
        return ""

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate(timeout=DOCKER_DEADLINE_S * 2)  # its command reads the end of its input
            self.process = None

    def remove(self) -> None:
        self.end()
        shutil.rmtree(self.disk)

    def begin(self, script: str) -> subprocess.Popen[str]:
        """Start a bash script inside; it ends with the first command that fails."""
        return subprocess.Popen(
            ["nsenter", "-t", self.pid, "-a", "-r", "-w", "env", "-i", "HOME=/root",
             "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "bash", "-e", "-o", "pipefail", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    def __call__(self, script: str, *expected: int) -> str:
        """Run a bash script inside and return what it says; fail if its status is not as expected (0)."""
        process = self.begin(script)
        out = process.communicate(timeout=DEADLINE_S * 10)[0]
        if process.returncode not in (expected or (0,)):
            raise AssertionError(f"exit status {process.returncode} of:\n{script}\n{out}")
        return out.strip()

    def follow(self, title: str, *which: int, directory: str = "/root") -> str:
        """Run the README's commands under this heading word for word: all, or those blocks."""
        blocks = [block.text for block in read_blocks() if (block.chapter, block.kind) == (title, "sh")]
        return "\n".join(self(f"cd {directory}\n{blocks[at]}") for at in which or range(len(blocks)))

    def wait_until(self, condition: str) -> None:
        """Wait until a command succeeds; the poll is inside, where it costs least."""
        said = "docker ps -a; journalctl --no-pager -o cat -u docker -u gipam -p warning | cut -c 1-500 | tail -n 40"
        self(f"until {condition}; do [ $SECONDS -lt {DEADLINE_S * 8:.0f} ] || {{ {said}; exit 1; }}; sleep 0.1; done")

    def wait_for_containers(self) -> None:
        """Wait until all that there are are running."""
        self.wait_until("[ $(docker ps -q | wc -l) = $(docker ps -aq | wc -l) ]")

    def addresses(self) -> list[str]:
        """Return all addresses of containers, as Docker shows them."""
        return self("docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{end}}' "
                    "$(docker ps -aq)").split()

    def subnets(self) -> dict[str, list[str]]:
        """Return the subnets of each network of gipam's."""
        said = self("docker network inspect -f '{{.IPAM.Driver}} {{.Name}} {{range .IPAM.Config}}{{.Subnet}} {{end}}' "
                    "$(docker network ls -q)")
        return {name: subnets for driver, name, *subnets in map(str.split, said.splitlines()) if driver == "gipam"}

    def log(self, unit: str) -> str:
        return self(f"journalctl --no-pager -o cat -b -u {unit}")

    def complaints(self) -> list[str]:
        """Return what dockerd has said about a plugin that it could not reach, and tried again."""
        return re.findall("Unable to (?:connect to|locate) plugin.*", self.log("docker"))

    def show(self, name: str, unit: str = "gipam") -> str:
        """Return a property of a unit."""
        return self(f"systemctl show -p {name} --value {unit}")


if __name__ == "__main__":  # machines.py COMMAND …: runs it in a tree, where this checkout is
    sandbox = Sandbox()
    try:
        sys.exit(subprocess.call([*sandbox.namespaces.inside, "env", "-C", HERE, *sys.argv[1:]],
                                 env={**os.environ, **sandbox.env}))
    finally:
        sandbox.close()
