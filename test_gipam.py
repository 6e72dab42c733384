#!/usr/bin/env python3
"""The self-check of gipam: `python3 test_gipam.py`, with `-v` and `-k PATTERN` as in unittest.

It needs neither root nor Docker, only gipam.py beside it, and leaves nothing behind. Tests that the
host does not allow are skipped, with the reason in the end. GIPAM_TEST_SEED repeats a random run.
Tests that need dockerd, a machine that boots or more time are in .ci/lab, which shares the helpers
here.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import concurrent.futures
import contextlib
import copy
import dis
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import platform
import queue
import random
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
import types
import unittest
import weakref
import zlib
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Iterable,
    Iterator,
    NamedTuple,
    Sequence,
    Union,
)
from unittest import mock

HERE = os.environ.get("GIPAM_TREE") or os.path.dirname(os.path.abspath(__file__))
GIPAM = os.environ.get("GIPAM_FILE") or os.path.join(HERE, "gipam.py")
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(GIPAM))
import gipam  # noqa: E402

# === Helpers ======================================================================================
#
# Tools that several sections and the lab share: waiting for a condition, random tests, a
# client that calls gipam as Docker does (over a connection, or straight into a Service), a tenant
# that makes random calls, a gipam process, and the base class of test cases.
#
# No test sleeps for luck. It waits for a condition with sleeping_retry() or wait_until(), which
# fail with the name of the condition when DEADLINE_S has passed.

DEADLINE_S = 30.0
IS_LONG = os.environ.get("GIPAM_LONG") == "1"
LONG_FACTOR = 25  # seeds of a long run for each here


class TracebackHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows unexpected exceptions; tests cause all other records, and assertLogs() sees them."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            super().emit(record)


class WarningHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the warnings of this thread, not those of a daemon that runs in another."""

    def __init__(self, stream: io.StringIO) -> None:
        super().__init__(stream)
        self.thread = threading.get_ident()
        self.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            super().emit(record)


gipam.log.addHandler(TracebackHandler())


def sleeping_retry(condition: str, deadline_s: float = DEADLINE_S) -> Iterator[None]:
    """Yield at growing intervals, for a loop that breaks when the named condition holds.

    Raises: AssertionError if the loop still runs after the deadline.
    Source: test.support.sleeping_retry of CPython.
    """
    end_s = time.monotonic() + deadline_s
    pause_s = 0.005
    while True:
        yield
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {deadline_s:g} s for {condition}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)


def wait_until(condition: str, function: Callable[..., Any], *arguments: Any,
               deadline_s: float = DEADLINE_S) -> Any:
    """Call the function until it returns a true value, and return that."""
    value = None
    for _ in sleeping_retry(condition, deadline_s):
        value = function(*arguments)
        if value:
            break
    return value


def choose_seeds(count: int) -> list[int]:
    """Return new seeds for a random test, or the one of GIPAM_TEST_SEED."""
    given = os.environ.get("GIPAM_TEST_SEED")
    if given:
        return [int(given)]
    if IS_LONG:
        count *= LONG_FACTOR
    return [random.randrange(1 << 32) for _ in range(count)]


TestFunction = Callable[..., None]


def seeded(count: int) -> Callable[[TestFunction], TestFunction]:
    """Run the decorated test with a random generator for each seed; a failure names the seed."""
    def decorate(test: TestFunction) -> TestFunction:
        @functools.wraps(test)
        def run(self: unittest.TestCase) -> None:
            for seed in choose_seeds(count):
                with self.subTest(GIPAM_TEST_SEED=seed):
                    test(self, random.Random(seed))

        return run

    return decorate


def parse_prefixes(text: str) -> list[gipam.Network]:
    """Return the prefixes of a list separated by spaces."""
    return [gipam.parse_prefix(word) for word in text.split()]


def integer_ranges(networks: Iterable[gipam.Network]) -> list[gipam.Range]:
    """Return the first and the last address of each network, as integers."""
    ranges = []
    for network in networks:
        ranges.append((int(network[0]), int(network[-1])))
    return ranges


# Each has 1,024 addresses, which a naive model can list.
WORLDS = parse_prefixes("10.0.0.0/22 2001:db8::/118")


def random_prefix(rng: random.Random, world: gipam.Network,
                  extra_bits: int = 0) -> gipam.Network:
    """Return a prefix in the world that is at least extra_bits longer."""
    prefixlen = rng.randint(world.prefixlen + extra_bits, world.max_prefixlen)
    address = int(world[0]) + rng.randrange(world.num_addresses)
    packed = address.to_bytes(world.max_prefixlen // 8, "big")
    return ipaddress.ip_network((packed, prefixlen), strict=False)


def subnet_of(pool_id: str) -> gipam.Network:
    """Return the subnet of a pool id."""
    return gipam.parse_prefix(re.split("[,#]", pool_id)[0])


def make_directory(test: unittest.TestCase) -> str:
    """Return a new directory, which is removed when the test ends."""
    directory = os.path.realpath(tempfile.mkdtemp(prefix="gipam-"))
    test.addCleanup(shutil.rmtree, directory, ignore_errors=True)
    return directory


def connect(address: Any) -> socket.socket:
    """Return a connection to a path, or to a host and port."""
    if not isinstance(address, str):
        return socket.create_connection(address, timeout=DEADLINE_S)

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(DEADLINE_S)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a UNIX socket."""

    def __init__(self, path: str, timeout_s: float = DEADLINE_S) -> None:
        super().__init__("plugin.moby.localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        self.sock = connect(self.path)
        self.sock.settimeout(self.timeout)


class ErrorReply(Exception):
    """The daemon replied with an error; str() is its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Client:
    """Calls gipam as dockerd does: over one kept connection to a path, or to a host and port."""

    def __init__(self, address: Any) -> None:
        self.connection: http.client.HTTPConnection
        if isinstance(address, str):
            self.connection = UnixConnection(address)
        else:
            host, port = address
            self.connection = http.client.HTTPConnection(host, port, timeout=DEADLINE_S)

    def post(self, path: str, body: bytes, verb: str = "POST") -> tuple[int, Any]:
        """Return the status and the decoded reply."""
        self.connection.request(verb, path, body)
        reply = self.connection.getresponse()
        return reply.status, json.loads(reply.read())

    def call(self, method: str, **arguments: Any) -> Any:
        """Return the decoded reply of e.g. call("IpamDriver.RequestPool", Pool="", V6=False)."""
        body = json.dumps(arguments).encode() if arguments else b""
        status, reply = self.post("/" + method, body)
        if status != 200 or reply.get("Error"):
            raise ErrorReply(status, reply.get("Error", ""))
        return reply

    def state(self) -> Any:
        """Return the status page with all leases; its seq grows with each change."""
        return self.post("/status?leases=1", b"", "GET")[1]

    def request_pool(self, pool: str = "", sub_pool: str = "", v6: bool = False,
                     **options: str) -> tuple[str, str]:
        """Return the pool id and the subnet. In option names, _ stands for a dot: gipam_name."""
        named = {}
        for name, value in options.items():
            named[name.replace("_", ".", 1)] = value
        reply = self.call("IpamDriver.RequestPool", AddressSpace="gipam", Pool=pool,
                          SubPool=sub_pool, V6=v6, Options=named)
        return reply["PoolID"], reply["Pool"]

    def release_pool(self, pool_id: str) -> None:
        self.call("IpamDriver.ReleasePool", PoolID=pool_id)

    def request_address(self, pool_id: str, address: str = "", mac: str = "",
                        name: str = "", gateway: bool = False) -> str:
        """Return the address in CIDR form."""
        options = {}
        if gateway:
            options["RequestAddressType"] = "com.docker.network.gateway"
        if mac:
            options["com.docker.network.endpoint.macaddress"] = mac
        if name:
            options["com.docker.network.endpoint.name"] = name
        reply = self.call("IpamDriver.RequestAddress", PoolID=pool_id, Address=address,
                          Options=options)
        return str(reply["Address"])

    def release_address(self, pool_id: str, address: str) -> None:
        self.call("IpamDriver.ReleaseAddress", PoolID=pool_id, Address=address)

    def close(self) -> None:
        self.connection.close()


def deliver(service: gipam.Service, reply: gipam.Reply) -> gipam.Reply:
    """Commit the changes, and return the reply that the client then gets."""
    error = service.commit()
    return gipam.error_reply(error) if error else reply


def checkpoint(service: gipam.Service) -> bool:
    """Make a checkpoint without an event loop; return whether it succeeded."""
    return gipam.Checkpoint(service, service.run_once).run()


def checkpoint_at_stop(service: gipam.Service) -> bool:
    """Make the last checkpoint, after which the lease file stands alone."""
    return gipam.Checkpoint(service, service.run_once).run(is_stopping=True)


class DirectClient(Client):
    """Calls a service in this process as Docker does, and commits after each call."""

    def __init__(self, service: gipam.Service) -> None:
        self.service = service
        self.reply = gipam.Reply(0, b"")  # the last one

    def ask(self, method: str, **arguments: Any) -> gipam.Reply:
        """Return the reply as it is before the commit."""
        body = json.dumps(arguments).encode()
        return gipam.dispatch(self.service, "POST", "/" + method, body)

    def post(self, path: str, body: bytes, verb: str = "POST") -> tuple[int, Any]:
        self.reply = deliver(self.service, gipam.dispatch(self.service, verb, path, body))
        page = b"".join(self.reply.page or ())
        return self.reply.status, json.loads(self.reply.body + page)

    def close(self) -> None:
        pass


def record_changes(service: gipam.Service) -> list[gipam.Record]:
    """Return a list to which each change that the service applies from now on is added."""
    changes: list[gipam.Record] = []
    apply = service.apply

    def apply_and_record(change: gipam.Record) -> None:
        apply(change)
        changes.append(change)

    setattr(service, "apply", apply_and_record)  # noqa: B010
    return changes


class Tenant:
    """Makes and removes networks and containers at random, and remembers the replies.

    About a fifth of its calls must be refused.
    """

    ACTIONS = {
        "request_pool": 4,
        "release_pool": 2,
        "request_address": 6,
        "release_address": 5,
        "request_any": 3,
        "release_any": 1,
    }
    NAMES = ("", "", "web", "db", "mail")

    # Bounds, so that a long life does not fill the state.
    MAX_POOLS = 4
    MAX_ADDRESSES = 30

    def __init__(self, client: Any, rng: random.Random, number: int = 0,
                 shared: tuple[str, ...] = ()) -> None:
        """Make a tenant. In the shared pools it only requests and releases addresses."""
        self.client = client
        self.rng = rng
        self.number = number
        self.shared = shared
        self.pools: dict[str, list[str]] = {pool_id: [] for pool_id in shared}
        self.pending: tuple[str, ...] = ()  # unanswered call: name, pool id, address
        self.replies = 0

    def held(self) -> dict[str, list[str]]:
        """Return the addresses that the tenant holds, by pool id."""
        return {pool_id: sorted(addresses) for pool_id, addresses in self.pools.items()}

    def step(self) -> None:
        """Make one call, which may be refused. Raises: ErrorReply for an internal error."""
        pool_id, action = self.choose_action()
        method = getattr(self, action)
        try:
            method(pool_id)
        except ErrorReply as error:
            if error.status == 500:
                raise
        self.pending = ()
        self.replies += 1

    def choose_action(self) -> tuple[str, str]:
        """Return a pool id, or "" if there is none, and the name of the method to call with it."""
        if not self.pools:
            return "", "request_pool"

        pool_id = self.rng.choice(list(self.pools))
        actions = list(self.ACTIONS)
        weights = list(self.ACTIONS.values())
        action = self.rng.choices(actions, weights)[0]
        max_pools = self.MAX_POOLS + len(self.shared)
        if action == "request_pool" and len(self.pools) >= max_pools:
            action = "request_address"
        addresses = self.pools[pool_id]
        if action == "request_address" and len(addresses) >= self.MAX_ADDRESSES:
            action = "release_address"
        return pool_id, action

    def request_pool(self, _: str) -> None:
        rng = self.rng
        options = {"gipam_name": rng.choice(self.NAMES)}
        world = rng.choice(WORLDS)
        is_v6 = world.version == 6
        subnet = sub_pool = ""
        if rng.random() < 0.5:
            network = self.choose_subnet(world)
            is_v6 = network.version == 6
            subnet = str(network)
            if rng.random() < 0.6:
                sub_pool = self.choose_sub_pool(network)
        elif rng.random() < 0.3:
            prefixlen = rng.randint(world.prefixlen, world.max_prefixlen)
            options[f"gipam_v{world.version}ab"] = str(prefixlen)

        self.pending = ("request_pool",)
        pool_id, _ = self.client.request_pool(subnet, sub_pool, is_v6, **options)
        self.pools[pool_id] = []

    def choose_subnet(self, world: gipam.Network) -> gipam.Network:
        """Return a random subnet, or one that the tenant holds, to request another range of it."""
        if self.pools and self.rng.random() < 0.4:
            return subnet_of(self.rng.choice(list(self.pools)))
        return random_prefix(self.rng, world, 3)

    def choose_sub_pool(self, subnet: gipam.Network) -> str:
        """Return a range of the subnet, or sometimes one that may lie outside."""
        world = subnet
        if self.rng.random() < 0.25:
            world = self.rng.choice(WORLDS)
        return str(random_prefix(self.rng, world))

    def release_pool(self, pool_id: str) -> None:
        if pool_id in self.shared:
            return
        self.pending = ("release_pool", pool_id)
        self.client.release_pool(pool_id)
        del self.pools[pool_id]

    def request_address(self, pool_id: str, address: str = "") -> None:
        mac = f"02:42:00:00:{self.number:02x}:{self.rng.randrange(4):02x}"
        name = self.rng.choice(("", "", f"a{self.number}", f"b{self.number}"))
        is_gateway = self.rng.random() < 0.2
        self.pending = ("request_address", pool_id)
        cidr = self.client.request_address(pool_id, address, mac, name, gateway=is_gateway)
        address = cidr.partition("/")[0]
        if address in self.pools[pool_id]:
            raise AssertionError(f"{address} of {pool_id} was given twice")
        self.pools[pool_id].append(address)

    def release_address(self, pool_id: str) -> None:
        if self.pools[pool_id]:
            self.release(pool_id, self.rng.choice(self.pools[pool_id]))

    def request_any(self, pool_id: str) -> None:
        """Request an address that may be allocated, reserved, outside or free."""
        addresses = [self.random_address(pool_id)]
        addresses += self.pools[pool_id][:1]
        self.request_address(pool_id, self.rng.choice(addresses))

    def release_any(self, pool_id: str) -> None:
        """Release an address that may be allocated or not, but not another tenant's."""
        if pool_id not in self.shared:
            self.release(pool_id, self.random_address(pool_id))

    def release(self, pool_id: str, address: str) -> None:
        self.pending = ("release_address", pool_id, address)
        self.client.release_address(pool_id, address)
        if address in self.pools[pool_id]:
            self.pools[pool_id].remove(address)

    def random_address(self, pool_id: str) -> str:
        """Return an address of the subnet, or sometimes of the world around it."""
        world = subnet_of(pool_id)
        if self.rng.random() < 0.1:
            world = WORLDS[0] if world.version == 4 else WORLDS[1]
        return str(random_prefix(self.rng, world)[0])


class Daemon:
    """A gipam process, with its socket and lease file in a directory of its own."""

    has_spec = bool(os.geteuid())  # root's plugin file is in /etc/docker
    pass_fds: Sequence[int] = ()

    def __init__(self, test: unittest.TestCase, *options: str,
                 directory: str | None = None,
                 env: dict[str, str] | None = None,
                 command: tuple[str, ...] = (sys.executable, GIPAM)) -> None:
        self.test = test
        self.command = command
        self.directory = directory or make_directory(test)
        self.log = self.path("log")
        self.options = ["-unix", "-socket", self.path("gipam.sock"),
                        "-file", self.path("leases.json")]
        if self.has_spec:
            self.options += ["-spec", self.path("gipam.spec")]
        self.options += options

        # An option may be given again: the last one counts.
        values = dict(zip(self.options, self.options[1:]))
        self.socket = values["-socket"]
        self.file = values["-file"]
        self.spec = values.get("-spec", "")
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith("GIPAM_")}
        if env:
            self.env.update(env)
        self.process: subprocess.Popen[bytes] | None = None
        test.addCleanup(self.kill)

    @property
    def address(self) -> Any:
        return self.socket

    def path(self, name: str) -> str:
        """Return the path of a file in the daemon's directory."""
        return os.path.join(self.directory, name)

    def start(self, wait: bool = True, stderr: int | None = None) -> Daemon:
        """Start the process and, unless told otherwise, wait until it accepts connections.

        The process writes its stderr to the log, or to the given descriptor.
        """
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *self.options], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log if stderr is None else stderr,
                env=self.env, pass_fds=self.pass_fds)
        if wait:
            wait_until("gipam to serve or end", self.has_started)
            if self.process.poll() is not None:
                raise AssertionError("gipam did not come up:\n" + self.read_log())
        return self

    def has_started(self) -> bool:
        """Return whether the process accepts connections, or has ended."""
        assert self.process is not None
        return self.process.poll() is not None or self.is_answering()

    def is_answering(self) -> bool:
        """Return whether the process accepts connections."""
        try:
            connect(self.address).close()
        except (OSError, ValueError):
            # A ValueError says that the plugin file is missing or incomplete.
            return False
        return True

    def client(self) -> Client:
        client = Client(self.address)
        self.test.addCleanup(client.close)
        return client

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        if self.process is not None:
            self.stop(signal.SIGKILL)

    def read_log(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def wait_for_log(self, pattern: str) -> str:
        """Wait until the log matches the pattern, and return the first group of the match."""
        def find() -> re.Match[str] | None:
            return re.search(pattern, self.read_log())

        match = wait_until(f"{pattern} in the log", find)
        return str(match.groups("")[0]) if match.re.groups else ""


class Kernel:
    """Answers netlink dumps with the given routes (PREFIX or PREFIX=TYPE) and addresses."""

    # Numbers of rtnetlink.h.
    TYPES = {
        "": 1,
        "LOCAL": 2,
        "BROADCAST": 3,
        "BLACKHOLE": 6,
        "UNREACHABLE": 7,
    }

    def __init__(self, routes: str = "", addresses: str = "") -> None:
        self.routes = routes
        self.addresses = addresses

    def __call__(self, message_type: int, body: bytes) -> Iterator[bytes]:
        is_route = message_type == gipam.RTM_GETROUTE
        family = body[0]
        text = self.routes if is_route else self.addresses
        for word in text.split():
            cidr, _, type_name = word.partition("=")
            network = gipam.parse_prefix(cidr, mask=True)
            if gipam.SOCKET_FAMILY[network.version] != family:
                continue
            route_type = self.TYPES[type_name]
            payload = bytes((family, network.prefixlen, 0, 0, 254, 3, 0, route_type))
            if is_route:
                payload += struct.pack("=4xHHI", 8, 15, 254)  # RTA_TABLE: main
            address = ipaddress.ip_address(cidr.partition("/")[0]).packed
            yield payload + struct.pack("=HH", 4 + len(address), 1) + address


class Case(unittest.TestCase):
    """A test whose replaced attributes are restored when it ends."""

    maxDiff = None

    def patch(self, target: Any, **values: Any) -> None:
        """Replace attributes until the test ends."""
        for name, value in values.items():
            patch = mock.patch.object(target, name, value)
            patch.start()
            self.addCleanup(patch.stop)


class Finished(NamedTuple):
    """The result of a command line."""

    status: int
    out: str
    err: str  # with log records at WARNING and above


class Terminal(io.StringIO):
    """Standard output or input of a person."""

    def isatty(self) -> bool:
        return True


def write_to(stream: io.StringIO) -> Callable[[bytes], int]:
    """Return a function that writes to the stream, in place of the one of open_stderr()."""
    def write(data: bytes) -> int:
        stream.write(data.decode())
        return len(data)

    return write


class CommandCase(Case):
    """A lease file in a directory of its own, and command lines in this process."""

    @functools.cached_property
    def directory(self) -> str:
        return make_directory(self)

    @functools.cached_property
    def file(self) -> str:
        return os.path.join(self.directory, "leases.json")

    def run_main(self, *words: str,
                 out: io.StringIO | None = None,
                 stdin: io.StringIO | None = None,
                 **variables: str) -> Finished:
        """Run a command line with no other environment than the variables."""
        out = out or io.StringIO()
        err = io.StringIO()
        handlers = [*gipam.log.handlers, WarningHandler(err)]
        replacements: list[ContextManager[Any]] = [
            mock.patch.dict(os.environ, variables, clear=True),
            mock.patch.object(logging, "basicConfig"),
            mock.patch.object(sys, "stdin", stdin or io.StringIO()),
            mock.patch.object(gipam.log, "handlers", handlers),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(gipam, "open_stderr", mock.Mock(return_value=write_to(err))),
        ]
        with contextlib.ExitStack() as stack:
            for replacement in replacements:
                stack.enter_context(replacement)
            try:
                status = gipam.main(list(words))
            except SystemExit as error:
                status = int(error.code or 0)
        return Finished(status, out.getvalue(), err.getvalue())

    def assert_fails(self, done: Finished, status: int, pattern: str) -> None:
        """Check that a command line printed nothing but an error message that has this pattern."""
        self.assertEqual(done.status, status, done)
        self.assertEqual(done.out, "")
        self.assertRegex(done.err, f"^{pattern}\n$")

    def write(self, name: str, contents: bytes | str) -> None:
        """Write a file that only its owner can read, and make its directories."""
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(contents, str):
            contents = contents.encode()
        pathlib.Path(path).write_bytes(contents)
        os.chmod(path, 0o600)

    def lease_file(self) -> Any:
        with open(self.file, encoding="utf-8") as file:
            return json.load(file)


# === Style ========================================================================================
#
# How the files read, as far as a program can tell. DENSE_KINDS lists expressions that have to be
# decoded; each check comes with an example of what it finds and the plain text that it accepts.
# measure_density() counts tokens, comments and blank lines, as a reader meets them. gipam.py is
# held to the strictest limits; the tests and the lab may be a little denser.

MAX_COLUMNS = 100
MAX_COMMENT_WORDS = 8  # behind code
MAX_TEXT_COLUMNS = 120  # of README.md, gipam.env and gipam.service
MAX_FUNCTION_LINES = 60
MAX_TEST_LINES = 35
CITED_FILE = re.compile(r"\b[A-Za-z_][\w-]*[.](?:md|py)\b")


def is_condition(node: Any) -> bool:
    """Return whether an expression is a boolean: a comparison, `not`, bool(), is_x, has_x."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") in ("bool", "isinstance", "any", "all")
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(node, ast.Compare) or name.startswith(("is_", "has_"))


def is_conditional(node: Any) -> bool:
    """Return whether an expression chooses between values."""
    return isinstance(node, (ast.IfExp, ast.BoolOp))


def is_repeatable(node: Any) -> bool:
    """Return whether `*` repeats this literal."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes))
    return isinstance(node, (ast.JoinedStr, ast.List, ast.ListComp))


def is_integer(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def called_name(node: Any) -> str:
    """Return the last name of the function that a call calls, or "" if it has none."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def multiplies_condition(node: ast.BinOp) -> bool:
    if not isinstance(node.op, ast.Mult):
        return False
    sides = (node.left, node.right)
    if any(map(is_condition, sides)):
        return True
    repeats = any(map(is_repeatable, sides))
    return repeats and not any(map(is_integer, sides))


def indexes_by_condition(node: ast.Subscript) -> bool:
    index: Any = node.slice
    if type(index).__name__ == "Index":  # Python 3.8
        index = index.value
    parts = [index]
    if isinstance(index, ast.Slice):
        parts = [index.lower, index.upper]
    for part in parts:
        if is_condition(part) or isinstance(part, ast.IfExp):
            return True
    return isinstance(node.value, (ast.IfExp, ast.Tuple, ast.Dict))


def calls_expression(node: ast.Call) -> bool:
    return isinstance(node.func, (ast.IfExp, ast.Subscript, ast.Call))


def iterates_to_sentinel(node: ast.Call) -> bool:
    return called_name(node) == "iter" and len(node.args) == 2


def searches_by_next(node: ast.Call) -> bool:
    if called_name(node) != "next" or not node.args:
        return False
    source = node.args[0]
    return isinstance(source, ast.GeneratorExp) or called_name(source) in ("map", "filter")


def is_partial(node: ast.Call) -> bool:
    return called_name(node) == "partial"


def nests_conditionals(node: ast.IfExp) -> bool:
    parts = (node.body, node.orelse, node.test)
    return any(isinstance(part, ast.IfExp) for part in parts)


def spans_lines(node: Any) -> bool:
    return bool(node.end_lineno > node.lineno)


def spans_four_lines(node: Any) -> bool:
    return bool(node.end_lineno - node.lineno >= 3)


def unpacks_conditional(node: Any) -> bool:
    if isinstance(node, ast.Starred):
        return is_conditional(node.value)
    pairs = zip(node.keys, node.values)
    return any(key is None and is_conditional(value) for key, value in pairs)


def only_unpacks(node: Any) -> bool:
    return len(node.elts) == 1 and isinstance(node.elts[0], ast.Starred)


def loops_over_conditional(node: Any) -> bool:
    return is_conditional(node.iter)


def loops_over_generator(node: Any) -> bool:
    return isinstance(node.iter, ast.GeneratorExp)


def assigns_several(node: ast.Assign) -> bool:
    """Return whether unrelated values are assigned, which is no swap and no row of constants."""
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return False
    values = node.value.elts
    targets = [ast.dump(name).replace("Store", "Load") for name in target.elts]
    if sorted(targets) == sorted(map(ast.dump, values)):
        return False
    return not all(isinstance(value, ast.Constant) for value in values)


def has_two_loops(node: Any) -> bool:
    return len(node.generators) > 1


def is_any(_: Any) -> bool:
    return True


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOOPS = (ast.For, ast.comprehension)


class DenseKind(NamedTuple):
    """A kind of expression that a reader has to decode, with examples and their plain texts."""

    name: str
    nodes: tuple[type, ...]
    is_dense: Callable[[Any], bool]
    examples: tuple[str, ...]
    plain: tuple[str, ...]


DENSE_KINDS = (
    DenseKind("multiplied by a condition", (ast.BinOp,), multiplies_condition,
              ("'s' * (number > 1)", "pause_s * bool(pending)", "[word] * count"),
              ("'-' * 10", "count * width")),
    DenseKind("indexed by a condition, or into a literal", (ast.Subscript,), indexes_by_condition,
              ("names[is_unix:]", "WORLDS[version == 6]", "(4, 6)[number]"),
              ("names[1:]", "worlds[version]")),
    DenseKind("called: a conditional, a subscript, a call", (ast.Call,), calls_expression,
              ("METHODS[path](body)", "(add if yes else drop)(one)", "make()()"),
              ("method(body)", "loop.run_in_loop(body)")),
    DenseKind("iter(callable, sentinel)", (ast.Call,), iterates_to_sentinel,
              ("iter(read, b'')",),
              ("iter(lines)",)),
    DenseKind("next() of a generator, map or filter", (ast.Call,), searches_by_next,
              ("next(filter(None, leases), None)", "next(one for one in all_of_them)"),
              ("next(lines, '')",)),
    DenseKind("partial", (ast.Call,), is_partial,
              ("functools.partial(run, path)",),
              ("loop.run_in_loop(run, path)",)),
    DenseKind("lambda that is no key=", (ast.Lambda,), is_any,
              ("call(lambda: 0)",),
              ("sorted(rows, key=lambda row: row.seq)",)),
    DenseKind("conditional expression in another", (ast.IfExp,), nests_conditionals,
              ("a if b else c if d else e",),
              ("a if b else c",)),
    DenseKind("conditional expression over lines", (ast.IfExp,), spans_lines,
              ("(a if b\n else c)",),
              ("call(a if b else c,\n d)",)),
    DenseKind("star of a conditional", (ast.Starred, ast.Dict), unpacks_conditional,
              ("call(*(words or ()))", "{**(more if there else {})}"),
              ("call(*words)", "{**more}")),
    DenseKind("[*x], {*x} for list(x), set(x)", (ast.List, ast.Set), only_unpacks,
              ("[*words]", "{*words}"),
              ("[*words, last]",)),
    DenseKind("loop over a conditional", LOOPS, loops_over_conditional,
              ("[word for word in words or ()]", "for one in (a if b else c): pass"),
              ("[word for word in words]",)),
    DenseKind("loop over a generator expression", LOOPS, loops_over_generator,
              ("for word in (each for each in words): pass",),
              ("for word in words: pass",)),
    DenseKind("several assignments in one", (ast.Assign,), assigns_several,
              ("name, length = text, 0",),
              ("name, length = length, name", "x, y = 0, 0", "low, high = pair")),
    DenseKind("comprehension with two fors", COMPREHENSIONS, has_two_loops,
              ("[word for line in lines for word in line]",),
              ("[word for word in line]",)),
    DenseKind("comprehension over four lines", COMPREHENSIONS, spans_four_lines,
              ("[word\nfor word\nin line\n]",),
              ("[word\nfor word\nin line]",)),
)


def find_dense(source: str) -> list[str]:
    """Return the expressions that have to be decoded, as "kind: line"."""
    lines = source.splitlines()
    tree = ast.parse(source)
    keys = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "key":
            keys.append(node.value)
        if node in keys:
            continue
        for kind in DENSE_KINDS:
            if isinstance(node, kind.nodes) and kind.is_dense(node):
                place: Any = getattr(node, "iter", node)
                found.add(f"{kind.name}: {lines[place.lineno - 1].strip()}")
    return sorted(found)


class Density(NamedTuple):
    """Tokens a code line; comment lines per code line; blank lines per line inside functions."""

    tokens: float
    comments: float
    blank: float


LAYOUT_TOKENS = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                 tokenize.ENDMARKER)


def line_numbers(node: Any) -> range:
    """Return the numbers of the lines that a statement fills."""
    return range(node.lineno, node.end_lineno + 1)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings fill."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node) is not None:
            numbers.update(line_numbers(node.body[0]))
    return numbers


def code_tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens that are code or comments; an f-string is one, as before Python 3.12."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            depth -= 1
        if depth == 0 and token.type not in LAYOUT_TOKENS:
            yield token
        if name == "FSTRING_START":
            depth += 1


def measure_density(source: str) -> Density:
    """Return the density of a text; docstrings do not count."""
    tree = ast.parse(source)
    documented = docstring_lines(tree)
    code_lines: set[int] = set()
    token_count = comment_count = 0
    for token in code_tokens(source):
        if token.type == tokenize.COMMENT:
            comment_count += token.line.strip().startswith("#")
        elif token.start[0] not in documented:
            token_count += 1
            code_lines.update(range(token.start[0], token.end[0] + 1))

    lines = source.splitlines()
    inside = blank = 0
    for function in find_functions(tree):
        body = lines[function.lineno:function.end_lineno]
        inside += len(body)
        blank += [line.strip() for line in body].count("")
    code = max(len(code_lines), 1)
    return Density(token_count / code, comment_count / code, blank / max(inside, 1))


def find_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    nodes = ast.walk(tree)
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def measure_functions(source: str) -> dict[str, int]:
    """Return the number of lines of each function, by its name and line."""
    sizes = {}
    for node in find_functions(ast.parse(source)):
        sizes[f"{node.name}:{node.lineno}"] = len(line_numbers(node))
    return sizes


def split_sections(source: str) -> dict[str, str]:
    """Return the text of each section by its title; the text before the first one has title ""."""
    title = ""
    sections = {title: ""}
    for line in source.splitlines(keepends=True):
        banner = re.match(r"# === (.+) =+$", line)
        if banner:
            title = banner[1]
            sections[title] = ""
        sections[title] += line
    return sections


def sections_out_of_order(source: str, tests: str) -> list[str]:
    """Return the titles of sections of the tests that the source lacks, or has further above.

    The source has no Helpers, Style and Running.
    """
    titles = [title for title in split_sections(tests)
              if title not in ("", "Helpers", "Style", "Running")]
    # Each `in` goes on where the last one ended.
    remaining = iter(split_sections(source))
    return [title for title in titles if title not in remaining]


def count_prose(section: str) -> int:
    """Return how many lines of comment follow the banner of a section."""
    count = 0
    for line in section.splitlines()[1:]:
        if not line.startswith("#"):
            break
        if line != "#":
            count += 1
    return count


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a module, of its functions and of theirs."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def find_late_names(source: str) -> set[tuple[str, str]]:
    """Return each function with a name that it uses and that a later section defines.

    The import itself shows such names in code that it runs; this is for the functions.
    """
    section = 0
    homes: dict[str, int] = {}
    section_of_line = [0]
    for line in source.splitlines():
        if line.startswith("# === "):
            section += 1
        section_of_line.append(section)
        definition = re.match(r"(?:def |class )?(\w+)", line)
        if definition:
            homes.setdefault(definition[1], section)

    late = set()
    for code in code_objects(compile(source, "source", "exec")):
        here = section_of_line[code.co_firstlineno]
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL" and homes.get(name, 0) > here:
                late.add((code.co_name, name))
    for function, name in annotated_names(ast.parse(source)):
        if homes.get(name, 0) > section_of_line[function.lineno]:
            late.add((function.name, name))
    return late


def find_long_comments(source: str) -> list[int]:
    """Return the lines whose comment behind code has more than MAX_COMMENT_WORDS words."""
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line[:token.start[1]].strip():
            continue
        text = token.string.lstrip("# ")
        if not text.startswith("noqa") and len(text.split()) > MAX_COMMENT_WORDS:
            lines.append(token.start[0])
    return lines


def annotated_names(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Yield each name in the annotations of the arguments and the result of a function."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        annotations = [function.returns]
        for argument in ast.walk(function.args):
            if isinstance(argument, ast.arg):
                annotations.append(argument.annotation)
        for annotation in annotations:
            if annotation is None:
                continue
            for node in ast.walk(annotation):
                if isinstance(node, ast.Name):
                    yield function, node.id


class StyleChecksTest(unittest.TestCase):
    """Each check finds a fault of its kind in a small text."""

    def test_dense_expression_is_found_and_its_plain_text_is_not(self) -> None:
        for kind in DENSE_KINDS:
            for example in kind.examples:
                with self.subTest(example):
                    first_line = example.splitlines()[0]
                    self.assertEqual(find_dense(example), [f"{kind.name}: {first_line}"])
            for example in kind.plain:
                with self.subTest(example):
                    self.assertEqual(find_dense(example), [])

    def test_density_of_a_small_text(self) -> None:
        source = "def f():\n    '''Text.'''\n    # why\n    x = 1\n\n    return x  # what\n"
        expected = Density(tokens=10 / 3, comments=1 / 3, blank=1 / 5)
        self.assertEqual(measure_density(source), expected)
        self.assertEqual(measure_functions(source), {"f:1": 6})

    def test_sections_and_their_prose(self) -> None:
        source = "x = 1\n# === A ===\n#\n# one\n# two\n\n# more\n# === B ===\ny = 2\n"
        sections = split_sections(source)
        self.assertEqual(list(sections), ["", "A", "B"])
        self.assertEqual(count_prose(sections["A"]), 2)

    def test_section_of_the_tests_that_is_out_of_order_is_found(self) -> None:
        source = "# === A ===\n# === B ===\n# === C ===\n"
        for titles, wrong in (("A C", []), ("B A C", ["A", "C"]), ("A X", ["X"])):
            words = ["Helpers", "Style", *titles.split(), "Running"]
            tests = "".join(f"# === {title} ===\n" for title in words)
            with self.subTest(titles):
                self.assertEqual(sections_out_of_order(source, tests), wrong)

    def test_name_of_a_later_section_is_found(self) -> None:
        source = ("# === A ===\ndef f(x: C) -> list[D]:\n    return g()\n"
                  "# === B ===\ndef g():\n    return f()\nclass C:\n    y = f()\nD = int\n")
        self.assertEqual(find_late_names(source), {("f", "g"), ("f", "C"), ("f", "D")})

    def test_long_comment_behind_code_is_found(self) -> None:
        words = "one two three four five six seven eight"
        source = f"x = 1  # {words}\ny = 2  # {words} nine\n# {words} nine\n"
        self.assertEqual(find_long_comments(source), [2])


class Limits(NamedTuple):
    """Limits of a file: tokens a code line, shares of comment lines and blank lines, test lines."""

    tokens: float
    comments: float
    blank: float


class Source(NamedTuple):
    """The text of a file, with its limits."""

    name: str
    text: str
    limits: Limits


def read_sources() -> list[Source]:
    """Return gipam.py, the self-check and, where they are beside it, the programs of the CI."""
    sources = []
    programs = glob.glob(os.path.join(HERE, ".ci", "**", "*.py"), recursive=True)
    for path in [GIPAM, os.path.abspath(__file__), *sorted(programs)]:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        limits = Limits(8.5, 0.04, 0.04) if path == GIPAM else Limits(9.5, 0.0, 0.0)
        sources.append(Source(os.path.basename(path), text, limits))
    return sources


def read_texts() -> dict[str, str]:
    """Return the other texts of the repository that are here, by their names."""
    texts = {}
    for name in ("README.md", "gipam.env", "gipam.service", os.path.join(".ci", "run")):
        path = pathlib.Path(HERE, name)
        if path.exists():
            texts[name] = path.read_text(encoding="utf-8")
    return texts


class StyleTest(unittest.TestCase):
    sources: tuple[Source, ...] = ()
    source = ""
    tree = ast.Module([], [])

    @classmethod
    def setUpClass(cls) -> None:
        cls.sources = tuple(read_sources())
        cls.source = pathlib.Path(GIPAM).read_text(encoding="utf-8")
        cls.tree = ast.parse(cls.source)

    def test_every_expression_is_plain(self) -> None:
        for source in self.sources:
            with self.subTest(source.name):
                self.assertEqual(find_dense(source.text), [])

    def test_lines_are_short_and_parted_by_comments_and_blank_lines(self) -> None:
        for source in self.sources:
            with self.subTest(source.name):
                density = measure_density(source.text)
                self.assertLessEqual(density.tokens, source.limits.tokens)
                self.assertGreaterEqual(density.comments, source.limits.comments)
                self.assertGreaterEqual(density.blank, source.limits.blank)

    def test_functions_are_short(self) -> None:
        sizes = measure_functions(self.sources[0].text)
        for name, size in sizes.items():
            self.assertLessEqual(size, MAX_FUNCTION_LINES, name)
        self.assertLessEqual(statistics.median(sizes.values()), 11)
        deciles = statistics.quantiles(sizes.values(), n=10)
        self.assertLess(deciles[8], 35)

    def test_tests_are_short(self) -> None:
        for source in self.sources[1:]:
            for name, size in measure_functions(source.text).items():
                if name.startswith("test_"):
                    with self.subTest(source.name, name=name):
                        self.assertLessEqual(size, MAX_TEST_LINES)

    def test_fixtures_nest_at_most_two_deep(self) -> None:
        for name, value in globals().items():
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                fixtures = [base for base in value.__mro__ if "setUp" in vars(base)]
                fixtures.remove(unittest.TestCase)
                with self.subTest(name):
                    self.assertLessEqual(len(fixtures), 2)

    def test_lines_fit_a_window(self) -> None:
        for source in self.sources:
            for line in source.text.splitlines():
                self.assertLessEqual(len(line), MAX_COLUMNS, (source.name, line))

    def test_comments_behind_code_are_short(self) -> None:
        for source in self.sources:
            self.assertEqual(find_long_comments(source.text), [], source.name)

    def test_lines_of_texts_fit_a_wide_window(self) -> None:
        """A row of a table is as long as it has to be."""
        texts = read_texts()
        for name in texts.keys() & {"README.md", "gipam.env", "gipam.service"}:
            for line in texts[name].splitlines():
                if not line.startswith("|"):
                    self.assertLessEqual(len(line), MAX_TEXT_COLUMNS, (name, line))

    def test_no_file_outside_the_repository_is_cited(self) -> None:
        texts = {source.name: source.text for source in self.sources}
        texts.update(read_texts())
        # On a user's host, the README and the programs of the CI may be missing.
        names = {*texts, "README.md"}
        for name, text in texts.items():
            with self.subTest(name):
                cited = set(CITED_FILE.findall(text))
                self.assertEqual(cited - names, set())

    def test_banners_are_the_sections_of_the_docstring(self) -> None:
        banners = re.findall(r"^# === (\w+) =+$", self.source, re.M)
        titles = re.findall(r"^    ([A-Z]\w+)  +\S", gipam.__doc__ or "", re.M)
        self.assertEqual(banners, titles)
        self.assertEqual(self.source.count("\n# ==="), len(banners))
        self.assertGreaterEqual(len(banners), 9)

    def test_sections_of_the_tests_have_the_titles_and_the_order_of_gipam(self) -> None:
        self.assertEqual(sections_out_of_order(self.source, self.sources[1].text), [])

    def test_each_banner_is_followed_by_three_to_ten_lines_of_prose(self) -> None:
        for source in self.sources[:2]:
            for title, section in split_sections(source.text).items():
                if title:
                    with self.subTest(source.name, title=title):
                        self.assertIn(count_prose(section), range(3, 11))

    def test_what_is_public_has_a_docstring(self) -> None:
        kinds = (ast.FunctionDef, ast.ClassDef)
        nodes = [node for node in self.tree.body if isinstance(node, kinds)]
        for node in list(nodes):
            if isinstance(node, ast.ClassDef):
                nodes += [member for member in node.body if isinstance(member, kinds)]
        for node in nodes:
            if not node.name.startswith("_"):
                self.assertTrue(ast.get_docstring(node), node.name)

    def test_sections_use_only_what_stands_above_them(self) -> None:
        self.assertEqual(find_late_names(self.source), set())

    def run_python(self, *arguments: str) -> str:
        """Return the output of a Python that sees only the standard library."""
        with tempfile.TemporaryDirectory(prefix="gipam-") as directory:
            done = subprocess.run([sys.executable, "-I", "-S", "-B", *arguments], cwd=directory,
                                  capture_output=True, encoding="utf-8", timeout=DEADLINE_S)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(os.listdir(directory), [])
        return done.stdout

    def test_only_the_standard_library_is_imported(self) -> None:
        modules: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                modules.add(node.module or "")
        self.run_python("-c", "import " + ", ".join(sorted(modules)))

    def test_importing_has_no_effect(self) -> None:
        program = """if True:
            import logging, os, signal, sys, threading
            sys.path.insert(0, sys.argv.pop())
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            def look():
                signals = [signal.getsignal(number) for number in signal.valid_signals()]
                umask = os.umask(0)
                os.umask(umask)
                return (signals, umask, list(sys.argv), dict(os.environ), threading.enumerate(),
                        list(logging.root.handlers), logging.root.level,
                        sorted(os.listdir("/proc/self/fd")))
            before = look()
            import gipam
            assert look() == before, (look(), before)
            assert not gipam.log.handlers
        """
        output = self.run_python("-c", program, "--unknown", "-v4", "nonsense",
                                 os.path.dirname(GIPAM))
        self.assertEqual(output, "")


# === Logging ======================================================================================
#
# The log of the daemon on stderr: for the journal of systemd, with priorities, or for a terminal,
# with times. A record is one line, whatever its cause, and a reader that does not read delays
# nothing.

SUBNET_LINE = r"10.2.0.0/24 \(my net\)"
# Patterns of the lines of test_change_is_one_line.
LOG_LINES = (
    r"<6>serving on /\S+\.sock, and metrics on 127\.0\.0\.1:\d+ with 0 pools",
    "<6>allocated 10.2.0.0/24 to network my net",
    fr"<6>allocated gateway 10.2.0.1 in {SUBNET_LINE}",
    fr"<6>allocated 10.2.0.2 to web1 \(02:42:00:00:00:01\) in {SUBNET_LINE}",
    fr"<6>allocated 10.2.0.3 in {SUBNET_LINE}",
    fr"<6>released 10.2.0.2 in {SUBNET_LINE}",
    r"<4>nothing to release: 10.2.0.2 in 10.2.0.0/24#\w+ is not held",
    "<6>recovered 10.9.0.0/24 from Docker: 1 change",
    "<6>allocated 10.9.0.0/24 to a network",
    r"<4>nothing to release: 10.9.0.7 in 10.9.0.0/24#0123456789abcdef is not held",
    "<6>recognised 10.9.0.0/24 as Docker's pool 10.9.0.0/24#0123456789abcdef",
    fr"<6>released {SUBNET_LINE}",
    "<4>refused a subnet: Pool overlaps with other one on this address space: "
    "10.9.0.0/25 with 10.9.0.0/24, held by .*--fix` releases it",
    r"<4>option 'v4ab' does nothing: did you mean 'gipam.v4ab'\?",
    "<6>allocated 10.2.1.0/24 to network web",
    "<4>gipam.name 'web' is in use for 10.2.1.0/24: 10.2.2.0/24 is not reserved for it",
    "<6>allocated 10.2.2.0/24 to network web",
    "<6>allocated 10.9.1.0/25 of 10.9.1.0/24 to a network",
    "<6>stopped",
)
PRINT_SWITCH_INTERVAL = """
import atexit
def report():
    print(sys.getswitchinterval(), file=sys.stderr)
atexit.register(report)
"""


class LogTest(Case):
    """The log of a daemon."""

    def daemon(self, *options: str, kind: type[Daemon] = Daemon, **variables: str) -> Daemon:
        return kind(self, *options, env={**NO_DOCKER, **variables})

    def stop_and_read(self, daemon: Daemon) -> list[str]:
        """Stop the daemon and return the lines of its log."""
        self.assertEqual(daemon.stop(), 0)
        lines = daemon.read_log().splitlines()
        # The import logs at any time that it cannot reach Docker.
        return [line for line in lines if "compared with Docker" not in line]

    def test_change_is_one_line_with_a_priority_under_the_service_manager(self) -> None:
        options = ("-v4", "10.2.0.0/16", "-metrics", "127.0.0.1:0")
        daemon = self.daemon(*options, JOURNAL_STREAM="8:1").start()
        client = daemon.client()
        pool_id, _ = client.request_pool("10.2.0.0/24", gipam_name="my net")
        client.request_address(pool_id, gateway=True)
        client.request_address(pool_id, mac="02:42:00:00:00:01", name="web1")
        client.request_address(pool_id)
        client.release_address(pool_id, "10.2.0.2")
        client.release_address(pool_id, "10.2.0.2")
        client.call("Gipam.Adopt", Subnet="10.9.0.0/24", SubPool="", Leases=[], Seq=0)
        client.release_address("10.9.0.0/24#0123456789abcdef", "10.9.0.7")
        client.release_pool(pool_id)
        with self.assertRaises(ErrorReply):
            client.request_pool("10.9.0.0/25")
        client.request_pool(gipam_name="web", v4ab="26", parent="eth0")
        client.request_pool(gipam_name="web")
        client.request_pool("10.9.1.0/24", "10.9.1.0/25")

        lines = self.stop_and_read(daemon)
        for line, pattern in itertools.zip_longest(lines, LOG_LINES, fillvalue=""):
            self.assertRegex(line, f"^{pattern}$")

    def test_fatal_error_is_one_line_although_docker_gets_it_too(self) -> None:
        daemon = self.daemon().start()
        daemon.client().request_pool("10.8.0.0/24")
        os.unlink(daemon.file + ".journal.1")
        with self.assertRaisesRegex(ErrorReply, "deleted .* run the command again"):
            daemon.client().request_pool("10.9.0.0/24")
        self.assertEqual(daemon.stop(0), 74)
        lines = [line for line in daemon.read_log().splitlines() if "moved or deleted" in line]
        self.assertEqual(len(lines), 1)

    def test_line_has_a_time_elsewhere_and_warnings_come_at_the_start(self) -> None:
        daemon = self.daemon("-metrics", "127.0.0.1:0", "serve", kind=TcpDaemon).start()
        lines = self.stop_and_read(daemon)
        for line in lines:
            self.assertRegex(line, r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) \S")
        self.assertRegex("\n".join(lines), (
            "on TCP every user of this host can take and release.*\n"
            r".*no base is configured \(-v4, -v6\): only networks with a --subnet are possible\n"
            r".*serving on 127\.0\.0\.1:\d+, and metrics on 127\.0\.0\.1:\d+ with 0 pools"))

    def test_text_of_a_request_is_escaped_and_cut(self) -> None:
        daemon = self.daemon(JOURNAL_STREAM="8:1").start()
        many_lines = ["\n" * 9000 for _ in range(7)]
        long = {"PoolID": "y" * 1_000_000, "Address": "10.2.0.1", "Options": {"x": "\x1b]0;\t\n"}}
        for data in (
                b"POST /a\x1b[31m\tb HTTP/1.1\r\n\r\n",
                b"\x1b[31m /x HTTP/1.1\r\n\r\n",
                b"GET /x HTTP/1.1\r\nContent-Length: \x1b[31m\r\n\r\n",
                b"POST /" + b"z" * 60_000 + b" HTTP/1.1\r\n\r\n",
                request("IpamDriver.RequestAddress", long),
                request("IpamDriver.RequestPool", {"Pool": "\x1b[31m"}),
                request("IpamDriver.RequestPool", {"Pool": many_lines})):
            peer = Peer(self, daemon.socket)
            for answer in peer.send(data, is_last=True).answers():
                text = answer.body["Err"]
                self.assertTrue(text.isprintable(), answer)
                self.assertLess(len(text), 2000)
        for line in self.stop_and_read(daemon):
            self.assertTrue(line.isprintable(), line)
            self.assertLess(len(line), 5000)
            self.assertRegex(line, "^<[346]>")

    def test_thread_beside_the_loop_gives_way_soon(self) -> None:
        """At a start, the thread that parses Docker's reply once delayed each call by 20 ms."""
        daemon = self.daemon()
        daemon.command = launcher(daemon.directory, PRINT_SWITCH_INTERVAL)
        Peer(self, daemon.start().socket).ask()
        self.assertEqual(self.stop_and_read(daemon)[-1], "0.0005")


class UnreadLogTest(Case):
    """A daemon whose stderr nobody reads: neither a request nor its end waits for a reader."""

    def start(self, read_end: int, write_end: int) -> Daemon:
        """Start a daemon whose log goes to the write end, and fill that with log lines."""
        self.addCleanup(os.close, read_end)
        daemon = Daemon(self, "-v4", "10.2.0.0/16", env=NO_DOCKER).start(stderr=write_end)
        os.close(write_end)
        client = daemon.client()
        for _ in range(1000):
            pool_id, _ = client.request_pool()
            client.release_pool(pool_id)
        return daemon

    def test_pipe(self) -> None:
        read_end, write_end = os.pipe()
        self.assertEqual(self.start(read_end, write_end).stop(), 0)

    def test_socket(self) -> None:
        reader, writer = socket.socketpair()
        daemon = self.start(reader.detach(), writer.detach())
        self.assertEqual(daemon.stop(), 0)

    def test_terminal_when_the_journal_is_lost(self) -> None:
        read_end, write_end = os.openpty()
        daemon = self.start(read_end, write_end)
        os.unlink(daemon.file + ".journal.1")
        with self.assertRaises(ErrorReply):
            daemon.client().request_pool()
        # The daemon ends by itself.
        self.assertEqual(daemon.stop(0), 74)


class LogHandlerTest(Case):
    """The log handler alone, without a daemon."""

    def setUp(self) -> None:
        self.handler = gipam.LogHandler()
        self.handler.is_buffering = True

    def handle(self, **attributes: Any) -> None:
        """Handle a record with these attributes."""
        self.handler.handle(logging.makeLogRecord(attributes))

    def test_each_line_of_a_message_has_its_priority_and_is_escaped(self) -> None:
        with mock.patch.dict(os.environ, JOURNAL_STREAM="8:1"):
            for level, priority in (
                    (logging.INFO, "<6>"),
                    (logging.WARNING, "<4>"),
                    (logging.ERROR, "<3>")):
                attributes = {"levelno": level, "msg": "one\ntwo \x1b[31m\t"}
                text = self.handler.format(logging.makeLogRecord(attributes))
                self.assertEqual(text, f"{priority}one\n{priority}two \\x1b[31m\\t")

    def test_record_that_cannot_be_formatted_ends_nothing(self) -> None:
        """Formatting may fail: for its first traceback, Python 3.13 has to open a module file."""
        with mock.patch.object(logging.Formatter, "formatException", side_effect=OSError("EMFILE")):
            self.handle(msg="a bug", exc_info=(None, None, None))
        self.assertEqual(self.handler._lines.pop(), b"a bug: OSError('EMFILE')\n")

    def test_buffer_keeps_no_exception(self) -> None:
        """A buffered exception would keep the body of its request in memory."""
        error = gipam.GipamError("x" * 9999)
        reference = weakref.ref(error)
        self.handle(msg="refused: %s", args=(error,))
        del error
        self.assertIsNone(reference())

    def test_duration_is_logged_only_of_a_slow_change(self) -> None:
        client = Alone()
        client.request_pool("10.9.0.0/24")
        record = client.service._unlogged[-1]
        for duration_s, ending in ((0.24, ""), (0.26, ", which took 0.3 s")):
            self.assertEqual(record.describe(record.started_s + duration_s),
                             f"allocated 10.9.0.0/24 to a network{ending}")

    def test_buffer_is_limited_and_drops_the_oldest_line(self) -> None:
        for number in range(gipam.MAX_LOG_RECORDS + 2):
            self.handle(msg=f"number {number}")
        self.assertEqual(len(self.handler._lines), gipam.MAX_LOG_RECORDS)
        self.assertIn(b"number 2\n", self.handler._lines[0])


# === Model ========================================================================================
#
# Texts of prefixes, addresses and pool ids; the state as records make it. make_state() and Alone
# are the fixtures of all tests that need no disk: a state over two bases, and a client of a service
# that has only that.

NOW_S = 1_700_000_000
TOKEN = "0123456789abcdef"
BASES = "10.2.0.0/16 2001:db8:0:100::/56"
NOT_A_PREFIX = ("is not a prefix in CIDR form, such as 10.2.0.0/16 (at most /32) or 2001:db8::/56 "
                "(at most /128)")
HOST_BITS = "has host bits set: the prefix is"


def make_state(bases: str = BASES, v4ab: int = 24, v6ab: int = 64,
               excluded: str = "") -> gipam.State:
    """Return the empty state over bases of both families."""
    families = []
    for version, prefixlen in ((4, v4ab), (6, v6ab)):
        families.append(gipam.Family(version, prefixes_of(bases, version), prefixlen,
                                     prefixes_of(excluded, version)))
    return gipam.State(families)


def prefixes_of(text: str, version: int) -> list[gipam.Network]:
    """Return the prefixes of one family."""
    return [prefix for prefix in parse_prefixes(text) if prefix.version == version]


def state_after(*records: gipam.Record, bases: str = BASES) -> gipam.State:
    """Return the state that these records make."""
    state = make_state(bases)
    for record in records:
        state.apply(record)
    return state


def dump_state(state: gipam.State) -> Any:
    """Return all that a state holds, down to the nodes of its trees, as values to compare."""
    pools = {pool_id: dump_pool(pool) for pool_id, pool in state.pools.items()}
    families = {version: dump_family(family) for version, family in state.families.items()}
    return state.seq, state.lease_count, pools, families


def dump_attributes(value: Any) -> dict[str, Any]:
    """Return copies of all attributes, so that later records do not change them."""
    return {name: copy.copy(attribute) for name, attribute in vars(value).items()}


def dump_pool(pool: gipam.Pool) -> Any:
    return {**dump_attributes(pool), "subnet": str(pool.subnet.network)}


def dump_family(family: gipam.Family) -> Any:
    subnets = {network: dump_subnet(subnet) for network, subnet in family.subnets.items()}
    # A cursor that was never used is 0 after it was read from a lease file.
    cursors = {length: index for length, index in family.cursors.items() if index}
    reservations = list(family.reservations.items())
    return subnets, cursors, reservations, dump_attributes(family.used)


def dump_subnet(subnet: gipam.Subnet) -> Any:
    pool_ids = {sub_pool: pool.pool_id for sub_pool, pool in subnet.pools.items()}
    past_leases = list(subnet.affinity)
    bitmaps = (dump_attributes(subnet.allocated), dump_attributes(subnet.affinity.offsets))
    return bitmaps, past_leases, pool_ids, subnet.is_shared


def random_state(rng: random.Random) -> gipam.State:
    """Return the empty state over random bases inside the two worlds."""
    bases: list[gipam.Network] = []
    base_count = rng.randrange(1, 8)
    for _ in range(base_count):
        base = random_prefix(rng, rng.choice(WORLDS), 1)
        is_apart = not any(map(base.overlaps, bases))
        if base.prefixlen <= base.max_prefixlen - 4 and is_apart:
            bases.append(base)
    excluded = []
    for _ in range(rng.randrange(3)):
        if bases:
            excluded.append(random_prefix(rng, rng.choice(bases), 2))
    return make_state(" ".join(map(str, bases)), v4ab=rng.randint(28, 30),
                      v6ab=rng.randint(124, 126), excluded=" ".join(map(str, excluded)))


class Alone(DirectClient):
    """A client of a service without a disk, on a host with these routes, to test decisions only."""

    def __init__(self, state: gipam.State | None = None) -> None:
        store = mock.Mock(seq=sys.maxsize, fatal_error=None, last_error="")
        service = gipam.Service(store, state or make_state(), {}, make_state, Kernel())
        super().__init__(service)
        self.routes: list[gipam.Network] = []

    def post(self, path: str, body: bytes, verb: str = "POST") -> tuple[int, Any]:
        def read_used_ranges(*_: Any) -> list[gipam.Range]:
            return integer_ranges(self.routes)

        with mock.patch.object(gipam, "read_used_ranges", read_used_ranges):
            return super().post(path, body, verb)

    def request_pool(self, pool: str = "", sub_pool: str = "", v6: bool = False,
                     **options: str) -> tuple[str, str]:
        """Request the pool SUBNET or SUBNET,SUB_POOL; return (pool_id, subnet)."""
        subnet, _, sub_range = pool.partition(",")
        return super().request_pool(subnet, sub_pool or sub_range, v6, **options)

    def exhaust(self, pool_id: str) -> list[str]:
        """Request addresses until the pool has none left; return them in order."""
        addresses: list[str] = []
        while True:
            try:
                cidr = self.request_address(pool_id)
            except ErrorReply as error:
                if error.status != 503:
                    raise
                return addresses
            addresses.append(cidr.partition("/")[0])


class ParsingTest(unittest.TestCase):
    def test_endpoint_is_a_path_or_host_and_port(self) -> None:
        for address, text in (
                (("127.0.0.1", 90), "127.0.0.1:90"),
                (("::1", 90, 0, 0), "[::1]:90"),
                ("/run/x.sock", "/run/x.sock"),
                (b"\0x", "\0x"),
                ("", "")):
            with self.subTest(text):
                self.assertEqual(gipam.format_socket_address(address), text)

    def test_prefix_is_an_address_and_a_decimal_length(self) -> None:
        for text in ("10.2.0.0/16", "0.0.0.0/0", "10.2.0.1/32", "2001:db8:0:100::/56", "::/0",
                     "2001:db8::1/128", "::ffff:10.0.0.0/104", "2001:0DB8:0:0::/64"):
            with self.subTest(text):
                self.assertEqual(gipam.parse_prefix(text), ipaddress.ip_network(text))

    def test_host_bits_of_a_prefix_can_be_cleared(self) -> None:
        for text, network in (
                ("10.2.0.1/16", "10.2.0.0/16"),
                ("2001:db8::1/64", "2001:db8::/64"),
                ("10.2.0.1/32", "10.2.0.1/32"),
                ("10.9.9.9/0", "0.0.0.0/0")):
            with self.subTest(text):
                self.assertEqual(str(gipam.parse_prefix(text, mask=True)), network)

    def assert_no_prefix(self, text: str, rule: str) -> None:
        with self.subTest(text), self.assertRaises(ValueError) as caught:
            gipam.parse_prefix(text)
        self.assertEqual(str(caught.exception), f"{text!r} {rule}")

    def test_what_is_no_prefix_is_refused_with_the_rule(self) -> None:
        texts = ("10.2.0.0||/24|10.2.0.0/|web|10.2.0.0/255.255.0.0|10.2.0.0/0.0.255.255|"
                 "10.2.0.0/+16|10.2.0.0/-1|10.2.0.0/ 16|10.2.0.0/16/8|10.2.0.0/\u0661\u0666|"
                 "10.2.0.0/1\u00b2|fe80::%eth0/64|10.2.0.0/33|2001:db8::/129|10.2/16|"
                 " 10.2.0.0/16|10.02.0.0/16")
        for text in texts.split("|"):
            self.assert_no_prefix(text, NOT_A_PREFIX)
        self.assert_no_prefix("10.2.0.1/16", f"{HOST_BITS} 10.2.0.0/16")
        self.assert_no_prefix("2001:db8::1/64", f"{HOST_BITS} 2001:db8::/64")

    def test_address_goes_to_a_number_and_back(self) -> None:
        for text, version, number in (
                ("10.2.0.1", 4, 0x0A020001), ("0.0.0.0", 4, 0), ("255.255.255.255", 4, 2**32 - 1),
                ("::", 6, 0), ("2001:db8::1", 6, 0x20010DB8 << 96 | 1),
                ("::ffff:10.2.0.1", 6, 0xFFFF0A020001)):
            with self.subTest(text):
                self.assertEqual(gipam.parse_address(text, version), number)
                self.assertEqual(gipam.format_address(number, version), text)
        self.assertEqual(gipam.parse_address("2001:0DB8:0::1", 6), 0x20010DB8 << 96 | 1)

    def test_what_is_no_bare_address_of_the_family_is_refused(self) -> None:
        texts = {
            4: "|10.2.0|10.2.0.1/24|10.2.0.256| 10.2.0.1|010.2.0.1|0x0a020001|167903233|"
               "10.2.0.1\0|\u0661.2.0.1|10.2.0.1\n|::1",
            6: "|10.2.0.1|2001:db8::1/64|fe80::1%eth0|2001:db8|::g|[::1]|\ud800",
        }
        for version, joined in texts.items():
            for text in joined.split("|"):
                with self.subTest(text), self.assertRaises(ValueError) as caught:
                    gipam.parse_address(text, version)
                error = f"{text!r} is not a bare IPv{version} address"
                self.assertEqual(str(caught.exception), error)


class PoolIdTest(unittest.TestCase):
    def test_pool_id_carries_subnet_and_sub_pool(self) -> None:
        for text in ("10.2.0.0/24", "2001:db8::/64", "10.2.0.0/24,10.2.0.128/25",
                     "2001:db8::/64,2001:db8::/72", "0.0.0.0/0", "10.2.0.0/24,10.2.0.0/24"):
            with self.subTest(text):
                subnet, *sub_pools = parse_prefixes(text.replace(",", " "))
                sub_pool = sub_pools[0] if sub_pools else None
                pool_id = f"{text}#{TOKEN}"
                self.assertEqual(gipam.make_pool_id(subnet, sub_pool, TOKEN), pool_id)
                self.assertEqual(gipam.parse_pool_id(pool_id), (subnet, sub_pool))

    def test_text_of_others_is_no_pool_id(self) -> None:
        of_the_go_program = ("Xq3vT0Zb9kLw", "9f86d081884c7d659a2feaa0c55ad015")
        for text in ("", "web", "10.2.0.0/24", "gipam/10.2.0.0/24", "LocalDefault/10.0.0.0/8",
                     TOKEN, *of_the_go_program):
            with self.subTest(text):
                self.assertIsNone(gipam.parse_pool_id(text))

    def test_pool_id_has_no_other_spelling(self) -> None:
        prefixes = ("|10.2.0.0|10.2.0.1/24|10.2.0.0/33|10.2.0.0/255.255.255.0|10.2.0.0/24,|"
                    ",10.2.0.0/24|10.2.0.0/24,10.2.0.1/25|10.2.0.0/24,10.2.0.0/25,10.2.0.128/25|"
                    " 10.2.0.0/24|2001:DB8::/64|10.2.0.0/024|2001:db8:0::/64|"
                    "10.2.0.0/24,10.2.0.0/025")
        pool_ids = [f"{text}#{TOKEN}" for text in prefixes.split("|")]
        for token in (TOKEN + "0", TOKEN[1:], TOKEN.upper(), TOKEN + "\n"):
            pool_ids.append(f"10.2.0.0/24#{token}")
        for pool_id in pool_ids:
            with self.subTest(pool_id):
                self.assertIsNone(gipam.parse_pool_id(pool_id))


def grant(pool_id: str, subnet: str, sub_pool: str = "", name: str = "") -> gipam.PoolGrant:
    """Return a record of a pool."""
    return gipam.PoolGrant(pool_id, subnet, sub_pool, name, NOW_S, 0, 1)


def lease(pool_id: str, address: str, name: str = "") -> gipam.AddressGrant:
    """Return a record of an endpoint's address."""
    return gipam.AddressGrant(pool_id, address, gipam.ENDPOINT, "", name, NOW_S, 6)


class StateTest(unittest.TestCase):
    def test_record_that_contradicts_the_state_leaves_it_as_it_is(self) -> None:
        whole, ranged, mine, other = "10.2.0.0/24", "10.2.1.0/24", "10.2.0.0/24#1", "10.2.1.0/24#2"
        state = state_after(
            grant(mine, whole), lease(mine, "10.2.0.5", "web1"),
            grant(other, ranged, "10.2.1.0/25"), lease(other, "10.2.1.5", "web1"))
        before = dump_state(state)
        for record in (
                grant("new", whole),  # the whole subnet twice
                grant("new", whole, "10.2.0.0/25"),  # a range of a whole one
                grant("new", ranged),  # a whole one over ranges
                grant("new", ranged, "10.2.1.0/25"),  # a range twice
                grant("new", "10.2.0.0/25"), grant("new", "10.2.0.0/16"),
                grant(other, ranged, "10.2.1.128/25"),  # an id twice
                grant("new", "10.2.9.1/24"), grant("new", "10.2.9.0/24", "10.2.8.0/25"),
                grant("new", "::/96", "0.0.0.0/25"), grant("", "10.2.9.0/24"),
                gipam.PoolRelease("new"),
                gipam.PoolIdBinding("new", "newer"), gipam.PoolIdBinding(mine, other),
                gipam.PoolIdBinding(mine, ""),
                lease("new", "10.2.0.9"), lease(mine, "10.2.0.5"), lease(mine, "10.2.0.255"),
                lease(mine, "10.2.1.9"), lease(mine, "2001:db8::1"),
                lease(mine, "10.2.0.9")._replace(kind="guest"),
                gipam.AddressRelease(mine, "10.2.0.9"), gipam.AddressRelease(mine, ""),
                gipam.AddressRelease(other, "10.2.0.5"), gipam.AddressRelease("new", "10.2.0.5")):
            with self.subTest(record=record):
                self.assertRaises(ValueError, state.apply, record)
                self.assertEqual(dump_state(state), before)

    def test_a_lease_costs_little_memory_wherever_its_address_lies(self) -> None:
        """A bitmap covers 64 Ki addresses, and is longest if the last of them is leased."""
        for step, limit_bytes in ((1, 400), (1 << 16, 1000)):
            state = state_after(grant("a", "fd00::/64"))
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            for number in range(1, 5001):
                offset = number * step + step - 1
                address = gipam.format_address((0xfd << 120) + offset, 6)
                mac = gipam.format_address(number, 6)
                record = lease("a", address, f"web-{number}")
                state.apply(record._replace(mac=mac, granted_s=NOW_S + number))
            with self.subTest(step=step):
                self.assertLessEqual(tracemalloc.get_traced_memory()[0] / 5000, limit_bytes)
            tracemalloc.stop()


def past_lease(offset: int, owner: str, seq: int, is_explicit: bool = False) -> gipam.PastLease:
    """Return the record of an owner's last address."""
    return gipam.PastLease(offset, (owner,), seq, is_explicit)


class AffinityTest(unittest.TestCase):
    """The order in which addresses are taken from their last owners, and are forgotten."""

    OLD = past_lease(5, "old", 1)
    NEW = past_lease(4, "new", 3)
    OLD_EXPLICIT = past_lease(3, "old explicit", 2, is_explicit=True)
    NEW_EXPLICIT = past_lease(2, "new explicit", 4, is_explicit=True)
    BY_TIME = (OLD, OLD_EXPLICIT, NEW, NEW_EXPLICIT)

    def affinity_of(self, *past_leases: gipam.PastLease) -> gipam.Affinity:
        affinity = gipam.Affinity()
        for past in past_leases:
            affinity.record(past)
        return affinity

    def test_dynamic_ones_go_first_and_those_that_have_rested_longest(self) -> None:
        order = (self.OLD, self.NEW, self.OLD_EXPLICIT, self.NEW_EXPLICIT)
        affinity = self.affinity_of(*self.BY_TIME)
        self.assertEqual(tuple(affinity.reclaim_order()), order)

    def test_the_oldest_is_forgotten_at_the_limit(self) -> None:
        with mock.patch.object(gipam, "MAX_AFFINITIES", 2):
            affinity = self.affinity_of(self.OLD, self.OLD_EXPLICIT, self.NEW)
        self.assertEqual(tuple(affinity), (self.OLD_EXPLICIT, self.NEW))
        self.assertIsNone(affinity.last_offset("old"))
        self.assertFalse(5 in affinity.offsets)

    def test_saved_ones_take_their_place_by_the_time_of_their_release(self) -> None:
        affinity = self.affinity_of(self.NEW, self.NEW_EXPLICIT)
        affinity.restore([self.OLD_EXPLICIT, self.OLD])
        self.assertEqual(tuple(affinity), self.BY_TIME)

    def test_what_was_released_later_wins_over_what_was_saved(self) -> None:
        affinity = self.affinity_of(past_lease(5, "web", 9), past_lease(6, "db", 10))
        affinity.restore([past_lease(7, "web", 1), past_lease(6, "mail", 2)])
        self.assertEqual(affinity.last_offset("web"), 5)
        self.assertEqual(affinity.last_offset("db"), 6)
        self.assertIsNone(affinity.last_offset("mail"))
        self.assertFalse(7 in affinity.offsets)

    def test_an_owner_has_one_address_and_an_address_the_owners_of_one_lease(self) -> None:
        affinity = self.affinity_of(self.OLD, gipam.PastLease(5, ("web", "mac"), 2, False))
        self.assertIsNone(affinity.last_offset("old"))
        affinity.record(past_lease(6, "mac", 3))
        self.assertIsNone(affinity.last_offset("web"))
        self.assertEqual(tuple(affinity), (past_lease(6, "mac", 3),))
        affinity.record(gipam.PastLease(6, (), 4, False))
        self.assertEqual(affinity.last_offset("mac"), 6)


# === Records ======================================================================================
#
# The two forms of the state on disk: a state that is written and read again is the same state, and
# a contradiction of the format of a lease file or a record is refused. The values of a lease file
# that a person has edited are under Settings, since `gipam config` shows how a start refuses them.


def snapshot_after(state: gipam.State) -> gipam.State:
    """Return the state that its lease file stands for."""
    text = "".join(gipam.encode_snapshot({}, gipam.copy_state(state), None))
    restored = make_state()
    gipam.decode_snapshot(json.loads(text), restored)
    return restored


class SnapshotTest(unittest.TestCase):
    @mock.patch.multiple(gipam.OffsetBitmap, SHIFT=3, MASK=7)
    @mock.patch.object(gipam, "LEASES_PER_CHUNK", 3)
    @seeded(10)
    def test_a_state_written_and_read_again_is_equal_and_goes_on_alike(
            self, rng: random.Random) -> None:
        """A copy keeps its moment, and records from the journal do the same as the originals."""
        client = Alone(random_state(rng))
        state = client.service.state
        restored = copy.deepcopy(state)
        tenant = Tenant(client, rng)
        tenant.MAX_POOLS = 1000
        for _ in range(rng.randrange(250)):
            tenant.step()
        before = dump_state(state)
        taken = gipam.copy_state(state)
        records = record_changes(client.service)
        for _ in range(150):
            tenant.step()
        for pool_id in list(state.pools)[:2]:
            client.service.apply(gipam.PoolIdBinding(pool_id, f"{pool_id}:bound"))

        text = "".join(gipam.encode_snapshot({}, taken, None))
        gipam.decode_snapshot(json.loads(text), restored)
        self.assertEqual(dump_state(restored), before)
        for record in records:
            row = [gipam.RECORD_NAMES[type(record)], *record]
            restored.apply(gipam.decode_record(json.loads(gipam.encode_json(row))))
        self.assertEqual(dump_state(restored), dump_state(state))

    @seeded(1)
    def test_copy_does_not_end_another_pause_of_the_garbage_collector(
            self, rng: random.Random) -> None:
        with gipam.paused_collection():
            gipam.copy_state(random_state(rng))
            self.assertFalse(gc.isenabled())
        self.assertTrue(gc.isenabled())

    def test_no_chunk_is_long_however_much_is_reserved(self) -> None:
        state = make_state()
        past_leases = []
        for number in range(1, gipam.MAX_SAVED_AFFINITIES):
            past_leases.append(past_lease(number, f"web-{number}", number))
        for number in range(100):
            block = gipam.parse_prefix(f"10.2.{number}.0/24")
            reservation = gipam.BlockReservation(block, tuple(past_leases), number)
            state.families[4].reserve(f"name {number}", reservation)
        chunks = list(snapshot_of(state))
        owners = [(past.owners[0], past.offset, past.seq, False) for past in past_leases]
        self.assertLess(max(map(len, chunks)), 6 * len(gipam.encode_json(owners)))
        restored = snapshot_after(state)
        self.assertEqual(dump_state(restored), dump_state(state))

    def test_free_lists_name_only_what_is_free(self) -> None:
        state = state_after(
            grant("a", "10.2.0.0/24", "10.2.0.0/25"), grant("b", "10.2.0.0/24", "10.2.0.128/25"),
            grant("c", "10.2.1.0/24", name="db"), gipam.PoolRelease("c"),
            lease("a", "10.2.0.5", "web1"), lease("a", "10.2.0.6", "web2"),
            gipam.AddressRelease("a", "10.2.0.5"), gipam.AddressRelease("a", "10.2.0.6"),
            lease("b", "10.2.0.5"))
        document = json.loads("".join(snapshot_of(state)))
        pools = document["Allocated"]
        self.assertEqual([block["Pool"] for block in document["Free"]], ["10.2.1.0/24"])
        self.assertEqual([pool["Allocated"] for pool in pools], [[], ["10.2.0.5"]])
        self.assertEqual([pool["Free"] for pool in pools], [["10.2.0.6"], []])

    def test_keys_match_without_regard_to_case(self) -> None:
        document = {"v4pool": 1, "V4": 2, "ALLOCATED": 3, "colour": 4}
        self.assertEqual(gipam.normalise_keys(document, ("Allocated", "V4Pool")),
                         {"V4Pool": 2, "Allocated": 3, "colour": 4})

    def test_a_lease_file_says_its_format_and_the_version_that_wrote_it(self) -> None:
        document = json.loads("".join(snapshot_of(make_state())))
        self.assertEqual((document["Format"], document["Version"]), (1, gipam.__version__))

    def test_a_lease_file_of_another_format_is_refused(self) -> None:
        """Lease files of the Go program have no Format, and files that people edit no Checksum."""
        gipam.require_format({})
        gipam.require_format({"Format": 1})
        gipam.require_format({"Format": 1, "Checksum": "0"})
        for document in ({"Checksum": "0"}, {"Format": "1"}, {"Format": 0}, {"Format": True},
                         {"Format": [1]}):
            with self.subTest(document), \
                    self.assertRaisesRegex(ValueError, "which no release of gipam has written"):
                gipam.require_format(document)
        later = "has format 2 and needs gipam 3.1 or later: this is gipam .*, which reads format 1"
        with self.assertRaisesRegex(ValueError, later):
            gipam.require_format({"Format": 2, "Version": "3.1"})

    def test_a_record_with_other_fields_is_refused(self) -> None:
        row = ["request_address", *lease("a", "10.2.0.5")]
        self.assertEqual(gipam.decode_record(row), lease("a", "10.2.0.5"))
        for wrong in (row[:-1], [*row, 1], [*row[:-1], 0], [*row[:-1], None], ["share_pool", "a"]):
            with self.subTest(wrong):
                self.assertRaises(ValueError, gipam.decode_record, wrong)


# === Allocator ====================================================================================
#
# The subnet of a network and the address of a container: stories of one decision each, the text
# of each error, and random steps beside a naive model (class Naive), which decides the same with
# lists and dicts. How addresses are given to owners is told under API, on all stages.


class BlockStory(NamedTuple):
    """Requests for networks, and the subnets that they get from these bases."""

    bases: str
    steps: str
    excluded: str = ""


BLOCK_STEP = re.compile(r"""
    (?P<network> (another\ )? (?P<name>[a-z]+) )
    (\ \( (/(?P<length>[0-9]+))? (?P<subnet>[^\ )/][^\ )]*)? (\ range\ (?P<range>[^)]+))? \) )?
    (\ beside\ (?P<routes>[^a-z]+|[0-9a-f:/]+))?
    \ (?P<end> goes | gets\ (?P<gets>.+))
    """, re.VERBOSE)
BLOCK_STORIES = {
    "TestPoolAllocateAndRelease (moby#48069), where a released subnet is next: here it is not, "
    "and the cursor wraps round": (
        BlockStory("10.2.0.0/22",
                   "a gets block 0; b gets block 1; c gets block 2; a goes; d gets block 3; "
                   "e gets block 0; b goes; c goes; f gets block 1; g gets block 2; d goes; "
                   "h gets block 3; i gets nothing"),
    ),
    "bases are used in the order given": (
        BlockStory("10.9.0.0/23 10.2.0.0/24 10.5.0.0/23",
                   "a gets 10.9.0.0/24; b gets 10.9.1.0/24; c gets 10.2.0.0/24; "
                   "d gets 10.5.0.0/24; e gets 10.5.1.0/24; c goes; a goes; f gets 10.9.0.0/24; "
                   "g gets 10.2.0.0/24"),
    ),
    "there is a cursor for each length, else one /26 in each /24 would use up the base": (
        BlockStory("10.2.0.0/22",
                   "a (/26) gets block 0; b gets block 1; c (/26) gets block 1; "
                   "d (/26) gets block 2; e gets block 2; f (/26) gets block 3; "
                   "g (/26) gets block 12"),
    ),
    "a block of another length is a whole free block of a base that has it": (
        BlockStory("10.2.0.0/23 10.4.0.0/22",
                   "a (10.4.2.9/32) gets it; b (/23) gets block 0; c (/23) gets 10.4.0.0/23; "
                   "d (/31) gets 10.4.2.0/31"),
        BlockStory("2001:db8::/56",
                   "a (/72) gets block 0; b gets block 1; c (/127) gets 2001:db8:0:0:100::/127"),
    ),
    "excluded prefixes are given only to a request that names them": (
        BlockStory("10.2.0.0/21",
                   "a gets block 0; b gets block 2; c gets block 3; d gets nothing; "
                   "e (/25) gets block 2; f (10.2.4.0/24) gets it",
                   excluded="10.2.1.128/25 10.2.4.0/22"),
        BlockStory("2001:db8::/62",
                   "a gets block 1; b gets block 3; c gets nothing",
                   excluded="2001:db8::/64 2001:db8:0:2::1/128"),
    ),
    "routes and addresses of the host are passed by and not remembered": (
        BlockStory("10.2.0.0/21",
                   "a beside 10.2.0.7/32, 10.2.1.0/24, 10.2.2.0/23, 10.0.0.0/30 gets block 4; "
                   "b beside 10.2.4.0/22 gets block 0; c beside 10.2.0.0/16 gets nothing; "
                   "d gets block 1"),
        BlockStory("10.0.0.0/24 10.0.1.0/24 10.1.0.0/16",
                   "a beside 10.0.0.0/16 gets 10.1.0.0/24; b beside 10.0.0.0/16 gets 10.1.1.0/24"),
    ),
    "a huge subnet is passed at once; to list the 2^24 blocks of a /40 would not end": (
        BlockStory("2001:db8::/32",
                   "a (2001:db8::/40 range 2001:db8:0:8000::/72) gets it; "
                   "b gets 2001:db8:100::/64; c gets 2001:db8:100:1::/64; "
                   "d beside 2001:db8::/33 gets 2001:db8:8000::/64"),
        BlockStory("::/0",
                   "a (8000::/1) gets it; b (4000::/2) gets it; c (2000::/3) gets it; "
                   "d (/4) gets block 0; e (/4) gets block 1; f (/4) gets nothing"),
    ),
    "a name gets its block again, and others get it last": (
        BlockStory("10.2.0.0/22",
                   "web gets block 0; web goes; a gets block 1; b gets block 2; c gets block 3; "
                   "web gets block 0; web goes; d gets block 0; web gets nothing; b goes; "
                   "web gets block 2"),
        BlockStory("2001:db8::/63",
                   "web gets block 0; web goes; a gets block 1; web gets block 0; web goes; "
                   "b gets block 0; web gets nothing"),
    ),
    "the block of a name returns without moving the cursor": (
        BlockStory("10.2.0.0/16",
                   "web gets block 0; web goes; a gets block 1; b gets block 2; a goes; "
                   "web gets block 0; c gets block 3"),
    ),
    "a name does not justify a subnet that is held or does not fit": (
        BlockStory("10.2.0.0/16",
                   "web gets block 0; another web gets block 1"),
        BlockStory("10.2.0.0/16",
                   "web gets block 0; web goes; web beside 10.2.0.9/32 gets block 1"),
        BlockStory("10.2.0.0/16",
                   "web gets block 0; web goes; web (/25) gets block 2"),
    ),
    "the name of an explicit subnet is of use only in the bases": (
        BlockStory("10.2.0.0/16",
                   "web (10.2.7.0/24) gets it; web goes; web gets block 7; web goes; "
                   "web (192.168.1.0/24) gets it; web goes; web gets block 0"),
    ),
    "a second network of a live name leaves it to the first": (
        BlockStory("10.2.0.0/16",
                   "web gets block 0; another web gets block 1; another web goes; web goes; "
                   "web gets block 0"),
    ),
    "TestDynamicPoolAllocation: the first free block; overlapping bases are an error here": (
        BlockStory("192.168.0.0/16",
                   "a (192.168.255.0/24) gets it; b gets block 0"),
        BlockStory("10.0.0.0/8 192.168.0.0/16",
                   "a (10.0.0.0/8) gets it; b beside 10.0.0.0/7 gets 192.168.0.0/24"),
        BlockStory("10.20.0.0/16 192.168.0.0/16",
                   "a (10.0.0.0/8) gets it; b (192.168.128.0/24) gets it; c gets 192.168.0.0/24; "
                   "d gets 192.168.1.0/24"),
        BlockStory("10.20.0.0/16 192.168.0.0/16",
                   "a (10.20.0.0/17) gets it; b (10.20.128.0/17) gets it; "
                   "c beside 200.1.2.0/24 gets 192.168.0.0/24"),
        BlockStory("10.20.0.0/22 192.168.0.0/16",
                   "a (10.20.0.0/24) gets it; b (10.20.1.0/24) gets it; "
                   "c (10.20.2.0/24) gets it; d (192.168.128.0/24) gets it; "
                   "e beside 10.20.3.0/24 gets 192.168.0.0/24"),
        BlockStory("10.10.0.0/22 192.168.0.0/16",
                   "a (10.10.0.0/24) gets it; b (10.10.1.0/24) gets it; "
                   "c (10.10.2.0/24) gets it; d (10.10.3.0/24) gets it; "
                   "e beside 10.10.3.0/24 gets 192.168.0.0/24"),
        BlockStory("192.168.0.0/16",
                   "a (192.168.0.0/24) gets it; b (192.168.1.0/24) gets it; "
                   "c (192.168.2.0/23) gets it; d (192.168.4.0/30) gets it; e gets block 5"),
        BlockStory("192.168.0.0/16",
                   "a (192.168.0.0/24) gets it; b (192.168.1.0/24) gets it; "
                   "c (192.168.2.0/30) gets it; "
                   "d beside 192.168.2.4/30, 192.168.3.0/30, 192.168.4.0/23 gets block 6"),
        BlockStory("192.168.0.0/16",
                   "a (192.168.0.0/24) gets it; b beside 192.168.0.0/24 gets block 1"),
        BlockStory("10.0.0.0/8 192.168.0.0/16",
                   "a (10.0.0.0/24) gets it; b beside 192.168.0.0/24 gets block 1"),
        BlockStory("10.0.0.0/8 192.168.0.0/16",
                   "a beside 10.0.0.0/8 gets 192.168.0.0/24"),
        BlockStory("10.0.0.0/31 192.168.0.0/16",
                   "a (10.0.0.0/32) gets it; b (100.0.0.0/32) gets it; c (200.0.0.0/32) gets it; "
                   "d (/31) gets 192.168.0.0/31"),
        BlockStory("172.16.0.0/15",
                   "a (172.16.0.0/16) gets it; b (/16) gets block 1; c (192.168.0.0/24) gets it; "
                   "d (/16) gets nothing"),
        BlockStory("172.16.0.0/15",
                   "a (172.16.0.0/16) gets it; b (172.17.0.0/17) gets it; c (/16) gets nothing"),
        BlockStory("172.16.0.0/15",
                   "a (172.16.0.0/16) gets it; b (172.17.0.0/16) gets it; "
                   "c (/16) beside 192.168.0.0/24 gets nothing"),
        BlockStory("172.16.0.0/15 192.168.0.0/23",
                   "a (172.16.0.0/16) gets it; b (172.17.128.0/17) gets it; "
                   "c (192.168.0.1/32) gets it; d (/16) gets nothing"),
    ),
    "there each base has one length, and its pieces are lost; here they are blocks": (
        BlockStory("172.16.0.0/15 192.168.0.0/16",
                   "a (172.16.0.0/16) gets it; b (172.17.0.0/17) gets it; c gets 172.17.128.0/24"),
    ),
}


class BlockOrderTest(unittest.TestCase):
    """The choice of subnets. Some cases are moby's: daemon/libnetwork/ipams/defaultipam."""

    def test_stories(self) -> None:
        for name, stories in BLOCK_STORIES.items():
            for story in stories:
                with self.subTest(name, story=story):
                    self.tell(story)

    def tell(self, story: BlockStory) -> None:
        """Take each step of a story. A network called by a letter has no gipam.name."""
        client = Alone(make_state(story.bases, excluded=story.excluded))
        pools: dict[str, str] = {}
        for step in story.steps.split("; "):
            match = BLOCK_STEP.fullmatch(step)
            assert match, step
            network = match["network"]
            if match["end"] == "goes":
                client.release_pool(pools.pop(network))
                continue

            client.routes = parse_prefixes((match["routes"] or "").replace(",", " "))
            try:
                pools[network], subnet = self.request(client, story, match)
            except ErrorReply as error:
                self.assertEqual(error.status, 503, step)
                subnet = "nothing"
            self.assertEqual(subnet, self.expected_subnet(story, match), step)

    def request(self, client: Alone, story: BlockStory, match: re.Match[str]) -> tuple[str, str]:
        """Request the pool of a step; return (pool_id, subnet)."""
        is_v6 = ":" in story.bases
        options = {}
        if len(match["name"]) > 1:
            options["gipam_name"] = match["name"]
        if match["length"]:
            length_option = "gipam_v6ab" if is_v6 else "gipam_v4ab"
            options[length_option] = match["length"]
        return client.request_pool(match["subnet"] or "", match["range"] or "", is_v6, **options)

    def expected_subnet(self, story: BlockStory, match: re.Match[str]) -> str:
        """Return the subnet that a step expects; a block number counts in the first base."""
        expected = match["gets"]
        if expected == "it":
            return match["subnet"]
        if not expected.startswith("block "):
            return expected
        base = parse_prefixes(story.bases)[0]
        default = 64 if base.version == 6 else 24
        prefixlen = int(match["length"] or default)
        first = base[int(expected[6:]) << base.max_prefixlen - prefixlen]
        return f"{first}/{prefixlen}"


class RestingAddressTest(unittest.TestCase):
    """The address that is granted when each free one is kept for its last owner, in 10.90.0.0/29.

    Before Docker 29, each start of a container leaves an owner behind that never comes back,
    because its MAC address is random.
    """

    def setUp(self) -> None:
        self.client = Alone()
        self.pool_id, _ = self.client.request_pool("10.90.0.0/29")
        self.client.request_address(self.pool_id, gateway=True)
        self.started = 0

    def start(self, address: str = "", name: str = "") -> str:
        """Return the address of a container that starts with a new MAC address."""
        self.started += 1
        mac = f"02:42:00:00:00:{self.started:02x}"
        cidr = self.client.request_address(self.pool_id, address, mac, name)
        return cidr.partition("/")[0]

    def come_and_go(self, times: int) -> list[str]:
        """Return the addresses of containers that start and stop one after another."""
        addresses = []
        for _ in range(times):
            address = self.start()
            self.client.release_address(self.pool_id, address)
            addresses.append(address)
        return addresses

    def test_address_that_was_asked_for_rests_while_others_come_and_go(self) -> None:
        fixed = self.start("10.90.0.2")
        self.client.release_address(self.pool_id, fixed)
        self.assertNotIn(fixed, self.come_and_go(29))
        self.assertEqual(self.start(fixed), fixed)

    def test_the_one_that_has_rested_longest_is_given_first(self) -> None:
        first_round = self.come_and_go(5)
        self.assertEqual(len(set(first_round)), 5)
        self.assertEqual(self.come_and_go(5), first_round)

    def test_what_was_asked_for_is_given_last_and_the_longest_rested_of_it_first(self) -> None:
        fixed = [self.start("10.90.0.4"), self.start("10.90.0.2")]
        for address in fixed:
            self.client.release_address(self.pool_id, address)
        others = [self.start() for _ in range(3)]
        self.assertEqual(set(others), {"10.90.0.3", "10.90.0.5", "10.90.0.6"})
        self.assertEqual([self.start(), self.start()], fixed)
        with self.assertRaises(ErrorReply):
            self.start()

    def test_an_owner_who_gets_its_address_without_asking_for_it_has_it_dynamically(self) -> None:
        fixed = self.start("10.90.0.2", "web")
        self.client.release_address(self.pool_id, fixed)
        self.assertEqual(self.start(name="web"), fixed)
        self.client.release_address(self.pool_id, fixed)
        self.assertIn(fixed, self.come_and_go(5))

    def test_order_is_the_same_after_a_restart(self) -> None:
        fixed = self.start("10.90.0.2")
        self.client.release_address(self.pool_id, fixed)
        self.come_and_go(7)
        self.client.service.state = snapshot_after(self.client.service.state)
        self.assertNotIn(fixed, self.come_and_go(9))

    def test_order_is_the_same_when_the_network_is_made_again_under_its_name(self) -> None:
        self.pool_id, _ = self.client.request_pool("10.91.0.0/29", gipam_name="web")
        self.client.request_address(self.pool_id, gateway=True)
        fixed = self.start("10.91.0.2")
        self.client.release_pool(self.pool_id)
        self.pool_id, _ = self.client.request_pool("10.91.0.0/29", gipam_name="web")
        self.client.request_address(self.pool_id, gateway=True)
        self.assertNotIn(fixed, self.come_and_go(9))


OVERLAP = ("Pool overlaps with other one on this address space: {} with {}, held by pool {!r} for "
           "{}; if no network uses it any more, `gipam check --fix` releases it")
BLOCKS = ("all predefined address pools have been fully subnetted: of {} blocks of {}, {} are "
          "held, {} excluded, and {} overlap routes or addresses of this host or are in pieces "
          "smaller than that")


class Exhaustion(NamedTuple):
    """A family without a free block of a length, and the error about it."""

    case: str
    bases: str
    prefixlen: int
    excluded: str
    used: str
    routes: str
    numbers: tuple[int, str, int, int, int]  # as BLOCKS has them


EXHAUSTIONS = (
    Exhaustion("whole blocks", "10.2.0.0/22 10.9.0.0/23", 24,
               "10.9.0.0/24 10.2.0.0/24", "10.2.1.0/24 10.2.3.0/24", "10.2.2.0/30 10.9.1.1/32",
               (6, "/24 in 10.2.0.0/22, 10.9.0.0/23", 2, 2, 2)),
    Exhaustion("pieces count as blocks of the default length", "10.2.0.0/23", 24,
               "10.2.1.128/25", "10.2.0.0/26", "",
               (2, "/24 in 10.2.0.0/23", 1, 1, 0)),
    Exhaustion("also where another length is asked for", "10.2.0.0/22", 23,
               "10.2.2.0/26", "10.2.0.0/26 10.2.0.64/26", "",
               (4, "/24 in 10.2.0.0/22", 1, 1, 2)),
    Exhaustion("IPv6", "2001:db8::/63", 64,
               "", "2001:db8::/64", "2001:db8:0:1::1/128",
               (2, "/64 in 2001:db8::/63", 1, 0, 1)),
    Exhaustion("an excluded block counts once, used or not", "10.2.0.0/23", 24,
               "10.2.1.0/24 10.2.1.0/25", "10.2.0.0/24 10.2.1.0/25", "",
               (2, "/24 in 10.2.0.0/23", 2, 0, 0)),
    Exhaustion("a subnet that is larger than a base counts as far as it lies in it",
               "10.0.0.0/9", 30,
               "", "10.0.0.0/8", "",
               (32768, "/24 in 10.0.0.0/9", 32768, 0, 0)),
    Exhaustion("bases that are too small for such a block do not count",
               "10.2.0.0/22 10.9.0.0/24", 22,
               "", "10.2.0.0/24", "",
               (4, "/24 in 10.2.0.0/22", 1, 0, 3)),
)


class ErrorTextTest(unittest.TestCase):
    """The texts of refusals, in the words of moby's ipamapi/contract.go, with figures added."""

    def setUp(self) -> None:
        self.client = Alone(make_state("10.2.0.0/16 10.3.0.0/20"))
        self.request_pool = self.client.request_pool

    def assert_error(self, status: int, text: str, call: Callable[..., Any], *arguments: Any,
                     **options: Any) -> None:
        with self.subTest(text), self.assertRaises(ErrorReply) as caught:
            call(*arguments, **options)
        self.assertEqual((caught.exception.status, str(caught.exception)), (status, text))

    def test_pools(self) -> None:
        self.assert_error(503, "no IPv6 base to take a subnet from: start gipam with -v6 PREFIX, "
                          "or give the network a --subnet", self.request_pool, v6=True)
        for length in ("15", "33"):
            self.assert_error(400, "invalid address pool: the IPv4 bases have blocks of /16 to "
                              f"/32, not of /{length}", self.request_pool, gipam_v4ab=length)
        for subnet, sub_pool in (
                ("10.5.0.0/24", "10.6.0.0/25"),
                ("10.5.0.0/24", "10.4.0.0/15"),
                ("10.5.0.0/24", "2001:db8::/64"),
                ("2001:db8::/64", "2001:db8:1::/72")):
            text = f"invalid address subpool: {sub_pool} is not within {subnet}"
            self.assert_error(400, text, self.request_pool, subnet, sub_pool)

    def test_overlap_names_the_pool_in_the_way_and_its_age(self) -> None:
        with mock.patch("gipam.time.time", return_value=NOW_S) as clock:
            whole, _ = self.request_pool("10.2.0.0/24")
            ranged, _ = self.request_pool("10.4.0.0/24", "10.4.0.0/25")
            for age_s, age in ((-5, "0s"), (59, "59s"), (61, "1min"), (3 * 3600, "3h"),
                               (200_000, "2d")):
                clock.return_value = NOW_S + age_s
                for requested, pool_id in (
                        ("10.2.0.0/24", whole),
                        ("10.2.0.128/25", whole),
                        ("10.2.0.0/15", whole),
                        ("10.2.0.0/24,10.2.0.0/25", whole),
                        ("10.4.0.0/24", ranged),
                        ("10.4.0.0/24,10.4.0.0/25", ranged),
                        ("10.4.0.0/25,10.4.0.0/26", ranged)):
                    text = OVERLAP.format(subnet_of(requested), subnet_of(pool_id), pool_id, age)
                    self.assert_error(403, text, self.request_pool, requested)

    def test_address_of_another_form_or_place(self) -> None:
        request = self.client.request_address
        pool_id, _ = self.request_pool("10.2.0.0/24", "10.2.0.252/30")
        pool6_id, _ = self.request_pool("2001:db8::/64")
        for asked, address, family in ((pool_id, "2001:db8::1", 4), (pool6_id, "10.2.0.1", 6)):
            text = (f"invalid address: {address!r} is not a bare IPv{family} address of "
                    f"{subnet_of(asked)}")
            for call in (request, self.client.release_address):
                self.assert_error(400, text, call, asked, address)
        for address in ("10.2.1.0", "10.1.255.255"):
            text = f"requested address is out of range: {address} is not in 10.2.0.0/24"
            self.assert_error(400, text, request, pool_id, address)

    def test_address_in_use_names_its_holder(self) -> None:
        request = self.client.request_address
        pool_id, _ = self.request_pool("10.2.0.0/24", "10.2.0.252/30")
        request(pool_id, "10.2.0.9")
        request(pool_id, "10.2.0.1", gateway=True)
        request(pool_id, "10.2.0.5", **OWNERS["mac"])
        request(pool_id, "10.2.0.6", **OWNERS["web1,mac"])
        for address, use in (
                ("10.2.0.0", "reserved"),
                ("10.2.0.255", "reserved"),
                ("10.2.0.9", "held as auxiliary"),
                ("10.2.0.1", "held as gateway"),
                ("10.2.0.5", "held for 02:42:0a:02:00:02"),
                ("10.2.0.6", "held for web1")):
            text = f"Address already in use: {address} is {use} in 10.2.0.0/24"
            self.assert_error(403, text, request, pool_id, address)

    def test_full_pool_says_how_many_addresses_it_has(self) -> None:
        for subnets, count in (
                ("10.2.1.0/24,10.2.1.252/30", 3),
                ("10.3.0.0/30", 2),
                ("10.3.0.4/31", 2),
                ("10.3.0.6/32", 1),
                ("2001:db9::/127", 1),
                ("2001:db9::2/128", 0)):
            full, _ = self.request_pool(subnets)
            self.client.exhaust(full)
            where = subnets.split(",")[-1]
            text = f"no available addresses on this pool: all {count} of {where} are held"
            for gateway in (False, True):
                self.assert_error(503, text, self.client.request_address, full, gateway=gateway)

    def test_exhaustion_says_where_the_blocks_have_gone(self) -> None:
        for case in EXHAUSTIONS:
            is_v6 = ":" in case.bases
            length_option = "gipam_v6ab" if is_v6 else "gipam_v4ab"
            client = Alone(make_state(case.bases, excluded=case.excluded))
            for subnet in case.used.split():
                client.request_pool(subnet)
            client.routes = parse_prefixes(case.routes)
            self.assert_error(503, BLOCKS.format(*case.numbers), client.request_pool, v6=is_v6,
                              **{length_option: str(case.prefixlen)})


class PastUse(NamedTuple):
    """The last owner of an address, and the time of its release on a clock that counts calls."""

    tick: int
    address: str
    owners: tuple[str, ...]
    is_explicit: bool

    @property
    def time_order(self) -> tuple[int, Any]:
        return self.tick, ipaddress.ip_address(self.address)


class NaiveLease(NamedTuple):
    """A lease in the naive model."""

    pool_id: str
    owners: tuple[str, ...]
    is_explicit: bool


class Naive:
    """The replies that gipam has to give, computed slowly and plainly with lists and dicts.

    A pool is called SUBNET[,SUB_POOL], and an error ends where its details begin.
    """

    def __init__(self, client: Alone) -> None:
        self.families = client.service.state.families  # of which only the configuration is read
        self.routes = client.routes
        self.pools: dict[str, tuple[gipam.Network, gipam.Network | None]] = {}
        self.pool_names: dict[str, str] = {}
        self.leases: dict[tuple[gipam.Network, str], NaiveLease] = {}  # by subnet and address
        self.past: dict[gipam.Network, list[PastUse]] = {}  # oldest first
        self.block_cursors: dict[tuple[int, int], int] = {}
        self.last_dynamic: dict[str, str] = {}  # pool_id -> the last address given by next-fit
        self.reservations: dict[tuple[int, str], gipam.Network] = {}  # by version and name
        self.saved: dict[tuple[int, str], list[PastUse]] = {}  # of reservations
        self.tick = 0

    def request_pool(self, pool: str, sub_pool: str, v6: bool, gipam_name: str,
                     **lengths: str) -> tuple[str, str]:
        version = 6 if v6 else 4
        sub_range = gipam.parse_prefix(sub_pool) if sub_pool else None
        key = (version, gipam_name)
        if pool:
            subnet = gipam.parse_prefix(pool)
            self.check_subnet(subnet, sub_range)
        else:
            prefixlen = self.families[version].prefixlen
            for length in lengths.values():
                prefixlen = int(length)
            subnet = self.choose_block(key, prefixlen)

        pool_id = f"{subnet},{sub_range}" if sub_range else str(subnet)
        is_name_in_use = self.is_in_use(key)
        self.pools[pool_id] = (subnet, sub_range)
        self.pool_names[pool_id] = gipam_name
        if gipam_name and not is_name_in_use:
            saved = self.saved.pop(key, [])
            if self.reservations.get(key) == subnet:
                self.restore(subnet, saved)
            self.reserve(key, subnet)
        return pool_id, str(subnet)

    def is_in_use(self, key: tuple[int, str]) -> bool:
        """Return whether a network of this name has the block that is reserved for it."""
        _, name = key
        for pool_id, pool_name in self.pool_names.items():
            subnet, _ = self.pools[pool_id]
            if pool_name == name and subnet == self.reservations.get(key):
                return True
        return False

    def reserve(self, key: tuple[int, str], subnet: gipam.Network) -> None:
        self.reservations.pop(key, None)
        self.reservations[key] = subnet
        version, _ = key
        of_family = [other for other in self.reservations if other[0] == version]
        for other in of_family[:-gipam.MAX_AFFINITIES]:
            del self.reservations[other]

    def remember(self, subnet: gipam.Network, use: PastUse) -> None:
        if not use.owners:
            return
        uses = []
        for other in self.past.get(subnet, []):
            if other.address != use.address and not set(other.owners) & set(use.owners):
                uses.append(other)
        uses.append(use)
        self.past[subnet] = uses[-gipam.MAX_AFFINITIES:]

    def restore(self, subnet: gipam.Network, saved: list[PastUse]) -> None:
        uses = self.past.pop(subnet, []) + saved
        for use in sorted(uses, key=lambda past: past.time_order):
            self.remember(subnet, use)

    def check_subnet(self, subnet: gipam.Network, sub_range: gipam.Network | None) -> None:
        if sub_range:
            is_inside = subnet.overlaps(sub_range) and subnet.prefixlen <= sub_range.prefixlen
            if not is_inside:
                raise ErrorReply(400, "invalid address subpool: ")
        for other, other_range in self.pools.values():
            is_another_range = other == subnet and None not in (sub_range, other_range)
            if subnet.overlaps(other) and (not is_another_range or other_range == sub_range):
                raise ErrorReply(403, "Pool overlaps with other one on this address space: ")

    def choose_block(self, key: tuple[int, str], prefixlen: int) -> gipam.Network:
        version, _ = key
        family = self.families[version]
        if not family.bases:
            raise ErrorReply(503, f"no IPv{version} base")
        shortest = min(base.prefixlen for base in family.bases)
        if not shortest <= prefixlen <= gipam.ADDRESS_BITS[version]:
            raise ErrorReply(400, "invalid address pool: ")

        blocks: list[gipam.Network] = []
        for base in family.bases:
            if base.prefixlen <= prefixlen:
                blocks += base.subnets(new_prefix=prefixlen)
        used = [subnet for subnet, _ in self.pools.values()] + family.excluded + self.routes
        reserved = self.reservations.get(key)
        if reserved in blocks and not any(map(reserved.overlaps, used)):
            return reserved

        start = self.block_cursors.get((version, prefixlen), 0) % len(blocks)
        for avoided in (used + list(self.reservations.values()), used):
            for block in blocks[start:] + blocks[:start]:
                if not any(map(block.overlaps, avoided)):
                    self.block_cursors[version, prefixlen] = blocks.index(block) + 1
                    return block
        raise ErrorReply(503, "all predefined address pools have been fully subnetted: ")

    def release_pool(self, pool_id: str) -> None:
        self.tick += 1
        subnet, _ = self.pools.pop(pool_id)
        key = (subnet.version, self.pool_names.pop(pool_id))
        self.last_dynamic.pop(pool_id, None)
        uses = []
        for (network, address), held in list(self.leases.items()):
            if held.pool_id == pool_id:
                uses.append(PastUse(self.tick, address, held.owners, held.is_explicit))
                del self.leases[network, address]
        for use in sorted(uses[-gipam.MAX_SAVED_AFFINITIES:], key=lambda past: past.time_order):
            self.remember(subnet, use)

        if any(subnet == other for other, _ in self.pools.values()):
            return
        past = self.past.pop(subnet, [])
        if self.reservations.get(key) == subnet:
            self.saved[key] = past[-gipam.MAX_SAVED_AFFINITIES:]
            self.reserve(key, subnet)

    def request_address(self, pool_id: str, address: str = "", mac: str = "",
                        name: str = "", gateway: bool = False) -> str:
        subnet, _ = self.pools[pool_id]
        owners = tuple(owner for owner in (name, mac) if owner)
        is_explicit = bool(address)
        taken = self.taken_addresses(subnet)
        if address and address not in map(str, subnet):
            raise ErrorReply(400, "requested address is out of range: ")
        if address in taken:
            raise ErrorReply(403, "Address already in use: ")
        if not address:
            address = self.choose_address(pool_id, owners, gateway, taken)
        self.leases[subnet, address] = NaiveLease(pool_id, owners, is_explicit)
        return f"{address}/{subnet.prefixlen}"

    def taken_addresses(self, subnet: gipam.Network) -> set[str]:
        """Return the addresses of a subnet that are held or never assigned."""
        taken = {address for network, address in self.leases if network == subnet}
        if subnet.version == 6:
            taken.add(str(subnet[0]))
        elif subnet.num_addresses >= 4:
            taken.update((str(subnet[0]), str(subnet[-1])))
        return taken

    def choose_address(self, pool_id: str, owners: tuple[str, ...], is_gateway: bool,
                       taken: set[str]) -> str:
        subnet, sub_range = self.pools[pool_id]
        dynamic_range = sub_range or subnet
        addresses = [str(address) for address in dynamic_range]
        free = [address for address in addresses if address not in taken]
        if not free:
            raise ErrorReply(503, "no available addresses on this pool: ")
        if is_gateway:
            return free[0]

        past = [use for use in self.past.get(subnet, []) if use.address in free]
        for owner in owners:
            for use in past:
                if owner in use.owners:
                    return use.address

        start = 0
        if pool_id in self.last_dynamic:
            start = addresses.index(self.last_dynamic[pool_id]) + 1
        past.sort(key=lambda use: use.is_explicit)
        resting = [use.address for use in past]
        for address in addresses[start:] + addresses[:start]:
            if address in free and address not in resting:
                self.last_dynamic[pool_id] = address
                return address
        return resting[0]

    def release_address(self, pool_id: str, address: str) -> None:
        subnet, _ = self.pools[pool_id]
        held = self.leases.get((subnet, address))
        if held and held.pool_id == pool_id:
            self.tick += 1
            del self.leases[subnet, address]
            self.remember(subnet, PastUse(self.tick, address, held.owners, held.is_explicit))


class Compared:
    """A client that compares each reply with that of the naive model, on a host with any routes."""

    def __init__(self, test: unittest.TestCase, client: Alone, naive: Naive,
                 rng: random.Random) -> None:
        self.test = test
        self.client = client
        self.naive = naive
        self.rng = rng

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return self.compare(method, arguments, options)

        return call

    def compare(self, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        route_count = self.rng.choice((0, 0, 0, 1, 5))
        self.client.routes.clear()
        for _ in range(route_count):
            self.client.routes.append(random_prefix(self.rng, self.rng.choice(WORLDS), 4))

        call = getattr(self.client, method)
        naive_call = getattr(self.naive, method)
        naive_arguments = (without_tokens(arguments[0]), *arguments[1:])
        try:
            answer = call(*arguments, **options)
        except ErrorReply as error:
            with self.test.assertRaises(ErrorReply) as expected:
                naive_call(*naive_arguments, **options)
            self.test.assertEqual(error.status, expected.exception.status)
            self.test.assertTrue(str(error).startswith(str(expected.exception)), error)
            raise
        expected_answer = naive_call(*naive_arguments, **options)
        self.test.assertEqual(without_tokens(str(answer)), str(expected_answer))
        return answer


def without_tokens(text: str) -> str:
    """Return the text with pool ids in the form of the naive model."""
    return re.sub("#[0-9a-f]*", "", text)


class AllocatorModelTest(unittest.TestCase):
    @mock.patch.multiple(gipam.OffsetBitmap, SHIFT=3, MASK=7)
    @seeded(12)
    def test_it_answers_as_lists_and_dicts_would(self, rng: random.Random) -> None:
        """Steps vary family, sub-pool, block length, base, exclusion, name, route and owner."""
        client = Alone(random_state(rng))
        naive = Naive(client)
        tenant = Tenant(Compared(self, client, naive, rng), rng)
        tenant.MAX_POOLS = 1000
        tenant.MAX_ADDRESSES = 1000
        self.patch_limits(rng)
        for _ in range(400):
            tenant.step()
        self.assertEqual(held_owners(client.service.state),
                         {place: held.owners for place, held in naive.leases.items()})

        for pool_id in list(client.service.state.pools):
            client.release_pool(pool_id)
        for family in client.service.state.families.values():
            self.assertEqual(family.subnets, {})
            self.assertEqual(vars(family.used), vars(gipam.PrefixTree(
                family.used.address_bits, family.prefixlen)))

    def patch_limits(self, rng: random.Random) -> None:
        """Lower the limits of remembered addresses until the test ends."""
        limits = mock.patch.multiple(gipam, MAX_AFFINITIES=rng.choice((2, 5, 99)),
                                     MAX_SAVED_AFFINITIES=rng.choice((1, 3, 99)))
        limits.start()
        self.addCleanup(limits.stop)


def held_owners(state: gipam.State) -> dict[tuple[gipam.Network, str], tuple[str, ...]]:
    """Return the owners of each lease, by subnet and address."""
    owners = {}
    for pool in state.pools.values():
        for offset, held in pool.leases.items():
            owners[pool.subnet.network, pool.address_at(offset)] = held.owners
    return owners


# === Journal ======================================================================================
#
# The Store on a Disk, which passes system calls on to real files. A Disk notes each call, can fail
# it, and knows what a power cut would leave. JournalTest damages a segment at every byte, FilesTest
# loses and mixes up files, and SnapshotFileTest damages the lease file. LockTest has two processes
# on one lease file, CallsTest fails each call, and PowerCutTest crashes at each call.
#
# The rule: recovery finds every change that was acknowledged. If it cannot, gipam does not start,
# and its message says what to do.

CONFIG = {
    "V4Pool": "10.2.0.0/16",
    "V4AllocateBlock": 24,
    "V6Pool": "2001:db8:0:100::/56",
    "V6AllocateBlock": 64,
}
UNKNOWN_ID = "10.2.0.0/24#0123456789abcdef"
CHANGE = gipam.PoolGrant("192.168.0.0/24#0123456789abcdef", "192.168.0.0/24", "", "", 0, 0, -1)
SECTOR_BYTES = 512
NO_DOCKER = {"DOCKER_HOST": "unix:///nonexistent"}

# Faults of pwrite: half is written; half is written, and then the disk is full.
SHORT = "short"
HALF = "half"

CHANGING_CALLS = ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink")


def snapshot_of(state: gipam.State, segment: int | None = None) -> Iterator[str]:
    return gipam.encode_snapshot(CONFIG, gipam.copy_state(state), segment)


def read_anew(store: gipam.Store, settings: gipam.Settings | None = None) -> gipam.State:
    """Return the state on disk, as a service reads it at its start and after a failure."""
    document = gipam.read_lease_file(store)
    if settings:
        return gipam.read_state(gipam.build_config(settings), store, document)
    state = make_state()
    gipam.recover(store, document, state)
    return state


def recover(path: str) -> gipam.State:
    """Return the state that a restart would find; change nothing. Raises: gipam.ConfigError."""
    store = gipam.Store(path)
    try:
        store.lock_segments()
        return read_anew(store)
    finally:
        store.close()


def begin(path: str, calls: Any = os) -> gipam.Service:
    """Start a service on the lease file as `serve` does."""
    store = gipam.Store(path, calls)
    is_first = not os.path.exists(path)
    store.lock_segments()
    state = read_anew(store)
    if is_first:
        write_lease_file(store, state)

    def read_state() -> gipam.State:
        return read_anew(store)

    return gipam.Service(store, state, CONFIG, read_state, Kernel())


def write_lease_file(store: gipam.Store, state: gipam.State, segment: int | None = None) -> None:
    """Write the lease file; it references the segment."""
    store.create_temp()
    store.write_temp(snapshot_of(state, segment))
    store.publish_temp(segment)


def active_segment(store: gipam.Store) -> gipam.Segment:
    """Return the segment that is written."""
    assert store.active
    return store.active


def held(state: gipam.State) -> dict[str, list[str]]:
    """Return pool_id -> addresses."""
    addresses = {}
    for pool in state.pools.values():
        addresses[pool.pool_id] = sorted(map(pool.address_at, pool.leases))
    return addresses


def dump_each_state(changes: list[gipam.Record]) -> list[Any]:
    """Return the dump of the state before the changes, and after each."""
    state = make_state()
    dumps = [dump_state(state)]
    for change in changes:
        state.apply(change)
        dumps.append(dump_state(state))
    return dumps


def launcher(directory: str, lines: str = "") -> tuple[str, ...]:
    """Return a command that runs these lines and then gipam.py, which keeps to its directory."""
    program = (
        "import os, sys",
        f"sys.path.insert(0, {os.path.dirname(GIPAM)!r})",
        "import gipam",
        f"gipam.PLUGIN_SOCKET_DIR = {os.path.realpath(directory)!r}",
        lines,
        "sys.exit(gipam.main())",
    )
    return sys.executable, "-c", "\n".join(program)


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def do_nothing() -> None:
    """Do nothing before a call."""


class Disk:
    """The system calls of a Store, on real files: each is noted and can fail.

    A Disk also knows the contents after a power cut, if it began with an empty directory.
    """

    def __init__(self) -> None:
        self.made: list[str] = []  # such as "fdatasync journal.1"
        self.faults: dict[int, Any] = {}  # call number -> errno, SHORT or HALF
        self.next_fault: tuple[str, Any] = ("", None)  # note and fault of a later call
        self.misuse: list[str] = []  # calls on a closed descriptor
        self.watch: Callable[[], Any] = do_nothing  # called before anything changes
        self.files: dict[str, list[bytes]] = {}  # name -> versions; the first is on disk
        self.on_disk: dict[str, list[bytes]] = {}  # the directory as of its last sync
        self.pending: list[dict[str, list[bytes] | None]] = []  # its changes since then
        self._paths: dict[int, str] = {}  # of open descriptors

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return self.call(name, *arguments)

        return call

    def open_files(self) -> list[str]:
        """Return the paths of the open descriptors."""
        return list(self._paths.values())

    def close_all(self) -> None:
        """Close the descriptors that a dropped store has left open."""
        for fd in self._paths:
            os.close(fd)
        self._paths.clear()

    def call(self, name: str, *arguments: Any) -> Any:
        """Make a function call of the module os, unless it is to fail."""
        target = arguments[0]
        if isinstance(target, int) and target not in self._paths:
            # Another file may have this descriptor by now.
            self.misuse.append(f"{name} after {self.made[-1]}")
            raise os_error(errno.EBADF)
        fault = self._note_call(name, target)
        if name in CHANGING_CALLS:
            self.watch()

        if fault in (SHORT, HALF):
            fd, data, offset = arguments
            middle = (len(data) + 1) // 2
            arguments = (fd, data[:middle], offset)
        elif fault is not None and name != "close":
            # After a failed close the descriptor is gone all the same.
            raise os_error(fault)
        function = getattr(os, name)
        result = function(*arguments)
        self._follow(name, result, *arguments)
        if fault not in (None, SHORT):
            raise os_error(errno.ENOSPC)
        return result

    def _note_call(self, name: str, target: Any) -> Any:
        """Note a call; return its fault, or None."""
        path: str = self._paths[target] if isinstance(target, int) else target
        file = os.path.basename(path).replace("leases.json.", "")
        if os.path.isdir(path):
            file = "directory"
        note = f"{name} {file}"
        fault = self.faults.get(len(self.made))
        self.made.append(note)

        next_note, next_fault = self.next_fault
        if note == next_note:
            fault = next_fault
            self.next_fault = ("", None)
        return fault

    def _follow(self, name: str, result: Any, target: Any, *rest: Any) -> None:
        """Note how a call has changed the files."""
        if name == "open":
            self._follow_open(result, target, *rest)
        elif name == "close":
            del self._paths[target]
        elif name in ("pwrite", "ftruncate"):
            contents = pathlib.Path(f"/proc/self/fd/{target}").read_bytes()
            self._versions(target).append(contents)
        elif name in ("fsync", "fdatasync"):
            self._follow_sync(target)
        elif name in ("replace", "unlink"):
            change: dict[str, list[bytes] | None] = {}
            file = os.path.basename(target)
            for path in rest:
                change[os.path.basename(path)] = self.files[file]
            change[file] = None
            self._change_directory(change)

    def _follow_open(self, fd: int, path: str, flags: int, *_: int) -> None:
        self._paths[fd] = path
        file = os.path.basename(path)
        if flags & os.O_CREAT and file not in self.files:
            self._change_directory({file: [b""]})
        if flags & os.O_TRUNC:
            self.files[file].append(b"")

    def _follow_sync(self, fd: int) -> None:
        if os.path.isdir(self._paths[fd]):
            self.on_disk = dict(self.files)
            self.pending = []
        else:
            del self._versions(fd)[:-1]

    def _versions(self, fd: int) -> list[bytes]:
        return self.files.setdefault(os.path.basename(self._paths[fd]), [b""])

    def _change_directory(self, change: dict[str, list[bytes] | None]) -> None:
        self.pending.append(change)
        for name, versions in change.items():
            if versions is None:
                self.files.pop(name, None)
            else:
                self.files[name] = versions

    def after_kill(self) -> dict[str, bytes]:
        """Return name -> contents as the kernel has them."""
        return {name: versions[-1] for name, versions in self.files.items()}

    def survivor(self) -> Disk:
        """Return the disk as it is for the next process."""
        disk = Disk()
        everything = (self.files, self.on_disk, self.pending)
        disk.files, disk.on_disk, disk.pending = copy.deepcopy(everything)
        return disk

    def after_power_cut(self, rng: random.Random) -> dict[str, bytes]:
        """Return the files after a power cut, in which unsynced sectors and names may be lost."""
        names: dict[str, list[bytes] | None] = dict(self.on_disk)
        for change in self.pending:
            if rng.random() < 0.5:
                names.update(change)
        return {name: self._tear(versions, rng) for name, versions in names.items() if versions}

    @staticmethod
    def _tear(versions: list[bytes], rng: random.Random) -> bytes:
        """Return contents of any length they had, or had in between, with sectors old or new."""
        lengths = [len(version) for version in versions]
        lengths.append(rng.randint(min(lengths), max(lengths)))
        length = rng.choice(lengths)
        sectors = []
        for start in range(0, length, SECTOR_BYTES):
            sector = rng.choice(versions)[start:start + SECTOR_BYTES]
            sectors.append(sector.ljust(SECTOR_BYTES, b"\0"))
        return b"".join(sectors)[:length]


class StoreCase(Case):
    """A lease file in a directory of its own."""

    def setUp(self) -> None:
        self.directory = make_directory(self)
        self.path = os.path.join(self.directory, "leases.json")
        self.seed = choose_seeds(1)[0]
        # A Disk keeps all versions of preallocated space.
        self.patch(gipam, PREALLOCATE_BYTES=1 << 14)
        self.calls = Disk()
        self.addCleanup(self.calls.close_all)

    def subTest(self, *what: Any, **details: Any) -> Any:  # noqa: N802
        details.setdefault("GIPAM_TEST_SEED", self.seed)
        return super().subTest(*what, **details)

    def begin(self) -> gipam.Service:
        return begin(self.path, self.calls)

    def daemon(self, *options: str, lines: str = "", inside: tuple[str, ...] = ()) -> Daemon:
        """Return a daemon on the directory, which asks no Docker, and runs these lines first."""
        command = (*inside, *launcher(self.directory, lines))
        return Daemon(self, *options, directory=self.directory, env=NO_DOCKER, command=command)

    def read_files(self) -> dict[str, bytes]:
        paths = pathlib.Path(self.directory).iterdir()
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    def write_files(self, files: dict[str, bytes]) -> None:
        """Let the directory hold these files and no others."""
        for name in os.listdir(self.directory):
            if name not in files:
                os.unlink(os.path.join(self.directory, name))
        for name, data in files.items():
            self.write_file(name, data)

    def write_file(self, name: str, data: bytes) -> None:
        pathlib.Path(self.directory, name).write_bytes(data)

    def journal_lines(self) -> list[gipam.CommitRecord]:
        data = self.read_files()["leases.json.journal.1"]
        return list(gipam.decode_records(data))

    def live(self, count: int) -> list[gipam.Record]:
        """Return this many changes to pools and addresses, after which a pool is held."""
        rng = random.Random(self.seed)
        while True:
            client = Alone()
            changes = record_changes(client.service)
            tenant = Tenant(client, rng)
            while len(changes) < count:
                tenant.step()
            if client.service.state.pools:
                return changes

    def write_segments(self, *segments: list[list[gipam.Record]]) -> dict[str, bytes]:
        """Write an empty lease file and then segments, each a list of iterations."""
        self.write_files({})
        store = gipam.Store(self.path, self.calls)
        for iterations in segments:
            store.referenced_segment = store.segment or None
            store.rotate(1 << 12)
            if store.segment == 1:
                write_lease_file(store, make_state(), store.segment)
            for changes in iterations:
                self.append(store, *changes)
        store.close()
        return self.read_files()

    @staticmethod
    def append(store: gipam.Store, *changes: gipam.Record) -> None:
        """Write the changes as one line."""
        texts = []
        for change in changes:
            text = gipam.encode_json([gipam.RECORD_NAMES[type(change)], *change])
            store.reserve(len(text))
            texts.append(text)
        store.append(texts)

    def append_one(self) -> None:
        """Append a change where recovery ends; check that the next recovery finds it."""
        store = gipam.Store(self.path, self.calls)
        store.lock_segments()
        state = read_anew(store)
        store.prepare_append()
        self.append(store, CHANGE)
        store.close()
        state.apply(CHANGE)
        self.assert_recovered(dump_state(state))

    def assert_recovered(self, dump: Any) -> None:
        """Check that a restart would find this state."""
        self.assertEqual(dump_state(recover(self.path)), dump)

    def assert_refused(self, pattern: str) -> str:
        """Check that gipam does not start, states cause and remedy, and leaves the files alone."""
        before = self.read_files()
        with self.assertRaisesRegex(gipam.CorruptionError, pattern) as raised:
            recover(self.path)
        self.assertEqual(raised.exception.exit_status, 78)
        self.assertEqual(self.read_files(), before)
        message = str(raised.exception)
        start = re.escape(self.path)
        self.assertRegex(message, f"^{start}.* refuses to guess: .*(put|move|truncate)")
        return message

    def do_as_told(self, message: str) -> None:
        """Follow the advice of the messages for a user without a backup, until gipam starts."""
        while message:
            self.follow_advice(message)
            message = ""
            # The second of two faults has a message of its own.
            try:
                recover(self.path)
            except gipam.CorruptionError as error:
                message = str(error)

    def follow_advice(self, message: str) -> None:
        truncate = re.search("truncate -s [0-9]+ [^ ,]+", message)
        if truncate:
            subprocess.run(truncate[0].split(), check=True)
        elif 'delete the line "Journal"' in message:
            lines = self.read_files()["leases.json"].split(b"\n")
            kept = [line for line in lines if b'"Journal"' not in line]
            self.write_file("leases.json", b"\n".join(kept))
        elif "move the extra one away" in message:
            path, _, _ = message.partition(" ")
            os.unlink(path)
        else:
            self.assertIn(f"move {self.path}* away", message)
            self.write_files({})


def flips(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (place, value, data with it) for each byte and several values, also NUL and LF."""
    for place, byte in enumerate(data):
        values = {0, 10, 32, 57}
        for bit in (1, 2, 32, 128):
            values.add(byte ^ bit)
        values.discard(byte)
        for value in sorted(values):
            flipped = bytearray(data)
            flipped[place] = value
            yield place, value, bytes(flipped)


def line_at(lines: list[gipam.CommitRecord], offset: int) -> gipam.CommitRecord:
    """Return the line that has the byte at the offset."""
    ends = [line.end for line in lines]
    return lines[bisect.bisect_right(ends, offset)]


# Texts that are not a change, and changes that no state accepts.
BAD_CHANGES = (
    '["resign"]',
    '["release_pool"]',
    "5",
    "[]",
    "{}",
    '"release_pool"',
    '[["release_pool"]]',
    '["release_pool",["x"]]',
    '["request_pool","","10.77.0.0/24","","",0,0,-1]',
)

# Values after the subnet of a pool; those after the address of a lease follow.
BAD_POOL_VALUES = (
    '"::a4d:0/120","",0,0,-1',
    '"","",-1,0,-1',
    '"","",0,-1,-1',
    '"","",0,0,-2',
    '"","",0,0,true',
    '"",7,0,0,-1',
    'null,"",0,0,-1',
)
BAD_LEASE_VALUES = (
    '"guest","","",0,0',
    '"endpoint",7,"",0,0',
    '"endpoint","",[],0,0',
    '"endpoint","","","0",0',
    '"endpoint","","",0,-1',
    '"endpoint","","",0,0.5',
)

# Payloads with a right checksum that are no commit record.
BAD_PAYLOADS = (
    b"[" * 100_000,
    b"5",
    b"[]",
    b'["11",[]]',
    b"[11,{}]",
    b"[11,[]]",
    b"[true,[]]",
    b"{}",
)


class JournalTest(StoreCase):
    """Recovery finds every acknowledged change, or refuses to start."""

    NAME = "leases.json.journal.1"
    PLACE = r"journal\.1.* line 6 at byte \d+ "  # of data after the intact lines

    def setUp(self) -> None:
        super().setUp()
        changes = self.live(10)
        self.dumps = dump_each_state(changes)
        self.iterations = [
            changes[:1],
            changes[1:4],
            changes[4:5],
            changes[5:7],
            changes[7:],
        ]
        files = self.write_segments(self.iterations)
        self.snapshot = files["leases.json"]
        self.data = files[self.NAME].rstrip(b"\0")
        self.lines = list(gipam.decode_records(self.data))

    def put(self, journal: bytes) -> None:
        """Make this the only segment."""
        self.write_files({"leases.json": self.snapshot, self.NAME: journal})

    @staticmethod
    def line(seq: int, *values: str) -> bytes:
        return gipam.encode_record(seq, [gipam.encode_json(values)])

    def test_line_of_the_docstring_is_a_real_one(self) -> None:
        pattern = r"(?ms)^    ([0-9a-f]{8} [0-9a-f]{8} .*?\]\]\])$"
        match = re.search(pattern, gipam.__doc__ or "")
        assert match
        data = re.sub(r"\n *", "", match[1]).encode() + b"\n"
        (line,) = gipam.decode_records(data)
        texts = map(gipam.encode_json, line.records)
        encoded = gipam.encode_record(line.seq, texts)
        self.assertEqual(encoded, data)
        kind, *values = line.records[0]
        record_type = gipam.RECORD_TYPES[kind]
        record: Any = record_type(*values)
        self.assertEqual(record.address, "10.2.0.2")

    def test_cut_at_any_byte_it_holds_what_was_whole_and_goes_on(self) -> None:
        for cut in range(len(self.data) + 1):
            self.check_cut(cut, 0)
            self.check_cut(cut, 600)
        for cut in range(self.lines[-1].offset, len(self.data) + 1):
            self.check_cut(cut, 1)
            self.check_cut(cut, 1, has_successor=True)

    def check_cut(self, cut: int, zeros: int, has_successor: bool = False) -> None:
        """Cut off the journal; preallocated zeros may follow, or a blank segment."""
        with self.subTest(cut=cut, zeros=zeros, has_successor=has_successor):
            self.put(self.data[:cut] + bytes(zeros))
            if has_successor:
                self.write_file("leases.json.journal.2", bytes(99))
            whole = [line.seq for line in self.lines if line.end <= cut]
            self.assert_recovered(self.dumps[max(whole, default=0)])
            self.append_one()

    def test_torn_line_that_is_longer_than_preallocated_is_dropped(self) -> None:
        text = "".ljust(3 * gipam.PREALLOCATE_BYTES, "x")
        line = self.line(11, "release_pool", text)
        torn = line[:-1]
        self.put(self.data + torn)
        self.append_one()

    def test_segment_with_a_successor_lacks_nothing_or_is_refused(self) -> None:
        files = self.write_segments(self.iterations[:3], self.iterations[3:])
        data = files[self.NAME].rstrip(b"\0")
        for cut in range(len(data)):
            with self.subTest(cut=cut):
                self.write_file(self.NAME, data[:cut])
                self.assert_refused(r"journal\.1 is damaged|journal\.2 continues with change 6")

    def test_any_byte_flipped_it_holds_all_or_refuses_with_the_place(self) -> None:
        files = self.write_segments(self.iterations[:3], self.iterations[3:])
        names = sorted(files)[1:]
        for name in names:
            lines = list(gipam.decode_records(files[name]))
            for place, value, data in flips(files[name].rstrip(b"\0")):
                self.write_file(name, data)
                with self.subTest(name=name, place=place, value=value):
                    self.check_flip(name, lines, place, value)
            self.write_file(name, files[name])

    def check_flip(self, name: str, lines: list[gipam.CommitRecord], place: int,
                   value: int) -> None:
        """Check the recovery of a segment in which the byte at a place has another value."""
        line = line_at(lines, place)
        # A NUL at the end of a sector is as if that sector had never reached the disk.
        ends_sector = place == lines[-1].end - 1 or (place + 1) % SECTOR_BYTES == 0
        is_torn = value == 0 and ends_sector
        if is_torn and line.seq == 10:
            self.assert_recovered(self.dumps[line.seq - len(line.records)])
            return
        with self.assertRaises(gipam.CorruptionError) as raised:
            recover(self.path)
        if not is_torn:
            damage = f"{name} is damaged: line {line.number} at byte {line.offset} "
            self.assertIn(damage, str(raised.exception))

    def find_last_seq(self, data: bytes) -> int:
        """Return the sequence number of the last line, in a segment with these bytes."""
        *_, last = gipam.decode_records(data + bytes(99))
        return last.seq

    def line_that_leaves(self, size: int) -> bytes:
        """Return a line with seq 10, after which a sector has this many bytes left."""
        overhead = len(self.line(10, ""))
        length = (-size - overhead) % SECTOR_BYTES
        return self.line(10, "".ljust(length, "x"))

    def test_line_of_which_any_sectors_reached_the_disk_was_never_acknowledged(self) -> None:
        """Any of a line's sectors may be missing; the first sector may hold only one byte of it."""
        line = self.line(11, "release_pool", "x" * 900)
        for start in (1, 9, 17, 18, 100, 511, 512):
            whole = self.line_that_leaves(start)
            pieces = [line[:start]]
            for offset in range(start, len(line), SECTOR_BYTES):
                end = offset + SECTOR_BYTES
                pieces.append(line[offset:end])
            for written in itertools.product((False, True), repeat=len(pieces)):
                tail = b""
                for piece, is_written in zip(pieces, written):
                    tail += piece if is_written else bytes(len(piece))
                seq = 11 if all(written) else 10
                with self.subTest(start=start, written=written):
                    self.assertEqual(self.find_last_seq(whole + tail), seq)

    def test_line_with_zeros_after_a_short_write_was_never_acknowledged(self) -> None:
        line = self.line(11, "release_pool", "x" * 900)
        for start in (1, 9, 17, 18, 100, 511, 512):
            data = self.line_that_leaves(start)
            cut = len(data) + start + 40
            data += line
            zeros = bytes(-cut % SECTOR_BYTES)
            end = cut + len(zeros)
            torn = data[:cut] + zeros + data[end:]
            with self.subTest(start=start, cut=cut):
                self.assertEqual(self.find_last_seq(torn), 10)

    def test_damage_that_no_crash_leaves_is_refused(self) -> None:
        """The intact record ends with its sector, so that the damage begins at a sector."""
        first = self.line_that_leaves(0)
        short = self.line(11, "release_pool", "x")
        long = self.line(11, "release_pool", "x" * 1024)
        end = long[512:]
        zeros = bytes(512)
        garbage = b"x" * 512
        header = short[:40].ljust(512, b"\0")
        for what, tail in (
                ("a line end within a few bytes", b"x\nx"),
                ("zeros, then the end of a record and another", zeros + end + short),
                ("garbage, then zeros", garbage + zeros + b"x"),
                ("more than the header says", header + zeros + b"x")):
            with self.subTest(what), self.assertRaisesRegex(ValueError, "line 2 at byte 512"):
                list(gipam.decode_records(first + tail))

    def check_tail(self, what: Any, tail: bytes, pattern: str) -> None:
        """Check the refusal of data that follows the intact lines."""
        with self.subTest(what):
            self.put(self.data + tail)
            self.give_up(pattern, 10)

    def give_up(self, pattern: str, seq: int) -> None:
        """Check the refusal, and that its advice leaves this many changes, or none."""
        message = self.assert_refused(pattern)
        self.do_as_told(message)
        if "truncate" in message:
            self.assert_recovered(self.dumps[seq])
            self.append_one()
        else:
            self.assert_recovered(self.dumps[0])

    def test_damaged_line_is_refused_with_its_place(self) -> None:
        line = self.line(11, "release_pool", UNKNOWN_ID)
        length, checksum, text = line.split(b" ", 2)
        start = line[:40]
        end = line[40:]
        for what, tail in (
                ("an end of line", b"\n"),
                ("garbage", b"x" * 40),
                ("half a line", start + b"\n"),
                ("a wrong checksum", b" ".join((length, b"00000000", text))),
                ("a NUL", start + b"\0" + end[1:]),
                ("a wrong length", b" ".join((b"00000001", checksum, text))),
                ("too great a length", b" ".join((b"00000fff", checksum, text))),
                ("NULs before another line", bytes(40) + end + line),
                ("NULs in a line", start + bytes(9) + end[9:]),
                ("NULs before its end", bytes(40) + end),
                ("a line of NULs", bytes(600) + b"\n")):
            self.check_tail(what, tail, self.PLACE + "does not match its length and checksum")

    def test_damaged_line_before_others_is_refused_with_its_place(self) -> None:
        for line in self.lines:
            flipped = bytearray(self.data)
            flipped[line.offset + 30] ^= 1
            with self.subTest(line=line.number):
                self.put(bytes(flipped))
                seq = line.seq - len(line.records)
                self.give_up(f"line {line.number} at byte {line.offset}", seq)

    def test_line_of_another_time_is_refused(self) -> None:
        for seq in (9, 12):
            tail = self.line(seq, "release_pool", "x")
            self.check_tail(seq, tail, f"with change {seq} instead of 11")

    def test_change_that_contradicts_the_state_is_refused(self) -> None:
        state = recover(self.path)
        pool = next(iter(state.pools.values()))
        pool_id = gipam.encode_json(pool.pool_id)
        free_offset = pool.subnet.allocated.next_free(0)
        free_address = pool.address_at(free_offset)
        texts = list(BAD_CHANGES)
        for values in BAD_POOL_VALUES:
            texts.append(f'["request_pool","x","10.77.0.0/24",{values}]')
        for values in BAD_LEASE_VALUES:
            texts.append(f'["request_address",{pool_id},"{free_address}",{values}]')
        texts.append(f'["bind_pool",{pool_id},""]')
        texts.append(f'["bind_pool",{pool_id},7]')

        for text in texts:
            self.check_tail(text, gipam.encode_record(11, [text]), self.PLACE + "contradicts")
        not_held = self.line(11, "release_pool", "x")
        self.check_tail("not held", not_held, self.PLACE + "contradicts .* is not held")

    def test_payload_that_is_no_commit_record_is_refused(self) -> None:
        for payload in BAD_PAYLOADS:
            header = b"%08x %08x " % (len(payload), zlib.crc32(payload))
            line = header + payload + b"\n"
            self.check_tail(payload[:9], line, self.PLACE + "is not a commit record;")


class FilesTest(StoreCase):
    """Files that do not belong together are refused by name, and the message's advice helps."""

    # Name -> changes in the lease file, and the segment that it references.
    LEASE_FILES = {
        "first": (0, 1),
        "second": (4, 2),
        "third": (8, 3),
        "third, inside a line": (9, 3),
        "last": (12, None),
        "last of an earlier time": (4, None),
    }

    def setUp(self) -> None:
        super().setUp()
        self.changes = self.live(12)
        self.dumps = dump_each_state(self.changes)
        changes = self.changes
        files = self.write_segments(
            [changes[:2], changes[2:4]],
            [changes[4:8]],
            [changes[8:11], changes[11:]])
        self.segments = {}
        for number in "123":
            self.segments[number] = files[f"leases.json.journal.{number}"]

    def arrange(self, lease_file: str, segments: str) -> None:
        """Write a lease file, or none, and these segments as the first, second, ...; - is none."""
        files = {}
        if lease_file:
            seq, referenced = self.LEASE_FILES[lease_file]
            files["leases.json"] = self.snapshot(seq, referenced)
        for number, name in enumerate(segments.split(), 1):
            if name != "-":
                files[f"leases.json.journal.{number}"] = self.segments[name]
        self.write_files(files)

    def snapshot(self, seq: int, segment: int | None) -> bytes:
        """Return the lease file as it is after this many changes."""
        state = state_after(*self.changes[:seq])
        return "".join(snapshot_of(state, segment)).encode()

    def test_files_that_a_checkpoint_may_leave_are_complete(self) -> None:
        for what, lease_file, segments in (
                ("no checkpoint yet", "first", "1 2 3"),
                ("not yet renamed", "second", "1 2 3"),
                ("renamed", "third", "1 2 3"),
                ("the oldest deleted", "third", "- 2 3"),
                ("all deleted", "third", "- - 3"),
                ("an older one come back", "third", "1 - 3"),
                ("the snapshot ends inside a line", "third, inside a line", "- 2 3"),
                ("the stop, renamed", "last", "1 2 3"),
                ("the stop, all deleted", "last", ""),
                ("the stop, the oldest come back", "last", "1"),
                ("the stop, the newest come back", "last", "- - 3")):
            with self.subTest(what):
                self.arrange(lease_file, segments)
                self.assert_recovered(self.dumps[-1])

    def test_file_missing_or_surplus_is_named(self) -> None:
        early = "last of an earlier time"
        lonely = "is there without its lease file"
        for what, lease_file, segments, reason in (
                ("the first missing", "first", "- 2 3", "1 is missing"),
                ("the middle one missing", "first", "1 - 3", "3 continues with 9 instead of 5"),
                ("the referenced one missing", "second", "- - 3", "2 is missing"),
                ("the newest missing", "third", "1 2", "3 is missing"),
                ("all missing", "first", "", "1 is missing"),
                ("one there twice", "first", "1 1 2", "2 continues with 1 instead of 5"),
                ("the newest there twice", "first", "1 2 3 3", "4 continues with 9 instead of 13"),
                ("two in wrong order", "first", "2 1 3", "1 continues with 5 instead of 1"),
                ("an old lease file with a reference", "first", "- - 3", "1 is missing"),
                ("an old lease file, alone", early, "- - 3", "3 continues with 9 instead of 5"),
                ("no lease file", "", "1 2 3", "1 " + lonely),
                ("no lease file, and a late one", "", "- - 3", "3 " + lonely)):
            with self.subTest(what):
                self.arrange(lease_file, segments)
                pattern = reason.replace("continues with", "continues with change")
                message = self.assert_refused(r"journal\." + pattern)
                self.do_as_told(message)
                state = recover(self.path)
                self.assertEqual(dump_state(state), self.dumps[state.seq])

    def test_name_that_gipam_gives_to_none_is_refused(self) -> None:
        for number in ("0", "01", "\u0663"):
            name = f"leases.json.journal.{number}"
            self.write_files({"leases.json": self.snapshot(0, None), name: b""})
            with self.subTest(number):
                self.assert_refused(f"journal.{number} is not a name that gipam gives")

    def test_without_bases_the_message_helps_as_well(self) -> None:
        state = state_after(CHANGE, bases="")
        chunks = gipam.encode_snapshot({}, gipam.copy_state(state), 1)
        self.write_files({"leases.json": "".join(chunks).encode()})
        self.do_as_told(self.assert_refused(r"journal\.1 is missing"))
        self.assertEqual(held(recover(self.path)), held(state))


class SnapshotFileTest(StoreCase):
    """Damage to the lease file itself, and edits of it."""

    def setUp(self) -> None:
        super().setUp()
        state = state_after(*self.live(8))
        self.snapshot = "".join(snapshot_of(state)).encode()
        self.dump = dump_state(state)
        self.refusal = f"^{self.path} .*: restore a backup; or move"

    def test_any_byte_of_the_state_flipped_it_holds_all_or_is_refused(self) -> None:
        start = self.snapshot.index(b'"Seq"')
        head = self.snapshot[:start]
        for place, value, data in flips(self.snapshot[start:]):
            self.write_file("leases.json", head + data)
            with self.subTest(place=start + place, value=value):
                try:
                    self.assert_recovered(self.dump)
                except gipam.CorruptionError as error:
                    self.assertRegex(str(error), self.refusal)

    def test_cut_anywhere_it_is_refused(self) -> None:
        for cut in range(len(self.snapshot) - 1):
            self.write_file("leases.json", self.snapshot[:cut])
            with self.subTest(cut=cut), \
                    self.assertRaisesRegex(gipam.CorruptionError, self.refusal):
                recover(self.path)

    def test_edited_while_gipam_runs_it_is_kept_beside(self) -> None:
        """An edited file is kept even if gipam has read its state again since the edit."""
        service = self.begin()
        self.edit(b'{"V4Pool": "10.8.0.0/16"}')
        service.reload(gipam.StoreError("the disk is full"))
        self.check_edit(service, 1)
        self.edit(b'{"V4Pool": "10.9')
        self.check_edit(service, 2)
        self.edit(b"[]")
        self.check_edit(service, 3)

    def edit(self, text: bytes) -> None:
        """Replace the lease file, as an editor does."""
        self.write_file("leases.json~", text)
        os.replace(self.path + "~", self.path)

    def check_edit(self, service: gipam.Service, number: int) -> None:
        """Check that the next checkpoint keeps the edited file under this number."""
        edited = self.read_files()["leases.json"]
        with self.subTest(edited), self.assertLogs(gipam.log, "WARNING") as logged:
            self.assertTrue(checkpoint(service))
            self.assertIn(f"is kept as {self.path}.edited-{number}", logged.output[-1])
            files = self.read_files()
            self.assertEqual(files[f"leases.json.edited-{number}"], edited)
            self.assertEqual(json.loads(files["leases.json"])["V4Pool"], "10.2.0.0/16")
        self.assertTrue(checkpoint(service))
        self.assertEqual(len(glob.glob(self.path + ".edited-*")), number)

    def test_it_is_written_for_its_owner_only(self) -> None:
        DirectClient(self.begin()).request_pool()
        for name in os.listdir(self.directory):
            status = os.stat(os.path.join(self.directory, name))
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o600, name)


# A process that begins a segment when it reads a line; it cannot complete that checkpoint.
FIRST_PROCESS = """
import os, sys, test_gipam

def fail(*_):
    raise OSError("no checkpoint")

service = test_gipam.begin(sys.argv[1])
client = test_gipam.DirectClient(service)
client.request_pool()
test_gipam.checkpoint(service)
client.request_pool()
print(flush=True)
input()
os.replace = fail
test_gipam.checkpoint(service)
client.request_pool()
print(flush=True)
sys.stdin.read()
"""


class LockTest(StoreCase):
    """Only one daemon can use a lease file."""

    def refusal(self) -> str:
        """Start a second daemon, and return its message when it has ended."""
        second = self.daemon("-socket", self.path + ".sock").start(wait=False)
        self.assertEqual(second.stop(0), 75)
        return second.read_log()

    def read_store(self) -> dict[str, bytes]:
        """Return the files of the store but for its lock."""
        files = self.read_files()
        files.pop("log", None)
        files.pop("leases.json.lock", None)
        return files

    def has_checkpoint(self) -> bool:
        """Return whether the lease file references a segment."""
        return b'"Journal"' in self.read_files()["leases.json"]

    def test_second_one_is_told_who_holds_it_and_changes_nothing(self) -> None:
        """Even if the lock was deleted, the second daemon ends, since the journal is locked too."""
        first = self.daemon().start()
        client = first.client()
        assert first.process
        client.request_pool("10.10.0.0/24")
        wait_until("the first checkpoint", self.has_checkpoint)
        self.write_file("leases.json.tmp", b"as if a checkpoint were under way")
        before = self.read_store()
        self.assertIn(f"gipam: lease file {self.path} is held by process {first.process.pid}: stop",
                      self.refusal())
        self.assertEqual(self.read_store(), before)

        os.unlink(self.path + ".lock")
        self.assertIn(f"gipam: {self.path}.journal.1 is written by another gipam: stop it",
                      self.refusal())
        self.assertEqual(self.read_store(), before)
        client.request_pool("10.11.0.0/24")
        self.assertEqual(first.stop(), 0)

    def test_second_one_reads_and_cuts_nothing_whatever_the_first_does_meanwhile(self) -> None:
        """The first process begins a segment just when the second opens the one before it."""
        first = subprocess.Popen([sys.executable, "-B", "-c", FIRST_PROCESS, self.path], cwd=HERE,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self.addCleanup(first.communicate)
        assert first.stdin and first.stdout
        stdin = first.stdin
        stdout = first.stdout
        stdout.readline()
        before: dict[str, bytes] = {}

        def go_on() -> None:
            if not before and "journal" in self.calls.made[-1]:
                stdin.write("\n")
                stdin.flush()
                stdout.readline()
                before.update(self.read_store())

        self.calls.watch = go_on
        second = gipam.Store(self.path, self.calls)
        with self.assertRaises(gipam.AlreadyRunning):
            second.lock()
            second.lock_segments()
            read_anew(second)
            second.prepare_append()
        self.assertIn("leases.json.journal.2", before)
        self.assertEqual(self.read_store(), before)

    def test_journal_that_another_has_begun_ends_the_first(self) -> None:
        """As long as there is no journal, only the lock file keeps other daemons out."""
        first = self.daemon().start()
        os.unlink(self.path + ".lock")
        with open(self.path + ".journal.1", "wb") as other:
            fcntl.lockf(other, fcntl.LOCK_EX)
            with self.assertRaisesRegex(ErrorReply, "is written by another gipam"):
                first.client().request_pool("10.9.0.0/24")
            self.assertEqual(first.stop(0), 74)

    def test_second_one_waits_for_the_first_to_end(self) -> None:
        with open(self.path + ".lock", "w", encoding="ascii") as first:
            fcntl.flock(first, fcntl.LOCK_EX)

            def end_first(_: float) -> None:
                first.close()

            with mock.patch("gipam.time.sleep", side_effect=end_first) as sleep:
                gipam.Store(self.path).lock()
        self.assertTrue(sleep.called)
        self.assertEqual(self.read_files()["leases.json.lock"], b"%d\n" % os.getpid())

    def open_behind_first(self, step: str) -> gipam.State:
        """Return the state that is read if another writes the lease file just before a lock."""
        directory = make_directory(self)
        path = os.path.join(directory, "leases.json")
        state = make_state()
        write_lease_file(gipam.Store(path, self.calls), state)
        state.apply(CHANGE)
        take_lock = getattr(gipam.Store, step)

        def write_and_take_lock(store: gipam.Store) -> None:
            write_lease_file(gipam.Store(path, self.calls), state)
            take_lock(store)

        settings = gipam.read_settings({}, argparse.Namespace(file=path))
        with mock.patch.object(gipam.Store, step, write_and_take_lock):
            return gipam.open_store(settings)[-1]

    def test_what_the_first_writes_before_it_ends_is_read(self) -> None:
        """If somebody deleted the lock file, the first still has the locks of the segments."""
        for step in ("lock", "lock_segments"):
            with self.subTest(step):
                self.assertIn(CHANGE.pool_id, self.open_behind_first(step).pools)


class CallsTest(StoreCase):
    """The order of system calls, and the failure of each of them."""

    def assert_in_order(self, calls: list[str], wanted: list[str]) -> None:
        """Check that the wanted calls are among those made, in this order."""
        rest = iter(calls)
        # Each `in` goes on where the last one ended.
        missing = [call for call in wanted if call not in rest]
        self.assertEqual(missing, [], calls)

    def take_step(self, step: str) -> None:
        if step == "start":
            self.begin()
        elif step == "request":
            DirectClient(self.service).request_pool()
        elif step == "checkpoint":
            checkpoint(self.service)
        else:
            checkpoint_at_stop(self.service)

    def test_everything_is_synced_before_what_depends_on_it(self) -> None:
        new_1 = "open journal.1, pwrite journal.1, fdatasync journal.1, fsync directory, "
        new_2 = new_1.replace("journal.1", "journal.2")
        sync_1 = "pwrite journal.1, fdatasync journal.1"
        request_1 = sync_1 + ", fstat journal.1, reply"
        request_2 = request_1.replace("journal.1", "journal.2")
        lease_file = "pwrite tmp, fsync tmp, replace tmp, fsync directory"
        self.service = self.begin()
        self.assert_in_order(self.calls.made, lease_file.split(", "))
        for what, step, calls in (
                ("first request", "request", new_1 + request_1),
                ("second request", "request", request_1),
                ("first checkpoint", "checkpoint", lease_file),
                ("request after it", "request", request_1),
                ("second checkpoint", "checkpoint", new_2 + lease_file + ", unlink journal.1"),
                ("request after that", "request", request_2),
                ("a sync may have failed", "start", sync_1.replace("journal.1", "journal.2")),
                ("last checkpoint", "stop", lease_file + ", unlink journal.2")):
            with self.subTest(what):
                del self.calls.made[:]
                self.take_step(step)
                made = list(self.calls.made)
                self.assert_in_order([*made, "reply"], calls.split(", "))
                # No call follows a deletion.
                deleted = [call for call in made if call.startswith("unlink")]
                self.assertEqual(made[len(made) - len(deleted):], deleted)

    def test_start_that_cannot_cut_back_or_sync_says_so_and_is_tried_again(self) -> None:
        DirectClient(self.begin()).request_pool()
        pattern = f"cannot .*{self.path}.*: Input/output error"
        for call in ("ftruncate journal.1", "fdatasync journal.1", "fsync directory"):
            self.calls.next_fault = (call, errno.EIO)
            with self.subTest(call), self.assertRaisesRegex(gipam.FatalStoreError, pattern):
                self.begin()

    def test_whatever_fails_memory_disk_and_replies_agree(self) -> None:
        changes = self.live(6)
        files = self.write_segments([changes[:3], changes[3:]])
        name = "leases.json.journal.1"
        data = files[name].rstrip(b"\0")
        for what, start in (
                ("first start", {}),
                ("a line without its end", {**files, name: data[:-1]}),
                ("half a line", {**files, name: data[:-40]})):
            for number, note in enumerate(self.run_with(start, {})):
                for fault, faults in self.faults_of(note, number).items():
                    with self.subTest(what, call=number, note=note, fault=fault):
                        self.run_with(start, faults)

    @staticmethod
    def faults_of(note: str, number: int) -> dict[str, dict[int, Any]]:
        """Return faults of a call, and of the next one, by a name."""
        if note.startswith(("listdir", "lockf")):
            return {}
        faults: dict[str, dict[int, Any]] = {
            "no space": {number: errno.ENOSPC},
            "input/output error": {number: errno.EIO},
            "nor does the next": {number: errno.ENOSPC, number + 1: errno.EIO},
        }
        if note.startswith("pwrite"):
            faults["short"] = {number: SHORT}
            faults["half"] = {number: HALF}
            faults["half, nor does the next"] = {number: HALF, number + 1: errno.EIO}
        return faults

    def run_with(self, files: dict[str, bytes], faults: dict[int, Any]) -> list[str]:
        """Live on these files with faults, and check their effects; return the calls made."""
        self.write_files(files)
        calls = Disk()
        self.addCleanup(calls.close_all)
        calls.faults = dict(faults)
        service = self.start_at_last(calls)
        tenant = Tenant(DirectClient(service), random.Random(self.seed))
        tenant.pools.update(held(service.state))
        for step in range(3 if files else 10):
            if step in (3, 8):
                checkpoint(service)
            else:
                tenant.step()
            if faults and min(faults) < len(calls.made):
                self.check(service, tenant)

        if service.store.fatal_error:
            self.check_fatal(service, calls)
        else:
            self.check_serves_on(service, tenant, calls)
        self.assertEqual(calls.misuse, [])
        return calls.made

    def start_at_last(self, calls: Disk) -> gipam.Service:
        """Start a service. The first start may fail, before anything is granted."""
        while True:
            with contextlib.suppress(OSError, gipam.ConfigError, gipam.FatalStoreError):
                return begin(self.path, calls)

    def check_fatal(self, service: gipam.Service, calls: Disk) -> None:
        """Check that the disk is lost for a reason, and nothing more is granted."""
        failed = set()
        for number in calls.faults:
            if number < len(calls.made):
                name, _, _ = calls.made[number].partition(" ")
                failed.add(name)
        self.assertTrue(failed & {"fdatasync", "ftruncate", "stat", "fstat", "open"})
        with self.assertRaisesRegex(ErrorReply, "cannot|was moved"):
            DirectClient(service).request_pool()

    def check_serves_on(self, service: gipam.Service, tenant: Tenant, calls: Disk) -> None:
        """Check that the service grants more without faults, and stop it with faults."""
        faults = calls.faults
        calls.faults = {}
        pool_id, _ = tenant.client.request_pool("192.168.0.0/24")
        tenant.pools[pool_id] = []
        calls.faults = faults
        self.check(service, tenant)
        checkpoint_at_stop(service)
        self.check(service, tenant)

    def check(self, service: gipam.Service, tenant: Tenant) -> None:
        """Check that replies, memory and disk agree."""
        on_disk = recover(self.path)
        if service.store.fatal_error:
            # The disk may have the last iteration, which was not acknowledged.
            seq = service.store.seq
            self.assertIn(on_disk.seq, (seq, seq + 1))
            if on_disk.seq > seq:
                return
        else:
            self.assertEqual(dump_state(on_disk), dump_state(service.state))
        self.assertEqual(held(on_disk), tenant.held())


class RotationTest(StoreCase):
    """The next segment of the journal, and the files left if it cannot be made."""

    def setUp(self) -> None:
        super().setUp()
        self.service = self.begin()
        self.client = DirectClient(self.service)
        self.client.request_pool()
        checkpoint(self.service)
        self.client.request_pool()
        self.store = self.service.store
        self.next_path = self.path + ".journal.2"

    def open_segments(self) -> list[str]:
        return [path for path in self.calls.open_files() if ".journal." in path]

    def test_rotation_closes_the_segment_before(self) -> None:
        self.store.rotate(1)
        self.assertEqual(self.open_segments(), [self.next_path])

    def test_rotation_that_fails_leaves_nothing(self) -> None:
        """A rotation leaves no new segment even if only the sync of the directory fails."""
        error = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch.object(gipam.Segment, "write_zeros", side_effect=error):
            self.assert_rotation_fails()
        self.calls.next_fault = "fsync directory", errno.EIO
        self.assert_rotation_fails()
        self.client.request_pool()
        self.assert_recovered(dump_state(self.service.state))

    def assert_rotation_fails(self) -> None:
        """Check that the present segment stays, and that no other is left."""
        self.assertRaises(OSError, self.store.rotate, 1)
        self.assertEqual(self.open_segments(), [self.path + ".journal.1"])
        self.assertFalse(os.path.exists(self.next_path))

    def test_segment_of_another_program_is_left_alone(self) -> None:
        self.write_file("leases.json.journal.2", b"notes\n")
        with self.assertRaisesRegex(gipam.FatalStoreError, "written by another program"):
            self.store.rotate(1)
        self.assertEqual(pathlib.Path(self.next_path).read_bytes(), b"notes\n")

    def test_blank_segment_that_a_checkpoint_left_is_not_the_last_one(self) -> None:
        """Recovery syncs the segment before a blank one, because it may not be on disk yet."""
        self.store.close()
        self.write_file("leases.json.journal.2", bytes(99))
        del self.calls.made[:]
        self.assertEqual(self.begin().store.segment, 1)
        self.assertIn("fdatasync journal.1", self.calls.made)


class PreallocationTest(StoreCase):
    """Space is preallocated before a change is decided; a full disk is used to its end."""

    def setUp(self) -> None:
        super().setUp()
        self.journal = self.path + ".journal.1"
        self.service = self.begin()
        DirectClient(self.service).request_pool()
        self.store = self.service.store
        self.segment = active_segment(self.store)

    def fail_writes(self, fault: Any, count: int) -> None:
        """Let the next writes fail; a failed preallocation truncates after each."""
        first = len(self.calls.made)
        self.calls.faults = {}
        for index in range(count):
            self.calls.faults[first + 2 * index] = fault

    def reserve_beyond(self) -> None:
        """Reserve one byte more than is preallocated."""
        free_bytes = self.segment.allocated - self.segment.end
        self.store.reserve(free_bytes)

    def test_failed_preallocation_leaves_no_space_taken(self) -> None:
        """The zeros of a failed preallocation would take the last space of the disk."""
        pattern = "cannot write .*: No space left on device; nothing has"
        for fault in (errno.ENOSPC, HALF):
            length = os.path.getsize(self.journal)
            self.fail_writes(fault, 2)
            with self.subTest(fault), self.assertRaisesRegex(gipam.StoreError, pattern):
                self.reserve_beyond()
            self.assertEqual(os.path.getsize(self.journal), length)
            self.assertEqual(self.segment.allocated, length)

    def test_nearly_full_disk_gives_what_is_needed(self) -> None:
        length = self.segment.allocated
        self.fail_writes(HALF, 1)
        self.reserve_beyond()
        allocated = self.segment.allocated
        self.assertGreater(allocated, length)
        self.assertLessEqual(allocated, length + gipam.RECORD_OVERHEAD_BYTES)
        self.assertEqual(os.path.getsize(self.journal), allocated)

    def test_full_disk_does_not_forbid_starting(self) -> None:
        self.calls.next_fault = "pwrite journal.1", errno.ENOSPC
        self.assertEqual(self.begin().store.seq, self.store.seq)

    def test_last_free_space_is_not_for_a_checkpoint(self) -> None:
        checkpoint(self.service)
        DirectClient(self.service).request_pool()
        free_bytes = 2 * gipam.PREALLOCATE_BYTES - 1
        free = mock.Mock(f_bavail=free_bytes, f_frsize=1)
        with mock.patch.object(os, "statvfs", return_value=free):
            with self.assertLogs(gipam.log, "WARNING") as logged:
                self.assertFalse(checkpoint(self.service))
            self.assertIn("the last free space is kept for requests", logged.output[0])
            self.reserve_beyond()

    def test_probe_finds_out_that_the_disk_takes_writes_again(self) -> None:
        self.fail_writes(errno.ENOSPC, 2)
        self.assertRaises(gipam.StoreError, self.reserve_beyond)
        self.fail_writes(errno.ENOSPC, 2)
        self.store.probe()
        self.assertIn("No space left", self.store.last_error)
        length = self.segment.allocated
        self.store.probe()
        self.assertEqual(self.store.last_error, "")
        # A byte would find space in the last block of the file, though the disk is full.
        self.fail_writes(errno.ENOSPC, 1)
        self.store.last_error = "the disk is full"
        self.store.probe()
        growth = self.segment.allocated - length
        self.assertEqual(growth, gipam.PREALLOCATE_BYTES + gipam.PROBE_BYTES)

    def test_probe_asks_nothing_of_a_disk_that_is_well_or_lost(self) -> None:
        made = len(self.calls.made)
        self.store.probe()
        self.store.fail("the disk is gone")
        self.store.probe()
        self.assertEqual(self.calls.made[made:], [])

    def test_probe_that_cannot_sync_is_fatal(self) -> None:
        self.store.last_error = "the disk is full"
        self.calls.next_fault = "fdatasync journal.1", errno.EIO
        self.store.probe()
        self.assertIsNotNone(self.store.fatal_error)

    def test_probe_finds_out_where_no_segment_could_be_made(self) -> None:
        self.store.close()
        store = gipam.Store(self.path + "2", self.calls)
        self.calls.next_fault = "open leases.json2.journal.1", errno.ENOSPC
        self.assertRaises(gipam.StoreError, store.reserve, 1)
        store.probe()
        self.assertEqual(store.last_error, "")
        self.assertEqual(store.segment, 1)


class PowerCutTest(StoreCase):
    """The power fails at any moment, and any part of the unsynced data may be lost."""

    def setUp(self) -> None:
        super().setUp()
        self.acknowledged = 0  # changes of live_on()

    def live_on(self, rng: random.Random, at_call: Callable[[], None]) -> list[gipam.Record]:
        """Live on an empty disk, with a function called before each change of it."""
        self.write_files({})
        self.acknowledged = 0
        self.calls = Disk()
        self.addCleanup(self.calls.close_all)
        self.calls.watch = at_call
        service = self.begin()
        changes = record_changes(service)
        tenant = Tenant(DirectClient(service), rng)
        for step in range(45):
            if step % 10 == 9:
                checkpoint(service)
            elif step % 10 == 4:
                # A checkpoint that fails leaves a blank segment, and no more.
                service.store.rotate(1)
                service.reload(gipam.StoreError("a write has failed"))
            else:
                tenant.step()
            self.acknowledged = len(changes)
        checkpoint_at_stop(service)
        at_call()
        return changes

    @seeded(2)
    def test_acknowledged_change_is_there_after_a_power_cut_or_kill(
            self, rng: random.Random) -> None:
        images = {}  # names and contents -> changes acknowledged

        def photograph() -> None:
            cuts = [self.calls.after_power_cut(rng) for _ in range(5)]
            for files in (self.calls.after_kill(), *cuts):
                images[tuple(sorted(files.items()))] = self.acknowledged

        dumps = dump_each_state(self.live_on(rng, photograph))
        for image, acknowledged in images.items():
            self.write_files(dict(image))
            state = recover(self.path)
            self.assertGreaterEqual(state.seq, acknowledged)
            self.assertEqual(dump_state(state), dumps[state.seq])

    @seeded(1)
    def test_change_seen_after_a_kill_is_there_after_a_power_cut(
            self, rng: random.Random) -> None:
        """A reply of the second process may rest on data that the first wrote but did not sync."""
        kills: list[Disk] = []

        def kill() -> None:
            kills.append(self.calls.survivor())

        self.live_on(rng, kill)
        for step in ("grant a pool", "release a pool that is not there"):
            chosen = kills if IS_LONG else rng.sample(kills, 60)
            for first in chosen:
                with self.subTest(step):
                    self.check_second_life(first, step, rng)

    def check_second_life(self, first: Disk, step: str, rng: random.Random) -> None:
        """Start on the files after a kill, make a call, and check the files after a power cut."""
        self.write_files(first.after_kill())
        second = first.survivor()
        service = begin(self.path, second)
        client = DirectClient(service)
        if step == "grant a pool":
            client.request_pool("192.168.0.0/24")
        else:
            client.release_pool(UNKNOWN_ID)
        second.close_all()
        for _ in range(4):
            self.write_files(second.after_power_cut(rng))
            self.assert_recovered(dump_state(service.state))

    def test_lease_file_is_there_before_the_first_request(self) -> None:
        self.begin()
        for _ in range(20):
            files = self.calls.after_power_cut(random.Random())
            self.assertEqual(list(files), ["leases.json"])


class LostDiskTest(StoreCase):
    """A real daemon whose disk goes away; the lab has full and read-only ones."""

    def test_directory_that_is_gone_costs_errors_until_it_is_back(self) -> None:
        directory = os.path.join(self.directory, "gone")
        path = os.path.join(directory, "leases.json")
        os.mkdir(directory)
        daemon = self.daemon("-file", path).start()
        shutil.rmtree(directory)
        client = daemon.client()
        pattern = r"cannot write .*/gone/.*journal\.1: No such file"
        with self.assertRaisesRegex(ErrorReply, pattern):
            client.request_pool("10.9.0.0/24")
        os.mkdir(directory)
        # The pool was not held, and is now.
        client.request_pool("10.9.0.0/24")
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(len(recover(path).pools), 1)


# === Netlink ======================================================================================
#
# Routes and addresses of the host that no pool may overlap, and proxy neighbour entries. Kernel
# answers netlink requests for routes; Link is the kernel of a host with a device eth0, with its
# table of proxy entries. test_on_a_real_host asks the real one, in a network namespace.

IN_NAMESPACE = """
ip link set lo name b\u00fcro0 && ip link set b\u00fcro0 up &&
ip addr add 10.2.9.1/24 dev b\u00fcro0 && ip addr add 2001:db8:0:105::1/64 dev b\u00fcro0 nodad &&
ip route add blackhole 10.2.0.0/16 && ip route add 10.2.3.0/24 dev b\u00fcro0 table 220 &&
ip route add 10.2.8.0/24 dev b\u00fcro0 &&
ip route add local 0.0.0.0/0 dev b\u00fcro0 table 100 && ip route add unreachable 10.2.4.0/26 &&
ip -6 route add 2001:db8:0:103::/64 dev b\u00fcro0 table 51820 &&
python3 -c 'for at in range(20000): print(f"route add blackhole 172.16.{at >> 8}.{at & 255}")' |
ip -batch - && $1 && exec python3 -c '
import gipam
for version, base in (4, "10.2.0.0/16"), (6, "2001:db8:0:100::/56"):
    for route in gipam.read_used_ranges(gipam.netlink_request, version, [gipam.parse_prefix(base)]):
        ends = (gipam.format_address(at, version) for at in route)
        print(*gipam.ipaddress.summarize_address_range(*map(gipam.ipaddress.ip_address, ends)))
config = gipam.argparse.Namespace(v4=[gipam.parse_prefix("10.2.8.0/25")], v6=[], unix=True,
                                  onlink="", mac=True)
gipam.log_startup_warnings(config, (), "/proc/self/net")
gipam.log_startup_warnings(config, config.v4, "/proc/self/net")'
"""


class HostRoutesTest(Case):
    """Ranges that containers must not take, because this host or its networks use them."""

    ROWS = (  # name, routes, own addresses, ranges that are used
        ("none", "", "", ""),
        ("default, the base itself, and prefixes that contain it",
         "0.0.0.0/0 10.0.0.0/8 10.2.0.0/16 10.2.0.0/16=BLACKHOLE ::/0 2001:db8:0:100::/56", "", ""),
        ("outside", "10.1.255.0/24 10.3.0.0/24 192.0.2.7/32 192.10.2.0/24", "", ""),
        ("a VPN, twice", "10.2.3.0/24 10.2.3.0/24", "", "10.2.3.0/24"),
        ("any type but broadcast",
         "10.2.4.0/26=UNREACHABLE 10.2.9.0/32=BROADCAST 10.2.9.1/32=LOCAL",
         "10.2.9.1/24 10.9.2.1/24", "10.2.4.0/26 10.2.9.1/32"),
        ("IPv6", "2001:db8:0:103::/64", "2001:db8:0:105::1/64 ::1/128",
         "2001:db8:0:103::/64 2001:db8:0:105::1/128"))

    def test_routes_and_own_addresses_in_a_base_are_used(self) -> None:
        for name, routes, addresses, expected in self.ROWS:
            for base in parse_prefixes(BASES):
                with self.subTest(name, base=base):
                    used = gipam.read_used_ranges(Kernel(routes, addresses), base.version, [base])
                    of_family = prefixes_of(expected, base.version)
                    self.assertEqual(used, integer_ranges(of_family))

    def dump(self, *datagrams: list[tuple[int, int, bytes]]) -> list[bytes]:
        """Return the result of netlink_request() for these messages (type, flags, payload)."""
        packed = []
        for messages in datagrams:
            packed.append(b"".join(
                gipam.NLMSGHDR.pack(16 + len(payload), message_type, flags) + payload
                for message_type, flags, payload in messages))
        with mock.patch.object(socket, "socket") as made:
            kernel = made.return_value.__enter__.return_value
            kernel.recv.side_effect = packed
            payloads = gipam.netlink_request(gipam.RTM_GETROUTE, bytes(4))
            self.assertEqual(kernel.recv.call_count, len(packed))
        return payloads

    def test_dump_goes_on_until_it_is_done(self) -> None:
        done = (gipam.NLMSG_DONE, 0, bytes(4))
        first = (gipam.RTM_NEWROUTE, 0, b"one.")
        second = (gipam.RTM_NEWROUTE, 0, b"two.")
        third = (gipam.RTM_NEWROUTE, 0, b"end.")
        payloads = self.dump([first, second], [third], [done])
        self.assertEqual(payloads, [b"one.", b"two.", b"end."])

    def test_inconsistent_dump_is_repeated(self) -> None:
        done = (gipam.NLMSG_DONE, 0, bytes(4))
        torn = (gipam.RTM_NEWROUTE, gipam.NLM_F_DUMP_INTR, b"one.")
        whole = (gipam.RTM_NEWROUTE, 0, b"two.")
        payloads = self.dump([torn], [done], [whole, done])
        self.assertEqual(payloads, [b"two."])

    def test_error_in_a_dump_is_raised(self) -> None:
        message = (gipam.RTM_NEWROUTE, 0, b"one.")
        code = struct.pack("=i", -errno.EPERM)
        for message_type in (gipam.NLMSG_ERROR, gipam.NLMSG_DONE):
            with self.assertRaisesRegex(OSError, "Operation not permitted"):
                self.dump([message, (message_type, 0, code)])

    def test_on_a_real_host(self) -> None:
        """The host has a VPN in a table of its own, and an interface whose name is not ASCII."""
        expected = ["10.2.3.0/24", "10.2.4.0/26", "10.2.8.0/24", "10.2.9.0/24", "10.2.9.1/32"]
        splits_local_from_main = "ip rule add from 10.2.9.1 lookup 220"
        for rule in (":", splits_local_from_main):
            done = subprocess.run(["unshare", "-rn", "bash", "-ec", IN_NAMESPACE, "bash", rule],
                                  cwd=os.path.dirname(GIPAM), capture_output=True, encoding="utf-8",
                                  env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=False)
            if "unshare" in done.stderr or "ip: command not found" in done.stderr:
                raise unittest.SkipTest(f"no network namespace: {done.stderr.strip()}")
            with self.subTest(rule):
                warning = "10.2.8.0/25 is part of an on-link route of b\u00fcro0"
                self.assertEqual(done.stderr.count(warning), 1)
                used = set(done.stdout.split())
                self.assertEqual(sorted(route for route in used if "." in route), expected)
                self.assertLessEqual({"2001:db8:0:103::/64", "2001:db8:0:105::/64",
                                      "2001:db8:0:105::1/128"}, used)


class Link:
    """The kernel of a host with a device eth0: its proxy entries, and routes to other devices."""

    def __init__(self) -> None:
        self.devices = {"eth0": 2}
        self.routes = {
            "2001:db8:0:100::/64": 3,
            "10.2.0.0/24": 3,
            "fd00::/64": 3,
            "::/0": 2,
        }
        self.connected = ["10.0.0.0/8", "2001:db8:0:100::/56"]  # of each device
        self.entries: dict[gipam.NeighbourEntry, bytes] = {}  # protocol attribute of each
        self.failure: OSError | None = None
        self.dumps = 0

    def find_device(self, name: str) -> int:
        if name not in self.devices:
            raise OSError(errno.ENODEV, "No such device")
        return self.devices[name]

    def __call__(self, message_type: int, body: bytes,
                 flags: int = gipam.NLM_F_DUMP) -> list[bytes]:
        is_route_dump = message_type == gipam.RTM_GETROUTE and flags == gipam.NLM_F_DUMP
        if is_route_dump:
            self.dumps += 1
        if self.failure:
            raise self.failure
        if is_route_dump:
            return self.dump_routes()
        if message_type == gipam.RTM_GETROUTE:
            return [self.find_route(body)]
        if flags == gipam.NLM_F_DUMP:
            return [entry.pack(0x80) + protocol for entry, protocol in self.entries.items()]
        return self.on_neighbour(message_type, body)

    def dump_routes(self) -> list[bytes]:
        routes = []
        for device in self.devices.values():
            routes += [route(text, device) for text in self.connected]
        return routes

    def find_route(self, body: bytes) -> bytes:
        address = ipaddress.ip_address(gipam.read_attributes(body)[gipam.RTA_DST])
        for text, device in self.routes.items():
            if address in ipaddress.ip_network(text):
                return route(text, device)
        return route("0.0.0.0/0", 1, route_type=Kernel.TYPES["BLACKHOLE"])

    def on_neighbour(self, message_type: int, body: bytes) -> list[bytes]:
        attributes = gipam.read_attributes(body, gipam.NDMSG.size)
        if not attributes[gipam.NDA_DST]:
            raise OSError(errno.EINVAL, "Invalid argument")
        entry, _ = gipam.parse_neighbour(body)
        if message_type == gipam.RTM_NEWNEIGH:
            self.entries[entry] = body[len(entry.pack()):]
        elif entry not in self.entries:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        elif message_type == gipam.RTM_DELNEIGH:
            return [entry.pack() + self.entries.pop(entry)]
        return [entry.pack() + self.entries[entry]]


OWN = gipam.pack_attribute(gipam.NDA_PROTOCOL, b"g")  # of an entry that gipam has made


def entry_of(address: str, device: int = 2) -> gipam.NeighbourEntry:
    return gipam.NeighbourEntry(device, ipaddress.ip_address(address))


def route(text: str, device: int, more: bytes = b"", route_type: int = 1) -> bytes:
    """Return the message of a route to a device, as the kernel lists it."""
    network = ipaddress.ip_network(text)
    family = gipam.SOCKET_FAMILY[network.version]
    rtmsg = struct.pack("=BB5xB4x", family, network.prefixlen, route_type)
    destination = b""
    if network.prefixlen:
        destination = gipam.pack_attribute(gipam.RTA_DST, network[0].packed)
    output_device = gipam.pack_attribute(gipam.RTA_OIF, struct.pack("=i", device))
    return rtmsg + destination + more + output_device


def link_event(name: str, device: int) -> bytes:
    """Return the event of a device that has changed."""
    ifname = gipam.pack_attribute(gipam.IFLA_IFNAME, name.encode() + b"\0")
    header = gipam.NLMSGHDR.pack(0, 16, 0)
    return header + gipam.IFINFOMSG.pack(device) + ifname


def route_event(message_type: int, text: str, device: int) -> bytes:
    return gipam.NLMSGHDR.pack(0, message_type, 0) + route(text, device)


class ProxiesTest(Case):
    """On the link of a device the kernel answers for addresses of containers, and for no others."""

    ONE = "2001:db8:0:100::7"

    def setUp(self) -> None:
        self.link = Link()
        self.now_s = 1.0
        self.events: list[bytes | OSError] = []
        self.patch(socket, if_nametoindex=self.link.find_device)
        self.patch(time, monotonic=self.read_clock)
        self.client = Alone()
        self.proxies = gipam.ProxyNeighbours("eth0", parse_prefixes(BASES), self.link)
        self.proxies.event_socket.close()
        self.proxies.event_socket = mock.Mock(recv=self.next_event)
        self.client.service.proxies = self.proxies
        self.pool_id, _ = self.client.request_pool(v6=True)

    def read_clock(self) -> float:
        return self.now_s

    def next_event(self, _: int, flags: int) -> bytes:
        self.assertEqual(flags, socket.MSG_DONTWAIT)
        if not self.events:
            raise BlockingIOError
        event = self.events.pop(0)
        if isinstance(event, OSError):
            raise event
        return event

    def hear(self, event: bytes | OSError) -> None:
        """Deliver an event after the least time that two comparisons are apart."""
        self.now_s += gipam.RESYNC_INTERVAL_S
        self.events.append(event)
        self.proxies.on_event(1)

    def sync(self) -> None:
        """Run as many iterations as the entries of a test need."""
        for _ in range(3):
            self.proxies.sync(self.client.service.state)

    def assert_answers(self, *addresses: str, device: int = 2) -> None:
        self.sync()
        own = set()
        for entry, protocol in self.link.entries.items():
            if protocol:
                own.add(entry)
        wanted = {entry_of(address, device) for address in addresses}
        self.assertEqual(own, wanted)

    def take(self, *addresses: str, pool_id: str = "") -> None:
        """Request each of the addresses for a container."""
        for address in addresses:
            self.client.request_address(pool_id or self.pool_id, address, "02:42:00:00:00:09")

    def test_entries_come_and_go_with_containers(self) -> None:
        self.assert_answers()
        self.client.request_address(self.pool_id, gateway=True)
        containers = [f"2001:db8:0:100::{number}" for number in range(11, 20)]
        self.take(*containers)
        lan, _ = self.client.request_pool()
        self.take("10.2.0.9", pool_id=lan)
        self.assert_answers("10.2.0.9", *containers)
        self.client.release_address(lan, "10.2.0.9")
        self.assert_answers(*containers)
        self.now_s += gipam.RESYNC_INTERVAL_S
        self.client.release_pool(self.pool_id)
        self.assert_answers()

    def test_no_entry_outside_the_bases_or_for_macvlan(self) -> None:
        """The kernel routes an address of a macvlan network to the device itself."""
        for subnet, address in (("2001:db8:0:177::/64", "2001:db8:0:177::7"),
                                ("fd00::/64", "fd00::9")):
            pool_id, _ = self.client.request_pool(subnet, v6=True)
            self.take(address, pool_id=pool_id)
        self.assert_answers()

    def test_no_entry_for_an_auxiliary_address_that_looks_like_a_container(self) -> None:
        """Docker before 29 sends no container name, and with -mac false no MAC address."""
        self.assert_answers()
        self.client.service.has_macs = False
        self.client.request_address(self.pool_id, self.ONE)
        (pool,) = self.client.state()["pools"]
        self.assertEqual(pool["addresses"][0]["kind"], gipam.ENDPOINT)
        self.assert_answers()
        self.hear(link_event("eth0", 2))
        self.assert_answers()
        self.client.request_address(self.pool_id, "2001:db8:0:100::8", name="web1")
        self.assert_answers("2001:db8:0:100::8")

    def test_entries_of_others_stay(self) -> None:
        others = {entry_of(self.ONE): b"", entry_of("2001:db8:5::1"): OWN}
        obsolete = {entry_of("2001:db8:0:100::8", 9): OWN, entry_of("10.2.0.1"): OWN}
        self.link.entries = {**others, **obsolete}
        self.take(self.ONE, "2001:db8:0:100::9")
        self.assert_answers("2001:db8:5::1", "2001:db8:0:100::9")
        self.client.release_address(self.pool_id, self.ONE)
        self.client.release_address(self.pool_id, "2001:db8:0:100::9")
        self.assert_answers("2001:db8:5::1")
        self.assertEqual(self.link.entries, others)

    def test_entries_follow_the_device(self) -> None:
        self.link.devices.clear()
        self.take(self.ONE)
        self.assert_answers()
        for name, device, index, addresses in (
                ("it appears", "eth0", 2, [self.ONE]),
                ("it goes down and up", "eth0", 2, [self.ONE]),
                ("another of the name", "eth0", 5, [self.ONE]),
                ("it has another name", "eth9", 5, [])):
            with self.subTest(name):
                self.link.devices = {device: index}
                self.link.entries.clear()
                self.hear(link_event(device, index))
                self.assert_answers(*addresses, device=index)

    def test_entries_follow_connected_routes(self) -> None:
        self.take(self.ONE)
        self.assert_answers(self.ONE)
        v4, v6 = self.link.connected
        came = gipam.RTM_NEWROUTE
        went = gipam.RTM_DELROUTE
        for name, event, connected, addresses in (
                ("one of another device goes", route_event(went, v6, 3), [v4], [self.ONE]),
                ("its own goes", route_event(went, v6, 2), [v4], []),
                ("another device changes", link_event("veth0", 7), [v4, v6], []),
                ("its own is back", route_event(came, v6, 2), [v4, v6], [self.ONE]),
                ("events were lost", OSError(errno.ENOBUFS, "No buffer space"), [v4], [])):
            with self.subTest(name):
                self.link.connected = connected
                self.hear(event)
                self.assert_answers(*addresses)

    def test_flood_of_events_costs_few_comparisons(self) -> None:
        """A comparison that fails counts as one, too."""
        self.assert_answers()
        flood = [link_event("eth0", 2), route_event(24, "10.0.0.0/8", 2)]
        for failure in (None, None, *[OSError(errno.ENOBUFS, "No buffer space")] * 3, None):
            with self.subTest(failure):
                self.link.failure = failure
                self.link.dumps = 0
                self.now_s += gipam.RESYNC_INTERVAL_S
                for _ in range(50):
                    self.events = list(flood)
                    self.proxies.on_event(1)
                    self.sync()
                self.assertEqual(self.link.dumps, 1)

    def test_flood_of_events_is_read_in_portions(self) -> None:
        for _ in range(gipam.MAX_NETLINK_EVENTS + 1):
            self.events.append(link_event("veth0", 7))
        self.proxies.on_event(1)
        self.assertEqual(len(self.events), 1)

    GATEWAY = gipam.pack_attribute(gipam.RTA_GATEWAY, bytes(4))
    ROUTES = (  # destination, device, attributes, base on device 2
        ("10.2.0.0/16", 2, b"", "10.2.0.0/16"),
        ("10.0.0.0/8", 2, b"", "10.2.0.0/16"),
        ("0.0.0.0/1", 2, b"", "10.2.0.0/16"),
        ("::/1", 2, b"", "2001:db8:0:100::/56"),
        ("10.2.0.0/17", 2, b"", ""),
        ("10.3.0.0/16", 2, b"", ""),
        ("10.2.0.0/16", 3, b"", ""),
        ("0.0.0.0/0", 2, b"", ""),
        ("10.2.0.0/16", 2, GATEWAY, ""))

    def test_base_is_on_the_link_by_a_route_without_a_gateway(self) -> None:
        for text, device, more, expected in self.ROUTES:
            routes = [route(text, device, more)]
            for base in parse_prefixes(BASES):
                with self.subTest(text, device=device, more=more, base=base):
                    is_on_link = gipam.is_on_link(base, routes, 2)
                    self.assertEqual(is_on_link, str(base) == expected)

    def test_log_says_what_is_answered_for(self) -> None:
        with self.assertLogs("gipam", "INFO") as logged:
            for devices in ({}, {"eth0": 3}, {"eth0": 2}):
                self.link.devices = devices
                self.hear(link_event("eth0", 2))
                self.sync()
            self.link.connected = []
            self.hear(link_event("eth0", 2))
            self.sync()
        self.assertEqual(logged.output, [
            "WARNING:gipam:-onlink eth0: this host has no such device, so gipam answers for "
            "nothing until there is one",
            "INFO:gipam:-onlink eth0: answering for 10.2.0.0/16, 2001:db8:0:100::/56",
            "WARNING:gipam:-onlink eth0: no base is on-link there, so gipam answers for nothing"])

    def test_failure_is_logged_once_and_repaired_at_a_tick(self) -> None:
        self.assert_answers()
        self.take(self.ONE, "2001:db8:0:100::8")
        self.link.failure = OSError(errno.ENOBUFS, "No buffer space available")
        with self.assertLogs("gipam", "ERROR") as logged:
            for _ in range(3):
                self.assert_answers()
                self.now_s += gipam.TIMER_INTERVAL_S
        self.assertEqual(logged.output,
                         ["ERROR:gipam:-onlink eth0: No buffer space available; retrying"])
        self.link.failure = None
        self.assert_answers(self.ONE, "2001:db8:0:100::8")
        self.client.service.state = make_state()  # as after a reload
        self.assert_answers()

    def test_start_needs_a_capability(self) -> None:
        self.link.failure = PermissionError(errno.EPERM, "Operation not permitted")
        pattern = "^-onlink 'eth0' needs CAP_NET_ADMIN: .*onlink.conf"
        with self.assertRaisesRegex(gipam.ConfigError, pattern):
            gipam.ProxyNeighbours("eth0", [], self.link)


# === Claims =======================================================================================
#
# Conclusions from the claims in etcd, as pure functions and as a table without an etcd: when a
# claim is written, deleted, or let alone; how long nothing new is claimed after a loss of data;
# which machine is which.


def claim_of(
    *hosts: str,
    kind: str = "",
    shared: bool = False,
    since: int = 1,
) -> gipam.Claim:
    """Return a claim of these hosts."""
    return gipam.Claim(hosts, kind, shared, since)


MACHINE = gipam.MachineId("machine", "product")
MAC = "02:42:00:00:00:01"
LAN = "192.168.1.0/24"  # shared by hosts


class DesiredClaimTest(unittest.TestCase):
    """The conditions under which a claim is written, joined, left, deleted, or let alone."""

    ONE = claim_of("one")
    TWO = claim_of("two")
    BOTH = claim_of("one", "two", shared=True)
    HELD = claim_of("one", shared=True, since=7)

    def assert_desired(
        self,
        desired: gipam.Claim | None,
        claim: gipam.Claim | None,
        own: gipam.Claim | None = None,
        is_barred: bool = False,
        is_kept: bool = False,
    ) -> None:
        with self.subTest(claim=claim, own=own, is_barred=is_barred, is_kept=is_kept):
            result = gipam.desired_claim("one", claim, own, is_barred, is_kept)
            self.assertEqual(result, desired)

    def test_held_subnet_is_claimed_and_a_shared_claim_is_joined(self) -> None:
        self.assert_desired(self.HELD, None, own=self.HELD)
        joined = self.HELD._replace(since_s=1)
        self.assert_desired(joined, self.ONE, own=self.HELD)
        shared = claim_of("two", shared=True)
        self.assert_desired(self.BOTH, shared, own=self.HELD)

    def test_claim_of_another_host_is_not_written_over(self) -> None:
        self.assert_desired(self.TWO, self.TWO, own=self.HELD, is_barred=True)
        self.assert_desired(None, None, own=self.HELD, is_barred=True)

    def test_claim_that_nothing_holds_is_deleted_or_left_to_the_others(self) -> None:
        self.assert_desired(None, self.ONE)
        self.assert_desired(claim_of("two", shared=True), self.BOTH)
        self.assert_desired(self.TWO, self.TWO)
        self.assert_desired(None, None)

    def test_claim_is_kept_while_docker_or_an_address_may_need_it(self) -> None:
        self.assert_desired(self.ONE, self.ONE, is_kept=True)
        self.assert_desired(self.BOTH, self.BOTH, is_kept=True)

    def test_kind_of_an_address_follows_its_lease_unless_others_have_it_too(self) -> None:
        endpoint = claim_of("one", kind="endpoint")
        self.assert_desired(endpoint, claim_of("one", kind="gateway"), own=endpoint)
        both = claim_of("one", "two", kind="gateway")
        self.assert_desired(both, claim_of("two", kind="gateway"), own=endpoint)

    def test_subnet_that_others_share_stays_a_shared_one(self) -> None:
        shared = claim_of("two", shared=True)
        self.assert_desired(self.BOTH, shared, own=claim_of("one"))


class MembersTest(Case):
    """Presence, and the one grace period after a loss of data."""

    def setUp(self) -> None:
        self.now_s = 1000.0
        self.patch(time, monotonic=self.now)
        self.members = gipam.Members("one", MACHINE)

    def now(self) -> float:
        return self.now_s

    def update(self, **texts: Any) -> None:
        """Show the members the keys below hosts/, with these counts; a negative count is_behind."""
        self.members.update(self.keys(**texts))

    @staticmethod
    def keys(**texts: Any) -> dict[str, str]:
        return {f"hosts/{host}": json.dumps({"count": count, "is_behind": count < 0})
                for host, count in texts.items()}

    def assert_grace(self, is_on: bool) -> None:
        if is_on:
            self.assertRaisesRegex(gipam.Unavailable, "nothing new can be claimed",
                                   self.members.require_grace_over)
        else:
            self.members.require_grace_over()

    def assert_grace_ends(self) -> None:
        """Check that the grace period lasts its full length from now, and then is over."""
        self.now_s += gipam.GRACE_PERIOD_S - 0.1
        self.assert_grace(True)
        self.now_s += 0.2
        self.assert_grace(False)

    def test_nothing_is_awaited_before_a_loss(self) -> None:
        self.update(one=1, two=1)
        self.assert_grace(False)

    def test_grace_period_lasts_while_another_host_says_that_it_is_behind(self) -> None:
        """The grace period lasts whether or not this host has noticed the loss itself."""
        self.update(one=1, two=-1)
        self.now_s += 60
        self.assert_grace(True)
        self.update(one=1, two=2)
        self.assert_grace_ends()

    def test_grace_period_lasts_while_this_host_has_not_claimed_all_again(self) -> None:
        self.members.unclaimed.update(("10.9.0.0/24", "10.9.1.0/24"))
        self.now_s += 60
        self.members.on_tried(["10.9.0.0/24"])
        self.assert_grace(True)
        self.assertTrue(self.members.is_behind)
        self.members.on_tried(["10.9.1.0/24"])
        self.assertFalse(self.members.is_behind)
        self.assert_grace_ends()

    def test_host_that_was_present_is_awaited_until_it_writes_its_key(self) -> None:
        """The waiting host says that it is behind, for hosts that do not know of the loss."""
        self.update(one=1, two=1)
        self.members.on_data_loss(self.keys(one=1))
        for _ in range(2):
            self.now_s += 10
            self.members.update({})
            self.assert_grace(True)
            self.assertTrue(self.members.is_behind)
        self.update(two=2)
        self.assertFalse(self.members.is_behind)
        self.assert_grace_ends()

    def test_older_key_that_a_restore_has_brought_back_is_no_sign_of_life(self) -> None:
        self.update(two=5)
        self.members.on_data_loss(self.keys(two=3))
        self.update(two=3)
        self.now_s += 60
        self.assert_grace(True)

    def test_absent_host_is_not_awaited(self) -> None:
        self.update(two=1)
        for _ in range(gipam.MISSED_HEARTBEATS):
            self.members.count_reading()
        self.members.on_data_loss({})
        self.assert_grace_ends()

    def test_readings_before_a_loss_do_not_make_an_awaited_host_absent(self) -> None:
        """The loss has just changed its key, whose value of before they had found."""
        self.update(two=5)
        for _ in range(gipam.MISSED_HEARTBEATS - 1):
            self.members.count_reading()
        self.members.on_data_loss(self.keys(two=3))
        for _ in range(gipam.MISSED_HEARTBEATS):
            self.now_s += 10
            self.assert_grace(True)
            self.members.count_reading()
        self.assert_grace_ends()

    def test_awaited_host_that_never_comes_is_absent_some_day(self) -> None:
        self.update(two=1)
        self.members.on_data_loss({})
        for _ in range(gipam.MISSED_HEARTBEATS):
            self.now_s += 10
            self.assert_grace(True)
            self.members.count_reading()
        self.assertFalse(self.members.is_behind)
        self.assert_grace_ends()
        self.members.update({})
        self.assertEqual(self.members.by_host, {})

    def test_host_is_absent_when_four_readings_in_a_row_found_the_same_key(self) -> None:
        for count in (1, 2, 3, 4, 5):
            self.update(two=count)
            self.members.count_reading()
        for _ in range(gipam.MISSED_HEARTBEATS - 1):
            self.assertRaisesRegex(gipam.Forbidden, "two is alive or was seen within the last 40 s",
                                   self.members.require_absent, "two")
            self.update(two=5)
            self.members.count_reading()
        self.members.require_absent("two")

    def test_names_of_hosts_are_made_printable(self) -> None:
        self.members.update({"hosts/\x1b[31mtwo": "{}"})
        self.assertEqual(list(self.members.by_host), ["\\x1b[31mtwo"])


class TableTest(unittest.TestCase):
    """Decisions of the table of claims after replies of etcd."""

    def setUp(self) -> None:
        self.table = gipam.ClaimTable("one", MACHINE, make_state())

    def apply(self, is_committed: bool, **claims: Any) -> None:
        outcome = gipam.Outcome(is_committed, is_fresh=True)
        self.table.apply_result(
            gipam.TransactionResult(gipam.Head("a"), claims, {}, outcome, 0.0))

    def apply_reading(self, is_loss: bool) -> None:
        """Apply that all claims have been read, as the table has them."""
        outcome = gipam.Outcome(is_fresh=True)
        self.table.apply_result(
            gipam.TransactionResult(gipam.Head("a"), {}, {}, outcome, 0.0, True, is_loss))

    def test_only_a_committed_transaction_voids_what_was_sent_before(self) -> None:
        self.table.uncertain.add(f"{LAN}/192.168.1.9")
        self.apply(is_committed=False)
        self.assertTrue(self.table.uncertain)
        self.apply(is_committed=True)
        self.assertFalse(self.table.uncertain)

    def test_loss_leaves_this_host_behind_until_all_is_claimed_again(self) -> None:
        """The host notices the loss while it serves, long after it has read all claims."""
        self.apply_reading(is_loss=False)
        subnets = ("10.8.0.0/24", "10.9.0.0/24")
        for subnet in subnets:
            grant = gipam.make_pool_grant(gipam.parse_prefix(subnet), None, TOKEN, 0)
            self.table.state.apply(grant)
        claim = claim_of("one", since=0)
        self.apply(is_committed=True, **dict.fromkeys(subnets, claim))
        self.assertFalse(self.table.members.is_behind)
        self.table.apply_claims({subnets[1]: None})
        self.apply_reading(is_loss=True)
        self.assertEqual(self.table.members.unclaimed, {subnets[1]})
        self.assertTrue(self.table.members.is_behind)
        self.apply(is_committed=True, **{subnets[1]: claim})
        self.table.reconcile(subnets, gipam.NO_OUTCOME)
        self.assertFalse(self.table.members.is_behind)

    def test_address_of_others_is_not_chosen_though_this_host_wrote_its_claim(self) -> None:
        """A request for any address may also write the claim of a gateway that this host leaves."""
        grant = gipam.make_pool_grant(gipam.parse_prefix(LAN), None, TOKEN, 0)
        self.table.state.apply(grant._replace(is_shared=True))
        pool = self.table.state.pools[grant.pool_id]
        key = f"{LAN}/192.168.1.1"
        request = gipam.AddressRequest("", gipam.ENDPOINT, MAC, "")
        for hosts in (("two",), ("one", "two")):
            self.apply(is_committed=True, **{key: claim_of(*hosts, kind="gateway")})
            outcome = gipam.Outcome(True, frozenset([key]), is_fresh=True)
            with self.assertRaises(gipam.TransactionRequired) as required:
                self.table.decide_shared_address(pool, request, 0, 1, outcome)
            self.assertNotIn(key, required.exception.transaction.claims)
            fixed = request._replace(address="192.168.1.1")
            with self.assertRaisesRegex(gipam.Forbidden, "claimed by host"):
                self.table.decide_shared_address(pool, fixed, 0, 1, outcome)

    def test_subnet_of_others_is_not_granted_though_this_host_wrote_its_claim(self) -> None:
        self.apply(is_committed=True, **{LAN: claim_of("two", shared=True)})
        grant = gipam.make_pool_grant(gipam.parse_prefix(LAN), None, TOKEN, 0)
        outcome = gipam.Outcome(True, frozenset([LAN]), is_fresh=True)
        with self.assertRaises(gipam.TransactionRequired) as required:
            self.table.require_claim(grant._replace(is_shared=True), outcome)
        claim = required.exception.transaction.claims[LAN]
        assert claim
        self.assertEqual(claim.hosts, ("one", "two"))

    def test_request_of_a_batch_is_granted_only_what_it_claimed(self) -> None:
        batch = gipam.TransactionBatch(self.table)
        requests = [gipam.PendingRequest(mock.Mock()) for _ in range(3)]
        keys = ("10.8.0.0/24", "10.9.0.0/24", "10.9.0.0/24")
        for request, key in zip(requests, keys):
            transaction = gipam.Transaction({key: claim_of("one")}, gipam.Head("a"))
            batch.add(request, transaction)
        outcome = gipam.Outcome(True, frozenset(keys), is_fresh=True)
        granted = [batch.outcome_for(request, outcome).granted for request in requests]
        self.assertEqual(granted, [{"10.8.0.0/24"}, {"10.9.0.0/24"}, set()])

    def test_claim_is_let_go_of_only_right_after_etcd_has_answered(self) -> None:
        """Until etcd has answered, a container may need the claim because etcd is away."""
        self.apply(is_committed=True, **{"10.9.0.0/24": claim_of("one")})
        self.table.on_docker_compared()
        fresh = gipam.Outcome(is_fresh=True)
        for outcome, claims in (
                (gipam.NO_OUTCOME, {}),
                (fresh, {"10.9.0.0/24": None})):
            with self.assertRaises(gipam.TransactionRequired) as required:
                self.table.reconcile(["10.9.0.0/24"], outcome)
            self.assertEqual(required.exception.transaction.claims, claims)
            self.assertEqual(self.table.uncertain, set(claims))

    def test_tentative_claims_block_only_until_they_are_unblocked(self) -> None:
        used = self.table.state.families[4].used
        network = gipam.parse_prefix("10.9.0.0/24")
        blocked = self.table.block_tentatively({
            "10.9.0.0/24": claim_of("one"),
            f"{LAN}/192.168.1.9": claim_of("one"),
            "10.8.0.0/24": None})
        self.assertEqual(blocked, [network])
        self.assertEqual(used.find_overlap(network), network)
        self.table.unblock(blocked)
        self.assertIsNone(used.find_overlap(network))

    def test_conflict_is_reported_once_and_again_when_it_changes(self) -> None:
        network = gipam.parse_prefix("10.9.0.0/24")
        grant = gipam.make_pool_grant(network, None, TOKEN, 0)
        self.table.state.apply(grant)
        subnet = self.table.state.pools[grant.pool_id].subnet
        self.table.on_record(grant, subnet)
        for host, count in (("two", 1), ("two", 0), ("three", 1)):
            self.table.apply_claims({"10.9.0.0/16": claim_of(host)})
            conflicts = self.table.new_conflicts()
            self.assertEqual(len(conflicts), count)
        self.table.apply_claims({"10.9.0.0/16": None})
        self.assertEqual(self.table.conflicts, {})


class MachineTest(Case):
    """Keys under this host's name, and whether another machine has written them."""

    def test_machines_with_one_name_are_told_apart(self) -> None:
        here = {"machine": "machine", "product": "product"}
        unknown = gipam.MachineId("machine", "")
        for is_foreign, value in (
                (False, here),
                (False, {**here, "product": ""}),
                (True, {**here, "product": "clone"}),
                (True, {**here, "machine": "another"}),
                (True, {"machine": "another", "product": ""}),
                (False, {"machine": "another", "token": "of an older gipam"}),
                (False, {})):
            with self.subTest(value):
                self.assertEqual(MACHINE.is_foreign(value), is_foreign)
        self.assertFalse(unknown.is_foreign({**here, "product": "clone"}))

    def test_machine_is_its_id_and_the_path_of_its_lease_file_and_its_product(self) -> None:
        """No reboot, restore or new file system changes the identity of a machine."""
        directory = make_directory(self)

        def write(name: str, text: str) -> str:
            path = os.path.join(directory, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return path

        machine_file = write("machine-id", "0123456789abcdef0123456789abcdef\n")
        product_file = write("product_uuid", "5A1E\n")
        lease_path = os.path.join(directory, "leases.json")
        first = gipam.read_machine_id(lease_path, machine_file, product_file)
        write("leases.json", "made anew")
        self.assertEqual(gipam.read_machine_id(lease_path, machine_file, product_file), first)
        unreadable = gipam.read_machine_id(lease_path, machine_file, directory + "/none")
        self.assertEqual(unreadable, first._replace(product=""))
        elsewhere = gipam.read_machine_id(directory + "/other.json", machine_file, product_file)
        self.assertNotEqual(elsewhere.machine, first.machine)
        write("product_uuid", "C10E\n")
        clone = gipam.read_machine_id(lease_path, machine_file, product_file)
        self.assertEqual(clone.machine, first.machine)
        self.assertNotEqual(clone.product, first.product)

    def test_clock_of_transactions_runs_while_the_machine_sleeps(self) -> None:
        with mock.patch.object(time, "clock_gettime", return_value=5.0) as clock:
            self.assertEqual(gipam.boottime_s(), 5.0)
        clock.assert_called_once_with(time.CLOCK_BOOTTIME)


# === Service ======================================================================================
#
# The Service on a Disk, without sockets. CommitTest has the rules of a commit: one record an
# iteration, space preallocated before changes, all or nothing. CheckpointTest writes the lease file
# step by step, with requests and failures between any two steps. LostReplyTest releases grants
# whose reply was lost, AdoptionTest adopts pools by their ids, and KillTest kills a real daemon.


@contextlib.contextmanager
def failing_once(target: Any, name: str, error: Exception) -> Iterator[None]:
    """Let the next call of a function raise the error."""
    errors = [error]
    function = getattr(target, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*arguments, **options)

    with mock.patch.object(target, name, call):
        yield


class ServiceCase(StoreCase):
    """A service on watched system calls."""

    def setUp(self) -> None:
        super().setUp()
        self.journal = self.path + ".journal.1"
        self.renew()

    def renew(self) -> None:
        """Begin again, with one pool and three leases in it."""
        self.calls.close_all()
        self.write_files({})
        self.service = self.begin()
        self.client = DirectClient(self.service)
        self.pool_id, _ = self.client.request_pool("10.9.0.0/24")
        for _ in range(3):
            self.client.request_address(self.pool_id)

    def fail_next(self, note: str, fault: int) -> None:
        """Let the next such system call fail."""
        self.calls.next_fault = note, fault

    def assert_agreed(self) -> None:
        """Check that a restart would find the state in memory."""
        self.assert_recovered(dump_state(self.service.state))

    def assert_lost(self) -> None:
        """Check that the service grants nothing more, and its exit status."""
        self.assertRaises(ErrorReply, self.client.request_pool, "10.77.0.0/24")
        error = self.service.store.fatal_error
        self.assertEqual(error and error.exit_status, 74)


class ApiCall(NamedTuple):
    """A plugin method and its arguments."""

    method: str
    arguments: dict[str, Any]


def api_call(method: str, **arguments: Any) -> ApiCall:
    return ApiCall(method, arguments)


class CommitTest(ServiceCase):
    """An iteration: decide and apply each request, commit one record, then all replies."""

    def ask(self, call: ApiCall) -> gipam.Reply:
        """Return the reply as it is before the commit."""
        return self.client.ask("IpamDriver." + call.method, **call.arguments)

    def run_iteration(self, *calls: ApiCall) -> list[gipam.Reply]:
        """Return the replies of one iteration, as they would leave after its commit."""
        replies = [self.ask(call) for call in calls]
        error = self.service.commit()
        if error:
            return [gipam.error_reply(error) for _ in replies]
        return replies

    def address_calls(self, count: int) -> list[ApiCall]:
        """Return this many requests for an address."""
        call = api_call("RequestAddress", PoolID=self.pool_id)
        return [call for _ in range(count)]

    def dependent_calls(self) -> list[ApiCall]:
        """Return requests of which each can only be granted after those before it."""
        lease = {"PoolID": self.pool_id, "Address": "10.9.0.3"}
        named = {"gipam.name": "web"}
        return [
            api_call("ReleaseAddress", **lease),
            api_call("RequestAddress", **lease),
            api_call("RequestPool", Pool="10.8.0.0/24", Options=named),
            api_call("RequestPool", Pool="10.10.0.0/24", SubPool="10.10.0.0/28"),
            api_call("RequestPool", Pool="10.10.0.0/24", SubPool="10.10.0.16/28"),
            api_call("ReleasePool", PoolID=self.pool_id),
            api_call("RequestPool", Pool="10.9.0.0/24"),
            api_call("RequestPool", Pool=""),
            # This adopts a pool.
            api_call("RequestAddress", PoolID=f"10.7.0.0/24#{TOKEN}"),
        ]

    def test_iteration_that_changes_nothing_writes_nothing(self) -> None:
        count = len(self.calls.made)
        replies = self.run_iteration(
            api_call("ReleasePool", PoolID="none"),
            api_call("RequestPool", Pool=1),
            api_call("RequestAddress", PoolID=self.pool_id, Address="10.9.0.2"))
        statuses = [reply.status for reply in replies]
        self.assertEqual(statuses, [200, 400, 403])
        self.assertEqual(len(self.calls.made), count)

    def test_failed_write_fails_the_iteration_and_nothing_else(self) -> None:
        """Grants, refusals and idempotent successes all fail, since each may have seen a change."""
        before = dump_state(self.service.state)
        self.fail_next("pwrite journal.1", errno.EIO)
        unchanging = [
            api_call("ReleasePool", PoolID="none"),
            api_call("RequestAddress", PoolID=self.pool_id, Address="10.9.0.2"),
            api_call("GetCapabilities"),
        ]
        for reply in self.run_iteration(*unchanging, *self.dependent_calls(), *unchanging):
            self.assertEqual(reply.status, 503)
            self.assertRegex(reply.body.decode(),
                             "cannot write .*: Input/output error; nothing has changed")
        self.assertEqual(dump_state(self.service.state), before)
        self.assert_agreed()
        for reply in self.run_iteration(*self.dependent_calls()):
            self.assertEqual(reply.status, 200)
        self.assert_agreed()

    def run_on_full_disk(self, spare_bytes: int, limit_bytes: int) -> list[gipam.Reply]:
        """Run an iteration with little preallocated, on a disk that takes only short writes."""
        segment = active_segment(self.service.store)
        segment.allocated = self.service.store.journal_bytes + spare_bytes
        os.truncate(self.journal, segment.allocated)
        call = self.calls.call

        def call_on_full_disk(name: str, *arguments: Any) -> Any:
            if name == "pwrite":
                fd, data, offset = arguments
                text = data.rstrip(b"\0")
                zeros = len(data) - len(text)
                if zeros > limit_bytes:
                    os.pwrite(fd, data[:99], offset)
                    raise OSError(errno.ENOSPC, "No space left")
            return call(name, *arguments)

        with mock.patch.object(self.calls, "call", call_on_full_disk):
            return self.run_iteration(*self.address_calls(9))

    def test_full_disk_with_space_for_single_records(self) -> None:
        count = len(self.calls.made)
        replies = self.run_on_full_disk(0, 999)
        self.assertEqual(len(replies), 9)
        for reply in replies:
            self.assertEqual(reply.status, 200)
        writes = self.calls.made[count:].count("pwrite journal.1")
        # Preallocated nine times, and the record itself.
        self.assertEqual(writes, 10)
        self.assert_agreed()

    def test_full_disk_refuses_before_anything_is_changed(self) -> None:
        """The disk gets full in the middle of an iteration; earlier requests are granted."""
        replies = self.run_on_full_disk(500, 0)
        statuses = [reply.status for reply in replies]
        self.assertEqual(statuses[0], 200)
        self.assertEqual(statuses[-1], 503)
        self.assertEqual(statuses, sorted(statuses))
        self.assertRegex(replies[-1].body.decode(), "cannot write .*: No space left")
        self.assert_agreed()

    def test_exception_in_the_middle_of_a_change_loses_nothing(self) -> None:
        """A MemoryError can occur anywhere; the state that it leaves is not used."""
        grant = api_call("RequestAddress", PoolID=self.pool_id)
        release = api_call("ReleaseAddress", PoolID=self.pool_id, Address="10.9.0.3")
        for target, name, call in (
                (gipam.OffsetBitmap, "add", grant),
                (gipam.Affinity, "record", release),
                (gipam, "AppliedRecord", grant)):
            with self.subTest(name):
                self.break_change(target, name, call)
                # The service goes on.
                self.client.release_address(self.pool_id, "10.9.0.3")
                self.client.request_address(self.pool_id, "10.9.0.3", name="web")

    def break_change(self, target: Any, name: str, call: ApiCall) -> None:
        """Let a function fail in the second of three calls of an iteration."""
        count = len(self.service.state.pools[self.pool_id].leases)
        first = self.ask(*self.address_calls(1))
        with failing_once(target, name, MemoryError()), self.assertLogs("gipam", "ERROR"):
            broken = self.ask(call)
        (last,) = self.run_iteration(*self.address_calls(1))
        statuses = [first.status, broken.status, last.status]
        self.assertEqual(statuses, [200, 500, 200])
        pool = self.service.state.pools[self.pool_id]
        self.assertEqual(len(pool.leases), count + 2)
        self.assert_agreed()

    def test_failed_write_after_an_exception_in_a_change_fails_all(self) -> None:
        """Changes decided before the exception are committed at once; it is fatal if that fails."""
        (call,) = self.address_calls(1)
        self.ask(call)
        full = gipam.StoreError("the disk is full")
        with failing_once(self.service.store, "append", full), \
                failing_once(gipam.OffsetBitmap, "add", MemoryError()), \
                self.assertLogs("gipam", "ERROR"):
            self.ask(call)
        self.assertIsNotNone(self.service.commit())
        self.assert_lost()

    def test_journal_that_may_be_lost_fails_all_for_ever(self) -> None:
        for loss, pattern in (
                ("sync_failed", "cannot sync .*: Input/output error"),
                ("sync_of_preallocation_failed", "cannot sync .*: Input/output error"),
                ("deleted", "journal.1 was moved or deleted"),
                ("moved", "journal.1 was moved or deleted"),
                ("replaced", "journal.1 was moved or deleted")):
            with self.subTest(loss):
                self.renew()
                self.lose_journal(loss)
                later = [api_call("RequestPool", Pool="10.77.0.0/24")]
                for calls in (self.dependent_calls(), later):
                    for reply in self.run_iteration(*calls):
                        self.assertRegex(json.loads(reply.body)["Error"], pattern)
                self.assert_lost()

    def lose_journal(self, loss: str) -> None:
        """Make the contents of the disk unknown from the next sync on."""
        copy_path = self.journal + "~"
        if loss == "deleted":
            os.unlink(self.journal)
        elif loss == "moved":
            os.rename(self.journal, copy_path)
        elif loss == "replaced":
            os.rename(shutil.copy(self.journal, copy_path), self.journal)
        else:
            self.fail_next("fdatasync journal.1", errno.EIO)
        if loss == "sync_of_preallocation_failed":
            store = self.service.store
            active_segment(store).allocated = store.journal_bytes + 300

    def test_space_is_preallocated_ahead_of_need(self) -> None:
        """About one request in a hundred asks the disk for more space."""
        store = self.service.store
        count = len(self.calls.made)
        started = active_segment(store).allocated
        for _ in range(200):
            pool_id, _ = self.client.request_pool(gipam_name="web")
            self.client.release_pool(pool_id)
        allocated = active_segment(store).allocated
        free_bytes = allocated - store.journal_bytes
        syncs = self.calls.made[count:].count("fdatasync journal.1")
        self.assertGreater(allocated, started + gipam.PREALLOCATE_BYTES)
        self.assertLessEqual(free_bytes, gipam.PREALLOCATE_BYTES)
        self.assertLess(syncs, 405)
        self.assertEqual(os.path.getsize(self.journal), allocated)
        self.assert_agreed()


class Stop(NamedTuple):
    """A place where a checkpoint waits, for an iteration with this callback or at a system call."""

    future: concurrent.futures.Future[Any]
    function: Callable[..., Any] | None
    arguments: tuple[Any, ...]


class SteppedCheckpoint:
    """A checkpoint in a thread that stops at each step, until go_on() is called."""

    def __init__(self, case: ServiceCase) -> None:
        self.service = case.service
        self.stops: queue.Queue[Stop | None] = queue.Queue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.has_succeeded = False
        case.calls.watch = self.watch
        self.thread.start()
        self.stop = self.stops.get(timeout=DEADLINE_S)

    def run(self) -> None:
        """Make the checkpoint, in the thread."""
        self.wait()
        self.has_succeeded = gipam.Checkpoint(self.service, self.wait).run()
        self.stops.put(None)

    def wait(self, function: Callable[..., Any] | None = None, *arguments: Any) -> Any:
        """Stop, in the thread."""
        stop = Stop(concurrent.futures.Future(), function, arguments)
        self.stops.put(stop)
        return stop.future.result(DEADLINE_S)

    def watch(self) -> None:
        """Stop before a system call of the thread."""
        if threading.current_thread() is self.thread:
            self.wait()

    def go_on(self) -> bool:
        """Let the thread do one step, in an iteration if need be; return whether it goes on."""
        if self.stop:
            future, function, arguments = self.stop
            result = None
            try:
                if function:
                    result = self.service.run_once(function, *arguments)
                future.set_result(result)
            except (OSError, gipam.GipamError) as error:
                future.set_exception(error)
            self.stop = self.stops.get(timeout=DEADLINE_S)
        return self.stop is not None

    def go_on_times(self, count: int) -> bool:
        """Let the thread do this many steps; return whether it goes on."""
        return all(self.go_on() for _ in range(count))

    def run_free(self) -> None:
        """Let the thread do all steps up to the next one that needs an iteration."""
        while self.stop and not self.stop.function:
            self.go_on()

    def finish(self) -> None:
        """Let the thread do all remaining steps."""
        while self.go_on():
            pass


class CheckpointTest(ServiceCase):
    """Writing the lease file while requests go on."""

    def journal_numbers(self) -> list[str]:
        """Return the numbers of the segments on disk."""
        numbers = []
        for path in glob.glob(self.path + ".journal.*"):
            _, _, number = path.rpartition(".")
            numbers.append(number)
        return sorted(numbers)

    def has_temp(self) -> bool:
        return os.path.lexists(self.path + ".tmp")

    def test_requests_go_on_beside_it(self) -> None:
        """A request during a checkpoint is in the next segment, and not in the lease file."""
        rng = random.Random(self.seed)
        tenant = Tenant(self.client, rng, 1, (self.pool_id,))
        tenant.pools.update(held(self.service.state))
        count = 300 if IS_LONG else 60
        with self.subTest():
            for number in range(count):
                stepped = SteppedCheckpoint(self)
                while stepped.go_on():
                    tenant.step()
                self.assertTrue(stepped.has_succeeded)
                tenant.step()
                self.assertEqual(self.journal_numbers(), [str(number + 1)])
                self.assert_agreed()
            self.assertEqual(held(self.service.state), tenant.held())

    def fails_at(self, moment: int) -> bool:
        """Make a checkpoint in which the iteration of this step fails; return whether it failed."""
        steps = itertools.count()

        def run_in_loop(function: Callable[..., Any], *arguments: Any) -> Any:
            self.client.ask("IpamDriver.RequestAddress", PoolID=self.pool_id)
            if next(steps) != moment:
                return self.service.run_once(function, *arguments)
            with failing_once(self.service.store, "append", gipam.StoreError("no")):
                return self.service.run_once(function, *arguments)

        return not gipam.Checkpoint(self.service, run_in_loop).run()

    def test_iteration_that_fails_with_a_step_of_it_leaves_nothing_open(self) -> None:
        """A step whose iteration fails cannot hand on the file that it has opened."""
        moment = 0
        while self.fails_at(moment):
            with self.subTest(moment=moment):
                self.assertEqual(self.calls.open_files(), [self.journal])
                self.assertFalse(self.has_temp())
                self.assert_agreed()
            self.renew()
            moment += 1
        self.assertGreater(moment, 5)

    def leave_two_segments(self) -> None:
        """Let the rename of a checkpoint fail, after a request."""
        for fault in ("", "replace tmp"):
            checkpoint(self.service)
            self.client.request_address(self.pool_id)
            self.fail_next(fault, errno.EBUSY)
        checkpoint(self.service)
        self.client.request_address(self.pool_id)

    def reload_beside(self, stepped: SteppedCheckpoint, hook: str) -> None:
        """Let a write fail; the checkpoint goes on meanwhile, until it needs an iteration."""
        function = getattr(gipam, hook)

        def call(*arguments: Any) -> Any:
            stepped.run_free()
            return function(*arguments)

        self.fail_next(f"pwrite journal.{self.service.store.segment}", errno.EIO)
        with mock.patch.object(gipam, hook, call), \
                self.assertRaisesRegex(ErrorReply, "Input/output error"):
            self.client.request_address(self.pool_id)

    def test_reload_at_any_moment_ends_it_and_loses_nothing(self) -> None:
        for hook in ("recover", "decode_records"):
            for moment in itertools.count():
                self.renew()
                self.leave_two_segments()
                granted = held(self.service.state)
                stepped = SteppedCheckpoint(self)
                if not stepped.go_on_times(moment):
                    break
                with self.subTest(hook=hook, moment=moment):
                    self.reload_beside(stepped, hook)
                    stepped.finish()
                    self.assertEqual(held(self.service.state), granted)
                    self.assert_agreed()
                    self.assertFalse(self.has_temp())
                    self.assertTrue(checkpoint(self.service))
            self.assertGreater(moment, 5)

    def test_record_longer_than_the_preallocation_of_the_new_segment(self) -> None:
        checkpoint(self.service)
        self.client.request_address(self.pool_id)
        stepped = SteppedCheckpoint(self)
        stepped.go_on()
        for _ in range(200):
            self.client.ask("IpamDriver.RequestAddress", PoolID=self.pool_id)
        # The segment begins in the same iteration.
        stepped.go_on()
        self.assertEqual(self.service.store.segment, 2)
        self.assertGreater(self.service.store.journal_bytes, gipam.PREALLOCATE_BYTES)
        stepped.finish()
        self.client.request_address(self.pool_id)
        self.assert_agreed()

    def test_it_is_needed_when_the_journal_is_longer_than_the_snapshot(self) -> None:
        # The lease file does not name the segment yet.
        self.assertTrue(self.service.needs_checkpoint())
        checkpoint(self.service)
        self.assertFalse(self.service.needs_checkpoint())
        checkpoint(self.service)
        with mock.patch.object(gipam, "MIN_CHECKPOINT_BYTES", 1000):
            written = 0
            while not self.service.needs_checkpoint():
                cidr = self.client.request_address(self.pool_id)
                address, _, _ = cidr.partition("/")
                self.client.release_address(self.pool_id, address)
                written += 200
                self.assertLess(written, 5000)
            self.assertGreater(written, 800)
        self.assertFalse(self.service.needs_checkpoint())

    def test_at_a_clean_stop_the_lease_file_stands_alone(self) -> None:
        """As long as gipam runs, the next checkpoint uses a segment that is still empty."""
        for number in ("1", "2", "2"):
            self.assertTrue(checkpoint(self.service))
            self.assertEqual(self.journal_numbers(), [number])
        self.assertTrue(checkpoint_at_stop(self.service))
        self.assertEqual(os.listdir(self.directory), ["leases.json"])
        self.assertNotIn(b'"Journal"', self.read_files()["leases.json"])
        self.assert_agreed()

    def test_rename_that_never_works_leaves_nothing_at_each_try(self) -> None:
        """The rename fails with EBUSY each time if the lease file alone is bind-mounted."""
        names = ["leases.json", "leases.json.journal.1", "leases.json.journal.2"]
        checkpoint(self.service)
        for _ in range(3):
            self.fail_next("replace tmp", errno.EBUSY)
            self.assertFalse(checkpoint(self.service))
            self.client.request_address(self.pool_id)
            self.assertEqual(sorted(os.listdir(self.directory)), names)
        self.assertTrue(checkpoint(self.service))
        self.assertEqual(self.journal_numbers(), ["2"])
        self.assert_agreed()

    def test_log_names_the_file_of_a_failed_checkpoint_once(self) -> None:
        os.mkdir(self.path + ".tmp")
        for call, name, reason in (
                ("", ".tmp", "Is a directory"),
                ("pwrite tmp", "", "Input/output error")):
            self.fail_next(call, errno.EIO)
            with self.assertLogs("gipam", "WARNING") as logged:
                self.assertFalse(checkpoint(self.service))
            self.assertEqual(logged.output, [
                "WARNING:gipam:the checkpoint failed, and the journal keeps all changes: "
                f"{self.path}{name}: {reason}"])
            if not call:
                os.rmdir(self.path + ".tmp")

    def test_last_of_a_disk_is_left_to_the_requests(self) -> None:
        checkpoint(self.service)
        full = mock.Mock(f_bavail=7, f_frsize=4096)
        with mock.patch.object(os, "statvfs", return_value=full), \
                self.assertLogs("gipam", "WARNING") as logged:
            self.assertFalse(checkpoint(self.service))
        self.assertIn(f": {self.path}: the last free space", logged.output[0])
        self.assertEqual(self.journal_numbers(), ["1"])
        self.client.request_address(self.pool_id)
        self.assert_agreed()


class LostReplyTest(ServiceCase):
    """A grant whose reply was lost is rolled back by sequence number; no successor is touched."""

    POOL_ID = f"10.8.0.0/24#{TOKEN}"  # so that a lease can adopt the pool
    ADDRESS = "10.8.0.7"

    def take_step(self, step: str) -> gipam.Reply:
        """Request or release the pool or the lease; return the reply."""
        if step == "pool":
            self.client.request_pool("10.8.0.0/24")
        elif step == "-pool":
            self.client.release_pool(self.POOL_ID)
        elif step == "lease":
            self.client.request_address(self.POOL_ID, self.ADDRESS)
        else:
            self.client.release_address(self.POOL_ID, self.ADDRESS)
        return self.client.reply

    @mock.patch.object(secrets, "token_hex", mock.Mock(return_value=TOKEN))
    def test_only_what_is_still_the_very_same_is_released(self) -> None:
        """The reply to the first step of each story is lost."""
        for steps_before, story, is_released in (
                ("", "pool", True),
                ("pool", "lease", True),
                ("pool lease", "-lease", False),
                ("", "pool -pool", False),
                ("", "pool -pool lease", False),
                ("pool", "lease -lease", False),
                ("pool", "lease -lease lease", False),
                ("pool", "lease -pool lease", False)):
            with self.subTest(steps_before, story=story):
                self.renew()
                for step in steps_before.split():
                    self.take_step(step)
                expected = held(self.service.state)
                lost, *_ = [self.take_step(step) for step in story.split()]
                seq = self.service.state.seq
                if not is_released:
                    expected = held(self.service.state)
                for _ in range(2):
                    self.service.run_once(self.service.roll_back, lost.record, lost.seq)
                self.assertEqual(self.service.state.seq, seq + int(is_released))
                self.assertEqual(held(self.service.state), expected)
                self.assert_agreed()


class Adoption(NamedTuple):
    """A request in a pool that only Docker knows: the address requested, and the gateway."""

    prefixes: str
    address: str
    gateway: str


class AdoptionTest(ServiceCase):
    """A pool id that Docker has and the lease file lacks."""

    ADOPTIONS = (
        Adoption("10.6.0.0/24", "10.6.0.5", "10.6.0.1"),
        Adoption("10.6.1.0/24", "", "10.6.1.1"),
        Adoption("10.8.0.0/24,10.8.0.16/28", "10.8.0.20", "10.8.0.16"),
        Adoption("10.9.2.0/24,10.9.2.64/26", "", "10.9.2.64"),
        Adoption("10.9.3.0/31", "", "10.9.3.0"),
        Adoption("2001:db8:0:105::/64", "2001:db8:0:105::9", "2001:db8:0:105::1"),
        Adoption("2001:db8:5::/64", "", "2001:db8:5::1"),
        # A container asks for the very address.
        Adoption("10.9.4.0/30", "10.9.4.1", ""),
        # There is no other address.
        Adoption("10.9.5.0/32", "", ""),
    )

    def test_pool_that_was_not_written_is_not_adopted(self) -> None:
        """The import would otherwise release later grants with the same numbers."""
        self.fail_next("pwrite journal.1", errno.EIO)
        self.assertRaises(ErrorReply, self.client.request_address, f"10.6.0.0/24#{TOKEN}")
        self.assertEqual(self.service.docker_import.unconfirmed, {})

    def test_unknown_pool_is_adopted_with_its_gateway_and_address_in_one_record(self) -> None:
        """Docker does not request the gateway again, so the first address is leased to it."""
        for adoption in self.ADOPTIONS:
            with self.subTest(adoption.prefixes):
                self.adopt(adoption)
        self.assert_agreed()

    def adopt(self, adoption: Adoption) -> None:
        """Request an address, and check the grant and the record."""
        pool_id = f"{adoption.prefixes}#{TOKEN}"
        subnet, _, _ = adoption.prefixes.partition(",")
        cidr = self.client.request_address(pool_id, adoption.address)
        address, _, length = cidr.partition("/")
        if adoption.address:
            self.assertEqual(address, adoption.address)
        self.assertEqual(length, subnet.partition("/")[2])

        kinds = ["request_pool", "request_address"]
        if adoption.gateway:
            kinds.append("request_address")
            self.assertEqual(self.find_gateways(pool_id), [adoption.gateway])
        else:
            self.assertEqual(self.find_gateways(pool_id), [])
        last = self.journal_lines()[-1]
        self.assertEqual([record[0] for record in last.records], kinds)

    def find_gateways(self, pool_id: str) -> list[str]:
        """Return the addresses of a pool that are leased to gateways."""
        pool = self.service.state.pools[pool_id]
        gateways = []
        for offset, lease in pool.leases.items():
            if lease.kind == "gateway":
                gateways.append(pool.address_at(offset))
        return gateways

    def test_search_in_an_adopted_pool_begins_where_its_token_says(self) -> None:
        """The search begins in the lower half of the range, after a possible gateway."""
        for prefixes, token, cidr in (
                ("10.2.0.0/24,10.2.0.64/26", 30 << 40 | 5, "10.2.0.71/24"),
                ("2001:db8::/64", 1 << 40 | 5, "2001:db8::100:0:7/64"),
                ("10.3.0.0/24", 126 << 40 | 5, "10.3.0.7/24"),
                ("10.4.0.0/29", 7, "10.4.0.3/29")):
            with self.subTest(prefixes), \
                    mock.patch("gipam.secrets.token_hex", return_value=f"{token:016x}"):
                self.assertEqual(self.client.request_address(f"{prefixes}#{TOKEN}"), cidr)

    def assert_refused_in(self, prefixes: str, address: str, pattern: str,
                          granted: dict[str, list[str]]) -> None:
        """Check that a request in an unknown pool fails, and compare the addresses then held."""
        pool_id = f"{prefixes}#{TOKEN}"
        with self.subTest(pool_id=pool_id, address=address):
            with self.assertRaisesRegex(ErrorReply, pattern):
                self.client.request_address(pool_id, address)
            self.assertEqual(held(self.service.state), granted)
            self.assert_agreed()
            self.client.release_pool(pool_id)

    def test_request_for_a_bad_address_leaves_the_adopted_pool_and_its_gateway(self) -> None:
        granted = held(self.service.state)
        granted[f"10.8.0.0/24#{TOKEN}"] = ["10.8.0.1"]
        for address, pattern in (
                ("10.7.0.1", "requested address is out of range"),
                ("10.8.0.0", "Address already in use: .* reserved"),
                ("2001:db8::1", "invalid address")):
            self.assert_refused_in("10.8.0.0/24", address, pattern, granted)

    def test_pool_that_cannot_be_adopted_leaves_nothing(self) -> None:
        granted = held(self.service.state)
        overlap = "Pool overlaps with other one on this address space"
        for prefixes, address, pattern in (
                ("10.9.0.0/24", "",
                 f"cannot find address pool for '10.9.0.0/24#{TOKEN}', nor adopt it: {overlap}: "
                 "10.9.0.0/24 with"),
                ("10.9.0.0/24,10.9.0.0/28", "", "nor adopt it: " + overlap),
                ("10.8.0.0/24,10.9.0.0/28", "", "nor adopt it: invalid address subpool"),
                # Prefixes that only ask for a length.
                ("0.0.0.0/0", "", "nor adopt it: invalid address pool"),
                ("0.0.0.0/26,0.0.0.0/27", "", "nor adopt it: invalid address pool"),
                ("::/0", "::1", "nor adopt it: invalid address pool"),
                ("10.8.0.1/24", "", "cannot find address pool"),
                ("web", "", f"cannot find address pool for 'web#{TOKEN}': no pool has this id")):
            self.assert_refused_in(prefixes, address, pattern, granted)

    def test_adoption_that_a_full_disk_cuts_short_has_docker_asked(self) -> None:
        """The disk has space for the pool, but none for its gateway."""
        store = self.service.store
        active_segment(store).allocated = store.journal_bytes + 220
        count = len(self.calls.made)
        # Two writes, with a truncation between them.
        self.calls.faults = {count: errno.ENOSPC, count + 2: errno.ENOSPC}
        with self.assertRaisesRegex(ErrorReply, "No space left"):
            self.client.request_address(f"10.8.0.0/24#{TOKEN}")
        self.assertEqual(len(self.service.state.pools), 2)
        self.assertTrue(self.service.docker_import.is_due)


class Load:
    """Tenants on a daemon, each in a thread with a connection of its own."""

    def __init__(self, test: StoreCase, daemon: Daemon, clients: int, seed: int) -> None:
        self.test = test
        self.daemon = daemon
        client = daemon.client()
        pool_id_v4, _ = client.request_pool()
        pool_id_v6, _ = client.request_pool(v6=True)
        shared = (pool_id_v4, pool_id_v6)
        self.tenants = []
        for number in range(clients):
            rng = random.Random(seed + number)
            self.tenants.append(Tenant(client, rng, number, shared))
        self.stop = threading.Event()
        self.is_dying = threading.Event()
        self.threads = concurrent.futures.ThreadPoolExecutor(clients)
        test.addCleanup(self.threads.shutdown)
        test.addCleanup(self.stop.set)
        self.lives: list[concurrent.futures.Future[None]] = []

    def start(self) -> None:
        """Let the tenants go on."""
        self.stop.clear()
        self.is_dying.clear()
        self.lives = [self.threads.submit(self.live, tenant) for tenant in self.tenants]

    def wait_for(self, replies: int) -> None:
        """Wait for this many further replies, or until a tenant gives up."""
        deadline_s = time.monotonic() + DEADLINE_S
        goal = self.replies() + replies
        while self.replies() < goal and self.is_well():
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.001)

    def is_well(self) -> bool:
        """Return whether all tenants are alive."""
        return not any(life.done() for life in self.lives)

    def replies(self) -> int:
        """Return how many replies there were."""
        return sum(tenant.replies for tenant in self.tenants)

    def join(self) -> None:
        """Wait until all tenants have ended."""
        for life in self.lives:
            life.result(DEADLINE_S)

    def live(self, tenant: Tenant) -> None:
        """Make calls, in a thread."""
        client = Client(self.daemon.socket)
        tenant.client = client
        try:
            while not self.stop.is_set():
                tenant.step()
        except (OSError, http.client.HTTPException):
            if not self.is_dying.is_set():
                raise
        finally:
            client.close()

    def leases_by_tenant(self, state: gipam.State) -> dict[int, set[tuple[str, str]]]:
        """Return the (pool_id, address) pairs that each tenant holds, by its MAC addresses."""
        leases: dict[int, set[tuple[str, str]]] = {}
        for tenant in self.tenants:
            leases[tenant.number] = set()
        for pool in state.pools.values():
            for offset, lease in pool.leases.items():
                octets = lease.mac.split(":")
                number = int(octets[4], 16)
                address = pool.address_at(offset)
                leases[number].add((pool.pool_id, address))
        return leases

    def reconcile(self, state: gipam.State) -> None:
        """Check that each tenant holds its grants, except for the effect of a call without a reply.

        The tenants learn the effect of such a call here.
        """
        leases = self.leases_by_tenant(state)
        unknown = set(state.pools)
        for tenant in self.tenants:
            unknown.difference_update(tenant.pools)
        for tenant in self.tenants:
            self.reconcile_tenant(tenant, state, leases[tenant.number])
            if tenant.pending[:1] == ("request_pool",) and unknown:
                tenant.pools[unknown.pop()] = []
            tenant.pending = ()
        self.test.assertEqual(unknown, set(), "nobody asked for these")

    def reconcile_tenant(self, tenant: Tenant, state: gipam.State,
                         leases: set[tuple[str, str]]) -> None:
        """Check the addresses of one tenant, and let the tenant know them."""
        pending = list(tenant.pending)
        while len(pending) < 3:
            pending.append("")
        action, pool_id, address = pending
        gone = tenant.pools.keys() - state.pools.keys()
        known: set[tuple[str, str]] = set()
        for known_id, addresses in tenant.pools.items():
            if known_id not in gone:
                known.update((known_id, known_address) for known_address in addresses)
        surplus = leases - known
        missing = known - leases

        if action != "release_pool":
            self.test.assertEqual(gone, set())
        if action != "request_address":
            self.test.assertEqual(surplus, set())
        if action != "release_address":
            self.test.assertEqual(missing, set())
        self.test.assertLessEqual(gone, {pool_id})
        self.test.assertLessEqual(missing, {(pool_id, address)})
        self.test.assertLessEqual(len(surplus), 1)
        for surplus_id, _ in surplus:
            self.test.assertEqual(surplus_id, pool_id)

        for gone_id in gone:
            del tenant.pools[gone_id]
        for addresses in tenant.pools.values():
            addresses.clear()
        for lease_id, lease_address in leases:
            tenant.pools[lease_id].append(lease_address)


CHECKPOINT_OFTEN = """
gipam.MIN_CHECKPOINT_BYTES = 2000
gipam.CHECKPOINT_RETRY_S = 0.01
gipam.TIMER_INTERVAL_S = 0.01
"""


class KillTest(StoreCase):
    """A real daemon under load, which makes a checkpoint each few dozen requests."""

    def test_no_kill_under_load_loses_or_doubles_a_lease(self) -> None:
        daemon = self.daemon("-v4", "10.2.0.0/16", "-v6", "2001:db8:0:100::/56",
                             lines=CHECKPOINT_OFTEN)
        daemon.start()
        seed = choose_seeds(1)[0]
        rng = random.Random(seed)
        clients = 16 if IS_LONG else 8
        kills = 250 if IS_LONG else 20
        load = Load(self, daemon, clients, seed)
        with self.subTest(GIPAM_TEST_SEED=seed):
            for _ in range(kills):
                load.start()
                load.wait_for(rng.randrange(400))
                load.is_dying.set()
                daemon.kill()
                load.join()
                load.reconcile(recover(self.path))
                daemon.start()
            load.start()
            load.wait_for(200)
            load.stop.set()
            load.join()
            # The lease file now has the state that was in memory.
            self.assertEqual(daemon.stop(), 0)
            self.assertEqual(sorted(os.listdir(self.directory)),
                             ["leases.json", "leases.json.lock", "log"])
            load.reconcile(recover(self.path))


# === API ==========================================================================================
#
# One contract, several stages: the same cases run on dispatch() in memory, on dispatch() with the
# lease file opened again all the time, and on a real daemon over its UNIX socket and over TCP.
# Each story of STORIES is a tuple of named steps. Where a test of moby stands behind a case, its
# name opens the docstring; "built-in" is moby's own IPAM.

CASES_V4 = "198.18.0.0/16"  # RFC 2544: hosts have no route to it
CASES_V6 = "2001:db8:0:100::/56"  # RFC 3849
if TYPE_CHECKING:
    Mixin = unittest.TestCase
else:
    Mixin = object


class InMemory(DirectClient):
    """A service on a lease file, without a socket."""

    def __init__(self, test: unittest.TestCase, **options: str) -> None:
        self.path = options.pop("file", "") or os.path.join(make_directory(test), "leases.json")
        self.kernel = Kernel()
        # The Go program has left an empty lease file like this.
        pathlib.Path(self.path).write_text("{}", encoding="ascii")
        options = options or {"v4": CASES_V4, "v6": CASES_V6}
        arguments = argparse.Namespace(file=self.path, **options)
        self.settings = gipam.read_settings({}, arguments)
        self.open()

    def open(self) -> None:
        """Start the service, from the state on disk."""
        self.store = gipam.Store(self.path)
        self.store.lock_segments()
        self.service = gipam.Service(self.store, self.read(), {}, self.read, self.kernel)

    def read(self) -> gipam.State:
        """Return the state that is on disk."""
        return read_anew(self.store, self.settings)


class Reopened(InMemory):
    """A service that is opened again and again, as after a crash or after a clean stop."""

    calls = 0

    def post(self, path: str, body: bytes, verb: str = "POST") -> tuple[int, Any]:
        self.calls += 1
        if self.calls % 10 == 0:
            checkpoint_at_stop(self.service)
        if self.calls % 5 == 0:
            self.open()
        return super().post(path, body, verb)


class TcpDaemon(Daemon):
    """A real gipam.py process on a loopback port that the kernel chose."""

    has_spec = True

    def __init__(self, test: unittest.TestCase, *options: str, **details: Any) -> None:
        super().__init__(test, "-unix=false", "-address", "127.0.0.1:0", *options, **details)

    @property
    def address(self) -> Any:
        """Return the address in the plugin file of the daemon."""
        text = pathlib.Path(self.spec).read_text(encoding="ascii")
        match = re.search(r"://\[?([^\]]+)\]?:([0-9]+)\n", text)
        if not match:
            return ("not yet", 0)
        return (match[1], int(match[2]))


class Unix(Client):
    """A real daemon, called over one kept connection to its UNIX socket."""

    daemon_class: type[Daemon] = Daemon

    def __init__(self, test: unittest.TestCase) -> None:
        self.daemon = self.daemon_class(test, "-v4", CASES_V4, "-v6", CASES_V6).start()
        super().__init__(self.daemon.address)


class Tcp(Unix):
    """A real daemon, called over one kept connection to its TCP port."""

    daemon_class = TcpDaemon


class StageCases(Mixin):
    """Cases that share the stage of their class; each releases all that it has requested."""

    stage: type[Any]
    caller: Any

    @classmethod
    def setUpClass(cls) -> None:
        keeper = unittest.TestCase()
        cls.addClassCleanup(keeper.doCleanups)
        cls.caller = cls.stage(keeper)
        cls.addClassCleanup(cls.caller.close)

    def state(self) -> Any:
        """Return the whole state of the driver."""
        return self.caller.state()

    def request_pool(self, *arguments: Any, **options: Any) -> Any:
        """Request a pool that is released when the test ends; return (id, subnet)."""
        pool = self.caller.request_pool(*arguments, **options)
        self.addCleanup(self.caller.release_pool, pool[0])
        return pool

    def pool(self, *arguments: Any, **options: Any) -> str:
        """Return the id of a pool that is released when the test ends."""
        return str(self.request_pool(*arguments, **options)[0])

    def assert_refused(self, text: str, function: Callable[..., Any], *arguments: Any,
                       **named: Any) -> None:
        """Check that the call is refused with this beginning, and changes nothing."""
        before = self.state()
        with self.assertRaises(ErrorReply) as caught:
            function(*arguments, **named)
        self.assertEqual(str(caught.exception)[:len(text)], text)
        self.assertEqual(self.state(), before)


def on(*stages: type[Client]) -> Callable[[type[StageCases]], type[StageCases]]:
    """Make a test of the cases for each stage: BadInputCases on Tcp is BadInputTcpTest."""
    def make(cases: type[StageCases]) -> type[StageCases]:
        for stage in stages:
            name = cases.__name__.replace("Cases", stage.__name__ + "Test")
            members = {"stage": stage, "__module__": __name__}
            globals()[name] = type(name, (cases, unittest.TestCase), members)
        return cases
    return make


OVERLAPPING = "Pool overlaps with other one on this address space: "  # moby ipamapi/contract.go
IN_USE = "Address already in use: "
OUT_OF_RANGE = "requested address is out of range: "
USED_UP = "no available addresses on this pool: "

OWNERS: dict[str, dict[str, Any]] = {
    "": {},
    "gw": {"gateway": True},
    "web1": {"name": "web1"},
    "web2": {"name": "web2"},
    "mac": {"mac": "02:42:0a:02:00:02"},
    "web1,mac": {"name": "web1", "mac": "02:42:0a:02:00:02"},
    "new": {"name": "new"},
}
Address = Union[int, str]  # offset in the subnet, or the address


class Story:
    """Networks and their addresses; each step of a story is a method."""

    def __init__(self, case: StageCases) -> None:
        self.case = case
        self.caller = case.caller
        self.pools: dict[str, str] = {}
        self.pool_id = ""  # of the network of the next steps

    def add_network(self, name: str, *prefixes: str) -> None:
        """Request a pool by its subnet and range; its id shows both (TestKeyString)."""
        pool_id, subnet = self.caller.request_pool(*prefixes)
        self.pools[name] = self.pool_id = pool_id
        networks = [gipam.parse_prefix(text, mask=True) for text in prefixes]
        self.case.assertEqual(subnet, str(networks[0]))
        sub_pool = networks[1] if len(networks) > 1 else None
        self.case.assertEqual(gipam.parse_pool_id(pool_id), (networks[0], sub_pool))

    def select_network(self, name: str) -> None:
        """Make this network the one of the next steps."""
        self.pool_id = self.pools[name]

    def remove_network(self, name: str, is_held: bool) -> None:
        """Release a pool, which changes something if it is held."""
        before = self.case.state()
        self.caller.release_pool(self.pools[name])
        self.case.assertEqual(self.case.state() != before, is_held)

    def refuse_network(self, *prefixes: str) -> None:
        """Request a pool that overlaps another."""
        self.case.assert_refused(OVERLAPPING, self.caller.request_pool, *prefixes)

    def text_of(self, address: Address) -> str:
        """Return the text form of an address."""
        if isinstance(address, int):
            return str(subnet_of(self.pool_id)[address])
        return address

    def request(self, requested: str, granted: str, owner: str) -> None:
        """Request an address, or any if it is empty; check which one is granted."""
        cidr = self.caller.request_address(self.pool_id, requested, **OWNERS[owner])
        # The prefix length is that of the subnet, not of the range.
        self.case.assertEqual(cidr, f"{granted}/{subnet_of(self.pool_id).prefixlen}")

    def request_fixed(self, *addresses: Address, owner: str) -> None:
        """Request these addresses, which must be granted."""
        for text in map(self.text_of, addresses):
            self.request(text, text, owner)

    def request_dynamic(self, *addresses: Address, owner: str) -> None:
        """Request any address, once for each of these, which must be granted in this order."""
        for text in map(self.text_of, addresses):
            self.request("", text, owner)

    def refuse_address(self, error: str, *addresses: Address, owner: str) -> None:
        """Request addresses that are refused with this error."""
        for text in map(self.text_of, addresses):
            self.case.assert_refused(error, self.caller.request_address, self.pool_id, text,
                                     **OWNERS[owner])

    def release(self, *addresses: Address, is_held: bool) -> None:
        """Release addresses, which changes something if they are held."""
        for text in map(self.text_of, addresses):
            before = self.case.state()
            self.caller.release_address(self.pool_id, text)
            self.case.assertEqual(self.case.state() != before, is_held)

    def end(self) -> None:
        """Release all pools, and check that none is left (TestRemoveSubnet)."""
        for pool_id in self.pools.values():
            self.caller.release_pool(pool_id)
        self.case.assertEqual(self.case.state()["pools"], [])


class Step(NamedTuple):
    """One step of a story."""

    method: Callable[..., None]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def network(name: str, *prefixes: str) -> Step:
    """Make a network with this subnet, and perhaps a range in it."""
    return Step(Story.add_network, (name, *prefixes), {})


def switch_to(name: str) -> Step:
    """Go on with this network."""
    return Step(Story.select_network, (name,), {})


def remove(name: str) -> Step:
    """Remove a network."""
    return Step(Story.remove_network, (name, True), {})


def remove_again(name: str) -> Step:
    """Remove a network that is already gone."""
    return Step(Story.remove_network, (name, False), {})


def overlap(*prefixes: str) -> Step:
    """Request a subnet, or a range in it, which must be refused."""
    return Step(Story.refuse_network, prefixes, {})


def fixed(*addresses: Address, owner: str = "") -> Step:
    """Request addresses, which must be granted."""
    return Step(Story.request_fixed, addresses, {"owner": owner})


def dynamic(*addresses: Address, owner: str = "") -> Step:
    """Request any address, once for each of these, which must be granted in this order."""
    return Step(Story.request_dynamic, addresses, {"owner": owner})


def in_use(*addresses: Address, owner: str = "") -> Step:
    """Request addresses that must be refused because they are held or reserved."""
    return Step(Story.refuse_address, (IN_USE, *addresses), {"owner": owner})


def out_of_range(*addresses: Address) -> Step:
    """Request addresses that must be refused because they are outside the subnet."""
    return Step(Story.refuse_address, (OUT_OF_RANGE, *addresses), {"owner": ""})


def none_left(owner: str = "") -> Step:
    """Request any address when none is left."""
    return Step(Story.refuse_address, (USED_UP, ""), {"owner": owner})


def release(*addresses: Address) -> Step:
    """Release addresses."""
    return Step(Story.release, addresses, {"is_held": True})


def release_again(*addresses: Address) -> Step:
    """Release addresses that are not held."""
    return Step(Story.release, addresses, {"is_held": False})


STORIES: dict[str, tuple[tuple[Step, ...], ...]] = {
    "TestGetSameAddress: an address is given once; gateways included, a repeated one too": (
        (
            network("a", "192.168.100.0/24"),
            fixed(250),
            in_use(250),
            dynamic(1, owner="gw"),
            in_use(1),
            in_use(1, owner="gw"),
            dynamic(2),
            release(1),
            dynamic(1, owner="gw"),
            dynamic(3),
        ),
    ),
    "TestSerializeRequestReleaseAddressFromSubPool: it rests (in the built-in for swarm only)": (
        (
            network("a", "10.2.0.0/16", "10.2.0.64/29"),
            fixed(65),
            dynamic(64, 66),
            release(64),
            dynamic(67),
            release(65),
            dynamic(68, 69, 70, 71, 64, 65),
            none_left(),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, 2, 3),
            release(2, 3),
            dynamic(4, 5, 6, 2, 3),
            none_left(),
        ),
        (
            network("a", "2001:db8::/125"),
            dynamic(1, 2, 3),
            release(2, 3),
            dynamic(4, 5, 6, 7, 2, 3),
            none_left(),
        ),
    ),
    "TestRelease: a full subnet grants a released address next": (
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, 2, 3, 4, 5, 6),
            none_left(),
            release(5),
            dynamic(5),
            release(1),
            dynamic(1),
            none_left(),
        ),
    ),
    "TestGetAddressSubPoolEqualPool: a range that is its whole subnet": (
        (network("a", "172.18.0.0/16", "172.18.0.0/16"), dynamic(1)),
    ),
    "TestUnusualSubnets: which addresses a small subnet has (RFC 3021)": (
        (
            network("a", "192.168.0.2/31"),
            out_of_range("192.168.0.1", "192.168.0.4", "192.168.0.100"),
            dynamic(0, 1),
            none_left(),
        ),
        (network("a", "10.7.0.0/30"), dynamic(1, 2), none_left()),
        (network("a", "10.7.0.0/32"), dynamic(0), none_left()),
        (network("a", "fd07::/126"), dynamic(1, 2, 3), none_left()),
        (network("a", "fd07::/127"), dynamic(1), none_left()),
        (network("a", "fd07::/128"), none_left()),
    ),
    "addresses come from the range, whose ends are ordinary unless they end the subnet": (
        (
            network("a", "10.2.0.0/22", "10.2.0.254/31"),
            dynamic(254, 255),
            none_left(),
            in_use(0, 1023),
        ),
        (network("a", "10.2.0.0/22", "10.2.1.0/31"), dynamic(256, 257), none_left()),
        (
            network("a", "10.2.0.0/24", "10.2.0.252/30"),
            dynamic(252, 253, 254),
            none_left(),
            release(253),
            dynamic(253),
            none_left(),
        ),
        (
            network("a", "10.3.0.0/24", "10.3.0.64/30"),
            dynamic(64, 65, 66, 67),
            none_left(),
            release(65),
            dynamic(65),
        ),
    ),
    "the owner gets its last address again while it is free": (
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1"),
            release(1),
            dynamic(2, owner="web2"),
            dynamic(1, 3, owner="web1"),
            release(1),
            dynamic(4, 5, 6, 1),
            none_left(owner="web1"),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="mac"),
            release(1),
            dynamic(2),
            dynamic(1, 3, owner="mac"),
            release(1),
            dynamic(4, 5, 6, 1),
            none_left(owner="mac"),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1,mac"),
            release(1),
            dynamic(2, owner="web2"),
            dynamic(1, 3, owner="web1,mac"),
            release(1),
            dynamic(4, 5, 6, 1),
            none_left(owner="web1,mac"),
        ),
    ),
    "an owner is known under name and MAC: upgrade to 29, and import on 26": (
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="mac"),
            release(1),
            dynamic(2),
            dynamic(1, owner="web1,mac"),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1,mac"),
            release(1),
            dynamic(2),
            dynamic(1, owner="mac"),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1,mac"),
            release(1),
            dynamic(2),
            dynamic(1, owner="web1"),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1"),
            dynamic(2, owner="mac"),
            release(2, 1),
            dynamic(1, owner="web1,mac"),
            dynamic(3),
        ),
    ),
    "an address rests with its last owner while another is free": (
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1"),
            release(1),
            fixed(4, owner="web2"),
            release(4),
            dynamic(2, 3, 5, 6, 1, 4),
            none_left(),
            release(4, 1, 6),
            dynamic(6),
            dynamic(4, owner="web2"),
            fixed(1),
        ),
        (
            network("a", "10.2.0.0/29"),
            dynamic(1, owner="web1"),
            release(1),
            fixed(2, owner="web1"),
            release(2),
            dynamic(3, 4, 5, 6, 1, 2),
        ),
        (
            network("a", "10.2.0.0/24", "10.2.0.4/31"),
            fixed(5, owner="web1"),
            release(5),
            dynamic(4),
            release(4),
            dynamic(4, 5),
            none_left(),
        ),
    ),
    "the owner's last address must lie in the range": (
        (
            network("a", "10.2.0.0/24", "10.2.0.128/25"),
            fixed(9, owner="web1"),
            release(9),
            dynamic(128, owner="web1"),
        ),
    ),
    "the gateway is the first free address and leaves the cursor": (
        (
            network("a", "10.2.0.0/24"),
            dynamic(1, owner="gw"),
            dynamic(2, 3, 4),
            release(2, 3),
            dynamic(2, owner="gw"),
            dynamic(5),
        ),
        (
            network("a", "10.3.0.0/24", "10.3.0.252/30"),
            dynamic(252, owner="gw"),
            dynamic(253),
            fixed(1, owner="gw"),
        ),
    ),
    "an explicit address may lie outside the range and leaves the cursor": (
        (
            network("a", "10.2.0.0/24", "10.2.0.64/26"),
            fixed(200),
            in_use(200),
            fixed(65),
            in_use(65),
            fixed(1),
            in_use(1),
            dynamic(64, 66),
        ),
    ),
    "TestAuxAddresses: they are in the range or not, but in the subnet": (
        (
            network("a", "172.20.0.0/16", "172.20.2.0/24"),
            fixed("172.20.2.3", "172.20.0.3", "172.20.255.254"),
            out_of_range("172.21.0.3"),
            in_use("172.20.0.0", "172.20.255.255"),
        ),
    ),
    "an address that is not held is released without an error": (
        (
            network("a", "10.35.0.0/24"),
            fixed(9),
            release(9),
            release_again(9, 200, 0, "10.36.0.1"),
        ),
    ),
    "TestAddSubnets, moby#46756: no range of a subnet that is held whole": (
        (
            network("a", "10.0.0.0/8"),
            dynamic(1, owner="gw"),
            overlap("10.0.0.0/8"),
            overlap("10.128.0.0/9"),
            overlap("10.20.2.0/24"),
            overlap("10.0.0.0/8", "10.128.0.0/9"),
            network("b", "1003:1:2:3:4:5:6::/112"),
            overlap("1003:1:2:3::/64"),
        ),
    ),
    "TestDoublePoolRelease: it succeeds, also late; the built-in refuses it, dockerd logs that": (
        (
            network("a", "172.27.0.0/16"),
            remove("a"),
            remove_again("a"),
            network("b", "172.27.0.0/16"),
            remove_again("a"),
            dynamic(1),
            remove("b"),
            remove_again("b"),
        ),
    ),
    "TestAddReleasePoolID: a subnet goes with its last range, none of which stands alone": (
        (
            network("a", "10.0.0.0/8", "10.0.0.0/16"),
            network("b", "10.0.0.0/8", "10.1.0.0/16"),
            overlap("10.0.0.0/8"),
            remove("a"),
            overlap("10.0.0.0/8"),
            remove("b"),
            network("c", "10.0.0.0/8"),
            remove("c"),
            network("d", "10.0.0.0/8", "10.0.0.0/16"),
            overlap("10.0.0.0/16", "10.0.0.0/24"),
        ),
    ),
    "TestRequestFromSamePool: no address is held in two ranges": (
        (
            network("a", "10.0.0.0/8", "10.10.0.0/16"),
            overlap("10.0.0.0/8", "10.10.0.0/16"),
            network("b", "10.0.0.0/8", "10.10.0.0/17"),
            network("c", "10.0.0.0/8", "10.11.0.0/16"),
            switch_to("a"),
            dynamic("10.10.0.0", "10.10.0.1"),
            switch_to("b"),
            dynamic("10.10.0.2", "10.10.0.3"),
            switch_to("c"),
            dynamic("10.11.0.0"),
            in_use("10.10.0.0"),
        ),
    ),
    "TestIpamReleaseOnNetDriverFailures: pool, gateway, release of the pool, and again": (
        (
            network("a", "10.34.0.0/16"),
            fixed("10.34.255.254", owner="gw"),
            dynamic(1),
            remove("a"),
            remove_again("a"),
            network("b", "10.34.0.0/16"),
            fixed("10.34.255.254", owner="gw"),
            dynamic(1),
        ),
    ),
    "TestOverlappingRequests: host bits are cleared; a prefix that begins at zero is a size hint": (
        (
            network("a", "10.0.0.0/8"),
            overlap("10.0.0.0/8"),
            overlap("8.0.0.0/6"),
            overlap("10.0.0.0/6"),
            overlap("10.255.255.255/30"),
        ),
        (network("a", "16.0.0.0/4"), overlap("17.11.66.0/23")),
        (network("a", "128.0.0.0/1"), overlap("182.16.0.0/15")),
        (network("a", "128.0.0.0/2"), overlap("128.0.0.0/1")),
        (network("a", "64.0.0.0/6"), overlap("64.0.0.0/3")),
        (network("a", "112.0.0.0/6"), overlap("112.0.0.0/4")),
        (network("a", "192.0.0.0/2"), overlap("128.0.0.0/1")),
        (network("a", "95.0.0.0/8"), overlap("92.0.0.0/6")),
        (network("a", "10.3.255.255/32"), overlap("10.3.0.0/16")),
        (network("a", "25.173.144.0/20"), overlap("16.0.0.0/4")),
        (network("a", "10.4.0.0/31"), overlap("10.4.0.1/32")),
        (network("a", "8000::/1"), overlap("8fe8:e7c4:5779::/49")),
        (network("a", "f000::/4"), overlap("ffc7:6000::/19")),
        (network("a", "4000::/3"), overlap("4000::/2")),
        (network("a", "c000::/2"), overlap("8000::/1")),
        (network("a", "cf80::/9"), overlap("c000::/4")),
        (network("a", "fc00::1/128"), overlap("fc00::/7")),
        (network("a", "9287:2e20:5134:fab6:9061:a0c6:bfe3:9400/119"), overlap("8000::/1")),
        (network("a", "2001:db8::/48"), overlap("2001:db8::1/48")),
        (network("a", "10.0.0.0/8"), network("b", "11.0.0.0/8")),
        (network("a", "74.0.0.0/7"), network("b", "9.111.99.72/30")),
        (network("a", "110.192.0.0/10"), network("b", "16.0.0.0/10")),
        (network("a", "10.5.0.0/31"), network("b", "10.5.0.2/31")),
        (network("a", "10.6.0.0/32"), network("b", "10.6.0.1/32")),
        (network("a", "128.0.0.0/1"), network("b", "96.0.0.0/3")),
        (network("a", "8000::/1"), network("b", "4000::/2")),
        (network("a", "2001:db8::1/48"), network("b", "2001:db8:1::/48")),
        (network("a", "fd00::/64"), network("b", "fd00:0:0:1::/64")),
    ),
}

@on(InMemory, Reopened, Unix, Tcp)
class ConformanceCases(StageCases):
    """The cases of moby's tests of its own IPAM: allocator_test.go, remote_test.go and others."""

    def test_stories(self) -> None:
        for name, stories in STORIES.items():
            for number, steps in enumerate(stories):
                with self.subTest(name, number=number):
                    self.tell(steps)

    def tell(self, steps: tuple[Step, ...]) -> None:
        """Run the steps of a story; leave nothing for the next one, even after a failure."""
        story = Story(self)
        try:
            for step in steps:
                step.method(story, *step.arguments, **step.options)
        finally:
            story.end()

    def test_size_hints(self) -> None:
        """TestPredefinedPool and TestPredefinedPoolWithPreferredSubnetSize have these cases."""
        networks = []
        for hint, v6, options, length in (
                ("0.0.0.0/24", False, {}, 24),
                ("", False, {}, 24),
                ("0.0.0.0/25", False, {}, 25),
                ("::/72", False, {}, 72),
                ("::/72", True, {}, 72),
                ("", True, {}, 64),
                ("", False, {"gipam_v4ab": "26"}, 26),
                ("", True, {"gipam_v6ab": "80"}, 80),
                ("0.0.0.0/0", False, {}, 24),
                ("::/0", False, {}, 64),
                ("0.0.0.0/32", False, {}, 32),
                ("::/128", False, {}, 128),
                ("0.0.0.0/0", False, {"gipam_v4ab": "27"}, 27)):
            with self.subTest(hint, **options):
                _, subnet = self.request_pool(hint, "", v6, **options)
                networks.append(gipam.parse_prefix(subnet))
                self.assertEqual(networks[-1].prefixlen, length)
        for one, other in itertools.combinations(networks, 2):
            if one.version == other.version:
                self.assertFalse(one.overlaps(other), (one, other))

    def test_wrong_size_hints(self) -> None:
        for hint in ("/24", "0.0.0.0/AB", "0.0.0.0/33", "0.0.0.0/1", "0.0.0.0", "::/129", "::/1"):
            with self.subTest(hint):
                self.assert_refused("invalid address pool: ", self.caller.request_pool, hint)

    def test_replies_have_the_shape_that_dockerd_decodes(self) -> None:
        """TestGetCapabilities, TestGetDefaultAddressSpaces, TestRemoteDriver, TestGet check this.

        TestDockerNetworkIPAMOptions: Docker sends null for config-from, and gipam ignores the
        options of other drivers.
        """
        pool = self.caller.call("IpamDriver.RequestPool", AddressSpace="gipam", V6=False,
                                Pool="10.20.30.40/22", SubPool="10.20.30.0/24", Options=None)
        pool_id = pool["PoolID"]
        self.assertEqual(pool, {"PoolID": pool_id, "Pool": "10.20.28.0/22", "Data": {}})
        options = {"x": "y\n", "gipam": "z".ljust(300)}
        capabilities = {"RequiresMACAddress": True, "RequiresRequestReplay": False}
        spaces = {"LocalDefaultAddressSpace": "gipam", "GlobalDefaultAddressSpace": "gipam"}
        here = {"PoolID": pool_id}
        # This address is outside the range, as an auxiliary one may be.
        fixed_here = {"PoolID": pool_id, "Address": "10.20.29.5"}
        for method, arguments, reply in (
                ("Plugin.Activate", {}, ACTIVATED),
                ("IpamDriver.GetCapabilities", {}, capabilities),
                ("IpamDriver.GetDefaultAddressSpaces", {}, spaces),
                ("IpamDriver.RequestAddress", {"Options": options, **fixed_here},
                 {"Address": "10.20.29.5/22", "Data": {}}),
                ("IpamDriver.RequestAddress", {"Address": "", **here},
                 {"Address": "10.20.30.0/22", "Data": {}}),
                ("IpamDriver.ReleaseAddress", fixed_here, {}),
                ("IpamDriver.ReleasePool", here, {})):
            with self.subTest(method):
                self.assertEqual(self.caller.call(method, **arguments), reply)

    def test_unknown_pools(self) -> None:
        """TestOtherRequests of null_test.go: requests are refused, releases are accepted."""
        for unknown in ("x", "LocalDefault/10.0.0.0/8", "10.0.0.0/8#1234",
                        "10.0.0.0/8,11.0.0.0/8#0123456789abcdef"):
            self.assert_refused("cannot find address pool for ", self.caller.request_address,
                                unknown)
            self.caller.release_address(unknown, "10.0.0.1")
            self.caller.release_pool(unknown)

    def test_names_of_any_kind(self) -> None:
        """TestEndpointNameLabel and TestNetworkMarshalling check names."""
        names = ["web", "naïve café ☕", "\U0001f40b", "'\"\\ {}%s", "".ljust(255, "x")]
        for number, name in enumerate(names):
            pool_id = self.pool(f"10.3{number}.0.0/24", gipam_name=name)
            self.caller.request_address(pool_id, name=name, mac="02:42:0a:00:00:01")
        pools = self.state()["pools"]
        self.assertEqual([pool["name"] for pool in pools], names)
        self.assertEqual([pool["addresses"][0]["name"] for pool in pools], names)


NO_JSON = (b"\n", b"{", b"nul", b"{'PoolID': 'x'}", b"{}{}", b'{"PoolID":"\xff"}', b"\x00",
           b"\x1f\x8b\x08", b"[".ljust(100_000, b"["), b"PoolID=x", b'{"PoolID":"x",}',
           b'{"PoolID":"a\nb"}')
NO_OBJECT = (b"[]", b"null", b"1", b'"{}"', b"true", b"NaN", b'[{"PoolID":"x"}]')
BAD_BODIES = {
    b"": "the request has no body: dockerd lost it in a retry; run the command again",
    **dict.fromkeys(NO_JSON, "the body is not JSON"),
    **dict.fromkeys(NO_OBJECT, "the body is not a JSON object"),
}
CALLS: dict[str, dict[str, Any]] = {  # that take arguments
    "/IpamDriver.RequestPool": {
        "AddressSpace": "gipam", "Pool": "", "SubPool": "", "Options": {}, "V6": False},
    "/IpamDriver.ReleasePool": {"PoolID": "x"},
    "/IpamDriver.RequestAddress": {"PoolID": "x", "Address": "", "Options": {}},
    "/IpamDriver.ReleaseAddress": {"PoolID": "x", "Address": "10.0.0.1"},
    "/Gipam.Release": {"PoolID": "x", "Address": "10.0.0.1", "Seq": 1},
    "/Gipam.Adopt": {"Subnet": "10.9.0.0/24", "SubPool": "", "Name": "", "Seq": 1, "Leases": [
        {"Address": "10.9.0.9", "Kind": "endpoint", "MAC": "", "Name": "", "Explicit": False}]},
}
OPTIONS = {  # that gipam reads; it ignores others
    "/IpamDriver.RequestAddress": (gipam.ENDPOINT_NAME, gipam.ENDPOINT_MAC),
    "/IpamDriver.RequestPool": (gipam.NAME_OPTION, gipam.SHARED_OPTION,
                                *gipam.LENGTH_OPTIONS.values()),
}
WRONG_VALUES: dict[str, list[Any]] = {  # of the right type, but wrong
    "PoolID": [""], "Subnet": [""], "AddressSpace": ["x"],
    "Leases": [["10.9.0.9"], [{}], [{"Kind": 5}]],
}


def wrong_values(path: str, key: str, value: Any, text: str) -> Iterator[Any]:
    """Yield wrong values for an argument in place of the value, also the text wherever it fits."""
    samples: tuple[Any, ...] = (None, True, 0, 1.5, [text], {text: 1})
    for sample in samples:
        is_option = key == "Options" and sample in (None, {text: 1})
        if type(sample) is not type(value) and not is_option:
            yield sample
    yield text
    yield from WRONG_VALUES.get(key, [])
    if key == "Options":
        for option in OPTIONS[path]:
            for wrong in (text, 1, None):
                yield {option: wrong}
    if key == "Leases":
        for name in value[0]:
            yield [{**value[0], name: text}]


def wrong_calls(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each call with one argument that is wrong or has this text, which none may have."""
    yield "/IpamDriver.RequestPool", {"Options": {"gipam." + text: "1"}}
    for path, usual in CALLS.items():
        for key, value in usual.items():
            for wrong in wrong_values(path, key, value, text):
                yield path, {**usual, key: wrong}


@on(InMemory, Unix, Tcp)
class BadInputCases(StageCases):
    """TestRequestSyntaxCheck: an invalid request is refused with its error, and changes nothing."""

    def assert_answer(self, path: str, body: bytes, status: int, text: str,
                      verb: str = "POST") -> None:
        with self.subTest(path=path, verb=verb, body=body[:99]):
            reply_status, reply = self.caller.post(path, body, verb)
            self.assertEqual((reply_status, sorted(reply)), (status, ["Err", "Error"]), reply)
            self.assertEqual(reply["Err"], reply["Error"])
            self.assertEqual(reply["Error"][:len(text)], text)

    def setUp(self) -> None:
        super().setUp()
        self.caller.request_address(self.pool("10.40.0.0/24"))
        self.addCleanup(self.assert_unchanged, self.state())

    def assert_unchanged(self, before: Any) -> None:
        self.assertEqual(self.state(), before)

    def test_body_that_is_no_object(self) -> None:
        """An empty body is dockerd's retry of a request that it lost (moby#39331)."""
        for path, (body, text) in itertools.product(CALLS, BAD_BODIES.items()):
            self.assert_answer(path, body, 400, text)

    def test_unknown_method(self) -> None:
        paths = ("/", "/IpamDriver.Nope", "/ipamdriver.requestpool", "/IpamDriver.RequestPool/",
                 "/VolumeDriver.List", "/NetworkDriver.CreateNetwork", "/%2f", "*", "/#x")
        for path, verb in itertools.product(paths, ("POST", "GET")):
            text = f"unknown method {path!r}: this is an IPAM driver"
            self.assert_answer(path, b"{}", 404, text, verb)

    def test_wrong_verb(self) -> None:
        paths = ("/Plugin.Activate", "/IpamDriver.GetCapabilities", *CALLS)
        verbs = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")
        for path, verb in itertools.product(paths, verbs):
            text = f"{path} takes POST, not {verb}"
            self.assert_answer(path, b'{"Pool":""}', 405, text, verb)


class RefusalTextTest(StageCases, unittest.TestCase):
    """The refusals of the API, word for word; ErrorTextTest has those of the Allocator."""

    stage = InMemory

    def check(self, method: str, status: int, text: str, **arguments: Any) -> None:
        """Check the reply to a call, which changes nothing."""
        before = self.state()
        body = json.dumps(arguments).encode()
        with self.subTest(method=method, arguments=arguments):
            reply = self.caller.post("/IpamDriver." + method, body)
            self.assertEqual(reply, (status, {"Err": text, "Error": text}))
        self.assertEqual(self.state(), before)

    def test_pools(self) -> None:
        for text, arguments in (
                ("invalid address space: 'other' is not 'gipam'", {"AddressSpace": "other"}),
                (f"invalid address pool: '10.9.0.0' {NOT_A_PREFIX}", {"Pool": "10.9.0.0"}),
                (f"invalid address pool: '10.9.0.0/255.255.0.0' {NOT_A_PREFIX}",
                 {"Pool": "10.9.0.0/255.255.0.0"}),
                (f"invalid address pool: 'fe80::%eth0/64' {NOT_A_PREFIX}",
                 {"Pool": "fe80::%eth0/64"}),
                (f"invalid address subpool: 'x' {NOT_A_PREFIX}",
                 {"Pool": "10.8.0.0/24", "SubPool": "x"}),
                ("invalid address subpool: 10.8.0.0/25 needs the subnet that contains it",
                 {"SubPool": "10.8.0.0/25"}),
                ("invalid address pool: 10.8.0.0/24 with V6 True",
                 {"Pool": "10.8.0.0/24", "V6": True}),
                ("Pool is not a string: dict", {"Pool": {"a": {}}}),
                ("Pool is not a string: 5", {"Pool": 5})):
            self.check("RequestPool", 400, text, **arguments)

    def test_options_of_pools(self) -> None:
        known = "gipam has gipam.name, gipam.v4ab, gipam.v6ab, gipam.shared"
        length = "is not a prefix length"
        for text, options in (
                ("Options is not a map of strings: list", [[1]]),
                (f"unknown option 'gipam.v4': {known}", {"gipam.v4": "24"}),
                (f"unknown option 'gipam.': {known}", {"gipam.": "", "x": "y"}),
                (f"option gipam.v4ab {length}: '/26'", {"gipam.v4ab": "/26"}),
                (f"option gipam.v6ab {length}: ''", {"gipam.v6ab": ""}),
                ("gipam.name is longer than 255 characters",
                 {"gipam.name": "".ljust(256, "x")}),
                ("gipam.name has unprintable characters: 'a\\nb'", {"gipam.name": "a\nb"})):
            self.check("RequestPool", 400, text, Options=options)
        text = "invalid address pool: the IPv6 bases have blocks of /56 to /128, not of /129"
        self.check("RequestPool", 400, text, V6=True, Options={"gipam.v6ab": "129"})

    def test_addresses(self) -> None:
        pool_id = self.pool("10.9.0.0/24")
        for address in ("10.9.0", "10.9.0.5/24"):
            text = f"invalid address: {address!r} is not a bare IP address"
            self.check("RequestAddress", 400, text, PoolID=pool_id, Address=address)
        text = "cannot find address pool for 'x': no pool has this id"
        self.check("RequestAddress", 404, text, PoolID="x")
        options = {gipam.ENDPOINT_NAME: "".ljust(256, "x")}
        text = f"{gipam.ENDPOINT_NAME} is longer than 255 characters"
        self.check("RequestAddress", 400, text, PoolID=pool_id, Options=options)
        text = "Address is empty or missing"
        self.check("ReleaseAddress", 400, text, PoolID=pool_id, Address="")
        text = "invalid address: '10.9.0.256' is not a bare IP address"
        self.check("ReleaseAddress", 400, text, PoolID=pool_id, Address="10.9.0.256")

    def test_bug(self) -> None:
        """A request that raises an unexpected exception gets a reply, and the log the traceback."""
        error = ZeroDivisionError("nobody expected it")
        with mock.patch.object(self.caller.service, "release", side_effect=error), \
                self.assertLogs("gipam", "ERROR") as logged:
            text = "internal error of gipam: see its log"
            self.check("ReleasePool", 500, text, PoolID="x")
        self.assertIn("nobody expected it", logged.output[0])

    def test_text_that_cannot_be_kept_or_printed(self) -> None:
        """An unprintable text never reaches disk, log or status, and stops no encoder."""
        before = self.state()
        for text in ("\ud800", "a\ud83d", "a\nb", "\x1b[31m", "\x00", "\x7f", "\u2028", "\u202e",
                     "".ljust(256, "x"), "".ljust(10**6, "x")):
            for path, arguments in wrong_calls(text):
                with self.subTest(path, text=text[:9], arguments=str(arguments)[:99]):
                    self.assert_harmless(path, arguments)
        self.assertEqual(self.state(), before)

    def assert_harmless(self, path: str, arguments: Any) -> None:
        """Check that reply and log line of a refused call are short and printable."""
        with self.assertLogs("gipam") as logged:
            status, reply = self.caller.post(path, json.dumps(arguments).encode())
        self.assertEqual((status, reply["Error"].isprintable()), (400, True), reply)
        self.assertLess(len(reply["Error"]), 1000)
        label = f"refused {gipam.METHODS[path].label}: "
        (line,) = [line for line in logged.output if label in line]
        self.assertTrue(line.isprintable(), line)
        self.assertLess(len(line), 2000)

    def test_routes_of_the_host_are_read_at_each_request(self) -> None:
        """BlockOrderTest shows which blocks are skipped (TestDynamicPoolAllocation)."""
        client = InMemory(self, v4="192.168.0.0/21")
        for routes, block in (("", 0), ("192.168.1.0/24 192.168.2.7/32", 3),
                              ("192.168.5.0/24", 4), ("", 5)):
            client.kernel.routes = routes
            self.assertEqual(client.request_pool()[1], f"192.168.{block}.0/24")

    def test_routes_that_cannot_be_read_are_an_error_of_the_request(self) -> None:
        client = InMemory(self, v4="192.168.0.0/21")
        error = OSError(errno.EMFILE, "Too many open files")
        client.service.netlink = mock.Mock(side_effect=error)
        text = "^cannot ask the kernel for the routes of this host: Too many open files; try again"
        with self.assertRaisesRegex(ErrorReply, text) as caught:
            client.request_pool()
        self.assertEqual(caught.exception.status, 503)


class NameMemoryTest(unittest.TestCase):
    """A gipam.name keeps its block and addresses when its network is gone, and over a restart."""

    def test_what_goes_with_its_pool_rests_too_though_the_cursor_wraps(self) -> None:
        """A `docker rm` without gipam releases nothing; a fixed .254 makes the cursor wrap."""
        client = InMemory(self, v4="10.2.0.0/16")
        pool_id, _ = client.request_pool(gipam_name="web")
        addresses = {"web1": "", "web2": "", "db": "10.2.0.254"}
        first = {name: client.request_address(pool_id, address, name=name)
                 for name, address in addresses.items()}
        client.release_pool(pool_id)
        client.open()
        pool_id, _ = client.request_pool(gipam_name="web")
        others = [client.request_address(pool_id) for _ in range(251)]
        self.assertEqual(others[0], "10.2.0.3/24")
        self.assertEqual(len({*others, *first.values()}), 254)
        again = {name: client.request_address(pool_id, name=name) for name in addresses}
        self.assertEqual(again, first)

    def test_each_owner_finds_its_address_again_whoever_starts_first(self) -> None:
        for name, subnet, limit, owners, numbers in (
                ("web", "", 256, "new mac web1 web2", "4 3 1 2"),
                # Other names and other blocks get nothing of it.
                ("lan", "10.2.0.0/24", 256, "mac", "1"),
                ("", "10.2.0.0/24", 256, "mac", "1"),
                ("web", "10.2.0.0/23", 256, "mac", "1"),
                # Only the latest owners are kept.
                ("web", "", 2, "web1 web2 mac", "1 2 3")):
            client = InMemory(self, v4="10.2.0.0/16")
            pool_id, _ = client.request_pool(gipam_name="web")
            for owner in ("web1", "web2", "mac"):
                cidr = client.request_address(pool_id, **OWNERS[owner])
                client.release_address(pool_id, cidr.partition("/")[0])
            with self.subTest(name, subnet=subnet, limit=limit), \
                    mock.patch.object(gipam, "MAX_SAVED_AFFINITIES", limit):
                client.release_pool(pool_id)
                client.open()
                pool_id, _ = client.request_pool(subnet, gipam_name=name)
                for owner, number in zip(owners.split(), numbers.split()):
                    cidr = client.request_address(pool_id, **OWNERS[owner])
                    self.assertEqual(cidr.partition("/")[0], f"10.2.0.{number}")


class ByHandTest(unittest.TestCase):
    """Calls of the commands, conditional on a record: /Gipam.Release and /Gipam.Adopt."""

    LEASE = {
        "Address": "10.9.0.2",
        "Kind": "endpoint",
        "MAC": "",
        "Name": "",
    }
    ADOPTION = {
        "Subnet": "10.9.0.0/24",
        "SubPool": "",
        "Leases": [LEASE],
        "Seq": 0,
    }
    CHANGED = "has changed since change .*: look again"

    def setUp(self) -> None:
        self.client = InMemory(self, v4="10.2.0.0/20")
        self.pool_id, _ = self.client.request_pool()
        self.client.request_address(self.pool_id, gateway=True)
        self.client.request_address(self.pool_id, mac="02:42:00:00:00:02")
        self.pool = self.read_pool()
        self.lease = self.pool["addresses"][1]

    def read_pool(self) -> Any:
        """Return the first pool of the status."""
        state = self.client.state()
        return state["pools"][0]

    def held(self) -> dict[str, list[str]]:
        """Return the addresses that are held, by their subnet."""
        held = {}
        state = self.client.state()
        for pool in state["pools"]:
            addresses = [lease["address"] for lease in pool["addresses"]]
            held[pool["subnet"]] = addresses
        return held

    def assert_refused(self, method: str, body: Any, pattern: str = "") -> None:
        """Check that a call is refused, and changes nothing."""
        statuses = (403,) if self.CHANGED in pattern else (400, 403)
        before = self.client.state()
        with self.subTest(method, body=body):
            with self.assertRaisesRegex(ErrorReply, pattern) as caught:
                self.client.call(method, **body)
            self.assertIn(caught.exception.status, statuses)
            self.assertEqual(self.client.state(), before)

    def test_release_is_conditional_on_the_sequence_number(self) -> None:
        pool_seq = self.pool["seq"]
        lease_seq = self.lease["seq"]
        for address, seq in (
                ("", pool_seq + 1),
                ("", lease_seq),
                ("10.2.0.2", pool_seq),
                ("10.2.0.2", lease_seq - 1),
                ("10.2.0.3", lease_seq),
                ("10.2.0.3", -1)):
            body = {"PoolID": self.pool_id, "Address": address, "Seq": seq}
            self.assert_refused("Gipam.Release", body, self.CHANGED)
        for address, seq, held in (
                ("10.2.0.2", lease_seq, {"10.2.0.0/24": ["10.2.0.1"]}),
                ("", pool_seq, {})):
            self.client.call("Gipam.Release", PoolID=self.pool_id, Address=address, Seq=seq)
            self.assertEqual(self.held(), held)

    def test_adoption_takes_addresses_that_are_not_held_and_leaves_the_others(self) -> None:
        leases = []
        for address in ("10.2.0.2", "10.2.0.3"):
            lease = {**self.LEASE, "Address": address}
            lease["MAC"] = "02:42:00:00:00:99"
            lease["Name"] = "other"
            leases.append(lease)
        seq = self.client.service.state.seq + 1
        for count in (1, 0):
            reply = self.client.call("Gipam.Adopt", Subnet="10.2.0.0/24", SubPool="",
                                     Leases=leases, Seq=self.pool["seq"])
            self.assertEqual(reply, {"Adopted": count, "Seq": seq})
        macs = {}
        for lease in self.read_pool()["addresses"]:
            macs[lease["address"]] = lease["mac"]
        self.assertEqual(macs["10.2.0.2"], self.lease["mac"])
        self.assertEqual(macs["10.2.0.3"], "02:42:00:00:00:99")

    def test_adoption_is_conditional_on_the_record_of_the_pool(self) -> None:
        seen = {
            "Subnet": "10.2.0.0/24",
            "SubPool": "",
            "Leases": [{**self.LEASE, "Address": "10.2.0.9"}],
            "Seq": self.pool["seq"],
        }
        # The next pool has the same subnet.
        self.client.release_pool(self.pool_id)
        self.client.request_pool("10.2.0.0/24")
        for change in (
                {},
                {"Seq": 0},
                {"Subnet": "10.9.0.0/24"},
                {"SubPool": "10.2.0.0/25"}):
            body = {**seen, **change}
            self.assert_refused("Gipam.Adopt", body, "pool .* " + self.CHANGED)
        seen["Seq"] = self.read_pool()["seq"]
        self.client.call("Gipam.Adopt", **seen)
        self.assertEqual(self.held(), {"10.2.0.0/24": ["10.2.0.9"]})

    def test_subnet_that_cannot_be_adopted(self) -> None:
        """wrong_values() has values of another type."""
        for change, pattern in (
                ({"Subnet": "10.9.0.0"}, "CIDR form"),
                ({"Subnet": "10.2.0.0/16"}, "Pool overlaps"),
                ({"SubPool": "10.8.0.0/25"}, "is not within")):
            body = {**self.ADOPTION, **change}
            self.assert_refused("Gipam.Adopt", body, pattern)
        for hint in ("0.0.0.0/0", "0.0.0.0/26", "::/0"):
            body = {**self.ADOPTION, "Subnet": hint, "Leases": []}
            self.assert_refused("Gipam.Adopt", body, "means any block of this length")

    def test_address_that_cannot_be_adopted(self) -> None:
        for address, pattern in (
                ("10.8.0.2", "^10.8.0.2 is not in 10.9.0.0/24$"),
                ("fd00::2", "^invalid address: 'fd00::2' is not")):
            lease = {**self.LEASE, "Address": address}
            body = {**self.ADOPTION, "Leases": [self.LEASE, lease]}
            self.assert_refused("Gipam.Adopt", body, pattern)

        leases = []
        for number in range(1, 252):
            lease = {**self.LEASE, "Address": f"10.9.0.{number}"}
            leases.append(lease)
        body = {**self.ADOPTION, "Leases": leases}
        self.assert_refused("Gipam.Adopt", body, "more than 100")

    def test_release_of_an_unknown_pool_or_of_an_address_of_the_other_family(self) -> None:
        seq = self.pool["seq"]
        for pool_id, address in (
                ("none", ""),
                (self.pool_id, "fd00::2")):
            body = {"PoolID": pool_id, "Address": address, "Seq": seq}
            self.assert_refused("Gipam.Release", body)


# === Server =======================================================================================
#
# ServedLoop is an event loop of this process with a listener; a Peer is a bare connection to it,
# for data no HTTP library would send. The tests go from one connection (heads, requests, limits)
# to the iteration of the loop, then to faults, checkpoints and the stop; random input comes last.
# HEADS is compared with the results of http.server.


def request(path: str, arguments: Any = None, *headers: str, verb: str = "POST") -> bytes:
    """Return a request as dockerd sends it, in one piece."""
    body = b""
    if arguments is not None:
        body = json.dumps(arguments).encode() + b"\n"
    head = (f"{verb} /{path} HTTP/1.1", "Host: plugin.moby.localhost",
            "User-Agent: Go-http-client/1.1", f"Content-Length: {len(body)}",
            "Accept: application/vnd.docker.plugins.v1.2+json", *headers, "", "")
    return "\r\n".join(head).encode() + body


def ask_for(pool_id: str, address: str = "") -> bytes:
    """Return a request for an address."""
    return request("IpamDriver.RequestAddress", {"PoolID": pool_id, "Address": address})


def new_pool(number: int) -> bytes:
    """Return a request for an explicit subnet."""
    return request("IpamDriver.RequestPool", {"Pool": f"10.66.{number}.0/24"})


ACTIVATE = request("Plugin.Activate")
ACTIVATED = {"Implements": ["IpamDriver"]}
NEW_POOL = new_pool(0)
PAGE = request("status?leases=1", verb="GET")
HEALTH = request("healthz", verb="GET")
SERVER_CLASSES = (gipam.UnixServer, gipam.Server)
ASK = b"POST /IpamDriver.RequestPool HTTP/1.1\r\n"


class Answer(NamedTuple):
    """A reply as it came over a bare connection."""

    status: int
    headers: dict[str, str]
    body: Any


ENDED = Answer(0, {}, None)  # in place of a reply: the connection ended


class Peer:
    """A bare connection."""

    def __init__(self, test: unittest.TestCase, address: Any) -> None:
        self.socket = connect(address)
        test.addCleanup(self.close)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes, is_last: bool = False) -> Peer:
        """Send the data; after the last of it, shut down the connection for writing."""
        # gipam may refuse the data, and close the connection, before all of it has arrived.
        with contextlib.suppress(OSError):
            self.socket.sendall(data)
            if is_last:
                self.socket.shutdown(socket.SHUT_WR)
        return self

    def answer(self, raw: bool = False) -> Answer:
        """Return the next reply, or ENDED at the connection's end; a raw body is not decoded."""
        with contextlib.suppress(ConnectionError):
            line = self.file.readline()
            if line:
                headers = self.read_headers()
                body: Any = self.file.read(int(headers.get("content-length", 0))) or None
                if body and not raw:
                    body = json.loads(body)
                return Answer(int(line.split()[1]), headers, body)
        return ENDED

    def read_headers(self) -> dict[str, str]:
        """Return the headers of a reply."""
        headers: dict[str, str] = {}
        while True:
            line = self.file.readline().decode().strip()
            if not line:
                return headers
            name, value = line.lower().split(": ", 1)
            headers[name] = value

    def answers(self) -> list[Answer]:
        """Return all replies until the connection ends."""
        answers: list[Answer] = []
        while True:
            answer = self.answer()
            if answer == ENDED:
                return answers
            answers.append(answer)

    def statuses(self) -> list[int]:
        """Return the status of each reply until the connection ends."""
        return [answer.status for answer in self.answers()]

    def ask(self, data: bytes = ACTIVATE) -> Any:
        """Return the body of the reply to the data, None if there is none."""
        return self.send(data).answer().body

    def is_retired(self) -> bool:
        """Return whether the client can write no more; over TCP, whether the end has arrived."""
        try:
            self.socket.send(b"")
        except BrokenPipeError:
            return True
        return self.socket.family != socket.AF_UNIX and self.has_input()

    def has_input(self) -> bool:
        """Return whether a reply, or the end of the connection, has arrived."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def close(self, is_reset: bool = False) -> None:
        """Close the connection, in the ordinary way or by a reset."""
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if hasattr(self, "file"):
            self.file.close()
        self.socket.close()


def serve_in_thread(test: unittest.TestCase, loop: gipam.EventLoop) -> threading.Thread:
    """Run the loop in a thread until the test ends."""
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def end() -> None:
        loop.stop()
        thread.join()
        loop.close_callbacks()
        for connection in list(loop.connections):
            loop.close(connection)
        for server in loop.servers:
            server.server_close()
        for part in (loop._selector, loop._wakeup_receiver, loop._wakeup_sender):
            part.close()

    test.addCleanup(end)
    return thread


class ServedLoop:
    """An event loop with one listener, and clients of it.

    The test runs its iterations, or start() has a thread run them.
    """

    def __init__(self, test: Case, server_class: type[gipam.Server] = gipam.UnixServer,
                 **options: str) -> None:
        self.test = test
        self.caller = InMemory(test, **options)
        self.service = self.caller.service
        self.store = self.service.store
        self.loop = gipam.EventLoop(self.service)
        self.server = self.listen(server_class)

    def listen(self, server_class: type[gipam.Server],
               paths: frozenset[str] = frozenset()) -> gipam.Server:
        """Return another listener, on an address of its own."""
        address: Any = ("127.0.0.1", 0)
        if server_class.is_unix:
            address = os.path.join(make_directory(self.test), "sock")
        server = server_class(address, self.loop, paths=paths)
        self.test.addCleanup(server.server_close)
        self.loop.add_listener(server)
        return server

    def start(self) -> ServedLoop:
        """Let a thread run the loop."""
        serve_in_thread(self.test, self.loop)
        return self

    def peer(self, data: bytes = b"", is_last: bool = False) -> Peer:
        """Return a peer that has sent the data."""
        return Peer(self.test, self.server.server_address).send(data, is_last)

    def peers(self, count: int, data: bytes = b"") -> list[Peer]:
        """Return some peers that have sent the data."""
        return [self.peer(data) for _ in range(count)]

    def answered_peers(self, count: int) -> list[Peer]:
        """Return this many peers that have been served once; the test runs the loop."""
        peers = self.peers(count, ACTIVATE)
        self.run_until_answered(peers)
        for peer in peers:
            self.test.assertEqual(peer.answer().body, ACTIVATED)
        return peers

    def client(self) -> Client:
        """Return a client like dockerd."""
        client = Client(self.server.server_address)
        self.test.addCleanup(client.close)
        return client

    def add_pools(self, count: int) -> None:
        """Add pools, so that a page is long."""
        for number in range(count):
            subnet = f"10.{number >> 8}.{number & 255}.0/24"
            self.service.apply(gipam.PoolGrant(f"p{number}", subnet, "", "", 0, 0, -1))
        self.service.commit()

    def iterations(self, condition: str) -> Iterator[None]:
        """Run an iteration and yield, for a loop that breaks when the named condition holds."""
        for _ in sleeping_retry(condition):
            self.loop.run_once(0.01)
            yield

    def run_until(self, condition: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Run iterations until the function returns a true value."""
        for _ in self.iterations(condition):
            if function(*arguments):
                break

    def run_until_answered(self, peers: list[Peer]) -> None:
        """Run iterations until each peer has input."""
        for peer in peers:
            self.run_until("a reply", peer.has_input)

    def run_until_peers(self, count: int) -> None:
        """Run iterations until there are this many connections."""
        for _ in self.iterations(f"{count} connections"):
            if len(self.loop.connections) == count:
                break

    @contextlib.contextmanager
    def failing_commit(self) -> Iterator[None]:
        """Let the next commit fail."""
        error = gipam.StoreError("the disk is full")
        with failing_once(self.store, "append", error), self.test.assertLogs("gipam", "ERROR"):
            yield

    @contextlib.contextmanager
    def failing_registration(self) -> Iterator[list[str]]:
        """Let the selector not take the next connection; yield the log."""
        error = OSError(errno.ENOMEM, "Cannot allocate memory")
        with failing_once(self.loop._selector, "register", error), \
                self.test.assertLogs("gipam", "ERROR") as logged:
            yield logged.output

    def ask(self, peer: Peer, data: bytes) -> Answer:
        """Send a request, run the loop, and return the reply, whose body is not decoded."""
        peer.send(data)
        self.run_until("a reply", peer.has_input)
        return peer.answer(raw=True)

    def connection(self) -> gipam.ClientConnection:
        """Return the one connection that there is."""
        (connection,) = self.loop.connections
        return connection

    def wait_for_peers(self, count: int) -> None:
        """Wait until the loop, which runs in a thread, has this many connections."""
        for _ in sleeping_retry(f"{count} connections"):
            if len(self.loop.connections) == count:
                break

    def state_on_disk(self) -> Any:
        """Return the state that a restart would find, once no checkpoint is running."""
        for _ in sleeping_retry("a checkpoint"):
            if not self.service.needs_checkpoint():
                break
        if self.loop._checkpoint_thread:
            self.loop._checkpoint_thread.join()
        self.caller.open()
        return self.caller.state()


class FaultTest(Case):
    """A fault ends only the connection or call in which it occurs, and never counts as success."""

    def test_reply_of_a_failed_commit_is_never_a_success(self) -> None:
        """In old versions a leftover reply got the number of another change: 200 was sent twice."""
        served = ServedLoop(self)
        pool_id = served.caller.request_pool("10.2.0.0/24")[0]
        broken, first, second = served.answered_peers(3)
        broken.send(ACTIVATE)
        first.send(ask_for(pool_id, "10.2.0.77"))
        error = MemoryError()
        with served.failing_commit(), failing_once(gipam.ClientConnection, "send", error):
            served.loop.run_once(1.0)

        second.send(ask_for(pool_id, "10.2.0.77"))
        served.run_until("a reply", second.has_input)
        statuses = [peer.answer().status for peer in (broken, first, second)]
        self.assertEqual(statuses, [0, 503, 200])

    def test_connection_that_cannot_wait_to_send_is_closed_alone(self) -> None:
        served = ServedLoop(self)
        broken, other = served.answered_peers(2)
        broken.send(ACTIVATE)
        other.send(NEW_POOL)
        with served.failing_registration(), mock.patch.object(gipam.ClientConnection, "send"):
            served.loop.run_once(1.0)
        served.run_until("a reply", other.has_input)
        self.assertEqual([broken.answer().status, other.answer().status], [0, 200])

    def test_failed_commit_fails_all_that_the_iteration_decided(self) -> None:
        served = ServedLoop(self)
        peers = served.answered_peers(3)
        requests = (new_pool(1), request("IpamDriver.ReleasePool", {"PoolID": "none"}), ACTIVATE)
        for peer, data in zip(peers, requests):
            peer.send(data)
        with served.failing_commit():
            served.run_until_answered(peers)
        self.assertEqual([peer.answer().status for peer in peers], [503, 503, 503])
        self.assertEqual(served.service.state.seq, 0)

    def test_connection_that_the_selector_does_not_take_is_closed(self) -> None:
        """In old versions, a connection that the selector refused stayed open and unwatched."""
        served = ServedLoop(self)
        peer = served.peer(ACTIVATE)
        with served.failing_registration() as lines:
            served.loop.run_once(1.0)
        self.assertEqual(peer.answer(), ENDED)
        self.assertEqual(list(served.loop.connections), [])
        self.assertIn("Cannot allocate memory", lines[0])
        self.assertEqual(served.ask(served.peer(), ACTIVATE).status, 200)

    def test_reply_to_a_connection_that_gipam_has_closed_rolls_nothing_back(self) -> None:
        served = ServedLoop(self)
        (peer,) = served.answered_peers(1)
        commit = served.service.commit

        def close_and_commit() -> Any:
            for connection in list(served.loop.connections):
                served.loop.close(connection)
            return commit()

        peer.send(NEW_POOL)
        with mock.patch.object(served.service, "commit", close_and_commit):
            served.run_until_peers(0)
        served.loop.run_once(0.0)
        self.assertEqual(peer.answer(), ENDED)
        self.assertEqual(len(served.service.state.pools), 1)

    def test_unexpected_exception_ends_its_connection_callback_or_timer(self) -> None:
        def page(*arguments: Any) -> Iterator[str]:
            for _ in range(9):
                yield "x".ljust(gipam.CHUNK_BYTES, "x")
            bug()

        bug = mock.Mock(side_effect=ZeroDivisionError)
        self.patch(gipam, TIMER_INTERVAL_S=0.02)
        self.patch(gipam.ClientConnection, handle_expect_100=bug)
        pages = {"/status": gipam.Page("text/plain", page)}
        served = ServedLoop(self)
        served.loop.add_timer(bug)
        served.start()
        with mock.patch.dict(gipam.PAGES, pages), self.assertLogs("gipam") as logged:
            self.assertTrue(served.peer(PAGE).file.read().endswith(b"x"))
            waiting = served.peer(request("x", None, "Expect: 100-continue"))
            self.assertEqual(waiting.file.read(), b"")
            self.assertRaises(ZeroDivisionError, served.loop.run_in_loop, bug)
            for _ in sleeping_retry("a timer"):
                if len(logged.output) > 3:
                    break
        self.assertIn("Traceback", logged.output[0])
        self.assertEqual(served.peer().ask(), ACTIVATED)

    def test_exception_that_belongs_to_nobody_ends_gipam_at_once(self) -> None:
        """Old versions ended only after ten failed iterations in a row."""
        served = ServedLoop(self)
        peer = served.peer(ACTIVATE)
        error = ZeroDivisionError()
        with failing_once(served.loop, "_accept", error), \
                self.assertLogs("gipam", "ERROR") as logged:
            served.loop.run_once(1.0)
        self.assertIn("Traceback", logged.output[0])
        fatal = served.store.fatal_error
        self.assertEqual(fatal and fatal.exit_status, 74)
        served.loop.run_forever()
        served.loop.drain(mock.Mock())
        self.assertNotEqual(peer.answer().status, 200)

    def test_health_comes_back_without_a_change(self) -> None:
        """Old versions replied 503 until the next change, although the disk was well again."""
        self.patch(gipam, TIMER_INTERVAL_S=0.0)
        served = ServedLoop(self)
        docker, monitor = served.answered_peers(2)
        with served.failing_commit(), mock.patch.object(served.loop, "timers", []):
            self.assertEqual(served.ask(docker, NEW_POOL).status, 503)
            self.assertEqual(served.ask(monitor, HEALTH).status, 503)
        for _ in served.iterations("a probe"):
            if not served.store.last_error:
                break
        self.assertEqual(served.ask(monitor, HEALTH).status, 200)
        self.assertEqual(served.service.state.seq, 0)

    def test_only_one_page_an_iteration_is_begun(self) -> None:
        """In old versions, 22 requests of /status on the UNIX socket cost one iteration 35 ms."""
        served = ServedLoop(self)
        peers = served.answered_peers(6)
        for peer in peers[1:]:
            peer.send(PAGE)
        with mock.patch.object(gipam, "describe_bases", wraps=gipam.describe_bases) as describe:
            for number in range(1, 6):
                peers[0].send(ACTIVATE)
                served.loop.run_once(1.0)
                self.assertEqual(describe.call_count, number)
                self.assertEqual(peers[0].answer().body, ACTIVATED)
        self.assertEqual([peer.answer().status for peer in peers[1:]], [200] * 5)

    def test_result_of_a_callback_waits_for_the_commit(self) -> None:
        """A callback's change is on disk before it returns, and the caller gets its exception."""
        served = ServedLoop(self).start()
        change = gipam.PoolGrant("p", "10.66.0.0/24", "", "", 0, 0, -1)
        served.loop.run_in_loop(served.service.apply, change)
        self.assertEqual(served.store.seq, 1)
        self.assertRaises(ZeroDivisionError, served.loop.run_in_loop, divmod, 1, 0)
        other = change._replace(pool_id="q", subnet="10.67.0.0/24")
        with failing_once(served.store, "append", gipam.StoreError("full")):
            self.assertRaises(gipam.StoreError, served.loop.run_in_loop,
                              served.service.apply, other)
        self.assertEqual(list(served.service.state.pools), ["p"])

    def test_out_of_descriptors_it_logs_that_and_waits(self) -> None:
        """Without descriptors gipam cannot even notify the service manager, but it goes on."""
        script = 'ulimit -n 32; exec "$@"'
        daemon = Daemon(self, command=("sh", "-c", script, "sh", sys.executable, GIPAM),
                        env={"NOTIFY_SOCKET": "/nowhere"}).start()
        peers = [Peer(self, daemon.socket).send(ACTIVATE) for _ in range(40)]
        text = "cannot accept connections: Too many open files"
        daemon.wait_for_log(f"(?s){text}.*{text}")
        for peer in peers[:20]:
            self.assertEqual(peer.answer().body, ACTIVATED)
            peer.close()
        self.assertEqual([peer.answer().body for peer in peers[20:]], [ACTIVATED] * 20)
        self.assertLess(daemon.read_log().count("cannot accept"), 10)
        self.assertNotIn("bug", daemon.read_log())
        self.assertEqual(daemon.stop(), 0)


def full_pipe(test: unittest.TestCase) -> int:
    """Return the end of a pipe that is full and that nobody reads."""
    reader, writer = os.pipe()
    test.addCleanup(os.close, reader)
    test.addCleanup(os.close, writer)
    os.set_blocking(writer, False)
    for data in (bytes(4096), b"x"):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, data)
    os.set_blocking(writer, True)
    return writer


class CheckpointThreadTest(Case):
    """The thread that writes the lease file while the loop serves."""

    def setUp(self) -> None:
        self.patch(gipam, CHECKPOINT_RETRY_S=0.0, TIMER_INTERVAL_S=0.0)
        self.served = ServedLoop(self)
        DirectClient(self.served.service).request_pool("10.66.0.0/24")

    def run_until_named(self) -> None:
        """Run the loop until the lease file names the segment."""
        for _ in self.served.iterations("a checkpoint"):
            if self.served.store.referenced_segment:
                break

    def test_thread_that_cannot_be_started_is_started_later(self) -> None:
        error = RuntimeError("can't start")
        with failing_once(threading.Thread, "start", error), \
                self.assertLogs(gipam.log, "WARNING") as logged:
            self.served.loop._start_checkpoint()
        self.assertIn("cannot start a checkpoint yet: can't start", logged.output[0])
        self.run_until_named()

    def test_checkpoint_that_failed_unexpectedly_is_tried_again(self) -> None:
        """In old versions the thread hung in Python's own hook, and no other thread was started."""
        with failing_once(gipam, "encode_snapshot", ZeroDivisionError()), \
                self.assertLogs(gipam.log, "ERROR") as logged:
            self.run_until_named()
        self.assertIn("Traceback", logged.output[0])
        self.assertEqual(glob.glob(self.served.caller.path + ".tmp"), [])

    def test_stop_ends_while_nobody_reads_stderr(self) -> None:
        """In old versions SIGTERM waited for ever for the thread of the checkpoint."""
        directory = make_directory(self)
        begun = os.path.join(directory, "begun")
        lines = ("import threading\n"
                 "def fail(*arguments, real=gipam.encode_snapshot, **options):\n"
                 "    if threading.current_thread() is threading.main_thread():\n"
                 "        return real(*arguments, **options)\n"
                 f"    open({begun!r}, 'w').close()\n"
                 "    1 / 0\n"
                 "gipam.encode_snapshot = fail")
        daemon = Daemon(self, command=launcher(directory, lines))
        stderr = full_pipe(self)
        daemon.process = subprocess.Popen([*daemon.command, *daemon.options], env=daemon.env,
                                          stderr=stderr)
        wait_until("gipam to serve", daemon.is_answering)
        daemon.client().request_pool("10.66.0.0/24")
        wait_until("a checkpoint to begin", os.path.exists, begun)
        self.assertEqual(daemon.stop(), 0)


# Invalid requests -> the status of the refusal. HEADS has more.
BAD_LENGTHS = ("-1", "+5", "5x", "", "5, 5", "5 5", "0x5", "1e3", "5.0", "\u0665", "9" * 20,
               "5\r\nContent-Length: 5", "5\r\nContent-Length: 6",
               "5\r\nTransfer-Encoding: chunked")
CODINGS = (b"chunked", b"gzip", b"identity", b"chunked, gzip", b"gzip, chunked", b"")
CHUNKED_BODY = b'\r\n\r\n17\r\n{"Pool":"10.9.0.0/24"}\r\n0\r\n\r\n'
TOO_LONG = (gipam.MAX_BODY_BYTES + 1, 10**15)
NO_REQUESTS: dict[int, list[bytes]] = {
    400: [b"POST\r\n\r\n", b"\x1d\n", b" \t\r\n\r\n", b"\xa0\n", b"\r\n\r\n\r\n"],
    411: [ASK + b"Transfer-Encoding: " + coding + CHUNKED_BODY for coding in CODINGS],
    413: [ASK + b"Content-Length: %d\r\n\r\n" % length + bytes(gipam.MAX_BODY_BYTES)
          for length in TOO_LONG],
}
for bad_length in BAD_LENGTHS:
    NO_REQUESTS[400].append(ASK + f"Content-Length: {bad_length}\r\n\r\n{{}}   ".encode())


class ConnectionTest(Case):
    """Requests and replies on a connection, the same on a UNIX socket and over TCP."""

    server_class: type[gipam.Server] = gipam.UnixServer

    def setUp(self) -> None:
        self.served = ServedLoop(self, self.server_class).start()

    def assert_rejected(self, data: bytes, status: int) -> None:
        """Check that the data is refused, no data behind it is served, and nothing changes."""
        with self.subTest(data[:60]):
            (answer,) = self.served.peer(data + NEW_POOL, is_last=True).answers()
            self.assertEqual((answer.status, answer.headers["connection"]), (status, "close"))
            self.assertEqual(sorted(answer.body), ["Err", "Error"])
            self.assertEqual(self.served.service.state.seq, 0)

    def test_connection_is_kept(self) -> None:
        rows = (
            (200, ACTIVATE),
            (400, request("IpamDriver.ReleasePool", {})),
            (404, request("x")),
            (405, request("status")),
        )
        peer = self.served.peer()
        for status, data in rows * 3:
            answer = peer.send(data).answer()
            self.assertEqual(answer.status, status)
            self.assertNotIn("connection", answer.headers)
            content_type = answer.headers["content-type"]
            self.assertEqual(content_type, "application/vnd.docker.plugins.v1.2+json")
        peer.send(request("Plugin.Activate", None, "Connection: close"))
        self.assertEqual([answer.body for answer in peer.answers()], [ACTIVATED])

    def test_what_is_not_a_request_is_rejected(self) -> None:
        for status, rows in NO_REQUESTS.items():
            for data in rows:
                self.assert_rejected(data, status)

    def test_head_that_cannot_become_a_request_is_rejected_without_waiting(self) -> None:
        for data, status in ((ASK + b"X: y\r\n" * 50_000, 431), (b"GET /metrics\r\n", 505)):
            self.assertEqual(self.served.peer(data).statuses(), [status])

    def test_request_in_single_bytes(self) -> None:
        peer = self.served.peer()
        for byte in NEW_POOL:
            peer.send(bytes([byte]))
        self.assertEqual(peer.answer().status, 200)

    def test_line_of_http_0_9_in_two_pieces(self) -> None:
        peer = self.served.peer(b"GET /met")
        self.served.wait_for_peers(1)
        connection = self.served.connection()
        for _ in sleeping_retry("the first piece"):
            if connection.reader.scanned == 8:
                break
        self.assertEqual(peer.send(b"rics\r\n").statuses(), [505])

    def test_requests_in_one_piece_are_answered_in_turn(self) -> None:
        """RFC 9112 section 2.2: an empty line before a request should be ignored."""
        head = b"POST /IpamDriver.ReleasePool HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
        body = b'{"PoolID":"x"}'
        limit = gipam.MAX_BODY_BYTES
        longest = head % limit + body.ljust(limit)
        for data, statuses in (
                (NEW_POOL * 2 + new_pool(1) + ask_for(""), [200, 403, 200, 400]),
                (b"\r\n" + ACTIVATE, [200]),
                (b"\n" + ACTIVATE, [200]),
                (longest + ACTIVATE, [200, 200]),
                (head % 99 + body, [400])):
            with self.subTest(data[:60]):
                self.assertEqual(self.served.peer(data, is_last=True).statuses(), statuses)

    def test_client_that_waits_for_a_go_ahead(self) -> None:
        peer = self.served.peer(b"POST /IpamDriver.ReleasePool HTTP/1.1\r\n"
                                b"Expect: 100-continue\r\nContent-Length: 14\r\n\r\n")
        self.assertEqual(peer.answer().status, 100)
        self.assertEqual(peer.ask(b'{"PoolID":"x"}'), {})

    def test_page_for_a_client_that_need_not_have_waited(self) -> None:
        """In old versions, the page never came if the body had arrived already."""
        peer = self.served.peer(b"GET /status HTTP/1.1\r\n"
                                b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
        self.assertEqual(peer.answer().status, 100)
        self.assertEqual(peer.answer().status, 200)

    def test_reply_to_head_has_no_body(self) -> None:
        """A client would take the bytes of a body for the next reply."""
        data = b"HEAD /Plugin.Activate HTTP/1.1\r\nConnection: close\r\n\r\n"
        reply = self.served.peer(data, is_last=True).file.read()
        head, _, body = reply.partition(b"\r\n\r\n")
        self.assertEqual((head.split()[1], body), (b"405", b""))


class ConnectionTcpTest(ConnectionTest):
    """Connections over TCP, which web pages can open, too."""

    server_class = gipam.Server

    def test_only_names_of_this_host_are_served(self) -> None:
        """A web page can give its own name the address of this host (DNS rebinding)."""
        hosts = {403: ("example.org", "example.org:9090", "localhost.example.org"),
                 200: ("127.0.0.1:9090", "127.0.0.1", "localhost:9090", "LOCALHOST",
                       "[::1]:9090", "plugin.moby.localhost", "")}
        for status, names in hosts.items():
            for name in names:
                with self.subTest(name):
                    for data in (ACTIVATE, PAGE):
                        data = data.replace(b"plugin.moby.localhost", name.encode())
                        self.assertEqual(self.served.peer(data).answer().status, status)

    def test_web_pages_are_refused(self) -> None:
        """A browser marks the requests of web pages by Origin or Sec-Fetch-Site."""
        requests = (("POST", "IpamDriver.RequestPool"), ("POST", "Plugin.Activate"),
                    ("GET", "status"), ("OPTIONS", "IpamDriver.RequestPool"))
        for header in ("Origin: http://example.org", "origin: null", "Origin:",
                       "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: none"):
            for verb, path in requests:
                self.assert_rejected(request(path, {"Pool": ""}, header, verb=verb), 403)


class ManyClientsTest(Case):
    def test_many_connect_at_once_and_nothing_is_given_twice(self) -> None:
        """TestRequestPoolParallel, TestParallelPredefinedRequest1-5, TestFullAllocateRelease.

        With a short backlog, parallel connects of dockerd fail with EAGAIN.
        """
        for server_class in SERVER_CLASSES:
            served = ServedLoop(self, server_class)
            pool_id = served.caller.request_pool("10.62.0.0/25")[0]
            block = request("IpamDriver.RequestPool", {"Options": {"gipam.v4ab": "22"}})
            peers = served.peers(70, block) + served.peers(130, ask_for(pool_id))
            served.start()
            bodies = [peer.answer().body for peer in peers]
            pools = sorted(body["Pool"] for body in bodies if "Pool" in body)
            addresses = sorted(body["Address"] for body in bodies if "Address" in body)
            with self.subTest(server_class.__name__):
                self.assertEqual(pools, sorted(f"198.18.{4 * at}.0/22" for at in range(64)))
                self.assertEqual(addresses, sorted(f"10.62.0.{at}/25" for at in range(1, 127)))


class RollBackTest(Case):
    """Grants whose reply never arrives, on a UNIX socket; LostReplyTest has the exceptions."""

    def setUp(self) -> None:
        self.patch(gipam, TIMER_INTERVAL_S=0.02)
        self.served = ServedLoop(self).start()
        self.docker = self.served.client()
        self.pool_id = self.docker.request_pool("10.63.0.0/24")[0]

    def assert_rolled_back(self, peer: Peer, data: bytes, is_answered: bool = True) -> None:
        """Let the peer ask and leave; check that this makes one change, and its release."""
        seq = self.docker.state()["seq"]
        before = held(self.served.service.state)
        append = self.served.store.append

        def leave_first(records: list[str]) -> None:
            if not is_answered:
                peer.close()
            append(records)

        with mock.patch.object(self.served.store, "append", leave_first):
            peer.send(data)
            if is_answered:
                wait_until("a reply", peer.has_input)
                peer.close()
            self.served.wait_for_peers(1)
        state = self.docker.state()
        self.assertEqual((state["seq"], held(self.served.service.state)), (seq + 2, before))
        self.assertEqual(self.served.state_on_disk()["pools"], state["pools"])

    def test_grant_that_the_client_has_not_read(self) -> None:
        """TestFailOnce: dockerd's retry has no body and cannot succeed."""
        requests = (NEW_POOL, ask_for(self.pool_id), ask_for(self.pool_id, "10.63.0.9"))
        with self.assertLogs("gipam") as logged:
            for is_answered, data in itertools.product((False, True), requests):
                with self.subTest(data, is_answered=is_answered):
                    self.assert_rolled_back(self.served.peer(), data, is_answered)
        self.assertEqual(["rolled back" in line for line in logged.output].count(True), 6)

    def test_only_the_unread_reply_is_rolled_back(self) -> None:
        """A grant whose reply was read stays, even one on the connection of the lost reply."""
        data = ask_for(self.pool_id)
        read, unread = self.served.peers(2)
        self.assertTrue(read.ask(data))
        self.assertTrue(unread.ask(data))
        read.close()
        self.assert_rolled_back(unread, data)
        self.assertEqual(held(self.served.service.state),
                         {self.pool_id: ["10.63.0.1", "10.63.0.2"]})

    def test_go_ahead_that_is_left_unread_rolls_nothing_back(self) -> None:
        peer = self.served.peer()
        self.assertTrue(peer.ask(ask_for(self.pool_id)))
        peer.send(ASK + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n")
        wait_until("100 Continue", peer.has_input)
        peer.close()
        self.served.wait_for_peers(1)
        self.assertEqual(held(self.served.service.state), {self.pool_id: ["10.63.0.1"]})


class LimitTest(Case):
    """On TCP a client that is stuck, or hostile, cannot starve Docker."""

    def test_past_the_bound_the_longest_idle_connection_goes(self) -> None:
        """A busy connection is kept; if all are busy, the new one is closed."""
        self.patch(gipam, MAX_TCP_CONNECTIONS=3)
        served = ServedLoop(self, gipam.Server).start()
        half = served.peer(NEW_POOL[:50])
        recent, idle = served.peers(2, ACTIVATE)
        self.assertEqual(recent.answer().body, ACTIVATED)
        self.assertEqual(idle.answer().body, ACTIVATED)
        self.assertEqual(recent.ask(), ACTIVATED)
        new = served.peer()
        self.assertEqual(new.ask(), ACTIVATED)
        self.assertEqual(idle.answer(), ENDED)
        for peer in (recent, new):
            peer.send(ACTIVATE[:50])
        served.loop.run_in_loop(bool)
        self.assertEqual(served.peer().answer(), ENDED)
        for peer, data in ((half, NEW_POOL), (recent, ACTIVATE), (new, ACTIVATE)):
            self.assertEqual(peer.send(data[50:]).answer().status, 200)

    def test_client_that_reads_no_replies_is_not_read_any_further(self) -> None:
        served = ServedLoop(self, gipam.Server)
        peer = served.peer()
        peer.socket.setblocking(False)
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                peer.socket.send(ACTIVATE * 3000)
            with contextlib.suppress(BlockingIOError):
                peer.socket.recv(1 << 16)
            served.loop.run_once(0.0)
        length = len(served.connection().reader.received)
        limit = gipam.MAX_HEAD_BYTES + gipam.MAX_BODY_BYTES + gipam.RECEIVE_BYTES
        self.assertLess(gipam.MAX_BODY_BYTES, length)
        self.assertLess(length, limit)

    def test_end_of_a_connection_rolls_nothing_back(self) -> None:
        """A reset proves nothing on TCP: firewalls and `ss -K` reset connections, too."""
        served = ServedLoop(self, gipam.Server).start()
        ways = itertools.product((True, False), (True, False))
        for number, (is_read, is_reset) in enumerate(ways, 1):
            with self.subTest(is_read=is_read, is_reset=is_reset):
                peer = served.peer(new_pool(number))
                wait_until("a reply", peer.has_input)
                if is_read:
                    self.assertEqual(peer.answer().status, 200)
                peer.close(is_reset)
                served.wait_for_peers(0)
                served.loop.run_in_loop(bool)
                self.assertEqual(len(served.service.state.pools), number)

    def test_slow_request_is_given_up_on_tcp(self) -> None:
        self.patch(gipam, REQUEST_TIMEOUT_S=0.01, TIMER_INTERVAL_S=0.02)
        served = ServedLoop(self, gipam.Server).start()
        new, idle = served.peers(2)
        self.assertEqual(idle.ask(), ACTIVATED)
        for part in (b"P", ACTIVATE[:30], ACTIVATE[:-2], NEW_POOL[:50], NEW_POOL[:-1]):
            with self.subTest(part):
                self.assertEqual(served.peer(part).answer(), ENDED)
        # A client that asks for nothing is not overdue.
        self.assertEqual((new.ask(), idle.ask()), (ACTIVATED, ACTIVATED))

    def test_unix_socket_is_not_limited(self) -> None:
        """The UNIX socket belongs to Docker, so gipam limits neither connections nor time."""
        self.patch(gipam, REQUEST_TIMEOUT_S=0.01, TIMER_INTERVAL_S=0.02, MAX_TCP_CONNECTIONS=4)
        served = ServedLoop(self)
        timer = mock.Mock()
        served.loop.add_timer(timer)
        served.start()
        peers = served.peers(50, ACTIVATE[:9])
        for _ in sleeping_retry("timers to run"):
            if timer.call_count > 9:
                break
        self.assertEqual([peer.ask(ACTIVATE[9:]) for peer in peers], [ACTIVATED] * 50)


class IterationTest(Case):
    """The event loop, one iteration after the other."""

    def test_reply_is_sent_in_one_piece(self) -> None:
        """Two pieces cost 40 ms on TCP. The test watches send(), because a stream joins pieces."""
        statuses = {
            ACTIVATE: 200,
            NEW_POOL: 200,
            request("IpamDriver.ReleasePool"): 400,
            request("nope"): 404,
            request("status", verb="GET"): 200,
            b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n": 400,
        }
        sent: list[int] = []
        real = socket.socket.send

        def send(sock: socket.socket, data: bytes) -> int:
            is_prompt = sock.family == socket.AF_UNIX or bool(
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            if data.startswith(b"HTTP"):
                sent.append(int(data.split()[1]) if is_prompt else 0)
            return real(sock, data)

        for server_class in SERVER_CLASSES:
            sent.clear()
            with self.subTest(server_class.__name__), \
                    mock.patch.object(socket.socket, "send", send):
                served = ServedLoop(self, server_class)
                peer = served.peer(b"".join(statuses))
                served.run_until_peers(0)
                self.assertEqual(peer.statuses(), list(statuses.values()))
                self.assertEqual(sent, list(statuses.values()))

    def test_all_requests_of_an_iteration_are_one_record(self) -> None:
        served = ServedLoop(self)
        peers = served.answered_peers(9)
        for number, peer in enumerate(peers):
            peer.send(new_pool(number))
        with mock.patch.object(served.store, "append", wraps=served.store.append) as append:
            served.loop.run_once(1.0)
        self.assertEqual([len(call[0][0]) for call in append.call_args_list], [9])
        self.assertEqual([peer.answer().status for peer in peers], [200] * 9)

    def test_proxy_entries_are_synced_after_the_commit_and_before_the_reply(self) -> None:
        seen: list[bool] = []

        def sync(state: gipam.State) -> None:
            if state.seq:
                seen.extend([served.store.seq == state.seq, peer.has_input()])

        served = ServedLoop(self)
        served.service.proxies = mock.Mock(pending={}, sync=sync)
        peer = served.peer(NEW_POOL)
        served.run_until("a reply", peer.has_input)
        self.assertEqual(seen[:2], [True, False])

    def test_proxy_entries_that_are_left_do_not_wait_for_events(self) -> None:
        served = ServedLoop(self)
        pending = {entry_of("10.2.0.9"): True}
        served.service.proxies = mock.Mock(pending=pending)
        with mock.patch.object(served.loop._selector, "select", return_value=[]) as select:
            served.loop.run_once(1.0)
            pending.clear()
            served.loop.run_once(1.0)
        timeouts_s = [call.args[0] for call in select.call_args_list]
        self.assertEqual(timeouts_s, [0.0, 1.0])

    def test_client_that_has_just_asked_is_not_closed_for_a_new_one(self) -> None:
        self.patch(gipam, MAX_TCP_CONNECTIONS=2)
        served = ServedLoop(self, gipam.Server)
        (oldest,) = served.answered_peers(1)
        (other,) = served.answered_peers(1)
        oldest.send(NEW_POOL)
        served.peer()
        served.run_until("a reply", oldest.has_input)
        self.assertEqual((oldest.answer().status, other.answer()), (200, ENDED))

    def test_limited_number_is_accepted(self) -> None:
        served = ServedLoop(self)
        peers = served.peers(gipam.MAX_ACCEPTS + 9, ACTIVATE)
        served.loop.run_once(1.0)
        self.assertEqual(len(served.loop.connections), gipam.MAX_ACCEPTS)
        served.run_until_answered(peers)

    def test_request_is_decided_again_with_what_its_transaction_came_to(self) -> None:
        """No reply is sent before the last attempt, which sends it in its own iteration."""
        served = ServedLoop(self)
        submit = served.loop.submit_to_etcd = mock.Mock()
        (peer,) = served.answered_peers(1)
        required = gipam.TransactionRequired(mock.sentinel.transaction)
        with failing_once(served.service, "request_pool", required):
            peer.send(NEW_POOL)
            for _ in served.iterations("a request at etcd"):
                if submit.called:
                    break
        (pending,) = submit.call_args[0]
        self.assertFalse(peer.has_input())
        self.assertIsNone(pending.attempt(gipam.NO_OUTCOME))
        served.run_until("a reply", peer.has_input)
        self.assertEqual(peer.answer().status, 200)

    def test_request_that_waits_too_long_for_etcd_is_failed_once(self) -> None:
        self.patch(gipam, TIMER_INTERVAL_S=0.0, ETCD_TIMEOUT_S=0.0)
        served = ServedLoop(self)
        submit = served.loop.submit_to_etcd = mock.Mock()
        peer = served.peer(NEW_POOL)
        required = gipam.TransactionRequired(mock.sentinel.transaction)
        with failing_once(served.service, "request_pool", required):
            served.run_until("a reply", peer.has_input)
        self.assertEqual(peer.answer().status, 503)
        (pending,) = submit.call_args[0]
        self.assertIsNone(pending.attempt(gipam.NO_OUTCOME))
        self.assertEqual(served.service.state.seq, 0)


class PageTest(Case):
    """Pages cost milliseconds, which Docker does not wait for."""

    def serve_pools(self, count: int, server_class: type[gipam.Server]) -> ServedLoop:
        """Return a loop whose pages are long, and are sent in small pieces."""
        served = ServedLoop(self, server_class)
        served.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        served.add_pools(count)
        return served

    def test_page_is_made_as_it_is_taken(self) -> None:
        """A peer that does not read costs a chunk, not a page."""
        served = self.serve_pools(5000, gipam.UnixServer)
        peer = served.peer(PAGE)
        for _ in range(300):
            served.loop.run_once(0.0)
        self.assertLess(len(served.connection().unsent), 2 * gipam.CHUNK_BYTES)
        received = b""
        while not received.endswith(b"}]}"):
            served.loop.run_once(0.01)
            with contextlib.suppress(BlockingIOError):
                received += peer.socket.recv(1 << 20, socket.MSG_DONTWAIT)
        page = json.loads(received.partition(b"\r\n\r\n")[2])
        self.assertEqual(len(page["pools"]), 5000)

    def test_pages_that_nobody_reads_cost_nobody_else_and_end_in_time(self) -> None:
        self.patch(gipam, TIMER_INTERVAL_S=0.02)
        served = self.serve_pools(3000, gipam.Server).start()
        for peer in served.peers(20):
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wait_until("a page", peer.send(PAGE).has_input)
        self.assertEqual(served.peer(HEALTH).answer(raw=True).status, 200)
        self.patch(gipam, REQUEST_TIMEOUT_S=0.01)
        for _ in sleeping_retry("the end of the pages"):
            if not any(connection.unsent for connection in list(served.loop.connections)):
                break

    def test_one_client_of_the_metrics_listener_is_served_an_iteration(self) -> None:
        """Monitors are served in turn, and Docker is served in each iteration."""
        served = ServedLoop(self)
        served.add_pools(2000)
        metrics = served.listen(gipam.Server, gipam.METRICS_LISTENER_PATHS)
        (docker,) = served.answered_peers(1)
        data = request("metrics", verb="GET")
        monitors = [Peer(self, metrics.server_address).send(data) for _ in range(3)]
        served.run_until_peers(4)
        for count in range(1, 4):
            docker.send(ACTIVATE)
            served.loop.run_once(1.0)
            self.assertEqual(docker.answer().body, ACTIVATED)
            self.assertEqual(list(map(Peer.has_input, monitors)).count(True), count)
        for _ in range(9):
            served.loop.run_once(1.0)
        for monitor in monitors:
            page = monitor.socket.recv(1 << 20, socket.MSG_PEEK)
            self.assertLess(3 * gipam.CHUNK_BYTES, len(page))


METRICS_PAGE = request("metrics", verb="GET")
METRIC_TYPES = {
    "gauge": "build_info base_blocks base_blocks_used base_blocks_excluded pool_addresses "
             "pool_addresses_used journal_bytes last_write_timestamp_seconds",
    "counter": "requests_total",
    "histogram": "request_duration_seconds journal_sync_duration_seconds",
}


def requests_total(method: str, result: str) -> str:
    """Return the name of a series of requests."""
    return f'requests_total{{method="{method}",result="{result}"}}'


def parse_samples(page: str) -> dict[str, float]:
    """Return the value of each series of a page of metrics, by its name without "gipam_"."""
    samples: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            series = series.replace("gipam_", "", 1)
            assert series not in samples, series
            samples[series] = float(value)
    return samples


def changed_series(before: dict[str, float], after: dict[str, float]) -> set[str]:
    """Return the series that have come, gone or changed, except durations of requests."""
    changed = set()
    for series, _ in before.items() ^ after.items():
        if "request_duration_seconds" not in series:
            changed.add(series)
    return changed


class MetricsTest(Case):
    """GET /metrics: the replies that were delivered, and the state that is on disk."""

    def setUp(self) -> None:
        self.served = ServedLoop(self, v4="10.2.0.0/20", v6="2001:db8:0:100::/60",
                                 exclude="10.2.14.0/23")
        self.docker, self.monitor = self.served.answered_peers(2)

    def call(self, method: str, **arguments: Any) -> int:
        """Make an API call; return the status."""
        data = request("IpamDriver." + method, arguments)
        return self.served.ask(self.docker, data).status

    def samples(self) -> dict[str, float]:
        """Return the value of each series."""
        return parse_samples(self.served.ask(self.monitor, METRICS_PAGE).body.decode())

    def assert_samples(self, expected: dict[str, float]) -> None:
        """Check some series."""
        samples = self.samples()
        for series, value in expected.items():
            with self.subTest(series):
                self.assertEqual(samples.get(series), value)

    def make_networks(self) -> None:
        """Make pools of both families, and two ranges of one subnet; one request is refused."""
        self.call("RequestPool")
        self.call("RequestPool", V6=True)
        for sub_pool in ("10.50.0.0/25", "10.50.0.128/25"):
            self.call("RequestPool", Pool="10.50.0.0/24", SubPool=sub_pool)
        self.call("RequestPool", Pool="10.50.0.0/24")
        for pool_id in list(self.served.service.state.pools):
            self.call("RequestAddress", PoolID=pool_id)
        self.served.ask(self.docker, request('no/such"{}path'))

    def test_official_parser_reads_it(self) -> None:
        try:
            parser: Any = importlib.import_module("prometheus_client.parser")
        except ImportError:
            if os.environ.get("GIPAM_REQUIRE_PROMETHEUS") == "1":
                raise
            self.skipTest("prometheus_client is missing: pip install prometheus-client")
        self.make_networks()
        answer = self.served.ask(self.monitor, METRICS_PAGE)
        self.assertEqual((answer.status, answer.headers["content-type"]),
                         (200, "text/plain; version=0.0.4; charset=utf-8"))
        types: dict[str, list[str]] = {"gauge": [], "counter": [], "histogram": []}
        families = {}
        for family in parser.text_string_to_metric_families(answer.body.decode()):
            suffix = "_total" if family.type == "counter" else ""
            types[family.type].append(family.name.replace("gipam_", "", 1) + suffix)
            families[family.name] = family
            self.assertRegex(family.documentation, r"^\S.*\S$")
        self.assertEqual({kind: " ".join(names) for kind, names in types.items()}, METRIC_TYPES)

        *buckets, _, count = families["gipam_request_duration_seconds"].samples
        values = [bucket.value for bucket in buckets]
        self.assertEqual((values, buckets[-1].labels), (sorted(values), {"le": "+Inf"}))
        self.assertEqual((count.name[-6:], count.value), ("_count", values[-1]))

    def test_every_count_is_there_from_the_start(self) -> None:
        """Without a zero, increase() misses the first event. A write that never was has no time."""
        samples = self.samples()
        for method, result in itertools.product((*gipam.PATHS, "unknown"), gipam.RESULTS):
            self.assertIn(requests_total(method, result), samples)
        self.assertNotIn("last_write_timestamp_seconds", samples)

    def test_values(self) -> None:
        self.make_networks()
        v4 = '{base="10.2.0.0/20",family="4"}'
        self.assert_samples({
            f'build_info{{version="{gipam.__version__}"}}': 1,
            "base_blocks" + v4: 16,
            "base_blocks_used" + v4: 1,
            "base_blocks_excluded" + v4: 2,
            'base_blocks_used{base="2001:db8:0:100::/60",family="6"}': 1,
            'pool_addresses{pool="10.2.0.0/24"}': 254,
            'pool_addresses_used{pool="10.2.0.0/24"}': 1,
            'pool_addresses{pool="10.50.0.128/25"}': 127,
            requests_total("/IpamDriver.RequestPool", "ok"): 4,
            requests_total("/IpamDriver.RequestPool", "Forbidden"): 1,
            requests_total("unknown", "InvalidRequest"): 1,
            "journal_sync_duration_seconds_count": 8,
        })
        samples = self.samples()
        counts = [value for series, value in samples.items() if "requests_total" in series]
        self.assertEqual(samples["request_duration_seconds_count"], sum(counts))
        self.assertEqual(samples["journal_bytes"], self.served.store.journal_bytes)
        self.assertAlmostEqual(samples["last_write_timestamp_seconds"], time.time(),
                               delta=DEADLINE_S)

    def test_labels_are_bounded(self) -> None:
        """The labels depend on pools; no address and no container is among them."""
        self.make_networks()
        labels = set(re.findall(r'(\w+)="(.*?)"[,}]', " ".join(self.samples())))
        self.assertEqual({name for name, _ in labels},
                         {"version", "base", "family", "pool", "method", "result", "le"})
        self.assertEqual({value for name, value in labels if name == "method"},
                         {*gipam.PATHS, "unknown"})
        self.assertEqual(len([value for name, value in labels if name == "pool"]), 4)

    def test_after_a_failed_commit_each_shows_what_is_on_disk(self) -> None:
        """In old versions, three requests, one of them answered 503, were counted as three "ok"."""
        self.make_networks()
        pool_id = next(iter(self.served.service.state.pools))
        duration_count = "request_duration_seconds_count"
        for method, arguments in (
                ("RequestPool", {}),
                ("RequestAddress", {"PoolID": pool_id}),
                ("ReleasePool", {"PoolID": pool_id})):
            with self.subTest(method):
                before = self.samples()
                with self.served.failing_commit():
                    self.assertEqual(self.call(method, **arguments), 503)
                after = self.samples()
                failed = requests_total("/IpamDriver." + method, "StoreError")
                self.assertEqual((before[failed], after[failed]), (0, 1))
                # The page of samples before counts, too.
                self.assertEqual(after[duration_count], before[duration_count] + 2)
                page = requests_total("/metrics", "ok")
                self.assertEqual(changed_series(before, after), {failed, page})

    def test_disk_that_cannot_be_trusted_has_a_result_of_its_own(self) -> None:
        error = gipam.FatalStoreError("cannot sync")
        with failing_once(self.served.store, "append", error), \
                self.assertLogs("gipam", "ERROR"):
            self.call("RequestPool")
        counts = self.served.service.metrics.requests
        self.assertEqual(counts["/IpamDriver.RequestPool", "StoreLost"], 1)

    def test_duration_includes_etcd_and_the_commit(self) -> None:
        """Old versions showed a sum of 1.4 ms although a sync took 0.2 s."""
        clock = mock.Mock(wraps=time)
        clock.perf_counter.side_effect = None
        clock.perf_counter.return_value = 100.0
        append = self.served.store.append

        def append_slowly(records: list[str]) -> None:
            clock.perf_counter.return_value += 0.25
            append(records)

        submit = self.served.loop.submit_to_etcd = mock.Mock()
        required = gipam.TransactionRequired(mock.sentinel.transaction)
        before_s = self.served.service.metrics.request_s.sum_s
        with mock.patch.object(gipam, "time", clock), \
                mock.patch.object(self.served.store, "append", append_slowly):
            with failing_once(self.served.service, "request_pool", required):
                self.docker.send(NEW_POOL)
                for _ in self.served.iterations("a request at etcd"):
                    if submit.called:
                        break
            (pending,) = submit.call_args[0]
            clock.perf_counter.return_value += 1.5
            pending.attempt(gipam.NO_OUTCOME)
            self.served.run_until("a reply", self.docker.has_input)
        after_s = self.served.service.metrics.request_s.sum_s
        self.assertAlmostEqual(after_s - before_s, 1.75)


class StopTest(Case):
    """A stop cuts off no client."""

    def drain(self, served: ServedLoop, remove_names: Callable[[], Any]) -> threading.Thread:
        """Begin to stop, while the peers go on."""
        thread = threading.Thread(target=served.loop.drain, args=(remove_names,))
        thread.start()
        return thread

    def test_who_has_asked_or_connected_is_answered_and_idle_connections_end(self) -> None:
        """Go repeats only requests that it could not write, and dockerd's own retry has no body."""
        self.patch(gipam, DRAIN_IDLE_S=0.5)
        for server_class in SERVER_CLASSES:
            with self.subTest(server_class.__name__):
                served = ServedLoop(self, server_class)
                late = served.peer()
                idle, asking = served.answered_peers(2)
                asking.send(new_pool(1))
                queued = served.peers(250, ACTIVATE)

                # These connect while the names go: closing a listener resets its backlog.
                def connect_late(served: ServedLoop = served, queued: list[Peer] = queued) -> None:
                    queued.extend(served.peers(3, ACTIVATE))

                thread = self.drain(served, connect_late)
                wait_until("the connection to be shut", idle.is_retired)
                late.send(new_pool(2))
                # Go cannot write to the idle connection, has the body at hand, and connects anew.
                if server_class.is_unix:
                    queued.append(served.peer(ACTIVATE))
                statuses = (idle.statuses(), asking.statuses(), late.statuses())
                self.assertEqual(statuses, ([], [200], [200]))
                thread.join()
                for peer in queued:
                    self.assertEqual(peer.statuses(), [200])
                self.assertEqual(len(served.service.state.pools), 2)

    def test_client_that_has_only_connected_has_longer_than_an_idle_one(self) -> None:
        """On a busy host dockerd may pause between connect and write; its retry has no body."""
        self.patch(gipam, DRAIN_IDLE_S=0.01)
        served = ServedLoop(self)
        late = served.peer()
        served.run_until_peers(1)
        thread = self.drain(served, mock.Mock())
        for _ in sleeping_retry("the listener to be closed"):
            if not served.loop.servers:
                break
        time.sleep(0.1)
        late.send(new_pool(1))
        self.assertEqual(late.statuses(), [200])
        thread.join()

    def test_half_a_request_is_waited_for_once(self) -> None:
        """A service manager that keeps the listener makes no difference."""
        for variables in ({}, {"FDSTORE": "1"}):
            with self.subTest(variables), mock.patch.dict(os.environ, variables):
                served = ServedLoop(self)
                (stuck,) = served.answered_peers(1)
                stuck.send(NEW_POOL[:50])
                now_s = self.drain_by_a_clock(served)
                self.assertEqual(stuck.answers(), [])
                self.assertLess(now_s, 1.5 * gipam.DRAIN_MAX_S)

    def test_request_that_waits_for_etcd_has_no_longer_at_a_stop(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=0.0)
        served = ServedLoop(self)
        submit = served.loop.submit_to_etcd = mock.Mock()
        peer = served.peer(NEW_POOL)
        required = gipam.TransactionRequired(mock.sentinel.transaction)
        with failing_once(served.service, "request_pool", required):
            for _ in served.iterations("a request at etcd"):
                if submit.called:
                    break
        now_s = self.drain_by_a_clock(served)
        self.assertEqual(peer.answer().status, 503)
        self.assertLess(now_s, gipam.DRAIN_MAX_S / 2)

    def drain_by_a_clock(self, served: ServedLoop) -> float:
        """Stop the loop by a clock that each iteration advances; return its time at the end."""
        clock = mock.Mock(wraps=time)
        clock.monotonic.side_effect = None
        clock.monotonic.return_value = 0.0
        clock.perf_counter.side_effect = None
        clock.perf_counter.return_value = time.perf_counter()
        run_once = served.loop.run_once

        def advance(_: float) -> None:
            run_once(0.0)
            clock.monotonic.return_value += 0.01
            clock.perf_counter.return_value += 0.01

        with mock.patch.object(gipam, "time", clock), \
                mock.patch.object(served.loop, "run_once", advance):
            served.loop.drain(mock.Mock())
        return float(clock.monotonic.return_value)

    def test_thread_that_comes_after_the_stop_is_refused(self) -> None:
        served = ServedLoop(self)
        served.loop.drain(mock.Mock())
        self.assertRaises(gipam.ShuttingDown, served.loop.run_in_loop, bool)

    def test_thread_that_still_waits_at_the_end_is_refused(self) -> None:
        served = ServedLoop(self)
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(served.loop.run_in_loop, bool)
            wait_until("the callback", served.loop._callbacks.copy)
            served.loop.close_callbacks()
            self.assertRaises(gipam.ShuttingDown, waiting.result, DEADLINE_S)

    def test_signal_that_nohup_ignores_is_ignored(self) -> None:
        script = 'trap "" HUP; exec "$@"'
        daemon = Daemon(self, command=("sh", "-c", script, "sh", sys.executable, GIPAM)).start()
        daemon.wait_for_log("serving")
        assert daemon.process
        status = pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii")
        caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
        for number, is_caught in ((signal.SIGHUP, False), (signal.SIGTERM, True)):
            self.assertIs(bool(caught & (1 << (number - 1))), is_caught)

    def test_signal_while_the_disk_hangs_waits_for_it(self) -> None:
        """SIGTERM, SIGINT and SIGHUP all ask for a stop."""
        directory = make_directory(self)
        hold = os.path.join(directory, "hold")
        # The process that runs the tests may ignore signals, which a child would inherit.
        lines = ("import signal\nfor number in (1, 2):\n"
                 "  signal.signal(number, signal.SIG_DFL)\n"
                 "def sync(fd, real=os.fdatasync):\n"
                 f"  os.path.exists({hold!r}) and open({hold!r}).read()\n"
                 "  real(fd)\nos.fdatasync = sync")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number=number):
                daemon = Daemon(self, command=launcher(directory, lines)).start()
                os.mkfifo(hold)
                peer = Peer(self, daemon.socket).send(NEW_POOL)
                # The FIFO opens once gipam reads it, in its sync.
                with open(hold, "w", encoding="ascii"):
                    os.unlink(hold)
                    assert daemon.process
                    daemon.process.send_signal(number)
                self.assertEqual(peer.statuses(), [200])
                self.assertEqual(daemon.stop(0), 0)
                self.assertEqual(sorted(os.listdir(daemon.directory)),
                                 ["leases.json", "leases.json.lock", "log"])
                self.assertEqual(len(recover(daemon.file).pools), 1)


ABC = b"Content-Length: 3\r\n\r\nabc"
LINES = (  # requests without headers that matter
    b"POST /a HTTP/1.1\r\n\r\n",
    b"POST /a HTTP/1.0\r\n\r\n",
    b"GET /a\r\n",
    b"POST /a\r\n\r\n",
    b"GET\r\n\r\n",
    b"POST /a HTTP/1.1\n\n",
    b"POST /a HTTP/1.1\r\n\n",
    b"{}\r\n\r\n",
    b"POST  /a\t HTTP/1.1  \r\n\r\n",
    b"\x00\r\n\r\n",
    b"\x16\x03\x01\x02\x00\r\n",
    b"",
    b" POST /a HTTP/1.1\r\n\r\n",
    b"POST //a HTTP/1.1\r\n\r\n",
    b"POST /a HTTP/1.1",
    b"POST /a HTTP/1.1\r\nX: y",
    b"PO",
    b"POST /a HTTP/1.1\r",
    b"P\xd6ST /\xe9 HTTP/1.1\r\n\r\n",
    b"POST /\x00 HTTP/1.1\r\n\r\n",
    b"POST /a\x0bb HTTP/1.1\r\n\r\n",
    b"POST /a b HTTP/1.1\r\n\r\n",
    b"POST /a HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc",
    b"POST /" + b"a" * 65_519 + b" HTTP/1.1\r\n\r\n",
    b"POST /" + b"a" * 65_520 + b" HTTP/1.1\r\n\r\n",
)
VERSIONS = (
    b"HTTP/1.2",
    b"HTTP/01.01",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1",
    b"HTTP/1.1.1",
    b"HTTP/",
    b"HTTP/1.x",
    b"HTTP/1.-1",
    b"HTTP/11111111111.1",
    b"HTTP/9.9",
    b"HTTP/1.1 b",
    b"http/1.1",
    b"XTTP/1.1",
)
HEADERS = (  # of HTTP/1.1
    b"Host: plugin.moby.localhost\r\nUser-Agent: Go-http-client/1.1\r\n" + ABC,
    # Docker before 20.10.26 sends a path.
    b"Host: %2Frun%2Fgipam.sock\r\n" + ABC,
    b"Host: /run/gipam.sock\r\n" + ABC,
    b"Host:\r\n" + ABC,
    b"Host: a\r\nHost: b\r\n" + ABC,
    b"Content-Type: text/plain; charset=x\r\n" + ABC,
    b"Content-Length:  0003 \t\r\n\r\nabc",
    b"Accept-Encoding: gzip\r\n" + ABC,
    b"Origin: null\r\n" + ABC,
    b"Connection: keep-alive\r\n" + ABC,
    b"X: \xe9\xff\r\n" + ABC,
    b"X: y\r\n" * 98 + ABC,
    b"X: " + b"y" * 60_000 + b"\r\n" + ABC,
    b"content-LENGTH:3\r\n\r\nabc",
    b"Content-Length:\t 3\r\n\r\nabc",
    b"X:\r\n" + ABC,
    b"X: y\r\n folded\r\n" + ABC,
    b"Connection: close\r\n\r\n",
    b"connection: CLOSE\r\n\r\n",
    b"Connection: close, x\r\n\r\n",
    b"Expect: 100-continue\r\n" + ABC,
    b"Expect: other\r\n\r\n",
    b"X: \xff\x00\x7f\r\n\r\n",
    b"X: y\r\n" * 99 + b"\r\n",
    b"X: y\r\n" * 100 + b"\r\n",
    b"X: y\r\n" * 101 + b"\r\n",
    b"X: y\r\n" * 300 + b"\r\n",
    b"X: " + b"y" * 65_531 + b"\r\n\r\n",
    b"X: " + b"y" * 65_532 + b"\r\n\r\n",
    b"X: " + b"y" * 70_000 + b"\r\n\r\n",
)
OLD_HEADERS = (  # of HTTP/1.0
    ABC,
    b"Connection: Keep-Alive\r\n\r\n",
    b"Connection: x\r\n\r\n",
    b"Expect: 100-continue\r\n\r\n",
)
HEADS = [
    *LINES,
    *[b"POST /a " + version + b"\r\n\r\n" for version in VERSIONS],
    *[b"POST /a HTTP/1.1\r\n" + headers for headers in HEADERS],
    *[b"POST /a HTTP/1.0\r\n" + headers for headers in OLD_HEADERS],
]


class StockHandler(http.server.BaseHTTPRequestHandler):
    """http.server as it comes, with a method for each verb; events has the requests it has read."""

    protocol_version = "HTTP/1.1"
    events: list[Any]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.serve

    def serve(self) -> None:
        """Note the request, or refuse HTTP/0.9, which each Python reads in its own way."""
        if self.request_version == "HTTP/0.9":
            self.send_error(505)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.events.append((self.command, self.path, body))

    def send_error(self, code: int, *_: Any) -> None:
        self.close_connection = True
        self.events.append(int(code))


class HeadTest(Case):
    """gipam reads heads as http.server does: same verdict, status, and connection afterwards."""

    def test_heads_are_read_as_http_server_reads_them(self) -> None:
        served = ServedLoop(self)
        for head in HEADS:
            with self.subTest(head[:60], length=len(head)):
                data = head + b"POST /next HTTP/1.1\r\n\r\n"
                self.assertEqual(self.read_by_gipam(data, served), self.read_by_stock(data))

    @contextlib.contextmanager
    def stream(self, data: bytes, events: list[Any]) -> Iterator[socket.socket]:
        """Yield a connection with the data and then the end; add each status 100 to events."""
        near, far = socket.socketpair()
        with near, far:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            yield far
            far.shutdown(socket.SHUT_WR)
            events += re.findall(b"HTTP/1.1 100", near.makefile("rb").read())

    def read_by_stock(self, data: bytes) -> list[Any]:
        """Return the requests and errors that http.server reads from the data."""
        events: list[Any] = []
        handler: Any = type("Handler", (StockHandler,), {"events": events})
        with self.stream(data, events) as connection:
            handler(connection, "", None)
        return events

    def read_by_gipam(self, data: bytes, served: ServedLoop) -> list[Any]:
        """Return the requests and errors that gipam reads from the data."""
        events: list[Any] = []

        def dispatch(_: Any, verb: str, path: str, body: bytes, *__: Any) -> Any:
            events.append((verb, path, body))
            return gipam.Reply(200, b"")

        def error_reply(error: gipam.GipamError) -> Any:
            events.append(error.http_status)
            return gipam.Reply(error.http_status, b"")

        with self.stream(data, events) as connection, \
                mock.patch.multiple(gipam, dispatch=dispatch, error_reply=error_reply):
            copy = connection.dup()
            copy.setblocking(False)
            served.server.finish_request(copy, "")
            served.run_until_peers(0)
        return events


JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1e400,
    2**64,
    "",
    "x",
    "\x00",
    "\ud800",
    "0.0.0.0/0",
    "0.0.0.0/33",
    "::/0",
    "10.2.0.0/16",
    "10.2.0.1",
    "255.255.255.255",
    "::ffff:10.2.0.1",
    "198.18.0.0/24",
    "0.0.0.0/29",
    "::/80",
    "1.2.3.4/024",
    [],
    {},
    [{}],
    {"gipam.name": "web"},
    {"gipam.v4ab": "30"},
    {"gipam.x": ""},
    {"RequestAddressType": "com.docker.network.gateway"},
    "x" * 300,
    "9" * 400,
    "10.3.0.0/24#0123456789abcdef",
    "10.3.0.0/24,10.3.0.0/25#0123456789abcdef",
)
TOKENS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\x00",
    b" ",
    b":",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"0\r\n\r\n",
    b"{",
    b"}",
    b"\xff",
    b"-1",
    b"GET",
    b"/",
    b"%",
    b"Content-Length: 99999999\r\n",
    b"X" * 70_000,
)
STATUSES = {100, 200, 400, 403, 404, 405, 411, 413, 414, 431, 503, 505}


class FuzzTest(Case):
    """Random requests, some of them almost right."""

    def choose_call(self, rng: random.Random, state: gipam.State) -> tuple[str, dict[str, Any]]:
        """Return one of CALLS, with arguments about pools and addresses that are held now."""
        path, usual = rng.choice(list(CALLS.items()))
        subnet = f"10.{rng.randrange(256)}.0.0/{rng.randrange(8, 33)}"
        options = rng.choice((None, {"gipam.name": "web"}, {gipam.ENDPOINT_NAME: "c"}))
        known: dict[str, Any] = {
            "Pool": rng.choice(("", subnet)),
            "SubPool": rng.choice(("", "", subnet)),
            "Subnet": subnet,
            "Seq": rng.randrange(99),
            "Options": options,
        }
        pools = list(state.pools.values())[:3]
        if pools:
            pool = rng.choice(pools)
            addresses = ["", *map(pool.address_at, pool.leases)]
            known["PoolID"] = pool.pool_id
            known["Address"] = rng.choice(addresses[:3])
            known["Seq"] = rng.choice((pool.seq, known["Seq"]))
        return path, {key: known.get(key, value) for key, value in usual.items()}

    def mutate_json(self, rng: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with one of them replaced, gone or added."""
        key = rng.choice([*arguments, "Pool", "pool", "", "Leases"])
        value = arguments.get(key)
        if rng.randrange(6) == 0:
            return {other: arguments[other] for other in arguments if other != key}
        if isinstance(value, str) and value and rng.random() < 0.3:
            index = rng.randrange(len(value))
            character = rng.choice("0./:,#x\x00é ")
            return {**arguments, key: value[:index] + character + value[index + 1:]}
        return {**arguments, key: rng.choice(JUNK)}

    def mutate_bytes(self, rng: random.Random, data: bytes) -> bytes:
        """Return the bytes with something in them changed, gone, doubled or added."""
        start = rng.randrange(len(data))
        end = min(start + rng.choice((1, 1, 2, 10, 100)), len(data))
        before = data[:start]
        middle = data[start:end]
        after = data[end:]
        byte = bytes([rng.randrange(256)])
        token = rng.choice(TOKENS)
        mutated = rng.choice((
            before + byte + data[start + 1:],
            before + after,
            before + middle * 3 + after,
            before + token + data[start:],
            before,
            data.replace(b"\r\n", token, 1),
            data + data[start:],
        ))
        return mutated or data

    def make_request(self, rng: random.Random, state: gipam.State) -> bytes:
        """Return a request with faults in its arguments, in its bytes, in both or in none."""
        path, arguments = self.choose_call(rng, state)
        if rng.random() < 0.5:
            arguments = self.mutate_json(rng, arguments)
        data = request(path[1:], arguments)
        for _ in range(rng.choice((0, 0, 1, 2, 3))):
            data = self.mutate_bytes(rng, data)
        # Empty lines have a test of their own.
        return data.lstrip(b"\r\n") or b"x"

    @seeded(1)
    def test_request_is_answered_and_a_refused_one_changes_nothing(
            self, rng: random.Random) -> None:
        served = ServedLoop(self).start()
        client = served.client()
        state = served.service.state
        seen: set[int] = set()
        for _ in range(4000):
            data = self.make_request(rng, state)
            seq = state.seq
            pools = set(state.pools)
            peer = served.peer(data, is_last=True)
            statuses = peer.statuses()
            peer.close()
            self.assertTrue(statuses and STATUSES.issuperset(statuses), (data, statuses))

            # A request for an address may have adopted a pool, with a gateway, and be refused.
            adopted = set(state.pools) - pools if b"RequestAddress" in data else set()
            if not {100, 200}.intersection(statuses):
                changes = sum(1 + len(state.pools[pool_id].leases) for pool_id in adopted)
                self.assertEqual(state.seq, seq + changes, (data, statuses))
            for pool_id in (*adopted, *list(state.pools)[20:]):
                client.release_pool(pool_id)
            seen.update(statuses)
        self.assertLessEqual({200, 400, 403, 404, 405}, seen)
        self.assertEqual(served.state_on_disk(), client.state())


# === Discovery ====================================================================================
#
# Sockets, links and plugin files by which Docker finds gipam. NameTest shows where they are, with
# which mode, that nothing of another process is replaced, and that a clean stop removes them.
# ManagerTest plays the part of systemd, which keeps the listener over a restart.


class NameTest(unittest.TestCase):
    """Sockets, links and plugin files: where, with which mode, and gone at the end."""

    def setUp(self) -> None:
        self.directory = make_directory(self)
        self.plugins = self.path("plugins")  # where dockerd looks
        self.link = self.plugins + "/gipam.sock"

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def daemon(self, *options: str, kind: type[Daemon] = Daemon) -> Daemon:
        """Return a daemon with its socket outside its own directory; not yet started."""
        command = launcher(self.plugins)
        return kind(self, "-socket", self.path("gipam.sock"), *options, command=command)

    def serve(self, daemon: Daemon) -> Daemon:
        """Start a daemon and let it reply; it creates some paths after it begins to listen."""
        daemon.start()
        self.assert_serves(daemon.address)
        return daemon

    def assert_serves(self, address: Any) -> None:
        self.assertEqual(Peer(self, address).ask(), ACTIVATED)

    def assert_fails(self, daemon: Daemon, status: int, text: str) -> None:
        daemon.start(wait=False)
        self.assertEqual(daemon.stop(0), status)
        log = daemon.read_log()
        self.assertIn(text, log)
        self.assertNotIn("Traceback", log)

    def assert_leaves(self, daemon: Daemon, path: str, *names: str) -> None:
        """Check that after a clean stop only these names are in the directory."""
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(os.listdir(path), list(names))

    def bind(self, path: str) -> socket.socket:
        """Return a socket that is bound to a path, but does not listen: once closed, a dead one."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(bound.close)
        bound.bind(path)
        return bound

    def overfill(self, path: str) -> None:
        """Connect to a listener until another connection would have to wait."""
        self.bind(path).listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = socket.socket(socket.AF_UNIX)
                self.addCleanup(client.close)
                client.setblocking(False)
                client.connect(path)

    def assert_mode(self, path: str, mode: int) -> None:
        status = os.lstat(path)
        permissions = stat.S_IMODE(status.st_mode)
        self.assertEqual(oct(permissions), oct(mode), path)

    def obstruct(self, path: str, obstacle: str) -> None:
        """Put something in the way of a socket or a link."""
        if obstacle == "dead socket":
            self.bind(path).close()
        elif obstacle == "link to a dead socket":
            os.symlink(self.path("dead"), path)
        elif obstacle == "link to nowhere":
            os.symlink("/nowhere", path)
        elif obstacle == "listening socket":
            self.bind(path).listen()
        elif obstacle == "socket of a stopped process":
            self.overfill(path)
        elif obstacle == "link to a listening socket":
            os.symlink(self.path("listening"), path)
        elif obstacle == "file":
            pathlib.Path(path).touch()
        elif obstacle == "directory":
            os.mkdir(path)
        elif obstacle == "FIFO":
            os.mkfifo(path)

    def test_only_what_nobody_uses_is_replaced(self) -> None:
        """One rule applies to the socket, to its link, and to a socket that hides a plugin file."""
        path = self.path("new", "socket")
        self.bind(self.path("listening")).listen()
        self.bind(self.path("dead")).close()
        free = (0, "")
        used = (75, f"another daemon listens on {path}: stop it, or use another name")
        other = (78, f"{path} exists and is not a socket: remove it, or use another name")
        for obstacle, expected in (
                ("nothing", free),
                ("dead socket", free),
                ("link to a dead socket", free),
                ("link to nowhere", free),
                ("listening socket", used),
                ("socket of a stopped process", used),
                ("link to a listening socket", used),
                ("file", other),
                ("directory", other),
                ("FIFO", other)):
            with self.subTest(obstacle):
                self.obstruct(path, obstacle)
                self.assertEqual(self.try_to_remove(path), expected)
                if expected != free:
                    # The obstacle is still there; make way for the next one.
                    os.rename(path, self.path(obstacle))
                self.assertFalse(os.path.lexists(path))
        self.assert_mode(self.path("new"), 0o700)

    @staticmethod
    def try_to_remove(path: str) -> tuple[int, str]:
        """Return the exit status and the message with which remove_stale() ends gipam."""
        try:
            gipam.remove_stale(path)
        except gipam.GipamError as error:
            return error.exit_status, str(error)
        return 0, ""

    def test_socket_and_the_link_for_dockerd(self) -> None:
        os.mkdir(self.path("old"), 0o755)
        self.bind(self.plugins + "/other.sock").close()
        directory = self.path("old", "new", "newer")
        daemon = self.daemon("-socket", directory + "/gipam.sock")
        self.serve(daemon)
        self.assert_mode(self.path("old"), 0o755)
        self.assert_mode(self.path("old", "new"), 0o700)
        self.assert_mode(directory, 0o700)
        self.assert_mode(daemon.socket, 0o600)
        self.assertEqual(os.readlink(self.link), daemon.socket)
        self.assert_serves(self.link)

        # The next process starts in spite of both.
        daemon.kill()
        self.assertTrue(os.path.exists(self.link))
        self.serve(daemon)
        self.assert_leaves(daemon, directory)
        self.assertEqual(os.listdir(self.plugins), ["other.sock"])

    def test_socket_where_dockerd_looks_needs_no_link(self) -> None:
        self.bind(self.plugins + "/other.sock").close()
        daemon = self.serve(self.daemon("-socket", self.link))
        self.assertFalse(os.path.islink(self.link))
        self.assert_leaves(daemon, self.plugins, "other.sock")

    def wait_for_path(self, path: str) -> None:
        wait_until(f"{path} to be created again", os.path.exists, path)

    def test_deleted_socket_and_link_are_created_again(self) -> None:
        """gipam creates a deleted directory again, too, and a connected client stays connected."""
        daemon = self.serve(self.daemon())
        client = Peer(self, daemon.socket)
        for delete, path in (
                (os.unlink, daemon.socket),
                (os.unlink, self.link),
                (shutil.rmtree, self.plugins)):
            delete(path)
            self.wait_for_path(self.link)
            self.wait_for_path(path)
            self.assert_serves(self.link)
            self.assertEqual(client.ask(), ACTIVATED)
        self.assertEqual(daemon.read_log().count(" was deleted: creating it again"), 3)
        self.assert_leaves(daemon, self.plugins)
        self.assertFalse(os.path.exists(daemon.socket))

    def test_link_that_cannot_be_created_again_is_tried_until_it_can(self) -> None:
        """gipam expects that the link cannot be created, so that no iteration fails."""
        daemon = self.serve(self.daemon())
        shutil.rmtree(self.plugins)
        pathlib.Path(self.plugins).touch()
        daemon.wait_for_log(f"cannot create {self.link}: ")
        self.assertNotIn("failed", daemon.read_log())
        os.unlink(self.plugins)
        self.wait_for_path(self.link)
        self.assert_serves(self.link)
        self.assert_leaves(daemon, self.plugins)
        self.assertFalse(os.path.exists(daemon.socket))

    def test_deleted_plugin_file_is_created_again(self) -> None:
        daemon = self.daemon("-spec", self.path("gipam.spec"), kind=TcpDaemon)
        self.serve(daemon)
        os.unlink(daemon.spec)
        self.wait_for_path(daemon.spec)
        self.assert_leaves(daemon, self.directory)

    def assert_takes_nothing(self, text: str, *options: str) -> None:
        """Check that a daemon does not start, gives the reason, and leaves nothing."""
        daemon = self.daemon(*options)
        self.assert_fails(daemon, 75, text)
        self.assertEqual(daemon.read_log().count("\n"), 1)
        self.assertEqual(os.listdir(daemon.directory), ["log"])

    def test_port_of_metrics_is_checked_after_a_restart_too(self) -> None:
        """systemd then passes the socket for Docker, but never that of -metrics."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            daemon = Daemon(self, "-metrics", address, env={**NO_DOCKER, "LISTEN_FDS": "0"})
            in_use = f"-metrics {address!r} from the command line: Address already in use: give an "
            self.assert_fails(daemon, 75, in_use + "address of this host and a port that is free")

    def test_second_daemon_takes_nothing_over(self) -> None:
        """A daemon takes neither another one's socket, nor its name for dockerd, nor a port."""
        first = self.serve(self.daemon())
        other = self.path("other", "gipam.sock")
        web = self.path("web.sock")
        spec = self.path("web.spec")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            address = f"127.0.0.1:{port}"
            in_use = f"{address!r} from the command line: Address already in use"
            stories: tuple[tuple[list[str], str], ...] = (
                ([], f"another daemon listens on {first.socket}"),
                (["-socket", other], f"daemon listens on {self.link}"),
                (["-unix=false"], f"another daemon listens on {self.link}"),
                (["-socket", web, f"-metrics={address}"], f"-metrics {in_use}"),
                (["-unix=false", "-spec", spec, f"-address={address}"], f"-address {in_use}"),
            )
            for options, text in stories:
                with self.subTest(options):
                    self.assert_takes_nothing(text, *options)
        self.assertFalse(os.path.exists(self.path("other")))
        self.assert_serves(self.link)

    def check_plugin_file(self, pattern: str, *options: str, kind: type[Daemon]) -> None:
        """Check the URL in a plugin file, its directory, and that a stop removes it."""
        directory = self.path("new")
        spec = self.path("new", "gipam.spec")
        with self.subTest(options):
            daemon = self.daemon("-spec", spec, *options, kind=kind)
            self.serve(daemon)
            url = pathlib.Path(spec).read_text(encoding="ascii")
            self.assertRegex(url, f"^{pattern}\n$")
            self.assert_mode(directory, 0o700)
            self.assertEqual(os.listdir(directory), ["gipam.spec"])
            self.assert_leaves(daemon, directory)

    def test_plugin_file_has_the_port_that_was_bound(self) -> None:
        """A plugin file has a URL with a scheme. Source: TestFileSpecPlugin of moby."""
        patterns = {
            ":0": r"tcp://127\.0\.0\.1:[1-9]\d*",
            "127.9.9.9:0": r"tcp://127\.9\.9\.9:[1-9]\d*",
        }
        for address, pattern in patterns.items():
            self.check_plugin_file(pattern, "-address", address, kind=TcpDaemon)

    def test_plugin_file_has_an_ipv6_address_in_brackets(self) -> None:
        if not list(gipam.read_words("/proc/net/if_inet6")):
            self.skipTest("has no IPv6")
        pattern = r"tcp://\[::1\]:[1-9]\d*"
        self.check_plugin_file(pattern, "-address", "[::1]:0", kind=TcpDaemon)

    def test_plugin_file_of_a_socket_is_for_rootless_docker(self) -> None:
        """By default, gipam writes no plugin file for a UNIX socket."""
        self.check_plugin_file("unix:///.*/gipam.sock", kind=Daemon)
        if os.path.ismount("/etc/docker"):
            self.serve(self.daemon())
            self.assertEqual(os.listdir("/etc/docker"), [])

    def test_plugin_file_is_replaced_whole(self) -> None:
        """A process that reads the file meanwhile gets its old or its new contents."""
        path = self.path("gipam.spec")
        pathlib.Path(path).write_bytes(b"tcp://192.0.2.1:1\n")
        plugin_file = gipam.PluginFile(path, "tcp://127.0.0.1:2")
        with open(path, "rb") as old:
            plugin_file.create()
            self.assertEqual(old.read(), b"tcp://192.0.2.1:1\n")
        self.assertEqual(pathlib.Path(path).read_bytes(), b"tcp://127.0.0.1:2\n")
        self.assertEqual(os.listdir(self.directory), ["gipam.spec"])
        self.assert_mode(path, 0o600)

        # To open a FIFO would be to wait for a reader.
        os.mkfifo(path + ".tmp")
        self.assertRaises(OSError, plugin_file.create)

    def test_dead_socket_that_hides_the_plugin_file_is_removed(self) -> None:
        """dockerd looks for NAME.sock first, and does not check whether anything listens there."""
        driver_socket = self.plugins + "/driver.sock"
        self.bind(driver_socket).close()
        self.bind(self.plugins + "/other.sock").close()
        daemon = self.daemon("-spec", self.path("driver.spec"), kind=TcpDaemon)
        self.serve(daemon)
        removed = f"removed {driver_socket}, which hid {daemon.spec}; restart dockerd"
        self.assertIn(removed, daemon.read_log())
        self.assert_leaves(daemon, self.plugins, "other.sock")
        self.bind(driver_socket).listen()
        self.assert_fails(daemon, 75, f"another daemon listens on {driver_socket}")
        self.assertEqual(os.listdir(self.directory), ["plugins"])


# Runs gipam with descriptors from 3 on, as systemd does: sd_listen_fds(3).
START_WITH_DESCRIPTORS = """
import fcntl, os, sys
gipam, names, fds, *options = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 1000) for fd in fds.split(":") if fd]
for index, fd in enumerate(high):
    os.dup2(fd, 3 + index)
os.closerange(3 + len(high), 4096)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, gipam, *options])
"""


class StoredDescriptor(NamedTuple):
    """A descriptor that systemd keeps."""

    name: str
    fd: int


class ManagerTest(unittest.TestCase):
    """The part of systemd that a restart needs: it keeps descriptors by their names."""

    def setUp(self) -> None:
        self.stored: list[StoredDescriptor] = []
        self.addCleanup(self.forget)
        self.address = "@" + make_directory(self)
        self.socket = self.listen(self.address)

    def listen(self, address: str) -> socket.socket:
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(manager.close)
        manager.settimeout(DEADLINE_S)
        manager.bind(address.replace("@", "\0"))
        return manager

    def receive_until(self, text: str) -> str:
        """Carry out the messages of the service up to this one, and return all of them."""
        received = ""
        while text not in received:
            data, rights, _, _ = self.socket.recvmsg(4096, 4096)
            message = data.decode()
            received += message + "\n"
            fields = {}
            for line in message.splitlines():
                name, _, value = line.partition("=")
                fields[name] = value
            if "FDSTOREREMOVE" in fields:
                self.forget(fields["FDNAME"])
            for _, _, packed in rights:
                for (fd,) in struct.iter_unpack("i", packed):
                    entry = StoredDescriptor(fields["FDNAME"], fd)
                    self.stored.append(entry)
        return received

    def forget(self, name: str = "") -> None:
        """Close the descriptors of a name, or all."""
        for entry in list(self.stored):
            if name in ("", entry.name):
                os.close(entry.fd)
                self.stored.remove(entry)

    def store(self, path: str, *names: str) -> None:
        """Keep a socket that listens on a path, under these names."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            for name in names:
                fd = os.dup(listener.fileno())
                self.stored.append(StoredDescriptor(name, fd))

    def stored_names(self) -> list[str]:
        return [entry.name for entry in self.stored]

    def serve(self, daemon: Daemon) -> Daemon:
        """Start a daemon with all that is kept, and let it reply."""
        names = ":".join(self.stored_names())
        daemon.pass_fds = [entry.fd for entry in self.stored]
        fds = ":".join(map(str, daemon.pass_fds))
        daemon.env.update(NOTIFY_SOCKET=self.address, FDSTORE="1")
        program = (sys.executable, "-c", START_WITH_DESCRIPTORS)
        daemon.command = (*program, GIPAM, names, fds)
        daemon.start(wait=False)
        self.receive_until("READY=1")
        self.assertEqual(Peer(self, daemon.socket).ask(), ACTIVATED)
        return daemon

    def stop(self, daemon: Daemon, number: int = signal.SIGTERM) -> None:
        self.assertEqual(daemon.stop(number), 0)
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=self.address):
            gipam.sd_notify("END=1")
        self.assertIn("STOPPING=1", self.receive_until("END=1"))

    @staticmethod
    def notify_often() -> None:
        for _ in range(1000):
            gipam.sd_notify("WATCHDOG=1")

    def test_notification_waits_for_nobody(self) -> None:
        """The socket has a path, or has no reader, or is gone.

        In old versions each message would have waited a second.
        """
        address = make_directory(self) + "/notify"
        manager = self.listen(address)
        for notify_socket in (address, "/nowhere", self.address):
            with self.subTest(notify_socket), \
                    mock.patch.dict(os.environ, NOTIFY_SOCKET=notify_socket):
                thread = threading.Thread(target=self.notify_often, daemon=True)
                thread.start()
                thread.join(DEADLINE_S)
                self.assertFalse(thread.is_alive())
        self.assertEqual(manager.recv(99), b"WATCHDOG=1")

    def test_unit_and_store_hand_over_the_same_socket(self) -> None:
        """The stored socket is a copy of the unit's: shutting it down would end both."""
        daemon = Daemon(self)
        self.store(daemon.socket, "gipam.socket", "gipam")
        self.serve(daemon)
        self.stop(daemon)
        # The next process listens there.
        self.assertTrue(os.path.exists(daemon.socket))

    def test_restart_refuses_nobody(self) -> None:
        """Connections end while the listener stays; a new client waits for the next process."""
        daemon = self.serve(Daemon(self, "-v4", CASES_V4))
        idle = Peer(self, daemon.socket)
        busy = Peer(self, daemon.socket)
        busy.send(NEW_POOL[:50])
        self.assertEqual(idle.ask(), ACTIVATED)
        assert daemon.process
        daemon.process.terminate()
        wait_until("the connection to be shut down", idle.is_retired)
        late = Peer(self, daemon.socket)
        late.send(ACTIVATE)
        self.assertTrue(busy.ask(NEW_POOL[50:]))

        # A second SIGTERM might hit an interpreter that has ended.
        self.stop(daemon, 0)
        self.assertEqual(idle.answers(), [])
        self.assertEqual(busy.answers(), [])
        self.serve(daemon)
        self.assertEqual(late.answer().body, ACTIVATED)
        # systemd has space for one.
        self.assertEqual(self.stored_names(), ["gipam"])
        self.stop(daemon)

    def test_socket_that_is_created_again_is_kept_instead(self) -> None:
        daemon = self.serve(Daemon(self))
        os.unlink(daemon.socket)
        wait_until("the socket to be created again", daemon.is_answering)
        self.stop(daemon)
        self.assertEqual(self.stored_names(), ["gipam"])
        self.serve(daemon)
        self.assertEqual(Peer(self, daemon.socket).ask(), ACTIVATED)
        self.stop(daemon)

    def names_after_start(self, daemon: Daemon) -> list[str]:
        """Start a daemon with the stored descriptors; return the names that are stored then."""
        self.serve(daemon)
        self.addCleanup(self.stop, daemon)
        return self.stored_names()

    def test_stored_socket_whose_path_was_deleted_is_given_up(self) -> None:
        daemon = Daemon(self)
        self.store(daemon.socket, "gipam")
        os.unlink(daemon.socket)
        self.assertEqual(self.names_after_start(daemon), ["gipam"])

    def test_stored_socket_for_another_address_is_given_up_with_its_path(self) -> None:
        path = make_directory(self) + "/old.sock"
        self.store(path, "gipam")
        names = self.names_after_start(Daemon(self))
        self.assertEqual(names, ["gipam"])
        self.assertFalse(os.path.lexists(path))

    def test_socket_of_a_unit_for_another_address_is_left_to_the_unit(self) -> None:
        path = make_directory(self) + "/old.sock"
        self.store(path, "gipam.socket")
        names = self.names_after_start(Daemon(self))
        self.assertEqual(names, ["gipam.socket", "gipam"])
        self.assertTrue(os.path.lexists(path))


# === Docker =======================================================================================
#
# How gipam reads Docker, with a FakeDocker: it calls gipam as dockerd does, and shows its
# networks and containers on a UNIX socket as dockerd does. The lab compares its JSON with that of a
# real dockerd. A change of FakeDocker is an iterator of Steps, so that a test can stop between any
# two of them. OperatedCase serves gipam in this process beside a FakeDocker and runs commands.

# Entries of GET /networks and /containers/json as dockerd 26.1.5 (API 1.45) lists them.
NETWORK: dict[str, Any] = {
    "Name": "",
    "Id": "",
    "Created": "2026-11-24T09:11:54.920401741Z",
    "Scope": "local",
    "Driver": "bridge",
    "EnableIPv6": False,
    "IPAM": {"Driver": "", "Options": {}, "Config": []},
    "Internal": False,
    "Attachable": False,
    "Ingress": False,
    "ConfigFrom": {"Network": ""},
    "ConfigOnly": False,
    "Containers": {},
    "Options": {},
    "Labels": {},
}
ENDPOINT: dict[str, Any] = {
    "IPAMConfig": None,
    "Links": None,
    "Aliases": None,
    "MacAddress": "",
    "NetworkID": "",
    "EndpointID": "",
    "Gateway": "",
    "IPAddress": "",
    "IPPrefixLen": 0,
    "IPv6Gateway": "",
    "GlobalIPv6Address": "",
    "GlobalIPv6PrefixLen": 0,
    "DriverOpts": None,
    "DNSNames": None,
}
CONTAINER: dict[str, Any] = {
    "Id": "",
    "Names": [],
    "Image": "bb",
    "ImageID": "sha256:a76a",
    "Command": "sleep 1000000",
    "Created": 1795511518,
    "Ports": [],
    "Labels": {},
    "State": "running",
    "Status": "Up 1 second",
    "HostConfig": {"NetworkMode": ""},
    "NetworkSettings": {"Networks": {}},
    "Mounts": [],
}
NOT_RUNNING = {"State": "exited", "Status": "Exited (137) 2 seconds ago"}
API_VERSIONS = {26: "1.45", 27: "1.47", 28: "1.51", 29: "1.52"}
ADDRESS_KEYS = {
    4: ("IPAddress", "IPPrefixLen"),
    6: ("GlobalIPv6Address", "GlobalIPv6PrefixLen"),
}
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
ENDPOINT_OPTION = "com.docker.network.endpoint."
BRIDGE_OPTION = "com.docker.network.bridge."

Steps = Iterator[None]


def finish(steps: Steps) -> None:
    """Take all steps that are left."""
    for _ in steps:
        pass


def make_docker_id(*names: object) -> str:
    """Return 64 hexadecimal digits, always the same for the same names."""
    text = "/".join(map(str, names))
    return hashlib.sha256(text.encode()).hexdigest()


def reply_at_once(_: str) -> None:
    """Do nothing before Docker replies."""


class DockerServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves the API of a FakeDocker."""

    daemon_threads = True

    def __init__(self, path: str, docker: FakeDocker) -> None:
        super().__init__(path, socketserver.BaseRequestHandler)
        self.docker = docker

    def finish_request(self, request: Any, client_address: Any) -> None:
        # gipam may not have waited for the reply.
        with contextlib.suppress(OSError):
            path = request.recv(1 << 16).split()[1].decode()
            reply = self.docker.answer(path)
            request.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + reply)


class FakeDocker:
    """A dockerd of a version, whose networks and containers a test may also edit.

    `call` sends a request to gipam. The additions of 28 were seen on 28.5.2; those of 29 are from
    moby's api/types.
    """

    def __init__(self, test: unittest.TestCase, path: str, call: Callable[..., Any],
                 version: int = 26) -> None:
        self.path = path
        self.call = call
        self.version = version
        self.networks: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, dict[str, Any]] = {}
        self.pool_ids: dict[tuple[str, int], str] = {}  # (network, family) -> id
        self.asked: list[str] = []  # paths
        self.errors: dict[str, str] = {}  # container -> State.Error
        self.before: Callable[[str], Any] = reply_at_once
        self.starts = 0

        server = DockerServer(path, self)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        test.addCleanup(server.server_close)
        test.addCleanup(server.shutdown)

    def answer(self, path: str) -> bytes:
        """Return the reply to a GET request."""
        self.before(path)
        self.asked.append(path)
        return json.dumps(self.look_up(path)).encode()

    def look_up(self, path: str) -> Any:
        networks = list(self.networks.values())
        if path == "/version":
            return {"ApiVersion": API_VERSIONS[self.version]}
        if path == "/networks":
            return [self.list_network(network) for network in networks]
        if path == "/containers/json":
            return self.list_containers("running")
        if path == gipam.STOPPED_CONTAINERS_PATH:
            return self.list_containers("exited")
        for network in networks:
            if path == f"/networks/{network['Id']}":
                return network
        for name, container in list(self.containers.items()):
            if path == f"/containers/{container['Id']}/json":
                return {"Name": "/" + name, "State": {"Error": self.errors.get(name, "")}}
        raise KeyError(path)

    def list_network(self, network: dict[str, Any]) -> dict[str, Any]:
        """Return a network as the list of all has it."""
        if network["ConfigFrom"]["Network"]:
            return {**network, "IPAM": {}}
        return network

    def list_containers(self, state: str) -> list[dict[str, Any]]:
        containers = list(self.containers.values())
        return [container for container in containers if container["State"] == state]

    def since(self, version: int, **keys: Any) -> dict[str, Any]:
        """Return keys that Docker shows or sends from this version on."""
        return keys if self.version >= version else {}

    def show_network(self, name: str, *configs: dict[str, Any], driver: str = "gipam",
                     **keys: Any) -> None:
        """Show a network for which gipam was not asked."""
        ipam = {"Driver": driver, "Options": {}, "Config": list(configs)}
        has_v6 = any(":" in config["Subnet"] for config in configs)
        self.networks[name] = {
            **NETWORK,
            **self.since(28, EnableIPv4=True),
            "Name": name,
            "EnableIPv6": has_v6,
            "Id": make_docker_id(name, self.starts),
            "IPAM": ipam,
            **keys,
        }

    def show_foreign(self, name: str, subnet: str, **keys: Any) -> None:
        """Show a network of another IPAM driver."""
        self.show_network(name, {"Subnet": subnet}, driver="default", **keys)

    def show_hint(self, name: str, *hints: str) -> None:
        """Show a network as made with e.g. --subnet 0.0.0.0/26: before 29 without its subnet."""
        self.networks[name]["IPAM"]["Config"] = [{"Subnet": hint} for hint in hints]

    def making_network(self, name: str, *subnets: str, sub_pool: str = "",
                       options: dict[str, str] | None = None, has_gateway: bool = True,
                       **keys: Any) -> Steps:
        """Take the steps of `docker network create`; "4" or "6" asks for any block."""
        configs = []
        options = options or {}
        subnets = subnets or ("4",)
        for subnet in subnets:
            requested = subnet if "/" in subnet else ""
            version = 6 if ":" in subnet or subnet == "6" else 4
            pool = self.call("IpamDriver.RequestPool", AddressSpace="gipam", Pool=requested,
                             SubPool=sub_pool, Options=options, V6=version == 6)
            self.pool_ids[name, version] = pool["PoolID"]
            yield

            config = {"Subnet": requested or pool["Pool"]}
            configs.append(config)
            if sub_pool:
                config["IPRange"] = sub_pool
            if not has_gateway:
                continue
            gateway = self.call("IpamDriver.RequestAddress", PoolID=pool["PoolID"], Address="",
                                Options=GATEWAY)
            yield
            # Before 29, the gateway of a requested subnet is not shown.
            if not requested or self.version >= 29:
                config["Gateway"] = self.spell_gateway(gateway["Address"], version)

        self.starts += 1
        self.show_network(name, *configs, **keys)
        self.networks[name]["IPAM"]["Options"] = options
        yield

    def spell_gateway(self, cidr: str, version: int) -> str:
        """Return a gateway as Docker shows it: before 28, an IPv6 one has a length."""
        if version == 6 and self.version < 28:
            return cidr
        return cidr.partition("/")[0]

    def removing_network(self, name: str) -> Steps:
        """Take the steps of `docker network rm`."""
        for network, version in list(self.pool_ids):
            if network == name:
                pool_id = self.pool_ids.pop((network, version))
                self.call("IpamDriver.ReleasePool", PoolID=pool_id)
                yield
        del self.networks[name]
        yield

    def starting(self, name: str, *networks: str, address: str = "") -> Steps:
        """Take the steps of `docker start`: Docker shows the addresses when all are granted."""
        self.starts += 1
        mac = f"02:42:00:00:00:{self.starts:02x}"
        options = {ENDPOINT_OPTION + "macaddress": mac}
        if self.version >= 29:
            options[ENDPOINT_OPTION + "name"] = name
        endpoints = {}
        for network in networks:
            endpoint = self.make_endpoint(name, network, mac)
            if address:
                endpoint["IPAMConfig"] = {"IPv4Address": address}
            endpoints[network] = endpoint
            for version, (address_key, length_key) in ADDRESS_KEYS.items():
                if (network, version) not in self.pool_ids:
                    continue
                reply = self.call("IpamDriver.RequestAddress", Address=address, Options=options,
                                  PoolID=self.pool_ids[network, version])
                granted, _, prefixlen = reply["Address"].partition("/")
                endpoint[address_key] = granted
                endpoint[length_key] = int(prefixlen)
                yield

        # Docker lists the newest container first.
        self.containers.pop(name, None)
        container = self.container(name, endpoints)
        self.containers = {name: container, **self.containers}
        yield

    def make_endpoint(self, name: str, network: str, mac: str) -> dict[str, Any]:
        """Return the endpoint of a container, without an address."""
        return {
            **ENDPOINT,
            **self.since(28, GwPriority=0),
            "NetworkID": self.networks[network]["Id"],
            "MacAddress": mac,
            "EndpointID": make_docker_id(network, name, self.starts),
        }

    def container(self, name: str, endpoints: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return a running container with these endpoints, by the names of their networks."""
        mode = next(iter(endpoints), "host")
        return {
            **CONTAINER,
            **self.since(29, ImageManifestDescriptor=None),
            "Id": make_docker_id(name),
            "Names": ["/" + name],
            "HostConfig": {"NetworkMode": mode},
            "NetworkSettings": {"Networks": endpoints},
        }

    def stopping(self, name: str, is_shown_late: bool = False,
                 is_released: bool = True) -> Steps:
        """Take the steps of `docker stop`.

        Docker hides the addresses before it releases them, or after. If they are not released,
        they leak.
        """
        endpoints = self.containers[name]["NetworkSettings"]["Networks"]
        if not is_shown_late:
            self.hide_addresses(name)
            yield
        if is_released:
            for network, endpoint in endpoints.items():
                yield from self.releasing(network, endpoint)
        if is_shown_late:
            self.hide_addresses(name)
            yield

    def releasing(self, network: str, endpoint: dict[str, Any]) -> Steps:
        """Release the addresses of an endpoint."""
        for version, (address_key, _) in ADDRESS_KEYS.items():
            if endpoint[address_key]:
                self.call("IpamDriver.ReleaseAddress", Address=endpoint[address_key],
                          PoolID=self.pool_ids[network, version])
                yield

    def hide_addresses(self, name: str) -> None:
        """Show a container as stopped, with its networks but without addresses in them."""
        empty = {}
        for network, endpoint in self.containers[name]["NetworkSettings"]["Networks"].items():
            kept = {key: endpoint[key] for key in ("NetworkID", "IPAMConfig")}
            empty[network] = {**ENDPOINT, **kept}
        self.containers[name] = {**self.container(name, empty), **NOT_RUNNING}

    def endpoint(self, container: str, network: str = "web") -> dict[str, Any]:
        """Return the endpoint of a container in a network, to read it or to edit it."""
        endpoints: dict[str, Any] = self.containers[container]["NetworkSettings"]["Networks"]
        endpoint: dict[str, Any] = endpoints[network]
        return endpoint

    def make_network(self, name: str, *subnets: str, **options: Any) -> None:
        """Make a network, as making_network() does."""
        finish(self.making_network(name, *subnets, **options))

    def remove_network(self, name: str) -> None:
        finish(self.removing_network(name))

    def start(self, name: str, *networks: str, address: str = "") -> None:
        """Start a container in these networks."""
        finish(self.starting(name, *networks, address=address))

    def stop(self, name: str, is_released: bool = True) -> None:
        """Stop a container, as stopping() does."""
        finish(self.stopping(name, is_released=is_released))


class OperatedCase(CommandCase):
    """gipam, served in this process, beside a fake Docker; and commands that ask the two."""

    V4 = "10.2.0.0/20"
    V6 = "2001:db8:0:100::/60"

    def setUp(self) -> None:
        super().setUp()
        self.socket = os.path.join(self.directory, "gipam.sock")
        self.patch(gipam, RECHECK_DELAY_S=0)
        caller = InMemory(self, **self.options())
        self.service = caller.service
        self.kernel = caller.kernel
        config = gipam.build_config(caller.settings)
        self.service.daemon_info = gipam.describe_daemon(config, self.socket)
        self.loop = gipam.EventLoop(self.service)
        self.loop.add_listener(gipam.UnixServer(self.socket, self.loop))
        self.thread = serve_in_thread(self, self.loop)

        client = Client(self.socket)
        self.addCleanup(client.close)
        self.call = client.call
        self.status_now = client.state
        self.request_pool = client.request_pool
        docker_socket = os.path.join(self.directory, "docker.sock")
        self.docker = FakeDocker(self, docker_socket, self.call)

        # Options with which a command finds no daemon, and its message then.
        absent = os.path.join(self.directory, "none.sock")
        self.nowhere = ("-socket", absent, "-address", "127.0.0.1:1", "-file", self.file,
                        "-v6", self.V6, "-v4", self.V4)
        self.absent = (f"gipam: no gipam answers on {absent} or 127.0.0.1:1: start it, or say "
                       "where it is with -socket or -address")

    def options(self) -> dict[str, str]:
        """Return the options of the daemon, by name."""
        return {
            "unix": "true",
            "socket": self.socket,
            "file": self.file,
            "v4": self.V4,
            "v6": self.V6,
        }

    def exclude(self, prefix: str) -> None:
        """Exclude a prefix from the IPv4 base."""
        families = make_state(self.V4, excluded=prefix).families
        self.service.state.families[4] = families[4]

    def serve_tcp(self) -> int:
        """Serve on a loopback port too; return it."""
        server = gipam.Server(("127.0.0.1", 0), self.loop)
        self.loop.run_in_loop(self.loop.add_listener, server)
        return int(server.server_address[1])

    def release_pool(self, network: str = "web", version: int = 4) -> None:
        """Release the pool of a network, which Docker still shows."""
        pool_id = self.docker.pool_ids[network, version]
        self.call("IpamDriver.ReleasePool", PoolID=pool_id)

    def request(self, address: str, network: str = "web", options: Any = None) -> None:
        """Request an IPv4 address in the pool of a network."""
        pool_id = self.docker.pool_ids[network, 4]
        self.call("IpamDriver.RequestAddress", PoolID=pool_id, Address=address, Options=options)

    def release(self, address: str, network: str = "web") -> None:
        """Release an address of a network, which Docker may still show."""
        version = 6 if ":" in address else 4
        pool_id = self.docker.pool_ids[network, version]
        self.call("IpamDriver.ReleaseAddress", PoolID=pool_id, Address=address)

    def make_ranges(self) -> None:
        """Make two networks of one subnet."""
        self.docker.make_network("low", "10.50.0.0/24", sub_pool="10.50.0.0/25")
        self.docker.make_network("high", "10.50.0.0/24", sub_pool="10.50.0.128/25")

    def held(self) -> dict[str, list[str]]:
        """Return the addresses that gipam holds, in order, by range or subnet."""
        held = {}
        for pool in self.status_now()["pools"]:
            addresses = [lease["address"] for lease in pool["addresses"]]
            held[pool["sub_pool"] or pool["subnet"]] = sorted(addresses)
        return held

    def run_gipam(self, *words: str, options: tuple[str, ...] = (), **variables: Any) -> Finished:
        """Run a command beside this Docker; the variables are those of run_main()."""
        options = options or ("-unix", "-socket", self.socket, "-file", self.file)
        variables.setdefault("DOCKER_HOST", "unix://" + self.docker.path)
        return self.run_main(*words, *options, **variables)

    def read_docker(self) -> gipam.DockerView:
        """Return the pools and addresses that Docker uses."""
        return gipam.read_docker_allocations(self.docker.path, "gipam", DEADLINE_S)

    def settle(self) -> None:
        """Wait until the checkpoint that the first change starts has written the lease file."""
        for _ in sleeping_retry("the first checkpoint"):
            if self.service.store.referenced_segment:
                break
        if self.loop._checkpoint_thread:
            self.loop._checkpoint_thread.join()

    def check(self, *arguments: str, grace: int = 0) -> list[str]:
        """Return the findings that `check` prints; its last line and its status must fit them."""
        done = self.run_gipam("check", "--grace", str(grace), *arguments)
        lines = [line for line in done.out.splitlines() if not line.startswith("note: ")]
        findings = lines[:-1]
        left = [line for line in findings if not line.endswith("; fixed")]
        noun = "difference" if len(findings) == 1 else "differences"
        summary = f"{len(findings)} {noun}, {len(left)} left" if findings else "no difference"
        self.assertEqual(lines[-1].partition(";")[0], summary, done)
        self.assertEqual(done.status, 1 if left else 0, done)
        return findings


class ShownNetwork(NamedTuple):
    """An entry of a network's IPAM.Config, with keys of the network, and the allocations in it."""

    config: dict[str, Any]
    keys: dict[str, Any]
    allocations: dict[str, str]
    other_subnets: list[str] = []


SHOWN_NETWORKS = (
    ShownNetwork(
        {
            "Subnet": "FD00:0008:0::/64",
            "Gateway": "FD00:8:0::0F",
            "AuxiliaryAddresses": {"b": "fd00:8:0:0::00AA"},
        },
        {},
        {"net fd00:8::/64": "pool, fd00:8::aa auxiliary, fd00:8::f gateway"}),
    ShownNetwork(
        {
            "Subnet": "10.9.0.0/24",
            "Gateway": "10.9.0.1",
            "AuxiliaryAddresses": {"a": "10.8.0.7", "b": "10.9.0.7"},
        },
        {},
        {
            "net 10.9.0.0/24": "pool, 10.9.0.1 gateway, 10.9.0.7 auxiliary",
            "net ": "10.8.0.7 auxiliary",
        }),
    ShownNetwork(
        {"Subnet": "10.60.0.0/24"},
        {"ConfigOnly": True, "Driver": "null"},
        {},
        ["10.60.0.0/24"]),
    ShownNetwork(
        {"Subnet": "10.60.0.0/24"},
        {"ConfigFrom": {"Network": "c"}},
        {"net 10.60.0.0/24": "pool"}),
    # Docker has never requested the subnet of a family that is off.
    ShownNetwork(
        {"Subnet": "fd00:7::/64"},
        {"EnableIPv6": False},
        {}),
    # Docker shows this key from 28 on.
    ShownNetwork(
        {"Subnet": "10.61.0.0/24"},
        {"EnableIPv4": False},
        {}),
    ShownNetwork(
        {"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"},
        {"driver": "default"},
        {},
        ["172.17.0.0/16"]),
)

ISOLATED_V4 = {BRIDGE_OPTION + "gateway_mode_ipv4": "isolated"}
ISOLATED_V6 = {BRIDGE_OPTION + "gateway_mode_ipv6": "isolated"}
INHIBITED = {BRIDGE_OPTION + "inhibit_ipv4": "true"}
INTERNAL = {"Internal": True}


class HiddenGateways(NamedTuple):
    """A network with a --subnet of each family, and the families whose gateway is not shown."""

    version: int
    driver: str
    keys: dict[str, Any]
    options: dict[str, str]
    families: str


HIDDEN_GATEWAYS = (
    HiddenGateways(26, "bridge", {}, {}, "46"),
    HiddenGateways(26, "bridge", INTERNAL, ISOLATED_V4, "46"),
    HiddenGateways(26, "macvlan", INTERNAL, {}, "46"),
    HiddenGateways(28, "bridge", {}, {}, "46"),
    HiddenGateways(28, "bridge", INTERNAL, {}, "46"),
    HiddenGateways(28, "bridge", INTERNAL, ISOLATED_V4, "6"),
    HiddenGateways(28, "bridge", INTERNAL, ISOLATED_V6, "4"),
    HiddenGateways(28, "bridge", INTERNAL, INHIBITED, "6"),
    HiddenGateways(28, "bridge", {}, INHIBITED, "46"),
    HiddenGateways(28, "macvlan", {}, {"parent": "eth0"}, "46"),
    HiddenGateways(28, "macvlan", INTERNAL, {}, ""),
    HiddenGateways(28, "ipvlan", {}, {"ipvlan_mode": "l2"}, "46"),
    HiddenGateways(28, "ipvlan", {}, {"ipvlan_mode": "l3s"}, ""),
    HiddenGateways(28, "other", INTERNAL, {}, "46"),
    HiddenGateways(29, "bridge", {}, {}, ""),
    HiddenGateways(29, "macvlan", {}, {}, ""),
)


class AllocationsTest(OperatedCase):
    """The pools and addresses that Docker uses, as its API shows them."""

    def allocations(self) -> dict[str, str]:
        """Return the allocations of each "network subnet": the pool, and addresses with owners."""
        texts: dict[str, list[str]] = {}
        for allocation in self.read_docker().ours:
            place = f"{allocation.network} {allocation.sub_pool or allocation.subnet}"
            owner = allocation.container or allocation.kind
            text = f"{allocation.address} {owner}".strip()
            texts.setdefault(place, []).append(text)

        joined = {}
        for place, owned in texts.items():
            # The pool comes before the addresses.
            owned.sort(key=lambda text: (text != "pool", text))
            joined[place] = ", ".join(owned)
        return joined

    def make_containers_without_an_address(self) -> None:
        for network in ("host", "none"):
            ipam = {"Driver": "default", "Options": None, "Config": None}
            self.docker.show_network(network, Driver=network, IPAM=ipam)
        for name in ("stopped", "crashed"):
            self.docker.start(name, "web")
        self.docker.stop("stopped")
        # Docker still shows the address that it had.
        self.docker.containers["crashed"].update(NOT_RUNNING)

        # The first start will request this address.
        created = {**ENDPOINT, "IPAMConfig": {"IPv4Address": "10.2.0.44"}}
        for name, endpoints in (
                ("created", {"web": created}),
                ("on-host", {"host": ENDPOINT}),
                ("in-another", {})):
            self.docker.containers[name] = self.docker.container(name, endpoints)

    def test_both_families_and_containers_with_and_without_an_address(self) -> None:
        for version, v4, v6 in (
                (26, "10.2.0", "2001:db8:0:100"),
                (29, "10.2.1", "2001:db8:0:101")):
            with self.subTest(docker=version):
                self.docker.version = version
                self.docker.make_network("web", "4", "6")
                self.docker.start("one", "web")
                self.make_containers_without_an_address()
                self.assertEqual(self.allocations(), {
                    f"web {v4}.0/24": f"pool, {v4}.1 gateway, {v4}.2 one",
                    f"web {v6}::/64": f"pool, {v6}::1 gateway, {v6}::2 one",
                })
                self.docker.containers.clear()
                self.docker.remove_network("web")
                self.assertEqual(self.allocations(), {})

    def test_addresses_that_the_user_named(self) -> None:
        """IPAMConfig has values seen on dockerd 26.1.5 and 28.5.2, and one with empty text."""
        self.docker.make_network("web", "4", "6")
        self.docker.start("one", "web")
        for shown, named in (
                (None, set()),
                ({}, set()),
                ({"IPv4Address": "", "IPv6Address": ""}, set()),
                ({"IPv4Address": "10.2.0.2"}, {"10.2.0.2"}),
                ({"IPv6Address": "2001:DB8:0:100:0::02"}, {"2001:db8:0:100::2"})):
            with self.subTest(shown):
                self.docker.endpoint("one")["IPAMConfig"] = shown
                ours = self.read_docker().ours
                explicit = {allocation.address for allocation in ours if allocation.is_explicit}
                self.assertEqual(explicit, named)

    def test_networks_as_docker_shows_them(self) -> None:
        """The cases were seen on dockerd 26.1.5. Subnets without allocations were not requested."""
        for shown in SHOWN_NETWORKS:
            with self.subTest(shown.config, **shown.keys):
                self.docker.show_network("net", shown.config, **shown.keys)
                self.assertEqual(self.allocations(), shown.allocations)
                others = self.read_docker().others
                subnets = [other.subnet for other in others if not other.address]
                self.assertEqual(subnets, shown.other_subnets)

    def test_allocations_that_only_containers_show(self) -> None:
        """Before 29, only containers show a --subnet's gateway and the subnet of a size hint."""
        self.docker.make_network("lan", "10.9.0.0/24", sub_pool="10.9.0.64/26")
        self.docker.make_network("hint", "4", "6", options={"gipam.v4ab": "28"})
        self.docker.show_hint("hint", "0.0.0.0/28", "::/0")
        self.docker.start("one", "lan", "hint")
        self.docker.endpoint("one", "lan")["Gateway"] = "10.9.0.64"
        self.assertEqual(self.allocations(), {
            "lan 10.9.0.64/26": "pool, 10.9.0.64 gateway, 10.9.0.65 one",
            "hint 10.2.0.0/28": "pool, 10.2.0.2 one",
            "hint 2001:db8:0:100::/64": "pool, 2001:db8:0:100::2 one",
        })
        findings = list(gipam.find_missing([], self.read_docker().ours))
        addresses = [user.address for user in findings[0].missing]
        self.assertEqual(addresses, ["10.9.0.64", "10.9.0.65"])

    def test_hidden_gateways(self) -> None:
        """From 28 on, GetSkipGwAlloc() in moby's daemon/libnetwork/drivers hides gateways."""
        subnets = {"4": "10.9.0.0/30", "6": "fd00:9::/64"}
        configs = [{"Subnet": subnet} for subnet in subnets.values()]
        for case in HIDDEN_GATEWAYS:
            with self.subTest(case):
                self.docker.version = case.version
                self.docker.show_network("net", *configs, Driver=case.driver,
                                         Options=case.options, **case.keys)
                hidden = {}
                for finding in gipam.find_missing([], self.read_docker().ours):
                    users = [(user.kind, user.address) for user in finding.missing]
                    hidden[finding.subject.subnet] = users
                expected = {}
                for family, subnet in subnets.items():
                    is_hidden = family in case.families
                    expected[subnet] = [("gateway", "")] if is_hidden else []
                self.assertEqual(hidden, expected)

    def test_names_that_cannot_be_printed(self) -> None:
        self.docker.make_network("web", options={"gipam.name": "web"})
        network = self.docker.networks["web"]
        network["Name"] = "w\x1b[31m\ud800\n" + "e" * 300
        network["IPAM"]["Options"]["gipam.name"] = "n\x00b\u00fcro"
        self.docker.start("one", "web")
        self.docker.containers["one"]["Names"] = ["/\u202eeno\udfff"]
        self.docker.endpoint("one")["MacAddress"] = "02\t"

        allocation = self.read_docker().ours[-1]
        network_name = "w\\x1b[31m\\ud800\\n" + "e" * 300
        self.assertEqual(allocation.network, network_name[:255])
        self.assertEqual(allocation.pool_name, "n\\x00b\u00fcro")
        self.assertEqual(allocation.container, "\\u202eeno\\udfff")
        self.assertEqual(allocation.mac, "02\\t")
        self.release_pool()
        done = self.run_gipam("check", "--fix", "--force")
        self.assertEqual(done.status, 0)
        pool = self.status_now()["pools"][0]
        self.assertEqual(pool["name"], allocation.pool_name)
        self.assertEqual(pool["addresses"][0]["name"], allocation.container)

    def test_timeout_is_for_all_replies_of_docker_together(self) -> None:
        replies: tuple[Any, ...] = ({"ApiVersion": "1.45"}, [], [])
        clock = (0.0, 0.5, 1.0, 1.5)
        with mock.patch.object(gipam, "request_json", side_effect=replies) as request_json, \
                mock.patch.object(time, "monotonic", side_effect=clock):
            gipam.read_docker_allocations("/nothing.sock", "gipam", 2.0)
        timeouts = [call.args[0].timeout for call in request_json.mock_calls]
        self.assertEqual(timeouts, [1.5, 1.0, 0.5])


class UnreachableDockerTest(OperatedCase):
    """If `check` cannot ask Docker, it gives the reason and the remedy in one line."""

    def assert_check_fails(self, host: str, pattern: str) -> None:
        """Check the message of `check` with this DOCKER_HOST."""
        done = self.run_gipam("check", DOCKER_HOST=host)
        self.assert_fails(done, 2, "gipam: " + pattern)

    def test_docker_on_another_host(self) -> None:
        for host in (
                "tcp://192.0.2.1:2375",
                "ssh://root@h",
                "npipe:////./pipe/docker_engine"):
            with self.subTest(host):
                self.assert_check_fails(host, f"DOCKER_HOST '{host}' is not a UNIX socket .*")

    def assert_silent(self, path: str, reason: str) -> None:
        """Check the message of `check` if Docker sends no JSON, which counts as no reply."""
        remedy = "start it, or say where it is with DOCKER_HOST"
        pattern = f"Docker does not answer on {re.escape(path)}: {reason}; {remedy}"
        self.assert_check_fails("unix://" + path, pattern)

    def test_docker_that_does_not_listen(self) -> None:
        path = os.path.join(self.directory, "nothing")
        self.assert_silent(path, "No such file or directory")

    def test_docker_that_does_not_reply(self) -> None:
        self.assertLessEqual(gipam.DOCKER_TIMEOUT_S, 10)
        self.patch(gipam, DOCKER_TIMEOUT_S=0.05)
        is_over = threading.Event()
        self.addCleanup(is_over.set)

        def wait_at_networks(path: str) -> None:
            if path == "/networks":
                is_over.wait(DEADLINE_S)

        self.docker.before = wait_at_networks
        self.assert_silent(self.docker.path, "timed out")

    def show_networks(self, text: str) -> None:
        """Let Docker reply with this text to GET /networks."""
        answer = self.docker.answer

        def answer_with_text(path: str) -> bytes:
            return text.encode() if path == "/networks" else answer(path)

        self.patch(self.docker, answer=answer_with_text)

    def test_reply_that_is_not_json(self) -> None:
        self.show_networks("[" * 100_000)
        self.assert_silent(self.docker.path, "something else does, whose reply is not JSON")

    def test_reply_that_has_not_the_keys_of_docker(self) -> None:
        path = re.escape(self.docker.path)
        for text in (
                '[{"Name": "odd", "IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}]',
                '[{"Name": "odd", "Id": "1", "IPAM": "none"}]',
                '[{"Name": "odd", "Id": "1", "IPAM": {"Config": [{"Subnet": "nonsense"}]}}]'):
            with self.subTest(text):
                self.show_networks(text)
                self.assert_check_fails("unix://" + self.docker.path, (
                    f"the Docker at {path} sent a reply that gipam does not understand"))


# === Check ========================================================================================
#
# Differences between gipam and Docker: each kind of finding and how --fix fixes it, reasons on this
# host why containers cannot be reached, and the import at a start and after an adoption.
# ChangesDuringCheckTest spreads events over the readings of a comparison, which reports none of
# them. An import runs in this thread, or in a worker that the test waits for.


class CheckTest(OperatedCase):
    """Each kind of finding, and how it is fixed."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.make_network("web", "4", "6")
        self.docker.start("one", "web")

    def assert_fixed(self, text: str, *values: str) -> None:
        """Check that `check` reports the text with each value, and that --fix fixes all of it."""
        lines = [text.format(value) for value in values]
        self.assertEqual(self.check(), lines)
        fixed = [line + "; fixed" for line in lines]
        self.assertEqual(self.check("--fix"), fixed)
        self.assertEqual(self.check(), [])

    def test_no_difference_where_docker_hides_gateways_and_subnets(self) -> None:
        """Before 29, Docker shows no gateway of a --subnet, and no subnet of a size hint."""
        self.docker.make_network("lan", "10.9.0.0/24")
        self.make_ranges()
        self.docker.show_foreign("bridge", "172.17.0.0/16")
        for name, hint in (
                ("hint", "0.0.0.0/24"),
                ("any", "0.0.0.0/0")):
            self.docker.make_network(name)
            self.docker.show_hint(name, hint)
        self.assertEqual(self.check(), [])
        self.docker.start("two", "lan", "low", "high", "hint", "any")
        self.assertEqual(self.check(), [])

    def test_gateway_that_a_user_has_given_to_a_container(self) -> None:
        self.docker.make_network("lan", "10.9.0.0/24")
        self.docker.start("two", "lan")
        self.docker.endpoint("two", "lan")["Gateway"] = "10.9.0.200"
        self.assertNotIn("10.9.0.1 ", "\n".join(self.check()))
        self.docker.endpoint("two", "lan")["Gateway"] = "10.77.0.9"
        self.assertEqual(self.check(), [])

    def test_leak_in_a_network_that_shows_only_a_size_hint(self) -> None:
        self.docker.make_network("hint")
        self.docker.show_hint("hint", "0.0.0.0/24")
        self.docker.start("three", "hint")
        leaked = self.docker.endpoint("three", "hint")["IPAddress"]
        self.docker.stop("three", is_released=False)
        self.docker.start("four", "hint")
        finding, = self.check()
        self.assertIn(f" {leaked} ", finding)

    def test_leaked_addresses(self) -> None:
        self.docker.stop("one", is_released=False)
        self.request("10.2.0.77")
        self.request("10.2.0.78", options=GATEWAY)
        self.assert_fixed(
            "leaked_address: address {}, but nothing uses it",
            "10.2.0.2 of network web is reserved for 02:42:00:00:00:02",
            "10.2.0.77 of network web is reserved for auxiliary",
            "10.2.0.78 of network web is reserved for gateway",
            "2001:db8:0:100::2 of network web is reserved for 02:42:00:00:00:02")
        self.assertEqual(self.held(), {
            "10.2.0.0/24": ["10.2.0.1"],
            "2001:db8:0:100::/64": ["2001:db8:0:100::1"],
        })

    def test_leaked_pools(self) -> None:
        self.docker.stop("one")
        self.make_ranges()
        self.docker.start("two", "low")
        for name in ("web", "high"):
            del self.docker.networks[name]
        self.assert_fixed(
            "leaked_pool: subnet {} is held with 1 lease, but no network uses it",
            "10.2.0.0/24",
            "2001:db8:0:100::/64",
            "10.50.0.0/24 range 10.50.0.128/25")
        self.assertEqual(self.held(), {"10.50.0.0/25": ["10.50.0.1", "10.50.0.2"]})

    def test_last_line_says_how_many_fix_repairs(self) -> None:
        for foreign, gone, ending in (
                ("10.2.0.0/22", "", "1 difference, 1 left"),
                ("", "10.2.0.2", "1 difference, 1 left; `gipam check --fix` fixes it"),
                ("10.2.0.0/22", "10.2.0.1",
                 "3 differences, 3 left; `gipam check --fix` fixes 2 of them")):
            with self.subTest(ending):
                self.docker.networks.pop("old", None)
                if foreign:
                    self.docker.show_foreign("old", foreign)
                if gone:
                    self.release(gone)
                done = self.run_gipam("check", "--grace", "0")
                self.assertEqual(done.out.splitlines()[-1], ending)

    def test_missing_addresses(self) -> None:
        self.release("10.2.0.2")
        self.release("10.2.0.1")
        self.assert_fixed(
            "missing_address: address {} is not held: another container could get it",
            "10.2.0.1 of network web",
            "10.2.0.2 of container one")
        leases = self.status_now()["pools"][0]["addresses"]
        lease = max(leases, key=lambda lease: lease["address"])
        self.assertEqual(lease["address"], "10.2.0.2")
        self.assertEqual(lease["kind"], "endpoint")
        self.assertEqual(lease["mac"], "02:42:00:00:00:02")
        self.assertEqual(lease["name"], "one")

    def test_missing_pool_with_all_its_addresses(self) -> None:
        # --fix demands that Docker knows a pool.
        self.docker.make_network("other", "10.9.0.0/24")
        before = self.held()
        for version in (4, 6):
            self.release_pool("web", version)
        self.assert_fixed(
            "missing_pool: subnet {} of network web is not held: another network could get it",
            "10.2.0.0/24",
            "2001:db8:0:100::/64")
        self.assertEqual(self.held(), before)
        # Docker's ids are bound to the imported pools.
        self.docker.stop("one")
        self.assertEqual(self.check(), [])

    def test_findings_that_only_a_person_can_fix(self) -> None:
        self.docker.start("two", "web")
        self.docker.start("three", "web")
        one = self.docker.endpoint("one")
        two = self.docker.endpoint("two")
        for key in ("IPAddress", "GlobalIPv6Address"):
            two[key] = one[key]
        self.docker.endpoint("three")["IPAddress"] = "10.3.0.2"
        self.docker.make_network("other")
        self.docker.show_foreign("old", "10.2.0.0/22")
        self.docker.show_foreign("template", "10.2.0.0/16", ConfigOnly=True)
        expected = [
            "address_outside: address 10.3.0.2 of container three is in no subnet of network web: "
            "recreate the network"]
        for address in ("10.2.0.2", "2001:db8:0:100::2"):
            expected.append(f"address_twice: address {address} is used by container two and "
                            "container one: restart one of them")
        for subnet in ("10.2.0.0/24", "10.2.1.0/24"):
            expected.append("overlap: subnet 10.2.0.0/22 of network old, which another IPAM driver "
                            f"has, overlaps {subnet} of gipam: remove one of the two networks")
        findings = [line for line in self.check() if "leaked" not in line]
        self.assertEqual(sorted(findings), expected)

    def test_subnet_that_another_host_has_claimed(self) -> None:
        """The remedy is to remove a network, unless the claim names another remedy."""
        texts: dict[str, str] = {}

        def conflict_text(network: gipam.Network) -> str:
            return texts.get(str(network), "")

        self.patch(self.service.claims, conflict_text=conflict_text)
        renamed = ("host old (a former name of this machine: `gipam evict old` gives the claim to "
                   "new)")
        for claimants, remedy in (
                ("host other", ": remove one of the two networks"),
                (renamed, "")):
            texts["10.2.0.0/24"] = claimants
            with self.subTest(claimants):
                self.assertEqual(self.check(), [
                    "claimed_elsewhere: subnet 10.2.0.0/24 is held here, but claimed in etcd by "
                    f"{claimants}{remedy}"])

    def test_networks_that_swarm_makes_are_known_by_their_template(self) -> None:
        """A killed dockerd 26.1.5 lists Swarm networks without a subnet until their next task."""
        self.docker.networks.clear()
        self.docker.containers.clear()
        config = {"Subnet": "10.2.0.0/24"}
        self.docker.show_network("cfg", config, Driver="null", ConfigOnly=True)
        template = {"Network": "cfg"}
        self.docker.show_network("net", driver="", ConfigFrom=template, Scope="swarm")
        self.assertEqual(len(self.check("--fix")), 2)
        self.assertEqual(self.held(), {})

    def test_json_of_findings(self) -> None:
        self.docker.start("three", "web")
        self.release("10.2.0.3")
        self.request_pool("10.7.0.0/24")
        self.docker.show_foreign("old", "10.2.0.0/22")
        texts = []
        for line in self.check():
            text, _, _ = line.partition("; `gipam check --fix`")
            texts.append(text)
        keys = ("kind", "subnet", "address", "network", "container")
        rows = (
            ("leaked_pool", "10.7.0.0/24", "", "", ""),
            ("missing_address", "10.2.0.0/24", "10.2.0.3", "web", "three"),
            ("overlap", "10.2.0.0/22", "", "old", ""))
        for option, is_fixed in (("--json", False), ("--fix", True)):
            done = self.run_gipam("check", "--json", option, "--grace", "0")
            self.assertEqual(done.status, 1)
            findings = json.loads(done.out)["findings"]
            found_texts = []
            for finding in findings:
                found_texts.append(f"{finding['kind']}: {finding.pop('text')}")
            self.assertEqual(found_texts, texts)
            expected = []
            for row in rows:
                finding = dict(zip(keys, row))
                finding["is_fixed"] = is_fixed and finding["kind"] != "overlap"
                expected.append(finding)
            self.assertEqual(findings, expected)

    def test_grace_time_is_for_leaks_and_not_for_missing_addresses(self) -> None:
        self.docker.stop("one", is_released=False)
        self.docker.make_network("gone")
        del self.docker.networks["gone"]
        granted_s = []
        for pool in self.status_now()["pools"]:
            granted_s.append(pool["granted_s"])
            granted_s += [lease["granted_s"] for lease in pool["addresses"]]
        for now_s, grace, count in (
                (min(granted_s) + 59, 60, 0),
                (max(granted_s) + 60, 60, 3),
                (max(granted_s), 0, 3)):
            with mock.patch.object(time, "time", return_value=now_s):
                self.assertEqual(len(self.check(grace=grace)), count)
        self.release("10.2.0.1")
        findings = self.check(grace=60)
        self.assertRegex("".join(findings), "^missing_address: .*10.2.0.1")

    def test_fix_is_refused_if_that_docker_knows_none_of_the_pools(self) -> None:
        self.docker.networks.clear()
        self.docker.containers.clear()
        self.docker.make_network("bridge", "172.17.0.0/16",
                                 IPAM={"Driver": "default", "Config": None})
        before = self.held()
        done = self.run_gipam("check", "--fix", "--grace", "0")
        self.assert_fails(done, 2, "gipam: .*knows none of the pools held: is it the one that "
                                   "gipam serves.*--force.*")
        self.assertEqual(self.held(), before)
        self.assertEqual(len(self.check("--fix", "--force")), 3)
        self.assertEqual(self.held(), {})

    def test_record_that_has_changed_is_not_touched(self) -> None:
        """A new container gets the leaked address before --fix would release it."""
        self.docker.stop("one", is_released=False)
        fix = gipam.fix

        def fix_after_a_change(*arguments: Any) -> int:
            self.docker.remove_network("web")
            self.docker.make_network("web", "10.2.0.0/24")
            self.docker.start("two", "web", address="10.2.0.2")
            return fix(*arguments)

        with mock.patch.object(gipam, "fix", fix_after_a_change):
            done = self.run_gipam("check", "--fix", "--grace", "0")
        self.assertEqual(done.status, 0)
        refused = re.findall("not fixed: .* has changed since change", done.err)
        self.assertEqual(len(refused), 2)
        self.assertEqual(self.held(), {"10.2.0.0/24": ["10.2.0.1", "10.2.0.2"]})
        self.assertEqual(self.check(), [])


NO_MASQUERADE = BRIDGE_OPTION + "enable_ip_masquerade=false"
ROUTED_V4 = BRIDGE_OPTION + "gateway_mode_ipv4=routed"
ROUTED_V6 = BRIDGE_OPTION + "gateway_mode_ipv6=routed"
UNPROTECTED = BRIDGE_OPTION + "gateway_mode_ipv4=nat-unprotected"


class Masquerading(NamedTuple):
    """A network of an IPv4 and an IPv6 subnet, and the options that notes advise for it."""

    version: int
    options: tuple[str, ...]
    advised: list[str]
    keys: dict[str, Any] = {}
    subnet: str = "100.2.0.0/24"


MASQUERADING = (
    Masquerading(26, (), [NO_MASQUERADE]),
    Masquerading(26, (NO_MASQUERADE,), []),
    Masquerading(26, (ROUTED_V4,), [NO_MASQUERADE]),
    Masquerading(28, (), [ROUTED_V4, ROUTED_V6]),
    Masquerading(28, (ROUTED_V4,), [ROUTED_V6]),
    Masquerading(28, (ROUTED_V4, ROUTED_V6), []),
    Masquerading(28, (NO_MASQUERADE,), []),
    # A private IPv4 subnet may be masqueraded.
    Masquerading(28, (), [ROUTED_V6], subnet="10.2.0.0/24"),
    Masquerading(29, (UNPROTECTED,), [ROUTED_V4, ROUTED_V6]),
    Masquerading(29, (UNPROTECTED, NO_MASQUERADE), []),
    Masquerading(28, (), [], {"Internal": True}),
    Masquerading(28, (), [], {"Driver": "macvlan"}),
    Masquerading(28, (), [], {"ConfigOnly": True}),
)

REQUEST_FAILED = 'Post "http://plugin.moby.localhost/IpamDriver.RequestAddress": '
NOT_CONNECTED = REQUEST_FAILED + "dial {}: connect: connection refused"


class FailedContainer(NamedTuple):
    """A container that did not start, with Docker's reason."""

    name: str
    error: str
    is_noted: bool  # because gipam was down


FAILED_CONTAINERS = (
    FailedContainer("one", 'plugin "gipam" not found', True),
    FailedContainer("stopped", NOT_CONNECTED.format("unix /run/docker/plugins/gipam.sock"), True),
    FailedContainer("tcp", NOT_CONNECTED.format("tcp [::1]:9090"), True),
    FailedContainer("tcp2", NOT_CONNECTED.format("tcp [::1]:90901"), False),
    FailedContainer("lan", 'plugin "lan" not found', False),
    FailedContainer("lan2", NOT_CONNECTED.format("unix /run/docker/plugins/lan.sock"), False),
    FailedContainer("full", REQUEST_FAILED + "no addresses", False),
)


QUIET_STATUS: dict[str, Any] = {  # of which `check` has nothing to note
    "bases": [],
    "pools": [],
    "config": {"onlink": {"value": "off"}},
    "trouble": "",
}


class NotesTest(OperatedCase):
    """Notes of `check`: about networks and containers that gipam cannot fix."""

    def host_warnings(self) -> list[str]:
        allocations = self.read_docker().ours
        return list(gipam.host_warnings(QUIET_STATUS, allocations, "/nothing"))

    def test_networks_that_masquerade(self) -> None:
        for case in MASQUERADING:
            with self.subTest(case):
                options = dict(option.split("=") for option in case.options)
                configs = [{"Subnet": case.subnet}, {"Subnet": "2001:db8:0:100::/64"}]
                self.docker.version = case.version
                self.docker.show_network("web", *configs, Options=options, **case.keys)
                advised = []
                for note in self.host_warnings():
                    _, _, option = note.partition(" -o ")
                    advised.append(option)
                self.assertEqual(advised, case.advised)
                # With dockerd --iptables=false nothing masquerades.
                option, value = NO_MASQUERADE.split("=")
                self.docker.show_foreign("bridge", "172.17.0.0/16", Options={option: value})
                self.assertEqual(self.host_warnings(), [])
                del self.docker.networks["bridge"]

    def test_containers_that_docker_gave_up(self) -> None:
        """A container that Docker has locked, to start or stop it, does not delay `check`."""
        self.service.daemon_info["listening"] = "[::1]:9090"
        self.docker.make_network("web", "4", "6")
        names = [case.name for case in FAILED_CONTAINERS] + ["locked"]
        for name in names:
            self.docker.start(name, "web")
        for case in FAILED_CONTAINERS:
            self.docker.errors[case.name] = case.error
        for name in names:
            self.docker.stop(name)
        is_over = threading.Event()
        self.addCleanup(is_over.set)

        def wait_for_lock(path: str) -> None:
            if make_docker_id("locked") in path:
                is_over.wait(DEADLINE_S)

        self.docker.before = wait_for_lock
        self.patch(gipam, NAMES_TIMEOUT_S=0.05)
        done = self.run_gipam("check")
        noted = re.findall(r"note: container (\w+) did not start because gipam was down: "
                           r"run docker start \1", done.out)
        expected = [case.name for case in FAILED_CONTAINERS if case.is_noted]
        self.assertEqual(sorted(noted), sorted(expected))

    def test_notes_do_not_change_the_status(self) -> None:
        self.docker.make_network("web", "4", "6")
        self.docker.start("one", "web")
        self.docker.version = 28
        done = self.run_gipam("check", "--json")
        notes = json.loads(done.out)["notes"]
        self.assertRegex("\n".join(notes), "network web masquerades 2001:db8:0:100::/64, .*\n.+")
        lines = [f"note: {note}\n" for note in notes]
        out = "".join(lines) + "no difference\n"
        self.assertEqual(self.run_gipam("check"), (0, out, ""))


IPV4_BASE = "10.2.0.0/16"
IPV6_BASE = "2001:db8:0:100::/56"
# Parts of lines of /proc/net/ipv6_route: destination and its length, and a next hop.
ANY_V6 = "0" * 32
DEFAULT_V6 = ANY_V6 + " 00"
TO_BASE_V6 = "20010db8000001000000000000000000 38"
LINK_V6 = "20010db8000001000000000000000000 30"
ROUTER_V6 = "fe8" + "0" * 28 + "1"
IPV4_HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def route_v4(device: str, flags: str = "0001", destination: str = "0000020A",
             mask: str = "0000FFFF") -> str:
    """Return a line of /proc/net/route, for the base unless told otherwise."""
    return f"{device}\t{destination}\t00000000\t{flags}\t0\t0\t0\t{mask}\t0\t0\t0\n"


def route_v6(device: str, flags: str = "00000001", destination: str = TO_BASE_V6,
             via: str = ANY_V6, metric: str = "400") -> str:
    """Return a line of /proc/net/ipv6_route, for the base unless told otherwise."""
    return f"{destination} {ANY_V6} 00 {via} {metric} 1 0 {flags} {device}\n"


def default_v4(device: str) -> str:
    return route_v4(device, "0003", "00000000", "00000000")


def learned_v6(device: str) -> str:
    """Return a default route from a router advertisement."""
    return route_v6(device, "00450003", DEFAULT_V6, ROUTER_V6)


REJECT_V4 = route_v4("*")
REJECT_V6 = route_v6("lo", "00200200")
# Linux has this route in each namespace.
UNREACHABLE_V6 = route_v6("lo", "00200200", DEFAULT_V6, metric="ffffffff")
ROUTED_DEFAULT_V6 = route_v6("eth0", "00000003", DEFAULT_V6, ROUTER_V6)
ACCEPT_RA = (r"ignores router advertisements on eth0.7: "
             r"sysctl -w net\.ipv6\.conf\.eth0/7\.accept_ra=2")
FORWARDING_V6 = r"net\.ipv6\.conf\.all\.forwarding=1"


class Uplink(NamedTuple):
    """Routes of a host that forwards IPv6 or not, and the warnings that they lead to."""

    is_forwarding: bool
    routes_v4: str
    routes_v6: str
    patterns: tuple[str, ...]


UPLINKS = (
    # The default route that was learned has expired.
    Uplink(True, default_v4("eth0.7"), UNREACHABLE_V6,
           ("this host has no IPv6 default route, .*" + ACCEPT_RA,)),
    Uplink(True, default_v4("eth0.7"), ROUTED_DEFAULT_V6, ()),
    # The learned default route has not expired yet.
    Uplink(True, default_v4("eth0.7"), learned_v6("eth0.7"),
           ("this host will lose its IPv6 default route, .*" + ACCEPT_RA,)),
    # Docker will turn forwarding on.
    Uplink(False, "", learned_v6("eth0.7"), (ACCEPT_RA, FORWARDING_V6)),
    Uplink(False, default_v4("eth0.7"), "", (FORWARDING_V6,)),
    Uplink(True, route_v4("eth0.7", "3", "0000000A", "000000FF"), "", ()),
    # eth1 has an accept_ra of 2.
    Uplink(True, default_v4("eth1"), "", ()),
    Uplink(True, default_v4("eth1"), learned_v6("eth1"), ()),
)

DOWN = "{} has not been seen for 40 s and holds 3 claims: "


class EtcdState(NamedTuple):
    """The status of etcd and of another host, and the warning that it leads to."""

    etcd: dict[str, Any]
    host: str
    is_present: bool | None
    pattern: str


ETCD_STATES = (
    EtcdState({"failure": "etcd is away", "due": 0}, "web", None,
              "etcd is away: new networks have to wait"),
    EtcdState({"failure": "etcd is away", "due": 2}, "web", True,
              "etcd is away: 2 claims and new networks have to wait"),
    EtcdState({"failure": ""}, "db", False,
              DOWN.format("db") + ".*`gipam evict db` drops them"),
    EtcdState({"failure": ""}, "old", False,
              DOWN.format("old") + "it is a former name of this host, `gipam evict old` takes "
              "them over"),
)


class HostWarningsTest(CommandCase):
    """Settings of this host that make containers unreachable, in files as /proc has them."""

    STATUS: dict[str, Any] = {
        **QUIET_STATUS,
        "bases": [{"prefix": IPV4_BASE}, {"prefix": IPV6_BASE}],
        "config": {"onlink": {"value": "lan.7"}},
    }
    SYSCTLS = (
        ("ipv4/neigh/lan.7/proxy_delay", "80"),
        ("ipv6/neigh/lan.7/proxy_delay", "0"),
        ("ipv6/conf/lan.7/proxy_ndp", "1"),
        ("ipv6/conf/all/proxy_ndp", "0"),
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/eth0.7/accept_ra", "1"),
        ("ipv6/conf/eth1/accept_ra", "2"),
    )

    def setUp(self) -> None:
        super().setUp()
        self.patch(gipam, device_warning="".format)
        for name, value in self.SYSCTLS:
            self.write_sysctl(name, value)
        self.write_routes(REJECT_V4, REJECT_V6)

    def write_sysctl(self, name: str, value: str) -> None:
        self.write("proc/sys/net/" + name, value)

    def write_routes(self, routes_v4: str, routes_v6: str) -> None:
        self.write("proc/self/net/route", IPV4_HEADER + routes_v4)
        self.write("proc/self/net/ipv6_route", routes_v6)

    def assert_warnings(self, *patterns: str, **status: Any) -> None:
        """Check each warning against its pattern; the keywords change the status."""
        proc = self.directory + "/proc"
        status = {**self.STATUS, **status}
        warnings = list(gipam.host_warnings(status, [], proc))
        lines = "".join(f".*{pattern}.*\n" for pattern in patterns)
        text = "".join(f"{warning}\n" for warning in warnings)
        self.assertRegex(text, rf"\A{lines}\Z")

    def test_nothing_to_warn_of(self) -> None:
        self.assert_warnings()
        self.write_routes(route_v4("*", "0201"), REJECT_V6)
        self.assert_warnings()

    def test_etcd_and_hosts_that_are_down(self) -> None:
        for case in ETCD_STATES:
            host = {
                "host": case.host,
                "is_present": case.is_present,
                "claims": 3,
                "is_own": case.host == "old",
            }
            present = {**host, "host": "here", "is_present": True}
            with self.subTest(case.pattern):
                self.assert_warnings(
                    case.pattern,
                    bases=[],
                    config=QUIET_STATUS["config"],
                    etcd=case.etcd,
                    hosts=[present, host])

    def test_disk_that_takes_no_writes(self) -> None:
        self.assert_warnings("the last write of gipam failed, so requests may fail: cannot write",
                             trouble="cannot write")

    def test_forwarding_that_is_off(self) -> None:
        self.write_sysctl("ipv4/ip_forward", "0")
        self.assert_warnings("sysctl -w net.ipv4.ip_forward=1")
        self.write_sysctl("ipv4/ip_forward", "1")
        self.write_sysctl("ipv6/conf/all/forwarding", "0")
        self.assert_warnings("sysctl -w net.ipv6.conf.all.forwarding=1")

    def test_router_advertisements_that_are_ignored(self) -> None:
        for case in UPLINKS:
            with self.subTest(case):
                forwarding = "1" if case.is_forwarding else "0"
                self.write_sysctl("ipv6/conf/all/forwarding", forwarding)
                self.write_routes(case.routes_v4 + REJECT_V4, REJECT_V6 + case.routes_v6)
                self.assert_warnings(*case.patterns)

    def test_base_without_a_blackhole(self) -> None:
        patterns = []
        for base in (IPV4_BASE, IPV6_BASE):
            patterns.append(f"ip route add blackhole {base} metric 9999; or, if it is on the link "
                            f"of lan.7, ip route add {base} dev lan.7")
        routed = route_v6("eth0", "00000003", via=ROUTER_V6)
        self.write_routes("", routed + UNREACHABLE_V6)
        self.assert_warnings(*patterns)

        self.write_routes("", REJECT_V6)
        self.assert_warnings("add blackhole 10.2.0.0/16 metric 9999",
                             bases=[{"prefix": IPV4_BASE}],
                             config={"onlink": {"value": "off"}}, pools=[])

    def test_base_on_the_link_of_another_device(self) -> None:
        self.write_routes(REJECT_V4, route_v6("eth0"))
        self.assert_warnings("is on-link on eth0: .* -onlink eth0")
        self.write_routes(route_v4("eth0"), REJECT_V6)
        self.assert_warnings("base 10.2.0.0/16 is on-link on eth0: .* -onlink eth0")

    def test_base_that_one_network_has(self) -> None:
        pools = [{"subnet": IPV6_BASE}]
        own = route_v6("br-web")
        on_eth0 = route_v6("eth0", destination=LINK_V6)
        on_lan = route_v6("lan.7", destination=LINK_V6)
        for routes, patterns in (
                (own, []),
                (own + on_eth0, ["2001:db8:0:100::/56 is on-link on eth0: "]),
                (own + on_lan, ["-onlink lan.7 needs .*proxy_ndp=1"])):
            with self.subTest(patterns):
                self.write_routes(REJECT_V4, routes)
                self.assert_warnings(*patterns, pools=pools)

    def test_sysctls_and_device_of_onlink(self) -> None:
        self.write_routes(route_v4("lan.7"), route_v6("lan.7"))
        sysctls = (
            "-onlink lan.7 needs sysctl -w net.ipv4.neigh.lan/7.proxy_delay=0",
            "-onlink lan.7 needs sysctl -w net.ipv6.conf.all.proxy_ndp=1")
        self.assert_warnings(*sysctls)
        self.patch(gipam, device_warning="-onlink {}: there is no such device".format)
        self.assert_warnings("-onlink lan.7: there is no such device", *sysctls)


class Event(NamedTuple):
    """A change of Docker, which a comparison must not report, and its number of steps."""

    name: str
    step_count: int
    begin: Callable[..., Steps]
    arguments: tuple[Any, ...] = ()


class ChangesDuringCheckTest(OperatedCase):
    """Docker and gipam change while they are compared, and no finding comes of that."""

    # Before gipam, /version, /networks, /containers and gipam again are read; the pause.
    POINTS = range(6)
    # The same after the pause, which follows if a first round has found anything.
    LATER_POINTS = range(5, 11)

    def setUp(self) -> None:
        super().setUp()
        docker = self.docker
        self.events = (
            Event("network made", 3, docker.making_network, ("new",)),
            Event("network removed", 2, docker.removing_network, ("old",)),
            Event("container started", 2, docker.starting, ("new", "web")),
            Event("container stopped", 2, docker.stopping, ("one",)),
            Event("container stopped, shown late", 2, docker.stopping, ("one", True)),
            Event("container restarted", 4, self.restarting),
            Event("container stopped, another gets its address", 4, self.replacing),
        )

    def restarting(self) -> Steps:
        """Restart a container."""
        yield from self.docker.stopping("one")
        yield from self.docker.starting("one", "web")

    def replacing(self) -> Steps:
        """Stop a container, and start another with its address."""
        address = self.docker.endpoint("one")["IPAddress"]
        yield from self.docker.stopping("one")
        yield from self.docker.starting("two", "web", address=address)

    def compare(self, pass_point: Callable[[str], Any]) -> list[str]:
        """Return the findings of a comparison; call pass_point before each reading and pause."""
        def read_gipam() -> list[gipam.Holding]:
            pass_point("gipam")
            return list(gipam.holdings_of_json(self.status_now()))

        def pause(pause_s: float) -> None:
            if pause_s:
                pass_point("pause")

        with mock.patch.object(self.docker, "before", pass_point), \
                mock.patch.object(gipam, "RECHECK_DELAY_S", 1), \
                mock.patch.object(time, "sleep", pause):
            findings = gipam.confirmed_differences(read_gipam, self.read_docker, 0)
        return [finding.text for finding in findings.values()]

    def compare_during(self, schedule: Sequence[int], steps: Steps) -> list[str]:
        """Compare, and take a step at each point of the schedule."""
        points = itertools.count()

        def pass_point(_: str) -> None:
            count = schedule.count(next(points))
            finish(itertools.islice(steps, count))

        texts = self.compare(pass_point)
        # A comparison that found nothing at first has not come to the later points.
        finish(steps)
        return texts

    def reset(self) -> None:
        """Begin with two networks and a container."""
        for pool_id in list(self.service.state.pools):
            self.call("IpamDriver.ReleasePool", PoolID=pool_id)
        self.docker.networks.clear()
        self.docker.containers.clear()
        self.docker.pool_ids.clear()
        self.docker.make_network("web")
        self.docker.make_network("old")
        self.docker.start("one", "web")

    def test_order_of_reading(self) -> None:
        """A comparison reads gipam, then Docker; after a difference gipam again, and all once more.

        The number of networks does not matter.
        """
        for number in range(256):
            self.docker.show_foreign(f"net{number}", f"10.9.0.{number}/32")
        points: list[str] = []
        docker = ["/version", "/networks", "/containers/json"]
        self.compare(points.append)
        self.assertEqual(points, ["gipam", *docker])

        self.request_pool("10.7.0.0/24")
        points.clear()
        self.compare(points.append)
        reading = ["gipam", *docker, "gipam"]
        self.assertEqual(points, [*reading, "pause", *reading])

    def test_no_event_is_mistaken_for_a_difference(self) -> None:
        """Each event is spread in every way over the points up to the pause, with no grace time."""
        for event in self.events:
            schedules = itertools.combinations_with_replacement(self.POINTS, event.step_count)
            for schedule in schedules:
                with self.subTest(event.name, at=schedule):
                    self.reset()
                    steps = event.begin(*event.arguments)
                    self.assertEqual(self.compare_during(schedule, steps), [])

    def test_address_that_is_held_for_another_container_at_last(self) -> None:
        self.reset()
        texts = self.compare_during((1, 5, 5), self.replacing())
        self.assertEqual(texts, [])

    def test_leak_is_found_whatever_happens_around_it(self) -> None:
        """No event hides the leak or is reported beside it, even after the pause."""
        for points in (self.POINTS, self.LATER_POINTS):
            for schedule in itertools.combinations_with_replacement(points, 2):
                for is_start in (False, True):
                    with self.subTest(at=schedule, is_start=is_start):
                        self.check_leak_is_found(schedule, is_start)

    def check_leak_is_found(self, schedule: Sequence[int], is_start: bool) -> None:
        """Leak an address, and compare while another container starts or stops."""
        self.reset()
        self.docker.start("two", "web")
        leaked = self.docker.endpoint("one")["IPAddress"]
        self.docker.stop("one", is_released=False)
        if is_start:
            steps = self.docker.starting("new", "web")
        else:
            steps = self.docker.stopping("two")
        text, = self.compare_during(schedule, steps)
        self.assertIn(f" {leaked} ", text)


class ImportCase(OperatedCase):
    """gipam that starts without its lease file, beside a Docker with networks and containers."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.make_network("web", "4", "6")
        self.docker.make_network("lan", "10.9.0.0/24", sub_pool="10.9.0.64/26")
        for name in ("c0", "c1", "c2"):
            self.docker.start(name, "web", "lan")
        self.answers = threading.Event()  # cleared while silence_docker() is in force
        self.is_over = False
        self.patch(gipam, IMPORT_BACKOFF_S=0.01, IMPORT_TIMEOUT_S=DEADLINE_S,
                   docker_socket_path=self.docker_path)
        self.lose_file()

    def docker_path(self) -> str:
        """Return where Docker listens; end the worker when the test is over."""
        if self.is_over:
            raise gipam.ShuttingDown
        return self.docker.path

    def lose_file(self) -> None:
        """Let the next start find no lease file."""
        self.file = os.path.join(make_directory(self), "leases.json")

    def restore_file(self, text: bytes) -> None:
        """Let the next start find this lease file, and no journal."""
        self.lose_file()
        self.write(self.file, text)

    def copy_file(self) -> bytes:
        """Return the lease file as a clean stop leaves it."""
        checkpoint = gipam.Checkpoint(self.service, self.service.run_once)
        self.loop.run_in_loop(checkpoint.run, True)
        return pathlib.Path(self.file).read_bytes()

    def start(self, is_alive: bool = True, has_worker: bool = True) -> gipam.Service:
        """Start gipam, also as after a crash; Docker's requests go to this process from now on."""
        arguments = argparse.Namespace(**self.options())
        settings = gipam.read_settings({}, arguments)
        # The predecessor of this process still has the lock.
        with mock.patch.object(gipam, "is_docker_alive", return_value=is_alive), \
                mock.patch.object(gipam.Store, "lock"):
            config, store, document, state = gipam.open_store(settings)
            self.service = gipam.make_service(config, store, document, state)
            gipam.start_import(config, self.service, document, self.service.run_once)
        # Earlier, the loop's thread would have used the service beside this thread.
        self.loop.service = self.service
        self.service.daemon_info = gipam.describe_daemon(config, self.socket)
        if has_worker:
            self.start_worker()
        return self.service

    def start_worker(self) -> None:
        """Run the worker of the import in a thread until the test ends."""
        service = self.service
        run_in_loop = self.loop.run_in_loop
        worker = threading.Thread(
            target=gipam.import_worker, args=(service, "gipam", run_in_loop, run_in_loop),
            daemon=True)
        worker.start()

        def end() -> None:
            self.is_over = True
            self.answers.set()
            service.docker_import.requested.set()
            worker.join()

        self.addCleanup(end)

    def import_now(self, run_in_loop: Any = None) -> None:
        """Import from Docker as the worker does, in this thread."""
        run_in_loop = run_in_loop or self.loop.run_in_loop
        gipam.import_from_docker(self.service, "gipam", DEADLINE_S, run_in_loop, run_in_loop)

    def is_import_due(self) -> bool:
        return self.service.docker_import.is_due

    def wait_for_import(self) -> None:
        """Wait until no import is due."""
        for _ in sleeping_retry("the import"):
            if not self.is_import_due():
                break

    def wait_for_vain_attempts(self) -> None:
        """Wait until the worker has asked Docker some times, and the import is still due."""
        count = len(self.docker.asked) + 12
        for _ in sleeping_retry("more requests to Docker"):
            if len(self.docker.asked) > count:
                break
        self.assertTrue(self.is_import_due())

    def silence_docker(self) -> None:
        """Let Docker reply only when `answers` is set."""
        self.answers.clear()
        self.docker.before = self.wait_for_answers

    def wait_for_answers(self, _: str) -> None:
        self.answers.wait(DEADLINE_S)

    def assert_all_held(self) -> None:
        """Check that gipam holds the addresses in use, and else only a hidden gateway."""
        ours = self.read_docker().ours
        used = {allocation.address for allocation in ours if allocation.address}
        held = set()
        for addresses in self.held().values():
            held.update(addresses)
        self.assertLessEqual(used, held)
        self.assertEqual(held - used, {"10.9.0.64"}, "the gateway that Docker does not show")
        self.assertEqual(self.check(), [])


class ImportAtStartTest(ImportCase):
    """A start with a lost, a restored or a sound lease file."""

    def test_lost_file_with_docker_alive_is_replaced_before_anything_is_served(self) -> None:
        """Networks that use nothing of gipam are not imported."""
        self.docker.show_network("template", {"Subnet": "10.60.0.0/24"}, ConfigOnly=True,
                                 Driver="null")
        self.docker.show_network("six", {"Subnet": "fd00:7::/64"}, EnableIPv6=False)
        self.docker.show_network("hint", {"Subnet": "0.0.0.0/28"})
        before = gc.get_freeze_count()
        self.start(has_worker=False)
        self.assertFalse(self.is_import_due())
        self.assert_all_held()
        self.assertTrue(gc.isenabled())
        self.assertGreater(gc.get_freeze_count(), before, "imports are collected later")

    def test_docker_that_does_not_answer_does_not_hold_up_the_start(self) -> None:
        for is_alive in (False, True):
            with self.subTest(is_alive=is_alive):
                self.silence_docker()
                self.lose_file()
                with mock.patch.object(gipam, "IMPORT_TIMEOUT_S", 0.05):
                    self.start(is_alive)
                self.assertTrue(self.is_import_due())
                self.assertEqual(self.held(), {})
                # The import does not hold up a request.
                self.docker.start("adopted", "web")
                self.answers.set()
                self.wait_for_import()
                self.assertLess({"10.2.0.0/24", "10.9.0.64/26"}, set(self.held()))
                self.docker.stop("adopted")

    def test_sound_file_costs_one_reading_of_docker_and_one_line(self) -> None:
        self.start(has_worker=False)
        file = self.copy_file()
        self.restore_file(file)
        self.docker.asked.clear()
        with self.assertLogs("gipam", "INFO") as logged:
            service = self.start()
            seq = service.state.seq
            self.wait_for_import()
        self.assertEqual(logged.output, ["INFO:gipam:compared with Docker: nothing is missing"])
        self.assertEqual(self.docker.asked, ["/version", "/networks", "/containers/json"])
        self.assertEqual(service.state.seq, seq)
        self.assertEqual(service.store.journal_bytes, 0)
        self.assertEqual(pathlib.Path(self.file).read_bytes(), file)

    def test_restored_backup_gets_later_grants(self) -> None:
        """Only `check` releases addresses that Docker has released, as their age is not known."""
        self.start(has_worker=False)
        backup = self.copy_file()
        self.start(has_worker=False)
        self.docker.make_network("new", "10.8.0.0/24")
        self.docker.start("late", "web", "new")
        self.docker.stop("c0")
        self.restore_file(backup)
        self.start()
        self.wait_for_import()
        held = self.held()
        self.assertIn("10.8.0.0/24", held)
        late = self.docker.endpoint("late")
        self.assertIn(late["IPAddress"], held["10.2.0.0/24"])
        findings = "\n".join(self.check())
        self.assertRegex(findings, r"\A(leaked_address: .*\n?){3}\Z")

    def test_address_that_the_user_named_is_given_last_after_the_import(self) -> None:
        fixed = "10.90.0.2"
        self.docker.make_network("small", "10.90.0.0/29")
        self.docker.start("fixed", "small", address=fixed)
        others = ("c3", "c4", "c5", "c6")
        for name in others:
            self.docker.start(name, "small")
        self.start(has_worker=False)
        # Of all addresses, this one has rested longest.
        for name in ("fixed", *others):
            self.docker.stop(name)
        for name in others:
            self.docker.start(name, "small")
        self.docker.start("fixed", "small", address=fixed)
        self.assertEqual(self.docker.endpoint("fixed", "small")["IPAddress"], fixed)

    def test_import_follows_an_adoption_before_a_crash(self) -> None:
        """The lease file has the pool of the adopted container, but no other container."""
        self.silence_docker()
        self.start(is_alive=False, has_worker=False)
        self.docker.start("adopted", "lan", address="10.9.0.99")
        self.assertEqual(self.held(), {"10.9.0.64/26": ["10.9.0.64", "10.9.0.99"]})
        self.answers.set()
        self.start()
        self.wait_for_import()
        self.assert_all_held()

    def test_import_that_a_crash_cuts_short_is_completed_at_the_next_start(self) -> None:
        for portion_count in range(3):
            with self.subTest(portions=portion_count):
                self.lose_file()
                self.start(is_alive=False, has_worker=False)
                results: list[Any] = [mock.DEFAULT for _ in range(portion_count)]
                results.append(gipam.StoreError("the host is switched off"))
                with mock.patch.object(gipam, "post_in_loop", side_effect=results,
                                       wraps=gipam.post_in_loop), \
                        self.assertRaises(gipam.StoreError):
                    self.import_now()
                self.assertLess(len(self.held()), 3)
                self.start(has_worker=False)
                self.import_now()
                self.assert_all_held()

    def test_finding_that_cannot_be_fixed_does_not_stop_the_others(self) -> None:
        config = self.docker.networks["web"]["IPAM"]["Config"][0]
        config["AuxiliaryAddresses"] = {"a": "10.77.0.7", "b": "10.2.0.77"}
        self.docker.endpoint("c0", "lan")["IPAddress"] = "10.77.0.8"
        self.docker.show_network("twice", {"Subnet": "10.2.0.0/22"})
        with self.assertLogs("gipam", "WARNING") as logged:
            self.start()
        self.assertRegex("\n".join(logged.output),
                         "not fixed: subnet 10.2.0.0/22 of network twice .*: Pool overlaps")
        held = self.held()
        self.assertLess({"10.2.0.1", "10.2.0.77"}, set(held["10.2.0.0/24"]))
        self.assertEqual(len(held["10.9.0.64/26"]), 3)

    def test_docker_is_alive_if_its_pid_file_names_a_process(self) -> None:
        kill = mock.Mock(wraps=os.kill)
        for text, error, is_alive in (
                (str(os.getpid()), None, True),
                ("1", PermissionError(), True),
                ("4194305", None, False),
                ("garbage", None, False),
                ("", None, False)):
            kill.side_effect = error
            with self.subTest(text), mock.patch.object(os, "kill", kill), \
                    mock.patch("builtins.open", mock.mock_open(read_data=text)):
                self.assertIs(gipam.is_docker_alive(), is_alive)
        with mock.patch("builtins.open", side_effect=FileNotFoundError()):
            self.assertFalse(gipam.is_docker_alive())


class ImportWorkerTest(ImportCase):
    """The thread that imports: its attempts, pauses, portions and log."""

    def test_docker_that_cannot_be_reached_costs_one_line(self) -> None:
        path = self.docker.path
        self.docker.path = self.directory + "/nothing.sock"
        attempts = mock.Mock(wraps=gipam.import_from_docker)
        with self.assertLogs("gipam", "INFO") as logged:
            self.start()
            with mock.patch.object(gipam, "import_from_docker", attempts):
                for _ in sleeping_retry("some attempts"):
                    if attempts.call_count > 3:
                        break
            self.docker.path = path
            self.wait_for_import()
        lines = [line for line in logged.output if "compared" in line]
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[0], "^INFO:gipam:not compared with Docker yet, trying again in the "
                                   "background: Docker does not answer on .*nothing.sock: "
                                   "No such file.*")
        imported = "INFO:gipam:compared with Docker: imported 15 missing items"
        self.assertEqual(lines[1], imported)

    def test_garbage_is_not_collected_during_an_import(self) -> None:
        """A collection stops the loop as well: 30 ms beside 20,000 leases of Docker."""
        is_collecting = []

        def fail(*_: Any) -> None:
            is_collecting.append(gc.isenabled())
            raise gipam.Unreachable("no Docker")

        with mock.patch.object(gipam, "import_from_docker", fail):
            gipam.try_import(self.service, "gipam", DEADLINE_S, mock.Mock(), mock.Mock())
        self.assertEqual(is_collecting, [False])
        self.assertTrue(gc.isenabled())

    def test_worker_goes_on_after_an_unexpected_exception(self) -> None:
        results = [RuntimeError("a bug"), mock.DEFAULT]
        with mock.patch.object(gipam, "import_from_docker", side_effect=results,
                               wraps=gipam.import_from_docker), \
                self.assertLogs("gipam", "ERROR") as logged:
            self.start(is_alive=False)
            self.wait_for_import()
        self.assertRegex("\n".join(logged.output),
                         "cannot compare with Docker, which is a bug.*\n(.*\n)*.*a bug")
        self.assert_all_held()

    def test_pauses_grow_to_a_minute_until_an_adoption(self) -> None:
        service = mock.Mock(docker_import=mock.Mock(is_due=True))
        wait = service.docker_import.requested.wait
        wait.side_effect = [True, *[False] * 7, True, False]
        attempts = [None] * 9 + [gipam.ShuttingDown]
        with mock.patch.object(gipam, "try_import", side_effect=attempts), \
                mock.patch.object(gipam, "IMPORT_BACKOFF_S", 1.0):
            gipam.import_worker(service, "gipam", mock.Mock(), mock.Mock())
        pauses = [call.args[0] for call in wait.mock_calls]
        self.assertEqual(pauses, [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 1.0])

    def test_import_consumes_the_request_that_it_serves(self) -> None:
        """The import consumes the request even if a pool stays unconfirmed."""
        self.start(has_worker=False)
        self.assertFalse(self.service.docker_import.requested.is_set())

        self.lose_file()
        with mock.patch.object(gipam, "confirmed_seqs", return_value=[]):
            self.start(has_worker=False)
        self.assertTrue(self.is_import_due())
        self.assertFalse(self.service.docker_import.requested.is_set())

    def test_import_keeps_a_request_that_comes_while_docker_is_read(self) -> None:
        adopted = ("10.7.0.0/24", "")

        def adopt_once(_: str) -> None:
            docker_import = self.service.docker_import
            unconfirmed = docker_import.unconfirmed
            if unconfirmed and adopted not in unconfirmed.values():
                docker_import.add(10**6, adopted)

        self.docker.before = adopt_once
        self.start(has_worker=False)
        self.assertTrue(self.service.docker_import.requested.is_set())

    def test_order_of_import_leaves_the_widest_gap_to_containers_that_start_meanwhile(self) -> None:
        pool = gipam.DockerAllocation("pool", subnet="10.8.0.0/24", sub_pool="10.8.0.64/26")
        hidden = pool._replace(kind="gateway")
        for offsets, expected in (
                ([], []),
                ([70], [70]),
                ([65, 66, 90], [90, 66, 65]),
                ([64, 127], [64, 127]),
                ([100, 120], [120, 100]),
                ([66, 100, 126, 3, 200], [66, 3, 200, 126, 100])):
            with self.subTest(offsets):
                users = []
                for offset in offsets:
                    users.append(pool._replace(kind="endpoint", address=f"10.8.0.{offset}"))
                ordered = gipam.order_for_import(pool, [hidden, *users])
                self.assertEqual(ordered.pop(), hidden)
                ordered_offsets = []
                for user in ordered:
                    last_byte = user.address.rpartition(".")[2]
                    ordered_offsets.append(int(last_byte))
                self.assertEqual(ordered_offsets, expected)


class Iterations:
    """Runs functions in the loop of a test, and measures how much each iteration handles.

    When a pool has been imported in part, Docker starts a container in it.
    """

    def __init__(self, test: ImportCase, subnet: str) -> None:
        self.test = test
        self.pool_id = f"{subnet}#{TOKEN}"
        self.sizes: list[int] = []
        self.granted = ""  # address of the container
        docker_import = test.service.docker_import
        # Each of these copies small values at once.
        self.not_measured = (docker_import.take, docker_import.unconfirmed.copy)

    def run_in_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function in self.not_measured:
            return self.test.loop.run_in_loop(function, *arguments)
        return self.test.loop.run_in_loop(self.measure, function, *arguments)

    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function, and note how many records it applies and leases it passes."""
        service = self.test.service
        seq = service.state.seq
        result = function(*arguments)
        change_count = service.state.seq - seq
        self.sizes.append(change_count)
        for value in (result, *arguments):
            if isinstance(value, (list, dict)):
                self.sizes.append(len(value))
        if change_count and not self.granted:
            request = gipam.AddressRequest("", "endpoint", "", "")
            grant, _ = service.request_address(self.pool_id, request)
            self.granted = grant.address
        return result


class ImportOfManyTest(ImportCase):
    """The import of more leases than an iteration of the loop may handle."""

    SUBNET = "10.8.0.0/21"

    def use_addresses(self) -> list[str]:
        """Return addresses with gaps between them."""
        addresses = []
        for number in (*range(1, 200), *range(300, 1900), 2000):
            addresses.append(f"10.8.{number >> 8}.{number & 255}")
        return addresses

    def docker_view(self, addresses: list[str]) -> gipam.DockerView:
        """Return a reading of Docker with one pool, in which these addresses are used."""
        pool = gipam.DockerAllocation(
            "pool",
            subnet=self.SUBNET,
            driver="gipam",
            docker_id="n",
            network="n")
        allocations = [pool]
        for address in addresses:
            endpoint = pool._replace(kind="endpoint", address=address, docker_id=address)
            allocations.append(endpoint)
        return gipam.DockerView(allocations, [])

    def test_iteration_handles_a_few_hundred_leases(self) -> None:
        """The limit holds for look-ups, imports and confirmations, while containers start."""
        self.start(has_worker=False)
        used = self.use_addresses()
        iterations = Iterations(self, self.SUBNET)
        view = self.docker_view(used)
        with mock.patch.object(gipam, "read_docker_allocations", return_value=view):
            self.import_now(iterations.run_in_loop)
        held = self.held()[self.SUBNET]
        self.assertEqual(set(used) - set(held), set())
        self.assertNotIn(iterations.granted, used)
        self.assertIn(iterations.granted, held, "though Docker does not show it yet")
        self.assertLessEqual(max(iterations.sizes), gipam.LEASES_PER_CHUNK)
        self.assertFalse(self.is_import_due())


class ReleaseDuringImportTest(ImportCase):
    """Docker releases an address while gipam imports an earlier reading of Docker."""

    def test_address_that_is_released_while_docker_is_read_is_not_imported(self) -> None:
        """A container stops when gipam starts again, so the reading is older than the release."""
        self.start(has_worker=False)
        steps = self.docker.stopping("c0", is_shown_late=True)

        def stop_after_containers(path: str) -> None:
            if path == "/version" and "/containers/json" in self.docker.asked:
                finish(steps)
            elif path == "/containers/json":
                next(steps, None)

        self.docker.asked.clear()
        self.docker.before = stop_after_containers
        seq = self.service.state.seq
        with mock.patch.object(self.service, "import_pool") as import_pool:
            self.import_now()
        import_pool.assert_not_called()
        self.assertGreater(self.service.state.seq, seq, "it has been released")

    def test_address_that_docker_shows_a_little_longer_is_not_imported(self) -> None:
        """Docker removes an endpoint from the list of its network after the release."""
        self.start(has_worker=False)
        self.release(self.docker.endpoint("c0")["IPAddress"])

        def hide_at_second_reading(path: str) -> None:
            if path in self.docker.asked:
                self.docker.hide_addresses("c0")

        self.docker.asked.clear()
        self.docker.before = hide_at_second_reading
        seq = self.service.state.seq
        self.import_now()
        self.assertEqual(self.service.state.seq, seq, "imported, if only for a moment")

    def release_before_import(self) -> None:
        """Let Docker release a network and a container's addresses just before an import.

        gipam does not hold them yet, so the releases do nothing, and Docker does not repeat them.
        """
        import_pool = gipam.Service.import_pool

        def import_after_release(service: gipam.Service, *arguments: Any) -> Any:
            if "old" in self.docker.networks:
                # No iteration may use this service while its start goes on.
                previous = self.loop.service
                self.loop.service = service
                self.docker.stop("c0")
                self.docker.remove_network("old")
                self.loop.service = previous
            return import_pool(service, *arguments)

        self.docker.make_network("old", "10.8.0.0/24")
        self.patch(gipam.Service, import_pool=import_after_release)

    def test_released_pool_is_released_after_its_import(self) -> None:
        self.release_before_import()
        self.start()
        self.assertFalse(self.is_import_due())
        self.assertNotIn("10.8.0.0/24", self.held())
        self.assert_all_held()

    def test_released_pool_is_released_later_if_docker_cannot_be_asked_again(self) -> None:
        def hang_up(_: str) -> None:
            if "old" not in self.docker.networks:
                raise ConnectionResetError

        self.release_before_import()
        self.docker.before = hang_up
        self.start()
        self.assertTrue(self.is_import_due())
        self.assertIn("10.8.0.0/24", self.held())
        self.docker.before = reply_at_once
        self.wait_for_import()
        self.assertNotIn("10.8.0.0/24", self.held())
        self.assert_all_held()


class ImportOfAdoptedPoolTest(ImportCase):
    """A pool that gipam has adopted by the id of a request, until Docker confirms it."""

    def test_first_address_is_kept_for_the_gateway_until_docker_shows_it(self) -> None:
        """Before 29, an empty network with a size hint does not show its subnet."""
        self.docker.make_network("hint", options={"gipam.v4ab": "29"})
        self.docker.show_hint("hint", "0.0.0.0/29")
        self.start()
        subnet = subnet_of(self.docker.pool_ids["hint", 4])
        gateway = str(subnet[1])
        steps = self.docker.starting("first", "hint")
        # gipam grants its address, which Docker does not show yet.
        next(steps)
        self.wait_for_vain_attempts()
        for _ in range(4):
            self.request("", "hint")
        with self.assertRaisesRegex(ErrorReply, "no available addresses"):
            self.request("", "hint")

        kinds = {}
        for pool in self.status_now()["pools"]:
            for lease in pool["addresses"]:
                kinds[lease["address"]] = lease["kind"]
        self.assertEqual(kinds[gateway], "gateway")
        finish(steps)
        self.docker.endpoint("first", "hint")["Gateway"] = gateway
        self.wait_for_import()
        self.assertIn(gateway, self.held()[str(subnet)])

    def test_pool_that_docker_requests_from_is_not_released_though_no_network_has_it(self) -> None:
        self.start()
        self.docker.pool_ids["hint", 4] = f"10.8.0.0/24#{TOKEN}"
        self.request("10.8.0.9", "hint")
        self.wait_for_vain_attempts()
        self.assertEqual(self.held()["10.8.0.0/24"], ["10.8.0.1", "10.8.0.9"])

    def test_first_address_is_released_if_it_is_no_gateway(self) -> None:
        self.docker.version = 29
        self.docker.make_network("bare", "10.8.0.0/29", has_gateway=False, Driver="macvlan")
        self.silence_docker()
        self.start(is_alive=False)
        self.docker.start("one", "bare")
        address = self.docker.endpoint("one", "bare")["IPAddress"]
        held = self.held()["10.8.0.0/29"]
        self.assertEqual(set(held), {"10.8.0.1", address})
        self.answers.set()
        self.wait_for_import()
        self.assertEqual(self.held()["10.8.0.0/29"], [address])
        self.docker.start("two", "bare", address="10.8.0.1")

    def test_first_parseable_id_is_bound_to_an_imported_pool(self) -> None:
        pool_id = self.docker.pool_ids["lan", 4]
        unbound = "10.9.0.0/24,10.9.0.64/26#unbound"
        self.start()
        pools = self.service.state.pools
        self.assertIn(unbound, pools)
        self.docker.stop("c0")
        self.assertNotIn(unbound, pools)
        self.assert_all_held()

        # The id of a network that had this range before.
        digit = "1" if pool_id.endswith("0") else "0"
        self.call("IpamDriver.ReleasePool", PoolID=pool_id[:-1] + digit)
        self.assertIn(pool_id, pools)
        self.assertEqual(set(recover(self.file).pools), set(pools))


# === Cluster ======================================================================================
#
# Several hosts, each a service with a loop in this process, and an etcd that can be made to fail at
# will. The tests are stories: tuples of steps, each of which names a host, its action and the
# result. The lab tests a real etcd.


class FakeEtcd(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Keeps keys and values in memory, and serves them as the JSON gateway of an etcd does.

    Source: https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, test: unittest.TestCase) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.lock = threading.RLock()
        self.values: dict[str, str] = {}  # below /gipam/gipam/
        self.revision = 1
        self.tokens: set[str] = set()
        self.password = ""  # that it wants, if any
        self.is_away = False
        self.is_full = False  # its disk quota is used up
        self.closes_each_connection = False
        self.paths: list[str] = []  # of all requests
        self.written: list[dict[str, str]] = []  # by each transaction
        self.interventions: list[Intervention] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        serving = threading.Thread(
            target=self.serve_forever,
            args=(0.01,),
            daemon=True,
        )
        serving.start()
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)
        test.addCleanup(self.go_away)

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with request.makefile("rb") as stream:
            while True:
                line = stream.readline()
                if not line:
                    return
                headers = http.client.parse_headers(stream)
                body = json.loads(stream.read(int(headers["Content-Length"])))
                with self.lock:
                    status, reply = self.answer(
                        line.decode().split()[1], body, headers["Authorization"])
                data = json.dumps(reply).encode()
                end = b"Connection: close\r\n" if self.closes_each_connection else b""
                request.sendall(b"HTTP/1.1 %d Well\r\nContent-Length: %d\r\n%s\r\n" % (
                    status, len(data), end))
                request.sendall(data)
                if end:
                    return

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent when gipam has not waited for the answer, or gets none."""

    def go_away(self) -> None:
        with self.lock:
            self.is_away = True

    def come_back(self) -> None:
        with self.lock:
            self.is_away = False

    def answer(
        self,
        path: str,
        body: dict[str, Any],
        token: str | None,
    ) -> tuple[int, Any]:
        if self.is_away:
            raise ConnectionError
        self.paths.append(path)
        if path == "/v3/auth/authenticate":
            return self.authenticate(body["password"])
        if self.password and token not in self.tokens:
            return 401, {"code": 16, "message": "etcdserver: invalid auth token"}
        if path == "/v3/kv/txn":
            if max(map(len, body.values())) > 128:  # --max-txn-ops
                return 400, {"code": 3, "message": "etcdserver: too many operations"}
            if self.is_full:
                return 429, {"code": 8, "message": "etcdserver: mvcc: database space exceeded"}
            reply = self.intervene(body) or self.carry_out(body)
        else:
            reply = self.range(body)
        reply["header"] = {"revision": str(self.revision)}
        return 200, reply

    def authenticate(self, password: str) -> tuple[int, Any]:
        if password != self.password:
            return 400, {"code": 3, "message": "etcdserver: authentication failed"}
        token = f"token{len(self.paths)}"
        self.tokens.add(token)
        return 200, {"header": {}, "token": token}

    @staticmethod
    def decode(field: str) -> str:
        return gipam.from_base64(field)[len("/gipam/gipam/"):]

    def range(self, body: dict[str, Any]) -> dict[str, Any]:
        start = gipam.from_base64(body["key"])
        end = gipam.from_base64(body["range_end"])
        keys = []
        for key in sorted(self.values):
            if start <= "/gipam/gipam/" + key < end:
                keys.append(key)
        limit = int(body.get("limit", 0)) or len(keys)
        pairs = []
        for key in keys[:limit]:
            pairs.append({
                "key": gipam.to_base64("/gipam/gipam/" + key),
                "value": gipam.to_base64(self.values[key]),
            })
        return {"more": limit < len(keys), "kvs": pairs}

    def intervene(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out the first intervention that waits for a transaction like this one."""
        words = []
        for operation in body["success"]:
            for kind, request in operation.items():
                if kind == "request_put":
                    words.append(self.decode(request["key"]))
                elif kind == "request_delete_range":
                    words.append("-" + self.decode(request["key"]))
        for intervention in self.interventions:
            if any(word.startswith(intervention.key) for word in words):
                self.interventions.remove(intervention)
                reply: dict[str, Any] | None = intervention.function(body)
                return reply
        return None

    def before(self, key: str, function: Callable[[dict[str, Any]], Any]) -> None:
        """Call the function before, or for, the next transaction that writes key or deletes -key.

        The value that the function returns, if any, is the reply.
        """
        self.interventions.append(Intervention(key, function))

    def lose_reply(self, body: dict[str, Any]) -> None:
        """Carry out the transaction, but send no reply."""
        self.carry_out(body)
        raise ConnectionError

    def carry_out(self, body: dict[str, Any]) -> dict[str, Any]:
        is_expected = all(self.compare(comparison) for comparison in body["compare"])
        replies = []
        written = {}
        branch = "success" if is_expected else "failure"
        for operation in body[branch]:
            for kind, request in operation.items():
                if kind == "request_range":
                    replies.append({"response_range": self.range(request)})
                else:
                    value = gipam.from_base64(request.get("value", ""))
                    written[self.decode(request["key"])] = value
        self.written.append(written)
        for key, value in written.items():
            self.put(key, value)
        return {"succeeded": is_expected, "responses": replies}

    def compare(self, comparison: dict[str, str]) -> bool:
        key = self.decode(comparison["key"])
        if comparison["target"] == "VERSION":
            return key not in self.values
        return self.values.get(key) == gipam.from_base64(comparison["value"])

    def put(self, key: str, value: str) -> None:
        """Write a key, or delete it if there is no value."""
        self.revision += 1
        self.values.pop(key, None)
        if value:
            self.values[key] = value

    def set(self, key: str, value: Any) -> None:
        """Write or delete a key as another process does; a claim changes the head, too."""
        text = value if isinstance(value, str) else json.dumps(value)
        with self.lock:
            self.put(key, text)
            if key.startswith("claims/"):
                self.put("head", f"somebody's {self.revision}")

    def claim_for_other(self, key: str) -> None:
        """Claim a subnet, or an address, for a host that does not exist here."""
        self.set(f"claims/{key}", {"hosts": ["other"], "kind": "endpoint"})

    def claim_for_other_before(self, waits_for: str, key: str) -> None:
        """Claim a subnet for such a host before the next transaction that writes the first key."""
        def claim(_: Any) -> None:
            self.claim_for_other(key)

        self.before(waits_for, claim)

    def claims(self, has_addresses: bool = False) -> dict[str, list[str]]:
        """Return the hosts of each subnet that is claimed, or of each address."""
        hosts = {}
        with self.lock:
            for key, value in sorted(self.values.items()):
                table, _, claim_key = key.partition("/")
                if table == "claims" and (claim_key.count("/") == 2) == has_addresses:
                    hosts[claim_key] = json.loads(value)["hosts"]
        return hosts


class Intervention(NamedTuple):
    """A function that is called at the next transaction that writes a key."""

    key: str
    function: Callable[[dict[str, Any]], Any]


class Host(Client):
    """A gipam in this process, which shares an etcd with others."""

    def __init__(
        self,
        test: ClusterCase,
        name: str,
        directory: str = "",
        machine: gipam.MachineId | None = None,
    ) -> None:
        self.name = name
        self.directory = directory or make_directory(test)
        options = argparse.Namespace(
            file=os.path.join(self.directory, "leases.json"),
            v4="198.18.0.0/16",
            v4ab="24",
            etcd=test.etcd_url,
            host=name)
        settings = gipam.read_settings({}, options)
        config, self.store, document, state = gipam.open_store(settings)
        test.addCleanup(self.unlock)
        self.service = gipam.make_service(config, self.store, document, state)
        self.loop = gipam.EventLoop(self.service)
        machine = machine or gipam.read_machine_id(self.store.path)
        threads = set(threading.enumerate())
        with mock.patch.object(gipam, "read_machine_id", return_value=machine):
            member = gipam.join_cluster(config, self.loop, self.store)
        started = set(threading.enumerate()) - threads
        self.etcd_threads = [thread for thread in started if thread.name == "etcd"]
        assert member
        assert isinstance(self.service.claims, gipam.ClaimTable)
        self.member = member
        self.table = self.service.claims
        self.loop.submit_to_etcd = member.submit
        self.path = os.path.join(make_directory(test), "sock")
        self.service.daemon_info = gipam.describe_daemon(config, self.path)
        self.loop.add_listener(gipam.UnixServer(self.path, self.loop))
        test.addCleanup(self.hurry)  # it finds that the loop is over
        self.thread = serve_in_thread(test, self.loop)
        super().__init__(self.path)
        test.addCleanup(self.close)

    def unlock(self) -> None:
        lock_file = self.store._lock_file
        self.store._lock_file = None
        if lock_file:
            lock_file.close()

    def crash(self) -> None:
        """End the host as SIGKILL does."""
        self.loop.stop()
        self.thread.join()
        self.loop.close_callbacks()
        self.hurry()
        self.store.close()
        self.unlock()

    def end_thread(self) -> None:
        """Wait until the thread of etcd has seen that its loop is over."""
        (thread,) = self.etcd_threads
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    def hurry(self) -> None:
        """Have the host look at etcd now."""
        self.member._next_heartbeat_s = 0.0
        self.member._wakeup.set()

    def settle(self) -> None:
        """Wait until the host has looked at etcd, and has nothing left to reconcile."""
        # The second look shows that the first has ended.
        for _ in range(2):
            self.hurry()
            wait_until("a look at etcd", getattr, self.member, "_next_heartbeat_s")
        self.finish_round()
        wait_until("nothing to reconcile", self.is_reconciled)

    def is_reconciled(self) -> bool:
        return not self.table.dirty

    def samples(self) -> dict[str, float]:
        """Return the value of each series of the metrics."""
        page = gipam.metrics_page(self.service, "")
        return parse_samples("".join(self.loop.run_in_loop(list, page)))

    def has_waiting(self, count: int) -> bool:
        """Return whether this many requests wait for etcd, in the queue or in a transaction."""
        waiting = 0
        for connection in list(self.loop.connections):
            request = connection.current_request
            if request and request.awaits_etcd:
                waiting += 1
        return waiting == count

    def finish_round(self) -> None:
        """Wait until the etcd thread has ended its present round."""
        self.member.run_with_claim(bool)

    def is_grace_over(self) -> bool:
        return self.table.members.grace_remaining_s() <= 0

    def conflict(self, subnet: str) -> str:
        """Return the other hosts that have claimed a subnet held here."""
        return self.table.conflict_text(gipam.parse_prefix(subnet))


class Network(NamedTuple):
    """Step: Docker creates a network on a host."""

    host: str
    subnet: str = ""  # asked for; "": any block
    gets: str = ""  # the subnet, if another than asked for
    sub_pool: str = ""
    shared: bool = False
    name: str = ""
    refused: str = ""  # in these words

    def run(self, case: ClusterCase) -> None:
        options: dict[str, Any] = {}
        if self.shared:
            options["gipam_shared"] = "true"
        if self.name:
            options["gipam_name"] = self.name
        host = case.hosts[self.host]
        if self.refused:
            case.assert_refused(self.refused, host.request_pool, self.subnet, self.sub_pool,
                                **options)
            return
        pool_id, subnet = host.request_pool(self.subnet, self.sub_pool, **options)
        case.pool_ids[self.host, subnet] = pool_id
        if self.gets or self.subnet:
            case.assertEqual(subnet, self.gets or self.subnet)


class Remove(NamedTuple):
    """Step: Docker removes the network of a subnet on a host."""

    host: str
    subnet: str

    def run(self, case: ClusterCase) -> None:
        pool_id = case.pool_ids.pop((self.host, self.subnet))
        case.hosts[self.host].release_pool(pool_id)


class RequestStep(NamedTuple):
    """Step: Docker asks for an address on a host, by its MAC address for a container."""

    host: str
    subnet: str
    address: str = ""  # asked for; "": any
    gets: str = ""  # the address, if another than asked for
    mac: str = MAC
    is_gateway: bool = False
    refused: str = ""  # in these words

    def run(self, case: ClusterCase) -> None:
        host = case.hosts[self.host]
        pool_id = case.pool_ids[self.host, self.subnet]
        mac = "" if self.is_gateway else self.mac
        arguments = (pool_id, self.address, mac, "", self.is_gateway)
        if self.refused:
            case.assert_refused(self.refused, host.request_address, *arguments)
            return
        address, _, _ = host.request_address(*arguments).partition("/")
        if self.gets or self.address:
            case.assertEqual(address, self.gets or self.address)


class Free(NamedTuple):
    """Step: Docker releases an address on a host."""

    host: str
    subnet: str
    address: str

    def run(self, case: ClusterCase) -> None:
        pool_id = case.pool_ids[self.host, self.subnet]
        case.hosts[self.host].release_address(pool_id, self.address)


class Claimed(NamedTuple):
    """Step: etcd comes to have exactly these claims on subnets."""

    claims: dict[str, list[str]]

    def run(self, case: ClusterCase) -> None:
        case.wait_for_claims(self.claims)


class ClaimedAddresses(NamedTuple):
    """Step: etcd comes to have exactly these claims on addresses."""

    claims: dict[str, list[str]]

    def run(self, case: ClusterCase) -> None:
        case.wait_for_claims(self.claims, has_addresses=True)


class Key(NamedTuple):
    """Step: somebody writes a key in etcd, or deletes it."""

    key: str
    value: Any = ""

    def run(self, case: ClusterCase) -> None:
        case.etcd.set(self.key, self.value)


class DeletedByHand(NamedTuple):
    """Step: somebody deletes a key with etcdctl, which writes no new head."""

    key: str

    def run(self, case: ClusterCase) -> None:
        with case.etcd.lock:
            case.etcd.put(self.key, "")


class EtcdGoesAway(NamedTuple):
    """Step: etcd goes away, and these hosts find out."""

    hosts: tuple[str, ...] = ()

    def run(self, case: ClusterCase) -> None:
        case.etcd.go_away()
        for name in self.hosts:
            host = case.hosts[name]
            host.hurry()
            wait_until("it is away", getattr, host.table, "failure")


class EtcdComesBack(NamedTuple):
    """Step: etcd answers again."""

    def run(self, case: ClusterCase) -> None:
        case.etcd.come_back()


class Settle(NamedTuple):
    """Step: these hosts look at etcd and reconcile."""

    hosts: tuple[str, ...]

    def run(self, case: ClusterCase) -> None:
        for name in self.hosts:
            case.hosts[name].settle()


class Conflict(NamedTuple):
    """Step: a host learns which hosts have claimed its subnet, too; "" means none."""

    host: str
    subnet: str
    text: str

    def run(self, case: ClusterCase) -> None:
        host = case.hosts[self.host]
        for _ in sleeping_retry(f"a conflict with {self.text!r}"):
            if host.conflict(self.subnet) == self.text:
                return


class ClusterCase(CommandCase):
    """An etcd, and hosts that share it. Times are short, but for the deadlines of requests."""

    HOSTS: tuple[str, ...] = ()

    def setUp(self) -> None:
        super().setUp()
        self.etcd = FakeEtcd(self)
        self.addCleanup(self.end_threads)
        self.etcd_url = self.etcd.url
        self.patch(gipam, HEARTBEAT_INTERVAL_S=0.2, ETCD_PAUSE_S=0.01, GRACE_PERIOD_S=0.3,
                   ETCD_MIN_LOOK_S=0.05)
        self.pool_ids: dict[tuple[str, str], str] = {}
        self.hosts = {name: Host(self, name) for name in self.HOSTS}

    @staticmethod
    def end_threads() -> None:
        """Wait until the threads of etcd have seen that their loop is over."""
        for thread in threading.enumerate():
            if thread.name == "etcd":
                thread.join(DEADLINE_S)
                assert not thread.is_alive()

    def tell(self, *steps: Any) -> None:
        """Run the steps of a story."""
        for number, step in enumerate(steps, 1):
            try:
                step.run(self)
            except (AssertionError, ErrorReply) as error:
                raise AssertionError(f"step {number}, {step}: {error}") from error

    def start(
        self,
        name: str,
        directory: str = "",
        machine: gipam.MachineId | None = None,
    ) -> Host:
        """Start a host, and return it."""
        self.hosts[name] = Host(self, name, directory, machine)
        return self.hosts[name]

    def wait_for_claims(self, claims: dict[str, list[str]], has_addresses: bool = False) -> None:
        for _ in sleeping_retry(f"{claims} in etcd, not {self.etcd.claims(has_addresses)}"):
            if self.etcd.claims(has_addresses) == claims:
                return

    def assert_refused(
        self,
        text: str,
        function: Callable[..., Any],
        *arguments: Any,
        **named: Any,
    ) -> None:
        with self.assertRaises(ErrorReply) as caught:
            function(*arguments, **named)
        self.assertIn(text, str(caught.exception))

    def evict(self, host: Host, name: str) -> None:
        """Evict a host as soon as it is absent."""
        for _ in sleeping_retry(f"{name} to be evicted"):
            try:
                host.call("Gipam.Evict", Host=name)
                return
            except ErrorReply as error:
                self.assertIn("is alive", str(error))

    def gipam(
        self,
        host: Host,
        *words: str,
        answer: str = "",
    ) -> Finished:
        """Run a command on a host, without a Docker."""
        return self.run_main(*words, "-socket", host.path, stdin=Terminal(answer),
                             DOCKER_HOST="unix:///nonexistent")

    def pause_reconciling(self, host: Host) -> Any:
        """Return a context in which subnets and addresses that a host has released stay claimed."""
        return mock.patch.object(host.table, "reconcile")


class TwoHosts(ClusterCase):
    """Hosts one and two."""

    HOSTS = ("one", "two")

    @property
    def one(self) -> Host:
        return self.hosts["one"]

    @property
    def two(self) -> Host:
        return self.hosts["two"]


class ClaimTest(TwoHosts):
    """Blocks and explicit subnets of several hosts."""

    def test_subnet_of_another_host_is_refused_with_its_name_until_it_is_released(self) -> None:
        self.tell(Network("one", "10.9.0.0/16"))
        for subnet in ("10.9.0.0/16", "10.9.1.0/24", "10.8.0.0/15"):
            self.tell(Network("two", subnet, refused="with 10.9.0.0/16, claimed by host one"))
            error = gipam.StoreError("the disk is full")
            self.two.loop.run_in_loop(self.two.service.reload, error)
        self.tell(
            Remove("one", "10.9.0.0/16"),
            Claimed({}),
            Network("two", "10.9.0.0/24"),  # before a refusal, etcd is looked at again
            Claimed({"10.9.0.0/24": ["two"]}))

    def test_pool_id_that_gipam_has_not_made_is_refused_without_etcd(self) -> None:
        self.tell(
            Network("one", "10.9.0.0/16"),
            Network("two", "10.9.1.0/24", refused="claimed by host one"))
        request = gipam.AddressRequest("", gipam.ENDPOINT, "", "web")
        self.assertRaisesRegex(gipam.InvalidRequest, "no pool has this id",
                               self.two.service.request_address, "web", request)

    def test_claim_that_comes_between_the_decision_and_the_reply_counts(self) -> None:
        """The head is compared, so a claim counts even if it conflicts with no known claim."""
        for subnet in ("198.18.0.0/24", "198.18.1.0/24"):
            self.etcd.claim_for_other_before(f"claims/{subnet}", subnet)
        self.tell(Network("one", gets="198.18.2.0/24"))
        self.etcd.claim_for_other_before("claims/10.9.0.0/16", "10.9.1.0/24")
        self.tell(Network("one", "10.9.0.0/16", refused="claimed by host other"))
        self.etcd.before("claims/", self.etcd.lose_reply)
        self.tell(
            Network("one", gets="198.18.3.0/24"),
            Claimed({
                "10.9.1.0/24": ["other"],
                "198.18.0.0/24": ["other"],
                "198.18.1.0/24": ["other"],
                     "198.18.2.0/24": ["one"], "198.18.3.0/24": ["one"]}))
        self.assertEqual(self.etcd.interventions, [])

    def test_claim_of_a_process_that_was_suspended_is_made_anew(self) -> None:
        """A suspended process may be evicted between its claim and its reply without knowing it."""
        self.tell(Network("one", "10.8.0.0/24", shared=True))
        clock = mock.Mock(return_value=0.0)
        self.patch(gipam, boottime_s=clock)

        def suspend(key: str) -> None:
            def carry_out(body: dict[str, Any]) -> dict[str, Any]:
                reply = self.etcd.carry_out(body)
                clock.return_value += gipam.TRANSACTION_MAX_AGE_S + 1
                self.etcd.claim_for_other(key)
                return reply

            self.etcd.before(f"claims/{key}", carry_out)

        suspend("198.18.0.0/24")
        suspend("10.8.0.0/24/10.8.0.9")
        self.tell(
            Network("one", gets="198.18.1.0/24"),
            RequestStep("one", "10.8.0.0/24", "10.8.0.9", refused="claimed by host other"))

    def test_claim_is_applied_in_the_iteration_that_grants_it(self) -> None:
        """So nothing that happens in the loop comes between the two."""
        run_in_loop = self.one.member._run_in_loop
        table = self.one.table
        differences = []

        def run_and_compare(*arguments: Any) -> Any:
            result = run_in_loop(*arguments)
            differences.append(table.differences(list(table.claims)))
            return result

        self.patch(self.one.member, _run_in_loop=run_and_compare)
        self.tell(
            Network("one", "10.9.0.0/24"),
            Network("one", LAN, shared=True),
            RequestStep("one", LAN, "192.168.1.9"))
        self.assertGreater(len(differences), 3)
        self.assertFalse(any(differences), differences)

    def test_several_requests_of_a_host_share_a_transaction(self) -> None:
        """No request gets the subnet of another."""
        paused = threading.Event()
        self.addCleanup(paused.set)

        def pause(_: Any) -> None:
            paused.wait(DEADLINE_S)

        self.etcd.before("claims/", pause)
        clients = [Client(self.one.path) for _ in range(8)]
        with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
            replies = [pool.submit(client.request_pool) for client in clients]
            wait_until("all are waiting", self.one.has_waiting, len(clients))
            before = len(self.etcd.written)
            paused.set()
            subnets = {reply.result()[1] for reply in replies}
        for client in clients:
            client.close()
        self.assertEqual(len(subnets), 8)
        self.wait_for_claims({subnet: ["one"] for subnet in sorted(subnets)})
        committed = [keys for keys in self.etcd.written[before:] if "head" in keys]
        self.assertLessEqual(len(committed), 3)

    def test_subnet_that_is_claimed_by_another_host_too_gives_no_new_address(self) -> None:
        self.tell(
            Network("one", gets="198.18.0.0/24"),
            RequestStep("one", "198.18.0.0/24"))
        with self.assertLogs("gipam", "ERROR") as logged:
            self.tell(
                Key("claims/198.18.0.0/24", {"hosts": ["other"]}),
                Conflict("one", "198.18.0.0/24", "host other"))
            self.one.settle()
        self.assertIn("claimed_elsewhere: 198.18.0.0/24 is held here", logged.output[0])
        self.tell(RequestStep("one", "198.18.0.0/24", mac="", refused="claimed by host other too"))
        (pool,) = self.one.state()["pools"]
        self.assertEqual(pool["claimed_elsewhere"], "host other")
        self.assertIn("\n  claimed by host other", self.gipam(self.one, "status").out)
        self.tell(
            Key("claims/198.18.0.0/24"),
            Conflict("one", "198.18.0.0/24", ""),
            RequestStep("one", "198.18.0.0/24", mac=""),
            Claimed({"198.18.0.0/24": ["one"]}),
            Key("claims/198.18.0.0/24", {"hosts": ["other"]}),
            Conflict("one", "198.18.0.0/24", "host other"),
            Remove("one", "198.18.0.0/24"),
            Settle(("one",)),
            Claimed({"198.18.0.0/24": ["other"]}))

    def test_another_range_of_a_subnet_in_conflict_is_refused(self) -> None:
        """The refused request leaves the claim of the other host as it is."""
        self.tell(Network("one", "10.9.0.0/24", sub_pool="10.9.0.0/25"))
        words = "10.9.0.0/24 is held here, but claimed by host other too"
        for subnet in ("10.9.0.0/24", "10.9.0.0/16"):
            before = self.etcd.values.get(f"claims/{subnet}", "")
            self.tell(
                Key(f"claims/{subnet}", {"hosts": ["other"]}),
                Network("one", "10.9.0.0/24", sub_pool="10.9.0.128/25", refused=words))
            self.assertEqual(self.etcd.claims()[subnet], ["other"])
            self.tell(Key(f"claims/{subnet}", before))
        self.tell(Network("one", "10.9.0.0/24", sub_pool="10.9.0.128/25"))

    def test_conflict_is_looked_for_in_etcd_before_an_address_is_refused(self) -> None:
        self.tell(Network("one", "10.9.0.0/24"))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S, ETCD_TIMEOUT_S=0.3)
        self.tell(
            Key("claims/10.9.0.0/24", {"hosts": ["other"]}),
            Settle(("one",)),
            Conflict("one", "10.9.0.0/24", "host other"),
            EtcdGoesAway(),
            RequestStep("one", "10.9.0.0/24", refused="etcd does not answer"))
        with self.etcd.lock:
            self.tell(
                EtcdComesBack(),
                Key("claims/10.9.0.0/24"))
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        self.tell(RequestStep("one", "10.9.0.0/24"))

    def test_host_that_loses_a_race_goes_on_at_once_and_the_winner_pauses(self) -> None:
        pauses: list[float] = []
        self.patch(time, sleep=pauses.append)
        self.etcd.claim_for_other_before("claims/", "10.9.0.0/24")
        self.tell(Network("one"))
        self.assertEqual(pauses, [])
        self.patch(gipam, ETCD_PAUSE_S=DEADLINE_S / 3, ETCD_TIMEOUT_S=2 * DEADLINE_S)
        with mock.patch.object(random, "uniform", return_value=0.0):
            self.etcd.claim_for_other_before("claims/", "10.10.0.0/24")
            self.tell(
                Network("one"),
                Network("one"))
        self.assertEqual(pauses, [])
        with mock.patch.object(random, "uniform", return_value=1e9):
            self.etcd.claim_for_other_before("claims/", "10.11.0.0/24")
            self.tell(
                Network("one"),
                Network("one"))
        self.assertGreater(max(pauses), 1.0)
        self.assertLessEqual(max(pauses), 2 * gipam.ETCD_PAUSE_S)

    def test_winner_does_not_pause_while_a_request_has_no_time_for_that(self) -> None:
        self.patch(gipam, ETCD_PAUSE_S=1.0, ETCD_TIMEOUT_S=2.5)
        pauses: list[float] = []
        self.patch(time, sleep=pauses.append)
        self.etcd.claim_for_other_before("claims/", "10.9.0.0/24")
        with mock.patch.object(random, "uniform", return_value=1e9):
            self.tell(
                Network("one"),
                Network("one"))
        longest_s = gipam.ETCD_TIMEOUT_S - gipam.ETCD_PAUSE_S
        self.assertLess(max(pauses, default=0.0), longest_s)

    def test_request_that_others_win_over_each_time_is_refused_in_time(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=0.3)

        def win(_: Any) -> None:
            self.etcd.put("head", f"another {self.etcd.revision}")
            self.etcd.before("head", win)

        self.etcd.before("head", win)
        # etcd is too slow; if the time ends in the middle of a transaction, etcd does not answer.
        self.tell(Network("one", refused="etcd "))
        self.etcd.interventions.clear()
        self.tell(Network("one"))

    def test_head_that_is_there_and_empty_is_not_taken_for_none(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        for count in (1, 2):
            with self.etcd.lock:
                self.etcd.values["head"] = ""
            self.tell(Network("one"))
            self.assertEqual(len(self.etcd.claims()), count)


class FollowTest(TwoHosts):
    """How a host learns of changes that others have made."""

    def test_many_claims_are_applied_in_portions(self) -> None:
        apply_claims = gipam.ClaimTable.apply_claims
        sizes = []

        def measure(table: gipam.ClaimTable, claims: Any) -> None:
            sizes.append(len(claims))
            apply_claims(table, claims)

        self.patch(gipam.ClaimTable, apply_claims=measure)
        for value in ({"hosts": ["other"]}, ""):
            with self.etcd.lock:
                for number in range(1000):
                    key = f"claims/10.{number % 250}.{number // 250}.0/24"
                    self.etcd.put(key, json.dumps(value) if value else "")
                self.etcd.set("claims/10.250.0.0/24", value)
            count = 1001 if value else 0
            wait_until(f"{count} claims", self.has_claims, count)
        self.assertGreater(self.etcd.paths.count("/v3/kv/range"), 1001 // gipam.ETCD_PAGE_KEYS)
        self.assertLessEqual(max(sizes), 2 * gipam.CLAIMS_PER_TRANSACTION)

    def has_claims(self, count: int) -> bool:
        return len(self.one.table.claims) == count

    def test_few_changes_are_learned_from_the_log_of_claims(self) -> None:
        self.etcd.set("notes/web", "somebody's")  # is left alone
        self.tell(Settle(("one", "two")))
        reads = self.etcd.paths.count("/v3/kv/range")
        self.tell(
            Network("one", gets="198.18.0.0/24"),
            Network("one", gets="198.18.1.0/24"),
            Network("two", gets="198.18.2.0/24"),
            Settle(("two",)))
        claim = self.two.table.claims["198.18.1.0/24"]
        self.assertEqual(claim.hosts, ("one",))
        self.assertEqual(self.etcd.paths.count("/v3/kv/range"), reads)
        for _ in range(40):
            pool_id, _ = self.one.request_pool()
            self.one.release_pool(pool_id)
        self.tell(Settle(("one",)))
        log_chars = len(self.etcd.values["changes"])
        self.assertLessEqual(log_chars, gipam.MAX_CLAIM_LOG_CHARS)
        self.tell(Settle(("two",)))
        self.assertEqual(self.two.table.claims, self.one.table.claims)

    def test_host_looks_more_often_while_others_change_much(self) -> None:
        """The log of changes must suffice, or idle hosts would read all claims again and again."""
        self.tell(Settle(("two",)))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.two.member._followed_s = time.monotonic() - 10.0
        for _ in range(4):
            self.one.release_pool(self.one.request_pool()[0])
        self.tell(Settle(("one",)))
        kept = len(json.loads(self.etcd.values["changes"]))
        self.two.hurry()
        for _ in sleeping_retry("it has followed"):
            if self.two.table.head == self.one.table.head:
                break
        self.two.loop.run_in_loop(len, "")
        next_s = self.two.member._next_heartbeat_s - time.monotonic()
        self.assertLess(next_s, 10.0)
        self.assertGreater(kept, 3)

    def test_values_that_gipam_did_not_write_stop_nothing(self) -> None:
        odd = ('{"hosts":5}', "true", "[" * 5000, "nothing", '{"hosts":[]}', '{"hosts":[7,{}]}',
               "null", '{"hosts":["other"],"since":{},"shared":1}', "\udcff", '{"hosts":["x\\ny"]}')
        for number, text in enumerate(odd):
            self.etcd.set(f"claims/10.7.{number}.0/24", text)
        names = ("claims/10.50.3.0/024", "claims/nonsense", "claims/10.50.3.0/24/10.51.0.1",
                 "claims/\udcff", "claims/fe80::1%eth0/128", "claims/10.50.3.0/24/",
                 "parts/10.50.3.0/24", "claims")
        for name in names:
            self.etcd.set(name, {"hosts": ["other"]})
        for key in ("changes", "hosts/four", "hosts/\udcff"):
            self.etcd.set(key, '[["a",{"b":[]}],5]')
        with self.assertLogs("gipam", "WARNING") as logged:
            host = self.start("three")
        lines = [line for line in logged.output if "unknown keys" in line]
        self.assertEqual(len(lines), 1, logged.output)
        self.assertIn(f"ignoring {len(names)} unknown keys in etcd, such as", lines[0])
        self.tell(
            Network("three", "10.50.3.0/24"),
            Key("claims/10.50.3.0/024"),
            Settle(("three",)))
        self.assertEqual(host.table.claims["10.50.3.0/24"].hosts, ("three",))
        for number in range(len(odd)):
            self.tell(Network("three", f"10.7.{number}.0/25", refused="claimed by host"))
        claims = host.state()["claims"]
        self.assertEqual(len(claims), len(odd) + 1)

    def test_odd_claim_that_is_deleted_without_a_new_head_is_found_out(self) -> None:
        """etcdctl deletes a claim without a new head. Its key is claimed before it is granted."""
        odd = '{"hosts":5}'
        address = f"{LAN}/192.168.1.9"
        for key in ("10.50.3.0/24", "10.7.0.0/24", "10.7.1.0/24", address):
            self.etcd.put(f"claims/{key}", "")
        self.tell(
            Network("one", "10.50.3.0/24"),
            Network("one", LAN, shared=True),
            Key("claims/10.50.3.0/24", odd),
            Key("claims/10.7.1.0/24", odd),
            Key(f"claims/{address}", odd),
            Conflict("one", "10.50.3.0/24", "host ?"),
            RequestStep("one", "10.50.3.0/24", refused="claimed by host ?"),
            RequestStep("one", LAN, "192.168.1.9", refused="claimed by host ?"))
        for key in ("10.50.3.0/24", "10.7.1.0/24", address):
            self.etcd.put(f"claims/{key}", "")
        self.tell(RequestStep("one", "10.50.3.0/24"))
        with self.pause_reconciling(self.one):
            self.tell(
                Network("one", "10.7.1.0/24"),
                RequestStep("one", LAN, "192.168.1.9"))
            for key in ("10.7.1.0/24", address):
                value = json.loads(self.etcd.values[f"claims/{key}"])
                self.assertEqual(value["hosts"], ["one"])


    def test_claim_and_head_that_are_deleted_by_hand_reach_each_host(self) -> None:
        """Also a host that knows an older head, and one that reads the next head."""
        gone = ["10.9.0.0/24", "10.9.1.0/24", "10.9.2.0/24"]
        for subnet in gone:
            self.etcd.claim_for_other(subnet)
        self.tell(Settle(("one", "two")))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.tell(
            Settle(("one", "two")),
            Network("one", "10.1.0.0/24"),
            *self.deleted_by_hand(gone[0]),
            Network("two", gone[0]),
            Network("one", "10.1.1.0/24"),
            Network("one", "10.1.2.0/24"),
            *self.deleted_by_hand(gone[1]),
            Network("one", "10.1.3.0/24"),
            Network("two", gone[1]),
            *self.deleted_by_hand(gone[2]),
            Settle(("one", "two")),
            *self.deleted_by_hand("10.1.3.0/24"),
            Settle(("one", "two")))
        self.assertNotIn(gone[2], self.two.table.claims)
        self.assertEqual(self.two.table.claims, self.one.table.claims)
        claims = self.etcd.claims()
        self.assertEqual(sorted(claims), sorted(self.two.table.claims))

    @staticmethod
    def deleted_by_hand(subnet: str) -> list[DeletedByHand]:
        return [DeletedByHand(f"claims/{subnet}"), DeletedByHand("head")]


class LossTest(TwoHosts):
    """etcd loses data: it is restored from a snapshot, or emptied."""

    def lose(self, values: dict[str, str], revision: int = 0) -> None:
        """Have etcd go back to these values."""
        with self.etcd.lock:
            self.etcd.values = dict(values)
            self.etcd.revision = revision or self.etcd.revision + 1

    def test_all_is_claimed_again_before_anything_new(self) -> None:
        self.patch(gipam, HEARTBEAT_INTERVAL_S=3.0)
        self.tell(Network("one"))
        for is_emptied in (False, True):
            with self.subTest(is_emptied=is_emptied):
                saved = {} if is_emptied else dict(self.etcd.values)
                for name in self.HOSTS:
                    self.tell(
                        Network(name),
                        Settle((name,)))
                before = self.etcd.claims()
                self.lose(saved)
                self.tell(
                    Network("one", refused="nothing new can be claimed"),
                    Claimed(before))
                wait_until("the grace period is over", self.is_grace_over)
                pool_id, subnet = self.one.request_pool()
                self.assertNotIn(subnet, before)
                self.one.release_pool(pool_id)
                self.wait_for_claims(before)

    def is_grace_over(self) -> bool:
        return self.one.is_grace_over() and self.two.is_grace_over()

    def test_revision_that_is_lower_than_one_seen_before_is_a_loss(self) -> None:
        """A host that was cut off during the loss finds its own keys unchanged."""
        self.tell(
            Network("one", "10.9.0.0/24"),
            Network("two", "10.8.0.0/24"))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.tell(Settle(("one", "two")))
        with self.etcd.lock:
            self.etcd.revision = 1
        self.tell(Network("one", refused="nothing new can be claimed"))

    def test_key_of_an_earlier_process_that_is_restored_is_a_loss(self) -> None:
        """The restored count may be higher than that of the present process."""
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.tell(
            Network("one", "10.9.0.0/24"),
            Settle(("one",)))
        value = json.loads(self.etcd.values["hosts/one"])
        value.update(token="of an earlier process", count=999)
        self.tell(
            Key("hosts/one", value),
            Network("one", refused="nothing new can be claimed"))

    def test_host_that_has_not_noticed_heeds_another_that_is_behind(self) -> None:
        """A host that was cut off during the loss finds its own key intact."""
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.tell(
            Network("one", "10.9.0.0/24"),
            Settle(("one", "two")))
        value = json.loads(self.etcd.values["hosts/one"])
        value["is_behind"] = True
        self.tell(
            Key("hosts/one", value),
            Network("two", refused="nothing new can be claimed"))
        self.assertEqual(list(self.two.table.members.unclaimed), [])

    def test_host_that_starts_and_finds_a_loss_says_so(self) -> None:
        self.tell(
            Network("one", "10.9.0.0/24"),
            Network("two", "10.8.0.0/24"))
        self.one.crash()
        self.two.crash()
        self.lose({})
        keys: list[str] = []

        def note_key(_: Any) -> None:
            keys.append(self.etcd.values["hosts/one"])

        self.etcd.before("claims/", note_key)
        self.start("one", self.one.directory)
        self.tell(
            Network("one", refused="nothing new can be claimed"),
            Claimed({"10.9.0.0/24": ["one"]}))
        self.assertTrue(json.loads(keys[0])["is_behind"])

    def test_host_that_is_no_longer_behind_says_so_at_once(self) -> None:
        self.tell(Network("one", "10.9.0.0/24"))
        self.two.crash()
        wait_until("two is absent", self.is_two_absent)
        self.patch(gipam, HEARTBEAT_INTERVAL_S=2 * DEADLINE_S, ETCD_ATTEMPT_S=2 * DEADLINE_S)
        self.tell(Settle(("one",)))
        self.lose({})
        self.tell(
            Network("one", refused="nothing new can be claimed"),
            Claimed({"10.9.0.0/24": ["one"]}))
        for _ in sleeping_retry("it says so"):
            value = json.loads(self.etcd.values["hosts/one"])
            if not value["is_behind"]:
                break

    def is_two_absent(self) -> bool:
        return self.one.table.is_present("two") is False

    def test_end_of_a_grace_period_is_noticed_before_the_next_heartbeat_would_be_due(self) -> None:
        key = "hosts/other"
        self.tell(
            Key(key, {"is_behind": True}),
            Settle(("one",)))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=2 * DEADLINE_S)
        self.tell(
            Settle(("one",)),
            Network("one", refused="waiting for other"),
            Key(key, {"is_behind": False}))
        wait_until("the grace period is over", self.one.is_grace_over)

    def test_start_without_a_loss_claims_at_once(self) -> None:
        self.tell(Network("one", "10.9.0.0/24"))
        self.one.crash()
        self.patch(gipam, GRACE_PERIOD_S=DEADLINE_S)
        self.start("one", self.one.directory)
        self.tell(Network("one", "10.8.0.0/24"))

    def test_grace_period_lasts_until_each_host_has_claimed_again_all_that_it_holds(self) -> None:
        """Neither the number of claims nor requests meanwhile end the grace period early.

        Claiming everything again takes several times the grace period that follows.
        """
        held = [f"10.9.{number}.0/24" for number in range(3 * gipam.CLAIMS_PER_TRANSACTION)]
        for subnet in held:
            self.tell(Network("one", subnet))
        self.tell(
            Network("two"),
            Settle(("one", "two")))
        reconcile = self.one.table.reconcile

        def be_slow(*arguments: Any) -> None:
            time.sleep(gipam.GRACE_PERIOD_S)
            reconcile(*arguments)

        with mock.patch.object(self.one.table, "reconcile", be_slow):
            self.lose({})
            for _ in sleeping_retry("the last is claimed again"):
                if not self.is_unknown_to_two(held[-1]):
                    break
        self.tell(Settle(("one",)))
        claims = self.etcd.claims()
        for subnet in held:
            self.assertEqual(claims[subnet], ["one"])

    def is_unknown_to_two(self, subnet: str) -> bool:
        """Request a subnet that another host holds from host two, which must refuse it."""
        self.two.hurry()
        with self.assertRaises(ErrorReply) as caught:
            self.two.request_pool(subnet)
        return "nothing new" in str(caught.exception)


class StartTest(ClusterCase):
    """Claims of its own that a host finds at its start."""

    def test_what_a_crash_left_is_put_right_once_docker_has_been_asked(self) -> None:
        """A claimed subnet that the lease file lacks is free for nobody while Docker may use it."""
        directory = make_directory(self)
        service = begin(os.path.join(directory, "leases.json"))
        held = [f"10.9.{number}.0/24" for number in range(100)]
        client = DirectClient(service)
        for subnet in held:
            client.request_pool(subnet)
        gipam.Checkpoint(service, service.run_once).run(is_stopping=True)
        self.etcd.set("claims/10.8.0.0/24", {"hosts": ["one"]})
        self.etcd.set("claims/10.2.0.0/24", {"hosts": ["one"]})
        host = self.start("one", directory)
        claims = {subnet: ["one"] for subnet in sorted(held)}
        self.wait_for_claims({"10.2.0.0/24": ["one"], "10.8.0.0/24": ["one"], **claims})
        wait_until("the grace period is over", host.is_grace_over)
        self.tell(
            Network("one", "10.8.0.0/25", refused="if Docker does not use it, it is free soon"),
            Network("one", gets="10.2.1.0/24"))
        host.loop.run_in_loop(host.table.on_docker_compared)
        self.wait_for_claims({"10.2.1.0/24": ["one"], **claims})
        self.tell(Network("one", "10.8.0.0/25"))

    def test_pool_of_a_lost_lease_file_is_adopted_though_it_is_claimed(self) -> None:
        self.etcd.set("claims/10.8.0.0/24", {"hosts": ["one"]})
        host = self.start("one")
        host.request_address(f"10.8.0.0/24#{TOKEN}")
        self.assertEqual(self.etcd.claims(), {"10.8.0.0/24": ["one"]})

    def test_claim_outlives_an_adoption_that_did_not_reach_the_disk(self) -> None:
        """Docker still uses the subnet, and requests an address of it again."""
        claims = {"10.8.0.0/24": ["one"]}
        self.etcd.set("claims/10.8.0.0/24", {"hosts": ["one"]})
        host = self.start("one")
        pool_id = f"10.8.0.0/24#{TOKEN}"
        with mock.patch.object(host.store, "append", side_effect=OSError("no disk")):
            self.assert_refused("no disk", host.request_address, pool_id)
        self.tell(
            Settle(("one",)),
            Claimed(claims),
            Network("one", "10.8.0.0/25", refused="if Docker does not use it, it is free soon"))
        host.request_address(pool_id)
        host.loop.run_in_loop(host.table.on_docker_compared)
        self.tell(
            Settle(("one",)),
            Claimed(claims))

    def test_adoption_in_a_shared_subnet_guesses_no_gateway(self) -> None:
        """The first address may be a container's; the claims say which one is the gateway."""
        self.etcd.set(f"claims/{LAN}", {"hosts": ["one", "two"], "shared": True})
        taken = {"hosts": ["one"], "kind": "endpoint"}
        self.etcd.set(f"claims/{LAN}/192.168.1.1", taken)
        host = self.start("one")
        host.request_address(f"{LAN}#{TOKEN}", "192.168.1.9", MAC)
        (pool,) = host.state()["pools"]
        (lease,) = pool["addresses"]
        self.assertEqual(lease["address"], "192.168.1.9")
        host.settle()
        self.assertEqual(json.loads(self.etcd.values[f"claims/{LAN}/192.168.1.1"]), taken)

    def test_subnet_that_only_others_share_by_now_is_adopted_as_a_shared_one(self) -> None:
        """The host was evicted and its lease file is lost; the claim of others stays shared."""
        self.start("two")
        self.tell(
            Network("two", LAN, shared=True),
            RequestStep("two", LAN, "192.168.1.1", is_gateway=True),
            RequestStep("two", LAN, "192.168.1.7"))
        one = self.start("one")
        self.pool_ids["one", LAN] = f"{LAN}#{TOKEN}"
        self.tell(
            RequestStep("one", LAN, "192.168.1.7", refused="claimed by host two"),
            RequestStep("one", LAN, "192.168.1.9"))
        (pool,) = one.state()["pools"]
        self.assertTrue(pool["is_shared"])
        self.assertEqual([lease["address"] for lease in pool["addresses"]], ["192.168.1.9"])
        self.assertTrue(json.loads(self.etcd.values[f"claims/{LAN}"])["shared"])
        self.tell(
            Settle(("one", "two")),
            Conflict("two", LAN, ""),
            RequestStep("two", LAN, "192.168.1.9", mac="", refused="claimed by host one"),
            Claimed({LAN: ["one", "two"]}))

    def test_subnet_that_is_held_unshared_does_not_join_the_claim_of_others(self) -> None:
        """That includes another range of the subnet, which Docker uses and the lease file lacks."""
        claim = {"hosts": ["two"], "shared": True}
        host = self.start("one")
        self.tell(
            Network("one", LAN, sub_pool="192.168.1.0/25"),
            Key(f"claims/{LAN}", claim),
            Conflict("one", LAN, "host two"))
        self.assert_refused("claimed by host two", host.request_address,
                            f"{LAN},192.168.1.128/25#{TOKEN}", "192.168.1.130", MAC)
        self.assertEqual(json.loads(self.etcd.values[f"claims/{LAN}"]), claim)

    def test_address_of_a_lost_lease_file_is_free_once_docker_has_been_asked(self) -> None:
        self.etcd.set(f"claims/{LAN}", {"hosts": ["one", "two"], "shared": True})
        self.etcd.set(f"claims/{LAN}/192.168.1.5", {"hosts": ["one"], "kind": "endpoint"})
        host = self.start("one")
        pool_id = f"{LAN}#{TOKEN}"
        host.request_address(pool_id)
        self.assert_refused("if Docker does not use it, it is free soon", host.request_address,
                            pool_id, "192.168.1.5", MAC)
        self.assertTrue(5 in host.table.remote_addresses[gipam.parse_prefix(LAN)])
        self.patch(gipam, ETCD_TIMEOUT_S=0.5)
        self.pool_ids["one", LAN] = pool_id
        self.tell(
            EtcdGoesAway(("one",)),
            RequestStep("one", LAN, "192.168.1.5",
                        refused="if Docker does not use it, it is free soon"),
            RequestStep("one", LAN, refused="etcd does not answer"))
        # Once Docker has been asked, it is given without etcd too.
        host.loop.run_in_loop(host.table.on_docker_compared)
        self.tell(RequestStep("one", LAN, "192.168.1.5"))

    def test_import_that_etcd_refuses_has_not_compared_with_docker(self) -> None:
        """So nothing that Docker uses is let go of once etcd takes writes again."""
        self.etcd.set("claims/10.8.0.0/24", {"hosts": ["one"]})
        host = self.start("one")
        network = gipam.DockerAllocation("pool", subnet="10.8.0.0/24", network="web")
        view = gipam.DockerView([network], [])
        self.patch(gipam, RECHECK_DELAY_S=0, docker_socket_path=mock.Mock(),
                   read_docker_allocations=mock.Mock(return_value=view))
        arguments = (host.service, "gipam", DEADLINE_S, host.loop.run_in_loop,
                     host.member.run_with_claim)
        self.etcd.is_full = True
        with self.assertRaisesRegex(gipam.GipamError, "refuses .* database space exceeded"):
            gipam.import_from_docker(*arguments)
        self.assertTrue(host.service.docker_import.is_due)
        self.etcd.is_full = False
        self.tell(
            Settle(("one",)),
            Claimed({"10.8.0.0/24": ["one"]}))
        gipam.import_from_docker(*arguments)
        self.assertEqual(host.state()["pools"][0]["subnet"], "10.8.0.0/24")

    def test_start_does_not_wait_for_an_etcd_that_is_away(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=0.5, ETCD_ATTEMPT_S=0.2)
        self.etcd.go_away()
        host = self.start("one")
        self.tell(Network("one", refused="etcd does not answer"))
        pool_id = f"10.9.0.0/24#{TOKEN}"
        self.assert_refused("etcd does not answer", host.request_address, pool_id)
        self.assert_refused("etcd does not answer", host.call, "Gipam.Evict", Host="two")
        self.assertIn("\netcd does not answer", self.gipam(host, "status").out)
        self.assertIsNone(host.state()["etcd"]["age_s"])
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        self.etcd.come_back()
        host.request_address(pool_id)
        self.assertEqual(self.etcd.claims(), {"10.9.0.0/24": ["one"]})
        (shown,) = host.state()["hosts"]
        self.assertTrue(shown["is_present"])
        self.assertLess(host.state()["etcd"]["age_s"], DEADLINE_S)
        self.patch(gipam, ETCD_TIMEOUT_S=0.5)
        self.tell(EtcdGoesAway(("one",)))
        (shown,) = host.state()["hosts"]
        self.assertIsNone(shown["is_present"])


    def test_call_before_serving_makes_its_transactions_too(self) -> None:
        join = gipam.ClusterMember.join

        def join_and_import(member: gipam.ClusterMember) -> None:
            join(member)
            subnet = gipam.parse_prefix("10.9.0.0/24")
            import_pool = member._service.import_pool
            member.run_before_serving(import_pool, subnet, None, "", [], 0)
            self.assertEqual(self.etcd.claims(), {"10.9.0.0/24": ["one"]})

        with mock.patch.object(gipam.ClusterMember, "join", join_and_import):
            self.start("one")

    def test_start_does_not_wait_for_dns_and_its_calls_have_one_deadline_together(self) -> None:
        """The thread is stuck there, because DNS has no deadline."""
        self.patch(gipam, ETCD_TIMEOUT_S=0.3, TIMER_INTERVAL_S=0.05)
        resolved = threading.Event()
        self.addCleanup(resolved.set)

        def resolve(*_: Any) -> Any:
            resolved.wait(DEADLINE_S)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        self.patch(socket, getaddrinfo=resolve)
        self.etcd_url = "http://etcd.example:2379"
        started_s = time.monotonic()
        with self.assertLogs("gipam", "WARNING") as logged:
            host = self.start("one")
        self.assertLess(time.monotonic() - started_s, DEADLINE_S / 2)
        self.assertIn("etcd has not answered yet; existing allocations", logged.output[0])
        self.tell(Network("one", refused="etcd has not answered yet"))
        with mock.patch.object(host.loop, "run_once", side_effect=AssertionError):
            self.assertRaises(gipam.Unavailable, host.member.run_before_serving, bool)
        resolved.set()
        for _ in sleeping_retry("the error of DNS"):
            if "name resolution" in host.table.failure:
                break

    def test_name_that_another_machine_has_ends_a_host_that_etcd_has_kept_waiting(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=0.3)
        self.etcd.set("hosts/one", {"machine": "another", "product": ""})
        with self.etcd.lock:
            host = self.start("one")
        host.thread.join(DEADLINE_S)
        self.assertFalse(host.thread.is_alive())
        self.assertIsInstance(host.member.name_conflict, gipam.AlreadyRunning)


class EtcdAwayTest(TwoHosts):
    """No container of an ordinary subnet waits for etcd."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(gipam, ETCD_TIMEOUT_S=0.5, ETCD_ATTEMPT_S=0.2)

    def wait_in_etcd(self) -> tuple[Peer, threading.Event]:
        """Return a connection whose request waits for etcd, and an event that lets etcd go on."""
        held = threading.Event()
        self.addCleanup(held.set)

        def hold(_: Any) -> None:
            held.wait(DEADLINE_S)

        self.etcd.before("claims/", hold)
        peer = Peer(self, self.one.path).send(NEW_POOL)
        wait_until("the request waits for etcd", self.one.has_waiting, 1)
        return peer, held

    def test_only_new_pools_wait_for_it_and_what_is_released_is_let_go_of_later(self) -> None:
        self.tell(
            Network("one", name="web", gets="198.18.0.0/24"),
            Network("one", gets="198.18.1.0/24"),
            EtcdGoesAway(),
            RequestStep("one", "198.18.0.0/24"),
            Network("one", refused=f"etcd does not answer on {self.etcd.url}: "),
            Remove("one", "198.18.0.0/24"),
            Remove("one", "198.18.1.0/24"),
            Network("one", name="web", refused="etcd does not answer"),
            EtcdComesBack(),
            Claimed({}),
            Network("one", name="web", gets="198.18.0.0/24"))

    def test_metrics_show_whether_it_answers_and_each_call(self) -> None:
        count = "etcd_request_duration_seconds_count"
        before = self.one.samples()
        settle = Settle(("one",))
        self.tell(settle)
        after = self.one.samples()
        self.assertGreater(after[count], before[count])
        self.assertEqual(after["etcd_up"], 1)

        self.tell(EtcdGoesAway(("one",)))
        self.assertEqual(self.one.samples()["etcd_up"], 0)
        self.tell(EtcdComesBack(), settle)
        self.assertEqual(self.one.samples()["etcd_up"], 1)

    def test_end_of_a_failure_is_noticed_before_the_next_heartbeat_is_due(self) -> None:
        """So it is if the request of a client has failed."""
        self.patch(gipam, HEARTBEAT_INTERVAL_S=2 * DEADLINE_S)
        self.tell(
            Settle(("one",)),
            EtcdGoesAway(),
            Network("one", refused="etcd does not answer"),
            EtcdComesBack())
        for _ in sleeping_retry("etcd is seen to answer"):
            if not self.one.table.failure:
                break

    def test_request_is_refused_within_five_seconds_though_the_thread_is_stuck(self) -> None:
        """The thread may hang in DNS, which has no deadline."""
        self.patch(gipam, TIMER_INTERVAL_S=0.05, ETCD_TIMEOUT_S=0.1)
        stuck = threading.Event()
        self.addCleanup(stuck.set)
        commit = self.one.member._commit

        def be_stuck(transaction: gipam.Transaction, _: float) -> Any:
            stuck.wait(DEADLINE_S)
            return commit(transaction, time.monotonic() + DEADLINE_S)

        with mock.patch.object(self.one.member, "_commit", be_stuck):
            self.tell(Network("one", "10.8.0.0/24", refused="etcd does not answer"))
            # Nobody waits any more when the thread comes back.
            self.one.close()
            self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
            threading.Timer(0.1, stuck.set).start()
            self.tell(Network("one", "10.9.0.0/24"))

    def test_reply_may_be_the_last_of_its_connection(self) -> None:
        """A member that is being stopped, or a proxy, closes the connection after its reply."""
        self.etcd.closes_each_connection = True
        self.tell(
            Settle(("one",)),
            Network("one"),
            Network("one"))

    def test_member_that_does_not_answer_as_etcd_does_is_skipped(self) -> None:
        """A member that sends for ever is skipped too, a byte at a time or all at once."""
        self.patch(gipam, ETCD_TIMEOUT_S=3.0, MAX_ETCD_BYTES=1 << 16)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
        replies = {
            "silent": b"",
            "dripping": head[:30],
            "endless": head % (1 << 40) + bytes(1 << 20),
        }
        for status in (200, 302, 404, 502, 503):
            replies[str(status)] = (
                b"HTTP/1.1 %d Well\r\nContent-Length: 3\r\nLocation: http://[::1]/\r\n\r\nno\n"
                % status)
        for text in ("{}", "[]", "1", '{"result":1}', "[" * 5000):
            replies[text] = head % len(text) + text.encode()
        for text in ('{"code":503,"message":"No"}', '{"code":5,"message":null}'):
            replies[text] = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(text)
            replies[text] += text.encode()
        for number, (label, data) in enumerate(replies.items()):
            with self.subTest(label), socket.create_server(("127.0.0.1", 0)) as other:
                thread = threading.Thread(
                    target=self.misbehave, args=(other, data, label), daemon=True)
                thread.start()
                port = other.getsockname()[1]
                self.etcd_url = f"http://127.0.0.1:{port},{self.etcd.url}"
                self.start(f"host{number}").request_pool()

    @staticmethod
    def misbehave(server: socket.socket, data: bytes, label: str) -> None:
        """Send these bytes for each request, for ever where the label says so."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with contextlib.suppress(OSError), connection:
                    # To the end: nobody takes a reset for an answer.
                    while connection.recv(65536):
                        connection.sendall(data)
                        while label in ("silent", "dripping"):
                            time.sleep(0.02)
                            connection.sendall(b" " if label == "dripping" else b"")

    def test_metrics_after_a_failed_commit_show_what_is_on_disk(self) -> None:
        """The claim for a pool that is not on disk is deleted, since Docker does not use it."""
        self.one.loop.run_in_loop(self.one.table.on_docker_compared)
        self.tell(
            Network("one", "10.9.0.0/24"),
            Settle(("one",)))
        (pool_id,) = self.one.service.state.pools
        for method, arguments in (
                ("RequestPool", {"Pool": "10.8.0.0/24"}),
                ("RequestAddress", {"PoolID": pool_id})):
            with self.subTest(method):
                before = self.one.samples()
                self.assertEqual(before['claims{host="one"}'], 1)
                error = gipam.StoreError("the disk is full")
                with failing_once(self.one.store, "append", error), \
                        self.assertLogs("gipam", "ERROR"):
                    self.assert_refused("the disk is full", self.one.call,
                                        "IpamDriver." + method, **arguments)
                self.one.settle()
                failed = requests_total("/IpamDriver." + method, "StoreError")
                self.assertEqual(changed_series(before, self.one.samples()), {failed})

    def test_call_that_is_not_on_disk_raises_and_leaves_nothing(self) -> None:
        service = self.one.service
        subnet = gipam.parse_prefix("10.9.0.0/24")

        def import_it() -> Any:
            return self.one.member.run_with_claim(service.import_pool, subnet, None, "", [], 0)

        with mock.patch.object(service.store, "append", side_effect=OSError("no disk")):
            self.assertRaisesRegex(gipam.StoreError, "no disk", import_it)
        self.assertFalse(service.state.pools)
        self.assertEqual(len(import_it()), 1)

    def test_claim_that_is_left_to_others_is_not_granted(self) -> None:
        claims = {
            LAN: claim_of("two"),
            "10.9.0.0/24": claim_of("one"),
            "10.8.0.0/24": None,
        }
        transaction = gipam.Transaction(claims, gipam.Head("a"))
        outcome = self.one.member._outcome_of(transaction)
        self.assertEqual(outcome.granted, {"10.9.0.0/24"})
        self.assertEqual(outcome.deleted, {"10.8.0.0/24"})

    def test_unforeseen_exception_in_the_thread_is_answered(self) -> None:
        with mock.patch.object(self.one.member, "_commit", side_effect=ZeroDivisionError), \
                self.assertLogs("gipam", "ERROR") as logged:
            self.tell(Network("one", refused="internal error of gipam: see its log"))
            wait_until("the traceback is logged", getattr, logged, "output")
        # The thread pauses after an exception.
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        self.tell(Network("one", gets="198.18.0.0/24"))

    def test_request_whose_peer_has_gone_leaves_no_pool(self) -> None:
        peer, held = self.wait_in_etcd()
        peer.close(is_reset=True)
        held.set()
        self.tell(
            Settle(("one",)),
            Claimed({}))
        self.assertFalse(self.one.loop.run_in_loop(dict, self.one.service.state.pools))

    def test_request_that_waits_at_a_stop_is_refused(self) -> None:
        self.patch(gipam, DRAIN_MAX_S=0.1)
        peer, _ = self.wait_in_etcd()
        self.one.loop.stop()
        self.one.thread.join()
        self.one.loop.drain(mock.Mock())
        self.assertEqual(peer.answer().status, 503)

    def test_what_etcd_itself_refuses_is_said_and_an_expired_token_is_renewed(self) -> None:
        """No message shows a password."""
        self.etcd.password = "p@ss"
        zero = self.start("zero")
        self.assert_refused("refuses /v3/kv/range: etcdserver: invalid auth token",
                            zero.request_pool)
        self.etcd_url = self.etcd.url.replace("//", "//gipam:p%40ss@")
        three = self.start("three")
        for _ in range(2):
            three.request_pool()
            self.etcd.tokens.clear()
        self.etcd_url = self.etcd.url.replace("//", "//gipam:secret@")
        four = self.start("four")
        self.assert_refused("authentication failed", four.request_pool)
        self.assertNotIn("secret", json.dumps(four.state()))


class PresenceTest(TwoHosts):
    """Each machine has a name of its own, and only an absent one is evicted."""

    def test_machine_whose_name_another_one_has_does_not_start(self) -> None:
        """The machine does not start later either: a name is never taken by waiting."""
        self.one.crash()
        for _ in range(2):
            with self.assertRaisesRegex(gipam.AlreadyRunning, "another machine is host 'one'"):
                Host(self, "one")
            wait_until("one is absent", self.is_absent)

    def is_absent(self) -> bool:
        return self.two.table.is_present("one") is False

    def test_host_whose_name_is_taken_ends(self) -> None:
        self.tell(Key("hosts/one", {"machine": "another", "product": ""}))
        self.one.thread.join(DEADLINE_S)
        self.assertFalse(self.one.thread.is_alive())
        conflict = self.one.member.name_conflict
        self.assertIsInstance(conflict, gipam.AlreadyRunning)
        assert conflict
        self.assertEqual(conflict.exit_status, 75)

    def test_clone_of_a_machine_is_another_one(self) -> None:
        """A clone has the same machine-id and the same paths, but other hardware."""
        self.start("three", machine=MACHINE)
        clone = MACHINE._replace(product="clone")
        with self.assertRaisesRegex(gipam.AlreadyRunning, "another machine is host 'three'"):
            Host(self, "three", machine=clone)
        four = self.start("four", machine=clone)
        self.assert_refused("three is alive", four.call, "Gipam.Evict", Host="three")
        self.assertFalse(four.table.members.is_former_name("three"))

    def test_key_that_an_older_gipam_wrote_is_taken_over(self) -> None:
        self.etcd.set("hosts/three", {"machine": "as it was told then", "token": "", "count": 7})
        self.start("three").request_pool()
        self.assertIn("product", json.loads(self.etcd.values["hosts/three"]))

    def test_only_an_absent_host_is_evicted_with_all_its_claims(self) -> None:
        for number in range(2 * gipam.CLAIMS_PER_TRANSACTION):
            self.tell(Network("one", f"10.9.{number}.0/24"))
        for name in self.HOSTS:
            self.tell(
                Network(name, LAN, shared=True),
                RequestStep(name, LAN, mac=name))
        for name, words in (("one", "one is alive"), ("two", "'two' is this host"),
                            ("three", "there is no host 'three' in etcd, only one, two")):
            self.assert_refused(words, self.two.call, "Gipam.Evict", Host=name)
        self.one.crash()
        wait_until("one is absent", self.is_absent)

        def come_back(_: Any) -> None:
            self.etcd.put("hosts/one", "it is back")

        self.etcd.before("-claims/", come_back)
        self.assert_refused("one is alive", self.two.call, "Gipam.Evict", Host="one")
        wait_until("one is absent", self.is_absent)
        metrics = "".join(gipam.metrics_page(self.two.service, ""))
        self.assertIn('\ngipam_claims{host="one"} 81\n', metrics)
        with self.assertLogs("gipam", "WARNING") as logged:
            self.two.call("Gipam.Evict", Host="one")
        self.assertIn("evicted one, which had claimed 192.168.1.", logged.output[0])
        self.assertIn("10.9.79.0/24", "".join(logged.output))
        self.assertEqual(self.etcd.claims(), {LAN: ["two"]})
        addresses = self.etcd.claims(has_addresses=True)
        self.assertEqual(list(addresses.values()), [["two"]])
        self.assertNotIn("hosts/one", self.etcd.values)

    def test_command_names_what_it_evicts_and_asks(self) -> None:
        self.tell(Network("one", "10.9.0.0/24"))
        self.one.crash()
        wait_until("one is absent", self.is_absent)
        asked = self.gipam(self.two, "evict", "one", answer="n\n")
        self.assertEqual(asked.status, 1)
        self.assertIn("10.9.0.0/24", asked.out)
        done = self.gipam(self.two, "evict", "one", "--yes")
        self.assertEqual(done.status, 0, done)
        self.assertEqual(self.etcd.claims(), {})
        again = self.gipam(self.two, "evict", "one", "--yes")
        self.assertEqual(again.status, 2)

    def test_host_that_was_looked_at_often_in_a_short_time_is_not_absent(self) -> None:
        """Heartbeats come more often in a grace period; readings do not."""
        self.tell(Settle(("two",)))
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.two.member._next_reading_s = time.monotonic() + DEADLINE_S
        self.one.crash()
        for _ in range(gipam.MISSED_HEARTBEATS):
            self.tell(Settle(("two",)))
        self.assert_refused("one is alive", self.two.call, "Gipam.Evict", Host="one")

    @staticmethod
    def pause() -> None:
        time.sleep(0.05)

    def test_host_that_was_evicted_grants_nothing_on_what_it_remembers(self) -> None:
        """An evicted host may be cut off, or connected without having learned of the eviction."""
        self.patch(gipam, ETCD_TIMEOUT_S=0.5)
        self.tell(
            Network("one", name="web", gets="198.18.0.0/24"),
            Network("one", LAN, shared=True))
        with mock.patch.object(self.one.member, "_run_once", self.pause):
            wait_until("one is absent", self.is_absent)
            self.evict(self.two, "one")
            self.tell(
                Network("two", "198.18.0.0/24"),
                Remove("one", "198.18.0.0/24"))
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        self.one.settle()
        wait_until("the grace period is over", self.one.is_grace_over)
        wait_until("the grace period is over", self.two.is_grace_over)
        self.tell(
            Network("one", name="web", gets="198.18.1.0/24"),
            Network("two", LAN, shared=True),
            RequestStep("two", LAN, "192.168.1.9"),
            RequestStep("one", LAN, "192.168.1.9", refused="claimed by host two"))

    def test_held_subnet_without_a_claim_is_granted_to_nobody_else(self) -> None:
        """The claim in its way is deleted while its host does not look at etcd."""
        for claimed, held, other in (("198.18.0.0/24", "198.18.0.0/24", "198.18.1.0/24"),
                                     ("10.9.0.0/24", "10.9.0.0/25", "198.18.2.0/24")):
            self.tell(Network("two", held))
            self.etcd.claim_for_other(claimed)
            if claimed != held:
                self.tell(Conflict("two", held, "host other"))
                self.etcd.set(f"claims/{held}", "")
            self.tell(Conflict("two", held, "host other"))
            wait_until("two lists it", self.is_listed, held)
            before = self.etcd.claims()
            with self.subTest(held), mock.patch.object(self.two.member, "_run_once", self.pause):
                self.etcd.set(f"claims/{claimed}", "")
                self.tell(
                    Network("one", held, refused=f"{held}, claimed by host two"),
                    Network("one", gets=other))
            del before[claimed]
            self.tell(
                Settle(("two",)),
                Claimed({**before, held: ["two"], other: ["one"]}),
                Remove("two", held),
                Settle(("two",)))
            self.assertFalse(self.is_listed(held))
            self.tell(Network("one", held))

    def test_space_that_another_host_lists_is_not_granted_anew(self) -> None:
        subnet = "10.9.0.0/24"
        lan = "192.168.3.0/30"
        self.tell(Network("one", subnet, sub_pool="10.9.0.0/25"))
        low = self.pool_ids["one", subnet]
        self.etcd.set("hosts/other", {"contended": ["10.9.0.64/26", "192.168.3.0/30/192.168.3.1",
                                                    "no key", 7]})
        self.tell(
            Settle(("one",)),
            Network("one", subnet, sub_pool="10.9.0.128/25"),
            Remove("one", subnet))
        self.one.release_pool(low)
        for _ in range(2):
            self.tell(Network("one", subnet, refused="claimed by host other"))
            self.one.loop.run_in_loop(self.one.service.reload, gipam.StoreError("lost"))
        # A subnet that Docker uses on this host is adopted, and the conflict then shown.
        adopted = f"10.9.0.64/26#{TOKEN}"
        self.one.request_address(adopted)
        self.one.release_pool(adopted)
        self.tell(
            Network("one", lan, shared=True),
            RequestStep("one", lan, gets="192.168.3.2"),
            RequestStep("one", lan, mac="", refused="are held, here or by other hosts"))
        self.etcd.set("hosts/other", {"contended": []})
        self.tell(
            Settle(("one",)),
            Network("one", subnet),
            RequestStep("one", lan, mac="", gets="192.168.3.1"))

    def is_listed(self, key: str) -> bool:
        return key in json.loads(self.etcd.values["hosts/two"])["contended"]

    def test_held_address_without_a_claim_is_granted_to_nobody_else(self) -> None:
        subnet = "192.168.3.0/30"
        for name in self.HOSTS:
            self.tell(Network(name, subnet, shared=True))
        self.tell(RequestStep("two", subnet, "192.168.3.1"))
        key = f"{subnet}/192.168.3.1"
        self.tell(Settle(("two",)))
        # The host learns of the conflict from a request that it refuses.
        self.patch(gipam, HEARTBEAT_INTERVAL_S=2 * DEADLINE_S)
        self.two.finish_round()
        self.two.member._next_heartbeat_s = time.monotonic() + 2 * DEADLINE_S
        self.two.member._followed_s = -1e9
        self.etcd.claim_for_other(key)
        self.etcd.claim_for_other("10.9.0.0/24")
        self.tell(Network("two", "10.9.0.0/24", refused="claimed by host other"))
        wait_until("two lists it", self.is_listed, key)
        with mock.patch.object(self.two.member, "_run_once", self.pause):
            self.etcd.set(f"claims/{key}", "")
            self.tell(
                RequestStep("one", subnet, "192.168.3.1", refused=f"{subnet} is held by host two"),
                RequestStep("one", subnet, gets="192.168.3.2"),
                RequestStep("one", subnet, mac="", refused="are held, here or by other hosts"))
        self.tell(
            Settle(("two",)),
            ClaimedAddresses({key: ["two"], f"{subnet}/192.168.3.2": ["one"]}))

    def test_machine_that_was_renamed_evicts_its_old_name_like_any_other(self) -> None:
        """The old name has to be absent first; its claims then become the new name's."""
        self.tell(Network("one", gets="198.18.0.0/24"))
        self.one.crash()
        three = self.start("three", self.one.directory)
        pool_id = self.pool_ids["one", "198.18.0.0/24"]
        who = ("host one (a former name of this machine: `gipam evict one` gives the claim to "
               "three)")
        self.assert_refused(f"claimed by {who} too", three.request_address, pool_id)
        self.assertEqual(three.state()["pools"][0]["claimed_elsewhere"], who)
        self.assert_refused("one is alive", three.call, "Gipam.Evict", Host="one")
        self.evict(three, "one")
        self.tell(
            Claimed({"198.18.0.0/24": ["three"]}),
            Conflict("three", "198.18.0.0/24", ""))
        three.request_address(pool_id)


class SharedTest(TwoHosts):
    """One subnet on several hosts, such as a macvlan network."""

    def setUp(self) -> None:
        super().setUp()
        self.tell(
            Network("one", LAN, shared=True),
            Network("two", LAN, shared=True))

    def wait_for_release(self, key: str) -> None:
        """Wait until the claim of an address is deleted."""
        for _ in sleeping_retry(f"{key} is deleted"):
            if key not in self.etcd.claims(has_addresses=True):
                return

    def take(self, name: str, subnet: str = LAN) -> str:
        """Return a new address of a host."""
        pool_id = self.pool_ids[name, subnet]
        return self.hosts[name].request_address(pool_id).partition("/")[0]

    def test_no_address_is_on_two_hosts_and_each_is_used(self) -> None:
        self.start("three")
        taken: list[str] = []
        for subnet, count in (
                ("192.168.2.0/27", 30),
                ("192.168.3.0/30", 2),
                ("192.168.4.0/31", 2)):
            with self.subTest(subnet):
                for name in self.hosts:
                    self.tell(Network(name, subnet, shared=True))
                names = itertools.islice(itertools.cycle(self.hosts), count)
                taken = [self.take(name, subnet) for name in names]
                self.assertEqual(len(set(taken)), count)
                for name in self.hosts:
                    self.tell(RequestStep(name, subnet, mac="",
                                      refused="are held, here or by other hosts"))
        self.tell(Free("one", "192.168.4.0/31", taken[0]))
        self.wait_for_release(f"192.168.4.0/31/{taken[0]}")
        self.assertEqual(self.take("two", "192.168.4.0/31"), taken[0])

    def test_endpoint_is_one_hosts_and_a_gateway_or_auxiliary_address_all_hosts(self) -> None:
        self.tell(
            RequestStep("one", LAN, "192.168.1.1", is_gateway=True),
            RequestStep("two", LAN, gets="192.168.1.1", is_gateway=True),
            RequestStep("one", LAN, "192.168.1.200"),
            RequestStep("two", LAN, "192.168.1.200", refused=(
                IN_USE + f"192.168.1.200 of {LAN} is claimed by host one")),
            RequestStep("one", LAN, "192.168.1.130", mac=""),
            RequestStep("two", LAN, "192.168.1.130", mac=""),
            Free("one", LAN, "192.168.1.130"),
            RequestStep("one", LAN, "192.168.1.130", refused="is claimed by host"),
            RequestStep("two", LAN, "192.168.1.200", is_gateway=True,
                        refused="claimed by host one"),
            Free("one", LAN, "192.168.1.200"))
        self.wait_for_release(f"{LAN}/192.168.1.200")
        self.tell(RequestStep("two", LAN, "192.168.1.200"))

    def test_without_mac_addresses_a_fixed_address_is_one_hosts(self) -> None:
        """With -mac=false, as for ipvlan, there is no MAC address, and before Docker 29 no name."""
        for host in self.hosts.values():
            host.service.has_macs = False
        self.tell(
            RequestStep("one", LAN, "192.168.1.130", mac=""),
            RequestStep("two", LAN, "192.168.1.130", mac="", refused="is claimed by host"))

    def test_host_that_has_left_does_not_get_the_subnet_for_itself(self) -> None:
        """The host gets no subnet around or inside LAN either, even while its claim exists."""
        self.take("two")
        with self.pause_reconciling(self.one):
            self.tell(Remove("one", LAN))
            for subnet in (LAN, "192.168.0.0/16", "192.168.1.128/25"):
                self.tell(Network("one", subnet, refused="claimed by hosts one, two"))
            self.tell(Network("one", LAN, shared=True))
        self.assertNotEqual(self.take("one"), self.take("two"))
        self.tell(
            Remove("one", LAN),
            Claimed({LAN: ["two"]}),
            Network("one", LAN, refused="claimed by host two"))

    def test_host_that_leaves_gives_up_its_addresses_first(self) -> None:
        """A host that leaves a subnet may join it again meanwhile."""
        address = ""
        for _ in range(3):
            self.take("one")
        for _ in range(3):
            self.tell(
                Remove("one", LAN),
                Network("one", LAN, shared=True))
            address = self.take("one")
        self.tell(
            Settle(("one",)),
            Claimed({LAN: ["one", "two"]}),
            ClaimedAddresses({f"{LAN}/{address}": ["one"]}))
        before = len(self.etcd.written)
        self.tell(
            Remove("one", LAN),
            Claimed({LAN: ["two"]}))
        claim_keys = []
        for keys in self.etcd.written[before:]:
            claim_keys += [key for key in keys if key.startswith("claims/")]
        self.assertEqual(claim_keys, [f"claims/{LAN}/{address}", f"claims/{LAN}"])
        self.tell(
            Remove("two", LAN),
            Claimed({}))

    def test_subnet_that_is_held_unshared_is_not_made_shared(self) -> None:
        three = self.start("three")
        self.tell(
            Network("three", LAN, refused="claimed by hosts one, two"),
            Network("three", "10.9.0.0/24"),
            Network("three", "10.7.0.0/24", sub_pool="10.7.0.0/25"),
            Network("one", "10.9.0.0/24", shared=True, refused="claimed by host three"),
            Network("three", "10.9.0.0/24", shared=True, refused="not shared"),
            Network("three", "10.7.0.0/24", sub_pool="10.7.0.128/25", shared=True,
                    refused="not shared"),
            Network("one", "10.9.0.0/16", shared=True,
                    refused="with 10.9.0.0/24, claimed by host three"),
            Network("three", shared=True, refused="needs a --subnet"))
        self.assertNotIn("shared", self.etcd.values["claims/10.9.0.0/24"])
        self.assertNotIn("claims/10.9.0.0/16", self.etcd.values)
        three.request_address(self.pool_ids["three", "10.9.0.0/24"])
        self.assert_refused("needs -etcd", InMemory(self).request_pool, LAN, gipam_shared="true")

    def test_containers_start_again_without_etcd_on_what_their_host_still_has(self) -> None:
        self.patch(gipam, ETCD_TIMEOUT_S=0.3)
        address = "192.168.1.9"
        self.tell(
            RequestStep("one", LAN, address),
            Settle(("one",)),
            EtcdGoesAway(("one",)),
            Free("one", LAN, address),
            RequestStep("one", LAN, gets=address),
            Free("one", LAN, address),
            RequestStep("one", LAN, mac="02:42:00:00:00:02", gets=address),  # although reserved
            RequestStep("one", LAN, mac="", refused="etcd does not answer"),
            RequestStep("one", LAN, "192.168.1.1", is_gateway=True, refused="etcd does not answer"),
            Free("one", LAN, address),
            EtcdComesBack(),
            ClaimedAddresses({}))
        self.patch(gipam, ETCD_TIMEOUT_S=DEADLINE_S)
        self.tell(RequestStep("one", LAN, "192.168.1.1", is_gateway=True))

    def lose_connection(self, _: Any) -> None:
        """Have etcd go away before this transaction."""
        self.etcd.go_away()
        raise ConnectionError

    def release_with_a_late_deletion(self) -> list[dict[str, Any]]:
        """Release an address of one; return the deletion of its claim, which etcd has not seen."""
        late: list[dict[str, Any]] = []

        def delay(body: dict[str, Any]) -> None:
            late.append(body)
            self.lose_connection(body)

        self.tell(
            RequestStep("one", LAN, "192.168.1.9"),
            Settle(("one",)))
        self.etcd.before(f"-claims/{LAN}", delay)
        self.tell(Free("one", LAN, "192.168.1.9"))
        wait_until("it is on its way", late.__len__)
        return late

    def test_address_that_etcd_may_have_been_asked_to_delete_is_not_relied_upon(self) -> None:
        """A request to delete may be on its way for long, unless a later one has succeeded."""
        self.patch(gipam, ETCD_TIMEOUT_S=0.3, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        late = self.release_with_a_late_deletion()
        wait_until("it is away", getattr, self.one.table, "failure")
        self.tell(RequestStep("one", LAN, "192.168.1.9", refused="etcd does not answer"))
        with self.pause_reconciling(self.one):
            self.one.finish_round()
            self.tell(EtcdComesBack())
            self.one.hurry()
            wait_until("a later one has succeeded", self.is_certain_of_all_claims)
            self.tell(
                EtcdGoesAway(("one",)),
                RequestStep("one", LAN, "192.168.1.9"),
                EtcdComesBack())
            with self.etcd.lock:
                self.etcd.carry_out(late[0])
            self.tell(ClaimedAddresses({f"{LAN}/192.168.1.9": ["one"]}))

    def drop(self, _: Any) -> None:
        """Drop the deletions that an earlier process has sent again."""
        self.etcd.before(f"-claims/{LAN}", self.drop)
        raise ConnectionError

    def test_address_that_an_earlier_process_may_have_released_is_not_relied_upon(self) -> None:
        """Its request may be on its way until a transaction of the new process succeeds."""
        self.patch(gipam, ETCD_TIMEOUT_S=0.5, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        late = self.release_with_a_late_deletion()
        self.one.crash()
        self.one.end_thread()
        # The next process reads all claims, and its first transaction does not arrive.
        self.etcd.before(f"-claims/{LAN}", self.drop)
        self.tell(EtcdComesBack())
        self.etcd.before("hosts/one", self.lose_connection)
        one = self.start("one", self.one.directory)
        wait_until("all claims are read", getattr, one.table, "has_joined")
        self.assertTrue(one.table.has_claimed(f"{LAN}/192.168.1.9"))
        one.loop.run_in_loop(one.table.on_docker_compared)
        self.tell(
            RequestStep("one", LAN, "192.168.1.9", refused="etcd does not answer"),
            RequestStep("one", LAN, refused="etcd does not answer"))
        with self.etcd.lock:
            self.assertTrue(self.etcd.carry_out(late[0])["succeeded"])
        self.tell(ClaimedAddresses({}))

    def is_certain_of_all_claims(self) -> bool:
        return not self.one.table.uncertain

    def test_address_that_may_be_a_gateways_by_now_is_not_relied_upon(self) -> None:
        """Another host may use the same address as its gateway."""
        self.patch(gipam, ETCD_TIMEOUT_S=0.3, HEARTBEAT_INTERVAL_S=DEADLINE_S)

        def lose_reply(body: dict[str, Any]) -> None:
            self.etcd.go_away()
            self.etcd.lose_reply(body)

        self.tell(RequestStep("one", LAN, "192.168.1.9"))
        with self.pause_reconciling(self.one):
            self.tell(Free("one", LAN, "192.168.1.9"))
            self.etcd.before(f"claims/{LAN}/192.168.1.9", lose_reply)
            words = "etcd does not answer"
            self.tell(
                RequestStep("one", LAN, "192.168.1.9", is_gateway=True, refused=words),
                RequestStep("one", LAN, "192.168.1.9", refused=words))

    def test_claim_that_is_only_remembered_gives_no_address(self) -> None:
        """The host may have been evicted without knowing it, so its claim may be gone."""
        self.patch(gipam, HEARTBEAT_INTERVAL_S=DEADLINE_S)
        self.tell(Settle(("one",)))
        with self.pause_reconciling(self.one):
            for mac in ("", MAC):
                self.tell(
                    RequestStep("one", LAN, "192.168.1.9", mac=mac),
                    Free("one", LAN, "192.168.1.9"))
            self.tell(RequestStep("two", LAN, "192.168.1.9", mac="", refused="claimed by host one"))
        self.tell(
            Key(f"claims/{LAN}/192.168.1.9", {"hosts": ["other"], "kind": "endpoint"}),
            Key("hosts/one"),
            RequestStep("one", LAN, "192.168.1.9", refused="claimed by host other"))

    def test_status_shows_hosts_and_claims(self) -> None:
        self.tell(
            RequestStep("one", LAN),
            Network("one", gets="198.18.0.0/24"),
            Network("two", gets="198.18.1.0/24"),
            Settle(("one",)))
        status = self.one.state()
        for host, name in zip(status["hosts"], self.HOSTS):
            self.assertEqual(host["host"], name)
            self.assertEqual(host["claims"], 2)
            self.assertTrue(host["is_present"])
        claims = {claim["subnet"]: (claim["hosts"], claim["is_shared"])
                  for claim in status["claims"] if not claim["address"]}
        self.assertEqual(claims, {
            LAN: (["one", "two"], True),
            "198.18.0.0/24": (["one"], False),
            "198.18.1.0/24": (["two"], False)})
        out = self.gipam(self.one, "status").out
        self.assertIn("#o.", out)
        self.assertIn("held by another host", out)

    def test_network_of_a_lost_lease_file_is_imported_as_a_shared_one(self) -> None:
        self.take("one")
        one = self.lose_lease_file()
        self.import_endpoint(one, "192.168.1.2")
        self.assertNotEqual(one.request_address(f"{LAN}#{TOKEN}"), "192.168.1.2/24")

    def test_network_of_a_host_that_was_evicted_is_imported_as_a_shared_one(self) -> None:
        self.tell(Settle(("one",)))
        one = self.lose_lease_file(Key(f"claims/{LAN}", {"hosts": ["two"], "shared": True}))
        self.import_endpoint(one, "192.168.1.2")
        self.tell(
            Settle(("two",)),
            Conflict("two", LAN, ""),
            RequestStep("two", LAN, "192.168.1.2", refused="claimed by host one"))

    def lose_lease_file(self, *steps: Any) -> Host:
        """Start host one again without its lease file, after these steps."""
        self.one.crash()
        for name in os.listdir(self.one.directory):
            os.unlink(os.path.join(self.one.directory, name))
        self.tell(*steps)
        return self.start("one", self.one.directory)

    def import_endpoint(self, one: Host, address: str) -> None:
        """Import the network with this address, and check that both are claimed as shared."""
        one.call(
            "Gipam.Adopt",
            Subnet=LAN,
            SubPool="",
            Name="",
            Seq=0,
            Leases=[{
                "Address": address,
                "Kind": "endpoint",
                "MAC": "",
                "Name": "web",
            }])
        self.assertTrue(one.state()["pools"][0]["is_shared"])
        one.settle()
        self.assertIn(f"{LAN}/{address}", self.etcd.claims(has_addresses=True))
        self.assertTrue(json.loads(self.etcd.values[f"claims/{LAN}"])["shared"])


# === Settings =====================================================================================
#
# The options: defaults, environment, command line, and the lease file. Most tests run
# `gipam config` in this process; a fake daemon answers with the settings that a start would have.
# Lease files of the Go program, and files with wrong contents, are read here too.

SAMPLES = {
    "unix": "true",
    "address": "127.0.0.1:9191",
    "file": "/tmp/leases.json",
    "v6": "2001:db8::/56,2001:db8:1::/56",
    "v4": "10.2.0.0/16",
    "v6ab": "72",
    "v4ab": "26",
    "exclude": "10.2.0.0/24",
    "socket": "/run/web.sock",
    "spec": "/tmp/web.spec",
    "mac": "false",
    "metrics": ":9091",
    "onlink": "eth0",
    "etcdtls": "/tmp",
    "host": "web-1.example",
    "etcd": "http://10.0.0.1:2379,http://[2001:db8::1]:2379",
}
V4 = "-v4=10.2.0.0/16"
V6 = "-v6=2001:db8::/56"


def answer_config(settings: gipam.Settings, *_: Any) -> Any:
    """Answer as a daemon that has just started with these settings."""
    config, *_rest = gipam.open_store(settings)
    return gipam.describe_daemon(config, "")


class CommandLineCase(CommandCase):
    """`gipam config`, answered with the settings of a start with these options and lease file."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(gipam.Store, lock=mock.Mock())
        self.patch(gipam, daemon_request=answer_config)

    def keep(self, contents: Any) -> None:
        """Write the lease file: bytes as they are, JSON of anything else."""
        if not isinstance(contents, bytes):
            contents = json.dumps(contents)
        self.write("leases.json", contents)

    def run_config(self, *arguments: str, **variables: str) -> Finished:
        words = ("-file", self.file, "config", *arguments)
        return self.run_main(*words, **variables)  # type: ignore[arg-type]

    def read_rows(self, text: str) -> dict[str, tuple[str, str]]:
        """Return name -> (value, origin), as `gipam config` prints it."""
        rows: dict[str, tuple[str, str]] = {}
        for name, value, origin in re.findall(r"(?m)^(\w+) +(\S+) +(\S.*)$", text):
            rows[name] = (value, origin)
        self.assertEqual(list(rows), [option.name for option in gipam.OPTIONS])
        return rows

    def effective(self, *arguments: str, **variables: str) -> dict[str, tuple[str, str]]:
        """Return name -> (value, origin) of a start that warns of nothing."""
        done = self.run_config(*arguments, **variables)
        self.assertEqual((done.status, done.err), (0, ""))
        return self.read_rows(done.out)


class OptionTest(CommandLineCase):
    """The flags and variables of each option."""

    def test_each_option_has_a_default(self) -> None:
        defaults = self.effective()
        self.assertEqual(os.listdir(self.directory), [])
        self.assertEqual(defaults["host"], (socket.gethostname(), "default"))
        for option in gipam.OPTIONS:
            if option.name not in ("file", "host"):
                self.assertEqual(defaults[option.name], (option.default or "none", "default"))

    def test_each_option_has_a_flag_in_both_dash_styles(self) -> None:
        for option in gipam.OPTIONS:
            name = option.name
            value = SAMPLES[name]
            variables = {option.variable: option.default}
            for words in ([f"-{name}={value}"], [f"--{name}={value}"],
                          [f"-{name}", value], [f"--{name}", value]):
                with self.subTest(words):
                    rows = self.effective(V4, V6, *words, **variables)
                    self.assertEqual(rows[name], (value, "command line"))

    def test_each_option_has_a_variable(self) -> None:
        for option in gipam.OPTIONS:
            if option.name in ("v4", "v6", "file"):
                continue
            with self.subTest(option.variable):
                value = SAMPLES[option.name]
                rows = self.effective(V4, V6, **{option.variable: value})
                self.assertEqual(rows[option.name], (value, f"environment ({option.variable})"))

    def test_options_stand_before_the_command_or_after_it(self) -> None:
        for words in ("-v4 10.2.0.0/16 config", "config -v4 10.2.0.0/16"):
            with self.subTest(words):
                done = self.run_main("-file", self.file, *words.split())
                rows = self.read_rows(done.out)
                self.assertEqual(rows["v4"], ("10.2.0.0/16", "command line"))

    def test_boolean_option_takes_the_words_of_go(self) -> None:
        words = {"": True}
        words.update(dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True))
        words.update(dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False))
        for word, value in words.items():
            self.assertEqual(gipam.BOOLEANS.get(word, True), value)
            for flag in ("-unix", "--unix"):
                with self.subTest(flag, word=word):
                    done = self.run_main("-file", self.file, flag, *word.split(), "config")
                    rows = self.read_rows(done.out)
                    self.assertEqual(rows["unix"], (word or "true", "command line"))

    def test_boolean_option_takes_no_other_word(self) -> None:
        for word in ("yes", "on", "", "2", "TRUe", "tRUE", " true", "-1"):
            with self.subTest(word):
                self.assert_fails(self.run_config(f"-unix={word}"), 78,
                                  "gipam: -unix .*: not a boolean: use true or false .*")

    def test_paths_are_shown_whole(self) -> None:
        rows = self.effective("-socket=x.sock")
        self.assertEqual(rows["socket"][0], os.path.join(os.path.realpath("."), "x.sock"))

    def test_passwords_are_never_shown(self) -> None:
        rows = self.effective("-etcd=http://10.0.0.1:1,https://me:secret@etcd2")
        self.assertEqual(rows["etcd"][0], "http://10.0.0.1:1,https://***@etcd2")
        for given, shown in (("https://me:secret@etcd2,x", "https://***@etcd2,x"),
                             ("me:secret@etcd2", "***@etcd2"),
                             ("http://a,https://me:sec,ret@etcd2", "http://a,https://***@etcd2")):
            self.assert_fails(self.run_config(f"-etcd={given}"), 78, "gipam: -etcd "
                              f"{re.escape(repr(shown))} .*: not a list of endpoints.*")


class SettingCase(NamedTuple):
    """An option in the lease file, in its notes and now; the text that wins, and the reason."""

    in_file: str | None
    noted: str | None
    noted_option: str | None
    option: str | None
    winner: str | None
    reason: str


TEXTS = {"one": "10.2.0.0/16", "two": "10.3.0.0/16", "three": "10.4.0.0/16", "empty": "", "-": None}
SETTING_CASES = """
    in_file  noted  noted_option  option  winner  reason

    one      one    one           one     one
    one      one    -             -       one
    one      one    one           -       one     not given
    one      one    one           two     two     unaffected
    one      one    -             two     two     unaffected
    one      one    one           empty   empty   unaffected
    -        empty  -             two     two     unaffected
    two      one    one           one     two     edited
    two      one    one           three   two     edited
    two      one    -             -       two     edited
    -        one    one           one     empty   edited
    two      two    one           one     two     file wins
    two      two    one           three   three   unaffected
    empty    empty  one           one     empty   file wins
    empty    empty  empty         -       empty
    empty    empty  one           two     two     unaffected
    one      -      -             two     one     file wins
    one      -      -             -       one
    -        -      -             two     two
"""
REASONS = {
    "edited": "it has been edited there",
    "file wins": "the file wins; to change it, edit it there or give -v4 a new value",
    "unaffected": "existing pools are unaffected",
    "not given": "it stays although -v4 is no longer given; to clear it, start once with "
                 "GIPAM_V4=, or edit it there",
}


def read_setting_cases() -> Iterator[SettingCase]:
    """Yield the cases of the table."""
    for line in SETTING_CASES.split("\n")[2:]:
        words = line.split()
        if words:
            texts = [TEXTS[word] for word in words[:5]]
            yield SettingCase._make([*texts, " ".join(words[5:])])


class LatestTest(CommandLineCase):
    """Of the lease file and the other settings, the one that was changed last wins."""

    def test_what_was_changed_last_wins(self) -> None:
        for case in read_setting_cases():
            notes = {}
            if case.noted is not None:
                noted = gipam.Option("v4", "PREFIXES", "", "", case.noted,
                                     given_text=case.noted_option)
                notes["v4"] = gipam.note_of(noted)
            self.keep({"V4Pool": case.in_file, "Options": notes})
            arguments = []
            if case.option is not None:
                arguments.append(f"-v4={case.option}")
            with self.subTest(case):
                done = self.run_config(*arguments)
                self.assertEqual(self.read_rows(done.out)["v4"][0], case.winner or "none")
                self.assertEqual(done.err, self.warning(case))

    def warning(self, case: SettingCase) -> str:
        """Return the log message of a start."""
        if not case.reason:
            return ""
        option_origin = "command line" if case.option is not None else "default"
        option = f"{case.option or ''!r} from the {option_origin}"
        in_file = f"{case.in_file or ''!r} from the lease file (V4Pool in {self.file})"
        winner = in_file
        loser = option
        if case.reason == "unaffected":
            winner = option
            loser = in_file
        return f"-v4 is {winner}, not {loser}: {REASONS[case.reason]}\n"

    def test_note_that_cannot_be_read_is_none(self) -> None:
        unreadable: list[Any] = ["x", 7, {"v4": []}, {"v4": [7]}, {"v4": "x"}, [["v4"]]]
        for notes in unreadable:
            self.keep({"V4Pool": "10.2.0.0/16", "Options": notes})
            with self.subTest(notes):
                rows = self.read_rows(self.run_config("-v4=10.3.0.0/16").out)
                self.assertEqual(rows["v4"][0], "10.2.0.0/16")

    def test_each_key_of_the_lease_file_overrules_its_option(self) -> None:
        for name, given in (("v4", "10.0.0.0/8"), ("v6", "2001:db8::/32"), ("v4ab", "28"),
                            ("v6ab", "80"), ("exclude", "10.2.4.0/22")):
            key = gipam.OPTION_KEYS[name]
            value = SAMPLES[name]
            words = (V4, V6, f"-{name}={given}")
            for spelling in (key, key.lower()):
                self.keep({spelling: int(value) if value.isdigit() else value})
                rows = self.read_rows(self.run_config(*words).out)
                with self.subTest(spelling):
                    self.assertEqual(rows[name], (value, f"lease file ({key} in {self.file})"))
            self.keep({key: None})
            self.assertEqual(self.effective(*words)[name][0], given)


class SeveralStartsTest(CommandCase):
    """A daemon whose option changes, or whose lease file is edited, from start to start."""

    def setUp(self) -> None:
        self.daemon = Daemon(self, directory=self.directory, env=NO_DOCKER)
        self.options = list(self.daemon.options)

    def edit_base(self, old: int, new: int) -> None:
        """Replace the third number of the base in the lease file."""
        text = pathlib.Path(self.file).read_text(encoding="utf-8")
        self.write("leases.json", text.replace(f'"V4Pool":"198.18.{old}.',
                                               f'"V4Pool":"198.18.{new}.'))

    def request_pool(self, base: int) -> str:
        """Start the daemon with this third number of the base; return the subnet it grants."""
        self.daemon.options = [*self.options, "-v4", f"198.18.{base}.0/20"]
        _, subnet = self.daemon.start().client().request_pool()
        return subnet

    def wait_for_base(self, base: int) -> None:
        """Wait until a checkpoint has written the base to the lease file."""
        digest = gipam.digest(f"198.18.{base}.0/20")
        for _ in sleeping_retry("a checkpoint"):
            if f'["{digest}"' in pathlib.Path(self.file).read_text(encoding="utf-8"):
                break

    def test_settings_over_several_starts(self) -> None:
        self.assertEqual(self.request_pool(0), "198.18.0.0/24")
        self.assertEqual(self.daemon.stop(), 0)
        self.assertEqual(self.request_pool(16), "198.18.17.0/24")
        self.assertEqual(self.daemon.stop(), 0)
        self.edit_base(16, 32)
        self.assertEqual(self.request_pool(16), "198.18.34.0/24")
        # The next edit has another length, so that it is seen in the same tick of the clock.
        self.wait_for_base(32)
        self.edit_base(32, 128)
        self.assertEqual(self.daemon.stop(), 0)
        self.assertEqual(self.request_pool(16), "198.18.35.0/24")
        self.assertEqual(self.daemon.stop(), 0)
        self.assertIn(f"{self.file} was edited while gipam was running: the edit has no effect and "
                      f"is kept as {self.file}.edited-1", self.daemon.read_log())
        subnets = {pool["Pool"] for pool in self.lease_file()["Allocated"]}
        self.assertLessEqual({"198.18.0.0/24", "198.18.17.0/24", "198.18.34.0/24"}, subnets)


class InvalidValue(NamedTuple):
    """An option, the rule that its values break, with {} for the value, and other arguments."""

    name: str
    rule: str
    values: str  # separated by |
    others: Sequence[str] = ()


UNUSABLE = "{} has addresses that no host can have: loopback, multicast or unspecified ones"
NOT_HOST_PORT = "not HOST:PORT with an address as HOST, such as 127.0.0.1:9090"
NOT_WITHIN = "{} is not within any base"
INVALID_VALUES = (
    InvalidValue("unix", "not a boolean: use true or false (or 1, 0, t, f)", "maybe|"),
    InvalidValue("address", NOT_HOST_PORT,
                 "9090|127.0.0.1|:65536|:-1|:x|::1:x||off|web:9090|[fe80::1%lo]:9090"),
    InvalidValue("metrics", NOT_HOST_PORT, "9091|web:9091"),
    InvalidValue("address", "not a loopback address: anyone who can reach the port could take "
                 "every address; use :PORT or -unix", "0.0.0.0:9090|[::]:9090|10.2.0.1:9090"),
    InvalidValue("v4", UNUSABLE, "127.0.0.0/16|126.0.0.0/7|224.1.0.0/16|192.0.0.0/2|0.0.0.0/0|"
                                 "0.1.0.0/16"),
    InvalidValue("v6", UNUSABLE, "ff00::/12|fe00::/7|::/64"),
    InvalidValue("etcd", "not a list of endpoints, such as http://10.0.0.1:2379 or "
                 "https://user:password@etcd2:2379",
                 "etcd1:2379|http://|http://etcd1:port|http://etcd1:65536|http://[::1:2379|"
                 "http://[web]:1|http://etcd1/x|ftp://etcd1|http://etcd1:2379,"),
    InvalidValue("etcdtls", "there is no such directory", "/nonexistent"),
    InvalidValue("onlink", "not the name of a network device", "../eth0|eth 0|" + "x" * 16),
    InvalidValue("host", "not a name of at most 64 letters, digits, '.', '_' and '-'",
                 "web 1|" + "x" * 65),
    InvalidValue("file", "not the path of a file", "|/tmp/"),
    InvalidValue("spec", "not the path of a file", "/tmp/"),
    InvalidValue("socket", "not the path of a socket, which has at most 107 characters",
                 "|/tmp/" + "x" * 103),
    InvalidValue("v4", "{!r} " + NOT_A_PREFIX, "10.2.0.0|10.2.0.0/255.255.0.0"),
    InvalidValue("v4", f"'' {NOT_A_PREFIX}", "10.2.0.0/16,"),
    InvalidValue("v4", f"{{!r}} {HOST_BITS} 10.2.0.0/16", "10.2.0.1/16"),
    InvalidValue("v6", f"{{!r}} {HOST_BITS} 2001:db8::/56", "2001:db8::1/56"),
    InvalidValue("v4", "{} is not an IPv4 prefix", "2001:db8::/56"),
    InvalidValue("v6", "{} is not an IPv6 prefix", "10.2.0.0/16"),
    InvalidValue("v4", "10.2.3.0/24 overlaps another base", "10.2.0.0/16,10.2.3.0/24"),
    InvalidValue("v4", "10.2.0.0/16 overlaps another base", "10.2.3.0/24,10.2.0.0/16"),
    InvalidValue("v6", "2001:db8::/56 overlaps another base", "2001:db8::/56,2001:db8::/56"),
    InvalidValue("v4ab", "not a prefix length from 1 to 31", "x|-1|2.5|0|026|32"),
    InvalidValue("v6ab", "not a prefix length from 1 to 127", "1000|128"),
    InvalidValue("v4ab", "a block of /{} is larger than its base 10.2.0.0/16", "15", [V4]),
    InvalidValue("v6ab", "a block of /{} is larger than its base 2001:db8::/56", "55", [V6]),
    InvalidValue("exclude", NOT_WITHIN, "10.3.0.0/24|10.0.0.0/8", [V4]),
    InvalidValue("exclude", NOT_WITHIN, "10.3.0.0/24|2001:db8:1::/64", [V4, V6]),
    InvalidValue("exclude", NOT_WITHIN, "10.2.0.0/24"),
    InvalidValue("exclude", f"'web' {NOT_A_PREFIX}", "10.2.0.0/24,web", [V4]),
)


class ConfigurationTest(CommandLineCase):
    """Invalid values, and lease files that cannot be used."""

    def assert_invalid(self, name: str, value: str, rule: str, origin: str, *arguments: str,
                       **variables: str) -> None:
        """Check the exit status and the message of a value with this origin."""
        with self.subTest(name, value=value, origin=origin):
            done = self.run_config(*arguments, **variables)
            error = f"gipam: -{name} {value!r} from the {origin}: {rule}\n"
            self.assertEqual(done, (78, "", error))

    def test_invalid_value_on_the_command_line(self) -> None:
        for invalid in INVALID_VALUES:
            name = invalid.name
            for value in invalid.values.split("|"):
                self.assert_invalid(name, value, invalid.rule.format(value), "command line",
                                    *invalid.others, f"-{name}={value}")

    def test_invalid_value_in_the_environment(self) -> None:
        for invalid in INVALID_VALUES:
            variable = f"GIPAM_{invalid.name.upper()}"
            for value in invalid.values.split("|"):
                # Here the command line has a -file.
                if invalid.name != "file":
                    self.assert_invalid(invalid.name, value, invalid.rule.format(value),
                                        f"environment ({variable})", *invalid.others,
                                        **{variable: value})

    def test_invalid_value_in_the_lease_file(self) -> None:
        for invalid in INVALID_VALUES:
            key = gipam.OPTION_KEYS.get(invalid.name)
            for value in invalid.values.split("|"):
                if key and value:
                    self.keep({key: value})
                    self.assert_invalid(invalid.name, value, invalid.rule.format(value),
                                        f"lease file ({key} in {self.file})", *invalid.others)

    def test_invalid_default(self) -> None:
        self.assert_invalid("v4ab", "24", "a block of /24 is larger than its base 10.2.0.0/26",
                            "default", "-v4=10.2.0.0/26")

    def test_name_of_the_host_matters_only_to_etcd(self) -> None:
        """The name of a host is "(none)" until somebody sets it."""
        self.patch(socket, gethostname=mock.Mock(return_value="(none)"))
        settings = gipam.read_settings({}, argparse.Namespace(file=self.file, etcd="off"))
        self.assertEqual(gipam.build_config(settings).host, "(none)")
        settings = gipam.read_settings({}, argparse.Namespace(file=self.file, etcd="http://etcd1"))
        with self.assertRaisesRegex(gipam.ConfigError,
                                    r"-host '\(none\)' from the default: not a name of"):
            gipam.build_config(settings)

    def test_directory_of_the_lease_file_must_exist(self) -> None:
        missing = os.path.join(self.directory, "missing", "leases.json")
        self.assert_fails(self.run_main("config", GIPAM_FILE=missing), 78,
                          f"gipam: -file {missing!r} from the environment .GIPAM_FILE.: its "
                          "directory does not exist")

    def test_lease_file_that_cannot_be_read_is_refused_with_its_path(self) -> None:
        no_list = "has an Allocated that is not a list of pools"
        for text, reason in (
                (b"", "is not JSON in line 1"),
                (b"{\n,}", "is not JSON in line 2"),
                (b"\xff", "is not JSON"),
                (b"[" * 100_000, "is not JSON"),
                (b"[]", "is not a JSON object"),
                (b'{"Allocated":[1]}', no_list),
                (b'{"Allocated":7}', no_list),
                (b'{"Allocated":{}}', no_list)):
            self.keep(text)
            with self.subTest(text[:9]):
                self.assert_fails(self.run_config(), 78, f"gipam: {self.file} {reason}.*; gipam "
                                  "refuses to guess: restore a backup.+")

    def test_only_regular_files_are_read(self) -> None:
        self.write("there", "{}")
        for path in (self.file, self.file + ".journal.1"):
            with self.subTest(path):
                os.mkdir(path)
                self.assert_not_read(path, "(not a regular file|Is a directory)")
                os.rmdir(path)
                os.mkfifo(path)
                self.assert_not_read(path, "not a regular file")
                os.unlink(path)
                os.symlink("there", path)
                self.assert_not_read(path, "Too many levels of symbolic links")
                os.unlink(path)

    def assert_not_read(self, path: str, reason: str) -> None:
        self.assert_fails(self.run_config(), 78, f"gipam: cannot read {path}: {reason}")

    def test_brief_shortage_is_worth_another_start(self) -> None:
        self.keep({})
        self.write("leases.json.journal.1", "")
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR):
            for path in (self.file, self.file + ".journal.1"):
                with self.subTest(path, number=number), failing_open(path, number):
                    self.assert_fails(self.run_config(), 74, f"gipam: {path}: .+")

    def test_bad_disk_is_named(self) -> None:
        self.keep({})
        self.write("leases.json.journal.1", "")
        error = OSError(errno.EIO, "bad disk")
        with mock.patch.object(gipam.Segment, "read", side_effect=error):
            self.assert_fails(self.run_config(), 78,
                              f"gipam: cannot read {self.file} or its journal: bad disk")

    def test_unknown_keys_of_the_lease_file_are_reported_and_dropped(self) -> None:
        pool = {"ID": "a", "V": 4, "Pool": "10.2.0.0/24", "Mood": 1}
        self.keep({"V4Pool": "10.2.0.0/16", "Colour": "red", "Leases": [], "Allocated": [pool]})
        keys = ("Colour", "Leases", "Mood")
        lines = [f"unknown key '{key}' in {self.file}: dropped\n" for key in keys]
        self.assertEqual(self.run_config().err, "".join(lines))

    def test_what_may_surprise_is_logged_at_start(self) -> None:
        settings = gipam.read_settings({}, argparse.Namespace(
            unix="true", v6="fe80::/56", v4="169.254.0.0/16"))
        variables = {"GIPAM_V4": "", "GIPAM_SOKET": "x", "GIPAM_COLOUR": "red"}
        with mock.patch.dict(os.environ, variables, clear=True), \
                self.assertLogs(gipam.log, "WARNING") as logged:
            gipam.log_startup_warnings(gipam.build_config(settings), (), self.directory)
        self.assertEqual([record.getMessage() for record in logged.records], [
            "GIPAM_COLOUR is not an option of gipam",
            "GIPAM_SOKET is not an option of gipam: did you mean GIPAM_SOCKET?",
            "base 169.254.0.0/16 is link-local: no router forwards its addresses",
            "base fe80::/56 is link-local: no router forwards its addresses"])

    def test_mac_addresses_are_not_asked_for_with_mac_false(self) -> None:
        """ipvlan needs -mac=false; the tests of the API have the default."""
        client = Daemon(self, "-mac", "false", env=NO_DOCKER).start().client()
        self.assertEqual(client.call("IpamDriver.GetCapabilities"),
                         {"RequiresMACAddress": False, "RequiresRequestReplay": False})


@contextlib.contextmanager
def failing_open(failing_path: str, number: int) -> Iterator[None]:
    """Let os.open() fail for one path."""
    real_open = os.open

    def open_or_fail(path: str, *arguments: Any) -> int:
        if path == failing_path:
            raise OSError(number, os.strerror(number), path)
        return real_open(path, *arguments)

    with mock.patch.object(os, "open", open_or_fail):
        yield


LEASE_ROW = ["endpoint", "02:42:0a:02:00:02", "web1", NOW_S, 3, False]
POOL_ENTRY: dict[str, Any] = {"ID": "a", "V": 4, "Pool": "10.2.0.0/24", "Allocated": ["10.2.0.2"],
                              "Leases": [LEASE_ROW]}
# Key -> JSON of a list of wrong values
WRONG_POOL_VALUES = {
    "Granted": '["yesterday", 1.5]',
    "Seq": '[Infinity, "3", true]',
    "Idx": '[[1], "4", 1e400, -1, 999999999999999999999999999999999999999999]',
    "ID": '[7, ["a"]]',
    "Pool": '[10, "10.2.0.1/24", "10.2.0.0"]',
    "SubPool": '[5, "::a02:0/120", "10.2.1.0/25"]',
    "Name": '[["web"], 0]',
    "Free": "[1]",
    "Allocated": '["10.2.0.2", [7], [null], {"10.2.0.2": 1}, ["10.2.1.1"], ["2001:db8::1"], '
                 '["web"]]',
    "Leases": '[5, "abcde", [5], ["abcde"], [[]], [{}], [null], [["endpoint", "", "", 1, 3]], '
              '[["guest", "", "", 1, 3, false]], [["endpoint", "", "", 1, 3, 0]]]',
    "Shared": "[[true], 1]",
    "V": "[6, 5]",
    "Remembered": '[[], {"web": 5}, {"web": "ab"}, {"web": [9, 1, true]}, '
                  '{"web": ["10.2.0.9", "x", true]}, {"web": ["10.2.0.9", 1]}, '
                  '{"web": ["10.2.1.9", 1, true]}]',
}
WRONG_STATE_VALUES = {
    "Seq": '[1e400, "1"]',
    "V4Idx": "[[1]]",
    "V6Idx": "[1.5]",
    "Free": "[{}]",
    "Cursors": '[[1], {"4/26": "x"}, {"4": 1}, {"5/24": 1}, {"4/33": 1}, {"4/26": -1}]',
    "Names": '[{"web": 1}, ["web"], [["web", "10.2.0.0/24", 1]], '
             '[["web", "10.2.0.0/24", "1", {}]], [["web", 7, 1, {}]], '
             '[["web", "10.2.0.1/24", 1, {}]], '
             '[[null, "10.2.0.0/24", 1, {}]], [["web", "10.2.0.0/24", 1, []]], '
             '[["web", "10.2.0.0/24", 1, {"db": 5}]], '
             '[["web", "10.2.0.0/24", 1, {"db": [5, 1, 0]}]], '
             '[["web", "10.2.0.0/24", 1, {"db": [256, 1, false]}]]]',
}


class WrongTypesTest(CommandLineCase):
    """Lease files without a checksum, as people and the Go program write them."""

    def assert_contradicts(self, document: Any) -> None:
        """Check that a start refuses the lease file, which contradicts itself."""
        self.keep(document)
        with self.subTest(document):
            self.assert_fails(self.run_config(), 78,
                              f"gipam: {re.escape(self.file)} contradicts itself: .+")

    def test_right_ones_are_taken(self) -> None:
        nothing = {**POOL_ENTRY, "Allocated": None, "Leases": None, "Free": None}
        for allocated in ([POOL_ENTRY], None, [nothing]):
            self.keep({"Allocated": allocated, "Free": None})
            self.effective()

    def test_a_later_format_is_refused_before_anything_of_it_is_used(self) -> None:
        self.keep({"Format": 2, "Version": "9.1", "V4Pool": 7, "Shape": "new"})
        self.assert_fails(self.run_config(), 78, f"gipam: {re.escape(self.file)} has format 2 and "
                          "needs gipam 9.1 or later: this is gipam .*, which reads format 1")

    def test_value_of_a_pool(self) -> None:
        self.assert_contradicts({"Allocated": [{"Pool": "10.2.0.0/24"}]})
        for key, text in WRONG_POOL_VALUES.items():
            for value in json.loads(text):
                self.assert_contradicts({"Allocated": [{**POOL_ENTRY, key: value}]})

    def test_value_of_a_lease(self) -> None:
        for index in range(len(LEASE_ROW)):
            values: list[Any] = [None, 1.5, [], {}, 7 if index < 3 else "7"]
            if not isinstance(LEASE_ROW[index], bool):
                values.append(True)
            for value in values:
                row: list[Any] = list(LEASE_ROW)
                row[index] = value
                self.assert_contradicts({"Allocated": [{**POOL_ENTRY, "Leases": [row]}]})

    def test_value_of_the_state(self) -> None:
        for key, text in WRONG_STATE_VALUES.items():
            for value in json.loads(text):
                self.assert_contradicts({key: value})

    def test_what_is_there_twice(self) -> None:
        other = {**POOL_ENTRY, "ID": "b", "Allocated": [], "Leases": []}
        low = {**POOL_ENTRY, "ID": "low", "SubPool": "10.2.0.0/25"}
        high = {**POOL_ENTRY, "ID": "high", "SubPool": "10.2.0.128/25"}
        twice = {"Allocated": ["10.2.0.2"] * 2, "Leases": [LEASE_ROW] * 2}
        for what, pools in (
                ("a subnet", [POOL_ENTRY, other]),
                ("a part of a subnet", [POOL_ENTRY, {**other, "Pool": "10.2.0.0/16"}]),
                ("an id", [POOL_ENTRY, {**other, "ID": "a", "Pool": "10.3.0.0/24"}]),
                ("an address of two pools", [low, high]),
                ("an address", [{**POOL_ENTRY, **twice}])):
            with self.subTest(what):
                self.assert_contradicts({"Allocated": pools})


# The ids of the Go program are random strings.
ID4 = "Xq3vT0Zb9kLwYhUa"
ID6 = "7c9e6679f4b3"
GO_LEASES: dict[str, Any] = {
    "V6Pool": "2001:db8:0:100::/56",
    "V6AllocateBlock": 64,
    "V6Idx": 2,
    "V4Pool": "198.18.0.0/16",
    "V4AllocateBlock": 26,
    "V4Idx": 5,
    "Allocated": [
        {"ID": ID4, "V": 4, "Pool": "198.18.0.0/26", "Idx": 4, "Free": ["198.18.0.3"],
         "Allocated": ["198.18.0.1", "198.18.0.2", "198.18.0.63"]},
        {"ID": ID6, "V": 6, "Pool": "2001:db8:0:100::/64", "Idx": 7, "Free": None,
         "Allocated": ["2001:db8:0:100::1"]},
    ],
    "Free": [
        {"ID": "", "V": 4, "Pool": "198.18.0.64/26", "Idx": 0, "Allocated": None, "Free": None},
    ],
}
LATER_KEYS = {"V6Pool": "v6", "V6AllocateBlock": "v6ab", "V4Pool": "v4", "V4AllocateBlock": "v4ab"}


def in_lower_case(value: Any) -> Any:
    """Return the document as the later Go program wrote it."""
    if isinstance(value, list):
        return [in_lower_case(item) for item in value]
    if not isinstance(value, dict):
        return value
    document = {}
    for key, item in value.items():
        document[LATER_KEYS.get(key, key.lower())] = in_lower_case(item)
    return document


class GoLeaseFileTest(CommandCase):
    """gipam continues with the lease files of both generations of the Go program."""

    def start(self, document: Any, *options: str) -> Daemon:
        """Start a daemon on this lease file alone."""
        for path in glob.glob(self.file + "*"):
            os.unlink(path)
        self.write("leases.json", json.dumps(document))
        return Daemon(self, *options, directory=self.directory, env=NO_DOCKER).start()

    def each_generation(self) -> Iterator[Daemon]:
        """Yield a daemon with the lease file of each generation; each run is a subtest."""
        for document in (GO_LEASES, in_lower_case(GO_LEASES)):
            with self.subTest(next(iter(document))):
                daemon = self.start(document, "-v4", "198.19.0.0/16", "-v6ab", "72")
                yield daemon
                self.assertEqual(daemon.stop(), 0)

    def test_ids_and_addresses_are_honoured(self) -> None:
        for daemon in self.each_generation():
            client = daemon.client()
            for pool_id, address in ((ID4, "198.18.0.2"), (ID4, "198.18.0.63"),
                                     (ID6, "2001:db8:0:100::1")):
                with self.assertRaisesRegex(ErrorReply, "^Address already in use"):
                    client.request_address(pool_id, address)
            self.assertEqual(client.request_address(ID4), "198.18.0.4/26")
            self.assertEqual(client.request_address(ID6), "2001:db8:0:100::7/64")
            self.assertEqual(client.request_address(ID4, "198.18.0.3"), "198.18.0.3/26")

    def test_pools_and_cursors_are_honoured(self) -> None:
        for daemon in self.each_generation():
            client = daemon.client()
            with self.assertRaisesRegex(ErrorReply, "^Pool overlaps with other one on this"):
                client.request_pool("198.18.0.0/26")
            self.assertEqual(client.request_pool()[1], "198.18.1.64/26")
            self.assertEqual(client.request_pool(v6=True)[1], "2001:db8:0:102::/64")
            # The list Free of the Go program has this subnet.
            self.assertEqual(client.request_pool("198.18.0.64/26")[1], "198.18.0.64/26")

    def test_its_settings_win_and_that_is_logged(self) -> None:
        for daemon in self.each_generation():
            for text in ("'198.19.0.0/16'", "'198.18.0.0/16'", "'72'", "'64'", self.file,
                         "the file wins"):
                self.assertIn(text, daemon.read_log())
            self.assertNotIn("unknown key", daemon.read_log())

    def broadcast_is_held(self) -> bool:
        """Return whether the lease file has the broadcast address."""
        return "198.18.0.63" in self.lease_file()["Allocated"][0]["Allocated"]

    def test_held_broadcast_address_is_kept_until_it_is_released(self) -> None:
        """The Go program granted the broadcast address. gipam does not, but a container has it."""
        daemon = self.start(GO_LEASES)
        # The second start reads gipam's own lease file.
        for _ in range(2):
            self.assertTrue(self.broadcast_is_held())
            self.assertEqual(daemon.stop(), 0)
            daemon.start()
        client = daemon.client()
        for _ in range(2):
            client.release_address(ID4, "198.18.0.63")
            with self.assertRaisesRegex(ErrorReply, "198.18.0.63 is reserved in 198.18.0.0/26$"):
                client.request_address(ID4, "198.18.0.63")
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(self.broadcast_is_held())


class OptionsTableTest(unittest.TestCase):
    """OPTIONS and the files that describe the options agree."""

    def read(self, name: str) -> str:
        return pathlib.Path(HERE, name).read_text(encoding="utf-8")

    def test_gipam_env_shows_each_variable_with_its_default(self) -> None:
        defaults = {option.variable: option.default for option in gipam.OPTIONS}
        rows = re.findall(r"(?m)^(#?)(GIPAM_\w+)=(.*)$", self.read("gipam.env"))
        self.assertEqual(sorted(name for _, name, _ in rows), sorted(defaults))
        for comment, name, value in rows:
            default = defaults[name]
            # A line that is no comment has another value.
            with self.subTest(name):
                self.assertEqual(value in (default, default.replace("off", "")), bool(comment))

    def test_gipam_service_starts_what_there_is(self) -> None:
        unit = self.read("gipam.service")
        start = re.search(
            r"(?m)^ExecStart=/usr/bin/(?:env )?python3 /opt/gipam/gipam\.py ?(.*)$", unit)
        assert start
        words = {word.split("=")[0].lstrip("-") for word in start[1].split()}
        options = {option.name for option in gipam.OPTIONS}
        self.assertLessEqual(words, options | {"serve"})
        self.assertIn("\nEnvironmentFile=/opt/gipam/%i/.env\n", unit)
        variables = {option.variable for option in gipam.OPTIONS}
        self.assertLessEqual(set(re.findall(r"GIPAM_\w+", unit)), variables)

    def read_readme_rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (flag, variable, default) of rows like | -v6, -v4 | GIPAM_V6, GIPAM_V4 | none |."""
        for line in self.read("README.md").splitlines():
            cells = [cell.strip() for cell in line.replace("`", "").split("|")[1:-1]]
            if len(cells) <= 2 or "GIPAM_" not in cells[1]:
                continue
            flags = re.split(r",\s*", cells[0])
            variables = re.split(r",\s*", cells[1])
            defaults = re.split(r",\s*", cells[2])
            # A single default is that of all.
            if len(defaults) < len(flags):
                defaults = defaults * len(flags)
            yield from zip(flags, variables, defaults)

    def test_readme_has_a_row_for_each_option(self) -> None:
        options = {(f"-{option.name}", option.variable, option.default or "none")
                   for option in gipam.OPTIONS}
        self.assertEqual(set(self.read_readme_rows()), options)


# === Daemon =======================================================================================
#
# gipam as a process: the refusals of a start, with exit status and message, and that
# neither a start nor a stop waits for somebody to read stderr; how a failed write is shown, and
# the pages on the address of -metrics. Stopping with requests under way is tested with the Server.

SHORTAGE = """
import errno
def fail(path, *arguments, real=os.open):
    if str(path).endswith({suffix!r}):
        raise OSError(errno.{name}, os.strerror(errno.{name}), path)
    return real(path, *arguments)
os.open = fail
"""
NO_NETLINK = """
import errno
def fail(*arguments):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
gipam.netlink_request = fail
"""
FAILING_THREAD = """
def fail(*arguments):
    open({begun!r}, 'w').close()
    1 / 0
gipam.import_worker = fail
"""


class FailedStartTest(StoreCase):
    """A start that fails says why in one line, and ends."""

    def assert_start_fails(self, daemon: Daemon, exit_status: int, pattern: str) -> None:
        """Start a daemon, and check its exit status and the one line that it logs."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(daemon.log)
        daemon.start(wait=False)
        self.assertEqual(daemon.stop(0), exit_status, daemon.read_log())
        self.assertRegex(daemon.read_log(), f"^{pattern}\n$")

    def test_brief_shortage_of_the_host_is_worth_another_start(self) -> None:
        """systemd does not restart a service that has ended with status 78."""
        for name in ("EMFILE", "ENFILE", "ENOMEM"):
            text = os.strerror(getattr(errno, name))
            for suffix in (".lock", ".tmp"):
                with self.subTest(name, suffix=suffix):
                    daemon = self.daemon(lines=SHORTAGE.format(suffix=suffix, name=name))
                    self.assert_start_fails(daemon, 74, f"gipam: {self.path}{suffix}: {text}")
            with self.subTest(name, suffix="netlink"):
                daemon = self.daemon(lines=NO_NETLINK.format(name=name))
                self.assert_start_fails(daemon, 74, f"gipam: {text}")

    def test_kernel_that_does_not_list_routes_is_told_apart(self) -> None:
        """A unit without AF_NETLINK causes this error, and another start does not help."""
        daemon = self.daemon(lines=NO_NETLINK.format(name="EAFNOSUPPORT"))
        self.assert_start_fails(daemon, 78, "gipam: cannot ask the kernel for routes: .*; under "
                                            "systemd, .* must include AF_NETLINK, .*")
        self.assertFalse(os.path.exists(self.path))

    def test_half_a_surrogate_pair_in_an_edited_setting_is_an_invalid_value(self) -> None:
        digest = gipam.digest("10.2.0.0/16")
        for notes in ({}, {"v4": [digest, None]}, {"v4": [digest, digest]}):
            for key, name in (("V4Pool", "v4"), ("Exclude", "exclude"),
                              ("V4AllocateBlock", "v4ab")):
                document = {key: "\ud800", "Options": notes}
                self.write_file("leases.json", json.dumps(document).encode())
                os.chmod(self.path, 0o600)
                with self.subTest(key, notes=notes):
                    self.assert_start_fails(self.daemon(), 78, fr"gipam: -{name} '\\ud800' from "
                                            "the lease file .*")

    def test_invalid_setting_is_refused_before_it_is_said_which_one_wins(self) -> None:
        digest = gipam.digest("10.2.0.0/16")
        document = {"V4Pool": "10.2.0.0/16", "Options": {"v4": [digest, digest]}}
        self.write_file("leases.json", json.dumps(document).encode())
        os.chmod(self.path, 0o600)
        self.assert_start_fails(self.daemon("-v4", "10.2.0.0/33"), 78,
                                "gipam: -v4 '10.2.0.0/33' from the command line: .*")

    def test_error_has_the_priority_of_an_error_in_the_journal(self) -> None:
        """journald adds the name of the service, so that gipam must not write it as well."""
        daemon = self.daemon("-v4", "10.2.0.0")
        self.assert_start_fails(daemon, 78, "gipam: -v4 '10.2.0.0' from the command line: .*")
        daemon.env["JOURNAL_STREAM"] = "8:1"
        self.assert_start_fails(daemon, 78, "<3>-v4 '10.2.0.0' from the command line: .*")

    def test_start_ends_though_nobody_reads_stderr(self) -> None:
        """Old versions hung on a full pipe."""
        for what, lines, options, exit_status in (
                ("an error", "", ("-v4", "10.2.0.0"), 78),
                ("an exception", "gipam.open_store = lambda *_: 1 / 0", (), 1),
                ("a missing directory", "", ("-file", "/nonexistent/leases.json"), 78)):
            daemon = self.daemon(*options, lines=lines)
            with self.subTest(what):
                daemon.start(wait=False, stderr=full_pipe(self))
                self.assertEqual(daemon.stop(0), exit_status)

    def test_unexpected_exception_is_logged_with_its_traceback(self) -> None:
        daemon = self.daemon(lines="gipam.open_store = lambda *_: 1 / 0")
        self.assert_start_fails(daemon, 1, "(?s:.* ERROR this is a bug in gipam\n.*Traceback"
                                           ".*ZeroDivisionError: division by zero)")

    def test_start_that_fails_leaves_no_name_and_no_pool(self) -> None:
        """A lock file and a first lease file without pools may stay, because they do no harm."""
        lines = "gipam.log_startup_warnings = lambda *_: open('/nonexistent')"
        daemon = self.daemon("-v4", "10.2.0.0/16", lines=lines)
        # The thread of the import may have said something before or after that.
        said = "(?:.* INFO not compared .*)"
        pattern = f"(?:{said}\n)?gipam: /nonexistent: No such file or directory(?:\n{said})?"
        self.assert_start_fails(daemon, 1, pattern)
        names = set(os.listdir(self.directory))
        self.assertEqual(names, {"leases.json", "leases.json.lock", "log"})
        self.assertEqual(dump_state(recover(self.path)), dump_state(make_state()))


class EndTest(StoreCase):
    """The end of a daemon whose files have been tampered with."""

    def test_path_that_cannot_be_removed_does_not_keep_gipam_from_ending_well(self) -> None:
        daemon = self.daemon().start()
        daemon.client().request_pool("10.9.0.0/24")
        os.unlink(daemon.socket)
        os.mkdir(daemon.socket)
        self.assertEqual(daemon.stop(), 0)
        self.assertIn(f"cannot remove {daemon.socket}: Is a directory\n", daemon.read_log())
        # The last checkpoint leaves the lease file without a journal.
        journal = [name for name in os.listdir(self.directory) if ".journal." in name]
        self.assertEqual(journal, [])
        self.assertIn("10.9.0.0/24", pathlib.Path(self.path).read_text(encoding="utf-8"))


class ThreadTest(StoreCase):
    """An unexpected exception in a thread ends nothing else."""

    def test_exception_in_a_thread_goes_to_the_log_and_gipam_serves_on(self) -> None:
        begun = os.path.join(self.directory, "begun")
        daemon = self.daemon(lines=FAILING_THREAD.format(begun=begun)).start()
        daemon.client().request_pool("10.9.0.0/24")
        self.assertEqual(daemon.stop(), 0)
        self.assertRegex(daemon.read_log(), "(?s)ERROR a bug in gipam, in thread import\n.*"
                                            "ZeroDivisionError: division by zero")

    def test_exception_in_a_thread_waits_for_nobody_to_read_stderr(self) -> None:
        """In old versions the thread hung in Python's own hook."""
        begun = os.path.join(self.directory, "begun")
        daemon = self.daemon(lines=FAILING_THREAD.format(begun=begun))
        daemon.start(stderr=full_pipe(self))
        assert daemon.process
        tasks = f"/proc/{daemon.process.pid}/task"

        def has_one_thread() -> bool:
            return len(os.listdir(tasks)) == 1

        wait_until("the thread to begin", os.path.exists, begun)
        wait_until("the thread to end", has_one_thread)
        daemon.client().request_pool("10.9.0.0/24")
        self.assertEqual(daemon.stop(), 0)


class FailedWriteTest(OperatedCase):
    """A write that has failed is shown until one succeeds: by /healthz, check and systemd."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.make_network("first")
        self.settle()

    def health(self) -> gipam.Reply:
        return gipam.dispatch(self.service, "GET", "/healthz", b"")

    def assert_healthy(self) -> None:
        reply = self.health()
        self.assertEqual(reply.status, 200)
        self.assertEqual(reply.content_type, "text/plain; charset=utf-8")
        self.assertEqual(reply.body, b"ok\n")

    def fail_write(self, name: str, number: int) -> None:
        """Let a function of os fail once, in a request for which the journal has to grow."""
        self.assert_healthy()
        error = OSError(number, os.strerror(number))
        active_segment(self.service.store).allocated = 0
        with mock.patch.object(os, name, side_effect=error), self.assertRaises(ErrorReply):
            self.docker.make_network("web")

    def assert_shown(self, pattern: str) -> None:
        """Check that the failure is shown."""
        # The failure is in the log already, and monitors ask again and again.
        with mock.patch.object(gipam.log, "warning") as warning:
            reply = self.health()
        warning.assert_not_called()
        self.assertEqual(reply.status, 503)
        self.assertRegex(reply.body.decode(), pattern)
        with mock.patch.object(gipam, "sd_notify") as notify:
            gipam.send_watchdog(self.service)
        state = notify.call_args[0][0]
        self.assertRegex(state, "STATUS=1 pool, 1 lease; .*" + pattern)

    def test_full_disk_is_shown_until_a_write_succeeds(self) -> None:
        self.fail_write("pwrite", errno.ENOSPC)
        self.assert_shown("No space left")
        done = self.run_gipam("check")
        self.assertRegex(done.out, "note: the last write of gipam failed.*journal.*: No space left")
        self.docker.make_network("web")
        self.assert_healthy()

    def test_failed_sync_ends_the_daemon(self) -> None:
        """systemd starts the daemon again, with the state that is on disk."""
        self.fail_write("fdatasync", errno.EIO)
        self.thread.join(DEADLINE_S)
        self.assertFalse(self.thread.is_alive())
        self.assert_shown("cannot sync .*journal")


class MetricsAddressTest(Case):
    """The address of -metrics, which is open to every user of this host."""

    PAGES = (
        ("GET", "metrics", 200),
        ("GET", "healthz", 200),
        ("GET", "x", 404),
        # Only root may read names and MAC addresses.
        ("GET", "status", 404),
        ("GET", "status?leases=1", 404),
        ("POST", "metrics", 405),
        ("POST", "Gipam.Release", 404),
        ("POST", "Gipam.Adopt", 404),
        ("POST", "IpamDriver.RequestPool", 404),
        ("POST", "IpamDriver.ReleasePool", 404),
        ("POST", "Plugin.Activate", 404),
    )

    def test_address_serves_two_pages_and_changes_nothing(self) -> None:
        daemon = Daemon(self, "-metrics", "127.0.0.1:0", env=NO_DOCKER).start()
        port = daemon.wait_for_log(r"metrics on 127\.0\.0\.1:(\d+)")
        address = ("127.0.0.1", int(port))
        client = daemon.client()
        pool_id, _ = client.request_pool("10.66.0.0/24")
        before = client.state()
        for verb, path, status in self.PAGES:
            with self.subTest(verb + " " + path):
                peer = Peer(self, address)
                peer.send(request(path, {"PoolID": pool_id, "Pool": ""}, verb=verb))
                self.assertEqual(peer.answer(raw=True).status, status)
        self.assertEqual(client.state(), before)


# === Commands =====================================================================================
#
# The user interface: help, status, release, and where a command looks for the daemon. The
# commands run in this process, against a daemon that is served from it, beside a fake Docker;
# run_gipam() returns what they printed. The comparison with Docker has its tests in Check,
# `evict` in Cluster.


class HelpTest(CommandLineCase):
    """The command line itself: help, version, and errors in it."""

    def test_version(self) -> None:
        for word in ("--version", "-version", "-v", "version"):
            done = self.run_main(word)
            self.assertEqual(done, (0, gipam.__version__ + "\n", ""))

    def test_help_names_every_setting_and_command(self) -> None:
        """The help is the same on every Python, and on a terminal."""
        for line in ("--help", "-h", "help", "help help", "serve -help", "help serve"):
            words = line.split()
            done = self.run_main(*words, out=Terminal(), TERM="xterm", FORCE_COLOR="1")
            self.assertEqual((done.status, done.err), (0, ""))
            self.assertTrue(done.out.startswith("usage: gipam [COMMAND] [OPTIONS]\n"), done.out)
            text = re.sub(r"\s+", " ", done.out)
            for option in gipam.OPTIONS:
                self.assertIn(f" -{option.name} {option.value_type} ", text)
                default = option.default or "none"
                self.assertIn(f"({option.variable}; default: {default})", text)
            for name in (*gipam.COMMANDS, *gipam.META_COMMANDS):
                self.assertRegex(done.out, f"\n  {name} +[A-Z]")

    def test_help_fits_the_terminal(self) -> None:
        """The help is wrapped to fit; the examples need 80 columns."""
        for columns in (60, 80, 200):
            for name in gipam.COMMANDS:
                done = self.run_main(name, "--help", COLUMNS=str(columns))
                text, _, examples = done.out.partition("\nexamples:\n")
                for line in text.splitlines():
                    self.assertLess(len(line), columns)
                for line in examples.splitlines():
                    self.assertLess(len(line), 80)

    def test_help_of_a_command_has_its_own_arguments_and_examples(self) -> None:
        for name, command in gipam.COMMANDS.items():
            with self.subTest(name):
                done = self.run_main(name, "--help")
                self.assertEqual(self.run_main("help", name), done)
                text, _, examples = done.out.partition("\nexamples:\n")
                for argument in command.arguments:
                    self.assertIn(f"\n  {argument}", text)
                self.assertEqual("-v4ab" in text, name == "serve")
                self.assertIn(examples.count("\n"), (2, 3))
                for example in examples.splitlines():
                    _, *words = example.partition("   ")[0].split()
                    parsed = gipam.parse_arguments(words)
                    self.assertEqual(parsed.func, command.function)

    NEAR = "is not an option or command: did you mean "
    WRONG = (  # command line, end of the error
        ("status -soket=x", f"'-soket' {NEAR}-socket?"),
        ("--exclud", f"'--exclud' {NEAR}-exclude?"),
        ("check --fixx", f"'--fixx' {NEAR}--fix?"),
        ("status -metric=:9091", f"'-metric' {NEAR}-metrics?"),
        ("--v4a 26 config", f"'--v4a' {NEAR}-v4ab?"),
        ("statsu", f"'statsu' {NEAR}status?"),
        ("chekc --fix", f"'chekc' {NEAR}check?"),
        ("help chekc", f"'chekc' {NEAR}check?"),
        ("serve status", "unexpected argument 'status'; see `gipam --help`"),
        ("check fix", "unexpected argument 'fix': did you mean --fix?"),
        ("config -colour=red", "see `gipam config --help`"),
        ("-v4", "-v4 needs a value; see `gipam --help`"),
        ("help check extra", "unexpected argument 'extra'; see `gipam --help`"),
        ("version extra", "unexpected argument 'extra'; see `gipam --help`"),
        ("release", "the following arguments are required: POOL; see `gipam release --help`"),
        ("-unix yes", "-unix takes true or false (or 1, 0, t, f), or no value: not 'yes'"),
        ("config --unix no", "-unix takes true or false (or 1, 0, t, f), or no value: not 'no'"),
        ("check --grace -5", "--grace: '-5' is not a number of seconds, 0 or more; see "
                             "`gipam check --help`"),
        ("check --grace=1.5", "--grace: '1.5' is not a number of seconds, 0 or more; see "
                              "`gipam check --help`"))

    def test_error_names_the_argument_and_the_nearest_that_is_known(self) -> None:
        for words, text in self.WRONG:
            with self.subTest(words):
                done = self.run_main(*words.split(), GIPAM_FILE=self.file)
                self.assert_fails(done, 2, f"gipam: .*{re.escape(text)}")

    def test_abbreviations_and_options_without_a_value_are_errors(self) -> None:
        abbreviations = (
            "-c", "-u", "-f x", "-v4a 26", "-v4a=26", "--v4a=26", "-v4ab26", "-v4a26", "-uni",
            "--uni", "-un=true", "-u=true", "-soc /x", "--sock=/x", "-exc 10.2.0.0/24", "--fil x",
            "--vers", "--hel", "-UNIX", "--V4=10.2.0.0/16")
        for words in (*abbreviations, "-v4 -unix", "-file -v4ab=24", "status2", "config more"):
            for line in (f"config {words}", f"{words} config"):
                with self.subTest(line):
                    done = self.run_main(*line.split(), GIPAM_FILE=self.file)
                    self.assert_fails(done, 2, "gipam: .*")

    def test_name_alone_at_a_terminal_prints_the_help(self) -> None:
        serve = mock.Mock(return_value=0, __doc__="Serve.")
        command = gipam.Command(serve, {})
        self.patch(gipam, COMMANDS={**gipam.COMMANDS, "serve": command})
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        done = self.run_main(stdin=Terminal())
        self.assertEqual((done.status, done.err), (2, ""))
        serve.assert_not_called()
        self.assertIn("\n  status   ", done.out)

        self.run_main()
        self.run_main("-unix", stdin=Terminal())
        self.run_main("serve", stdin=Terminal())
        self.run_main(stdin=Terminal(), GIPAM_UNIX="1")
        self.keep({})
        self.run_main(stdin=Terminal())
        self.assertEqual(serve.call_count, 5)


class DaemonAddressTest(OperatedCase):
    """The places where a command looks for the daemon, and its error if no daemon answers."""

    def test_each_command_says_where_it_looked(self) -> None:
        """No command falls back on the lease file, which lacks the latest changes."""
        for words in ("status", "config", "check", "check --fix", "check --json", "evict web2",
                      "release 10.2.0.0/24 --yes --force"):
            with self.subTest(words):
                done = self.run_gipam(*words.split(), options=self.nowhere)
                self.assertEqual(done, (2, "", self.absent + "\n"))

    def test_error_of_the_daemon_is_shown(self) -> None:
        render = mock.Mock(side_effect=gipam.FatalStoreError("cannot sync"))
        page = gipam.PAGES["/status"]._replace(function=render)
        with mock.patch.dict(gipam.PAGES, {"/status": page}):
            done = self.run_gipam("check")
        self.assert_fails(done, 2, "gipam: .*cannot sync.*")

    def test_failed_connection_says_what_to_do(self) -> None:
        for error, text in (
                (PermissionError(errno.EACCES, "Permission denied"),
                 "Permission denied; run this as root"),
                (socket.timeout("timed out"), "timed out; start it, or say .*"),
                (http.client.BadStatusLine("SSH-2.0\r\n"),
                 "something else does, whose reply is not JSON; start it, .*")):
            with mock.patch.object(socket.socket, "connect", side_effect=error):
                self.assert_fails(self.run_gipam("status"), 2, (
                    f"gipam: the daemon does not answer on {self.socket}: {text}"))

    ROWS: tuple[tuple[str, dict[str, str], bool], ...] = (  # options, environment, socket is asked
        ("-unix", {}, True),
        ("-unix -address=:1", {}, True),
        ("-address=:1", {}, False),
        ("-v4ab=24", {"GIPAM_ADDRESS": ":1"}, False),
        ("-v4ab=24", {"GIPAM_SOCKET": "here", "GIPAM_ADDRESS": ":1"}, True),
        ("-v4ab=24", {"GIPAM_UNIX": "true", "GIPAM_ADDRESS": ":1"}, True),
        ("-unix", {"GIPAM_ADDRESS": ":1"}, True),
        ("-address=:1", {"GIPAM_UNIX": "true", "GIPAM_SOCKET": "here", "GIPAM_ADDRESS": ":1"},
         False),
        ("-address=:1 -unix=false", {}, False))

    def test_socket_is_skipped_if_the_address_was_set_at_a_later_stage(self) -> None:
        options = []
        for option in gipam.OPTIONS:
            is_socket = option.name == "socket"
            options.append(option._replace(default=self.socket) if is_socket else option)
        self.patch(gipam, OPTIONS=options)
        for words, environment, is_asked in self.ROWS:
            variables = {**environment}
            if "GIPAM_SOCKET" in variables:
                variables["GIPAM_SOCKET"] = self.socket
            with self.subTest(words, **environment):
                done = self.run_gipam("config", options=tuple(words.split()), **variables)
                if is_asked:
                    self.assertEqual(done.status, 0, done)
                else:
                    self.assert_fails(done, 2, "gipam: no gipam answers on 127.0.0.1:1: .*")

    def test_driver_and_settings_are_those_of_the_daemon(self) -> None:
        self.docker.make_network("web")
        self.service.daemon_info.update(driver="lan", config={
            "v4": {"value": "10.7.0.0/16", "origin": "environment (GIPAM_V4)"},
            "exclude": {"value": "", "origin": "default"},
            "onlink": {"value": "off", "origin": "default"}})
        for options in (("-socket", self.socket),
                        ("-unix", "-spec=/x/y.spec", "-socket", self.socket),
                        (*self.nowhere, f"-address=127.0.0.1:{self.serve_tcp()}")):
            with self.subTest(options):
                done = self.run_gipam("check", "--grace=0", options=options)
                self.assertRegex(done.out, "^leaked_pool: .*\noverlap: .*\n")
                done = self.run_gipam("config", "-v4", "10.8.0.0/16", *options)
                self.assertRegex(done.out, r"^v4 +10\.7\.0\.0/16 +environment \(GIPAM_V4\)\n"
                                           r"exclude +none +default\n"
                                           r"onlink +off +default\n$")

    def test_reader_that_closes_its_end_or_has_no_room(self) -> None:
        """The cases are `gipam status | head` and `gipam status > /dev/full`."""
        class Closed(io.StringIO):
            code = errno.EPIPE

            def write(self, text: str) -> int:
                raise OSError(self.code, os.strerror(self.code))

        with mock.patch.object(os, "dup2"):  # of the real standard output
            self.assertEqual(self.run_gipam("status", out=Closed()).err, "")
        Closed.code = errno.ENOSPC
        done = self.run_gipam("status", out=Closed())
        self.assertEqual(done.err, "gipam: No space left on device\n")

    def test_closed_standard_streams_are_replaced(self) -> None:
        without_streams = 'exec "$@" <&- >&- 2>&-'
        shell = ("sh", "-c", without_streams, "sh")
        daemon = Daemon(self, command=(*shell, sys.executable, GIPAM))
        daemon.start()
        assert daemon.process
        fds = f"/proc/{daemon.process.pid}/fd/"
        for fd in range(3):
            self.assertEqual(os.readlink(f"{fds}{fd}"), os.devnull)
        self.assertEqual(daemon.stop(), 0)


class MapCase(NamedTuple):
    """A base, and its bar and map in 110 columns."""

    base: str
    block_prefixlen: int
    numbers: str
    labels: str
    drawing: str
    unit: str = ""
    held: str = ""
    excluded: str = ""
    routes: str = ""


FAR_ROUTES = "10.2.9.7/32 2001:db8:0:7::1/128"
MAP_CASES = [
    MapCase("10.0.0.0/8", 30,
            "[#.........]  131200 of 4194304 blocks of /30 held, 4063104 free",
            "10.0.0.0 10.64.0.0 10.128.0.0 10.192.0.0", f"########+{246 * '.'}+",
            unit="16384 blocks per character",
            held="10.0.0.0/14 10.4.0.0/14 10.8.0.0/24 10.255.255.0/24 fd00::/8 192.168.0.0/16",
            excluded="10.2.9.0/28", routes=FAR_ROUTES),
    MapCase("10.2.0.0/25", 31, "[##########]  64 of 64 blocks of /31 held, 0 free", "10.2.0.0",
            64 * "#", held="10.0.0.0/7"),
    MapCase("10.2.0.0/16", 24, "[#.........]  3 of 256 blocks of /24 held, 252 free",
            "10.2.0.0 10.2.64.0 10.2.128.0 10.2.192.0", f"++#......x{246 * '.'}",
            held="10.2.0.0/26 10.2.0.64/26 10.2.1.0/26 10.2.2.0/25 10.2.2.128/25",
            excluded="10.2.9.0/28", routes=FAR_ROUTES),
    MapCase("2001:db8::/56", 64, "[..........]  0 of 256 blocks of /64 held, 255 free",
            "2001:db8:: 2001:db8:0:40:: 2001:db8:0:80:: 2001:db8:0:c0::", f".......~{248 * '.'}",
            routes=FAR_ROUTES),
    MapCase("fd00::/60", 124, "[..........]  0 of 2^64 blocks of /124 held, 2^64 free",
            "fd00:: fd00:0:0:4:: fd00:0:0:8:: fd00:0:0:c::", 256 * ".",
            unit="2^56 blocks per character"),
]
ROUTE_CASES = (  # routes beside excluded blocks, free blocks, map
    ("10.2.3.0/25 10.2.3.128/26", 10, ".x.~....xxxx...."),
    ("10.2.0.0/22 10.2.2.0/24", 8, "~x~~....xxxx...."),
    ("10.2.3.1/32 10.2.4.0/23", 8, ".x.~~~..xxxx...."),
    ("10.2.1.0/24 10.2.9.0/30", 11, ".x......xxxx...."))
for routes, free, drawing in ROUTE_CASES:
    MAP_CASES.append(MapCase(
        "10.2.0.0/20", 24, f"[..........]  0 of 16 blocks of /24 held, {free} free", "10.2.0.0",
        drawing, excluded="10.2.1.0/24 10.2.8.0/22", routes=routes))


class BaseMapTest(unittest.TestCase):
    """The bar and the map of a base. Each block that anything touches is counted once."""

    def test_bar_and_map_of_a_base(self) -> None:
        for case in MAP_CASES:
            client = Alone(make_state(case.base, v4ab=case.block_prefixlen,
                                      v6ab=case.block_prefixlen, excluded=case.excluded))
            for subnet in case.held.split():
                client.request_pool(subnet)
            client.routes = parse_prefixes(case.routes)
            (base,) = client.state()["bases"]
            numbers, *lines = gipam.render_base(base, case.held.split(), [], 110)
            if case.unit:
                self.assertEqual(lines.pop(), f"  {case.unit}")
            rows = [line.split() for line in lines]
            with self.subTest(case.base, routes=case.routes):
                self.assertEqual(numbers, f"{case.base}  {case.numbers}")
                self.assertEqual(" ".join(label for label, _ in rows), case.labels)
                self.assertEqual("".join(signs for _, signs in rows), case.drawing)

    def test_blocks_of_other_hosts_are_shown_beside_ours(self) -> None:
        client = Alone(make_state("10.2.0.0/24", v4ab=28))
        client.request_pool("10.2.0.0/28")
        status = {**client.state(), "host": "web-1", "claims": [
            {"subnet": "10.2.0.32/28", "address": "", "hosts": ["web-2"]},
            {"subnet": "10.2.0.0/28", "address": "", "hosts": ["web-1"]}]}
        _, row, legend, others = gipam.render_bases(status, 80)
        self.assertEqual(row, "  10.2.0.0    #.o.............")
        self.assertEqual((legend, others), (gipam.LEGEND, "  o held by another host"))


class TextTest(unittest.TestCase):
    """Tables, and lines on a terminal."""

    def test_column_without_a_value_is_left_out(self) -> None:
        rows = [
            ("NAME", "AGE", "RANGE", "HELD"),
            ("web", "", "", "7"),
            ("a long text", "", "", ""),
            ("db", "3h", "", "12"),
        ]
        self.assertEqual(gipam.format_table(rows), [
            "NAME  AGE  HELD", "web   -    7", "a long text", "db    3h   12"])
        self.assertEqual(gipam.format_table(rows[:1]), [])

    def test_line_is_not_cut_within_a_number(self) -> None:
        for width, expected in ((20, "10.2.0.0/24  254  2d"), (17, "10.2.0.0/24  …"),
                                (18, "10.2.0.0/24  254 …")):
            self.assertEqual(gipam.fit_line("10.2.0.0/24  254  2d", width), expected)

    def test_only_maps_are_in_colour(self) -> None:
        for line in (f"  10.2.0.0  ++#.{60 * '.'}", gipam.LEGEND):
            self.assertIn("\033[33m", gipam.colour_map(line))
        for line in ("10.2.0.0/20  [###.......]", "  10.2.0.7  3h  endpoint  c++builder"):
            self.assertEqual(gipam.colour_map(line), line)

    def test_hosts_are_up_down_or_unknown_as_of_a_while_ago(self) -> None:
        hosts = []
        for host, is_present in (("web-1", True), ("web-2", False), ("web-3", None)):
            hosts.append({"host": host, "claims": 3, "is_present": is_present})
        etcd = {"failure": "", "age_s": 7.6}
        table = ["HOST   CLAIMS  STATE", "web-1  3       up", "web-2  3       down",
                 "web-3  3       unknown"]
        status = {"hosts": hosts, "etcd": etcd}
        self.assertEqual(gipam.render_hosts(status, 80),
                         [*table, "hosts and claims as of 7s ago"])
        etcd.update(failure="etcd is away", age_s=None)
        self.assertEqual(gipam.render_hosts(status, 80), [*table, "etcd is away"])
        self.assertEqual(gipam.render_hosts({}, 80), [])

    def test_status_without_pools_says_so(self) -> None:
        status: dict[str, Any] = {"bases": [], "pools": []}
        lines = gipam.render_status(status, 80, 0)
        self.assertEqual(lines, ["no pools yet"])


class StatusCase(OperatedCase):
    """A daemon that holds a bit of everything."""

    NOW_S = 1_800_000_000
    BASES_TEXT = """\
10.2.0.0/20  [####......]  5 of 16 blocks of /24 held, 9 free
  10.2.0.0   #x.~+r.#..##....
2001:db8:0:100::/60  [#.........]  1 of 16 blocks of /64 held, 15 free
  2001:db8:0:100::  #...............
  # held  + partly  . free  x excluded  ~ route, own address  r kept for a name
"""
    TABLE = """\
SUBNET               HELD  OF    AGE  RANGE          NETWORK
10.2.0.0/24          4     254   3h   -              web
  10.2.0.1                       3h   gateway        -
  10.2.0.2                       3h   endpoint       one
  10.2.0.30                      3h   auxiliary      -
  10.2.0.200                     3h   auxiliary      -
10.2.4.0/25          1     126   3h   -              partly
  10.2.4.1                       3h   gateway        -
10.2.7.0/24          0     254   2d   -              -
10.2.10.0/23         0     510   40s  -              -
10.50.0.0/24         1     64    3h   10.50.0.64/26  range
  10.50.0.64                     3h   gateway        -
2001:db8:0:100::/64  2     2^64  3h   -              web
  2001:db8:0:100::1              3h   gateway        -
  2001:db8:0:100::2              3h   endpoint       one
"""
    POOLS_TEXT = re.sub("(?m)^  .*\n", "", TABLE)
    TEXT = f"{BASES_TEXT}\n{POOLS_TEXT}"

    def setUp(self) -> None:
        super().setUp()
        self.kernel.routes = "10.2.3.0/25"
        self.exclude("10.2.1.0/24")
        with self.at(-3 * 3600):
            self.docker.make_network("web", "4", "6")
            self.docker.start("one", "web")
            self.request("10.2.0.200")
            self.request("10.2.0.30")
            self.docker.make_network("partly", "10.2.4.0/25")
            self.docker.make_network("kept", "10.2.5.0/24", options={"gipam.name": "kept"})
            self.docker.remove_network("kept")
            self.docker.make_network("range", "10.50.0.0/24", sub_pool="10.50.0.64/26",
                                     options={"gipam.name": "gateway"})
        with self.at(-40):
            self.request_pool("10.2.10.0/23")
        with self.at(-2 * 86400):
            self.request_pool("10.2.7.0/24")

    def at(self, offset_s: int) -> Any:
        return mock.patch.object(time, "time", return_value=self.NOW_S + offset_s)

    def status(self, *arguments: str, **how: Any) -> str:
        with self.at(0):
            done = self.run_gipam("status", *arguments, **how)
        self.assertEqual((done.status, done.err), (0, ""))
        return done.out

    def status_json(self, *arguments: str, **how: Any) -> Any:
        return json.loads(self.status("--json", *arguments, **how))


class StatusTest(StatusCase):
    """`gipam status`, for people and for programs."""

    def test_text(self) -> None:
        self.assertEqual(self.status(), self.TEXT)
        with_leases = f"{self.BASES_TEXT}\n{self.TABLE}"
        self.assertEqual(self.status("--leases"), with_leases)

    def test_terminal_gets_its_width_and_colour_if_wanted(self) -> None:
        coloured = self.status(out=Terminal(), COLUMNS="80")
        self.assertIn("\033[", coloured)
        for text in (re.sub("\033\\[[0-9]*m", "", coloured),
                     self.status(out=Terminal(), NO_COLOR="1", COLUMNS="80")):
            self.assertEqual(text, self.TEXT)

    def test_lines_are_as_wide_as_the_terminal_at_most(self) -> None:
        self.docker.make_network("b" * 200)
        whole = self.status("--leases", out=Terminal(), COLUMNS="300")
        words = set(whole.split())
        for columns in (40, 60, 80, 132):
            text = self.status("--leases", out=Terminal(), NO_COLOR="1", COLUMNS=str(columns))
            self.assertEqual(max(map(len, text.splitlines())), columns)
            numbers = set(re.findall(" ([0-9]+)(?=[ …\n])", text))
            self.assertLessEqual(numbers, words)
        text = self.status("--leases")
        self.assertEqual(max(map(len, text.splitlines())), 80)

    def test_summary_is_last_on_a_terminal_that_is_too_small(self) -> None:
        height = len(self.TEXT.splitlines()) + 1
        for lines, expected in ((height, self.TEXT),
                                (height - 1, f"{self.POOLS_TEXT}\n{self.BASES_TEXT}")):
            text = self.status(out=Terminal(), NO_COLOR="1", COLUMNS="80", LINES=str(lines))
            self.assertEqual(text, expected)

    def test_without_docker_names_are_what_gipam_knows(self) -> None:
        self.docker.make_network("named", options={"gipam.name": "my net, größer"})
        self.docker.version = 29  # which sends the name of the container
        self.docker.start("two", "web")
        for host in ("unix:///nothing", "tcp://192.0.2.1:1"):
            text = self.status("--leases", DOCKER_HOST=host)
            self.assertRegex(text, r"\n10\.2\.\S+ .*  my net, größer\n")
            self.assertRegex(text, r"\n  10\.2\.0\.2 .* 02:42:00:00:00:02\n")
            self.assertRegex(text, r"\n  10\.2\.0\.3 .* two\n")

    def test_json(self) -> None:
        """The keys of the JSON form are a documented interface, and stay."""
        status = self.status_json("--leases")
        self.assertEqual(status["version"], gipam.__version__)
        self.assertEqual(status["driver"], "gipam")
        self.assertEqual(status["listening"], self.socket)
        self.assertEqual(status["claims"], [])
        self.assertNotIn("addresses", self.status_json()["pools"][0])
        self.assertEqual(status["config"]["socket"],
                         {"value": self.socket, "origin": "command line"})
        self.assertEqual(status["bases"][1], {
            "prefix": "10.2.0.0/20",
            "family": 4,
            "block_prefixlen": 24,
            "blocks": 16,
            "blocks_used": 5,
            "blocks_excluded": 1,
            "blocks_routed": 1,
            "excluded": ["10.2.1.0/24"],
            "remembered": {"kept": "10.2.5.0/24"},
            "routes": ["10.2.3.0/25"],
        })

        pool, *_, ranged, _ = status["pools"]
        since = {"seq": mock.ANY, "granted_s": self.NOW_S - 3 * 3600}
        self.assertRegex(ranged["id"], r"^10\.50\.0\.0/24,10\.50\.0\.64/26#[0-9a-f]{16}$")
        self.assertEqual(ranged, {
            **since, "id": mock.ANY, "subnet": "10.50.0.0/24", "sub_pool": "10.50.0.64/26",
            "name": "gateway", "network": "range", "leases": 1, "usable": 64, "is_shared": False,
            "claimed_elsewhere": "", "remembered": {}, "addresses": [mock.ANY]})
        self.assertEqual(pool["addresses"][1], {
            **since, "address": "10.2.0.2", "kind": "endpoint", "mac": "02:42:00:00:00:02",
            "name": "", "container": "one", "is_explicit": False})


class SearchTest(StatusCase):
    """`gipam status WHAT`: only the item named."""

    UNKNOWN = " is not an address, subnet, network or container that is held here"
    WEB = "10.2.0.0/24 10.2.0.1 10.2.0.2 10.2.0.30 10.2.0.200"
    WEB6 = "2001:db8:0:100::/64 2001:db8:0:100::1 2001:db8:0:100::2"
    ONE = "10.2.0.0/24 10.2.0.2 2001:db8:0:100::/64 2001:db8:0:100::2"
    HELD_ROWS = (  # argument, first words of the rows shown
        ("web", f"{WEB} {WEB6}"),
        ("10.2.0.0/24", WEB),
        ("2001:DB8:0:0100:0::/64", WEB6),
        ("10.2.0.2", "10.2.0.0/24 10.2.0.2"),
        ("10.2.4.0/25", "10.2.4.0/25 10.2.4.1"),
        ("2001:db8:0:100:0::2", "2001:db8:0:100::/64 2001:db8:0:100::2"),
        ("one", ONE),
        ("02:42:00:00:00:02", ONE),
        ("gateway", "10.50.0.0/24 10.50.0.64"))  # a gipam.name; no kind of address
    FREE_ROWS = (  # argument, rows of addresses without a lease
        ("10.2.0.3", ["10.2.0.3 - resting 02:42:00:00:00:06"]),
        ("02:42:00:00:00:06", ["10.2.0.3 - resting 02:42:00:00:00:06",
                               "2001:db8:0:100::3 - resting 02:42:00:00:00:06"]),
        ("10.2.0.9", ["10.2.0.9 - free -"]), ("10.2.0.0", ["10.2.0.0 - reserved -"]),
        ("2001:db8:0:100::1:0", ["2001:db8:0:100::1:0 - free -"]))

    def test_pool_address_or_owner(self) -> None:
        for text, expected in self.HELD_ROWS:
            with self.subTest(text):
                _, *rows = self.status(text).splitlines()
                first_words = [row.split()[0] for row in rows]
                self.assertEqual(" ".join(first_words), expected)

    def test_address_that_nobody_has(self) -> None:
        self.docker.start("two", "web")
        self.docker.stop("two")
        for text, expected in self.FREE_ROWS:
            with self.subTest(text):
                rows = []
                for line in self.status(text).splitlines():
                    if line.startswith("  "):
                        rows.append(" ".join(line.split()))
                self.assertEqual(rows, expected)

    def test_unknown_item(self) -> None:
        for text in ("10.77.0.1", "10.2.0.0/16"):
            done = self.run_gipam("status", text)
            self.assertEqual(done, (1, "", f"gipam: {text!r}{self.UNKNOWN}\n"))

    def test_unknown_item_may_be_a_name_that_docker_did_not_tell(self) -> None:
        hung = os.path.join(self.directory, "hung.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(hung)
            listener.listen()
            self.patch(gipam, NAMES_TIMEOUT_S=0.01)
            done = self.run_gipam("status", "web", DOCKER_HOST="unix://" + hung)
            self.assert_fails(done, 1, f"gipam: 'web'{self.UNKNOWN}, and Docker's names are not "
                                       f"known: Docker does not answer on {hung}: timed out; .*")

    def test_address_is_free_only_if_it_is_in_no_range_of_its_subnet(self) -> None:
        """A free address is shown in each range of its subnet; this subnet has two ranges."""
        self.docker.remove_network("range")
        self.make_ranges()
        for address, ranges in (("10.50.0.1", ["low"]), ("10.50.0.9", ["low", "high"])):
            shown = self.status_json(address)["pools"]
            self.assertEqual([pool["network"] for pool in shown], ranges)

    def test_address_that_another_has_does_not_rest_any_more(self) -> None:
        self.docker.make_network("tiny", "10.60.0.0/30")
        self.docker.start("solo", "tiny")
        mac = self.docker.endpoint("solo", "tiny")["MacAddress"]
        self.docker.stop("solo")
        last_words = self.status(mac).split()[-2:]
        self.assertEqual(last_words, ["resting", mac])
        self.docker.start("other", "tiny")  # in the only address
        self.assertEqual(self.run_gipam("status", mac).status, 1)

    def test_claim_of_another_host_is_named(self) -> None:
        """The claim is on a subnet, or on an address of a subnet that several hosts share."""
        status: dict[str, Any] = {"host": "web-1", "claims": [
            {"subnet": "10.2.8.0/24", "address": "", "hosts": ["web-2"]},
            {"subnet": "10.50.0.0/24", "address": "10.50.0.9", "hosts": ["web-3"]}]}
        status["pools"] = [{"subnet": "10.50.0.0/24", "remembered": {}, "addresses": []}]
        claimed = "; 10.2.8.0/24 is claimed by web-2"
        for text, reason in (("10.2.8.7", claimed), ("10.2.8.0/24", claimed), ("10.2.9.7", ""),
                             ("web", ", and Docker's names are not known: down")):
            pattern = f"^{text!r}{self.UNKNOWN}{re.escape(reason)}$"
            with self.assertRaisesRegex(gipam.InvalidRequest, pattern):
                gipam.search_pools(status, text, "down")
        for text, kind, name in (("10.50.0.9", "claimed", "web-3"), ("10.50.0.8", "free", "")):
            (pool,) = gipam.search_pools(status, text, "")
            (lease,) = pool["addresses"]
            self.assertEqual(lease["kind"], kind)
            self.assertEqual(lease["name"], name)


# What the table "When something is wrong" quotes of Docker itself.
WORDS_OF_DOCKER = {
    'plugin "gipam" not found',
    "… IpamDriver.…: dial unix …: no such file or directory",
    "connection refused",
}


def read_readme_table(title: str) -> dict[str, str]:
    """Return the first two cells of each row of the only table in a chapter of README.md."""
    text = pathlib.Path(HERE, "README.md").read_text(encoding="utf-8")
    chapter = text.partition(f"# {title}\n")[2].partition("\n#")[0]
    rows = re.findall(r"(?m)^\| (.*?) \| (.*?) \|", chapter)
    return dict(rows[1:])


def error_text(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """Return the text of the error with which gipam refuses a call."""
    try:
        function(*arguments, **named)
    except ErrorReply as error:
        return str(error)
    raise AssertionError(f"{function} is not refused")


class ReadmeTest(ClusterCase):
    """README.md names the keys, the metrics and the messages that gipam has."""

    HOSTS = ("one",)

    def setUp(self) -> None:
        super().setUp()
        self.patch(gipam, RECHECK_DELAY_S=0)
        self.host = self.hosts["one"]
        pool_id, _ = self.host.request_pool()
        self.host.request_address(pool_id)
        self.host.settle()

    def command_json(self, *words: str) -> Any:
        """Return what a command prints, beside a Docker that has no network."""
        docker = FakeDocker(self, os.path.join(make_directory(self), "sock"), self.host.call)
        done = self.run_main(*words, "--json", "-socket", self.host.path,
                             DOCKER_HOST="unix://" + docker.path)
        self.assertEqual(done.err, "")
        return json.loads(done.out)

    def test_json_has_the_keys_of_readme_and_no_other(self) -> None:
        named = {}
        for label, text in read_readme_table("JSON").items():
            without_asides = re.sub(r"\([^)]*\)", "", text)
            named[label] = set(re.findall("`([a-z_]+)`", without_asides))
        status = self.command_json("status", "--leases")
        report = self.command_json("check", "--grace", "0")
        pool = status["pools"][0]
        self.assertEqual(named, {
            "all": set(status),
            "a base": set(status["bases"][0]),
            "a pool": set(pool),
            "a lease": set(pool["addresses"][0]),
            "a claim": set(status["claims"][0]),
            "a host": set(status["hosts"][0]),
            "`etcd`": set(status["etcd"]),
            "`check --json`": {*report, *report["findings"][0]},
        })

    def test_metrics_of_readme_exist(self) -> None:
        text = pathlib.Path(HERE, "README.md").read_text(encoding="utf-8")
        page = "".join(gipam.metrics_page(self.host.service, ""))
        named = set(re.findall(r"\bgipam_[a-z_]+", text))
        self.assertIn("gipam_etcd_up", named)
        self.assertEqual(named - set(re.findall("(?m)^[a-z_]+", page)), set())

        (pattern,) = re.findall('result=~"(.*?)"', text)
        failures = re.compile(pattern.replace("\\|", "|"))
        matching = [result for result in gipam.RESULTS if failures.fullmatch(result)]
        self.assertEqual(matching, ["Unavailable", "StoreError", "StoreLost"])

    def test_messages_that_readme_explains_are_those_of_gipam(self) -> None:
        client = Alone(make_state("10.2.0.0/16"))
        pool_id, subnet = client.request_pool()
        client.request_address(pool_id, "10.2.0.7", name="web1")
        messages = [
            error_text(client.call, "IpamDriver.RequestPool"),
            error_text(client.request_pool, subnet),
            error_text(client.request_address, pool_id, "10.2.0.7"),
        ]
        client.exhaust(pool_id)
        messages.append(error_text(client.request_address, pool_id))
        for _ in range(255):
            client.request_pool()
        messages.append(error_text(client.request_pool))

        quoted = set()
        for cell in read_readme_table("When something is wrong"):
            if cell.startswith("Docker: "):
                quoted.update(re.findall("`([^`]+)`", cell))
        self.assertLessEqual(WORDS_OF_DOCKER, quoted)
        explained = []
        for text in quoted - WORDS_OF_DOCKER:
            pattern = ".*".join(map(re.escape, text.split("…")))
            explained += [message for message in messages if re.match(pattern, message)]
        self.assertEqual(sorted(explained), sorted(messages))
        self.assertEqual(len(quoted - WORDS_OF_DOCKER), len(messages))


class ReleaseTest(OperatedCase):
    """`gipam release POOL [ADDRESS]`."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.make_network("web")
        self.docker.start("one", "web")

    def release_by_hand(self, words: str, **how: Any) -> Finished:
        return self.run_gipam("release", *words.split(" "), **how)

    def test_nothing_is_released_without_a_yes(self) -> None:
        self.docker.stop("one", is_released=False)
        question = "release address 10.2.0.2 of 10.2.0.0/24? [y/N] "
        for answer in ("\n", "n\n", ""):
            with self.subTest(answer=answer):
                done = self.release_by_hand("10.2.0.0/24 10.2.0.2", stdin=Terminal(answer))
                self.assertEqual((done.status, done.err), (1, ""))
                self.assertEqual(done.out.rstrip("\n"), question)
                self.assertEqual(len(self.held()["10.2.0.0/24"]), 2)
        with mock.patch("builtins.input", side_effect=KeyboardInterrupt):
            done = self.release_by_hand("10.2.0.0/24 10.2.0.2", stdin=Terminal())
            self.assertEqual(done, (130, "", "\n"))
        done = self.release_by_hand("10.2.0.0/24 10.2.0.2", stdin=Terminal("yes\n"))
        self.assertEqual(done, (0, question + "released address 10.2.0.2 of 10.2.0.0/24\n", ""))

    def test_confirmation_needs_a_terminal_or_yes(self) -> None:
        del self.docker.networks["web"]
        self.assertEqual(
            self.release_by_hand("10.2.0.0/24", stdin=io.StringIO("yes\n")),
            (1, "", "gipam: not a terminal: use --yes to skip the confirmation\n"))
        self.assertEqual(self.release_by_hand("10.2.0.0/24 --yes"),
                         (0, "released pool 10.2.0.0/24 with 2 leases\n", ""))
        self.assertEqual(self.held(), {})

    def test_what_docker_uses_is_not_released(self) -> None:
        self.docker.make_network("lan", "10.9.0.0/24")
        self.docker.make_network("hint")
        self.docker.show_hint("hint", "0.0.0.0/24")
        before = self.status_now()
        for words, user in (
                ("10.2.0.0/24", "Docker network web"),
                ("10.2.0.0/24 10.2.0.1", "Docker network web"),
                ("10.2.0.0/24 10.2.0.2", "Docker container one"),
                ("10.9.0.0/24 10.9.0.1", "a Docker network"),  # though it does not show it
                ("10.2.1.0/24", "a Docker network")):
            with self.subTest(words):
                text = f"gipam: {user} is using it: remove it first, or use --force\n"
                done = self.release_by_hand(words + " --yes")
                self.assertEqual(done, (1, "", text))
        done = self.release_by_hand("10.2.0.0/24 --yes", DOCKER_HOST="unix:///nothing")
        self.assertEqual(done.status, 2)
        self.assertEqual(self.status_now(), before)

    def test_name_that_no_pool_or_several_have(self) -> None:
        self.make_ranges()
        low = self.docker.pool_ids["low", 4]
        high = self.docker.pool_ids["high", 4]
        none = "no pool matches {!r}: `gipam status` lists them"
        held = "{!r} is not held in 10.2.0.0/24, which holds 10.2.0.1, 10.2.0.2"
        no_address = "{!r} is not an IP address"
        rows = [("10.99.0.0/24", none.format("10.99.0.0/24")),
                ("", none.format("")),  # not the pools without a gipam.name
                ("10.50.0.0/24", f"2 pools match '10.50.0.0/24': give the id of one\n  {low}"
                                 f"\n  {high}")]
        for text, error in (("10.2.0.9", held), ("10.9.0.9", held), ("one", no_address),
                            ("10.2.0.2x", no_address)):
            rows.append((f"10.2.0.0/24 {text}", error.format(text)))
        for words, text in rows:
            with self.subTest(words):
                self.assertEqual(self.release_by_hand(words + " --yes"),
                                 (1, "", f"gipam: {text}\n"))
        pools = []
        for number in range(1, 3001):
            pools.append({"id": str(number), "name": "web"})
        with self.assertRaisesRegex(gipam.InvalidRequest, "(?s)^3000 .*\n  9\n  and 2991 more$"):
            gipam.require_pool(pools, "web")

    def test_force_releases_any_spelling_of_what_docker_uses(self) -> None:
        self.make_ranges()
        self.docker.make_network("six", "fd00:9::/64")
        high = self.docker.pool_ids["high", 4]
        for words, label in (
                ("FD00:0009:0:0::/64 FD00:9::0:1", "address fd00:9::1 of fd00:9::/64"),
                ("10.50.0.0/25", "pool 10.50.0.0/24 with 1 lease"),
                (high, "pool 10.50.0.0/24 with 1 lease"),
                ("10.2.0.0/24", "pool 10.2.0.0/24 with 2 leases")):
            with self.subTest(words):
                self.assertEqual(self.release_by_hand(words + " --yes --force"),
                                 (0, f"released {label}\n", ""))
        self.assertEqual(self.held(), {"fd00:9::/64": []})


# === Running ======================================================================================
#
# The tests run in several worker processes, one class at a time. Each worker has a network, a /run
# and an /etc/docker of its own if the host permits it, so that no test meets the host's gipam,
# Docker or routes. It also has a session of its own, so that all it has started ends with it.
# `python3 -m unittest test_gipam.StyleTest` runs tests where a debugger can be attached.

ISOLATE = """
mount -t tmpfs -o mode=755 tmpfs /run
[ ! -d /etc/docker ] || mount -t tmpfs -o mode=755 tmpfs /etc/docker
exec "$@"
"""
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
MIN_MEMORY_BYTES = 256 << 20
MAX_REPORT_CHARS = 30_000
MAX_REPORT_BYTES = 256 << 10
MAX_WORKERS = 4
TEST_DEADLINE_S = 1800 if IS_LONG else 600  # KillTest's long form takes ten minutes
PASSED = "."
FAILED = "F"
SKIPPED = "s"
OUTCOMES = {PASSED: "ok", FAILED: "FAILED", SKIPPED: "skipped"}


class Report(NamedTuple):
    """The result of a test: a key of OUTCOMES, and the traceback or the reason of a skip."""

    test: str
    outcome: str
    text: str
    seconds: float = 0.0


class Reporter(unittest.TestResult):
    """Sends the parent process a report of each test, and ends one that takes too long."""

    def __init__(self, parent: socket.socket) -> None:
        super().__init__()
        self.parent = parent
        self.started_s = time.monotonic()
        signal.signal(signal.SIGALRM, self.end_test)
        signal.alarm(TEST_DEADLINE_S)

    def end_test(self, *_: Any) -> None:
        """Fail the running test, even if it waits or repeats, so that the next one runs."""
        raise AssertionError(f"the test has not ended within {TEST_DEADLINE_S} s")

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.report(test.id().replace("__main__.", ""))
        self.errors = []
        self.failures = []
        self.skipped = []
        self.started_s = time.monotonic()
        signal.alarm(TEST_DEADLINE_S)

    def report(self, test: str) -> None:
        failed = [f"{part}\n{text}" for part, text in self.errors + self.failures]
        outcome = PASSED
        texts = failed
        if failed:
            outcome = FAILED
        elif self.skipped:
            outcome = SKIPPED
            texts = [reason for _, reason in self.skipped]

        text = "\n".join(texts)[-MAX_REPORT_CHARS:]
        report = Report(test, outcome, text, time.monotonic() - self.started_s)
        self.parent.sendall(json.dumps(report).encode())


def set_loopback_up() -> None:
    request = struct.pack("16sh", b"lo", IFF_UP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def run_worker(classes: list[list[str]], queue_fd: int, parent_fd: int) -> None:
    """Run classes; their numbers come out of a pipe that all workers read."""
    if os.environ["GIPAM_ISOLATED"] == "yes":
        set_loopback_up()
    connection = socket.socket(fileno=parent_fd)
    number = os.read(queue_fd, 1)
    while number:
        run_class(classes[number[0]], connection)
        number = os.read(queue_fd, 1)

    # The connection ends with the process, which first writes the data of coverage.
    connection.detach()


def run_class(names: list[str], connection: socket.socket) -> None:
    """Run the tests of a class, and report all of them if its setUpClass() fails or skips."""
    reporter = Reporter(connection)
    suite = unittest.defaultTestLoader.loadTestsFromNames(names, sys.modules[__name__])
    suite.run(reporter)
    if reporter.errors or reporter.skipped:
        for name in names:
            reporter.report(name)


def find_isolation() -> tuple[list[str], str]:
    """Return the command that isolates a worker, and "yes", or why there is none."""
    command = ["unshare", "--net", "--mount", "--propagation", "private"]
    hint = "in a privileged container"
    if os.geteuid():
        command += ["--user", "--map-root-user"]
        hint = "as root"
    command += ["sh", "-ec", ISOLATE, "sh"]

    try:
        subprocess.run([*command, "test", "-r", os.path.abspath(__file__)], stderr=subprocess.PIPE,
                       encoding="utf-8", check=True)
    except FileNotFoundError:
        return [], "unshare is missing: apt-get install util-linux"
    except subprocess.CalledProcessError as error:
        return [], f"gets no network of its own ({error.stderr.strip()}): try it {hint}"
    return command, "yes"


def list_tests(patterns: list[str] | None) -> dict[str, list[str]]:
    """Return the names of the tests of each class that match a pattern."""
    loader = unittest.TestLoader()
    if patterns:
        loader.testNamePatterns = [pattern if "*" in pattern else f"*{pattern}*"
                                   for pattern in patterns]
    classes = {}
    for name, value in vars(sys.modules[__name__]).items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            classes[name] = [f"{name}.{test}" for test in loader.getTestCaseNames(value)]
    return classes


def choose_tests(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the names of the chosen tests, a list for each class. Raises: SystemExit."""
    classes = list_tests(arguments.k)
    wanted = set(arguments.tests)
    if wanted:
        unknown = wanted.difference(classes, *classes.values())
        if unknown:
            sys.exit("no test has such a name: " + " ".join(sorted(unknown)))
        for name, tests in classes.items():
            if name not in wanted:
                classes[name] = [test for test in tests if test in wanted]

    chosen = [tests for tests in classes.values() if tests]
    if not chosen:
        sys.exit("no test has such a name: " + " ".join(arguments.k or []))
    return chosen


def make_scratch_directory() -> str:
    """Return a directory for all files of the tests, in memory if that has room."""
    memory = "/dev/shm"
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MIN_MEMORY_BYTES:
        return tempfile.mkdtemp(prefix="gipam-", dir=memory)  # fsync costs nothing there
    return tempfile.mkdtemp(prefix="gipam-")


class Workers:
    """The worker processes of a run. Closing them removes all files and processes of the tests."""

    def __init__(self, classes: list[list[str]]) -> None:
        self.count = min(MAX_WORKERS, len(classes))
        self.command, self.isolated = find_isolation()
        self.scratch = make_scratch_directory()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connection, self.worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.queue_fd, numbers_fd = os.pipe()
        os.write(numbers_fd, bytes(range(len(classes))))
        os.close(numbers_fd)

    def start(self) -> None:
        fds = (self.queue_fd, self.worker_end.fileno())
        command = [*self.command, sys.executable, os.path.abspath(__file__), *sys.argv[1:]]
        command += ["--work", *map(str, fds)]
        environment = dict(os.environ, TMPDIR=self.scratch, GIPAM_ISOLATED=self.isolated,
                           PYTHONDONTWRITEBYTECODE="1")
        for _ in range(self.count):
            # The output of a test goes to stderr, since stdout is for the reports.
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=2, pass_fds=fds, start_new_session=True)
            self.processes.append(process)
        self.worker_end.close()

    def reports(self) -> Iterator[Report]:
        """Yield the reports until all workers have ended."""
        message = self.connection.recv(MAX_REPORT_BYTES)
        while message:
            yield Report(*json.loads(message))
            message = self.connection.recv(MAX_REPORT_BYTES)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def run_all(classes: list[list[str]], is_verbose: bool) -> Iterator[Report]:
    """Run the tests, print their outcomes and yield their reports."""
    remaining = set().union(*classes)
    with contextlib.closing(Workers(classes)) as workers:
        print(f"{len(remaining)} tests of gipam {gipam.__version__} with Python "
              f"{platform.python_version()} in {workers.count} processes, all files in "
              f"{workers.scratch}; all tests take about a minute on two processors", flush=True)
        if workers.isolated != "yes":
            print(f"without a network and a /run of their own: {workers.isolated}", flush=True)
        workers.start()
        for report in workers.reports():
            line = report.outcome
            if is_verbose:
                line = f"{report.test} ... {OUTCOMES[report.outcome]} ({report.seconds:.2f} s)\n"
            print(line, end="", flush=True)
            remaining.discard(report.test)
            yield report
        for name in sorted(remaining):
            yield Report(name, FAILED, "its process ended before it")


def conclude(passed: int, failed: int, skipped: int) -> int:
    """Print the line that CI reads, and return the exit status."""
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or not passed else 0


def print_results(reports: list[Report]) -> None:
    """Print the text of each failure, and each reason of skips with the tests it concerns."""
    skipped: dict[str, list[str]] = {}
    for report in reports:
        if report.outcome == FAILED:
            print(f"\n\nFAILED: {report.test}\n{report.text}", end="")
        elif report.outcome == SKIPPED:
            skipped.setdefault(report.text, []).append(report.test)

    print("\n")
    for reason, tests in sorted(skipped.items()):
        print(f"skipped: {', '.join(tests)}: {reason}")


def stop(number: int, _: Any) -> None:
    """Exit with all clean-ups at a signal."""
    signal.signal(number, signal.SIG_IGN)
    print(f"\nended by {signal.Signals(number).name}", flush=True)
    sys.exit(128 + number)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The self-check of gipam.")
    parser.add_argument("tests", nargs="*", metavar="CLASS[.TEST]", help="tests to run, if not all")
    parser.add_argument("-k", action="append", metavar="PATTERN",
                        help="run only tests whose name contains this")
    parser.add_argument("-v", action="store_true", help="name each test, and how long it took")
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the tests that the arguments choose; print why some failed or were skipped."""
    arguments = parse_arguments()
    classes = choose_tests(arguments)
    if arguments.work:
        queue_fd, parent_fd = arguments.work
        run_worker(classes, queue_fd, parent_fd)
        return 0

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    started_s = time.monotonic()
    reports = list(run_all(classes, arguments.v))
    print_results(reports)
    print(f"{time.monotonic() - started_s:.0f} s")
    outcomes = [report.outcome for report in reports]
    return conclude(*map(outcomes.count, OUTCOMES))


if __name__ == "__main__":
    sys.exit(main())
