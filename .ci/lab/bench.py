"""Figures of speed, each beside its target: `python3 .ci/lab/bench.py [--quick]`.

It asserts nothing. The client is this process, gipam another. Figures that are compared are
measured in alternation in the same run, because only ratios last on a busy machine. A figure is the
median of the medians of the rounds; in brackets stand the lowest and the highest round. The files
are in TMPDIR.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import ipaddress
import itertools
import json
import os
import platform
import random
import select
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Iterator, Sequence

from engine import Docker
from etcd import CLIENT_PORT, Etcd, loopback
from machines import Namespaces

import gipam
from test_gipam import (
    Daemon,
    ErrorReply,
    FakeDocker,
    connect,
    launcher,
    make_directory,
    request,
    wait_until,
)

ONE_SYNC_A_REQUEST = """
class Store(gipam.Store):
    def reserve(self, size):
        super().reserve(size + gipam.RECORD_OVERHEAD_BYTES)
    def append(self, records):
        for record in records:
            super().append([record])
gipam.Store = Store
"""
CHECKPOINTS_WITHOUT_END = """
gipam.TIMER_INTERVAL_S = 0.01
def needs_checkpoint(self):
    return self.store.segment > 0
gipam.Service.needs_checkpoint = needs_checkpoint
"""
# Writes the longest processor time of an iteration of the loop to a file.
LONGEST_ITERATION = """
import time
longest_s = 0.0
run_once = gipam.EventLoop.run_once
def measure(self, timeout_s):
    global longest_s
    started_s = time.thread_time()
    run_once(self, timeout_s)
    spent_s = time.thread_time() - started_s
    if spent_s > longest_s:
        longest_s = spent_s
        with open({path!r}, "w") as file:
            file.write(str(spent_s))
gipam.EventLoop.run_once = measure
"""
# Reads a page and prints its length, in a process of its own, so that it costs the client no time.
READER = """
import socket, sys
length = 0
with socket.socket(socket.AF_UNIX) as wire:
    wire.connect(sys.argv[1])
    wire.sendall(b"GET /status?leases=1 HTTP/1.1\\r\\n"
                 b"Host: localhost\\r\\nConnection: close\\r\\n\\r\\n")
    while True:
        data = wire.recv(1 << 20)
        if not data:
            break
        length += len(data)
print(length)
"""
ECHO = request("Plugin.Activate", {"PoolID": "10.2.0.0/16#0123456789abcdef", "Address": ""})


class Traffic:
    """Requests made beforehand, and for each reply the release of its grant."""

    def __init__(self, kind: str, key: str, requests: list[dict[str, Any]], **release: str) -> None:
        method = "IpamDriver.Request" + kind
        bodies = [request(method, fields) for fields in requests]
        self.requests: Iterator[bytes] = itertools.cycle(bodies)
        self.key = f'"{key}":"'.encode()
        self.end = b"/" if key == "Address" else b'"'
        self.releases: dict[bytes, bytes] = {}
        self.kind = kind
        self.name = key
        self.fields = release

    def answer(self, reply: bytes = b"") -> bytes:
        """Return the next request to send."""
        _, key, granted = reply.partition(self.key)
        if not key:
            return next(self.requests)
        granted, _, _ = granted.partition(self.end)
        return self.release(granted)

    def release(self, granted: bytes) -> bytes:
        """Return the request that releases this grant."""
        data = self.releases.get(granted)
        if not data:
            fields = {**self.fields, self.name: granted.decode()}
            data = self.releases[granted] = request("IpamDriver.Release" + self.kind, fields)
        return data


def addresses(pool_id: str, macs: int = 1000) -> Traffic:
    """Return the traffic of containers that come and go in a network."""
    requests = []
    for number in range(macs):
        mac = f"02:42:00:00:{number >> 8:02x}:{number & 255:02x}"
        options = {gipam.ENDPOINT_MAC: mac}
        requests.append({"PoolID": pool_id, "Address": "", "Options": options})
    return Traffic("Address", "Address", requests, PoolID=pool_id)


def networks(pool: str = "", v6: bool = False) -> Traffic:
    """Return the traffic of networks that come and go."""
    arguments = {
        "AddressSpace": "gipam",
        "Pool": pool,
        "SubPool": "",
        "Options": {},
        "V6": v6,
    }
    return Traffic("Pool", "PoolID", [arguments])


def decode_reply(reply: bytes) -> Any:
    """Return the body of a reply."""
    _, _, body = reply.partition(b"\r\n\r\n")
    return json.loads(body)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the quotient of each pair."""
    quotients = []
    for our_figure, their_figure in zip(ours, theirs):
        quotients.append(our_figure / their_figure)
    return quotients


class Wire:
    """A connection that costs the client as little time as possible."""

    def __init__(self, path: str) -> None:
        self.socket = connect(path)

    def receive(self) -> bytes:
        reply = self.socket.recv(65536)  # gipam writes a reply at once
        if not reply.startswith(b"HTTP/1.1 200 "):
            raise ErrorReply(0, reply.decode())
        return reply

    def call(self, data: bytes) -> tuple[float, bytes]:
        """Return (seconds, reply)."""
        started = time.perf_counter()
        self.socket.sendall(data)
        reply = self.receive()
        return time.perf_counter() - started, reply

    def both(self, traffic: Traffic) -> tuple[float, float]:
        """Request and release; return the time of each."""
        request_s, reply = self.call(traffic.answer())
        release_s, _ = self.call(traffic.answer(reply))
        return request_s, release_s

    def pair(self, traffic: Traffic) -> float:
        return sum(self.both(traffic)) / 2

    def request(self, traffic: Traffic) -> float:
        return self.both(traffic)[0]

    def request_pool(self, pool: str = "") -> str:
        _, reply = self.call(next(networks(pool).requests))
        return str(decode_reply(reply)["PoolID"])


def storm(path: str, traffic: Traffic, connections: int, for_s: float) -> float:
    """Return how many calls a second this many connections make."""
    poll = select.epoll()
    calls = 0
    wires: dict[int, Wire] = {}
    for _ in range(connections):
        wire = Wire(path)
        wires[wire.socket.fileno()] = wire
    started = time.perf_counter()
    for number, wire in wires.items():
        poll.register(number, select.EPOLLIN)
        wire.socket.sendall(traffic.answer())
    while wires:
        for number, _ in poll.poll():
            reply = wires[number].receive()
            calls += 1
            # A client ends when it holds no grant.
            if time.perf_counter() < started + for_s or traffic.key in reply:
                wires[number].socket.sendall(traffic.answer(reply))
            else:
                poll.unregister(number)
                wires.pop(number).socket.close()
    return calls / (time.perf_counter() - started)


class Disk:
    """The least that a durable request needs: a line at the end of a file, synced."""

    def __init__(self, directory: str) -> None:
        self.fd = os.open(os.path.join(directory, "floor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def sync(self) -> float:
        started = time.perf_counter()
        os.write(self.fd, b"x" * 119 + b"\n")
        os.fdatasync(self.fd)
        return time.perf_counter() - started


class Gateway:
    """An etcd transaction, and nothing else."""

    def __init__(self, etcd: Etcd) -> None:
        self.connection = http.client.HTTPConnection(etcd.members[0].address, CLIENT_PORT)

    def put(self, *keys: str, is_there: bool = True) -> float:
        """Write or delete claims of another host; return the time that this took."""
        claim = gipam.to_base64('{"hosts":["other"],"since":1795510069}')
        operations: list[Any] = []
        for key in map(gipam.to_base64, keys):
            if is_there:
                operations.append({"request_put": {"key": key, "value": claim}})
            else:
                operations.append({"request_delete_range": {"key": key}})
        body = json.dumps({"success": operations})
        started = time.perf_counter()
        self.connection.request("POST", "/v3/kv/txn", body)
        self.connection.getresponse().read()
        return time.perf_counter() - started

    def claim(self, count: int, first: int = 0, is_there: bool = True) -> None:
        """Claim this many subnets of 10.0.0.0/8 from the first on, or delete their claims."""
        keys = []
        for number in range(first, first + count):
            keys.append(f"/gipam/gipam/claims/10.{number >> 8}.{number & 255}.0/24")
        for start in range(0, count, 100):
            self.put(*keys[start:start + 100], is_there=is_there)


class ClaimChanges:
    """A thread that makes a daemon read all claims again and again; some of them come and go."""

    def __init__(self, gateway: Gateway, daemon: BenchDaemon, count: int) -> None:
        self.gateway = gateway
        self.wire = Wire(daemon.socket)
        self.count = count
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        """Change claims until stop()."""
        pools = networks()
        for is_there in itertools.cycle((True, False)):
            self.gateway.claim(self.count, 40_000, is_there)
            # No logged change leads to this head, so all claims are read for the next pool.
            self.gateway.put("/gipam/gipam/head")
            # The request may wait in vain; all is read all the same.
            with contextlib.suppress(ErrorReply):
                self.wire.both(pools)
            if self.is_over.is_set():
                return

    def stop(self) -> None:
        """End the thread."""
        self.is_over.set()
        self.thread.join()


class Meter(socketserver.ThreadingTCPServer):
    """Stands before a member of etcd, and counts bytes in both directions."""

    daemon_threads = True

    def __init__(self, etcd: Etcd) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.member = (etcd.members[0].address, CLIENT_PORT)
        self.count = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        with socket.create_connection(self.member) as member:
            ends = {request: member, member: request}
            while True:
                for end in select.select(ends, [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    self.count += len(data)
                    ends[end].sendall(data)


class Fixture:
    """A state to start with: subnets and /24 blocks of 10.0.0.0/8, with leases at intervals."""

    def __init__(self, subnets: dict[str, int], blocks: int, leases: int, apart: int = 1) -> None:
        self.apart = apart
        self.subnets = dict(subnets)
        for number in range(blocks):
            self.subnets[f"10.{number >> 8}.{number & 255}.0/24"] = leases
        self.pool_ids = []
        for number, subnet in enumerate(self.subnets):
            self.pool_ids.append(f"{subnet}#{number:016x}")
        self.leases = sum(self.subnets.values())

    def write(self, path: str) -> None:
        """Write the state as a lease file, without a checksum, like one edited by a person."""
        macs = itertools.count(0x0242 << 32)
        pools = []
        for pool_id, (subnet, count) in zip(self.pool_ids, self.subnets.items()):
            base = ipaddress.ip_network(subnet).network_address + 1
            leases = []
            for number in range(count):
                mac = next(macs).to_bytes(6, "big").hex(":")
                leases.append(["endpoint", mac, "", 1700000000, number + 2, False])
            pools.append({
                "ID": pool_id,
                "Pool": subnet,
                "Granted": 1700000000,
                "Seq": 1,
                "Idx": count + 1,
                "Allocated": [str(base + number * self.apart) for number in range(count)],
                "Leases": leases,
            })
        seq = max(self.subnets.values()) + 2
        with open(path, "w", encoding="ascii") as file:
            json.dump({"Format": 1, "Seq": seq, "Allocated": pools}, file)


def request_nothing(method: str, **_: Any) -> Any:
    """Refuse a call of a FakeDocker that only shows what it uses."""
    raise AssertionError(method)


class BenchDaemon(Daemon):
    """gipam.py with a state to start with, which runs a few lines before its main()."""

    def __init__(self, bench: Bench, fixture: Fixture | None = None, patch: str = "",
                 *options: str) -> None:
        bases = ("-v4", "10.0.0.0/8", "-v6", "2001:db8::/32")
        super().__init__(bench, *bases, *options)
        self.command = launcher(self.directory, patch)
        # As under systemd, the log does not go to the disk that is measured.
        if os.path.isdir("/dev/shm"):
            descriptor, self.log = tempfile.mkstemp(prefix="gipam-", suffix=".log", dir="/dev/shm")
            os.close(descriptor)
            bench.addCleanup(os.unlink, self.log)
        if fixture:
            fixture.write(self.file)

    def start(self, wait: bool = True, stderr: int | None = None) -> BenchDaemon:
        super().start(wait, stderr)
        return self

    def seconds_to_start(self) -> float:
        """Return the time from exec to the first reply, in steps of a hundredth of a second."""
        self.kill()
        started = time.perf_counter()
        self.start()
        Wire(self.socket).call(ECHO)
        return time.perf_counter() - started

    def process_file(self, name: str) -> str:
        assert self.process is not None
        with open(f"/proc/{self.process.pid}/{name}", encoding="ascii") as file:
            return file.read()

    def memory_bytes(self, key: str) -> int:
        """Return a figure of /proc/PID/status."""
        for line in self.process_file("status").splitlines():
            if line.startswith(key + ":"):
                _, kilobytes, _ = line.split()
                return int(kilobytes) << 10
        raise AssertionError(f"no {key} in /proc/PID/status")

    def loop_s(self) -> float:
        """Return how much processor time the thread of the loop has used."""
        assert self.process is not None
        text = self.process_file(f"task/{self.process.pid}/schedstat")
        running_ns, _, _ = text.split()
        return int(running_ns) / 1e9

    def cpu_s(self) -> float:
        """Return how much processor time the daemon has used."""
        _, _, text = self.process_file("stat").rpartition(")")
        words = text.split()
        ticks = int(words[11]) + int(words[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Bench(unittest.TestCase):
    """A test case only so that the daemons of the toolkit can register their clean-ups."""

    quick = False

    def rounds(self, quick: int, full: int) -> range:
        return range(quick if self.quick else full)

    def row(self, what: str, values: Sequence[float], unit: str = "", at_most: float | None = None,
            at_least: float | None = None) -> None:
        """Print the median, the spread, and the target."""
        scale = 1.0
        digits = 2
        if unit == "ms":
            scale = 1e3
            digits = 3
        elif unit in ("/s", "B"):
            digits = 0
        middle = f"{statistics.median(values) * scale:,.{digits}f}"
        low = f"{min(values) * scale:,.{digits}f}"
        high = f"{max(values) * scale:,.{digits}f}"
        figure = f"{middle} {unit}"
        if len(values) > 1:
            figure += f" [{low} to {high}]"
        target = ""
        is_met = True
        if at_most is not None:
            target = f"at most {at_most:g}"
            is_met = statistics.median(values) * scale <= at_most
        if at_least is not None:
            target = f"at least {at_least:g}"
            is_met = statistics.median(values) >= at_least
        print(f"{what:70} {figure:36} {target}{'' if is_met else '  MISSED'}".rstrip(), flush=True)

    def columns(self, quick: int, full: int, repeats: int,
                *measures: Callable[[], float]) -> list[tuple[float, ...]]:
        """Measure in alternation, this often a round; return each measure's medians by round."""
        rounds = []
        for _ in self.rounds(quick, full):
            rows = [[measure() for measure in measures] for _ in range(repeats)]
            rounds.append([statistics.median(times) for times in zip(*rows)])
        return list(zip(*rounds))

    @staticmethod
    def request_s(wire: Wire, traffic: Traffic) -> Callable[[], float]:
        """Return a function that measures a request, and releases its grant."""
        def measure() -> float:
            return wire.request(traffic)
        return measure

    def start_etcd(self) -> Etcd:
        etcd = Etcd(*loopback(1))
        self.addCleanup(etcd.close)
        etcd.start()
        return etcd

    # -- one connection, many connections

    def one_connection(self) -> None:
        daemon = BenchDaemon(self).start()
        wire = Wire(daemon.socket)
        disk = Disk(daemon.directory)
        traffic = addresses(wire.request_pool("10.2.0.0/16"))

        def echo_s() -> float:
            return wire.call(ECHO)[0]

        def pair_s() -> float:
            return wire.pair(traffic)

        syncs, echo, calls = self.columns(10, 40, 100, disk.sync, echo_s, pair_s)
        self.row("a line appended and synced, nothing else", syncs, "ms")
        self.row("echo of the same server, nothing saved", echo, "ms")
        self.row("request or release, 1 connection", calls, "ms")
        floors = []
        for sync_s, call_s in zip(syncs, echo):
            floors.append(sync_s + call_s)
        self.row("  / (sync + echo)", ratios(calls, floors), at_most=1.3)

    def many_connections(self) -> None:
        grouped = BenchDaemon(self).start()
        single = BenchDaemon(self, patch=ONE_SYNC_A_REQUEST).start()
        disk = Disk(grouped.directory)
        for_s = 0.5 if self.quick else 2.0
        echoes = addresses("")
        echoes.requests = itertools.repeat(ECHO)
        grouped_calls = addresses(Wire(grouped.socket).request_pool("10.2.0.0/16"))
        single_calls = addresses(Wire(single.socket).request_pool("10.2.0.0/16"))

        def rate(daemon: BenchDaemon, traffic: Traffic, connections: int) -> Callable[[], float]:
            def measure() -> float:
                return storm(daemon.socket, traffic, connections, for_s)
            return measure

        def sync_rate() -> float:
            syncs_s = [disk.sync() for _ in range(300)]
            return 1 / statistics.median(syncs_s)

        rows: dict[str, Callable[[], float]] = {
            "requests and releases, 1 connection": rate(grouped, grouped_calls, 1),
            "requests and releases, 8 connections": rate(grouped, grouped_calls, 8),
            "requests and releases, 64 connections": rate(grouped, grouped_calls, 64),
            "  the same, 64 connections, with one sync a call": rate(single, single_calls, 64),
            "  echo of the same server, 64 connections": rate(grouped, echoes, 64),
            "  a line appended and synced, in a loop": sync_rate,
        }
        columns = self.columns(3, 5, 1, *rows.values())
        for what, rates in zip(rows, columns):
            self.row(what, rates, "/s")
        _, _, many, single_sync, _, syncs = columns
        quotients = ratios(many, single_sync)
        self.row("64 connections, group commit / one sync a call", quotients)
        quotients = ratios(many, syncs)
        what = "64 connections, group commit / a line synced in a loop"
        self.row(what, quotients, at_least=6)

    def processor_time(self) -> None:
        """Processor time of the loop's thread, a call, beside the gipam.py of GIPAM_BEFORE."""
        before = os.environ.get("GIPAM_BEFORE", "")
        if not before:
            return
        now = BenchDaemon(self)
        then = BenchDaemon(self)
        here = os.path.dirname(os.path.abspath(gipam.__file__))
        there = os.path.dirname(os.path.abspath(before))
        then.command = tuple(word.replace(here, there) for word in then.command)

        measures = {}
        for daemon in (now, then):
            pool_id = Wire(daemon.start().socket).request_pool("10.2.0.0/16")
            measures[daemon] = addresses(pool_id)
        for connections in (64, 1):
            now_s, then_s = self.columns(5, 40, 1, *[
                self.cost_s(daemon, traffic, connections)
                for daemon, traffic in measures.items()])
            self.row(f"processor time a call, connections: {connections}", now_s, "ms")
            self.row("  / that of GIPAM_BEFORE", ratios(now_s, then_s), at_most=1.05)

    @staticmethod
    def cost_s(daemon: BenchDaemon, traffic: Traffic, connections: int) -> Callable[[], float]:
        """Return a function that measures the processor time of a call."""
        def measure() -> float:
            started_s = time.perf_counter()
            spent_s = daemon.loop_s()
            rate = storm(daemon.socket, traffic, connections, 0.2)
            spent_s = daemon.loop_s() - spent_s
            calls = rate * (time.perf_counter() - started_s)
            return spent_s / calls
        return measure

    # -- a state of any size

    def a_million_leases(self) -> None:
        """Start, memory, and calls in alternation with a daemon that holds a hundred leases."""
        wide = 10_000 if self.quick else 100_000
        blocks = 1_000 if self.quick else 10_000
        few_held = Fixture({"2001:db8:ffff::/64": 10}, 9, 10)
        many_held = Fixture({"2001:db8:ffff::/64": wide}, blocks, 90)
        few = BenchDaemon(self, few_held).start()
        many = BenchDaemon(self, many_held)
        count = f"{many_held.leases:,} leases"
        few_bytes = few.memory_bytes("VmRSS")
        starts_s = [many.seconds_to_start() for _ in self.rounds(1, 3)]
        self.row(f"start with {count}", starts_s, "s", at_most=6)

        memory_bytes = (many.memory_bytes("VmRSS") - few_bytes) / many_held.leases
        self.row("memory a lease, after the start", [memory_bytes], "B", at_most=400)
        peak_bytes = (many.memory_bytes("VmHWM") - few_bytes) / many_held.leases
        self.row("memory a lease, at its peak", [peak_bytes], "B")

        pool_ids = random.sample(many_held.pool_ids[1:], 500)
        traffic = [addresses(pool_id, 4) for pool_id in pool_ids]
        self.while_checkpointing(many, traffic, 1,
                                 f"longest call while {count} are written in a checkpoint")
        self.beside_a_page(many, traffic, f"longest call beside GET /status?leases=1 of {count}")
        few_traffic = [addresses(pool_id, 4) for pool_id in few_held.pool_ids]
        self.flat(f"{count} in {blocks + 1:,} pools / 100 in 10", few, few_traffic, many, traffic)
        one_subnet = [addresses(many_held.pool_ids[0])]
        self.flat(f"one /64 with {wide:,} / 100 in 10", few, few_traffic, many, one_subnet)
        many.kill()

        held = Fixture({"2001:db8:ffff::/64": wide}, 0, 0, apart=1 << 40)
        apart = BenchDaemon(self, held).start()
        memory_bytes = (apart.memory_bytes("VmRSS") - few_bytes) / held.leases
        what = f"memory a lease, {held.leases:,} far apart in a /64"
        self.row(what, [memory_bytes], "B", at_most=1000)

    def beside_a_page(self, daemon: BenchDaemon, traffic: list[Traffic], what: str) -> None:
        """Measure calls as long as another client reads all leases."""
        wire = Wire(daemon.socket)
        disk = Disk(daemon.directory)
        alone = [disk.sync() for _ in range(300)]
        worst = []
        lengths = []
        pages_s = []
        for _ in self.rounds(1, 5):
            times: list[float] = []
            started = time.perf_counter()
            command = [sys.executable, "-c", READER, daemon.socket]
            reader = subprocess.Popen(command, stdout=subprocess.PIPE)
            while reader.poll() is None:
                times += wire.both(random.choice(traffic))
            pages_s.append(time.perf_counter() - started)
            output, _ = reader.communicate()
            lengths.append(int(output) / 1e6)
            worst.append(max(times))
        self.row(what, worst, "ms", at_most=50)
        self.row("  longest sync alone, before", [max(alone)], "ms")
        self.row("  the page took", pages_s, "s")
        self.row("  its length", lengths, "MB")

    def many_routes(self) -> None:
        """Measure in a network namespace with many routes of both families outside the bases."""
        daemon = BenchDaemon(self)
        routes = os.path.join(daemon.directory, "routes")
        with open(routes, "w", encoding="ascii") as file:
            for number in range(20_000):
                file.write(f"route add 11.{number >> 8}.{number & 255}.0/24 dev lo\n"
                           f"route add 2001:dbf:{number:x}::/48 dev lo\n")
        namespaces = Namespaces("--net", setup=f"ip link set lo up; ip -batch {routes}")
        self.addCleanup(namespaces.close)
        daemon.command = (*namespaces.inside, *daemon.command)
        wire = Wire(daemon.start().socket)
        rows = (
            ("a dynamic pool", networks()),
            ("a dynamic IPv6 pool", networks(v6=True)),
        )
        for what, traffic in rows:
            medians, = self.columns(3, 10, 5, self.request_s(wire, traffic))
            self.row(f"{what} with 20,000 routes of each family", medians, "ms", at_most=30)

    def flat(self, what: str, few: BenchDaemon, few_traffic: list[Traffic], many: BenchDaemon,
             many_traffic: list[Traffic]) -> None:
        """Compare the cost of a call to the two daemons."""
        few_wire = Wire(few.socket)
        many_wire = Wire(many.socket)
        few_before_s = few.cpu_s()
        many_before_s = many.cpu_s()

        def few_s() -> float:
            return few_wire.pair(random.choice(few_traffic))

        def many_s() -> float:
            return many_wire.pair(random.choice(many_traffic))

        theirs, ours = self.columns(8, 30, 100, few_s, many_s)
        self.row(f"time of a call, {what}", ratios(ours, theirs), at_most=1.2)
        many_cpu_s = many.cpu_s() - many_before_s
        few_cpu_s = few.cpu_s() - few_before_s
        ratio = many_cpu_s / few_cpu_s
        self.row(f"  processor time of a call, {what}", [ratio], at_most=1.2)

    def full_and_crowded(self) -> None:
        """Measure calls that must look for free space in a state that has hardly any."""
        held = Fixture({"172.16.0.0/16": 65533}, 6_000 if self.quick else 60_000, 0)
        daemon = BenchDaemon(self, held).start()
        inode = os.stat(daemon.file).st_ino
        Wire(daemon.socket).pair(networks("192.168.0.0/24"))
        while os.stat(daemon.file).st_ino == inode:  # the first change makes a checkpoint due
            time.sleep(0.01)
        for what, traffic in (
                ("an address of a /16 with one free", addresses(held.pool_ids[0])),
                (f"a dynamic pool, {len(held.pool_ids) - 1:,} /24 of a /8 held", networks()),
                ("a dynamic IPv6 pool beside them", networks(v6=True)),
                ("a /40 over blocks of /64", networks("2001:db8:ff00::/40", v6=True))):
            measure = self.request_s(Wire(daemon.socket), traffic)
            medians, = self.columns(5, 20, 50, measure)
            self.row(what, medians, "ms", at_most=1)

    def empty_start(self) -> None:
        daemon = BenchDaemon(self)
        self.row("start with an empty state", [daemon.seconds_to_start() for _ in range(7)],
                 "s", at_most=0.25)

    # -- checkpoints

    def checkpoints(self) -> None:
        held = Fixture({}, 1_000, 100)
        daemon = BenchDaemon(self, held, patch=CHECKPOINTS_WITHOUT_END).start()
        traffic = [addresses(pool_id, 4) for pool_id in held.pool_ids]
        self.while_checkpointing(daemon, traffic, 7 if self.quick else 40,
                                 "longest call while 100,000 leases are written in a checkpoint",
                                 at_most=5)

    def while_checkpointing(self, daemon: BenchDaemon, traffic: list[Traffic],
                            checkpoint_count: int, what: str,
                            at_most: float | None = None) -> None:
        """Call until the lease file has been replaced this often."""
        wire = Wire(daemon.socket)
        disk = Disk(daemon.directory)
        floor = [0.0]
        is_over = threading.Event()
        worst: list[float] = []
        worst_floors: list[float] = []
        times: list[float] = []

        # The disk delays every process while the lease file is written.
        def sync_alone() -> None:
            while not is_over.wait(0.001):
                floor.append(disk.sync())

        thread = threading.Thread(target=sync_alone, daemon=True)
        thread.start()
        for _ in range(checkpoint_count):
            inode = os.stat(daemon.file).st_ino
            floor[:] = [0.0]
            first = len(times)
            while os.stat(daemon.file).st_ino == inode:
                times += wire.both(random.choice(traffic))
            worst.append(max(times[first:]))
            worst_floors.append(max(floor))
        is_over.set()
        thread.join()
        self.row(what, worst, "ms")
        self.row("  longest sync alone then", worst_floors, "ms")
        beyond = []
        for call_s, sync_s in zip(worst, worst_floors):
            beyond.append(max(call_s - sync_s, 0.0))
        self.row("  beyond it", beyond, "ms", at_most)
        self.row("  median call then", [statistics.median(times)], "ms")

    # -- an import

    def imports(self) -> None:
        """Start without a lease file beside a Docker with many containers in one network."""
        count = 2_000 if self.quick else 20_000
        subnet = ipaddress.ip_network("172.16.0.0/16")
        path = os.path.join(make_directory(self), "docker.sock")
        docker = FakeDocker(self, path, request_nothing)
        docker.show_network("web", {"Subnet": str(subnet)})
        for number in range(2, count + 2):
            name = f"c{number}"
            endpoint = docker.make_endpoint(name, "web", number.to_bytes(6, "big").hex(":"))
            endpoint["IPAddress"] = str(subnet[number])
            endpoint["IPPrefixLen"] = subnet.prefixlen
            docker.containers[name] = docker.container(name, {"web": endpoint})

        longest_s = []
        for _ in self.rounds(1, 5):
            daemon = BenchDaemon(self)
            figure = daemon.path("longest")
            patch = LONGEST_ITERATION.format(path=figure)
            daemon.command = launcher(daemon.directory, patch)
            daemon.env["DOCKER_HOST"] = "unix://" + path
            daemon.start().wait_for_log(f"compared with Docker: imported {count + 2} missing items")
            daemon.kill()
            with open(figure, encoding="ascii") as file:
                longest_s.append(float(file.read()))
        what = f"longest iteration of an import of {count:,} leases, processor time"
        self.row(what, longest_s, "ms", at_most=5)

    # -- several hosts

    def several_hosts(self) -> None:
        """Measure the cost of etcd on this machine: new pools wait for it, addresses never."""
        etcd = self.start_etcd()
        alone = BenchDaemon(self).start()
        hosts = [self.start_host(etcd.endpoints, f"host{number}") for number in range(3)]
        self.pools_through_etcd(etcd, alone, hosts[0])
        paths = [host.socket for host in hosts]
        rates = [sum(self.at_once(paths)) for _ in self.rounds(2, 5)]
        self.row("claims a second of three hosts at once", rates, "/s")
        wires = [Wire(host.socket) for host in (hosts[0], alone)]
        options = {"gipam.shared": "true"}
        arguments = {"Pool": "192.168.0.0/16", "Options": options}
        _, reply = wires[0].call(request("IpamDriver.RequestPool", arguments))
        lan = addresses(decode_reply(reply)["PoolID"])
        medians, = self.columns(5, 20, 30, self.request_s(wires[0], lan))
        self.row("an address of a shared subnet", medians, "ms")
        self.what_etcd_keeps(etcd, wires[0])
        self.idle_traffic(etcd)
        measures = []
        for number, wire in enumerate(wires, 16):
            pool_id = wire.request_pool(f"172.{number}.0.0/16")
            measures.append(self.request_s(wire, addresses(pool_id)))
        falls: dict[str, Callable[[], Any]] = {
            "there": etcd.wait,
            "hung": etcd.pause,
            "away": etcd.kill,
        }
        for what, fall in falls.items():
            fall()
            ours, plain = self.columns(10, 40, 100, *measures)
            self.row(f"time of an address, etcd {what} / without -etcd", ratios(ours, plain),
                     at_most=1.0)

    def start_host(self, endpoints: str, name: str) -> BenchDaemon:
        """Return a daemon that shares an etcd."""
        options = ("-etcd", endpoints, "-host", name)
        return BenchDaemon(self, None, "", *options).start()

    def what_etcd_keeps(self, etcd: Etcd, wire: Wire) -> None:
        def size() -> int:
            text = etcd.ctl("endpoint", "status", "-w", "json")
            (member,) = json.loads(text)
            return int(member["Status"]["dbSizeInUse"])

        kept: list[int] = []
        its = networks()

        def is_compacted() -> bool:
            return size() < kept[-1]

        for count in (0, 500):
            for _ in range(count):
                wire.both(its)
            kept.append(size())
            etcd.compact()
            wait_until("the end of the compaction", is_compacted)
        megabytes = (kept[1] - size()) / 1e6
        self.row("size of 1,000 changes in etcd, until it compacts", [megabytes], "MB")

    def idle_traffic(self, etcd: Etcd) -> None:
        meter = Meter(etcd)
        for_s = 11 if self.quick else 60
        hosts: list[BenchDaemon] = []
        self.addCleanup(meter.shutdown)
        for count in (1, 10):
            while len(hosts) < count:
                hosts.append(self.start_host(meter.url, f"idle{len(hosts)}"))
            time.sleep(11)
            before = meter.count
            time.sleep(for_s)
            rate = (meter.count - before) / for_s
            self.row(f"idle traffic of each of {count} hosts with etcd", [rate / count], "B/s")
        for host in hosts:
            host.kill()

    def pools_through_etcd(self, etcd: Etcd, alone: BenchDaemon, host: BenchDaemon) -> None:
        """Measure networks that stay, since the deletion of a claim would delay the next one."""
        gateway = Gateway(etcd)
        pools = networks().requests
        alone_wire = Wire(alone.socket)
        host_wire = Wire(host.socket)

        def alone_s() -> float:
            return alone_wire.call(next(pools))[0]

        def transaction_s() -> float:
            return gateway.put("/bench/claim", "/bench/head")

        def host_s() -> float:
            return host_wire.call(next(pools))[0]

        plain, transaction, ours = self.columns(5, 20, 30, alone_s, transaction_s, host_s)
        self.row("a dynamic pool without etcd", plain, "ms")
        self.row("an etcd transaction, nothing else", transaction, "ms")
        self.row("a dynamic pool through etcd", ours, "ms")
        floor = []
        for etcd_s, plain_s in zip(transaction, plain):
            floor.append(1.5 * etcd_s + plain_s)
        self.row("  / (1.5 x transaction + without)", ratios(ours, floor), at_most=1)

    def at_once(self, paths: list[str]) -> list[float]:
        """Return how many networks a second each host can create and remove."""
        def networks_a_second(path: str) -> float:
            return storm(path, networks(), 4, 1.0) / 2

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(networks_a_second, paths))

    def claims_of_others(self) -> None:
        """Start and memory beside 10,000 claims of another host."""
        etcd = self.start_etcd()
        count = 1_000 if self.quick else 10_000
        options = ("-etcd", etcd.endpoints, "-host", "bench")
        daemon = BenchDaemon(self, None, "", *options)
        empty_s = [daemon.seconds_to_start() for _ in self.rounds(3, 7)]
        empty_bytes = daemon.memory_bytes("VmRSS")
        gateway = Gateway(etcd)
        gateway.claim(count)
        full_s = [daemon.seconds_to_start() for _ in self.rounds(3, 7)]
        full_bytes = daemon.memory_bytes("VmRSS")
        self.row("start beside an etcd without claims", empty_s, "s")
        self.row(f"start beside {count:,} claims of another host", full_s, "s")
        memory_bytes = (full_bytes - empty_bytes) / count
        self.row("memory a claim of another host", [memory_bytes], "B")

        # This thread does not wait for the one that changes claims.
        sys.setswitchinterval(gipam.THREAD_SWITCH_S)
        wire = Wire(daemon.socket)
        traffic = addresses(wire.request_pool("172.16.0.0/16"))
        alone_s = self.p99_s(wire, traffic)
        self.row("p99 of an address", [alone_s], "ms")
        half = count // 2
        for what, changing in ((f"{count:,} claims are read again", 0),
                               (f"{half:,} more come and go", half)):
            changes = ClaimChanges(gateway, daemon, changing)
            reading_s = self.p99_s(wire, traffic)
            changes.stop()
            at_most = alone_s * 1e3 + 5
            self.row(f"  while {what}", [reading_s], "ms", at_most=at_most)

    def p99_s(self, wire: Wire, traffic: Traffic) -> float:
        """Return the time of the slowest of a hundred requests."""
        times = sorted(wire.request(traffic) for _ in self.rounds(1000, 10_000))
        return times[len(times) * 99 // 100]

    # -- beside Docker

    def beside_docker(self) -> None:
        docker = Docker()
        self.addCleanup(docker.close)
        docker.start()
        def ours_s() -> float:
            return self.life_of_a_network(docker, "gipam")

        def theirs_s() -> float:
            return self.life_of_a_network(docker, "default")

        ours, theirs = self.columns(4, 25, 1, ours_s, theirs_s)
        self.row("docker network create, run, rm with gipam", ours, "s")
        self.row("docker network create, run, rm with the built-in IPAM", theirs, "s")
        self.row("  gipam / built-in", ratios(ours, theirs), at_most=1.03)

    @staticmethod
    def life_of_a_network(docker: Docker, driver: str) -> float:
        started = time.perf_counter()
        docker("network", "create", "--ipam-driver", driver, "bench")
        docker.container("bench", "bench")
        docker("rm", "-f", "bench")
        docker("network", "rm", "bench")
        return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Print the table; --quick takes a minute, with a smaller state."""
    runner = Bench()
    runner.quick = "--quick" in arguments
    print(f"gipam {gipam.__version__}, Python {platform.python_version()}, "
          f"{platform.system()} {platform.release()}, {os.cpu_count()} processors, "
          f"load {os.getloadavg()[0]:.1f}, files in {tempfile.gettempdir()}\n")
    try:
        for section in (
                runner.one_connection,
                runner.many_connections,
                runner.processor_time,
                runner.empty_start,
                runner.a_million_leases,
                runner.many_routes,
                runner.full_and_crowded,
                runner.checkpoints,
                runner.imports,
                runner.several_hosts,
                runner.claims_of_others,
                runner.beside_docker):
            section()
            runner.doCleanups()
    finally:
        runner.doCleanups()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
