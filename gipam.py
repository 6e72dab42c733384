#!/usr/bin/env python3
"""A Docker IPAM driver: every Docker network gets its own prefix, every container an address.

A prefix is routed to this host, or is on-link. Every Docker network created with
`--ipam-driver gipam` gets the next free block of that prefix, so its containers are reachable from
outside without NAT. To run and to test it:

    sudo python3 gipam.py -unix -v6 2001:db8:0:100::/56 -v4 10.2.0.0/16
    python3 test_gipam.py

The sections. Each uses only what stands above it (`grep -n '^# ===' gipam.py` lists them):

    Constants   defaults and limits
    Errors      one class for each kind of error, with its HTTP and its exit status
    Logging     a log handler that never waits for a reader
    Model       prefixes, pools, leases and the state; no I/O
    Records     journal records and the snapshot as text
    Allocator   pure decisions: (state, request) -> record, or an error
    Journal     the lease file, its journal segments and its lock
    Netlink     routes, addresses and proxy neighbours of this host
    Claims      what the hosts of a cluster have claimed in etcd; no I/O
    Service     applies records and commits them; the only code that changes the state
    API         plugin methods, status, metrics and health: bytes in, bytes out
    Server      the event loop, its connections and its listeners
    Discovery   the socket, the plugin file and systemd, by which Docker finds gipam
    Docker      a client of Docker's API, and what Docker uses
    Check       differences between gipam and Docker, their repair, and the import
    Cluster     a client of etcd, and the thread that runs transactions
    Settings    options from the command line, the environment and the lease file
    Daemon      `gipam serve`: start, run, stop
    Commands    the command line

One thread serves all connections in an event loop. Each iteration reads what has arrived, decides
and applies every complete request, appends one journal record with all their changes, syncs it,
and only then sends the replies. No locks are needed. Work that blocks (writing a snapshot, calling
Docker or etcd) runs in other threads, which use EventLoop.run_in_loop() to run code in the loop.

Several hosts share prefixes through etcd. A claim of another host blocks that space here, exactly
as a local pool would. Every grant of a subnet, and of an address in a shared subnet, is made only
after an etcd transaction has claimed it; a claim is deleted only after the local release is on
disk. A crash can therefore leave a surplus claim, which is cleaned up later, but never one subnet
on two hosts. Containers in ordinary (unshared) subnets never wait for etcd.

On disk. The lease file is human-readable JSON: the configuration, the pools (Allocated) with their
leases, and a checksum. If the configuration in it and the command line disagree, the one that
changed last wins. The lease file is a snapshot; later changes are in a journal segment beside it
(leases.json.journal.1). Each iteration appends one line to the segment: the length and the CRC-32
of a JSON text, then that text, which holds the sequence number of its last change and the changes.
The file is preallocated: zeros follow the last line. For example (one line in the file):

    0000007c f4631d13 [4,[["request_address","10.2.0.0/24#1f0c27ab5e94d386","10.2.0.2","endpoint",
    "02:42:0a:02:00:02","web1",1795510069,3,false]]]

Recovery locks the segments, loads the snapshot, and replays the segments in order, skipping changes
that the snapshot already contains. A torn last line (truncated, or with zeroed sectors) was never
acknowledged and is dropped. Any other inconsistency stops gipam with an error that says what to do.
Files are created, renamed and removed only in the loop thread.

Durability. A reply that Docker has read is on disk: it survives SIGKILL and, if the disk honours
fdatasync, a power cut. A full disk causes errors but never loses a lease. A reply that was lost
when dockerd crashed, or a release that Docker sent while gipam was down, leaves an address or a
pool allocated that no container uses. `gipam check --fix` releases it.
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import difflib
import enum
import errno
import faulthandler
import fcntl
import functools
import gc
import hashlib
import http
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import textwrap
import threading
import time
import urllib.parse
import zlib
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
    Tuple,
    Union,
    cast,
)

__version__ = "1.0.0"

# === Constants ====================================================================================
#
# Limits, intervals and sizes, grouped by the section that uses them. A name ends in its unit: _S
# for seconds, _BYTES, _CHARS. The keys and texts that a section reads or writes, such as those of
# the lease file, are defined in that section. A limit bounds the cost of one client, iteration or
# subnet; no limit deletes a lease.

# Logging and texts.
MAX_TEXT_CHARS = 255  # of a stored name or quoted text
MAX_LOG_RECORDS = 1_000  # buffered while stderr is not writable
MAX_LOG_CHARS = 4_000  # of one line
# The host is short of a resource; a later attempt may succeed.
TRANSIENT_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINTR)

# Model.
ADDRESS_BITS = {4: 32, 6: 128}
SOCKET_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
GATEWAY = "gateway"
AUXILIARY = "auxiliary"
ENDPOINT = "endpoint"
# handle_request_address() says how a request gets its kind.
LEASE_KINDS = (GATEWAY, AUXILIARY, ENDPOINT)
MAX_AFFINITIES = 1024  # past leases per subnet, reservations per family
MAX_SAVED_AFFINITIES = 256  # past leases of a released subnet

# Records: the loop encodes the lease file in chunks, so that no request waits long.
LEASES_PER_CHUNK = 250  # measured: 0.4 ms
NAMES_PER_CHUNK = 4  # each with up to MAX_SAVED_AFFINITIES addresses

# Journal: an append to preallocated space changes no metadata of the file.
CHUNK_BYTES = 16384  # of a snapshot or a page
PREALLOCATE_BYTES = 1 << 17
PROBE_BYTES = 4096  # a file-system block
RECORD_OVERHEAD_BYTES = 64  # of a line beyond its changes
SECTOR_BYTES = 512  # written whole or not at all
LOCK_TIMEOUT_S = 2.0  # for a predecessor's last checkpoint
MIN_CHECKPOINT_BYTES = 1 << 20  # of the journal
CHECKPOINT_RETRY_S = 10.0  # after a failed checkpoint

# Netlink.
PROXY_UPDATES_PER_ITERATION = 10  # measured: 60 us each
MAX_NETLINK_EVENTS = 100  # read in an iteration
RESYNC_INTERVAL_S = 0.25  # between full comparisons of proxy entries

# API. If the local and the global address space are the same, Docker 27 and later leaves the check
# for overlapping routes to the driver.
ADDRESS_SPACE = "gipam"
REPLY_TYPE = "application/vnd.docker.plugins.v1.2+json"
MAX_BODY_BYTES = 1 << 18
MAX_IMPORT_LEASES = 100  # in one request; measured: 1 ms

# Server. With socketserver's backlog of 5, parallel connects of dockerd fail with EAGAIN.
BACKLOG = 1024
MAX_LINE_BYTES = 65536  # of a request line or header
MAX_HEAD_BYTES = 1 << 18  # of a request
RECEIVE_BYTES = 65536
REQUEST_TIMEOUT_S = 10.0  # on TCP, for a request or reply
MAX_TCP_CONNECTIONS = 256  # per listener
MAX_ACCEPTS = 64  # per iteration; measured: 0.1 ms each
TIMER_INTERVAL_S = 1.0
DRAIN_IDLE_S = 0.1  # for a disconnected client to reconnect
DRAIN_MAX_S = 2.0  # for a connected client's request

# Service.
SLOW_COMMIT_S = 0.25  # from here on the log says it

# Discovery. Source: moby pkg/plugins/discovery_unix.go
PLUGIN_SOCKET_DIR = "/run/docker/plugins"

# Docker and Check.
DOCKER_TIMEOUT_S = 10.0  # of check and release
NAMES_TIMEOUT_S = 2.0  # of status, and for a single container
RECHECK_DELAY_S = 1.0  # between the readings of a check
IMPORT_TIMEOUT_S = 2.0  # of a start, before it serves
IMPORT_BACKOFF_S = 1.0
MAX_IMPORT_BACKOFF_S = 60.0
SERVING_IMPORT_TIMEOUT_S = 60.0  # of an import while gipam serves

# Cluster.
ETCD_AUTH_PATH = "/v3/auth/authenticate"
# InvalidArgument, PermissionDenied, ResourceExhausted, FailedPrecondition, OutOfRange and
# Unauthenticated: every endpoint of etcd would return the same error.
GRPC_PERMANENT_CODES = (3, 7, 8, 9, 11, 16)
ETCD_TIMEOUT_S = 3.0  # of a request that needs etcd
ETCD_ATTEMPT_S = 1.0  # for one endpoint
ETCD_PAUSE_S = 0.05  # before the next endpoint
ETCD_MIN_LOOK_S = 0.25  # between readings of others' changes
ETCD_PAGE_KEYS = 250  # read at a time; measured: 0.24 ms
MAX_ETCD_BYTES = 1 << 24  # of one reply
HEARTBEAT_INTERVAL_S = 10.0
MISSED_HEARTBEATS = 4  # until a host is absent
# Nothing is granted on an older result, because this host may have been evicted meanwhile.
TRANSACTION_MAX_AGE_S = 10.0
GRACE_PERIOD_S = 5.0  # without new claims after a loss
CLAIMS_PER_TRANSACTION = 40  # etcd's --max-txn-ops is 128
CLAIMS_PER_ITERATION = 25  # measured: 60 us each
MAX_CLAIM_LOG_CHARS = 2000

# Daemon and Commands.
# Threads that parse replies of Docker and etcd give way to the loop after this time.
THREAD_SWITCH_S = 0.0005
START_TIMEOUT_S = 300  # asked of the service manager
DAEMON_TIMEOUT_S = 60.0  # of commands, for the daemon

log = logging.getLogger("gipam")

# === Errors =======================================================================================
#
# One class for each way in which an error is reported: http_status is the status of the reply,
# exit_status that of the process. Classes are grouped as moby groups them
# (daemon/libnetwork/ipamapi/contract.go). An exception of another class is a bug.


class GipamError(Exception):
    """Base class. Docker and the operator see the text."""

    http_status = 500
    exit_status = 1


class InvalidRequest(GipamError):
    """The request would be invalid in any state (moby: InvalidParameter)."""

    def __init__(self, text: str, http_status: int = 400) -> None:
        super().__init__(text)
        self.http_status = http_status


class Forbidden(GipamError):
    """The address or subnet is already in use, or reserved (moby: Forbidden)."""

    http_status = 403


class Unavailable(GipamError):
    """No subnet or address is free, or etcd or the kernel does not answer (moby: Unavailable)."""

    http_status = 503


class StoreError(GipamError):
    """The change could not be written; the state and the disk are unchanged."""

    http_status = 503


class ShuttingDown(StoreError):
    """The event loop has ended; nothing more can be run in it."""

    def __init__(self) -> None:
        super().__init__("gipam is stopping: try again")


class FatalStoreError(StoreError):
    """The disk or the state is in doubt: the process must exit, and recover from the disk."""

    exit_status = os.EX_IOERR


class ConfigError(GipamError):
    """An option, a variable or a file is unusable, so that a restart would fail too."""

    exit_status = os.EX_CONFIG


class UsageError(GipamError):
    """The command line is invalid."""

    exit_status = 2


class CorruptionError(ConfigError):
    """The lease file or the journal is not as gipam wrote it."""


class Unreachable(GipamError):
    """Docker or the daemon does not answer."""

    exit_status = 2


class NotListening(Unreachable):
    """No process listens on the socket or address of Docker or the daemon."""


class RemoteError(GipamError):
    """Docker or the daemon replied with an error."""

    exit_status = 2


class EtcdError(GipamError):
    """etcd replied with an error, as every endpoint of it would, whatever is claimed.

    It says nothing about the subnet or address that the request was for.
    """


class AlreadyRunning(GipamError):
    """Another process holds the lease file, the socket, an address, or this host's name in etcd."""

    exit_status = os.EX_TEMPFAIL


def format_os_error(error: Exception) -> str:
    """Return the error's text without Python's errno prefix and quotes."""
    text = getattr(error, "strerror", None) or str(error)
    path = getattr(error, "filename", None)
    if path:
        return f"{path}: {text}"
    return text


# === Logging ======================================================================================
#
# A LogHandler writes lines to stderr: under systemd with a priority, else with a time. It never
# blocks, because a request must not wait for the reader of the log. Lines that stderr does not
# accept are buffered as text (a log record would keep its exception, and with it the body of a
# request); at the limit the oldest is dropped.


def printable(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Return the text with unprintable characters escaped, cut to the limit."""
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text[:limit]


def plural(count: int, noun: str) -> str:
    """Return "1 pool" or "2 pools"."""
    ending = "" if count == 1 else "s"
    return f"{count} {noun}{ending}"


def open_stderr() -> Callable[[bytes], int]:
    """Return a function that writes to stderr without blocking, and returns how many bytes.

    Other processes may share the descriptor and need it blocking, so a pipe or a terminal is
    reopened. (select() reports a terminal as writable although a longer line would block.)
    """
    file_type = stat.S_IFMT(os.fstat(2).st_mode)
    if file_type == stat.S_IFSOCK:
        connection = socket.socket(fileno=os.dup(2))

        def send(data: bytes) -> int:
            return connection.send(data, socket.MSG_DONTWAIT)

        return send

    fd = 2
    if file_type in (stat.S_IFIFO, stat.S_IFCHR):
        try:
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            # Another user owns it, and this one may not open it.
            os.set_blocking(2, False)

    def write(data: bytes) -> int:
        return os.write(fd, data)

    return write


# Priorities under systemd of the levels below an error. Source: sd-daemon(3)
LOG_PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>"}
ERROR_PRIORITY = "<3>"


class LogHandler(logging.Handler):
    """Writes to stderr without ever blocking.

    While is_buffering, output waits for flush(), so that the replies of an iteration are sent
    before the log lines about them are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_buffering = False
        self._lines: collections.deque[bytes] = collections.deque(maxlen=MAX_LOG_RECORDS)
        self._partial = b""  # unwritten part of a line
        self._write: Callable[[bytes], int] | None = None  # opened by the first line
        self._write_lock = threading.Lock()
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Buffer the text of a record; write it unless is_buffering."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001
            # Python opens files for its first traceback, which fails at the descriptor limit.
            text = f"{record.msg}: {error!r}"
        self.write_line(text)

    def write_error(self, text: str) -> None:
        """Write the error of a command in one line, under systemd with the priority of an error."""
        prefix = ERROR_PRIORITY if "JOURNAL_STREAM" in os.environ else "gipam: "
        self.write_line(prefix + text)

    def write_line(self, text: str) -> None:
        """Buffer a line, at the limit instead of the oldest; write it unless is_buffering."""
        self._lines.append(text.encode(errors="backslashreplace") + b"\n")
        if not self.is_buffering:
            self.flush()

    def flush(self) -> None:
        """Write as much of the buffer as stderr accepts now."""
        # The log may have no reader any more.
        with self._write_lock, contextlib.suppress(OSError):
            if self._write is None:
                self._write = open_stderr()
            while self._partial or self._lines:
                if not self._partial:
                    self._partial = self._lines.popleft()
                written = self._write(self._partial)
                self._partial = self._partial[written:]

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, each with a priority under systemd, else with a time."""
        if "JOURNAL_STREAM" in os.environ:
            prefix = LOG_PRIORITIES.get(record.levelno, ERROR_PRIORITY)
        else:
            prefix = f"{self._formatter.formatTime(record)} {record.levelname} "
        text = self._formatter.format(record)
        return "\n".join([prefix + printable(line, MAX_LOG_CHARS) for line in text.split("\n")])


# === Model ========================================================================================
#
# A State has a Family for IPv4 and one for IPv6; a Family has bases, and a Subnet for each prefix
# in use; a Subnet has a Pool for each Docker network (or --ip-range) in it; a Pool has a Lease for
# each address. Inside a subnet, an address is an offset from the first one. A Record is one change,
# as the journal stores it.
#
# The rule: State.apply() is the only way to change the state, both while serving and during
# recovery. It depends on the state and the record alone: no clock, no randomness, no I/O. It
# refuses a record that would allocate an address twice.

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Range = Tuple[int, int]  # first and last address
Json = Dict[str, Any]  # an object


def parse_prefix(text: str, mask: bool = False) -> Network:
    """Return the prefix of CIDR text; mask: clear its host bits. Raises: ValueError."""
    address, _, length = text.partition("/")
    try:
        # ip_network() also accepts netmasks, scopes and bare addresses.
        if "%" in address or not (length.isascii() and length.isdigit()):
            raise ValueError
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a prefix in CIDR form, such as 10.2.0.0/16 "
                         "(at most /32) or 2001:db8::/56 (at most /128)") from None
    if not mask and network[0] != ipaddress.ip_address(address):
        raise ValueError(f"{text!r} has host bits set: the prefix is {network}")
    return network


def parse_address(text: str, version: int) -> int:
    """Return a bare address of the family as a number. Raises: ValueError."""
    try:
        return int.from_bytes(socket.inet_pton(SOCKET_FAMILY[version], text), "big")
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{text!r} is not a bare IPv{version} address") from None


def format_address(number: int, version: int) -> str:
    """Return the bare address as text (RFC 5952)."""
    packed = number.to_bytes(ADDRESS_BITS[version] // 8, "big")
    return socket.inet_ntop(SOCKET_FAMILY[version], packed)


def format_socket_address(address: Any) -> str:
    """Return the text of a socket's address: HOST:PORT, or the path of a UNIX socket."""
    if not isinstance(address, tuple):
        return os.fsdecode(address)
    host, port = address[:2]
    if ":" in host:
        return f"[{host}]:{port}"
    return f"{host}:{port}"


def address_range(network: Network) -> Range:
    """Return the first and last address of a prefix as numbers."""
    return int(network.network_address), int(network.broadcast_address)


def is_subnet(network: Network, base: Network) -> bool:
    """Return whether a prefix lies within another one, which may be of the other family."""
    return base.overlaps(network) and base.prefixlen <= network.prefixlen


def is_size_hint(subnet: Network) -> bool:
    """Return whether the prefix only requests a length, such as 0.0.0.0/26, ::/72, or ::/0."""
    return not int(subnet[0])


def make_pool_id(subnet: Network, sub_pool: Network | None, token: str) -> str:
    """Return SUBNET[,SUB_POOL]#TOKEN, from which a lost pool can be adopted.

    The token is random: Docker may still use the id of an older pool of the same subnet.
    """
    if sub_pool:
        return f"{subnet},{sub_pool}#{token}"
    return f"{subnet}#{token}"


POOL_ID = re.compile(r"([0-9a-f.:/]+)(?:,([0-9a-f.:/]+))?#([0-9a-f]{16})")


def parse_pool_id(pool_id: str) -> tuple[Network, Network | None] | None:
    """Return (subnet, sub_pool) of an id that gipam made, None for any other text."""
    match = POOL_ID.fullmatch(pool_id)
    if not match:
        return None
    try:
        subnet = parse_prefix(match[1])
        sub_pool = parse_prefix(match[2]) if match[2] else None
    except ValueError:
        return None

    # An id with another spelling of a prefix is not gipam's.
    if make_pool_id(subnet, sub_pool, match[3]) != pool_id:
        return None
    return subnet, sub_pool


def make_json_encoder() -> Callable[[Any, bool], Iterable[str]]:
    """Return a function that yields the JSON text of a value in pieces.

    JSONEncoder.encode() makes such a function in each call: encoding a record takes 4.5 us with it,
    8.6 us with json.dumps() and 3.2 us without (Python 3.11).
    """
    encoder = json.JSONEncoder(check_circular=False, separators=(",", ":"))
    make_encoder = getattr(json.encoder, "c_make_encoder", None)
    if make_encoder is None:
        # This Python does not have the module _json.
        return encoder.iterencode
    make_iterencode: Callable[[Any, bool], Iterable[str]] = make_encoder(
        None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",",
        False, False, True)
    return make_iterencode


iterencode_json = make_json_encoder()
# json.loads() would detect the encoding first.
raw_decode = json.JSONDecoder().raw_decode


def encode_json(value: Any) -> str:
    """Return compact JSON; the checksum is computed over exactly this form."""
    return "".join(iterencode_json(value, False))


class PoolGrant(NamedTuple):
    """Journal record: a pool was granted, adopted or imported."""

    pool_id: str
    subnet: str  # CIDR
    sub_pool: str  # CIDR or ""
    name: str  # gipam.name or ""
    granted_s: int  # UNIX time
    cursor: int  # offset of the next address to try
    next_block: int  # index to try next; -1: unchanged
    is_shared: bool = False  # with other hosts


class PoolRelease(NamedTuple):
    """Journal record: a pool was released, with its remaining leases."""

    pool_id: str


class AddressGrant(NamedTuple):
    """Journal record: an address was granted."""

    pool_id: str
    address: str  # bare
    kind: str
    mac: str
    name: str  # of the container (Docker 29 and later)
    granted_s: int
    cursor: int
    is_explicit: bool = False  # the user named the address


class AddressRelease(NamedTuple):
    """Journal record: an address was released; its last owners are remembered."""

    pool_id: str
    address: str


class PoolIdBinding(NamedTuple):
    """Journal record: an imported pool got its id from Docker's first request for it.

    Docker's API, from which the pool was imported, does not show ids.
    """

    pool_id: str  # with the token UNBOUND
    new_id: str


Record = Union[PoolGrant, PoolRelease, PoolIdBinding, AddressGrant, AddressRelease]


class Lease(NamedTuple):
    """An allocated address. There may be a million of these."""

    kind: str
    mac: str
    name: str
    granted_s: int
    seq: int  # of the record that granted it
    is_explicit: bool  # the user named the address

    @property
    def owners(self) -> tuple[str, ...]:
        """Return the owner's identities: container name, MAC address, or both."""
        if self.name and self.mac and self.name != self.mac:
            return (self.name, self.mac)
        owner = self.name or self.mac
        return (owner,) if owner else ()


class OffsetBitmap:
    """A set of offsets that finds the next absent one: bitmaps of 2,048 offsets each.

    Scanning a full /16 takes 32 steps (10 us). Larger bitmaps would make each step slower, and a
    lone offset in a /64 would cost more memory (up to 8,764 bytes with 65,536 offsets a bitmap, up
    to 300 with 2,048).
    """

    SHIFT = 11
    MASK = (1 << SHIFT) - 1

    def __init__(self) -> None:
        self._bitmaps: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._bitmaps)

    def __contains__(self, offset: int) -> bool:
        bitmap = self._bitmaps.get(offset >> self.SHIFT, 0)
        return bool(bitmap >> (offset & self.MASK) & 1)

    def add(self, offset: int) -> None:
        """Add the offset, which may be in the set."""
        index = offset >> self.SHIFT
        self._bitmaps[index] = self._bitmaps.get(index, 0) | 1 << (offset & self.MASK)

    def discard(self, offset: int) -> None:
        """Remove the offset, which may be absent."""
        index = offset >> self.SHIFT
        bitmap = self._bitmaps.pop(index, 0) & ~(1 << (offset & self.MASK))
        if bitmap:
            self._bitmaps[index] = bitmap

    def next_free(self, offset: int, *others: OffsetBitmap) -> int:
        """Return the first offset, from this one on, that is neither in this set nor in others."""
        while True:
            index = offset >> self.SHIFT
            used = self._bitmaps.get(index, 0)
            for other in others:
                used |= other._bitmaps.get(index, 0)  # noqa: SLF001
            used >>= offset & self.MASK

            # Adding 1 turns the ones at the low end into zeros, and the zero above them into a one.
            lowest_zero = (~used & (used + 1)).bit_length() - 1
            offset += lowest_zero
            if offset >> self.SHIFT == index:
                return offset


class BlockedRanges:
    """Ranges that no block may overlap: exclusions, routes and addresses of the host."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._firsts: list[int] = []
        # Running maximum, so that bisect works although ranges nest.
        self._lasts: list[int] = []
        highest = -1
        for first, last in sorted(ranges):
            highest = max(highest, last)
            self._firsts.append(first)
            self._lasts.append(highest)

    def find_overlap(self, first: int, last: int) -> int | None:
        """Return the last address of the first range that overlaps this one, or None."""
        index = bisect.bisect_left(self._lasts, first)
        if index == len(self._lasts) or self._firsts[index] > last:
            return None
        return self._lasts[index]


class PrefixTree:
    """A multiset of used prefixes of one family, and the free space that they leave.

    A node is a prefix, numbered as in a heap: 1 is the whole family, 2n and 2n+1 are the halves of
    n. Only nodes that contain or are contained in a used prefix are stored. For each the tree keeps
    the length of its largest free block and its number of free blocks of the default length.
    A query takes at most 32 or 128 steps, but for the blocked ranges that find_free() skips.
    """

    def __init__(self, address_bits: int, block_prefixlen: int) -> None:
        self.address_bits = address_bits
        self.block_prefixlen = block_prefixlen
        self._use_counts: collections.Counter[int] = collections.Counter()  # of nodes added
        self._free_space: dict[int, tuple[int, int]] = {}  # as free_space()

    def node_of(self, network: Network) -> int:
        """Return the node of a prefix."""
        return 1 << network.prefixlen | int(network[0]) >> self.address_bits - network.prefixlen

    def network_of(self, node: int) -> Network:
        """Return the prefix of a node."""
        prefixlen = node.bit_length() - 1
        first = (node ^ 1 << prefixlen) << self.address_bits - prefixlen
        return ipaddress.ip_network((first.to_bytes(self.address_bits // 8, "big"), prefixlen))

    def free_space(self, node: int) -> tuple[int, int]:
        """Return (prefixlen of the largest free block, count of free default blocks) in a node."""
        prefixlen = node.bit_length() - 1
        return self._free_space.get(node) or (prefixlen, (1 << self.block_prefixlen) >> prefixlen)

    def count_free_blocks(self, node: int) -> int:
        """Return how many blocks of the default length are free in a node."""
        if self._find_used(node):
            return 0
        return self.free_space(node)[1]

    def add(self, network: Network) -> None:
        """Add the prefix once more."""
        node = self.node_of(network)
        self._use_counts[node] += 1
        self._update_free_space(node)

    def remove(self, network: Network) -> None:
        """Remove the prefix once."""
        node = self.node_of(network)
        self._use_counts[node] -= 1
        if not self._use_counts[node]:
            del self._use_counts[node]
        self._update_free_space(node)

    def _update_free_space(self, node: int) -> None:
        """Update the free space of a node and of its ancestors."""
        while node:
            left = 2 * node
            right = left + 1
            if node in self._use_counts:
                self._free_space[node] = (self.address_bits + 1, 0)
            elif left in self._free_space or right in self._free_space:
                left_prefixlen, left_count = self.free_space(left)
                right_prefixlen, right_count = self.free_space(right)
                prefixlen = min(left_prefixlen, right_prefixlen)
                self._free_space[node] = (prefixlen, left_count + right_count)
            else:
                self._free_space.pop(node, None)
            node >>= 1

    def find_overlap(self, network: Network) -> Network | None:
        """Return a used prefix that contains this one, else one inside it, else None."""
        node = self.node_of(network)
        used = self._find_used(node)
        if used:
            return self.network_of(used)
        if node not in self._free_space:
            return None
        while node not in self._use_counts:
            node *= 2
            if node not in self._free_space:
                node += 1
        return self.network_of(node)

    def _find_used(self, node: int) -> int:
        """Return the used node that contains this one or is this one, 0 if there is none."""
        while node and node not in self._use_counts:
            node >>= 1
        return node

    def find_free(self, prefixlen: int, lowest: int, blocked: BlockedRanges,
                  node: int = 1) -> int | None:
        """Return the first free node of this length in a node, from node lowest on, or None."""
        shift = prefixlen - node.bit_length() + 1
        end = node + 1 << shift
        if self.free_space(node)[0] > prefixlen or end <= lowest:
            return None
        if node in self._free_space:
            left = self.find_free(prefixlen, lowest, blocked, 2 * node)
            return left or self.find_free(prefixlen, lowest, blocked, 2 * node + 1)

        block = max(node << shift, lowest)
        host_bits = self.address_bits - prefixlen
        while block < end:
            first = (block ^ 1 << prefixlen) << host_bits
            last_blocked = blocked.find_overlap(first, first | (1 << host_bits) - 1)
            if last_blocked is None:
                return block
            block = (1 << prefixlen | last_blocked >> host_bits) + 1
        return None


class PastLease(NamedTuple):
    """The last lease of an address, as its subnet remembers it after the release."""

    offset: int
    owners: tuple[str, ...]  # container name, MAC address, or both
    seq: int  # of the record that released it
    is_explicit: bool  # the user had named the address


class Affinity:
    """The past leases of a subnet, so that an owner gets its last address again.

    An address with a past lease is kept for its owners: another owner gets it only when no other
    address is free. Each owner has one address. Iteration yields the oldest release first, which
    is also forgotten first.
    """

    def __init__(self) -> None:
        self.offsets = OffsetBitmap()
        self._by_offset: dict[int, PastLease] = {}  # oldest release first
        self._by_owner: dict[str, PastLease] = {}

    def __iter__(self) -> Iterator[PastLease]:
        return iter(self._by_offset.values())

    def reclaim_order(self) -> Iterator[PastLease]:
        """Yield past leases in the order in which other owners get their addresses.

        Dynamic addresses come first, then those that a user named, because a container with --ip
        cannot start with another address. Of each kind, the oldest release is first.
        """
        for past in self:
            if not past.is_explicit:
                yield past
        for past in self:
            if past.is_explicit:
                yield past

    def last_offset(self, owner: str) -> int | None:
        """Return the offset that the owner had last, or None."""
        past = self._by_owner.get(owner)
        return past.offset if past else None

    def record(self, past: PastLease) -> None:
        """Remember a past lease, unless it had no owner; at the limit, forget the oldest."""
        if not past.owners:
            return
        self._forget(past.offset)
        for owner in past.owners:
            offset = self.last_offset(owner)
            if offset is not None:
                self._forget(offset)

        for owner in past.owners:
            self._by_owner[owner] = past
        self._by_offset[past.offset] = past
        self.offsets.add(past.offset)
        if len(self._by_offset) > MAX_AFFINITIES:
            oldest_offset = next(iter(self._by_offset))
            self._forget(oldest_offset)

    def restore(self, past_leases: Iterable[PastLease]) -> None:
        """Add saved past leases; of two that collide, the later release wins."""
        merged = sorted([*self, *past_leases], key=lambda past: (past.seq, past.offset))
        for past in merged:
            self._forget(past.offset)
        for past in merged:
            self.record(past)

    def _forget(self, offset: int) -> None:
        past = self._by_offset.pop(offset, None)
        if past is None:
            return
        self.offsets.discard(offset)
        for owner in past.owners:
            del self._by_owner[owner]


class Subnet:
    """A prefix in use, and the addresses that all pools of it have allocated."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.version: int = network.version
        self.first = int(network[0])
        self.last_offset = network.num_addresses - 1
        self.allocated = OffsetBitmap()  # the reserved offsets too
        self.affinity = Affinity()
        self.pools: dict[Network | None, Pool] = {}  # by sub_pool
        self.is_shared = False  # with other hosts
        for offset in self.reserved:
            self.allocated.add(offset)

    @property
    def reserved(self) -> set[int]:
        """Return the offsets that are never granted: the same as in Docker's built-in IPAM.

        Source: moby daemon/libnetwork/ipams/defaultipam/address_space.go
        """
        if self.version == 6:
            # The subnet-router anycast address.
            return {0}
        if self.last_offset >= 3:
            return {0, self.last_offset}
        return set()

    @property
    def first_pool(self) -> Pool:
        """Return the oldest pool."""
        pools = iter(self.pools.values())
        return next(pools)

    def find_free(self, low: int, high: int, *unavailable: OffsetBitmap) -> int | None:
        """Return the first offset of a range that is free and not unavailable, or None."""
        offset = self.allocated.next_free(low, *unavailable)
        return offset if offset <= high else None

    def find_lease(self, offset: int) -> Lease | None:
        """Return the lease at an offset, or None."""
        for pool in self.pools.values():
            if offset in pool.leases:
                return pool.leases[offset]
        return None


class Pool:
    """A subnet, or a range of it, that one Docker network was granted, and its leases."""

    def __init__(self, grant: PoolGrant, subnet: Subnet, seq: int) -> None:
        self.pool_id = grant.pool_id
        self.subnet = subnet
        self.sub_pool = parse_prefix(grant.sub_pool) if grant.sub_pool else None
        self.name = grant.name
        self.granted_s = grant.granted_s
        self.seq = seq  # of the grant
        self.cursor = grant.cursor
        self.leases: dict[int, Lease] = {}  # by offset in the subnet
        self._subnet_text = grant.subnet

        first, last = address_range(self.sub_pool or subnet.network)
        # Offsets of the first and the last dynamic address.
        self.low = first - subnet.first
        self.high = last - subnet.first

    @property
    def label(self) -> str:
        """Return the pool's name in the log."""
        if self.name:
            return f"{self._subnet_text} ({self.name})"
        return self._subnet_text

    def address_at(self, offset: int) -> str:
        """Return the bare address at the offset."""
        return format_address(self.subnet.first + offset, self.subnet.version)

    def offset_of(self, address: str) -> int:
        """Return the offset of a bare address, inside the subnet or not. Raises: ValueError."""
        return parse_address(address, self.subnet.version) - self.subnet.first

    def checked_offset(self, address: str) -> int:
        """Return the offset of a bare address in the subnet. Raises: ValueError."""
        offset = self.offset_of(address)
        if not 0 <= offset <= self.subnet.last_offset:
            raise ValueError(f"address {address} is outside {self.subnet.network}")
        return offset

    def capacity(self) -> int:
        """Return how many addresses of its range can be granted."""
        reserved = [offset for offset in self.subnet.reserved if self.low <= offset <= self.high]
        return self.high - self.low + 1 - len(reserved)


class BlockReservation(NamedTuple):
    """A block that is reserved for a gipam.name, and its past leases while no network uses it."""

    network: Network
    past_leases: tuple[PastLease, ...]
    seq: int  # of the last record about it


class Family:
    """The bases of IPv4 or IPv6, the free space in them, reservations, and the subnets in use."""

    def __init__(self, version: int, bases: list[Network], prefixlen: int,
                 excluded: list[Network]) -> None:
        self.version = version
        self.bases = bases
        self.prefixlen = prefixlen  # of a block, by default
        self.excluded = excluded
        self.used = PrefixTree(ADDRESS_BITS[version], prefixlen)  # here and on other hosts
        self.subnets: dict[Network, Subnet] = {}
        self.cursors: dict[int, int] = {}  # prefixlen -> index of the next block
        self.reservations: dict[str, BlockReservation] = {}  # by gipam.name, oldest first
        # Prefixes that claims block, which are in `used` too -> text that names the claim.
        self.remote_claims: dict[Network, str] = {}

    def find_block(self, bases: list[Network], prefixlen: int,
                   blocked: BlockedRanges) -> tuple[Network, int] | None:
        """Return (a free block, index of the next one to try), next-fit from the cursor, or None.

        An index counts the blocks of all these bases, in order.
        """
        counts = [1 << prefixlen - base.prefixlen for base in bases]
        total = sum(counts)
        cursor = self.cursors.get(prefixlen, 0) % total
        for start in (cursor, 0):
            base_index = 0  # of the first block of the base
            for base, count in zip(bases, counts):
                first = self.used.node_of(base) * count
                lowest = first + max(start - base_index, 0)
                node = self.used.find_free(prefixlen, lowest, blocked)
                if node and node < first + count:
                    next_index = (base_index + node - first + 1) % total
                    return self.used.network_of(node), next_index
                base_index += count
        return None

    def block_counts(self, *bases: Network) -> tuple[int, int, int]:
        """Return (total, used, excluded and unused) counts of blocks of the default length.

        A block that is used or excluded in part counts as a whole.
        """
        total = sum(1 << self.prefixlen - base.prefixlen for base in bases)
        excluded = []
        for network in self.excluded:
            if any(base.overlaps(network) for base in bases):
                excluded.append(address_range(network))
        used = total - self.count_free(map(address_range, bases))
        return total, used, self.count_free(excluded)

    def count_free(self, ranges: Iterable[Range]) -> int:
        """Return how many free blocks of the default length overlap these ranges, each a prefix."""
        host_bits = ADDRESS_BITS[self.version] - self.prefixlen
        blocks = {(first >> host_bits, last >> host_bits) for first, last in ranges}
        count = 0
        counted_last = -1
        for first, last in sorted(blocks, key=lambda block: (block[0], -block[1])):
            # Two prefixes nest or are disjoint: this one may lie in the previous one.
            if first <= counted_last:
                continue
            counted_last = last
            # A node's number halves from one level to the one above.
            node = (1 << self.prefixlen | first) // (last - first + 1)
            count += self.used.count_free_blocks(node)
        return count

    def find_conflict(self, network: Network, sub_pool: Network | None) -> Network | None:
        """Return a used prefix that conflicts with this request, or None.

        Different sub_pools of the same subnet do not conflict, so that macvlan networks can share
        it. Source: moby TestMacvlanIPAMOverlap
        """
        overlap = self.used.find_overlap(network)
        if overlap != network or not sub_pool:
            return overlap
        subnet = self.subnets.get(network)
        if subnet and None not in subnet.pools and sub_pool not in subnet.pools:
            return None
        return overlap

    def find_remote_conflict(self, network: Network) -> Network | None:
        """Return a used prefix that overlaps this subnet, which is in use here too, or None."""
        self.used.remove(network)
        overlap = self.used.find_overlap(network)
        self.used.add(network)
        return overlap

    def is_free_block(self, network: Network) -> bool:
        """Return whether the prefix is within a base and not in use."""
        is_in_base = any(is_subnet(network, base) for base in self.bases)
        return is_in_base and self.used.find_overlap(network) is None

    def reserve(self, name: str, reservation: BlockReservation) -> None:
        """Reserve a block for a name; at the limit, drop the oldest reservation."""
        self.reservations.pop(name, None)
        self.reservations[name] = reservation
        if len(self.reservations) > MAX_AFFINITIES:
            oldest = next(iter(self.reservations))
            del self.reservations[oldest]


class State:
    """The complete state. Only apply() changes it."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.seq = 0
        self.pools: dict[str, Pool] = {}
        self.lease_count = 0
        self.families = {family.version: family for family in families}

    def apply(self, record: Record) -> None:
        """Apply one record; it takes the next sequence number.

        Raises: ValueError if it contradicts the state, for example by granting an address twice;
        then nothing has changed.
        """
        pool = self.pools.get(record.pool_id)
        if isinstance(record, PoolGrant):
            if pool or not record.pool_id:
                raise ValueError(f"pool {record.pool_id!r} is held twice, or has no id")
            self._grant_pool(record)
        elif pool is None:
            raise ValueError(f"pool {record.pool_id!r} is not held")
        elif isinstance(record, AddressGrant):
            self._grant_address(record, pool)
        elif isinstance(record, AddressRelease):
            self._release_address(record, pool)
        elif isinstance(record, PoolRelease):
            self._release_pool(pool)
        else:
            self._bind_pool_id(record, pool)
        self.seq += 1

    def _grant_pool(self, grant: PoolGrant) -> None:
        network = parse_prefix(grant.subnet)
        family = self.families[network.version]
        subnet = family.subnets.get(network) or Subnet(network)
        pool = Pool(grant, subnet, self.seq + 1)
        conflict = family.find_conflict(network, pool.sub_pool)
        if conflict:
            raise ValueError(f"pool {network} overlaps {conflict}")
        if pool.sub_pool and not is_subnet(pool.sub_pool, network):
            raise ValueError(f"sub_pool {pool.sub_pool} is outside {network}")

        if pool.name:
            self._reserve_block(family, pool)
        if not subnet.pools:
            subnet.is_shared = grant.is_shared
            family.subnets[network] = subnet
            family.used.add(network)
        subnet.pools[pool.sub_pool] = pool
        self.pools[pool.pool_id] = pool
        if grant.next_block >= 0:
            family.cursors[network.prefixlen] = grant.next_block

    def _reserve_block(self, family: Family, pool: Pool) -> None:
        """Reserve the subnet of a new pool for its name, unless the name is in use elsewhere."""
        network = pool.subnet.network
        reservation = family.reservations.get(pool.name)
        if reservation:
            subnet = family.subnets.get(reservation.network)
            if subnet and any(other.name == pool.name for other in subnet.pools.values()):
                return
            if reservation.network == network:
                pool.subnet.affinity.restore(reservation.past_leases)
        family.reserve(pool.name, BlockReservation(network, (), pool.seq))

    def _release_pool(self, pool: Pool) -> None:
        subnet = pool.subnet
        family = self.families[subnet.version]
        seq = self.seq + 1
        del self.pools[pool.pool_id]
        del subnet.pools[pool.sub_pool]
        self.lease_count -= len(pool.leases)

        latest = itertools.islice(reversed(pool.leases.items()), MAX_SAVED_AFFINITIES)
        for offset, lease in sorted(latest):
            subnet.affinity.record(PastLease(offset, lease.owners, seq, lease.is_explicit))
        if subnet.pools:
            for offset in pool.leases.keys() - subnet.reserved:
                subnet.allocated.discard(offset)
            return

        del family.subnets[subnet.network]
        family.used.remove(subnet.network)
        reservation = family.reservations.get(pool.name)
        if reservation and reservation.network == subnet.network:
            past_leases = tuple(subnet.affinity)[-MAX_SAVED_AFFINITIES:]
            family.reserve(pool.name, BlockReservation(subnet.network, past_leases, seq))

    def _bind_pool_id(self, binding: PoolIdBinding, pool: Pool) -> None:
        if not binding.new_id or binding.new_id in self.pools:
            raise ValueError(f"pool {binding.new_id!r} is held twice, or has no id")
        del self.pools[binding.pool_id]
        self.pools[binding.new_id] = pool
        pool.pool_id = binding.new_id

    def _grant_address(self, grant: AddressGrant, pool: Pool) -> None:
        subnet = pool.subnet
        offset = pool.checked_offset(grant.address)
        if offset in subnet.allocated:
            raise ValueError(f"address {grant.address} of {subnet.network} is held twice")
        if grant.kind not in LEASE_KINDS:
            raise ValueError(f"{grant.kind!r:.40} is not a kind of lease")
        pool.leases[offset] = Lease(grant.kind, grant.mac, grant.name, grant.granted_s,
                                    self.seq + 1, grant.is_explicit)
        subnet.allocated.add(offset)
        pool.cursor = grant.cursor
        self.lease_count += 1

    def _release_address(self, release: AddressRelease, pool: Pool) -> None:
        subnet = pool.subnet
        offset = pool.offset_of(release.address)
        if offset not in pool.leases:
            raise ValueError(f"address {release.address} is not held in {subnet.network}")
        lease = pool.leases.pop(offset)
        # gipam was once a Go program, which granted broadcast addresses. They stay reserved.
        if offset not in subnet.reserved:
            subnet.allocated.discard(offset)
        past = PastLease(offset, lease.owners, self.seq + 1, lease.is_explicit)
        subnet.affinity.record(past)
        self.lease_count -= 1


# === Records ======================================================================================
#
# The two forms of the state on disk: a Record is a JSON array in the journal, and the whole state
# is the JSON object of the lease file (the snapshot). copy_state() takes a copy that later records
# do not change, encode_snapshot() yields its text in chunks, and decode_snapshot() reads it.
#
# The rule: nothing read from disk is trusted. Types and bounds are checked against the schemas
# here, the meaning in State.apply(). A value that contradicts them is a ValueError.

FORMAT = 1  # of the lease file and the journal
UNBOUND = "unbound"  # the token of an imported pool's id

# A schema is "", False, the least integer, [schema of each item], {"": schema of each value}, or
# (schema of the first item, ...) for an array of that length. The items of [] and {} are not
# checked. "Free" lists past blocks and addresses, as the Go program did; gipam does not read it.
STATE_KEYS: dict[str, Any] = {  # checksummed, in this order
    "Seq": 0,
    "V6Idx": 0,
    "V4Idx": 0,
    "Cursors": {"": 0},
    "Names": [[]],
    "Free": [],
    "Allocated": [{}],
}
RESERVATION_ROW = ("", "", 0, {"": (0, 0, False)})
POOL_KEYS: dict[str, Any] = {
    "ID": "",
    "V": 0,
    "Pool": "",
    "SubPool": "",
    "Name": "",
    "Granted": 0,
    "Seq": 0,
    "Idx": 0,
    "Remembered": {"": ("", 0, False)},
    "Free": [],
    "Shared": False,
    "Allocated": [],
    "Leases": [],
}
LEASE_TYPES = (str, str, str, int, int, bool)
FIELD_SCHEMAS: dict[str, Any] = {  # of records; other fields are text
    "granted_s": 0, "cursor": 0, "next_block": -1, "is_shared": False, "is_explicit": False}
RECORD_TYPES: dict[str, Any] = {
    "request_pool": PoolGrant,
    "release_pool": PoolRelease,
    "bind_pool": PoolIdBinding,
    "request_address": AddressGrant,
    "release_address": AddressRelease,
}
RECORD_NAMES = {record_type: name for name, record_type in RECORD_TYPES.items()}

# Keys of the later Go program -> those of the earlier one, which gipam writes.
KEY_ALIASES = {"v6": "V6Pool", "v6ab": "V6AllocateBlock", "v4": "V4Pool", "v4ab": "V4AllocateBlock"}
OPTION_KEYS = {**KEY_ALIASES, "exclude": "Exclude"}  # option -> its key in the lease file
LEASE_FILE_KEYS = ("Format", "Version", *OPTION_KEYS.values(), "Options", *STATE_KEYS, "Journal",
                   "Checksum")


def validate(label: str, value: Any, schema: Any) -> None:
    """Check a JSON value from disk against a schema. Raises: ValueError."""
    if isinstance(schema, tuple):
        is_valid = type(value) is list and len(value) == len(schema)
    else:
        is_valid = type(value) is type(schema)
    if is_valid and type(schema) is int:
        is_valid = schema <= value <= 1 << ADDRESS_BITS[6]
    if not is_valid:
        raise ValueError(f"{label} is {value!r:.80}, which gipam does not write there")

    if isinstance(schema, tuple):
        for item, item_schema in zip(value, schema):
            validate(label, item, item_schema)
    elif isinstance(schema, list) and schema:
        for item in value:
            validate(label, item, schema[0])
    elif isinstance(schema, dict) and schema:
        for item in value.values():
            validate(label, item, schema[""])


def read_keys(document: Json, schemas: Mapping[str, Any], label: str) -> Json:
    """Return the value of each key, an empty one if it is missing or null. Raises: ValueError."""
    values = {}
    for key, schema in schemas.items():
        value = document.get(key)
        if value is None:
            make_empty = type(schema)
            value = make_empty()
        validate(f"{key} of {label}", value, schema)
        values[key] = value
    return values


def normalise_keys(document: Json, keys: Iterable[str]) -> Json:
    """Return the document with its keys in the spelling of gipam; unknown ones stay."""
    spelling = {key.lower(): key for key in keys}
    spelling.update(KEY_ALIASES)
    return {spelling.get(key.lower(), key): value for key, value in document.items()}


def decode_record(row: Any) -> Record:
    """Return the record of a JSON array of the journal.

    Raises: ValueError; TypeError if it is not an array.
    """
    name, *values = row
    record_type = RECORD_TYPES.get(str(name))
    if not record_type:
        raise ValueError(f"{name!r:.40} is not a change that this version knows")
    schemas = [FIELD_SCHEMAS.get(field, "") for field in record_type._fields]
    validate(name, values, tuple(schemas))
    record: Record = record_type(*values)
    return record


class PoolCopy(NamedTuple):
    """A pool as of one moment. Its other fields, and each Lease, never change."""

    pool: Pool
    pool_id: str
    cursor: int
    leases: dict[int, Lease]
    past_leases: list[PastLease]  # of the subnet, with its first pool
    free_offsets: list[int]  # of those past leases


class StateCopy(NamedTuple):
    """The state as of one moment, taken between two iterations of the event loop."""

    header: Json
    reservations: list[tuple[str, BlockReservation]]  # with their names
    free_blocks: list[Network]
    pools: list[PoolCopy]


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Keep the garbage collector, which would stop all threads, from running in this block."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()


def copy_state(state: State) -> StateCopy:
    """Return a shallow copy of the state; it takes milliseconds."""
    header: Json = {"Seq": state.seq}
    cursors = {}
    reservations: list[tuple[str, BlockReservation]] = []
    free_blocks = []
    for version in (6, 4):
        family = state.families[version]
        header[f"V{version}Idx"] = family.cursors.get(family.prefixlen, 0)
        for prefixlen, index in family.cursors.items():
            if prefixlen != family.prefixlen:
                cursors[f"{version}/{prefixlen}"] = index
        reservations += family.reservations.items()
        for reservation in family.reservations.values():
            if reservation.network not in family.subnets:
                free_blocks.append(reservation.network)
    header["Cursors"] = cursors

    # A garbage collection would visit every copy: 100,000 leases take 4 ms with one, 2 ms without.
    with paused_collection():
        pools = [copy_pool(pool) for pool in state.pools.values()]
    return StateCopy(header, reservations, free_blocks, pools)


def copy_pool(pool: Pool) -> PoolCopy:
    """Return a copy of a pool; the first one of a subnet has the past leases of the subnet."""
    subnet = pool.subnet
    past_leases: list[PastLease] = []
    if pool is subnet.first_pool:
        past_leases = list(subnet.affinity)
    free_offsets = [past.offset for past in past_leases if past.offset not in subnet.allocated]
    return PoolCopy(pool, pool.pool_id, pool.cursor, dict(pool.leases), past_leases, free_offsets)


def encode_snapshot(config: Json, copy: StateCopy, segment: int | None) -> Iterator[str]:
    """Yield the lease file in chunks; later changes are in the segment."""
    keys = {"Format": FORMAT, "Version": __version__, **config, "Journal": segment}
    yield "{\n"
    for key, value in keys.items():
        if value:
            yield f"{encode_json(key)}:{encode_json(value)},\n"

    checksum = 0
    for chunk in encode_state(copy):
        checksum = zlib.crc32(chunk.encode(), checksum)
        yield chunk + "\n"
    yield f',"Checksum":"{checksum:08x}"}}\n'


def encode_state(copy: StateCopy) -> Iterator[str]:
    """Yield the STATE_KEYS in chunks: the JSON text that is checksummed."""
    yield encode_json(copy.header)[1:-1] + ',"Names":['
    yield from encode_items(itertools.starmap(reservation_to_json, copy.reservations),
                            NAMES_PER_CHUNK)
    yield '],"Free":['
    free_blocks = ({"V": block.version, "Pool": str(block)} for block in copy.free_blocks)
    yield from encode_items(free_blocks, LEASES_PER_CHUNK)
    yield '],"Allocated":['
    comma = ""
    for pool_copy in copy.pools:
        yield comma + encode_json(pool_to_json(pool_copy))[:-1] + ',"Allocated":['
        yield from encode_items(map(pool_copy.pool.address_at, pool_copy.leases),
                                LEASES_PER_CHUNK)
        yield '],"Leases":['
        yield from encode_items(pool_copy.leases.values(), LEASES_PER_CHUNK)
        yield "]}"
        comma = ","
    yield "]"


def encode_items(values: Iterable[Any], chunk_items: int) -> Iterator[str]:
    """Yield the text of a JSON array without its brackets, so many items at a time."""
    values = iter(values)
    comma = ""
    while True:
        items = list(itertools.islice(values, chunk_items))
        if not items:
            return
        yield comma + encode_json(items)[1:-1]
        comma = ","


def reservation_to_json(name: str, reservation: BlockReservation) -> list[Any]:
    """Return a RESERVATION_ROW."""
    owners = {}
    for past in reservation.past_leases:
        for owner in past.owners:
            owners[owner] = (past.offset, past.seq, past.is_explicit)
    return [name, str(reservation.network), reservation.seq, owners]


def pool_to_json(copy: PoolCopy) -> Json:
    """Return the POOL_KEYS of a pool, except Allocated and Leases, which may be long."""
    pool = copy.pool
    owners = {}
    for past in copy.past_leases:
        address = pool.address_at(past.offset)
        for owner in past.owners:
            owners[owner] = (address, past.seq, past.is_explicit)

    return {
        "ID": copy.pool_id,
        "V": pool.subnet.version,
        "Pool": str(pool.subnet.network),
        "SubPool": str(pool.sub_pool or ""),
        "Name": pool.name,
        "Granted": pool.granted_s,
        "Seq": pool.seq,
        "Idx": copy.cursor,
        "Remembered": owners,
        "Free": [pool.address_at(offset) for offset in sorted(copy.free_offsets)],
        "Shared": pool.subnet.is_shared,
    }


def require_format(document: Json) -> None:
    """Check that this version can read a lease file. Raises: ValueError.

    Files of the Go program have neither a Format nor a Checksum.
    """
    file_format = document.get("Format")
    if file_format is None and "Checksum" not in document:
        return
    if type(file_format) is not int or file_format < 1:
        raise ValueError(f"has Format {file_format!r:.40}, which no release of gipam has written")
    if file_format > FORMAT:
        version = printable(str(document.get("Version")))
        raise ValueError(f"has format {file_format} and needs gipam {version} or later: this is "
                         f"gipam {__version__}, which reads format {FORMAT}")


def decode_snapshot(document: Json, state: State) -> None:
    """Fill the empty state from a lease file.

    Raises: ValueError; LookupError and TypeError if keys are missing or of another type.
    """
    if "Checksum" in document:
        text = encode_json({key: document[key] for key in STATE_KEYS})[1:-1]
        if document["Checksum"] != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("its checksum does not match its content from Seq on")
    values = read_keys(document, STATE_KEYS, "the state")

    # pop() frees the memory of each entry for the next pool.
    entries = values["Allocated"]
    entries.reverse()
    while entries:
        decode_pool(entries.pop(), state)

    for version, family in state.families.items():
        family.cursors[family.prefixlen] = values[f"V{version}Idx"]
    for key, index in values["Cursors"].items():
        version_text, _, prefixlen_text = key.partition("/")
        version = int(version_text)
        prefixlen = int(prefixlen_text)
        if not 0 <= prefixlen <= ADDRESS_BITS[version]:
            raise ValueError(f"Cursors has {key!r}, which is not a length of IPv{version}")
        state.families[version].cursors[prefixlen] = index
    for row in values["Names"]:
        validate("Names", row, RESERVATION_ROW)
        name, text, seq, owners = row
        reservation = BlockReservation(parse_prefix(text), tuple(decode_past_leases(owners)), seq)
        network = reservation.network
        if any(past.offset >= network.num_addresses for past in reservation.past_leases):
            raise ValueError(f"{name} has owners outside {network}")
        state.families[network.version].reserve(name, reservation)
    state.seq = values["Seq"]


def decode_past_leases(rows: Json) -> list[PastLease]:
    """Return the past leases of the rows owner -> (offset, seq, is_explicit)."""
    owners_of_lease: dict[tuple[int, int, bool], list[str]] = {}
    for owner, row in rows.items():
        owners_of_lease.setdefault(tuple(row), []).append(owner)
    past_leases = []
    for (offset, seq, is_explicit), owners in owners_of_lease.items():
        past_leases.append(PastLease(offset, tuple(owners), seq, is_explicit))
    return past_leases


def convert_leases(entry: Json) -> Json:
    """Convert lease rows to Lease while the JSON is still being parsed (object_hook).

    Lists that live longer would fragment the memory: 495 bytes a lease instead of 315.
    """
    # decode_leases() reports an invalid row.
    with contextlib.suppress(LookupError, ValueError, TypeError):
        entry["Leases"] = [Lease(sys.intern(kind), *fields) for kind, *fields in entry["Leases"]]
    return entry


def decode_pool(entry: Json, state: State) -> None:
    """Add a pool of a lease file, with its leases. Raises: as decode_snapshot()."""
    label = f"pool {entry.get('ID')!r:.80}"
    values = read_keys(entry, POOL_KEYS, label)
    # Without its name, so that no block is reserved: reservations are read from Names.
    state.apply(PoolGrant(
        pool_id=values["ID"], subnet=values["Pool"], sub_pool=values["SubPool"], name="",
        granted_s=values["Granted"], cursor=values["Idx"], next_block=-1,
        is_shared=values["Shared"]))
    pool = state.pools[values["ID"]]
    pool.name = values["Name"]
    pool.seq = values["Seq"]
    if values["V"] not in (0, pool.subnet.version):
        raise ValueError(f"{label} is of another family than V says")

    addresses = values["Allocated"]
    leases = values["Leases"]
    if "Leases" not in entry:
        # The Go program saved addresses alone.
        leases = [Lease(ENDPOINT, "", "", 0, 0, False) for _ in addresses]
    if len(leases) != len(addresses):
        raise ValueError(f"{label} has {len(addresses)} addresses, {len(leases)} leases")
    decode_leases(pool, addresses, leases)
    state.lease_count += len(pool.leases)

    rows = {}
    for owner, (address, seq, is_explicit) in values["Remembered"].items():
        rows[owner] = (pool.checked_offset(address), seq, is_explicit)
    pool.subnet.affinity.restore(decode_past_leases(rows))


def decode_leases(pool: Pool, addresses: list[Any], leases: list[Any]) -> None:
    """Add leases to a pool. Raises: ValueError."""
    subnet = pool.subnet
    for address, lease in zip(addresses, leases):
        offset = pool.checked_offset(address)
        is_reserved = offset in subnet.reserved and offset not in pool.leases
        if offset in subnet.allocated and not is_reserved:
            raise ValueError(f"address {address} of {subnet.network} is held twice")
        if tuple(map(type, lease)) != LEASE_TYPES or lease[0] not in LEASE_KINDS:
            raise ValueError(f"address {address} of {subnet.network} has {lease!r:.80}, which is "
                             "not a lease")
        subnet.allocated.add(offset)
        pool.leases[offset] = lease if isinstance(lease, Lease) else Lease(*lease)


# === Allocator ====================================================================================
#
# The policy: which subnet a network gets, and which address a container. A decision takes the state
# and a request (PoolRequest, AddressRequest), and returns the record that grants it, or raises the
# error for Docker, in the words of moby's ipamapi/contract.go.
#
# The rule: decisions are pure. They change nothing, and all other inputs (the time, a token, the
# host's routes) are arguments.


class PoolRequest(NamedTuple):
    """A request for a subnet, or for any free block of a length."""

    version: int
    subnet: Network | None  # None: any block
    sub_pool: Network | None
    prefixlen: int | None  # of the block; None: the default
    name: str
    is_shared: bool = False  # with other hosts


class AddressRequest(NamedTuple):
    """A request for the address of a container, a gateway, or an auxiliary address.

    An import names every address, but is_explicit only those that a user has named to Docker.
    """

    address: str  # bare, or "": any
    kind: str
    mac: str
    name: str
    is_explicit: bool = False  # the user named the address


def decide_pool(state: State, request: PoolRequest, routes: list[Range], now_s: int,
                token: str) -> PoolGrant:
    """Decide which subnet a network gets. Raises: InvalidRequest, Forbidden, Unavailable."""
    subnet = request.subnet
    next_block = -1
    if subnet is None:
        subnet, next_block = choose_block(state.families[request.version], request, routes)
    else:
        require_grantable(state, subnet, request.sub_pool, now_s)
    grant = make_pool_grant(subnet, request.sub_pool, token, now_s)
    return grant._replace(name=request.name, next_block=next_block, is_shared=request.is_shared)


def make_pool_grant(subnet: Network, sub_pool: Network | None, token: str, now_s: int) -> PoolGrant:
    """Return a grant of a subnet, or a range of it, with the cursor at the first address."""
    cursor = int((sub_pool or subnet)[0]) - int(subnet[0])
    return PoolGrant(make_pool_id(subnet, sub_pool, token), str(subnet), str(sub_pool or ""),
                     name="", granted_s=now_s, cursor=cursor, next_block=-1)


def decide_adoption(state: State, pool_id: str, address: str, now_s: int,
                    token: str, guesses_gateway: bool) -> Iterator[Record]:
    """Adopt the pool of an id that the state lacks, for a request of an address in it.

    Docker does not request the gateway again. Most likely it is the first address, so that one is
    allocated until Docker's API shows the pool. Other addresses are probably in use too, so the
    cursor starts at a random place in the lower half. Apply each record before the next.
    Raises: InvalidRequest if gipam did not make the id, or its subnet could not be granted now.
    """
    subnet, sub_pool = require_pool_id(pool_id)
    try:
        require_grantable(state, subnet, sub_pool, now_s)
    except GipamError as error:
        raise InvalidRequest(f"cannot find address pool for {pool_id!r}, nor adopt it: {error}",
                             404) from None

    grant = make_pool_grant(subnet, sub_pool, "", now_s)
    lower_half = (sub_pool or subnet).num_addresses // 2 - 2
    start = 2 + int(token, 16) % max(lower_half, 1)
    yield grant._replace(pool_id=pool_id, cursor=grant.cursor + start)
    if not guesses_gateway:
        return
    pool = state.pools[pool_id]
    first = pool.subnet.allocated.next_free(pool.low)
    if pool.capacity() > 1 and first <= pool.high and pool.address_at(first) != address:
        yield decide_address(pool, AddressRequest("", GATEWAY, "", ""), now_s)


def require_pool_id(pool_id: str) -> tuple[Network, Network | None]:
    """Return (subnet, sub_pool) of an id that gipam made. Raises: InvalidRequest."""
    parsed = parse_pool_id(pool_id)
    if parsed is None:
        raise InvalidRequest(f"cannot find address pool for {pool_id!r}: no pool has this id", 404)
    return parsed


def decide_import(state: State, subnet: Network, sub_pool: Network | None, name: str,
                  requests: list[AddressRequest], seq: int, now_s: int) -> Iterator[Record]:
    """Import the pool and addresses that the state lacks; apply each record before the next.

    The pool must still be the one that record seq granted; 0: there must be none. The cursor of a
    new pool starts after its first endpoint, because later calls may import other addresses.
    Raises: Forbidden, InvalidRequest, as require_grantable(), all before the first record.
    """
    known = state.families[subnet.version].subnets.get(subnet)
    pool = known.pools.get(sub_pool) if known else None
    known_seq = pool.seq if pool else 0
    if seq != known_seq:
        raise Forbidden(f"pool {sub_pool or subnet} has changed since change {seq}: look again")
    if pool is None:
        require_grantable(state, subnet, sub_pool, now_s)

    grant = make_pool_grant(subnet, sub_pool, UNBOUND, now_s)._replace(name=name)
    bounds = Pool(grant, Subnet(subnet), 0)
    has_endpoint = False
    for request in requests:
        if not request.address:
            continue
        offset = parse_offset(bounds, request.address)
        if not 0 <= offset <= bounds.subnet.last_offset:
            raise InvalidRequest(f"{request.address} is not in {subnet}")
        is_endpoint = request.kind == ENDPOINT and bounds.low <= offset <= bounds.high
        if is_endpoint and not has_endpoint:
            grant = grant._replace(cursor=offset + 1)
            has_endpoint = True

    if pool is None:
        yield grant
        pool = state.pools[grant.pool_id]
    for request in requests:
        # An address that is allocated already stays as it is.
        with contextlib.suppress(Forbidden, Unavailable):
            yield decide_address(pool, request, now_s)


def require_grantable(state: State, subnet: Network, sub_pool: Network | None, now_s: int) -> None:
    """Check that a subnet, or a range of it, may be granted. Raises: InvalidRequest, Forbidden."""
    if is_size_hint(subnet):
        raise InvalidRequest(f"invalid address pool: {subnet} means any block of this length")
    if sub_pool and not is_subnet(sub_pool, subnet):
        raise InvalidRequest(f"invalid address subpool: {sub_pool} is not within {subnet}")
    family = state.families[subnet.version]
    conflict = family.find_conflict(subnet, sub_pool)
    if conflict is None:
        return

    reason = f"Pool overlaps with other one on this address space: {subnet} with {conflict}"
    if conflict not in family.subnets:
        raise Forbidden(f"{reason}, claimed by {family.remote_claims[conflict]}")
    used = family.subnets[conflict]
    pool = used.pools.get(sub_pool) or used.first_pool
    age = format_age(now_s - pool.granted_s)
    raise Forbidden(f"{reason}, held by pool {pool.pool_id!r} for {age}; if no network uses it any "
                    "more, `gipam check --fix` releases it")


def format_age(age_s: int) -> str:
    """Return a duration in its largest whole unit, such as 3h."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s // unit_s}{unit}"
    return f"{max(age_s, 0)}s"


def choose_block(family: Family, request: PoolRequest,
                 routes: list[Range]) -> tuple[Network, int]:
    """Return a free block, and the index of the block to try next (-1: unchanged).

    The block reserved for the name is preferred; then, next-fit, one without a reservation; then
    any free block. Raises: InvalidRequest for an impossible length, Unavailable.
    """
    prefixlen = family.prefixlen if request.prefixlen is None else request.prefixlen
    bases = choose_bases(family, prefixlen)
    blocked = [*routes, *map(address_range, family.excluded)]

    reservation = family.reservations.get(request.name)
    if reservation and reservation.network.prefixlen == prefixlen:
        block = reservation.network
        overlap = BlockedRanges(blocked).find_overlap(*address_range(block))
        if overlap is None and family.is_free_block(block):
            return block, -1

    reserved = [address_range(other.network) for other in family.reservations.values()]
    for ranges in (blocked + reserved, blocked):
        block_and_next = family.find_block(bases, prefixlen, BlockedRanges(ranges))
        if block_and_next:
            return block_and_next
    total, used, excluded = family.block_counts(*bases)
    raise Unavailable(f"all predefined address pools have been fully subnetted: of {total} blocks "
                      f"of /{family.prefixlen} in {', '.join(map(str, bases))}, {used} are held, "
                      f"{excluded} excluded, and {total - used - excluded} overlap routes "
                      "or addresses of this host or are in pieces smaller than that")


def choose_bases(family: Family, prefixlen: int) -> list[Network]:
    """Return the bases that have blocks of this length. Raises: InvalidRequest, Unavailable."""
    if not family.bases:
        raise Unavailable(f"no IPv{family.version} base to take a subnet from: start gipam with "
                          f"-v{family.version} PREFIX, or give the network a --subnet")
    shortest = min(base.prefixlen for base in family.bases)
    longest = ADDRESS_BITS[family.version]
    if not shortest <= prefixlen <= longest:
        raise InvalidRequest(f"invalid address pool: the IPv{family.version} bases have blocks of "
                             f"/{shortest} to /{longest}, not of /{prefixlen}")
    return [base for base in family.bases if base.prefixlen <= prefixlen]


def decide_address(pool: Pool, request: AddressRequest, now_s: int, start: int | None = None,
                   *unavailable: OffsetBitmap) -> AddressGrant:
    """Decide which address is granted; in a shared subnet, other hosts have `unavailable` ones.

    Raises: InvalidRequest, Forbidden, Unavailable.
    """
    subnet = pool.subnet
    cursor = pool.cursor
    offset: int | None
    if request.address:
        offset = require_free(pool, request)
    elif request.kind == GATEWAY:
        offset = subnet.find_free(pool.low, pool.high, *unavailable)
    else:
        owners = (request.name, request.mac)
        offset, cursor = choose_offset(pool, owners, start, *unavailable)

    if offset is None:
        where = ", here or by other hosts" if unavailable else ""
        raise Unavailable(f"no available addresses on this pool: all {pool.capacity()} of "
                          f"{pool.sub_pool or subnet.network} are held{where}")
    return AddressGrant(pool.pool_id, pool.address_at(offset), request.kind, request.mac,
                        request.name, now_s, cursor, request.is_explicit)


def choose_offset(pool: Pool, owners: Iterable[str], start: int | None = None,
                  *unavailable: OffsetBitmap) -> tuple[int | None, int]:
    """Return (offset, new cursor) of a dynamic address; the offset is None if there is none.

    The last address of an owner is preferred; then the next one, from the start (by default the
    cursor) on, that is not kept for its last owners; then the one that was released longest ago.
    """
    subnet = pool.subnet
    for owner in owners:
        last = subnet.affinity.last_offset(owner)
        if last is not None and is_available(pool, last, *unavailable):
            return last, pool.cursor

    if start is None:
        start = max(pool.cursor, pool.low)
    for first in (start, pool.low):
        offset = subnet.find_free(first, pool.high, subnet.affinity.offsets, *unavailable)
        if offset is not None:
            return offset, offset + 1
    return choose_reclaimed(pool, *unavailable), pool.cursor


def choose_reclaimed(pool: Pool, *unavailable: OffsetBitmap) -> int | None:
    """Return the offset to take from its last owners, or None.

    It takes at most 2 * MAX_AFFINITIES steps.
    """
    subnet = pool.subnet
    if subnet.find_free(pool.low, pool.high, *unavailable) is None:
        return None
    for past in subnet.affinity.reclaim_order():
        if is_available(pool, past.offset, *unavailable):
            return past.offset
    return None


def is_available(pool: Pool, offset: int, *unavailable: OffsetBitmap) -> bool:
    """Return whether an offset is in the range of the pool, free, and not unavailable."""
    is_in_range = pool.low <= offset <= pool.high
    return is_in_range and pool.subnet.find_free(offset, offset, *unavailable) is not None


def parse_offset(pool: Pool, address: str) -> int:
    """Return the offset of an address, inside the subnet or not. Raises: InvalidRequest."""
    try:
        return pool.offset_of(address)
    except ValueError as error:
        raise InvalidRequest(f"invalid address: {error} of {pool.subnet.network}") from None


def require_free(pool: Pool, request: AddressRequest) -> int:
    """Return the offset of the requested address. Raises: InvalidRequest, Forbidden."""
    subnet = pool.subnet
    address = request.address
    offset = parse_offset(pool, address)
    if not 0 <= offset <= subnet.last_offset:
        raise InvalidRequest(f"requested address is out of range: {address} is not in "
                             f"{subnet.network}")
    if offset not in subnet.allocated:
        return offset

    lease = subnet.find_lease(offset)
    if lease is None:
        use = "reserved"
    elif lease.owners:
        use = f"held for {lease.owners[0]}"
    else:
        use = f"held as {lease.kind}"
    raise Forbidden(f"Address already in use: {address} is {use} in {subnet.network}")


def decide_address_release(pool: Pool, address: str) -> AddressRelease | None:
    """Release an address of this pool; None: the pool does not have it. Raises: InvalidRequest."""
    offset = parse_offset(pool, address)
    if offset not in pool.leases:
        return None
    return AddressRelease(pool.pool_id, pool.address_at(offset))


# === Journal ======================================================================================
#
# The lease file (a snapshot of the state), the journal segments beside it, and their locks. A Store
# knows records and bytes, not their meaning. A Segment is one open, locked journal file, and a
# CommitRecord is one line of it: all changes of one iteration of the event loop.
#
# A record is acknowledged only after it is written to preallocated space and synced. What a failed
# sync leaves on the disk is unknown, so the process then exits and recovers. Files are created,
# renamed and removed only in the loop thread, one step an iteration; the checkpoint thread only
# writes the temporary file. Nothing is read or truncated before every segment is locked.


class CommitRecord(NamedTuple):
    """The changes of one iteration of the event loop, as one line of a segment."""

    number: int  # of the line
    offset: int  # of its first byte
    end: int  # past its last byte
    seq: int  # of its last change
    records: list[Any]


RECORD_HEADER = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
RECORD_HEADER_BYTES = 18


def encode_record(seq: int, records: Iterable[str]) -> bytes:
    """Return the line of the journal: length and CRC-32 of the JSON text, then that text."""
    payload = f"[{seq},[{','.join(records)}]]".encode()
    return b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)


def decode_payload(payload: bytes) -> tuple[int, list[Any]]:
    """Return (seq, records) of the JSON text of a line.

    Raises: ValueError, TypeError, RecursionError.
    """
    seq, records = json.loads(payload)
    if type(seq) is not int or type(records) is not list or not records:
        raise ValueError
    return seq, records


def decode_records(data: bytes) -> Iterator[CommitRecord]:
    """Yield the records of a segment, up to a torn one or the preallocated zeros.

    Raises: ValueError with the line and its offset.
    """
    data = data.rstrip(b"\0")
    offset = 0
    number = 1
    while offset < len(data):
        header = RECORD_HEADER.match(data, offset)
        start = offset + RECORD_HEADER_BYTES
        end = start + int(header[1], 16) if header else len(data)
        payload = data[start:end]

        is_terminated = data[end:end + 1] == b"\n"
        if not header or not is_terminated or zlib.crc32(payload) != int(header[2], 16):
            if is_torn(data, offset, end if header else None):
                return
            raise ValueError(f"line {number} at byte {offset} does not match its length and "
                             "checksum")
        try:
            seq, records = decode_payload(payload)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"line {number} at byte {offset} is not a commit record") from None
        yield CommitRecord(number, offset, end + 1, seq, records)
        offset = end + 1
        number += 1


def is_torn(data: bytes, offset: int, end: int | None) -> bool:
    """Return whether the bytes from the offset on can be a torn last record.

    Such a record was never acknowledged. A kill truncates it. After a power cut each sector holds
    either the new bytes or the preallocated zeros (JSON has no NUL). The new bytes may begin at the
    start of the record, or where an earlier short write ended; the first sector may hold a single
    byte of them. `end` is where the header says that the record ends, None without a header. The
    data has no trailing zeros.
    """
    tail = data[offset:]
    if b"\n" in tail[:-1]:
        return False

    if b"\0" not in tail:
        if end is None:
            return len(tail) < RECORD_HEADER_BYTES and not tail.endswith(b"\n")
        return len(data) <= end and not tail.endswith(b"\n")

    if end is None and b"\0" not in tail[:RECORD_HEADER_BYTES]:
        return False
    if end is not None and len(data) > end + 1:
        return False
    first_sector = offset - offset % SECTOR_BYTES
    for start in range(first_sector, len(data), SECTOR_BYTES):
        sector = data[start:start + SECTOR_BYTES]
        if b"\0" in sector.rstrip(b"\0"):
            return False
    return True


def join_chunks(texts: Iterable[str]) -> Iterator[bytes]:
    """Yield the joined text in chunks of at least CHUNK_BYTES, and a last one, which may be empty.

    CHUNK_BYTES is a good size for a disk and a socket.
    """
    chunk = ""
    for text in texts:
        chunk += text
        if len(chunk) >= CHUNK_BYTES:
            yield chunk.encode()
            chunk = ""
    yield chunk.encode()


class DiskFile:
    """An open regular file. It is written through `syscalls`, so that tests can make calls fail."""

    def __init__(self, syscalls: Any, path: str, flags: int = os.O_RDWR) -> None:
        """Open the file. Raises: OSError, also for a directory, a FIFO and a symbolic link."""
        self.path = path
        self._syscalls = syscalls
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self.fd: int = syscalls.open(path, flags, 0o600)
        if not stat.S_ISREG(syscalls.fstat(self.fd).st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", path)

    def read(self) -> bytes:
        """Return the whole content. Raises: OSError."""
        # Closing any descriptor of a file drops all POSIX locks that the process has on it.
        with open(self.fd, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, data: bytes, offset: int) -> None:
        """Write all of the data at the offset. Raises: OSError."""
        while data:
            written = self._syscalls.pwrite(self.fd, data, offset)
            data = data[written:]
            offset += written

    def is_in_place(self) -> bool:
        """Return whether the path still names this file."""
        try:
            status = self._syscalls.stat(self.path)
            return bool(os.path.samestat(self._syscalls.fstat(self.fd), status))
        except OSError:
            return False

    def close(self) -> None:
        """Close the file. An error is ignored, because the data was synced before."""
        with contextlib.suppress(OSError):
            self._syscalls.close(self.fd)


class Segment(DiskFile):
    """One journal segment. This process holds its lock until it is closed."""

    def __init__(self, syscalls: Any, path: str, number: int, flags: int = os.O_RDWR) -> None:
        """Open and lock the segment. Raises: AlreadyRunning, OSError."""
        super().__init__(syscalls, path, flags)
        self.number = number
        self.end = 0  # past the last record
        self.allocated = 0  # end of the preallocated space
        self.last_record = b""  # as read by recovery
        try:
            syscalls.lockf(self.fd, os.F_TLOCK, 0)
        except BlockingIOError:
            self.close()
            raise AlreadyRunning(f"{path} is written by another gipam: stop it, or give this one "
                                 "another -file") from None

    def is_blank(self) -> bool:
        """Return whether no record was ever written to it. Raises: OSError."""
        return not self.read().strip(b"\0")

    def read_records(self) -> Iterator[CommitRecord]:
        """Yield the records, and find the end of the last one. Raises: ValueError, OSError."""
        data = self.read()
        self.end = 0
        self.last_record = b""
        for record in decode_records(data):
            self.end = record.end
            self.last_record = data[record.offset:record.end]
            yield record
        if data[self.end:].strip(b"\0"):
            log.warning("dropped a torn record of %s, from byte %d on: it was never acknowledged",
                        self.path, self.end)

    def write_zeros(self, needed: int) -> int:
        """Write zeros after the preallocated space; return where they end, to be synced.

        That is PREALLOCATE_BYTES further, or on a nearly full disk as far as needed.
        Raises: OSError.
        """
        end = max(self.allocated + PREALLOCATE_BYTES, needed)
        try:
            self._extend(end)
        except OSError:
            end = needed
            self._extend(end)
        return end

    def _extend(self, end: int) -> None:
        """Write zeros up to the offset. Raises: OSError, with the length as before."""
        try:
            self.write(bytes(end - self.allocated), self.allocated)
        except OSError:
            # The zeros that fitted would take the last space of the disk.
            self._syscalls.ftruncate(self.fd, self.allocated)
            raise

    def truncate(self) -> None:
        """Cut off all after the last record, and write that record again. Raises: OSError.

        After a failed sync the page cache shows the record as clean, though the disk may lack it.
        """
        self._syscalls.ftruncate(self.fd, self.end)
        self.allocated = self.end
        # A full disk must not prevent a start.
        with contextlib.suppress(OSError):
            self.write(self.last_record, self.end - len(self.last_record))


class Store:
    """The lease file, its journal segments and its lock.

    To open one: lock(), lock_segments(), read_snapshot(), replay(), prepare_append(). Then
    reserve() and append() write one record per iteration; rotate(), create_temp(), write_temp(),
    publish_temp() and remove_segment() are the steps of a checkpoint, in this order.

    A full disk is noticed by reserve(), before anything changes: the request fails, and probe()
    finds out when the disk accepts writes again. If append() fails half-way, Service.commit()
    reads the state again from disk, where the torn record is dropped.
    """

    def __init__(self, path: str, syscalls: Any = os) -> None:
        self.path = path
        self.seq = 0  # of the last change on disk
        # The segment that continues the snapshot, as the snapshot itself says.
        self.referenced_segment: int | None = None
        self.snapshot_id: tuple[int, ...] = ()  # of the lease file as read or written
        self.fatal_error: FatalStoreError | None = None  # nothing is written after it
        self.last_error = ""  # why the last write failed
        self._syscalls = syscalls
        self._directory = os.path.dirname(path) or "."
        self._temp_path = path + ".tmp"
        self._lock_file: DiskFile | None = None
        self._segments: dict[int, Segment] = {}  # all during recovery, later the active one
        self.active: Segment | None = None
        self._reserved_bytes = 0  # for the next record

    @property
    def segment(self) -> int:
        """Return the number of the active segment, 0 if there is none yet."""
        return self.active.number if self.active else 0

    @property
    def journal_bytes(self) -> int:
        """Return the length of the records in the active segment."""
        return self.active.end if self.active else 0

    @property
    def snapshot_bytes(self) -> int:
        """Return the length of the lease file."""
        return self.snapshot_id[1] if self.snapshot_id else 0

    def fail(self, text: str) -> FatalStoreError:
        """Record the fatal error and return it; nothing is written afterwards."""
        self.last_error = text
        self.fatal_error = FatalStoreError(text)
        return self.fatal_error

    def corruption(self, location: str, reason: str, remedy: str = "") -> CorruptionError:
        """Return the error that names the location, the reason and the remedy."""
        remedy = remedy or (f"restore a backup; or move {self.path}* away: gipam then starts "
                            "without them and recovers what Docker uses")
        return CorruptionError(f"{location} {reason}; gipam refuses to guess: {remedy}")

    # Opening

    def lock(self, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Lock the lease file for the life of this process. Raises: AlreadyRunning, OSError.

        The process that holds this lock, and the locks of all segments, is the only one that
        writes the lease file or its journal.
        """
        deadline_s = time.monotonic() + timeout_s
        lock_file = DiskFile(self._syscalls, self.path + ".lock", os.O_RDWR | os.O_CREAT)
        self._lock_file = lock_file
        while True:
            try:
                fcntl.flock(lock_file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    holder = lock_file.read()[:20].decode("ascii", "replace").strip()
                    raise AlreadyRunning(f"lease file {self.path} is held by process {holder}: "
                                         "stop it, or give this one another -file") from None
                time.sleep(0.02)

        # A full disk must not prevent a start.
        with contextlib.suppress(OSError):
            os.ftruncate(lock_file.fd, 0)
            os.pwrite(lock_file.fd, b"%d\n" % os.getpid(), 0)

    def lock_segments(self) -> None:
        """Lock all segments, so that no other process writes. Raises: GipamError, OSError."""
        while set(self._segments) != set(self.segment_numbers()):
            self.close()
            # Another process may remove segments meanwhile, as the last step of a checkpoint.
            with contextlib.suppress(FileNotFoundError):
                for number in self.segment_numbers():
                    path = self.segment_path(number)
                    self._segments[number] = Segment(self._syscalls, path, number)

    def close(self) -> None:
        """Close the segments, which unlocks them."""
        self.active = None
        while self._segments:
            _, segment = self._segments.popitem()
            segment.close()

    def segment_numbers(self) -> list[int]:
        """Return the numbers of the segments on disk, oldest first. Raises: CorruptionError."""
        prefix = os.path.basename(self.path) + ".journal."
        numbers = []
        for name in self._syscalls.listdir(self._directory):
            suffix = name[len(prefix):]
            if not name.startswith(prefix) or not suffix.isdecimal():
                continue
            if not re.fullmatch("[1-9][0-9]*", suffix):
                raise self.corruption(os.path.join(self._directory, name),
                                      "is not a name that gipam gives",
                                      "move it away, or give it the name it had")
            numbers.append(int(suffix))
        return sorted(numbers)

    def segment_path(self, number: int) -> str:
        """Return the path of a segment."""
        return f"{self.path}.journal.{number}"

    def read_snapshot(self, object_hook: Any = None) -> Json | None:
        """Return the JSON object of the lease file, None if there is no file.

        Raises: CorruptionError, OSError.
        """
        try:
            file = DiskFile(self._syscalls, self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if not self.snapshot_id:
            self.snapshot_id = self._identify(self.path)
        if os.fstat(file.fd).st_mode & 0o077:
            log.warning("%s is open to other users: chmod 600 it", self.path)
        text = file.read()
        file.close()

        try:
            document = json.loads(text, object_hook=object_hook)
        except json.JSONDecodeError as error:
            raise self.corruption(self.path, f"is not JSON in line {error.lineno}") from None
        except (ValueError, RecursionError):
            raise self.corruption(self.path, "is not JSON") from None
        if not isinstance(document, dict):
            raise self.corruption(self.path, "is not a JSON object")
        return document

    def replay(self, document: Json | None, seq: int) -> Iterator[tuple[str, Any]]:
        """Yield (location, record) of each change after the snapshot's seq.

        Raises: CorruptionError for a damaged record, and for a missing or repeated segment.
        """
        self.seq = seq
        self.active = None
        self.referenced_segment = document.get("Journal") if document else None
        for number in self._numbers_to_replay():
            self.active = self._segments[number]
            path = self.active.path
            if document is None:
                raise self.corruption(path, f"is there without its lease file {self.path}")
            for commit in self._read_segment(self.active):
                first_seq = commit.seq - len(commit.records) + 1
                is_repeated = seq < first_seq <= self.seq
                if is_repeated or first_seq > self.seq + 1:
                    raise self.corruption(
                        path, f"continues with change {first_seq} instead of {self.seq + 1}",
                        "put the missing segment back, or move the extra one away")

                # The snapshot may already contain the changes of a record, or the first of them.
                for record_seq, record in enumerate(commit.records, first_seq):
                    if record_seq > self.seq:
                        self.seq = record_seq
                        yield f"{path} line {commit.number} at byte {commit.offset}", record

    def _numbers_to_replay(self) -> list[int]:
        """Return the numbers of the segments to replay, oldest first. Raises: CorruptionError."""
        numbers = sorted(self._segments)
        referenced = self.referenced_segment
        if referenced is not None and referenced not in numbers:
            raise self.corruption(
                self.segment_path(referenced), "is missing", "put it back; or give up its changes: "
                f'delete the line "Journal" from {self.path}, start gipam, and run '
                "`gipam check --fix`")
        # An incomplete checkpoint leaves a blank segment, which the next checkpoint uses.
        while len(numbers) > 1 and numbers[-1] != referenced \
                and self._segments[numbers[-1]].is_blank():
            numbers.pop()
        return numbers

    def _read_segment(self, segment: Segment) -> Iterator[CommitRecord]:
        try:
            yield from segment.read_records()
        except ValueError as error:
            raise self.corruption(
                segment.path, f"is damaged: {error}", "restore a backup; or give up that line and "
                f"all after it: truncate -s {segment.end} {segment.path}, move later segments "
                "away, start gipam, run `gipam check --fix`") from None

    def prepare_append(self) -> None:
        """Prepare to append after recovery, and sync the records that recovery has read.

        The previous process may have been killed between a write and its sync.
        Raises: FatalStoreError.
        """
        try:
            if self.active:
                self.active.truncate()
                self._sync(self.active)
            self._sync_directory()
        except OSError as error:
            raise self.fail(f"cannot continue {self.path} and its journal: "
                            f"{error.strerror}") from None
        for number in list(self._segments):
            if number != self.segment:
                self._segments.pop(number).close()

    # Appending

    def reserve(self, size: int) -> None:
        """Preallocate space for one more change of this length in the next record.

        Raises: StoreError if the disk is full, with nothing changed; FatalStoreError.
        """
        self._allocate(self.journal_bytes + self._reserved_bytes + size + RECORD_OVERHEAD_BYTES)
        self._reserved_bytes += size + 1

    def probe(self) -> None:
        """After a failed write, try to preallocate; a success clears last_error.

        A timer calls this, so that an idle daemon notices when its disk accepts writes again.
        """
        if not self.last_error or self.fatal_error:
            return
        allocated = self.active.allocated if self.active else 0
        with contextlib.suppress(StoreError):
            self._allocate(allocated + PROBE_BYTES)

    def _allocate(self, needed: int) -> None:
        """Preallocate the active segment up to the needed length. Raises: StoreError."""
        try:
            if not self.active:
                self.rotate(needed)
            elif needed > self.active.allocated:
                self._preallocate(self.active, needed)
        except OSError as error:
            raise self._write_error(error) from None
        except AlreadyRunning as error:
            raise self.fail(str(error)) from None

    def append(self, records: list[str]) -> None:
        """Write the reserved changes as one record. Durable: on return.

        Raises: StoreError if part of the record may be on disk, so that the state must be read
        again; FatalStoreError.
        """
        assert self.active
        segment = self.active
        self._reserved_bytes = 0
        seq = self.seq + len(records)
        data = encode_record(seq, records)
        try:
            segment.write(data, segment.end)
        except OSError as error:
            # A bad disk, or a file system that does not keep preallocated space.
            raise self._write_error(error) from None
        self._sync(segment)
        segment.end += len(data)
        self.seq = seq

    def _write_error(self, error: OSError) -> StoreError:
        path = self.segment_path(self.segment or 1)
        self.last_error = f"cannot write {path}: {error.strerror}"
        return StoreError(f"{self.last_error}; nothing has changed")

    def _preallocate(self, segment: Segment, needed: int) -> None:
        """Preallocate a segment to at least this length. Durable: on return. Raises: OSError."""
        end = segment.write_zeros(needed)
        self._sync(segment)
        segment.allocated = end
        self.last_error = ""

    def _sync(self, segment: Segment) -> None:
        """Sync a segment. Raises: FatalStoreError, because the disk may then hold anything."""
        try:
            self._syscalls.fdatasync(segment.fd)
        except OSError as error:
            raise self.fail(f"cannot sync {segment.path}: {error.strerror}") from None
        if not segment.is_in_place():
            raise self.fail(f"{segment.path} was moved or deleted while gipam was running; it "
                            "restarts and recovers: run the command again")

    def _sync_directory(self) -> None:
        fd = self._syscalls.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._syscalls.fsync(fd)
        finally:
            with contextlib.suppress(OSError):
                self._syscalls.close(fd)

    # Checkpoints

    def rotate(self, needed: int) -> None:
        """Start the next segment, or use the blank one of an incomplete checkpoint.

        Does nothing if the active segment is blank, or if the snapshot does not reference it yet:
        the next snapshot then does.
        Durable: its name, and at least the needed bytes of preallocated space.
        Raises: OSError, with no segment left behind; AlreadyRunning; FatalStoreError.
        """
        active = self.active
        if active and (active.end == 0 or active.number != self.referenced_segment):
            return
        disk = self._syscalls.statvfs(self._directory)
        if needed >= PREALLOCATE_BYTES and disk.f_bavail * disk.f_frsize < 2 * PREALLOCATE_BYTES:
            raise OSError(errno.ENOSPC, "the last free space is kept for requests")

        number = self.segment + 1
        path = self.segment_path(number)
        segment = Segment(self._syscalls, path, number, os.O_RDWR | os.O_CREAT)
        if not segment.is_blank():
            raise self.fail(f"{path} was written by another program")
        try:
            self._preallocate(segment, needed + self._reserved_bytes)
            self._sync_directory()
        except OSError:
            segment.close()
            self.remove_segment(number)
            raise

        if active:
            self._segments.pop(active.number).close()
        self._segments[number] = segment
        self.active = segment

    def create_temp(self) -> None:
        """Create the file that is to replace the lease file. Raises: OSError."""
        DiskFile(self._syscalls, self._temp_path, os.O_RDWR | os.O_CREAT).close()

    def write_temp(self, chunks: Iterable[str]) -> None:
        """Write the temporary file, in any thread. Durable: its content, not its name.

        Raises: OSError.
        """
        file = DiskFile(self._syscalls, self._temp_path, os.O_RDWR | os.O_TRUNC)
        size = 0
        try:
            for data in join_chunks(chunks):
                file.write(data, size)
                size += len(data)
            self._syscalls.fsync(file.fd)
        except OSError as error:
            # The kernel names no file for an error of a descriptor.
            error.filename = self.path
            raise
        finally:
            file.close()

    def publish_temp(self, referenced_segment: int | None) -> None:
        """Rename the temporary file over the lease file; keep an edited one under another name.

        Durable: on return. Raises: OSError, with the old or the new lease file in place.
        """
        present_id = self._identify(self.path)
        if present_id not in ((), self.snapshot_id):
            self._keep_edited()
            self.snapshot_id = present_id
        temp_id = self._identify(self._temp_path)
        self._syscalls.replace(self._temp_path, self.path)
        self.snapshot_id = temp_id
        self._sync_directory()
        self.referenced_segment = referenced_segment

    def _keep_edited(self) -> None:
        number = 1
        while os.path.lexists(f"{self.path}.edited-{number}"):
            number += 1
        kept_path = f"{self.path}.edited-{number}"
        os.link(self.path, kept_path, follow_symlinks=False)
        log.warning("%s was edited while gipam was running: the edit has no effect and is kept as "
                    "%s; stop gipam before you edit it", self.path, kept_path)

    @staticmethod
    def _identify(path: str) -> tuple[int, ...]:
        """Return values that change with the content of a file, () if there is no file."""
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def remove_temp(self) -> None:
        """Remove the temporary file of a failed checkpoint."""
        # If that fails, the next checkpoint overwrites it.
        with contextlib.suppress(OSError):
            self._syscalls.unlink(self._temp_path)

    def remove_segment(self, number: int) -> None:
        """Remove a segment that the snapshot has made obsolete. Raises: OSError."""
        self._syscalls.unlink(self.segment_path(number))


# === Netlink ======================================================================================
#
# Routes and addresses of this host, which no block may overlap, and proxy neighbour entries, by
# which the kernel answers for containers on a link. A netlink message is a fixed part (struct
# rtmsg, ifaddrmsg or ndmsg) followed by attributes. ProxyNeighbours keeps one rule: the entries
# that gipam made (NDA_PROTOCOL 103) are those of the containers in bases that are on-link on its
# device, and other entries are never changed.
# Source: linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h, rtnetlink(7).

NetlinkRequest = Callable[..., Iterable[bytes]]  # netlink_request()
NLMSGHDR = struct.Struct("=IHH8x")  # length, type, flags
NLMSGERR = struct.Struct("=i")  # negative error number
ATTRIBUTE = struct.Struct("=HH")  # length with this header, type
RTMSG = struct.Struct("=BB10x")  # family, prefix length
NDMSG = struct.Struct("=B3xiHBx")  # family, device, state, flags
IFINFOMSG = struct.Struct("=4xi8x")  # device

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
RTM_GETNEIGH = 30
RTMGRP_LINK = 0x1
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV6_ROUTE = 0x400
RTN_UNICAST = 1
RTN_BROADCAST = 3
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_VIA = 18
# Flags of /proc/net/route and ipv6_route. Source: linux/route.h, linux/ipv6_route.h.
RTF_GATEWAY = 0x2
RTF_REJECT = 0x200
RTF_ADDRCONF = 0x40000
IFLA_IFNAME = 3
NDA_DST = 1
NDA_PROTOCOL = 12
NTF_PROXY = 0x8
NUD_PERMANENT = 0x80
GIPAM_PROTOCOL = bytes((103,))  # in NDA_PROTOCOL, for `ip neigh show proxy`


def nlmsg_align(length: int) -> int:
    """Return the length rounded up to a multiple of four, to which netlink pads."""
    return (length + 3) & ~3


def pack_attribute(attribute_type: int, payload: bytes) -> bytes:
    """Return an attribute, padded."""
    length = ATTRIBUTE.size + len(payload)
    attribute = ATTRIBUTE.pack(length, attribute_type) + payload
    return attribute.ljust(nlmsg_align(length), b"\0")


def read_attributes(message: bytes, offset: int = RTMSG.size) -> dict[int, bytes]:
    """Return the attributes of a message by type; the offset is the length of its fixed part."""
    attributes = {}
    while offset < len(message):
        length, attribute_type = ATTRIBUTE.unpack_from(message, offset)
        attributes[attribute_type] = message[offset + ATTRIBUTE.size:offset + length]
        offset += nlmsg_align(length)
    return attributes


def netlink_request(message_type: int, body: bytes, flags: int = NLM_F_DUMP) -> list[bytes]:
    """Send a netlink request and return the payloads of its replies. Source: netlink(7).

    Dumping 20,000 routes takes 12 ms (/proc/net/ipv6_route: 280 ms, since each read() searches its
    position again). A dump that the kernel reports as inconsistent is requested up to five times.
    Raises: OSError.
    """
    payloads: list[bytes] = []
    for _attempt in range(5):
        payloads, reply_flags = _exchange(message_type, body, flags)
        (code,) = NLMSGERR.unpack_from(payloads[-1])
        if code:
            raise OSError(-code, os.strerror(-code))
        if not reply_flags & NLM_F_DUMP_INTR:
            break
    return payloads[:-1]


def _exchange(message_type: int, body: bytes, flags: int) -> tuple[list[bytes], int]:
    """Return the payloads of all replies and their flags; the last payload has the error code."""
    payloads = []
    all_flags = 0
    reply_type = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        length = NLMSGHDR.size + len(body)
        header = NLMSGHDR.pack(length, message_type, NLM_F_REQUEST | flags)
        kernel.send(header + body)

        while reply_type not in (NLMSG_DONE, NLMSG_ERROR):
            data = kernel.recv(RECEIVE_BYTES)
            offset = 0
            while offset < len(data):
                length, reply_type, reply_flags = NLMSGHDR.unpack_from(data, offset)
                payloads.append(data[offset + NLMSGHDR.size:offset + length])
                all_flags |= reply_flags
                offset += nlmsg_align(length)
    return payloads, all_flags


def read_used_ranges(netlink: NetlinkRequest, version: int, bases: list[Network]) -> list[Range]:
    """Return the routes and addresses of this host that lie in a base.

    A route that contains a whole base does not count: it is the routed prefix itself, or the
    default route. Raises: OSError.
    """
    # There may be 20,000 messages: only those that contain the first bytes of a base are parsed.
    stems = [base.network_address.packed[:base.prefixlen // 8] for base in bases]
    has_stem = re.compile(b"|".join(map(re.escape, stems))).search
    ranges = set()
    body = bytes((SOCKET_FAMILY[version], 0, 0, 0))
    for message_type in (RTM_GETROUTE, RTM_GETADDR):
        for message in netlink(message_type, body):
            if not has_stem(message):
                continue

            address, prefixlen = read_prefix(message_type, message)
            for base in bases:
                first, last = address_range(base)
                if first <= address <= last and prefixlen > base.prefixlen:
                    host_mask = (1 << (base.max_prefixlen - prefixlen)) - 1
                    ranges.add((address, address | host_mask))
    return sorted(ranges)


def read_prefix(message_type: int, message: bytes) -> tuple[int, int]:
    """Return (address, prefixlen) of a route or an own address; (0, 0) for a broadcast route."""
    if message_type == RTM_GETADDR:
        # struct ifaddrmsg has eight bytes, and IFA_ADDRESS is the same number as RTA_DST.
        address = read_attributes(message, 8).get(RTA_DST, b"")
        return int.from_bytes(address, "big"), 8 * len(address)

    route_type = message[7]
    if route_type == RTN_BROADCAST:
        return 0, 0
    address = read_attributes(message).get(RTA_DST, b"")
    return int.from_bytes(address, "big"), message[1]


def is_within(base: Network, address: int, prefixlen: int) -> bool:
    """Return whether a prefix contains the base; a default route does not."""
    if not 0 < prefixlen <= base.prefixlen:
        return False
    host_bits = base.max_prefixlen - prefixlen
    return address >> host_bits == int(base[0]) >> host_bits


def is_on_link(base: Network, routes: Iterable[bytes], device: int) -> bool:
    """Return whether a connected route of the device, not a default route, contains the base."""
    base_family = SOCKET_FAMILY[base.version]
    packed = base.network_address.packed
    output_device = pack_attribute(RTA_OIF, struct.pack("=i", device))
    for route in routes:
        family, prefixlen = RTMSG.unpack_from(route)
        # There may be 20,000 routes on this device, so the cheap tests come first.
        if family != base_family or prefixlen > base.prefixlen:
            continue
        whole_bytes = packed[:prefixlen // 8]
        if output_device not in route or whole_bytes not in route:
            continue

        address, _ = read_prefix(RTM_GETROUTE, route)
        has_gateway = read_attributes(route).keys() & {RTA_GATEWAY, RTA_VIA}
        if not has_gateway and is_within(base, address, prefixlen):
            return True
    return False


def read_words(path: str) -> Iterator[list[bytes]]:
    """Yield the words of each line, nothing if there is no such file (IPv6 is off).

    They are bytes, because the name of an interface may have any encoding.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=1 << 16) as file:
        for line in file:
            yield line.split()


def read_covering_routes(proc: str, base: Network) -> Iterator[tuple[str, int]]:
    """Yield (device, flags) of each route that contains a base, except default routes.

    An IPv4 blackhole has the device "*". The flags are RTF_*.
    """
    read_routes = _read_ipv4_routes if base.version == 4 else _read_ipv6_routes
    for device, flags, address, prefixlen in read_routes(proc):
        if is_within(base, address, prefixlen):
            yield os.fsdecode(device), flags


def _read_ipv6_routes(proc: str) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield (device, flags, address, prefixlen) of each IPv6 route."""
    for row in read_words(proc + "/ipv6_route"):
        yield row[9], int(row[8], 16), int(row[0], 16), int(row[1], 16)


def _read_ipv4_routes(proc: str) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield (device, flags, address, prefixlen) of each IPv4 route."""
    rows = read_words(proc + "/route")
    next(rows, None)  # the header
    for row in rows:
        mask = int(row[7], 16)
        yield row[0], int(row[3], 16), socket.ntohl(int(row[1], 16)), bin(mask).count("1")


def device_warning(device: str) -> str:
    """Return a warning if the device of -onlink does not exist on this host, else ""."""
    try:
        socket.if_nametoindex(device)
    except OSError:
        return (f"-onlink {printable(device)}: this host has no such device, so gipam answers for "
                "nothing until there is one")
    return ""


def is_container(lease: Lease | AddressGrant) -> bool:
    """Return whether a lease is known to be a container's.

    With -mac false, Docker before 29 sends neither name nor MAC address, so that an auxiliary
    address looks like a container's.
    """
    return lease.kind == ENDPOINT and bool(lease.name or lease.mac)


class NeighbourEntry(NamedTuple):
    """A proxy neighbour entry: the device on whose link the kernel answers for the address."""

    device: int
    address: Address

    def pack(self, state: int = 0) -> bytes:
        """Return the request about this entry: struct ndmsg and the address."""
        family = SOCKET_FAMILY[self.address.version]
        ndmsg = NDMSG.pack(family, self.device, state, NTF_PROXY)
        return ndmsg + pack_attribute(NDA_DST, self.address.packed)


def parse_neighbour(message: bytes) -> tuple[NeighbourEntry, bool]:
    """Return a proxy neighbour entry, and whether gipam made it."""
    _, device, _, _ = NDMSG.unpack_from(message)
    attributes = read_attributes(message, NDMSG.size)
    entry = NeighbourEntry(device, ipaddress.ip_address(attributes[NDA_DST]))
    protocol = attributes.get(NDA_PROTOCOL, b"")
    return entry, protocol[:1] == GIPAM_PROTOCOL


class ProxyNeighbours:
    """Proxy neighbour entries, so that this host answers for its containers on a device's link.

    on_record() marks entries as pending, and sync() updates a few of them in each iteration. It
    compares all entries with all leases after a start, an event of the device or of its routes,
    and a failure.
    """

    def __init__(self, device: str, bases: list[Network], netlink: NetlinkRequest) -> None:
        """Subscribe to events of the kernel. Raises: ConfigError without CAP_NET_ADMIN."""
        self._device = device
        self._device_index = 0
        self._bases = bases
        self._onlink = bases
        self._netlink = netlink
        self._state = State(())  # as last compared
        self._next_resync_s = 0.0
        self._min_resync_s = 0.0
        self._is_failing = False
        self._last_report = ""
        self.pending: dict[NeighbourEntry, bool] = {}  # entry -> whether it should exist
        self.event_socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        self.event_socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE))
        self._require_permission()

    def _require_permission(self) -> None:
        """Try to delete an entry that cannot exist. Raises: ConfigError if that is forbidden."""
        ndmsg = NDMSG.pack(socket.AF_INET, 0, 0, NTF_PROXY)
        no_address = pack_attribute(NDA_DST, b"")
        try:
            self._netlink(RTM_DELNEIGH, ndmsg + no_address, NLM_F_ACK)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise ConfigError(f"-onlink {self._device!r} needs CAP_NET_ADMIN: root has it, a "
                                  "service with the drop-in gipam.service.d/onlink.conf of "
                                  "README.md") from None

    def on_event(self, _: int) -> None:
        """Handle events of devices and routes: a device that goes down loses all its entries."""
        for _attempt in range(MAX_NETLINK_EVENTS):
            try:
                event = self.event_socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                # ENOBUFS: the kernel has dropped events.
                self._request_resync()
                return
            if self._concerns_device(event):
                self._request_resync()

    def _concerns_device(self, event: bytes) -> bool:
        """Return whether an event is about the device, or about its route to a base."""
        _, message_type, _ = NLMSGHDR.unpack_from(event)
        payload = event[NLMSGHDR.size:]
        if message_type in (RTM_NEWROUTE, RTM_DELROUTE):
            return any(is_on_link(base, [payload], self._device_index) for base in self._bases)

        (device,) = IFINFOMSG.unpack_from(payload)
        name = pack_attribute(IFLA_IFNAME, os.fsencode(self._device) + b"\0")
        return device == self._device_index or name in payload

    def _request_resync(self) -> None:
        """Let sync() compare all entries, but at most once per RESYNC_INTERVAL_S."""
        self._next_resync_s = min(self._next_resync_s, self._min_resync_s)

    def on_record(self, pool: Pool, record: Record) -> None:
        """Mark the entries that a record of this pool changes."""
        if not self._is_answered_for(pool.subnet):
            return
        if isinstance(record, (AddressGrant, AddressRelease)):
            entry = NeighbourEntry(self._device_index, ipaddress.ip_address(record.address))
            self.pending[entry] = isinstance(record, AddressGrant) and is_container(record)
        elif pool.leases:
            self._request_resync()

    def _is_answered_for(self, subnet: Subnet) -> bool:
        """Return whether gipam answers for a subnet: it overlaps a base that is on-link."""
        return any(map(subnet.network.overlaps, self._onlink))

    def sync(self, state: State) -> None:
        """Update a limited number of pending entries.

        Raises: nothing. A failure is logged once; TIMER_INTERVAL_S later all are compared.
        """
        now_s = time.monotonic()
        try:
            if state is not self._state or now_s >= self._next_resync_s:
                try:
                    self._resync(state)
                finally:
                    # The interval also follows a comparison that failed: it took as long.
                    self._min_resync_s = time.monotonic() + RESYNC_INTERVAL_S
            count = min(len(self.pending), PROXY_UPDATES_PER_ITERATION)
            for _ in range(count):
                entry, is_wanted = self.pending.popitem()
                self._set_entry(entry, is_wanted)
        except Exception as error:  # noqa: BLE001 - requests are still answered
            if not self._is_failing:
                log.error("-onlink %s: %s; retrying", self._device, format_os_error(error))
            self._is_failing = True
            self.pending.clear()
            self._next_resync_s = now_s + TIMER_INTERVAL_S
        else:
            if not self.pending and self._next_resync_s == math.inf:
                self._is_failing = False

    def _resync(self, state: State) -> None:
        """Compare the entries in the kernel with the containers in on-link bases."""
        self._state = state
        self._next_resync_s = math.inf
        self._device_index = 0
        with contextlib.suppress(OSError):
            self._device_index = socket.if_nametoindex(self._device)
        routes = list(self._netlink(RTM_GETROUTE, bytes(RTMSG.size)))
        self._onlink = [base for base in self._bases
                        if is_on_link(base, routes, self._device_index)]
        self._report()

        wanted = set(self._wanted_entries(state))
        present = set()
        ndmsg = NDMSG.pack(0, 0, 0, NTF_PROXY)
        for message in self._netlink(RTM_GETNEIGH, ndmsg):
            entry, is_own = parse_neighbour(message)
            if is_own:
                present.add(entry)
        self.pending = dict.fromkeys(wanted - present, True)
        for entry in present - wanted:
            if any(entry.address in base for base in self._bases):
                self.pending[entry] = False

    def _report(self) -> None:
        """Log which bases gipam answers for, if that has changed."""
        report = device_warning(self._device)
        level = logging.WARNING
        if self._onlink:
            level = logging.INFO
            prefixes = ", ".join(map(str, self._onlink))
            report = f"-onlink {self._device}: answering for {prefixes}"
        elif not report:
            report = (f"-onlink {self._device}: no base is on-link there, so gipam answers for "
                      "nothing")
        if report != self._last_report:
            log.log(level, "%s", report)
        self._last_report = report

    def _wanted_entries(self, state: State) -> Iterator[NeighbourEntry]:
        for pool in state.pools.values():
            if not self._is_answered_for(pool.subnet):
                continue
            for offset, lease in pool.leases.items():
                if is_container(lease):
                    yield NeighbourEntry(self._device_index, pool.subnet.network[offset])

    def _set_entry(self, entry: NeighbourEntry, is_wanted: bool) -> None:
        """Create an entry that is absent, or delete one that gipam made. Raises: OSError."""
        try:
            (message,) = self._netlink(RTM_GETNEIGH, entry.pack(), NLM_F_ACK)
        except FileNotFoundError:
            if is_wanted and self._is_behind_another_device(entry):
                protocol = pack_attribute(NDA_PROTOCOL, GIPAM_PROTOCOL)
                self._netlink(RTM_NEWNEIGH, entry.pack(NUD_PERMANENT) + protocol, NLM_F_ACK)
            return

        _, is_own = parse_neighbour(message)
        if is_own and not is_wanted:
            self._netlink(RTM_DELNEIGH, entry.pack(), NLM_F_ACK)

    def _is_behind_another_device(self, entry: NeighbourEntry) -> bool:
        """Return whether the address is routed to another device.

        A macvlan container is on the link itself, and answers there.
        """
        address = entry.address
        rtmsg = RTMSG.pack(SOCKET_FAMILY[address.version], address.max_prefixlen)
        destination = pack_attribute(RTA_DST, address.packed)
        try:
            (route,) = self._netlink(RTM_GETROUTE, rtmsg + destination, NLM_F_ACK)
        except OSError:
            # There is no route, or a blackhole.
            return False

        route_type = route[7]
        device = read_attributes(route).get(RTA_OIF)
        return route_type == RTN_UNICAST and device != struct.pack("=i", entry.device)


# === Claims =======================================================================================
#
# The claims of a cluster's hosts in etcd. Two rules make sure that no address is granted twice,
# which would put it on two hosts:
#
#   1. A grant follows a transaction made for it. A decision that needs one raises
#      TransactionRequired; etcd commits the Transaction only if no claim has changed since; the
#      iteration that applies the result decides again, with the Outcome as an argument.
#   2. The claims of a host follow its journal; see desired_claim(), which also says when a claim
#      is deleted. A claim of another host blocks its space here. After a data loss or an evict,
#      two hosts may hold one subnet: the one without the claim lists it in its key hosts/HOST,
#      which blocks the space for new grants of the others even when the claim is deleted.
#
# Nothing here does I/O; only the grace period after a data loss reads the monotonic clock.


class Claim(NamedTuple):
    """The value in etcd of a claim: of a subnet, or of an address in a shared subnet."""

    hosts: tuple[str, ...]  # sorted
    kind: str = ""  # of an address
    is_shared: bool = False  # of a subnet
    since_s: int = 0  # UNIX time

    def __str__(self) -> str:
        noun = "host" if len(self.hosts) == 1 else "hosts"
        return f"{noun} {', '.join(self.hosts)}"

    def other_hosts(self, host: str) -> tuple[str, ...]:
        """Return the hosts of the claim except this one."""
        return tuple(other for other in self.hosts if other != host)

    def to_json(self) -> Json:
        """Return the value as etcd stores it."""
        value = {
            "hosts": self.hosts,
            "since": self.since_s,
            "kind": self.kind,
            "shared": self.is_shared,
        }
        return {field: item for field, item in value.items() if item}


ClaimDict = Dict[str, Union[Claim, None]]  # by key; None: deleted
ClaimChanges = Mapping[str, Union[Claim, None]]


class Head(NamedTuple):
    """The version of all claims in etcd."""

    token: str | None  # None: etcd has no claims yet


class Transaction(NamedTuple):
    """Claims to write, if the preconditions hold. If they do not, the request is decided again."""

    claims: ClaimChanges  # by key; None deletes
    expected_head: Head | None  # None: unknown; all claims are read
    expected_keys: Mapping[str, str | None] = {}  # further preconditions; None: absent
    deleted_keys: tuple[str, ...] = ()  # other keys to delete
    log_text: str = ""  # logged after the commit


class Outcome(NamedTuple):
    """The outcome of a transaction for one request: an argument of its next attempt, not stored."""

    is_committed: bool = False
    granted: frozenset[str] = frozenset()  # keys of claims written for this host
    deleted: frozenset[str] = frozenset()  # keys that it deleted
    is_fresh: bool = False  # the claims were just read
    error: GipamError | None = None  # no further transaction is possible


NO_OUTCOME = Outcome()


class TransactionRequired(Exception):
    """Control flow: decide the request again with the outcome of this transaction."""

    def __init__(self, transaction: Transaction) -> None:
        super().__init__(transaction)
        self.transaction = transaction


class PendingRequest:
    """A request that waits for etcd. attempt() runs in the loop, finish() in the etcd thread."""

    def __init__(self, decide: Callable[[Outcome], Any]) -> None:
        self._decide = decide
        self.deadline_s = time.monotonic() + ETCD_TIMEOUT_S
        self.is_decided = False
        self.result: Any = None

    def attempt(self, outcome: Outcome) -> Transaction | None:
        """Decide, or return the transaction that the decision needs."""
        try:
            self.result = self._decide(outcome)
        except TransactionRequired as required:
            return required.transaction
        self.is_decided = True
        return None

    def finish(self, error: GipamError | None) -> None:
        """Report that the decision is durable; error: why it is not."""


def undecided(requests: Iterable[PendingRequest]) -> list[PendingRequest]:
    """Return the requests that are not decided yet."""
    return [request for request in requests if not request.is_decided]


class TransactionResult(NamedTuple):
    """The result of a transaction. The iteration that applies it also decides on its outcome."""

    head: Head
    claims: ClaimChanges  # that have changed
    keys: Mapping[str, str]  # with hosts/HOST of every member
    outcome: Outcome
    sent_s: float  # boottime_s()
    is_complete: bool = False  # all claims have been read
    is_loss: bool = False  # etcd has lost data


class MachineId(NamedTuple):
    """Distinguishes machines with the same host name. It survives a reboot and a restore."""

    machine: str  # digest: machine-id, path of the lease file
    product: str  # digest: UUID of the hardware; "": unreadable

    def wrote(self, value: Json) -> bool:
        """Return whether this machine wrote the value of a key hosts/HOST."""
        product = value.get("product")
        is_other_product = bool(product and self.product and product != self.product)
        return value.get("machine") == self.machine and not is_other_product

    def is_foreign(self, value: Json) -> bool:
        """Return whether another machine wrote the value; older versions wrote no product."""
        return isinstance(value.get("product"), str) and not self.wrote(value)


def parse_json_object(text: str | None) -> Json:
    """Return the JSON object, {} for any other text."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def parse_claim(value: Any) -> Claim | None:
    """Return the claim of a JSON value, None for null.

    A malformed value still counts as a claim, of host "?".
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        return Claim(("?",))

    hosts = value.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        hosts = ["?"]
    names = set()
    for host in hosts:
        is_name = isinstance(host, str) and host != ""
        names.add(printable(host) if is_name else "?")

    kind = value.get("kind")
    since_s = value.get("since")
    return Claim(
        tuple(sorted(names)),
        kind if kind in LEASE_KINDS else "",
        value.get("shared") is True,
        since_s if type(since_s) is int else 0,
    )


# The etcd thread parses each key once, and the loop then finds it here.
@functools.lru_cache(2 * ETCD_PAGE_KEYS)
def parse_claim_key(key: str) -> tuple[Network, str]:
    """Return the subnet of a claim, and the address or "".

    Raises: ValueError, also for a spelling that gipam does not write, such as 10.2.0.0/024.
    """
    prefix, _, suffix = key.partition("/")
    length, _, address = suffix.partition("/")
    network = parse_prefix(f"{prefix}/{length}")
    canonical = str(network)
    if address:
        address_int = parse_address(address, network.version)
        address = format_address(address_int, network.version)
        first, last = address_range(network)
        if not first <= address_int <= last:
            raise ValueError(f"{key!r} is an address outside its subnet")
        canonical = f"{network}/{address}"

    if key != canonical:
        raise ValueError(f"{key!r} is not how gipam writes it")
    return network, address


def is_claim_key(key: str, known: Container[str]) -> bool:
    """Return whether gipam could have written the key of a claim; those known need no parsing."""
    try:
        if key not in known:
            parse_claim_key(key)
    except ValueError:
        return False
    return True


# Each transaction returns the keys of all hosts, of which few have changed.
@functools.lru_cache(ETCD_PAGE_KEYS)
def parse_contended_keys(text: str) -> tuple[str, ...]:
    """Return the keys that the value of a hosts/HOST lists as held without a claim."""
    listed = parse_json_object(text).get("contended")
    if not isinstance(listed, list):
        return ()
    return tuple(key for key in listed if isinstance(key, str) and is_claim_key(key, ()))


def describe_claim_key(key: str) -> str:
    """Return the subnet of a claim, or "ADDRESS in SUBNET", for people."""
    network, address = parse_claim_key(key)
    return f"{address} in {network}" if address else str(network)


def join_claim(claim: Claim | None, own: Claim) -> Claim:
    """Return the claim in etcd with this host added; own is the claim of this host alone.

    A host that joins the claim of others changes nothing but its hosts.
    """
    if claim is None:
        return own
    others = claim.other_hosts(own.hosts[0])
    if others:
        return claim._replace(hosts=tuple(sorted(others + own.hosts)))
    return own._replace(since_s=claim.since_s)


def desired_claim(
    host: str,
    claim: Claim | None,
    own: Claim | None,
    is_barred: bool,
    is_kept: bool,
) -> Claim | None:
    """Return the claim that etcd should have under a key: `claim` is there, `own` is held here.

    A claim is deleted, or loses this host, if this host has released what it claims and is_kept is
    false. The release is then on disk, because a transaction is sent only after the commit of the
    iteration that asks for it. is_kept: Docker, or an address in the subnet, may still need the
    claim. is_barred: another host's claim conflicts with the one held here, and is not overwritten.

    reconcile() deletes only after etcd has just answered. The only other place where a claim is
    deleted is evict(), for the claims of an absent host.
    """
    if is_barred:
        return claim
    if own is not None:
        return join_claim(claim, own)
    if claim is None or host not in claim.hosts or is_kept:
        return claim

    others = claim.other_hosts(host)
    if others:
        return claim._replace(hosts=others)
    # No host holds this any more, so the claim is deleted.
    return None


class Member(NamedTuple):
    """A host of the cluster, as its key in etcd describes it."""

    key: str
    text: str  # the value of the key
    missed: int = 0  # consecutive readings with the same value
    is_awaited: bool = False  # has not written its key since a loss

    @property
    def is_present(self) -> bool:
        """Return whether the host has sent a heartbeat recently."""
        return self.missed < MISSED_HEARTBEATS

    @property
    def is_behind(self) -> bool:
        """Return whether etcd may lack claims of the host."""
        says_so = bool(parse_json_object(self.text).get("is_behind"))
        return self.is_present and (self.is_awaited or says_so)


class Members:
    """The hosts of the cluster, and the grace period after etcd has lost data.

    After a data loss, a host is behind until it has tried to claim again all that it holds. Nothing
    new is claimed while any present host is behind, nor for GRACE_PERIOD_S after that.
    """

    def __init__(self, host: str, machine: MachineId) -> None:
        self.host = host
        self.machine = machine
        self.by_host: dict[str, Member] = {}
        self.unclaimed: set[str] = set()  # keys of lost claims that are held here
        self._behind_s = -math.inf  # when a host was last behind

    @property
    def is_behind(self) -> bool:
        """Return whether this host, or a host that it awaits, is behind: hosts/HOST says so."""
        awaited = [host for host, member in self.by_host.items()
                   if member.is_awaited and member.is_present]
        return bool(self.unclaimed or awaited)

    def hosts_behind(self) -> list[str]:
        """Return the hosts that are behind."""
        hosts = [host for host, member in self.by_host.items()
                 if member.is_behind and host != self.host]
        if self.unclaimed:
            hosts.append(self.host)
        return hosts

    def update(self, keys: Mapping[str, str]) -> None:
        """Apply the keys hosts/HOST."""
        self._note_behind()
        members = {}
        for key, text in keys.items():
            table, _, name = key.partition("/")
            if table != "hosts":
                continue
            host = printable(name)
            known = self.by_host.get(host)
            if known is not None and known.text == text:
                members[host] = known
            else:
                members[host] = Member(key, text)

        # etcd may have lost the key of an awaited host; it is remembered until it is absent.
        for host, known in self.by_host.items():
            if known.is_awaited and known.is_present:
                members.setdefault(host, known)
        self.by_host = members

    def contended(self) -> dict[str, str]:
        """Return the keys that other hosts hold without a claim, and these hosts."""
        contended = {}
        for host, member in self.by_host.items():
            if host != self.host:
                contended.update(dict.fromkeys(parse_contended_keys(member.text), host))
        return contended

    def count_reading(self) -> None:
        """Count a reading of the keys hosts/HOST. Call it once per HEARTBEAT_INTERVAL_S."""
        self._note_behind()
        for host, member in self.by_host.items():
            self.by_host[host] = member._replace(missed=member.missed + 1)

    def on_data_loss(self, keys: Mapping[str, str]) -> None:
        """Start the grace period: wait until every host that was present has written its key."""
        # A restore may have brought back an older key: only a value that differs is a heartbeat.
        # The key of a present host has just changed, so readings before the loss do not count.
        for host, member in self.by_host.items():
            self.by_host[host] = member._replace(
                text=keys.get(member.key, ""),
                missed=0 if member.is_present else member.missed,
                is_awaited=host != self.host,
            )
        self.update(keys)
        self._behind_s = time.monotonic()

    def on_tried(self, keys: Iterable[str]) -> None:
        """Note that etcd has these claims again, or another host's in their place."""
        self._note_behind()
        self.unclaimed.difference_update(keys)

    def _note_behind(self) -> None:
        """Note the time if a host is behind. Call it before a change that may end that."""
        if self.hosts_behind():
            self._behind_s = time.monotonic()

    def grace_remaining_s(self) -> float:
        """Return the least remaining time of the grace period, 0 if it is over."""
        if self.hosts_behind():
            return GRACE_PERIOD_S
        return max(self._behind_s + GRACE_PERIOD_S - time.monotonic(), 0.0)

    def require_grace_over(self) -> None:
        """Check that no grace period forbids new claims. Raises: Unavailable."""
        remaining_s = self.grace_remaining_s()
        if remaining_s > 0:
            behind = self.hosts_behind()
            awaited = f" (waiting for {', '.join(sorted(behind))})" if behind else ""
            raise Unavailable(
                "etcd has lost claims; nothing new can be claimed until all hosts have claimed "
                f"again what they hold{awaited}; try again in {remaining_s:.0f} s or later")

    def is_former_name(self, host: str) -> bool:
        """Return whether a host is this machine under a former name."""
        member = self.by_host.get(host)
        if member is None or host == self.host:
            return False
        return self.machine.wrote(parse_json_object(member.text))

    def require_absent(self, host: str) -> None:
        """Check that a host may be evicted. Raises: Forbidden."""
        member = self.by_host.get(host)
        if member is not None and member.is_present:
            absent_s = MISSED_HEARTBEATS * HEARTBEAT_INTERVAL_S
            raise Forbidden(
                f"{host} is alive or was seen within the last {absent_s:.0f} s: stop its gipam and "
                f"try again in {absent_s:.0f} s")


class NoClaims:
    """The claims without etcd: there are none. ClaimTable overrides every method."""

    is_enabled = False

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.failure = ""  # why etcd does not answer

    def rebind(self, state: State) -> None:
        """Use a state that was read again from disk."""

    def on_record(self, record: Record, subnet: Subnet) -> None:
        """Follow a record of this host, which was applied to the subnet."""

    def on_docker_compared(self) -> None:
        """Note that this host holds everything that Docker uses."""

    def require_shareable(self, request: PoolRequest) -> None:
        """Check that a subnet may be shared with other hosts, if the request asks for that."""
        if request.is_shared:
            raise InvalidRequest("option gipam.shared needs -etcd, through which hosts share")

    @contextlib.contextmanager
    def deciding(
        self,
        subnet: Network | None,
        sub_pool: Network | None,
        version: int,
        is_admitted: bool,
        outcome: Outcome,
    ) -> Iterator[None]:
        """Wrap the decision on a pool."""
        yield

    def has_shared_claim(self, subnet: Network) -> bool:
        """Return whether a subnet is claimed as a shared one."""
        return False

    def require_claim(self, grant: PoolGrant, outcome: Outcome) -> None:
        """Check that a transaction has claimed the subnet of a pool for this grant."""

    def require_no_conflict(self, network: Network, outcome: Outcome) -> None:
        """Check that no other host has claimed a subnet that is held here."""

    def decide_shared_address(
        self,
        pool: Pool,
        request: AddressRequest,
        now_s: int,
        start: int,
        outcome: Outcome,
    ) -> AddressGrant:
        """Decide which address of a shared subnet is granted."""
        raise Unavailable(f"{pool.subnet.network} is shared with other hosts: "
                          "start gipam with -etcd")

    def evict(self, host: str, outcome: Outcome) -> None:
        """Delete the claims of an absent host."""
        raise InvalidRequest("-etcd is not set, so no other host shares the bases of this one")

    def conflict_text(self, network: Network) -> str:
        """Return which other hosts have claimed a held subnet, or an address in it, or ""."""
        return ""

    def describe(self) -> Json:
        """Return the keys of the cluster in `status --json`."""
        return {}


class ClaimTable(NoClaims):
    """The claims of all hosts as of a head, and the space that they block here.

    A grant of a subnet passes require_claim(), one of an address in a shared subnet
    SharedSubnets.decide(). Records of this host arrive by on_record(), changes in etcd by
    apply_claims(). reconcile() then makes etcd equal to what is held here; desired_claim() says
    when it deletes a claim.
    """

    is_enabled = True

    def __init__(self, host: str, machine: MachineId, state: State) -> None:
        super().__init__()
        self.host = host
        self.failure = "it has not been asked yet"
        self.members = Members(host, machine)
        self.shared_subnets = SharedSubnets(self)
        self.state = state
        self.head: Head | None = None  # None: not all claims are known
        self.has_joined = False  # all claims have been read once
        self.address_keys: dict[Network, dict[str, None]] = {}  # of each shared subnet
        self.remote_addresses: dict[Network, OffsetBitmap] = {}  # offsets that are not free here
        self.dirty: dict[str, None] = {}  # keys to compare with what is held here
        # Keys that a transaction without a known result may have changed.
        self.uncertain: set[str] = set()
        # Keys that etcd has for this host, which does not hold them, but Docker may use them.
        self.unconfirmed: set[str] = set()
        self.conflicts: dict[str, Claim] = {}  # held key -> claim of another host
        # Keys that were in conflict and are still held here without a claim: hosts/HOST lists them.
        self.contending: frozenset[str] = frozenset()
        self.contended: dict[str, str] = {}  # keys that other hosts list -> host
        self.wake_up: Callable[[], None] | None = None  # wakes the etcd thread
        self._reported: dict[str, str] = {}  # conflicts that were logged
        self._is_docker_compared = False
        self._answered_s: float | None = None
        self.rebind(state)

    # Applying changes in etcd and of this host

    def rebind(self, state: State) -> None:
        """Use a state that was read again: block the claims of others, compare everything."""
        self.state = state
        # In the new state no claim blocks anything yet.
        self.conflicts.clear()
        self._mark_unconfirmed_claims()
        for key in (*self.claims, *self.contended):
            self._update_space(key)
        held_keys = self._held_keys()
        for key in held_keys:
            self._update_conflict(key)
        self.mark_dirty(*self.claims, *held_keys)

    def _held_keys(self) -> list[str]:
        """Return the keys of everything that is held here."""
        keys = []
        for family in self.state.families.values():
            for network, subnet in family.subnets.items():
                keys.append(str(network))
                if not subnet.is_shared:
                    continue
                for pool in subnet.pools.values():
                    keys += [f"{network}/{pool.address_at(offset)}" for offset in pool.leases]
        return keys

    def mark_dirty(self, *keys: str) -> None:
        """Queue keys to be reconciled."""
        self.dirty.update(dict.fromkeys(keys))
        if self.wake_up:
            self.wake_up()

    def on_record(self, record: Record, subnet: Subnet) -> None:
        """Follow a record of this host: update the blocked space, and queue the keys."""
        network = subnet.network
        if isinstance(record, (PoolGrant, PoolRelease)):
            key = str(network)
            keys = [key, *self.address_keys.get(network, ())]
        elif subnet.is_shared and isinstance(record, (AddressGrant, AddressRelease)):
            key = f"{network}/{record.address}"
            keys = [key]
        else:
            return

        if isinstance(record, (PoolGrant, AddressGrant)):
            self.unconfirmed.discard(key)
        self._update_space(key)
        for conflict_key in keys:
            self._update_conflict(conflict_key)
        self.mark_dirty(*keys)

    def on_docker_compared(self) -> None:
        """Queue the claims that neither this host nor Docker needs, so that they are deleted."""
        self._is_docker_compared = True
        keys = self.unconfirmed
        self.unconfirmed = set()
        for key in keys:
            self._update_space(key)
        self.mark_dirty(*keys)

    def apply_result(self, result: TransactionResult) -> None:
        """Apply the result of a transaction, or of a reading."""
        self._answered_s = time.monotonic()
        self.apply_claims(result.claims)
        self.head = result.head
        if result.outcome.is_committed:
            # It expected this host's key and changed it, so that an earlier transaction of this
            # host that is still under way can no longer succeed.
            self.uncertain.clear()

        if result.is_loss:
            self.members.on_data_loss(result.keys)
        else:
            self.members.update(result.keys)
        self._update_contended()
        is_joining = result.is_complete and not self.has_joined
        if is_joining or result.is_loss:
            self._mark_lost_claims()
        if is_joining:
            self.has_joined = True
            # Until this process has committed one, a transaction of an earlier process of this
            # host may still be under way, and may delete any of its claims.
            self.uncertain.update(filter(self.has_claimed, self.claims))
            self._mark_unconfirmed_claims()

    def _update_contended(self) -> None:
        """Block the space that other hosts list, and list only what is held without a claim."""
        contended = self.members.contended()
        changed_keys = self.contended.keys() ^ contended.keys()
        self.contended = contended
        for key in changed_keys:
            self._update_space(key)
        self.contending = frozenset(
            key for key in self.contending.union(self.conflicts)
            if self.own_claim(key) is not None and not self.has_claimed(key))

    def forget_head(self) -> None:
        """Note that not all claims are known."""
        self.head = None

    def _mark_lost_claims(self) -> None:
        """Note the keys held here, but not claimed in etcd; until they are, this host is behind."""
        for key in self._held_keys():
            if not self.has_claimed(key) and not self._is_barred(key):
                self.members.unclaimed.add(key)

    def _mark_unconfirmed_claims(self) -> None:
        """Note the claims of this host for subnets and addresses that the state on disk lacks.

        The lease file may be lost, or older than the claims, and an adoption may not have reached
        the disk. So whenever the state was read from disk, such claims are not deleted, and not
        granted here either, until Docker has been asked whether it uses them.
        """
        if self._is_docker_compared:
            return
        for key in self.claims:
            if self.has_claimed(key) and self.own_claim(key) is None:
                self.unconfirmed.add(key)
        for key in self.unconfirmed:
            self._update_space(key)

    def apply_claims(self, claims: ClaimChanges) -> None:
        """Apply claims by their keys; None: deleted."""
        for key, claim in claims.items():
            if claim == self.claims.get(key):
                continue
            was_own = self.has_claimed(key)
            if claim is None:
                del self.claims[key]
                self.unconfirmed.discard(key)
            else:
                self.claims[key] = claim

            self._update_space(key)
            network, _ = parse_claim_key(key)
            if was_own or self.has_claimed(key) or self.local_subnet(network):
                self.mark_dirty(key, str(network))

    def has_claimed(self, key: str) -> bool:
        """Return whether this host has claimed a key, alone or with others."""
        claim = self.claims.get(key)
        return claim is not None and self.host in claim.hosts

    def remote_claim(self, key: str) -> Claim | None:
        """Return the claim of a key if other hosts have made or joined it, else None."""
        claim = self.claims.get(key)
        if claim is None or not claim.other_hosts(self.host):
            return None
        return claim

    def local_subnet(self, network: Network) -> Subnet | None:
        """Return the subnet, if it is held here."""
        return self.state.families[network.version].subnets.get(network)

    def _is_blocked(self, network: Network, is_admitted: bool) -> bool:
        """Return whether the claim of a subnet blocks its space here.

        is_admitted: this host is about to join the claim of a subnet that it does not hold, or to
        import the subnet.
        """
        key = str(network)
        claim = self.remote_claim(key)
        if claim is None:
            # A claim of this host alone blocks nothing, unless Docker may use the subnet.
            if is_admitted or key in self.unconfirmed:
                return not is_admitted
            return key in self.contended

        # A claim of other hosts blocks, unless they share the subnet with this host. A subnet that
        # is held here unshared joins no claim, not even to import another range of it.
        subnet = self.local_subnet(network)
        is_joined = is_admitted if subnet is None else subnet.is_shared
        return not (claim.is_shared and is_joined)

    def _update_space(self, key: str) -> None:
        """Block or unblock the space of a key; find the conflicts that this begins or ends."""
        network, address = parse_claim_key(key)
        if address:
            self._update_remote_address(key, network, address)
            self._update_conflict(key)
        else:
            self._update_blocked(network)

    def _update_blocked(self, network: Network, is_admitted: bool = False) -> None:
        """Block or unblock the space of a claimed subnet."""
        family = self.state.families[network.version]
        is_blocked = self._is_blocked(network, is_admitted)
        was_blocked = network in family.remote_claims
        overlaps_held = is_blocked and family.used.find_overlap(network) is not None
        if is_blocked and not was_blocked:
            family.used.add(network)
        elif was_blocked and not is_blocked:
            family.used.remove(network)

        if is_blocked:
            family.remote_claims[network] = self._describe_blocker(str(network))
        else:
            family.remote_claims.pop(network, None)

        # Only a claim that overlaps a held subnet, which is rare, can begin or end a conflict.
        keys = set(self.conflicts)
        if overlaps_held:
            for held in family.subnets:
                if held.overlaps(network):
                    keys.add(str(held))
        for key in keys:
            self._update_conflict(key)

    def _describe_blocker(self, key: str) -> str:
        """Return the hosts that block a key here."""
        if key in self.unconfirmed:
            return (f"{self.claims[key]}, before gipam started here; if Docker does not use it, it "
                    "is free soon")
        if self.remote_claim(key) is None:
            return f"host {self.contended[key]}, which held it before it was claimed elsewhere"
        return str(self.claims[key])

    def _update_remote_address(self, key: str, network: Network, address: str) -> None:
        """Block or unblock an address of a shared subnet."""
        keys = self.address_keys.setdefault(network, {})
        offsets = self.remote_addresses.setdefault(network, OffsetBitmap())
        offset = parse_address(address, network.version) - int(network[0])
        is_claimed = self.remote_claim(key) is not None
        if is_claimed or key in self.unconfirmed or key in self.contended:
            offsets.add(offset)
        else:
            offsets.discard(offset)

        if key in self.claims:
            keys[key] = None
        else:
            keys.pop(key, None)
        if not keys:
            del self.address_keys[network]
        if not offsets:
            del self.remote_addresses[network]

    # Conflicts: held here, but claimed by another host

    def _update_conflict(self, key: str) -> None:
        """Note whether another host's claim conflicts with this key, if it is held here."""
        claim = self._find_foreign_claim(key)
        if claim is None:
            if self.conflicts.pop(key, None):
                self.mark_dirty(key)
        elif claim != self.conflicts.get(key):
            self.conflicts[key] = claim
            self.contending |= {key}
            self.mark_dirty(key)

    def _find_foreign_claim(self, key: str) -> Claim | None:
        """Return another host's claim that conflicts with this key, None if there is none."""
        own = self.own_claim(key)
        if own is None:
            return None
        network, address = parse_claim_key(key)
        if address:
            return self.shared_subnets.foreign_claim(key, own.kind)
        overlap = self.state.families[network.version].find_remote_conflict(network)
        return self.remote_claim(str(overlap))

    def _is_barred(self, key: str) -> bool:
        """Return whether the key, or the subnet that it lies in, is in conflict."""
        network, _ = parse_claim_key(key)
        return key in self.conflicts or str(network) in self.conflicts

    def new_conflicts(self) -> dict[str, str]:
        """Return the conflicts not reported yet: key -> the claim of another host, as text."""
        reported = self._reported
        self._reported = {key: self.describe_claim(claim) for key, claim in self.conflicts.items()}
        return {key: text for key, text in self._reported.items() if reported.get(key) != text}

    def describe_claim(self, claim: Claim) -> str:
        """Return the hosts of a claim; for a former name of this machine, also the remedy."""
        for host in claim.other_hosts(self.host):
            if self.members.is_former_name(host):
                return (f"{claim} (a former name of this machine: `gipam evict {host}` gives the "
                        f"claim to {self.host})")
        return str(claim)

    def conflict_text(self, network: Network) -> str:
        """Return which other hosts have claimed a held subnet, or an address in it, or ""."""
        for key, claim in self.conflicts.items():
            if parse_claim_key(key)[0] == network:
                return self.describe_claim(claim)
        return ""

    # Reconciling: making the claims in etcd equal to the state

    def own_claim(self, key: str) -> Claim | None:
        """Return the claim of this host alone, None if it does not hold the key."""
        network, address = parse_claim_key(key)
        subnet = self.local_subnet(network)
        if subnet is None:
            return None
        if not address:
            granted_s = min(pool.granted_s for pool in subnet.pools.values())
            return Claim((self.host,), "", subnet.is_shared, granted_s)
        if not subnet.is_shared:
            return None

        lease = subnet.find_lease(parse_address(address, subnet.version) - subnet.first)
        if lease is None:
            return None
        return Claim((self.host,), lease.kind, False, lease.granted_s)

    def differences(self, keys: Iterable[str]) -> ClaimDict:
        """Return the desired claims of these keys, where etcd has another one."""
        differences = {}
        for key in keys:
            claim = self.claims.get(key)
            own = self.own_claim(key)
            is_barred = own is not None and self._is_barred(key)
            is_kept = key in self.unconfirmed or self._has_own_addresses(key)
            desired = desired_claim(self.host, claim, own, is_barred, is_kept)
            if desired != claim:
                differences[key] = desired
        return differences

    def _has_own_addresses(self, key: str) -> bool:
        """Return whether this host has claimed addresses in the subnet: they are deleted first."""
        network, address = parse_claim_key(key)
        if address:
            return False
        return any(map(self.has_claimed, self.address_keys.get(network, ())))

    def reconcile(self, keys: Iterable[str], outcome: Outcome) -> None:
        """Make the claims of these keys equal to the state.

        A claim is deleted only if etcd has just answered, because this host does not rely on it
        from then on (see `uncertain`), and a container may need it while etcd is unreachable.
        Raises: TransactionRequired, until it is done; outcome.error.
        """
        differences = self.differences(keys)
        tried = [key for key in keys if key not in differences]
        for key in tried:
            self.dirty.pop(key, None)
        # This includes keys that another host claims: they are conflicts, and need no waiting.
        self.members.on_tried(tried)
        if not differences:
            return

        self.require_fresh("", outcome)
        for key, claim in differences.items():
            if claim is None or self.host not in claim.hosts:
                self.uncertain.add(key)
        raise TransactionRequired(Transaction(differences, self.head))

    def heartbeat(self, outcome: Outcome) -> None:
        """Write this host's key. Raises: TransactionRequired, until it is done; outcome.error."""
        if outcome.error:
            raise outcome.error
        if not outcome.is_committed:
            raise TransactionRequired(Transaction({}, self.head))

    # Requests of Docker

    def require_shareable(self, request: PoolRequest) -> None:
        """Check that a subnet may be shared with other hosts. Raises: Forbidden."""
        if not request.is_shared or request.subnet is None:
            return
        subnet = self.local_subnet(request.subnet)
        if subnet is not None and not subnet.is_shared:
            raise Forbidden(f"{request.subnet} is held here, and not shared: remove its networks "
                            "first")

    @contextlib.contextmanager
    def deciding(
        self,
        subnet: Network | None,
        sub_pool: Network | None,
        version: int,
        is_admitted: bool,
        outcome: Outcome,
    ) -> Iterator[None]:
        """Wrap the decision on a pool; is_admitted: the subnet's claim blocks nothing meanwhile.

        Raises: TransactionRequired or outcome.error, if claims that are not fresh caused a refusal.
        """
        if subnet is not None and is_admitted:
            self._update_blocked(subnet, is_admitted=True)
        try:
            yield
        except (InvalidRequest, Forbidden, Unavailable):
            family = self.state.families[version]
            overlap = None
            if subnet is not None:
                overlap = family.find_conflict(subnet, sub_pool)
            if overlap in family.remote_claims or (subnet is None and family.remote_claims):
                self.require_fresh(str(overlap), outcome)
            raise
        finally:
            if subnet is not None and is_admitted:
                self._update_blocked(subnet)

    def has_shared_claim(self, subnet: Network) -> bool:
        """Return whether a subnet is claimed as a shared one.

        It does not matter which hosts have the claim: this one may have been evicted from it.
        """
        claim = self.claims.get(str(subnet))
        return claim is not None and claim.is_shared

    def require_claim(self, grant: PoolGrant, outcome: Outcome) -> None:
        """Check that a transaction has claimed the subnet of a pool for this grant.

        Raises: TransactionRequired; Unavailable in a grace period; Forbidden, see
        require_no_conflict(); outcome.error.
        """
        network = parse_prefix(grant.subnet)
        self.require_no_conflict(network, outcome)
        subnet = self.local_subnet(network)
        is_shared = subnet.is_shared if subnet is not None else grant.is_shared
        own = Claim((self.host,), "", is_shared, grant.granted_s)
        if not self.is_granted(grant.subnet, own, outcome):
            claim = join_claim(self.claims.get(grant.subnet), own)
            self.claim({grant.subnet: claim}, outcome)

    def is_granted(self, key: str, own: Claim, outcome: Outcome) -> bool:
        """Return whether the transaction of this request wrote the claim for this host.

        Raises: Unavailable in a grace period, which the result of the transaction may have started.
        """
        claim = self.claims.get(key)
        if key not in outcome.granted or claim != join_claim(claim, own):
            return False
        self.members.require_grace_over()
        return True

    def claim(self, claims: ClaimChanges, outcome: Outcome) -> NoReturn:
        """Request a transaction with new claims.

        Raises: TransactionRequired; Unavailable in a grace period; outcome.error.
        """
        if outcome.error:
            raise outcome.error
        self.members.require_grace_over()
        raise TransactionRequired(Transaction(claims, self.head))

    def require_fresh(self, key: str, outcome: Outcome) -> None:
        """Check that the claims were just read. Raises: TransactionRequired; outcome.error.

        A malformed claim may have been deleted by a program that does not write a new head. If so,
        this host deletes it again, so that the new head shows every host that it is gone.
        """
        if outcome.error:
            raise outcome.error
        if outcome.is_fresh:
            return
        claim = self.claims.get(key)
        if claim is not None and "?" in claim.hosts:
            absent = {f"claims/{key}": None}
            raise TransactionRequired(Transaction({key: None}, self.head, absent))
        raise TransactionRequired(Transaction({}, self.head))

    def require_no_conflict(self, network: Network, outcome: Outcome) -> None:
        """Check that no other host has claimed a subnet that is held here.

        Raises: TransactionRequired; Forbidden; outcome.error.
        """
        claim = self.conflicts.get(str(network))
        if claim is None:
            return
        overlap = self.state.families[network.version].find_remote_conflict(network)
        self.require_fresh(str(overlap), outcome)
        raise Forbidden(
            f"{network} is held here, but claimed by {self.describe_claim(claim)} too: no address "
            "of it is assigned until one host releases it")

    def decide_shared_address(
        self,
        pool: Pool,
        request: AddressRequest,
        now_s: int,
        start: int,
        outcome: Outcome,
    ) -> AddressGrant:
        """Decide which address of a shared subnet is granted. Raises: as SharedSubnets.decide()."""
        return self.shared_subnets.decide(pool, request, now_s, start, outcome)

    def evict(self, host: str, outcome: Outcome) -> None:
        """Delete the claims of an absent host; those of a former name become this host's.

        Raises: InvalidRequest, Forbidden; TransactionRequired, until it is done; outcome.error.
        """
        if host == self.host:
            raise InvalidRequest(f"{host!r} is this host")
        member = self.members.by_host.get(host)
        member_key = f"hosts/{host}" if member is None else member.key
        if member_key in outcome.deleted:
            return
        self.require_fresh("", outcome)

        # A host with many claims is evicted in several transactions: each attempt finds the others.
        keys = [key for key, claim in self.claims.items() if host in claim.hosts]
        if not keys and member is None:
            raise InvalidRequest(f"there is no host {host!r} in etcd, only "
                                 f"{', '.join(self._known_hosts())}", 404)
        self.members.require_absent(host)

        keys.sort(key=lambda key: (-key.count("/"), key))  # addresses first
        claims: ClaimDict = {}
        for key in keys[:CLAIMS_PER_TRANSACTION]:
            claim = self.claims[key]
            hosts = set(claim.other_hosts(host))
            if self.members.is_former_name(host):
                hosts.add(self.host)
            claims[key] = None  # delete the claim: its only host is evicted
            if hosts:
                claims[key] = claim._replace(hosts=tuple(sorted(hosts)))

        # The key of the host is deleted last, and only if the host has not come back.
        is_last = len(keys) <= CLAIMS_PER_TRANSACTION
        deleted_keys = (member_key,) if is_last else ()
        expected = {member_key: None if member is None else member.text}
        claimed = ", ".join(map(describe_claim_key, claims)) or "nothing"
        log_text = f"evicted {host}, which had claimed {claimed}"
        if self.members.is_former_name(host):
            log_text = f"took over the claims of {host}, a former name of this machine: {claimed}"
        raise TransactionRequired(
            Transaction(claims, self.head, expected, deleted_keys, log_text))

    # Tentative claims, because several requests may share a transaction

    def block_tentatively(self, claims: ClaimChanges) -> list[Network]:
        """Block the subnets that a request is about to claim from other requests; return them."""
        blocked = []
        for key, claim in claims.items():
            network, address = parse_claim_key(key)
            family = self.state.families[network.version]
            is_known = network in family.remote_claims or network in family.subnets
            if claim is not None and not address and not is_known:
                family.used.add(network)
                family.remote_claims[network] = "another request of this host"
                blocked.append(network)
        return blocked

    def unblock(self, networks: Iterable[Network]) -> None:
        """Undo block_tentatively()."""
        for network in networks:
            family = self.state.families[network.version]
            family.used.remove(network)
            del family.remote_claims[network]

    # Status

    def _known_hosts(self) -> list[str]:
        """Return all hosts that have a key or a claim in etcd, in order."""
        hosts = set(self.members.by_host)
        for claim in self.claims.values():
            hosts.update(claim.hosts)
        return sorted(hosts)

    def is_present(self, host: str) -> bool | None:
        """Return whether a host has sent a heartbeat recently, None while etcd does not answer."""
        if self.failure:
            return None
        member = self.members.by_host.get(host)
        return host == self.host or (member is not None and member.is_present)

    def describe(self) -> Json:
        """Return the keys of the cluster in `status --json`."""
        counts: collections.Counter[str] = collections.Counter()
        for key, claim in self.claims.items():
            if key.count("/") == 1:
                counts.update(claim.hosts)
        hosts = []
        for host in self._known_hosts():
            hosts.append({
                "host": host,
                "is_present": self.is_present(host),
                "claims": counts[host],
                "is_own": self.members.is_former_name(host),
            })

        age_s = None
        if self._answered_s is not None:
            age_s = round(time.monotonic() - self._answered_s, 1)
        etcd = {
            "failure": self.failure,
            "due": len(self.dirty),
            "age_s": age_s,
        }
        return {"host": self.host, "hosts": hosts, "etcd": etcd}


class SharedSubnets:
    """Decides which addresses this host grants in subnets that it shares with other hosts.

    The address of an endpoint is claimed by one host, a gateway or auxiliary address by every host
    that has it. A new address is granted only after a transaction has claimed it. While etcd is
    unreachable, an address that this host certainly has claimed may be granted again, so that
    containers can restart.
    """

    def __init__(self, table: ClaimTable) -> None:
        self._table = table

    def decide(
        self,
        pool: Pool,
        request: AddressRequest,
        now_s: int,
        start: int,
        outcome: Outcome,
    ) -> AddressGrant:
        """Decide which address is granted; the search for a free one begins at offset start.

        Raises: TransactionRequired; as decide_address(); outcome.error.
        """
        subnet = pool.subnet
        is_away = bool(outcome.error or self._table.failure)
        if not request.address:
            if request.kind == GATEWAY:
                address = self._choose_remote_gateway(subnet)
            else:
                owners = (request.name, request.mac)
                address = self._choose_claimed_address(pool, owners, is_away, outcome)
            request = request._replace(address=address)

        unavailable = self._table.remote_addresses.get(subnet.network) or OffsetBitmap()
        try:
            grant = decide_address(pool, request, now_s, start, unavailable)
        except Unavailable:
            self._table.require_fresh("", outcome)
            raise
        self._require_claim(subnet.network, grant, is_away, outcome)
        return grant

    def foreign_claim(self, key: str, kind: str) -> Claim | None:
        """Return the claim of other hosts that conflicts with an address of this kind, or None."""
        claim = self._table.remote_claim(key)
        if claim is None:
            return None
        is_exclusive = kind == ENDPOINT or claim.kind in (ENDPOINT, "")
        return claim if is_exclusive else None

    def _owns(self, key: str, kind: str) -> bool:
        """Return whether this host certainly has claimed an address, for a lease of this kind."""
        table = self._table
        if not table.has_claimed(key) or key in table.uncertain or key in table.unconfirmed:
            return False
        claim = table.claims[key]
        if kind == ENDPOINT:
            return claim.kind == ENDPOINT and claim.hosts == (table.host,)
        return claim.kind in (GATEWAY, AUXILIARY)

    def _require_claim(self, network: Network, grant: AddressGrant, is_away: bool,
                       outcome: Outcome) -> None:
        """Check that this host may grant the address.

        Raises: TransactionRequired; Forbidden, Unavailable; outcome.error.
        """
        table = self._table
        key = f"{network}/{grant.address}"
        holder = table.contended.get(key)
        if holder:
            table.require_fresh(key, outcome)
            raise Forbidden(f"Address already in use: {grant.address} of {network} is held by host "
                            f"{holder}, though its claim was another host's")
        own = Claim((table.host,), grant.kind, False, grant.granted_s)
        claim = self.foreign_claim(key, grant.kind)
        if claim is None and table.is_granted(key, own, outcome):
            return

        # etcd may have lost the claim of the subnet: then it is written again, too.
        missing = table.differences([str(network)])
        if is_away and self._owns(key, grant.kind) and not missing:
            return

        if claim is not None:
            table.require_fresh(key, outcome)
            raise Forbidden(f"Address already in use: {grant.address} of {network} is claimed by "
                            f"{table.describe_claim(claim)}")
        if key in table.unconfirmed:
            raise Unavailable(f"{grant.address} of {network} was claimed by this host before gipam "
                              "started; if Docker does not use it, it is free soon: try again")

        # The transaction may succeed although its reply is lost; then this host does not know
        # whether it has the claim.
        if not self._owns(key, grant.kind):
            table.uncertain.add(key)
        missing[key] = join_claim(table.claims.get(key), own)
        table.claim(missing, outcome)

    def _choose_claimed_address(
        self,
        pool: Pool,
        owners: Iterable[str],
        is_away: bool,
        outcome: Outcome,
    ) -> str:
        """Return an address that is claimed for this request, or ""."""
        subnet = pool.subnet
        # The transaction has claimed one; while etcd is unreachable, the host's own claims serve.
        keys = outcome.granted
        if is_away:
            keys = keys.union(self._table.address_keys.get(subnet.network, ()))
        offsets = []
        for key in keys:
            network, address = parse_claim_key(key)
            if network != subnet.network or not address:
                continue
            offset = pool.offset_of(address)
            if is_available(pool, offset) and self._owns(key, ENDPOINT):
                offsets.append(offset)

        for owner in owners:
            last = subnet.affinity.last_offset(owner)
            if last is not None and last in offsets:
                return pool.address_at(last)
        return pool.address_at(offsets[0]) if offsets else ""

    def _choose_remote_gateway(self, subnet: Subnet) -> str:
        """Return a gateway that other hosts of the subnet have and this one lacks, or ""."""
        table = self._table
        addresses = []
        for key in table.address_keys.get(subnet.network, ()):
            if table.claims[key].kind == GATEWAY and table.own_claim(key) is None:
                _, address = parse_claim_key(key)
                addresses.append(address)
        return min(addresses, default="")


# === Service ======================================================================================
#
# Service is the driver, and the only code that changes the state. The Allocator decides a request,
# apply() changes the state in memory, and commit() writes all changes since the last commit as one
# journal record. Checkpoint writes the lease file in the background; Metrics counts.
#
# The rule: a change is never undone in memory. apply() reserves space in the journal before it
# changes anything, and if the append fails all the same, the state is read again from disk.

RunInLoop = Callable[..., Any]  # EventLoop.run_in_loop, or Service.run_once where no loop runs


class Histogram:
    """A histogram of durations. Source: Prometheus text format 0.0.4."""

    BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)

    def __init__(self) -> None:
        self.counts = [0 for _ in (*self.BOUNDS_S, math.inf)]
        self.sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(self.BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def samples(self) -> Iterator[tuple[str, Any]]:
        """Yield the suffix, with labels, and the value of each series."""
        total = 0
        for bound, count in zip((*self.BOUNDS_S, "+Inf"), self.counts):
            total += count
            yield f'_bucket{{le="{bound}"}}', total
        yield "_sum", f"{self.sum_s:.6f}"
        yield "_count", total


class Metrics:
    """Counters for GET /metrics."""

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.request_s = Histogram()
        self.sync_s = Histogram()
        self.last_write_s = 0.0  # UNIX time

    def count_request(self, method: str, result: str, duration_s: float) -> None:
        """Count a request by its method and the result that was delivered."""
        self.requests[method, result] += 1
        self.request_s.observe(duration_s)

    def count_commit(self, duration_s: float) -> None:
        """Count a journal record that has been written and synced."""
        self.sync_s.observe(duration_s)
        self.last_write_s = time.time()


class AppliedRecord(NamedTuple):
    """A record that was applied in this iteration, for the journal and for the log."""

    record: Record
    text: str  # JSON
    pool: Pool
    started_s: float

    def describe(self, now_s: float) -> str:
        """Return the log line: the change, and how long it took if the disk was slow."""
        duration_s = now_s - self.started_s
        text = self._describe_change()
        if duration_s < SLOW_COMMIT_S:
            return text
        return f"{text}, which took {duration_s:.1f} s"

    def _describe_change(self) -> str:
        record = self.record
        label = self.pool.label
        if isinstance(record, AddressGrant):
            return f"allocated {describe_grant(record)} in {label}"
        if isinstance(record, AddressRelease):
            return f"released {record.address} in {label}"
        if isinstance(record, PoolGrant):
            network = f"network {record.name}" if record.name else "a network"
            prefix = record.subnet
            if record.sub_pool:
                prefix = f"{record.sub_pool} of {prefix}"
            return f"allocated {prefix} to {network}"
        if isinstance(record, PoolRelease):
            return f"released {label}"
        return f"recognised {label} as Docker's pool {record.new_id}"


def describe_grant(grant: AddressGrant) -> str:
    """Return the address and its owner for the log: "10.2.0.2 to web1 (MAC)"."""
    owner = grant.name or grant.mac
    if not owner:
        return grant.address if grant.kind == ENDPOINT else f"{grant.kind} {grant.address}"
    if grant.name and grant.mac:
        owner += f" ({grant.mac})"
    return f"{grant.address} to {owner}"


class DockerImport:
    """The progress of the comparison with Docker.

    An import is due after each start and each adoption, so nothing of it is saved. Only the loop
    thread changes it. Claims in etcd of what is not held here are deleted only after
    Service.end_import(), because until then Docker may use their subnets.
    """

    def __init__(self) -> None:
        self.is_due = True
        self.has_failed = False  # the last attempt
        # Adopted or imported, and not yet shown by Docker: seq -> (subnet, address or "").
        self.unconfirmed: dict[int, tuple[str, str]] = {}
        self.requested = threading.Event()  # wakes the import thread
        self.requested.set()

    def add(self, seq: int, key: tuple[str, str]) -> None:
        """Request that Docker confirms the grant of this record, which was adopted or imported."""
        self.unconfirmed[seq] = key
        self.is_due = True
        self.requested.set()

    def confirm(self, seqs: Iterable[int]) -> None:
        """Note that Docker has shown the grants of these records, or that they were released."""
        for seq in seqs:
            self.unconfirmed.pop(seq, None)

    def take(self) -> dict[int, tuple[str, str]]:
        """Return the unconfirmed grants, for this import to confirm."""
        self.requested.clear()
        return self.unconfirmed.copy()

    def end(self) -> None:
        """Note that Docker has been compared; while something is unconfirmed, stay due."""
        if not self.unconfirmed:
            self.is_due = False

    def forget_after(self, seq: int) -> None:
        """Forget records that were lost when the state was read again from disk."""
        lost_seqs = [known for known in self.unconfirmed if known > seq]
        for lost in lost_seqs:
            del self.unconfirmed[lost]


class Service:
    """The driver: it decides and applies requests, and commits one journal record per iteration.

    Only one thread at a time calls it (the loop thread while it serves), so it needs no lock. The
    only blocking call is the write to the disk.
    """

    def __init__(self, store: Store, state: State, config: Json, read_state: Callable[[], State],
                 netlink: NetlinkRequest, proxies: ProxyNeighbours | None = None) -> None:
        self.state = state
        self.store = store
        self.netlink = netlink
        self.proxies = proxies
        self.metrics = Metrics()
        self.config = config  # the keys of the lease file
        self.daemon_info: Json = {}  # keys of /status about the daemon
        self.has_macs = True  # whether Docker sends the MAC addresses of containers
        self._read_state = read_state
        self._uncommitted: list[AppliedRecord] = []
        self._unlogged: list[AppliedRecord] = []
        self._is_applying = False  # stays set if the state is invalid

        self.claims = NoClaims()  # ClaimTable where several hosts share etcd
        self.etcd_s = Histogram()
        self.docker_import = DockerImport()
        store.prepare_append()

    def apply(self, record: Record) -> None:
        """Apply a record, which is on disk after commit().

        Raises: StoreError if the disk is full, with nothing changed.
        """
        if self.store.fatal_error:
            raise self.store.fatal_error
        started_s = time.perf_counter()
        text = encode_json([RECORD_NAMES[type(record)], *record])
        self.store.reserve(len(text))

        # From here on, the change cannot be undone.
        self._is_applying = True
        pool = self.state.pools.get(record.pool_id)
        self.state.apply(record)
        pool = pool or self.state.pools[record.pool_id]
        if self.proxies:
            self.proxies.on_record(pool, record)
        self._uncommitted.append(AppliedRecord(record, text, pool, started_s))
        self._is_applying = False
        self.claims.on_record(record, pool.subnet)

    def commit(self) -> StoreError | None:
        """Write the changes since the last commit as one record; return why that failed.

        Durable: on return of None, all changes so far. If the append fails, even half-way, the
        state is read again from disk, and no reply about a change since the last commit may leave.
        """
        applied = self._uncommitted
        if self.store.fatal_error:
            return self.store.fatal_error
        if not applied:
            return None

        self._uncommitted = []
        started_s = time.perf_counter()
        try:
            self.store.append([record.text for record in applied])
        except Exception as error:  # noqa: BLE001 - part of the record may be on disk
            if not isinstance(error, StoreError):
                error = StoreError(f"cannot write the journal: {error!r}")
            return self.reload(error)
        self.metrics.count_commit(time.perf_counter() - started_s)
        self._unlogged += applied
        return None

    def log_committed(self) -> None:
        """Log the committed changes, after their replies, because logging takes time."""
        if self._unlogged:
            now_s = time.perf_counter()
            log.info("\n".join([record.describe(now_s) for record in self._unlogged]))
            self._unlogged = []

    def recover_from_exception(self) -> None:
        """After an unexpected exception that interrupted apply(), reload the state.

        The changes before it are complete, and are committed first. If that fails, gipam exits,
        because this iteration may have decided other requests on them.
        """
        if not self._is_applying:
            return
        error = self.commit()
        if error and not self.store.fatal_error:
            self.store.fail(str(error))
        self.reload(StoreError("a change failed half-way: the state is read again from disk"))

    def reload(self, error: StoreError) -> StoreError:
        """Read the state again from disk, after this error; return it, or the fatal one.

        A running checkpoint ends at its next step.
        """
        self.store.last_error = str(error)
        self._is_applying = False
        # A fatal error is logged when the daemon ends.
        if self.store.fatal_error:
            return self.store.fatal_error
        log.error("%s", error)
        try:
            self.store.remove_temp()
            self.store.lock_segments()
            self.state = self._read_state()
            self.docker_import.forget_after(self.state.seq)
            self.store.prepare_append()
            self.claims.rebind(self.state)
        except Exception as failure:  # noqa: BLE001 - the process restarts after any of them
            self.store.fail(f"cannot read the state again: {failure!r}")
        return self.store.fatal_error or error

    def run_once(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(*args) as an iteration of its own, while no loop runs; return its result.

        Durable: on return, what it changed. Raises: as the function; StoreError.
        """
        try:
            return function(*args)
        finally:
            error = self.commit()
            self.log_committed()
            if error:
                raise error

    def request_pool(self, request: PoolRequest, outcome: Outcome = NO_OUTCOME) -> PoolGrant:
        """Grant a subnet.

        Raises: as decide_pool(); TransactionRequired; StoreError.
        """
        self.claims.require_shareable(request)
        routes: list[Range] = []
        if request.subnet is None:
            # Routes are never cached, because a VPN may have come up.
            routes = self.read_obstacles(self.state.families[request.version])

        with self.claims.deciding(request.subnet, request.sub_pool, request.version,
                                  request.is_shared, outcome):
            grant = decide_pool(
                self.state, request, routes, int(time.time()), secrets.token_hex(8))
            self.claims.require_claim(grant, outcome)
            self.apply(grant)
        return grant

    def read_obstacles(self, family: Family) -> list[Range]:
        """Return routes and addresses of this host, which no block may overlap.

        Raises: Unavailable if the kernel refuses.
        """
        try:
            return read_used_ranges(self.netlink, family.version, family.bases)
        except OSError as error:
            raise Unavailable("cannot ask the kernel for the routes of this host: "
                              f"{error.strerror}; try again") from None

    def request_address(self, pool_id: str, request: AddressRequest,
                        outcome: Outcome = NO_OUTCOME) -> tuple[AddressGrant, int]:
        """Grant an address; return the prefixlen of its subnet too.

        A pool that Docker uses and the state lacks is adopted first, and stays adopted.
        Raises: as decide_address() and decide_adoption(); TransactionRequired; StoreError.
        """
        now_s = int(time.time())
        pool = self._pool_of_request(pool_id)
        if pool is None:
            pool = self._adopt_pool(pool_id, request.address, now_s, outcome)
        network = pool.subnet.network
        self.claims.require_no_conflict(network, outcome)
        if pool.subnet.is_shared:
            # The start is random, so that hosts seldom choose the same address.
            start = random.randint(pool.low, pool.high)  # noqa: S311
            grant = self.claims.decide_shared_address(pool, request, now_s, start, outcome)
        else:
            grant = decide_address(pool, request, now_s)
        self.apply(grant)
        return grant, network.prefixlen

    def release(self, pool_id: str, address: str = "") -> Record | None:
        """Release a pool with its leases, or an address in it; None: it is not held.

        Raises: InvalidRequest, StoreError.
        """
        pool = self._pool_of_request(pool_id)
        if not pool:
            return None
        record: Record | None = PoolRelease(pool_id)
        if address:
            record = decide_address_release(pool, address)
        if record:
            self.apply(record)
        return record

    def _pool_of_request(self, pool_id: str) -> Pool | None:
        """Return the pool of an id, or None.

        Docker's API does not show ids: an imported pool is bound to the first id that Docker sends
        for its subnet and range. Raises: StoreError.
        """
        if pool_id not in self.state.pools:
            parsed = parse_pool_id(pool_id)
            unbound = make_pool_id(*parsed, UNBOUND) if parsed else ""
            if unbound in self.state.pools:
                self.apply(PoolIdBinding(unbound, pool_id))
        return self.state.pools.get(pool_id)

    def release_if_unchanged(self, pool_id: str, address: str, seq: int) -> Record | None:
        """Release a pool, or an address in it, if change seq granted it.

        Raises: Forbidden, InvalidRequest, StoreError.
        """
        pool = self.state.pools.get(pool_id)
        granted: Pool | Lease | None = pool
        if pool and address:
            granted = pool.leases.get(parse_offset(pool, address))
        if not granted or granted.seq != seq:
            raise Forbidden(f"{address or 'pool'} of {pool_id!r} has changed since change {seq}: "
                            "look again")
        return self.release(pool_id, address)

    def roll_back(self, record: Record | None, seq: int) -> None:
        """Release the grant of a reply that the client did not read, unless it changed since.

        A release is never rolled back.
        """
        address = ""
        if isinstance(record, AddressGrant):
            address = record.address
        elif not isinstance(record, PoolGrant):
            return
        with contextlib.suppress(Forbidden, StoreError):
            self.release_if_unchanged(record.pool_id, address, seq)
            log.warning("rolled back %s in %s: the client has not read the reply",
                        address or "the pool", record.pool_id)

    def _adopt_pool(self, pool_id: str, address: str, now_s: int, outcome: Outcome) -> Pool:
        """Adopt the pool of an id that Docker uses and the state lacks.

        The pool stays adopted even if the request for this address in it is refused.
        Raises: as decide_adoption(); TransactionRequired; StoreError.
        """
        subnet, sub_pool = require_pool_id(pool_id)
        # In a shared subnet the claims say which address is the gateway.
        guesses_gateway = not self.claims.has_shared_claim(subnet)
        records = decide_adoption(
            self.state, pool_id, address, now_s, secrets.token_hex(8), guesses_gateway)
        self._apply_import(subnet, sub_pool, records, outcome)
        log.warning("adopted %s, which Docker uses and the lease file lacks", subnet)
        return self.state.pools[pool_id]

    def import_pool(self, subnet: Network, sub_pool: Network | None, name: str,
                    requests: list[AddressRequest], seq: int,
                    outcome: Outcome = NO_OUTCOME) -> range:
        """Import a pool and its addresses, see decide_import(); return the seqs of the records.

        Raises: as decide_import(), with nothing imported; TransactionRequired; StoreError.
        """
        last_seq = self.state.seq
        records = decide_import(self.state, subnet, sub_pool, name, requests, seq,
                                int(time.time()))
        self._apply_import(subnet, sub_pool, records, outcome)
        return range(last_seq + 1, self.state.seq + 1)

    def _apply_import(self, subnet: Network, sub_pool: Network | None,
                      records: Iterator[Record], outcome: Outcome) -> None:
        """Apply each record before the next is decided, and request that Docker confirms it.

        A pool is shared if the claim of its subnet is, whichever hosts have made it.
        """
        is_shared = self.claims.has_shared_claim(subnet)
        with self.claims.deciding(subnet, sub_pool, subnet.version, True, outcome):
            for record in records:
                address = record.address if isinstance(record, AddressGrant) else ""
                if isinstance(record, PoolGrant):
                    grant = record._replace(is_shared=is_shared)
                    self.claims.require_claim(grant, outcome)
                    self.apply(grant)
                else:
                    self.apply(record)
                self.docker_import.add(self.state.seq, (str(subnet), address))

    def end_import(self) -> bool:
        """Note that all that Docker uses is held; return whether everything is confirmed."""
        self.docker_import.end()
        self.claims.on_docker_compared()
        return not self.docker_import.is_due

    def needs_checkpoint(self) -> bool:
        """Return whether the journal is long, or the lease file does not reference its segment."""
        store = self.store
        if store.fatal_error:
            return False
        # The first append, or a failed checkpoint, leaves the segment unreferenced.
        is_unreferenced = store.segment != (store.referenced_segment or 0)
        limit_bytes = max(MIN_CHECKPOINT_BYTES, store.snapshot_bytes)
        return is_unreferenced or store.journal_bytes > limit_bytes


class Checkpoint:
    """Writes the state to the lease file, and removes the journal segments that it replaces.

    The checkpoint thread only writes the temporary file. Each step that reads the state, or changes
    a file name, is short and runs in the loop, so that no request waits long.

    A checkpoint loses no change: a new segment is started before the state is copied, and the old
    segments are removed only after the lease file with their changes is in place.
    """

    def __init__(self, service: Service, run_in_loop: RunInLoop) -> None:
        self._service = service
        self._store = service.store
        self._run_in_loop = run_in_loop
        self._state = service.state

    def run(self, is_stopping: bool = False) -> bool:
        """Make a checkpoint; return whether that worked. Raises: nothing.

        At a stop it leaves no journal, so that the lease file can be copied alone.
        """
        try:
            self._write_lease_file(is_stopping)
            return True
        except (OSError, GipamError) as error:
            text = format_os_error(error)
            if self._store.path not in text:
                text = f"{self._store.path}: {text}"
            log.warning("the checkpoint failed, and the journal keeps all changes: %s", text)
        except Exception:
            log.exception("a checkpoint failed, which is a bug in gipam")
        # After a reload the step fails: the file is removed already, or another checkpoint's.
        with contextlib.suppress(GipamError):
            self._step(self._store.remove_temp)
        return False

    def _write_lease_file(self, is_stopping: bool) -> None:
        store = self._store
        segment = None
        if not is_stopping:
            self._step(store.rotate, PREALLOCATE_BYTES)
            segment = store.segment or None
        state = self._step(copy_state, self._state)
        chunks = encode_snapshot(self._service.config, state, segment)
        self._step(store.create_temp)
        store.write_temp(self._chunks_in_loop(chunks))
        self._step(store.publish_temp, segment)
        for number in self._step(store.segment_numbers):
            if is_stopping or number < store.segment:
                self._step(store.remove_segment, number)

    def _chunks_in_loop(self, chunks: Iterator[str]) -> Iterator[str]:
        """Yield the chunks; each is encoded in the loop, because it reads the state."""
        while True:
            chunk = self._step(next, chunks, None)
            if chunk is None:
                return
            yield chunk

    def _step(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a step in the loop. Raises: as the function; StoreError."""
        return self._run_in_loop(self._run_step, function, *args)

    def _run_step(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._store.fatal_error:
            raise self._store.fatal_error
        if self._state is not self._service.state:
            raise StoreError("the state has been read again meanwhile")
        return function(*args)


def recover(store: Store, document: Json | None, state: State) -> None:
    """Fill the empty state from disk.

    Raises: CorruptionError that names the location and the remedy.
    """
    location = store.path
    contradicted = "itself"
    try:
        if document is not None:
            decode_snapshot(document, state)
        contradicted = "the records before it"
        for line, record in store.replay(document, state.seq):
            location = line
            state.apply(decode_record(record))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # A plain ValueError has a text for people; of others, the type matters.
        reason = str(error) if type(error) is ValueError else repr(error)
        raise store.corruption(location, f"contradicts {contradicted}: {reason}") from None


# === API ==========================================================================================
#
# The plugin methods (METHODS), for Docker and the commands, and the pages /status, /metrics and
# /healthz (PAGES). dispatch() maps a request to a Reply, bytes in and bytes out; Arguments reads
# and checks the arguments of a method.
#
# The rule: a request with invalid input gets an error with the reason, and changes nothing.

NAME_OPTION = "gipam.name"
LENGTH_OPTIONS = {4: "gipam.v4ab", 6: "gipam.v6ab"}
SHARED_OPTION = "gipam.shared"
ENDPOINT_NAME = "com.docker.network.endpoint.name"
ENDPOINT_MAC = "com.docker.network.endpoint.macaddress"

# Values of the label "result" in the metrics; they stay as they are when a class is renamed.
RESULTS = ("ok", "bug", "InvalidRequest", "Forbidden", "Unavailable", "StoreError", "StoreLost")
RESULT_LABELS = {FatalStoreError: "StoreLost", ShuttingDown: "Stopping", EtcdError: "Refused"}


class Reply:
    """A reply, and the record to roll back if the client does not read it."""

    __slots__ = ("body", "content_type", "page", "record", "result", "seq", "status")

    def __init__(self, status: int, body: bytes, result: str = "ok",
                 record: Record | None = None) -> None:
        self.status = status
        self.body = body
        self.result = result  # for the metrics
        self.record = record  # made by the request
        self.seq = 0  # of the record
        self.content_type = REPLY_TYPE
        self.page: Iterator[bytes] | None = None  # chunks after the body


def quote_value(value: Any) -> str:
    """Return a JSON value for a message; of an object or array only the type, as it may be long."""
    if isinstance(value, (list, dict)):
        return type(value).__name__
    return printable(repr(value))


class Arguments(Dict[str, Any]):
    """The arguments of an API call. Each method raises InvalidRequest."""

    def text(self, key: str, is_required: bool = False) -> str:
        """Return a string that may be stored and printed, "" if it is missing."""
        value = self.get(key, "")
        if not isinstance(value, str):
            raise InvalidRequest(f"{key} is not a string: {quote_value(value)}")
        if is_required and not value:
            raise InvalidRequest(f"{key} is empty or missing")
        if len(value) > MAX_TEXT_CHARS:
            raise InvalidRequest(f"{key} is longer than {MAX_TEXT_CHARS} characters")
        if not value.isprintable():
            raise InvalidRequest(f"{key} has unprintable characters: {value!r}")
        return value

    def address(self, is_required: bool = False) -> str:
        """Return a bare address of either family, "" if it is missing."""
        text = self.text("Address", is_required)
        if not text:
            return ""
        version = 6 if ":" in text else 4
        try:
            return format_address(parse_address(text, version), version)
        except ValueError:
            raise InvalidRequest(f"invalid address: {text!r} is not a bare IP address") from None

    def flag(self, key: str) -> bool:
        """Return a boolean, False if it is missing."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{key} is not true or false: {quote_value(value)}")
        return value

    def seq(self) -> int:
        """Return the sequence number of a change."""
        value = self.get("Seq")
        if type(value) is not int:  # bool is a subclass of int
            raise InvalidRequest(f"Seq is not a number: {quote_value(value)}")
        return value

    def prefix(self, key: str) -> Network | None:
        """Return a prefix with its host bits cleared (Docker up to 24 does not clear them)."""
        text = self.text(key)
        if not text:
            return None
        try:
            return parse_prefix(text, mask=True)
        except ValueError as error:
            raise InvalidRequest(f"invalid address {key.lower()}: {error}") from None

    def options(self) -> Arguments:
        """Return the map of driver options, {} if it is missing."""
        options = self.get("Options")
        if options is None:
            options = {}
        if not isinstance(options, dict):
            raise InvalidRequest(f"Options is not a map of strings: {quote_value(options)}")
        return Arguments(options)


def dispatch(service: Service, verb: str, target: str, body: bytes, outcome: Outcome = NO_OUTCOME,
             paths: frozenset[str] = frozenset()) -> Reply:
    """Decide a request; if there are paths, only they are served.

    What it changes is not on disk before Service.commit(). A refused request has changed nothing,
    except that it may have adopted a pool.
    Raises: TransactionRequired; then call it again with the outcome of the transaction.
    """
    path, _, query = target.partition("?")
    try:
        if paths and path not in paths:
            raise InvalidRequest(f"{path} is not served here, only {', '.join(sorted(paths))}", 404)
        return route(service, verb, path, query, body, outcome)

    except TransactionRequired:
        raise
    except GipamError as error:
        label = METHODS[path].label if path in METHODS else "a request"
        # Monitors ask for /healthz every few seconds, and the failure is in the log already.
        if path != "/healthz":
            log.warning("refused %s: %s", label, error)
        return error_reply(error)

    except Exception:
        # Docker gets a short reply, and the log the traceback.
        log.exception("failed to handle %s, which is a bug in gipam; the body was %r",
                      printable(path), body[:MAX_TEXT_CHARS])
        service.recover_from_exception()
        reply = error_reply(GipamError("internal error of gipam: see its log"))
        reply.result = "bug"
        return reply


def route(service: Service, verb: str, path: str, query: str, body: bytes,
          outcome: Outcome) -> Reply:
    """Find the function of a path, and call it. Raises: GipamError, TransactionRequired."""
    if verb == "POST" and path in METHODS:
        method = METHODS[path]
        result, record = method.function(service, decode_arguments(body), outcome)
        reply = Reply(200, encode_json(result).encode(), "ok", record)
        reply.seq = service.state.seq
        return reply

    if path not in PATHS:
        raise InvalidRequest(f"unknown method {printable(path)!r}: this is an IPAM driver", 404)
    needed = "GET" if path in PAGES else "POST"
    if verb != needed:
        raise InvalidRequest(f"{path} takes {needed}, not {printable(verb)}", 405)

    if path in STATIC_REPLIES:
        replies = STATIC_REPLIES if service.has_macs else STATIC_REPLIES_WITHOUT_MAC
        return Reply(200, replies[path])

    # The first chunk is the body, so that a short page has a Content-Length.
    page = PAGES[path]
    chunks = join_chunks(page.function(service, query))
    reply = Reply(200, next(chunks, b""))
    reply.content_type = page.content_type
    reply.page = chunks
    return reply


def error_reply(error: GipamError) -> Reply:
    """Return the reply for an error. dockerd reads its Err, and the commands its Error."""
    text = str(error)
    body = encode_json({"Err": text, "Error": text}).encode()
    result = RESULT_LABELS.get(type(error), type(error).__name__)
    return Reply(error.http_status, body, result)


def method_label(target: str) -> str:
    """Return the label of a request in the metrics: its path, or "unknown"."""
    if target in PATHS:
        return target
    path = target.partition("?")[0]
    return path if path in PATHS else "unknown"


def decode_arguments(body: bytes) -> Arguments:
    """Return the arguments of an API call. Raises: InvalidRequest."""
    # moby#39331: when dockerd retries a request, it may lose the body. An empty body is refused,
    # because decided with default values the request would get another subnet or address.
    if not body:
        raise InvalidRequest("the request has no body: dockerd lost it in a retry; "
                             "run the command again")
    try:
        text = body.decode().strip()
        arguments, end = raw_decode(text)
    except (ValueError, RecursionError):
        # The texts of these errors differ between versions of Python.
        raise InvalidRequest("the body is not JSON") from None
    if end < len(text):
        raise InvalidRequest("the body is not JSON")
    if not isinstance(arguments, dict):
        raise InvalidRequest("the body is not a JSON object")
    return Arguments(arguments)


def parse_pool_request(arguments: Arguments) -> PoolRequest:
    """Return the request of a network. Raises: InvalidRequest."""
    space = arguments.text("AddressSpace")
    if space not in ("", ADDRESS_SPACE):
        raise InvalidRequest(f"invalid address space: {space!r} is not {ADDRESS_SPACE!r}")
    subnet = arguments.prefix("Pool")
    sub_pool = arguments.prefix("SubPool")
    options = arguments.options()

    is_v6 = arguments.get("V6", False)
    if not isinstance(is_v6, bool) or (is_v6 and subnet and subnet.version == 4):
        raise InvalidRequest(f"invalid address pool: {subnet} with V6 {quote_value(is_v6)}")
    version = 6 if is_v6 else 4
    if subnet:
        version = subnet.version
    prefixlen = parse_prefixlen(options, version)

    # A subnet of zeros, such as 0.0.0.0/26, requests any block of that length.
    if subnet and is_size_hint(subnet):
        prefixlen = subnet.prefixlen or prefixlen
        subnet = None

    if sub_pool and not subnet:
        raise InvalidRequest(
            f"invalid address subpool: {sub_pool} needs the subnet that contains it")
    shared = options.text(SHARED_OPTION) or "false"
    if shared not in ("true", "false"):
        raise InvalidRequest(f"option {SHARED_OPTION} is not true or false: {shared!r}")
    if shared == "true" and not subnet:
        raise InvalidRequest(f"option {SHARED_OPTION} needs a --subnet")
    return PoolRequest(version, subnet, sub_pool, prefixlen, options.text(NAME_OPTION),
                       shared == "true")


def parse_prefixlen(options: Arguments, version: int) -> int | None:
    """Return the requested prefix length. Raises: InvalidRequest, also for unknown options."""
    known = (NAME_OPTION, *LENGTH_OPTIONS.values(), SHARED_OPTION)
    for key in options:
        if key.startswith("gipam.") and key not in known:
            raise InvalidRequest(f"unknown option {printable(repr(key))}: "
                                 f"gipam has {', '.join(known)}")
        # Options of other drivers are ignored, but one that looks like gipam's is logged.
        if "gipam." + key in known:
            log.warning("option %r does nothing: did you mean 'gipam.%s'?", key, key)

    for key in LENGTH_OPTIONS.values():
        if key in options and not re.fullmatch("[0-9]{1,3}", options.text(key)):
            raise InvalidRequest(f"option {key} is not a prefix length: {options[key]!r}")
    text = options.text(LENGTH_OPTIONS[version])
    return int(text) if text else None


def handle_request_pool(service: Service, arguments: Arguments,
                        outcome: Outcome) -> tuple[Json, Record]:
    """Grant a network its subnet."""
    request = parse_pool_request(arguments)
    record = service.request_pool(request, outcome)

    # In each family, a name reserves one block.
    reservation = service.state.families[request.version].reservations.get(request.name)
    if reservation and str(reservation.network) != record.subnet:
        log.warning("gipam.name %r is in use for %s: %s is not reserved for it", request.name,
                    reservation.network, record.subnet)
    return {"PoolID": record.pool_id, "Pool": record.subnet, "Data": {}}, record


def handle_request_address(service: Service, arguments: Arguments,
                           outcome: Outcome) -> tuple[Json, Record]:
    """Grant an address.

    Its kind is a gateway's if Docker says so; an endpoint's if Docker names the container or leaves
    the choice to gipam; else it is an auxiliary address (--aux-address), which Docker requests by
    its text alone. With -mac false, Docker before 29 never names the container, so that only the
    gateway can be told apart.
    """
    pool_id = arguments.text("PoolID", is_required=True)
    address = arguments.address()
    options = arguments.options()
    mac = options.text(ENDPOINT_MAC)
    name = options.text(ENDPOINT_NAME)

    kind = AUXILIARY
    if mac or name or not address or not service.has_macs:
        kind = ENDPOINT
    if options.get("RequestAddressType") == "com.docker.network.gateway":
        kind = GATEWAY

    request = AddressRequest(address, kind, mac, name, is_explicit=bool(address))
    record, prefixlen = service.request_address(pool_id, request, outcome)
    return {"Address": f"{record.address}/{prefixlen}", "Data": {}}, record


def handle_release_pool(service: Service, arguments: Arguments,
                        _: Outcome) -> tuple[Json, Record | None]:
    """Release a pool. To release one that is not held is not an error."""
    pool_id = arguments.text("PoolID", is_required=True)
    record = service.release(pool_id)
    if record is None:
        log.warning("nothing to release: %s is not held", pool_id)
    return {}, record


def handle_release_address(service: Service, arguments: Arguments,
                           _: Outcome) -> tuple[Json, Record | None]:
    """Release an address. To release one that is not held is not an error."""
    pool_id = arguments.text("PoolID", is_required=True)
    address = arguments.address(is_required=True)
    record = service.release(pool_id, address)
    if record is None:
        log.warning("nothing to release: %s in %s is not held", address, pool_id)
    return {}, record


def handle_release_if_unchanged(service: Service, arguments: Arguments,
                                _: Outcome) -> tuple[Json, Record | None]:
    """Release a pool or lease as `check` or `release` saw it, unless it has changed since."""
    pool_id = arguments.text("PoolID", is_required=True)
    record = service.release_if_unchanged(pool_id, arguments.address(), arguments.seq())
    return {}, record


def parse_leases(leases: Any) -> list[AddressRequest]:
    """Return the leases of an import. Raises: InvalidRequest."""
    if not isinstance(leases, list):
        raise InvalidRequest("the list Leases is missing")
    if len(leases) > MAX_IMPORT_LEASES:
        raise InvalidRequest(f"Leases has {len(leases)} entries, more than {MAX_IMPORT_LEASES}: "
                             "import the others in further calls, with the Seq of the pool")

    requests = []
    for lease in leases:
        if not isinstance(lease, dict):
            raise InvalidRequest(f"a lease is not an object: {quote_value(lease)}")
        fields = Arguments(lease)
        kind = fields.text("Kind")
        if kind not in LEASE_KINDS:
            raise InvalidRequest(f"Kind is not one of {', '.join(LEASE_KINDS)}: {kind!r}")
        requests.append(AddressRequest(fields.text("Address"), kind, fields.text("MAC"),
                                       fields.text("Name"), fields.flag("Explicit")))
    return requests


def handle_import(service: Service, arguments: Arguments, outcome: Outcome) -> tuple[Json, None]:
    """Import a pool and its addresses; reply with the number of changes and the last seq."""
    subnet = arguments.prefix("Subnet")
    sub_pool = arguments.prefix("SubPool")
    if not subnet:
        raise InvalidRequest("Subnet is missing")
    requests = parse_leases(arguments.get("Leases"))
    seqs = service.import_pool(subnet, sub_pool, arguments.text("Name"), requests, arguments.seq(),
                               outcome)
    log.info("recovered %s from Docker: %s", sub_pool or subnet, plural(len(seqs), "change"))
    return {"Adopted": len(seqs), "Seq": seqs.stop - 1}, None


def handle_evict(service: Service, arguments: Arguments, outcome: Outcome) -> tuple[Json, None]:
    """Delete the claims of a host that will never come back."""
    host = arguments.text("Host", is_required=True)
    service.claims.evict(host, outcome)
    return {"Host": host}, None


def describe_bases(state: State, routes: Mapping[int, list[Range]]) -> list[Json]:
    """Return the bases of `status --json`, with the routes of the host inside them."""
    descriptions = []
    for version, family in state.families.items():
        for base in family.bases:
            descriptions.append(describe_base(family, base, routes.get(version, [])))
    return descriptions


def describe_base(family: Family, base: Network, routes: list[Range]) -> Json:
    """Return a base of `status --json`."""
    version = family.version
    low, high = address_range(base)
    total, used, excluded = family.block_counts(base)
    exclusions = [network for network in family.excluded if base.overlaps(network)]

    # A route may lie in an excluded prefix, whose blocks count only once.
    routes = [route for route in routes if low <= route[0] <= high]
    routed_or_excluded = family.count_free([*routes, *map(address_range, exclusions)])
    remembered = {}
    for name, reservation in family.reservations.items():
        if low <= int(reservation.network.network_address) <= high:
            remembered[name] = str(reservation.network)

    return {
        "prefix": str(base),
        "family": version,
        "block_prefixlen": family.prefixlen,
        "blocks": total,
        "blocks_used": used,
        "blocks_excluded": excluded,
        "blocks_routed": routed_or_excluded - excluded,
        "excluded": list(map(str, exclusions)),
        "routes": [format_range(first, last, version) for first, last in routes],
        "remembered": remembered,
    }


def format_range(first: int, last: int, version: int) -> str:
    """Return the CIDR form of a range of addresses that is a prefix."""
    prefixlen = ADDRESS_BITS[version] - (last - first).bit_length()
    return f"{format_address(first, version)}/{prefixlen}"


def status_page(service: Service, query: str) -> Iterator[str]:
    """Yield the JSON of the status in chunks; each pool is encoded when its chunk is sent."""
    has_leases = "leases=1" in query.split("&")
    yield encode_json(describe_service(service))[:-1] + ',"claims":['
    yield from encode_items(describe_claims(service.claims, has_leases), LEASES_PER_CHUNK)
    yield '],"pools":['
    comma = ""
    for pool in list(service.state.pools.values()):
        yield comma
        yield from encode_pool_status(service, pool, has_leases)
        comma = ","
    yield "]}"


def describe_service(service: Service) -> Json:
    """Return the part of the status that is not about pools or claims."""
    routes = {version: service.read_obstacles(family)
              for version, family in service.state.families.items() if family.bases}
    return {
        **service.daemon_info,
        "version": __version__,
        "seq": service.state.seq,
        "bases": describe_bases(service.state, routes),
        "trouble": service.store.last_error,
        **service.claims.describe(),
    }


def describe_claims(table: NoClaims, has_addresses: bool) -> Iterator[Json]:
    """Yield the claims of subnets in the status, and those of addresses if wanted."""
    for key, claim in list(table.claims.items()):
        network, address = parse_claim_key(key)
        if has_addresses or not address:
            yield {
                "subnet": str(network),
                "address": address,
                "hosts": claim.hosts,
                "is_shared": claim.is_shared,
                "since_s": claim.since_s,
            }


def encode_pool_status(service: Service, pool: Pool, has_leases: bool) -> Iterator[str]:
    """Yield the JSON of a pool in the status, in chunks."""
    network = pool.subnet.network
    status: Json = {
        "id": pool.pool_id,
        "subnet": str(network),
        "sub_pool": str(pool.sub_pool or ""),
        "name": pool.name,
        "leases": len(pool.leases),
        "usable": pool.capacity(),
        "granted_s": pool.granted_s,
        "seq": pool.seq,
        "is_shared": pool.subnet.is_shared,
        "claimed_elsewhere": service.claims.conflict_text(network),
    }
    if not has_leases:
        yield encode_json(status)
        return

    # A large pool takes many chunks: leases are encoded as the client reads them.
    remembered = {}
    for past in pool.subnet.affinity:
        for owner in past.owners:
            remembered[owner] = pool.address_at(past.offset)
    status["remembered"] = remembered
    yield encode_json(status)[:-1] + ',"addresses":['
    yield from encode_items(describe_leases(pool), LEASES_PER_CHUNK)
    yield "]}"


def describe_leases(pool: Pool) -> Iterator[Json]:
    """Yield the leases in the status, except those that are released meanwhile."""
    for offset in list(pool.leases):
        lease = pool.leases.get(offset)
        if lease:
            yield {"address": pool.address_at(offset), **lease._asdict()}


Samples = Iterable[Tuple[str, Any]]  # of a metric: suffix and labels, value


class Metric(NamedTuple):
    """A metric of GET /metrics; without samples it is left out."""

    name: str
    metric_type: str
    help: str
    samples: Samples


def list_metrics(service: Service) -> Iterator[Metric]:
    """Yield all metrics; the samples are counted when they are read."""
    yield Metric("build_info", "gauge", "1, with the version of gipam",
                 [(f'{{version="{__version__}"}}', 1)])
    yield Metric("base_blocks", "gauge", "Blocks of the default length in a base",
                 base_samples(service, "blocks"))
    yield Metric("base_blocks_used", "gauge", "Blocks of a base that are held",
                 base_samples(service, "blocks_used"))
    yield Metric("base_blocks_excluded", "gauge", "Blocks of a base that are never assigned",
                 base_samples(service, "blocks_excluded"))
    yield Metric("pool_addresses", "gauge", "Addresses of a pool that can be assigned",
                 capacity_samples(service))
    yield Metric("pool_addresses_used", "gauge", "Addresses of a pool that are held",
                 lease_samples(service))

    metrics = service.metrics
    yield Metric("requests_total", "counter", "Requests, by method and result",
                 request_samples(metrics))
    yield Metric("request_duration_seconds", "histogram",
                 "Time from a complete request to its reply, with the commit and etcd",
                 metrics.request_s.samples())
    yield Metric("journal_sync_duration_seconds", "histogram",
                 "Time of one write and sync of the journal", metrics.sync_s.samples())
    yield Metric("journal_bytes", "gauge", "Length of the journal",
                 [("", service.store.journal_bytes)])

    claims = service.claims
    if claims.is_enabled:
        yield Metric("etcd_up", "gauge", "1 if the last call to etcd was answered",
                     [("", int(not claims.failure))])
        yield Metric("etcd_request_duration_seconds", "histogram", "Time of one call to etcd",
                     service.etcd_s.samples())
        yield Metric("claims", "gauge", "Subnets that a host has claimed", claim_samples(claims))
    if metrics.last_write_s:
        yield Metric("last_write_timestamp_seconds", "gauge", "When the journal was last written",
                     [("", metrics.last_write_s)])


def base_samples(service: Service, key: str) -> Samples:
    """Yield a number of each base, by its key in the status."""
    for base in describe_bases(service.state, {}):
        yield f'{{base="{base["prefix"]}",family="{base["family"]}"}}', base[key]


def pool_label(pool: Pool) -> str:
    """Return the labels of a pool."""
    return f'{{pool="{pool.sub_pool or pool.subnet.network}"}}'


def capacity_samples(service: Service) -> Samples:
    """Yield how many addresses each pool has."""
    for pool in list(service.state.pools.values()):
        yield pool_label(pool), pool.capacity()


def lease_samples(service: Service) -> Samples:
    """Yield how many addresses of each pool are held."""
    for pool in list(service.state.pools.values()):
        yield pool_label(pool), len(pool.leases)


def request_samples(metrics: Metrics) -> Samples:
    """Yield the counts of requests; zeros too, so that increase() counts the first request."""
    counts = metrics.requests.copy()
    for method in (*PATHS, "unknown"):
        for result in RESULTS:
            counts.setdefault((method, result), 0)
    for method, result in sorted(counts):
        yield f'{{method="{method}",result="{result}"}}', counts[method, result]


def claim_samples(claims: NoClaims) -> Samples:
    """Yield how many subnets each host has claimed."""
    for host in claims.describe()["hosts"]:
        yield f'{{host="{host["host"]}"}}', host["claims"]


def metrics_page(service: Service, _: str) -> Iterator[str]:
    """Yield the lines of GET /metrics."""
    for metric in list_metrics(service):
        header = (f"# HELP gipam_{metric.name} {metric.help}\n"
                  f"# TYPE gipam_{metric.name} {metric.metric_type}\n")
        for suffix, value in metric.samples:
            yield f"{header}gipam_{metric.name}{suffix} {value}\n"
            header = ""


def health_page(service: Service, _: str) -> list[str]:
    """Return "ok". Raises: StoreError if the last write failed."""
    if service.store.last_error:
        raise StoreError(service.store.last_error)
    return ["ok\n"]


def make_static_replies(has_macs: bool) -> dict[str, bytes]:
    """Return the replies that do not depend on the request or on the state."""
    replies = {
        "/Plugin.Activate": {"Implements": ["IpamDriver"]},
        # A replay of requests that fails makes dockerd up to 28 panic, or release pools in use
        # (moby libnetwork/controller.go). Before Docker 29, only the MAC address names the owner.
        "/IpamDriver.GetCapabilities": {"RequiresMACAddress": has_macs,
                                        "RequiresRequestReplay": False},
        "/IpamDriver.GetDefaultAddressSpaces": {"LocalDefaultAddressSpace": ADDRESS_SPACE,
                                                "GlobalDefaultAddressSpace": ADDRESS_SPACE},
    }
    return {path: encode_json(reply).encode() for path, reply in replies.items()}


class Method(NamedTuple):
    """A plugin method that takes arguments."""

    label: str  # for the log: "refused an address"
    function: Callable[[Service, Arguments, Outcome], tuple[Json, Record | None]]


class Page(NamedTuple):
    """A page that is read with GET."""

    content_type: str
    function: Callable[[Service, str], Iterable[str]]


STATIC_REPLIES = make_static_replies(has_macs=True)
STATIC_REPLIES_WITHOUT_MAC = make_static_replies(has_macs=False)
METHODS = {
    "/IpamDriver.RequestPool": Method("a subnet", handle_request_pool),
    "/IpamDriver.ReleasePool": Method("to release a subnet", handle_release_pool),
    "/IpamDriver.RequestAddress": Method("an address", handle_request_address),
    "/IpamDriver.ReleaseAddress": Method("to release an address", handle_release_address),
    "/Gipam.Release": Method("to release", handle_release_if_unchanged),
    "/Gipam.Adopt": Method("to import", handle_import),
    "/Gipam.Evict": Method("to evict", handle_evict),
}
PAGES = {
    "/status": Page("application/json", status_page),
    "/metrics": Page("text/plain; version=0.0.4; charset=utf-8", metrics_page),
    "/healthz": Page("text/plain; charset=utf-8", health_page),
}
PATHS = frozenset((*STATIC_REPLIES, *METHODS, *PAGES))
METRICS_LISTENER_PATHS = frozenset(("/metrics", "/healthz"))  # served on the -metrics address


# === Server =======================================================================================
#
# An event loop in one thread serves all connections, so no locks are needed. EventLoop.run_once()
# has the phases of an iteration; other threads use run_in_loop(). A Server is a listener, a
# ClientConnection one connection; its RequestReader splits the bytes of the client into requests.
# A Delivery is a decision of an iteration: a Request with its reply, or a Callback with the result
# for its thread.
#
# The rule: no reply or result leaves before the commit() of its iteration has returned. Then
# EventLoop._deliver() sends them all: as they were decided, or as the error of commit().

# The head of a request of dockerd (moby pkg/plugins/client.go). Matching takes 2 us; the parser of
# http.server takes 20 us.
match_plain_head = re.compile(
    rb"POST (/[A-Za-z.]+) HTTP/1\.1\r\nHost: ([!-~]+)\r\nUser-Agent: [!-~]+\r\n"
    rb"Content-Length: ([0-9]{1,4})\r\nAccept: [!-~]+\r\n(?:Accept-Encoding: gzip\r\n)?\r\n").match
# An empty line, or the only line of an HTTP/0.9 request, which has no headers.
search_head_end = re.compile(rb"\n\r?\n|\A[!-~]+ [!-~]+\r?\n").search
match_local_host = re.compile(
    r"(|(plugin\.moby\.)?localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]*)?", re.IGNORECASE).fullmatch
FDSTORE_NAME = "gipam"  # of the socket in systemd's descriptor store


def sd_notify(state: str, *fds: int, timeout_s: float = 0.0) -> None:
    """Send a state, and descriptors, to the service manager, if there is one.

    Source: sd_notify(3).
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(timeout_s)
        manager.connect(re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", "")))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        manager.sendmsg([state.encode()], rights)


class RequestReader:
    """Splits the bytes of a client into the heads and bodies of requests."""

    __slots__ = ("body_length", "is_eof", "received", "scanned")

    def __init__(self) -> None:
        self.received = bytearray()  # not yet taken
        self.scanned = 0  # bytes of it in which no head ends
        self.body_length = -1  # of the request being read, else -1
        self.is_eof = False  # the client will send nothing more

    def has_begun(self) -> bool:
        """Return whether part of a request has arrived."""
        return bool(self.received) or self.body_length >= 0

    def take_head(self) -> bytes | None:
        """Return the head of the next request, None while it is incomplete.

        At the end of the stream, an incomplete head is returned as it is. Raises: InvalidRequest.
        """
        received = self.received
        # RFC 9112 section 2.2: a server should ignore an empty line before a request.
        if not self.scanned and received.startswith((b"\r\n", b"\n")):
            del received[:received.index(b"\n") + 1]

        # An empty line may begin in the last three bytes that were scanned before. The line of an
        # HTTP/0.9 request is found only from the start.
        start = max(self.scanned - 3, 0)
        if received.find(b"\n") >= self.scanned:
            start = 0
        end = search_head_end(received, start)
        if end:
            length = end.end()
        elif self.is_eof and received:
            length = len(received)
        elif len(received) > MAX_HEAD_BYTES:
            raise InvalidRequest("Request Header Fields Too Large", 431)
        else:
            self.scanned = len(received)
            return None

        self.scanned = 0
        head = bytes(received[:length])
        del received[:length]
        return head

    def take_body(self) -> bytes | None:
        """Return the body, None while it is incomplete. Raises: InvalidRequest if it is cut off."""
        length = self.body_length
        if len(self.received) < length:
            if self.is_eof:
                raise InvalidRequest(f"the body ends after {len(self.received)} of {length} bytes")
            return None

        body = bytes(self.received[:length])
        del self.received[:length]
        self.body_length = -1
        return body

    def clear(self) -> None:
        """Drop all bytes, because it is unknown where the next request begins."""
        self.received.clear()
        self.body_length = -1
        self.scanned = 0


class Delivery:
    """A decision of an iteration, to be delivered after the commit of this iteration."""

    __slots__ = ()
    connection: ClientConnection | None = None  # closed if the delivery fails unexpectedly

    def deliver(self, error: GipamError | None) -> None:
        """Deliver the decision, or the error in its place."""
        raise NotImplementedError


class Request(Delivery):
    """A request of a connection, from its last byte to the delivery of its reply."""

    __slots__ = ("awaits_etcd", "body", "connection", "reply", "started_s", "target", "verb")

    connection: ClientConnection
    reply: Reply

    def __init__(self, connection: ClientConnection, verb: str, target: str, body: bytes) -> None:
        self.connection = connection
        self.verb = verb
        self.target = target
        self.body = body
        self.started_s = time.perf_counter()
        self.awaits_etcd = False

    def decide(self, outcome: Outcome = NO_OUTCOME) -> None:
        """Decide the request, unless its connection no longer waits for it.

        Raises: TransactionRequired; then call it again with the outcome of the transaction.
        """
        server = self.connection.server
        if self.connection.current_request is self:
            self.reply = dispatch(server.loop.service, self.verb, self.target, self.body, outcome,
                                  server.paths)
            server.loop.deliveries.append(self)

    def deliver(self, error: GipamError | None) -> None:
        """Count the request by its result, and send its reply."""
        connection = self.connection
        if connection.current_request is not self:
            return

        connection.current_request = None
        loop = connection.server.loop
        reply = error_reply(error) if error else self.reply
        loop.service.metrics.count_request(method_label(self.target), reply.result,
                                           time.perf_counter() - self.started_s)
        connection.queue_reply(reply)
        loop.send(connection)


class Callback(Delivery):
    """A function that another thread runs in the loop thread, and its result."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self._result: Any = None
        self.error: Exception | None = None
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run(self) -> None:
        """Call the function; its exception is delivered instead of a result."""
        try:
            self._result = self._function(*self._args)
        except Exception as error:  # noqa: BLE001 - the other thread raises it
            self.error = error

    def deliver(self, error: GipamError | None) -> None:
        """Wake the thread with the result or the exception."""
        reason = error or self.error
        if reason:
            self.future.set_exception(reason)
        else:
            self.future.set_result(self._result)


class ClientConnection(http.server.BaseHTTPRequestHandler):
    """One client connection, driven by the event loop; it never blocks.

    While `unsent` is not empty, nothing more is read from the client.
    """

    protocol_version = "HTTP/1.1"
    server: Server
    headers: http.client.HTTPMessage

    def __init__(self, request: socket.socket, _: Any, server: Server) -> None:
        """Add the connection to the loop; the constructor of socketserver would serve it here."""
        self.connection = request
        self.server = server
        self.reader = RequestReader()
        self.unsent = b""
        self.page: Iterator[bytes] | None = None  # chunks after `unsent`
        self.command = ""  # of the last request
        self.current_request: Request | None = None  # until its reply is delivered
        self.closes_after_reply = False
        # The last reply, until the next request of the client proves that it was read.
        self.last_reply: Reply | None = None
        self.active_s = time.monotonic()  # when it became idle or made progress
        self.events = 0  # of the selector
        server.loop.add_connection(self)

    def is_busy(self) -> bool:
        """Return whether a request or a reply has begun and not ended."""
        return bool(self.unsent or self.current_request) or self.reader.has_begun()

    def receive(self) -> None:
        """Read the bytes that have arrived, unless the buffer exceeds the largest request."""
        reader = self.reader
        if len(reader.received) > MAX_HEAD_BYTES + MAX_BODY_BYTES:
            return
        if not reader.has_begun():
            self.active_s = time.monotonic()
        try:
            data = self.connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._on_disconnect(is_unread=self.server.is_unix)
            return

        reader.received += data
        reader.is_eof = not data

    def next_request(self) -> Request | None:
        """Return the next complete request, or None.

        Raises: GipamError, after which it is unknown where the next request begins.
        """
        reader = self.reader
        if reader.body_length < 0:
            plain = None if reader.scanned else match_plain_head(reader.received)
            if plain and (not self.server.is_loopback or match_local_host(plain[2].decode())):
                self.close_connection = False
                self.command = "POST"
                self.path = plain[1].decode()
                reader.body_length = int(plain[3])
                del reader.received[:plain.end()]
            else:
                head = reader.take_head()
                if head is None:
                    return None
                reader.body_length = self._parse_head(head)

        body = reader.take_body()
        if body is None:
            return None
        self.last_reply = None
        return Request(self, self.command, self.path, body)

    def _parse_head(self, head: bytes) -> int:
        """Let http.server parse a head; return the length of the body. Raises: GipamError."""
        self.command = ""
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline(MAX_LINE_BYTES + 1)
        if len(self.raw_requestline) > MAX_LINE_BYTES:
            self.send_error(414)

        # For a blank line, parse_request() returns False without an error.
        if not self.parse_request():
            self.send_error(400)
        # HTTP/0.9 has no headers, and no status in its replies.
        if self.request_version == "HTTP/0.9":
            self.send_error(505)
        self._check_origin()
        return self._parse_body_length()

    def _check_origin(self) -> None:
        """Refuse requests of web pages, which can reach loopback addresses. Raises: Forbidden."""
        if not self.server.is_loopback:
            return
        host = self.headers.get("Host", "")
        is_web_page = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
        if is_web_page or not match_local_host(host):
            raise Forbidden("requests from web pages, or for another host than this one, are not "
                            f"served: {printable(host)!r}")

    def _parse_body_length(self) -> int:
        """Return the length of the body from the headers. Raises: InvalidRequest."""
        is_encoded = "Transfer-Encoding" in self.headers
        if is_encoded and "Content-Length" not in self.headers:
            raise InvalidRequest("a body needs a Content-Length", 411)
        lengths = self.headers.get_all("Content-Length", ["0"])
        length = ", ".join(map(str.strip, lengths))
        if is_encoded or not re.fullmatch("[0-9]{1,19}", length):
            raise InvalidRequest(f"Content-Length is not one number: {printable(length)}")
        if int(length) > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is longer than {MAX_BODY_BYTES} bytes", 413)
        return int(length)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Reject a head that http.server cannot parse. Raises: InvalidRequest."""
        raise InvalidRequest(message or self.responses[code][0], code)

    def handle_expect_100(self) -> bool:
        """Ask the client to send the body that it holds back."""
        # If the client leaves only this line unread, it has read the previous reply.
        self.last_reply = None
        self.unsent += b"HTTP/1.1 100 Continue\r\n\r\n"
        return True

    def reject(self, error: GipamError) -> Request:
        """Return the delivery of an error for an invalid request; it ends the connection."""
        log.warning("refused an invalid request: %s", error)
        self.close_connection = True
        self.reader.clear()
        request = Request(self, "", "", b"")
        request.reply = error_reply(error)
        self.current_request = request
        return request

    def queue_reply(self, reply: Reply) -> None:
        """Append the head and the body of a reply to `unsent`."""
        self.page = reply.page
        chunk = self._next_chunk() if self.page else b""

        self.closes_after_reply = (self.close_connection or bool(chunk)
                                   or self.server.loop.is_draining)
        # A reply in several chunks ends with the connection.
        length = "" if chunk else f"Content-Length: {len(reply.body)}\r\n"
        close = "Connection: close\r\n" if self.closes_after_reply else ""
        head = (f"HTTP/1.1 {reply.status} {self.responses[reply.status][0]}\r\n"
                f"Content-Type: {reply.content_type}\r\n{length}{close}\r\n")

        self.last_reply = reply
        self.unsent += head.encode()
        if self.command != "HEAD":
            self.unsent += reply.body + chunk

    def _next_chunk(self) -> bytes:
        """Return the next chunk of the page, b"" after the last one."""
        chunk = next(self.page, b"") if self.page else b""
        if not chunk:
            self.page = None
        return chunk

    def send(self) -> None:
        """Send the bytes that the socket accepts now; of a page, prepare the next chunk."""
        try:
            sent = self.connection.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            self._on_disconnect(is_unread=True)
            return

        self.active_s = time.monotonic()
        self.unsent = self.unsent[sent:]
        if self.page and not self.unsent:
            self.unsent = self._next_chunk()

    def _on_disconnect(self, is_unread: bool) -> None:
        """End a broken connection; is_unread: roll back the grant of its last reply.

        Unsent bytes, or a reset on a UNIX socket, prove that the reply was not read. On TCP a
        firewall can cause a reset, and rolling back a reply that was read would allow a duplicate
        address. `check` repairs a leak, but not a duplicate.
        """
        if self.last_reply and is_unread:
            self.server.loop.lost_replies.append(self.last_reply)
        self.unsent = b""
        self.page = None
        self.closes_after_reply = True
        self.reader.clear()


class Server(socketserver.TCPServer):
    """A TCP listener. HTTPServer would look up the name of the host."""

    allow_reuse_address = True
    request_queue_size = BACKLOG
    is_unix = False
    is_fd_stored = False  # systemd keeps the socket over a restart

    def __init__(self, address: Any, loop: EventLoop, listener: socket.socket | None = None,
                 paths: frozenset[str] = frozenset()) -> None:
        """Listen on an address, or use a listener. If there are paths, only these are served."""
        self.loop = loop
        self.paths = paths
        if isinstance(address, tuple):
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, ClientConnection, bind_and_activate=listener is None)
        if listener:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
        self.socket.setblocking(False)
        # Only users of this host can reach it, but so can a web page, through their browser.
        self.is_loopback = not self.is_unix and (
            ipaddress.ip_address(str(self.server_address[0])).is_loopback)

    def server_bind(self) -> None:
        """Bind; a UNIX socket is for root only. Raises: OSError that names the address."""
        try:
            super().server_bind()
        except OSError as error:
            error.filename = format_socket_address(self.server_address)
            raise
        if self.is_unix:
            os.chmod(self.socket.getsockname(), 0o600)

    def get_request(self) -> Any:
        """Accept a connection, and make it non-blocking."""
        request, client_address = super().get_request()
        request.setblocking(False)
        # Nagle's algorithm could hold back a reply for 40 ms.
        if not self.is_unix:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return request, client_address


class UnixServer(Server):
    """A listener on a UNIX socket."""

    address_family = socket.AF_UNIX
    is_unix = True


class EventLoop:
    """Serves all connections in one thread. Others use only run_in_loop(), wake_up() and stop()."""

    submit_to_etcd: Callable[[PendingRequest], None]  # set if etcd is configured

    def __init__(self, service: Service, flush_log: Callable[[], None] | None = None) -> None:
        self.service = service
        self._flush_log = flush_log
        self.servers: list[Server] = []
        self.connections: dict[ClientConnection, None] = {}
        # Called every TIMER_INTERVAL_S: functions and their arguments.
        self.timers: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._next_timers_s = 0.0
        self.is_draining = False  # each connection closes after its reply
        self.is_closed = False
        self.stop_requested = False

        # Passed between the phases of an iteration.
        self._acceptable: list[Server] = []
        self._ready: collections.deque[ClientConnection] = collections.deque()
        self._callbacks: collections.deque[Callback] = collections.deque()
        self.deliveries: collections.deque[Delivery] = collections.deque()
        self.lost_replies: collections.deque[Reply] = collections.deque()  # to be rolled back
        self._page_queue: collections.deque[ClientConnection] = collections.deque()

        self._selector = selectors.DefaultSelector()
        self._wakeup_receiver, self._wakeup_sender = socket.socketpair()
        for end in (self._wakeup_receiver, self._wakeup_sender):
            end.setblocking(False)
        self._selector.register(self._wakeup_receiver, selectors.EVENT_READ, self._on_wake_up)
        if service.proxies:
            self._selector.register(service.proxies.event_socket, selectors.EVENT_READ,
                                    service.proxies.on_event)

        self._checkpoint_thread: threading.Thread | None = None
        self._next_checkpoint_s = 0.0
        self.add_timer(self._resume_accepting)
        self.add_timer(self._close_overdue)
        self.add_timer(service.store.probe)
        self.add_timer(self._start_checkpoint)

    # For signal handlers and other threads

    def stop(self, *_: Any) -> None:
        """Let run_forever() return after the current iteration."""
        self.stop_requested = True
        self.wake_up()

    def wake_up(self, *_: Any) -> None:
        """Start an iteration now."""
        with contextlib.suppress(OSError):  # full, or closed
            self._wakeup_sender.send(b"\0")

    def run_in_loop(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(*args) in an iteration of the loop, from another thread; return its result.

        Durable: on return, what it changed. Raises: as the function; StoreError if the commit of
        the iteration failed; ShuttingDown.
        """
        callback = Callback(function, args)
        self._callbacks.append(callback)
        if self.is_closed:
            raise ShuttingDown
        self.wake_up()
        return callback.future.result()

    # An iteration

    def run_once(self, timeout_s: float) -> None:
        """Run one iteration, which waits at most timeout_s for events.

        An unexpected exception ends only the connection, callback or timer that raised it. In
        another place it ends gipam with status 74, so that it restarts from the disk.
        """
        try:
            self._poll(timeout_s)
            self._accept_connections()
            self._run_callbacks()
            self._process_requests()
            error = self.service.commit()
            self._sync_proxy_neighbours()
            self._deliver(error)
            self._serve_next_page()
            self._run_timers()
            self.service.log_committed()
            if self._flush_log:
                self._flush_log()
        except Exception:
            log.exception("the event loop failed, which is a bug in gipam")
            self.service.store.fail("the event loop failed: see the log")

    def _poll(self, timeout_s: float) -> None:
        """Wait for events; note which connections and listeners are ready."""
        proxies = self.service.proxies
        # What the last iteration has left to do does not wait for an event.
        if (self._ready or self._page_queue or self.lost_replies
                or (proxies and proxies.pending)):
            timeout_s = 0.0

        for key, events in self._selector.select(timeout_s):
            source = key.data
            if isinstance(source, ClientConnection):
                self._on_ready(source)
            elif isinstance(source, Server):
                self._acceptable.append(source)
            else:
                source(events)

    def _on_ready(self, connection: ClientConnection) -> None:
        """Note that a connection is readable, or writable if it has unsent bytes."""
        if connection.page or connection.server.paths:
            self._queue_page(connection)
        else:
            self._ready.append(connection)

    def _on_wake_up(self, _: int) -> None:
        self._wakeup_receiver.recv(4096)

    def _accept_connections(self) -> None:
        while self._acceptable:
            self._accept(self._acceptable.pop())

    def _accept(self, server: Server) -> bool:
        """Accept a limited number of connections; return whether more may be waiting."""
        try:
            for _ in range(MAX_ACCEPTS):
                server.finish_request(*server.get_request())
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in TRANSIENT_ERRNOS:
                log.error("cannot accept connections: %s; waiting for some to end",
                          error.strerror)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(server.socket)  # until the next timer
        return False

    def add_connection(self, connection: ClientConnection) -> None:
        """Register a connection. On TCP, if there are too many, close the longest idle one.

        Busy connections are kept. If all others are busy, the new connection is the one closed.
        """
        self.connections[connection] = None
        self._set_events(connection, selectors.EVENT_READ)
        server = connection.server
        peers = [other for other in self.connections if other.server is server]
        if server.is_unix or len(peers) <= MAX_TCP_CONNECTIONS:
            return

        active = {*self._ready, *self._page_queue}
        idle = [other for other in peers if not other.is_busy() and other not in active]
        self.close(min(idle, key=lambda other: other.active_s))

    def _queue_page(self, connection: ClientConnection) -> None:
        """Queue a connection for a page, and ignore its events meanwhile: it is queued once."""
        self._page_queue.append(connection)
        self._set_events(connection, 0)

    def _run_callbacks(self) -> None:
        """Run the callbacks that other threads have queued so far."""
        for _ in range(len(self._callbacks)):
            callback = self._callbacks.popleft()
            callback.run()
            if callback.error:
                self.service.recover_from_exception()
            self.deliveries.append(callback)

    def _process_requests(self) -> None:
        """Roll back lost replies; decide the next request of each ready connection."""
        while self.lost_replies:
            reply = self.lost_replies.popleft()
            self._run_isolated(None, self.service.roll_back, reply.record, reply.seq)
        while self._ready:
            connection = self._ready.popleft()
            self._run_isolated(connection, self._process, connection)

    def _run_isolated(self, connection: ClientConnection | None, function: Callable[..., Any],
                      *args: Any) -> None:
        """Call function(*args); an unexpected exception ends only this call and its connection."""
        try:
            function(*args)
        except Exception:
            log.exception("a step of an iteration failed, which is a bug in gipam")
            self.service.recover_from_exception()
            if connection:
                self.close(connection)

    def _process(self, connection: ClientConnection) -> None:
        """Decide the next request of a connection, unless it is for a page."""
        request = self._receive_request(connection)
        if request and request.verb == "GET":
            self._queue_page(connection)
        elif request:
            self._decide(request)

    def _receive_request(self, connection: ClientConnection) -> Request | None:
        """Send unsent bytes to a connection; else read from it, and return its next request.

        Return None if there is no complete one; an error is delivered to the client.
        """
        if connection not in self.connections:
            return None
        if connection.unsent:
            self.send(connection)
            return None

        connection.receive()
        # Later requests of a connection wait behind one that waits for etcd.
        if connection.current_request:
            return None
        request = None
        try:
            if not connection.closes_after_reply:
                request = connection.next_request()
        except GipamError as error:
            self.deliveries.append(connection.reject(error))
            return None
        connection.current_request = request
        if not request:
            self._update_interest(connection)
        return request

    def _decide(self, request: Request) -> None:
        """Decide a request; if that needs etcd, pass it to the etcd thread."""
        try:
            request.decide()
        except TransactionRequired:
            request.awaits_etcd = True
            self._set_events(request.connection, 0)
            self.submit_to_etcd(PendingRequest(request.decide))

    def _sync_proxy_neighbours(self) -> None:
        """Let the kernel answer for new addresses before Docker gets them."""
        if self.service.proxies:
            self.service.proxies.sync(self.service.state)

    def _deliver(self, error: StoreError | None) -> None:
        """Deliver all decisions of this iteration; the error is that of its commit.

        This is the only place where a reply or a result leaves, except the error for a request that
        etcd has kept waiting: it was not decided.
        """
        while self.deliveries:
            delivery = self.deliveries.popleft()
            self._run_isolated(delivery.connection, delivery.deliver, error)

    def send(self, connection: ClientConnection) -> None:
        """Send unsent bytes; then continue with requests that have already arrived."""
        connection.send()
        if not connection.unsent and (connection.reader.received or connection.reader.is_eof):
            self._ready.append(connection)
        else:
            self._update_interest(connection)

    def _serve_next_page(self) -> None:
        """Serve a chunk of a page to one client, because each takes about 1 ms.

        This follows the commit, so that a page shows only what is on disk.
        """
        if self._page_queue:
            connection = self._page_queue.popleft()
            self._run_isolated(connection, self._serve_page, connection)

    def _serve_page(self, connection: ClientConnection) -> None:
        request = connection.current_request or self._receive_request(connection)
        if request:
            request.decide()
        self._deliver(None)

    def _run_timers(self) -> None:
        if time.monotonic() < self._next_timers_s or self.is_draining:
            return
        self._next_timers_s = time.monotonic() + TIMER_INTERVAL_S
        for function, args in self.timers:
            self._run_isolated(None, function, *args)

    # Connections

    def _update_interest(self, connection: ClientConnection) -> None:
        """Wait for the events that a connection needs; close it if it is done."""
        if connection.unsent:
            self._set_events(connection, selectors.EVENT_WRITE)
        elif connection.closes_after_reply:
            self.close(connection)
        elif not connection.reader.is_eof:
            self._set_events(connection, selectors.EVENT_READ)
        elif self.is_draining and connection.server.is_unix:
            self._set_events(connection, 0)  # drain() closes it later
        else:
            self.close(connection)

    def _set_events(self, connection: ClientConnection, events: int) -> None:
        """Register these events of a connection in the selector; if that fails, close it."""
        if events == connection.events:
            return
        if connection.events:
            self._selector.unregister(connection.connection)
        connection.events = 0
        if not events:
            return
        try:
            self._selector.register(connection.connection, events, connection)
            connection.events = events
        except OSError as error:
            log.error("closed a connection that cannot be watched: %s", error.strerror)
            self.close(connection)

    def close(self, connection: ClientConnection) -> None:
        """Close a connection. An unsent reply is not rolled back."""
        if connection in self.connections:
            del self.connections[connection]
            connection.current_request = None
            self._set_events(connection, 0)
            connection.server.close_request(connection.connection)

    # Timers

    def add_timer(self, function: Callable[..., None], *args: Any) -> None:
        """Call function(*args) every TIMER_INTERVAL_S, in the loop."""
        self.timers.append((function, args))

    def _resume_accepting(self) -> None:
        for server in self.servers:
            self.add_listener(server)

    def _close_overdue(self) -> None:
        """Close slow TCP connections; fail requests that have waited too long for etcd."""
        now_s = time.monotonic()
        for connection in list(self.connections):
            is_overdue = connection.active_s + REQUEST_TIMEOUT_S < now_s
            if is_overdue and connection.is_busy() and not connection.server.is_unix:
                self.close(connection)
        self._expire_etcd_waits()

    def _expire_etcd_waits(self) -> None:
        """Fail requests that have waited too long for etcd, also while gipam stops.

        The etcd thread may be stuck, as in DNS.
        """
        self._fail_etcd_waits(ETCD_TIMEOUT_S + 0.5, Unavailable(
            self.service.claims.failure or "etcd does not answer"))

    def _fail_etcd_waits(self, age_s: float, error: GipamError) -> None:
        """Fail requests that have waited so long for etcd."""
        started_before_s = time.perf_counter() - age_s
        for connection in list(self.connections):
            request = connection.current_request
            if request and request.awaits_etcd and request.started_s <= started_before_s:
                request.deliver(error)

    def _start_checkpoint(self) -> None:
        """Start a checkpoint in a thread, if one is needed and none is running."""
        thread = self._checkpoint_thread
        now_s = time.monotonic()
        if (now_s < self._next_checkpoint_s or (thread and thread.is_alive())
                or not self.service.needs_checkpoint()):
            return

        self._next_checkpoint_s = now_s + CHECKPOINT_RETRY_S
        thread = threading.Thread(target=self._run_checkpoint, name="checkpoint", daemon=True)
        try:
            thread.start()
            self._checkpoint_thread = thread
        except RuntimeError as error:
            log.warning("cannot start a checkpoint yet: %s", error)

    def _run_checkpoint(self) -> None:
        if Checkpoint(self.service, self.run_in_loop).run():
            self._next_checkpoint_s = 0.0

    # Start and stop

    def add_listener(self, server: Server) -> None:
        """Accept connections of a server; called again after a shortage of descriptors."""
        if server not in self.servers:
            self.servers.append(server)
        if server.socket.fileno() not in self._selector.get_map():
            self._selector.register(server.socket, selectors.EVENT_READ, server)

    def run_until_done(self, future: concurrent.futures.Future[Any], max_s: float) -> None:
        """Before run_forever(), run iterations until the future is done, for at most max_s.

        Return earlier if stop() is called or a fatal error occurs.
        """
        future.add_done_callback(self.wake_up)
        end_s = time.monotonic() + max_s
        while not (future.done() or self.stop_requested or self.service.store.fatal_error):
            remaining_s = end_s - time.monotonic()
            if remaining_s <= 0:
                break
            self.run_once(remaining_s)

    def run_forever(self) -> None:
        """Serve until stop() is called or a fatal error occurs."""
        while not (self.stop_requested or self.service.store.fatal_error):
            self.run_once(max(self._next_timers_s - time.monotonic(), 0.0))

    def drain(self, remove_names: Callable[[], None]) -> None:
        """Answer all requests, then close all connections, so that a restart loses no request.

        Idle UNIX connections are first shut down for reading: a client whose write fails reconnects
        and sends its request again, to this listener or to the next process. (A Go client that sees
        the end of a connection just as it uses it again loses the body: golang/go#22158.) A client
        that has connected, but sent nothing yet, is about to send its request.
        """
        self.is_draining = True
        self.run_once(0.0)  # reads requests that have arrived
        for connection in self.connections:
            if connection.server.is_unix and connection.command and not connection.is_busy():
                with contextlib.suppress(OSError):  # the client has gone
                    connection.connection.shutdown(socket.SHUT_RD)
        self._run_for(DRAIN_IDLE_S)
        for connection in list(self.connections):
            if connection.command and not connection.is_busy():
                self.close(connection)

        remove_names()
        while self.servers:
            self.close_listener(self.servers[0])
        self._run_for(DRAIN_MAX_S)
        self._fail_etcd_waits(0.0, ShuttingDown())
        self.run_once(0.0)
        for connection in list(self.connections):
            self.close(connection)
        self.close_callbacks()

    def _run_for(self, max_s: float) -> None:
        """Run iterations for DRAIN_IDLE_S, or max_s while a client is about to send a request."""
        started_s = time.monotonic()
        while self.connections and not self.service.store.fatal_error:
            elapsed_s = time.monotonic() - started_s
            is_awaited = any(connection.is_busy() or not connection.command
                             for connection in self.connections)
            if elapsed_s >= (max_s if is_awaited else DRAIN_IDLE_S):
                break
            self.run_once(0.01)
            self._expire_etcd_waits()

    def close_listener(self, server: Server) -> None:
        """Close a listener. Unless systemd keeps it, first accept its backlog, else it is reset."""
        if not server.is_fd_stored:
            while self._accept(server):
                pass
        self.servers.remove(server)
        with contextlib.suppress(KeyError):  # not registered after a shortage of descriptors
            self._selector.unregister(server.socket)
        server.server_close()

    def close_callbacks(self) -> None:
        """Refuse the callbacks of other threads from now on, and wait for a checkpoint to end."""
        self.is_closed = True
        error = self.service.store.fatal_error or ShuttingDown()
        while self._callbacks:
            self.deliveries.append(self._callbacks.popleft())
        self._deliver(error)
        if self._checkpoint_thread:
            self._checkpoint_thread.join()


# === Discovery ====================================================================================
#
# Docker finds gipam by a socket in /run/docker/plugins, by a symbolic link there, or by a plugin
# file with a URL; each is a PublishedPath. Over a restart of gipam, systemd keeps the socket
# (FileDescriptorStoreMax) and passes it to the next process, so that no connection is refused.
#
# The rule: nothing that another process uses is replaced. A socket is removed only after a
# connection to it was refused.

Config = argparse.Namespace  # each option by name, parsed; see build_config()


def open_listener(server_class: type[Server], address: Any, loop: EventLoop) -> Server:
    """Listen on an address; if systemd passes a socket for it, on that one.

    Raises: GipamError, OSError.
    """
    inherited = inherited_sockets(address)
    listener = None
    if inherited:
        listener = next(iter(inherited.values()))
    elif isinstance(address, str):
        remove_stale(address)
    server = server_class(address, loop, listener)

    has_fd_store = "FDSTORE" in os.environ
    server.is_fd_stored = has_fd_store or bool(inherited)
    # The store holds one socket (FileDescriptorStoreMax=1).
    if has_fd_store and FDSTORE_NAME not in inherited:
        sd_notify(f"FDSTOREREMOVE=1\nFDNAME={FDSTORE_NAME}", timeout_s=TIMER_INTERVAL_S)
        sd_notify(f"FDSTORE=1\nFDNAME={FDSTORE_NAME}", server.socket.fileno(),
                  timeout_s=TIMER_INTERVAL_S)

    # An older listener on the same path cannot be reached any more: its path was deleted.
    for other in list(loop.servers):
        if other.server_address == server.server_address:
            other.is_fd_stored = False
            loop.close_listener(other)
    loop.add_listener(server)
    return server


def inherited_sockets(address: Any) -> dict[str, socket.socket]:
    """Return the sockets that systemd passes for the address, by name (sd_listen_fds(3)).

    A socket may come twice, from a socket unit and from the store; shutting one down would end
    both. A stored socket for another address belongs to former options: its path is removed, so
    that it does not look alive.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    # The path of the socket may have been deleted.
    is_reachable = not isinstance(address, str) or os.path.exists(address)
    matching = {}
    for index in range(count):
        name = names[index] if index < len(names) else ""
        inherited = socket.socket(fileno=3 + index)
        bound_address = inherited.getsockname()
        if is_reachable and address in (bound_address, bound_address[:2]):
            matching[name] = inherited
            continue
        inherited.close()
        is_former = name == FDSTORE_NAME and isinstance(bound_address, str)
        if is_former and os.path.lexists(bound_address):
            os.unlink(bound_address)
    return matching


def remove_stale(path: str) -> None:
    """Remove a dead socket or a link, and create its directory. Raises: GipamError, OSError."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    if not os.path.lexists(path):
        return
    if not os.path.islink(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"{path} exists and is not a socket: remove it, or use another name")
    require_no_listener(path)
    os.unlink(path)


def require_no_listener(path: str) -> None:
    """Check that no process listens on a UNIX socket. Raises: AlreadyRunning."""
    with socket.socket(socket.AF_UNIX) as client:
        # EAGAIN: there is a listener with a full backlog; its process may be suspended.
        client.setblocking(False)
        if client.connect_ex(path) in (0, errno.EAGAIN):
            raise AlreadyRunning(f"another daemon listens on {path}: stop it, or use another name")


class PublishedPath:
    """A path by which Docker finds gipam. It is created again if it is deleted."""

    is_kept = False  # at exit, because systemd keeps the socket
    is_needed = True

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self) -> None:
        """Create the file. Raises: GipamError, OSError."""
        raise NotImplementedError

    def restore(self) -> None:
        """Create the file again if it was deleted; a failure is logged."""
        if not self.is_needed or os.path.lexists(self.path):
            return
        log.warning("%s was deleted: creating it again", self.path)
        try:
            self.create()
        except (GipamError, OSError) as error:
            log.warning("cannot create %s: %s", self.path, format_os_error(error))

    def remove(self) -> None:
        """Remove the file, unless the next process needs it. Raises: OSError."""
        if self.is_needed and not self.is_kept and os.path.lexists(self.path):
            os.unlink(self.path)


class SocketPath(PublishedPath):
    """The UNIX socket."""

    def __init__(self, path: str, loop: EventLoop) -> None:
        super().__init__(path)
        self._loop = loop

    def create(self) -> None:
        """Listen on the socket. Raises: GipamError, OSError."""
        self.is_kept = open_listener(UnixServer, self.path, self._loop).is_fd_stored


class SocketLink(PublishedPath):
    """The symbolic link in the directory where dockerd looks for sockets."""

    def __init__(self, path: str, target: SocketPath, has_plugin_file: bool) -> None:
        super().__init__(path)
        self._target = target
        self._has_plugin_file = has_plugin_file

    def create(self) -> None:
        """Create the link, if it is not the socket itself. Raises: GipamError, OSError."""
        self.is_kept = self._target.is_kept
        if os.path.realpath(self.path) == os.path.realpath(self._target.path):
            return
        try:
            remove_stale(self.path)
            os.symlink(self._target.path, self.path)
        except PermissionError:
            # Rootless Docker finds the socket by its plugin file.
            if not self._has_plugin_file:
                raise
            self.is_needed = False


class PluginFile(PublishedPath):
    """A file with the URL on which gipam listens."""

    def __init__(self, path: str, url: str) -> None:
        super().__init__(path)
        self._url = url

    def create(self) -> None:
        """Write the file atomically. Raises: OSError."""
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        temp_path = self.path + ".tmp"
        flags = (os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                 | os.O_NONBLOCK)
        fd = os.open(temp_path, flags, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(self._url + "\n")
        os.replace(temp_path, self.path)


def unix_paths(config: Config, loop: EventLoop) -> list[PublishedPath]:
    """Return the socket, its link where dockerd looks, and the plugin file if -spec is given."""
    socket_path = SocketPath(config.socket, loop)
    link = os.path.join(PLUGIN_SOCKET_DIR, os.path.basename(config.socket))
    paths: list[PublishedPath] = [socket_path]
    if link != config.socket:
        paths.append(SocketLink(link, socket_path, config.is_spec_given))
    if config.is_spec_given:
        paths.append(PluginFile(config.spec, f"unix://{config.socket}"))
    return paths


def tcp_paths(config: Config, loop: EventLoop) -> list[PublishedPath]:
    """Listen on the TCP address; return the plugin file. Raises: GipamError, OSError.

    dockerd prefers NAME.sock to a plugin file, even if nothing listens there.
    """
    server = open_listener(Server, config.address, loop)
    dead_socket = os.path.join(PLUGIN_SOCKET_DIR, config.driver + ".sock")
    if os.path.lexists(dead_socket):
        remove_stale(dead_socket)
        log.warning("removed %s, which hid %s; restart dockerd if it has used it", dead_socket,
                    config.spec)
    return [PluginFile(config.spec, f"tcp://{format_socket_address(server.server_address)}")]


# === Docker =======================================================================================
#
# A client of Docker's API, and the allocations it shows: each subnet, and each address in it, is a
# DockerAllocation. DockerNetwork reads a network as Docker 26 to 29 show it. Before 29 the API
# hides the gateway of a network with a --subnet and no --gateway (see has_hidden_gateway()), and
# the subnet of a network that was created with a size hint and has no container.
#
# The rule: gipam sends no request to Docker while it decides one of Docker's, because Docker may
# hold a lock until gipam replies.


class ApiConnection(http.client.HTTPConnection):
    """An HTTP connection to Docker, etcd or a gipam, at the path of a socket or at (host, port)."""

    def __init__(self, address: Any, timeout_s: float, tls: ssl.SSLContext | None = None,
                 peer: str = "the daemon", settings: str = "-socket or -address") -> None:
        host, port = address if isinstance(address, tuple) else ("localhost", None)
        super().__init__(host, port, timeout=timeout_s)
        self.peer = peer
        self.silence = f"{peer} does not answer on {format_socket_address(address)}"
        self.remedy = f"start it, or say where it is with {settings}"
        self._address = address
        self._tls = tls

    def connect(self) -> None:
        """Connect. Raises: OSError."""
        if isinstance(self._address, tuple):
            super().connect()
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._address)
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


def keep_object(value: Json) -> Json:
    """Return the value. As an object_hook in Python, it lets other threads run during a parse."""
    return value


def request_json(connection: ApiConnection, verb: str, path: str, body: Any = None) -> Any:
    """Return the JSON reply. Raises: Unreachable; RemoteError with the error that the peer sent."""
    try:
        connection.request(verb, path, encode_json(body) if body else None)
        response = connection.getresponse()
        reply = json.loads(response.read(), object_hook=keep_object)
    except OSError as error:
        is_denied = isinstance(error, PermissionError)
        remedy = "run this as root" if is_denied else connection.remedy
        text = f"{connection.silence}: {format_os_error(error)}; {remedy}"
        if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
            raise NotListening(text) from None
        raise Unreachable(text) from None
    except (http.client.HTTPException, ValueError, RecursionError):
        raise Unreachable(f"{connection.silence}: something else does, whose reply is not JSON; "
                          f"{connection.remedy}") from None
    finally:
        # The next request connects again.
        connection.close()

    if response.status != 200:
        if isinstance(reply, dict):
            reply = reply.get("Error") or reply.get("message")
        raise RemoteError(f"{connection.peer} refuses: {printable(str(reply))}")
    return reply


def docker_socket_path() -> str:
    """Return where Docker listens. Raises: Unreachable for a Docker on another host."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    scheme = "unix://"
    if not host.startswith(scheme):
        raise Unreachable(
            f"DOCKER_HOST {host!r} is not a UNIX socket (unix:///...): gipam serves only the "
            "Docker of its own host")
    return host[len(scheme):]


class DockerAllocation(NamedTuple):
    """A subnet that Docker uses (address ""), or an address in it, or in no subnet (subnet "")."""

    # That of a lease, or: "pool" (a subnet), "template" (a subnet of a config-only network, which
    # is not requested), "hint" (a size hint, in place of a subnet that Docker does not show).
    kind: str
    address: str = ""  # bare
    subnet: str = ""
    sub_pool: str = ""
    driver: str | None = None
    network: str = ""  # name
    docker_id: str = ""  # of the network or the endpoint
    container: str = ""  # name
    mac: str = ""
    pool_name: str = ""  # gipam.name
    has_hidden_gateway: bool = False
    routed_option: str = ""  # network option that would turn off masquerading
    is_explicit: bool = False  # the user named the address

    @property
    def key(self) -> tuple[str, str]:
        """Return the subnet, and the part of it in use: an address, a range, or all ("")."""
        return self.subnet, self.address or self.sub_pool

    def __str__(self) -> str:
        return f"container {self.container}" if self.container else f"network {self.network}"


class DockerView(NamedTuple):
    """The allocations of Docker, as read at one moment."""

    ours: list[DockerAllocation]  # of networks with this IPAM driver
    others: list[DockerAllocation]  # of other networks, and of templates


def normalise_address(text: str) -> str:
    """Return a bare address as gipam spells it. Docker shows the user's text, or a CIDR."""
    address = ipaddress.ip_address(text.partition("/")[0])
    return format_address(int(address), address.version)


def size_hints_of(subnet: str) -> set[str]:
    """Return the size hints that may have requested a subnet: of its length, or the default."""
    prefixlen = subnet.partition("/")[2]
    unspecified = "::" if ":" in subnet else "0.0.0.0"  # noqa: S104
    return {f"{unspecified}/{prefixlen}", f"{unspecified}/0"}


def container_allocations(container: Json) -> Iterator[tuple[str, DockerAllocation]]:
    """Yield (network id, allocation) of each address of a container, and of its gateway.

    An address is explicit if IPAMConfig has one of its family, which the user named (--ip, --ip6).
    """
    names = container.get("Names") or ["/" + container["Id"][:12]]
    name = printable(names[0][1:])
    settings = container.get("NetworkSettings") or {}
    for endpoint in (settings.get("Networks") or {}).values():
        network_id = endpoint.get("NetworkID")
        mac = printable(endpoint.get("MacAddress") or "")
        docker_id = endpoint.get("EndpointID") or container["Id"]
        named: Json = endpoint.get("IPAMConfig") or {}
        for address_key, length_key, gateway_key, named_key in (
                ("IPAddress", "IPPrefixLen", "Gateway", "IPv4Address"),
                ("GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway", "IPv6Address")):
            address = endpoint.get(address_key)
            if address:
                subnet = str(parse_prefix(f"{address}/{endpoint[length_key]}", mask=True))
                yield network_id, DockerAllocation(GATEWAY, endpoint.get(gateway_key) or "", subnet)
                yield network_id, DockerAllocation(ENDPOINT, address, subnet, container=name,
                                                   mac=mac, docker_id=docker_id,
                                                   is_explicit=bool(named.get(named_key)))


ApiVersion = Tuple[int, ...]
BRIDGE = "com.docker.network.bridge."  # prefix of a bridge network's options
API_27 = (1, 46)  # of Docker 27.0
API_28 = (1, 48)
API_29 = (1, 52)


class DockerNetwork:
    """A network as Docker's API shows it, with the addresses of its running containers."""

    def __init__(self, network: Json, api: ApiVersion, endpoints: list[DockerAllocation]) -> None:
        self._network = network
        self._api = api
        self._endpoints = endpoints  # as container_allocations() yields them
        self._options: Json = network.get("Options") or {}
        self._ipam: Json = network.get("IPAM") or {}
        ipam_options: Json = self._ipam.get("Options") or {}
        self._template = DockerAllocation(
            "template" if network.get("ConfigOnly") else "pool", driver=self._ipam.get("Driver"),
            network=printable(network["Name"]), docker_id=network["Id"],
            pool_name=printable(ipam_options.get(NAME_OPTION, "")))

    def allocations(self) -> Iterator[DockerAllocation]:
        """Yield the subnets, then each address of the network and of its containers."""
        subnets = list(self.subnets())
        yield from subnets
        if subnets:
            yield from self.addresses(subnets)

    def subnets(self) -> Iterator[DockerAllocation]:
        """Yield each subnet; if Docker shows only a size hint, the subnets of its containers."""
        for config in self._requested_configs():
            shown = str(parse_prefix(config["Subnet"], mask=True))
            version = 6 if ":" in shown else 4
            sub_pool = config.get("IPRange") or ""
            if sub_pool:
                sub_pool = str(parse_prefix(sub_pool, mask=True))
            has_hidden_gateway = not config.get("Gateway") and self.has_hidden_gateway(version)
            template = self._template._replace(
                sub_pool=sub_pool, routed_option=self.find_routed_option(version),
                has_hidden_gateway=has_hidden_gateway)
            # The subnets that a size hint has requested are known from the containers in them.
            requested = set()
            for endpoint in self._endpoints:
                if shown in size_hints_of(endpoint.subnet):
                    requested.add(endpoint.subnet)
            for subnet in sorted(requested or {shown}):
                is_hint = subnet in size_hints_of(subnet)
                kind = "hint" if is_hint else template.kind
                yield template._replace(kind=kind, subnet=subnet)

    def addresses(self, subnets: list[DockerAllocation]) -> Iterator[DockerAllocation]:
        """Yield each address, with the subnet that contains it, if any."""
        prefixes = [(parse_prefix(subnet.subnet), subnet) for subnet in subnets]
        for allocation in itertools.chain(self._configured_addresses(), self._endpoints):
            if not allocation.address:
                continue
            text = normalise_address(allocation.address)
            address = ipaddress.ip_address(text)
            pool = self._template
            for prefix, subnet in prefixes:
                if address in prefix:
                    pool = subnet
                    break
            yield pool._replace(
                kind=allocation.kind, address=text, container=allocation.container,
                mac=allocation.mac, docker_id=allocation.docker_id or pool.docker_id,
                is_explicit=allocation.is_explicit)

    def has_hidden_gateway(self, version: int) -> bool:
        """Return whether a subnet of the family has a gateway that the API does not show.

        Docker up to 27 requests a gateway for every subnet, Docker 28 unless the driver needs none.
        Docker 29 shows every gateway. Source: moby daemon/libnetwork/drivers, GetSkipGwAlloc().
        """
        if self._api < API_28:
            return True
        return self._api < API_29 and not self._needs_no_gateway(version)

    def find_routed_option(self, version: int) -> str:
        """Return the network option that would turn off masquerading, "" if it is off already."""
        if self._network.get("Driver") != "bridge" or self._network.get("Internal"):
            return ""
        if self._options.get(BRIDGE + "enable_ip_masquerade") == "false":
            return ""
        if self._api < API_27:
            # Docker up to 26 has no gateway modes, and does not masquerade IPv6.
            return BRIDGE + "enable_ip_masquerade=false" if version == 4 else ""
        mode = f"{BRIDGE}gateway_mode_ipv{version}"
        return "" if self._options.get(mode) == "routed" else mode + "=routed"

    def _requested_configs(self) -> Iterator[Json]:
        configs: list[Json] = self._ipam.get("Config") or []
        for config in configs:
            subnet = config.get("Subnet") or ""
            version = 6 if ":" in subnet else 4
            # Docker shows the subnet of a family that is off, but did not request it.
            if subnet and self._network.get(f"EnableIPv{version}", True):
                yield config

    def _configured_addresses(self) -> Iterator[DockerAllocation]:
        for config in self._requested_configs():
            yield DockerAllocation(GATEWAY, config.get("Gateway") or "")
            auxiliary: Json = config.get("AuxiliaryAddresses") or {}
            for address in auxiliary.values():
                yield DockerAllocation(AUXILIARY, address)

    def _needs_no_gateway(self, version: int) -> bool:
        driver = self._network.get("Driver")
        is_internal = bool(self._network.get("Internal"))
        if driver == "bridge":
            mode = self._options.get(f"{BRIDGE}gateway_mode_ipv{version}")
            is_inhibited = self._options.get(BRIDGE + "inhibit_ipv4") == "true"
            return mode == "isolated" or (version == 4 and is_internal and is_inhibited)
        if driver == "ipvlan":
            return is_internal or "l3" in self._options.get("ipvlan_mode", "")
        return driver == "macvlan" and is_internal


STOPPED_CONTAINERS_PATH = "/containers/json?all=1&filters=%7B%22status%22%3A%5B%22exited%22%5D%7D"


class DockerClient:
    """Docker's API, with one deadline for all its replies."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._deadline_s = time.monotonic() + timeout_s

    def get(self, target: str, timeout_s: float = math.inf) -> Any:
        """Return the JSON of a target. Raises: as request_json()."""
        # A timeout of 0 would make the socket non-blocking.
        remaining_s = max(self._deadline_s - time.monotonic(), 0.001)
        connection = ApiConnection(self._path, min(remaining_s, timeout_s), None, "Docker",
                                   "DOCKER_HOST")
        return request_json(connection, "GET", target)

    def networks(self) -> Iterator[Json]:
        """Yield each network. The list lacks the IPAM part of a network made from a template."""
        for network in self.get("/networks"):
            template: Json = network.get("ConfigFrom") or {}
            if template.get("Network"):
                yield self.get(f"/networks/{network['Id']}")
            else:
                yield network

    def allocations(self) -> list[DockerAllocation]:
        """Return all subnets and addresses in use. Raises: Unreachable; ValueError and others."""
        api = tuple(map(int, self.get("/version")["ApiVersion"].split(".")))
        networks = list(self.networks())
        endpoints = collections.defaultdict(list)
        for container in self.get("/containers/json"):
            for network_id, allocation in container_allocations(container):
                endpoints[network_id].append(allocation)

        allocations: list[DockerAllocation] = []
        for network in networks:
            allocations += DockerNetwork(network, api, endpoints[network["Id"]]).allocations()
        return allocations


def read_docker_allocations(path: str, driver: str, timeout_s: float) -> DockerView:
    """Return the allocations of this driver, and those of others. Raises: Unreachable."""
    try:
        allocations = DockerClient(path, timeout_s).allocations()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unreachable(
            f"the Docker at {path} sent a reply that gipam does not understand") from error

    # If dockerd runs with --iptables=false, none of its networks masquerades.
    if any(allocation.network == "bridge" and not allocation.routed_option
           for allocation in allocations):
        allocations = [allocation._replace(routed_option="") for allocation in allocations]
    view = DockerView([], [])
    for allocation in allocations:
        if allocation.driver == driver and allocation.kind != "template":
            view.ours.append(allocation)
        else:
            view.others.append(allocation)
    return view


def failed_starts(path: str, status: Json) -> Iterator[str]:
    """Yield a text for each container that Docker failed to start because gipam was down."""
    driver = re.escape(status["driver"])
    address = re.escape(status["listening"])
    pattern = (f'plugin "{driver}" not found|'
               f"IpamDriver.*: dial .*(/{driver}.sock|tcp {address}):")
    docker = DockerClient(path, DOCKER_TIMEOUT_S)
    for container in docker.get(STOPPED_CONTAINERS_PATH):
        # A container that was removed meanwhile, or is locked, is skipped.
        with contextlib.suppress(RemoteError, Unreachable):
            details = docker.get(f"/containers/{container['Id']}/json", NAMES_TIMEOUT_S)
            if re.search(pattern, details["State"]["Error"]):
                name = printable(details["Name"][1:])
                yield (f"container {name} did not start because gipam was down: run docker start "
                       f"{name}")


# === Check ========================================================================================
#
# A Holding is a pool or lease of gipam, from its state or from the JSON of /status; a
# DockerAllocation is a subnet or address that Docker uses; a Finding is a difference between the
# two. `check` reports findings and `check --fix` fixes them. After each start and each adoption,
# the daemon imports missing pools and addresses, so that nothing in use is lost with a lease file.
# To import is to take a pool from Docker's API, to adopt is to take it from the id in a request of
# Docker.
#
# The rule: fix() names the record that granted what it releases or completes; if that has changed
# meanwhile, it is left alone.

Key = Tuple[str, str]  # subnet; address or range in it, or ""
Post = Callable[[str, Json], Any]  # sends path and body, returns the reply


class Holding(NamedTuple):
    """A pool (address "") or a lease that gipam holds, as the record of number seq granted it."""

    pool_id: str
    subnet: str
    sub_pool: str
    granted_s: int
    seq: int
    address: str = ""
    kind: str = "pool"
    container: str = ""
    mac: str = ""
    foreign_claim: str = ""  # of a pool: other hosts that claimed it

    @property
    def key(self) -> Key:
        """Return the subnet, and the part of it that is held, as DockerAllocation.key does."""
        return self.subnet, self.address or self.sub_pool


def holding_of_pool(pool: Pool) -> Holding:
    """Return the Holding of a pool of the state."""
    sub_pool = str(pool.sub_pool or "")
    return Holding(pool.pool_id, str(pool.subnet.network), sub_pool, pool.granted_s, pool.seq)


def holding_of_json(pool: Json, lease: Json | None = None) -> Holding:
    """Return the Holding of a pool in the JSON of /status, or of a lease in it."""
    holding = Holding(
        pool["id"],
        pool["subnet"],
        pool["sub_pool"],
        pool["granted_s"],
        pool["seq"],
        foreign_claim=pool["claimed_elsewhere"],
    )
    if lease is None:
        return holding
    return holding._replace(
        granted_s=lease["granted_s"],
        seq=lease["seq"],
        address=lease["address"],
        kind=lease["kind"],
        container=lease["name"],
        mac=lease["mac"],
    )


def holdings_of_json(status: Json) -> Iterator[Holding]:
    """Yield all pools and leases of the JSON of /status."""
    for pool in status["pools"]:
        yield holding_of_json(pool)
        for lease in pool["addresses"]:
            yield holding_of_json(pool, lease)


def chunks_of(values: Sequence[Any], size: int) -> list[Any]:
    """Return the values in slices of at most that size."""
    return [values[start:start + size] for start in range(0, len(values), size)]


def holdings_at(pool: Pool, template: Holding, offsets: dict[int, str]) -> list[Holding]:
    """Return the leases of a pool at the offsets of these addresses."""
    holdings = []
    for offset, address in offsets.items():
        lease = pool.leases.get(offset)
        if lease:
            holdings.append(template._replace(
                granted_s=lease.granted_s,
                seq=lease.seq,
                address=address,
                kind=lease.kind,
                container=lease.name,
                mac=lease.mac,
            ))
    return holdings


def read_holdings(service: Service, docker: DockerView, run_in_loop: RunInLoop) -> list[Holding]:
    """Return all pools of the state, and the leases that Docker uses or has yet to confirm.

    Call it in a thread: each iteration of the loop looks up LEASES_PER_CHUNK leases. The cost
    depends on what Docker uses, not on the number of leases.
    """
    unconfirmed: dict[int, Key] = run_in_loop(service.docker_import.unconfirmed.copy)
    addresses = collections.defaultdict(set)
    for allocation in docker.ours:
        addresses[allocation.subnet].add(allocation.address)
    for subnet, address in unconfirmed.values():
        addresses[subnet].add(address)

    holdings = []
    for pool in run_in_loop(list, service.state.pools.values()):
        holding = holding_of_pool(pool)
        holdings.append(holding)
        wanted = [address for address in addresses[holding.subnet] if address]
        for chunk in chunks_of(wanted, LEASES_PER_CHUNK):
            offsets = {pool.offset_of(address): address for address in chunk}
            holdings += run_in_loop(holdings_at, pool, holding, offsets)
    return holdings


class Finding(NamedTuple):
    """A difference between gipam and Docker."""

    kind: str
    text: str
    subject: DockerAllocation
    holding: Holding | None = None  # what leaked, or the pool that lacks addresses
    missing: tuple[DockerAllocation, ...] = ()  # to be imported into the subject's pool

    @property
    def key(self) -> tuple[str, int]:
        """Return the text, and a number that distinguishes a later finding with the same text."""
        return self.text, self.holding.seq if self.holding else 0

    @property
    def is_leak(self) -> bool:
        """Return whether gipam holds this and Docker does not use it, so that fix() releases it."""
        return self.kind in ("leaked_pool", "leaked_address")

    @property
    def is_missing(self) -> bool:
        """Return whether Docker uses this and gipam does not hold it, so that fix() imports it."""
        return self.kind in ("missing_pool", "missing_address")


Findings = Dict[Tuple[str, int], Finding]  # by their keys


def find_leaks(holdings: Sequence[Holding],
               allocations: list[DockerAllocation]) -> Iterator[Finding]:
    """Yield the pools and leases that gipam holds and Docker does not use."""
    used = {allocation.key: allocation for allocation in allocations}
    lease_counts = collections.Counter(holding.pool_id for holding in holdings if holding.address)
    for holding in holdings:
        network = used.get((holding.subnet, holding.sub_pool))
        if holding.address:
            if network and is_leaked_lease(holding, network, used):
                owner = holding.container or holding.mac or holding.kind
                subject = network._replace(address=holding.address, container=holding.container)
                yield Finding(
                    "leaked_address", f"address {holding.address} of network {network.network} is "
                    f"reserved for {owner}, but nothing uses it", subject, holding)
        elif not network and not is_size_hinted(holding.subnet, used):
            label = f"subnet {holding.subnet}"
            if holding.sub_pool:
                label += f" range {holding.sub_pool}"
            leases = plural(lease_counts[holding.pool_id], "lease")
            yield Finding(
                "leaked_pool", f"{label} is held with {leases}, but no network uses it",
                DockerAllocation("pool", "", holding.subnet, holding.sub_pool), holding)


def is_size_hinted(subnet: str, used: Mapping[Key, DockerAllocation]) -> bool:
    """Return whether a network that shows only a size hint may have the subnet."""
    return any((hint, "") in used for hint in size_hints_of(subnet))


def is_leaked_lease(lease: Holding, network: DockerAllocation,
                    used: Mapping[Key, DockerAllocation]) -> bool:
    """Return whether Docker does not use a lease of a network."""
    if lease.kind == GATEWAY and network.has_hidden_gateway:
        return False
    return lease.key not in used


def find_missing(holdings: Iterable[Holding],
                 allocations: list[DockerAllocation]) -> Iterator[Finding]:
    """Yield pools and addresses that Docker uses and gipam lacks; addresses with two users."""
    held = {holding.key: holding for holding in holdings}
    networks: dict[Key, dict[str, DockerAllocation]] = {}  # pool -> address -> its first user
    endpoints: dict[Key, DockerAllocation] = {}
    for allocation in allocations:
        pool_key = allocation.subnet, allocation.sub_pool
        networks.setdefault(pool_key, {}).setdefault(allocation.address, allocation)
        if allocation.kind == ENDPOINT:
            first = endpoints.setdefault(allocation.key, allocation)
            if first.docker_id != allocation.docker_id:
                yield Finding(
                    "address_twice", f"address {allocation.address} is used by {first} and "
                    f"{allocation}: restart one of them", allocation)

    for pool_key, users in networks.items():
        pool = users.pop("", None)
        if pool and pool.kind == "pool" and pool_key not in held:
            yield missing_pool_finding(pool, list(users.values()))
        for user in users.values():
            text = f"address {user.address} of {user} is"
            if not user.subnet and user.kind != GATEWAY:
                yield Finding("address_outside", f"{text} in no subnet of network {user.network}: "
                              "recreate the network", user)
            elif pool_key in held and user.key not in held:
                yield Finding("missing_address", f"{text} not held: another container could get it",
                              user, held[pool_key], (user,))


def missing_pool_finding(pool: DockerAllocation, users: list[DockerAllocation]) -> Finding:
    """Return the finding that a pool is missing, with all of its addresses."""
    has_gateway = any(user.kind == GATEWAY for user in users)
    if pool.has_hidden_gateway and not has_gateway:
        # Its address is not known: the import allocates the first free one.
        users.append(pool._replace(kind=GATEWAY))
    return Finding("missing_pool", f"subnet {pool.subnet} of {pool} is not held: another network "
                   "could get it", pool, None, tuple(users))


def find_conflicts(holdings: Iterable[Holding],
                   others: list[DockerAllocation]) -> Iterator[Finding]:
    """Yield the pools whose subnet another IPAM driver or another host uses too."""
    pools = [holding for holding in holdings if not holding.address]
    foreign = [(parse_prefix(other.subnet), other) for other in others if other.kind == "pool"]
    for pool in pools:
        subnet = parse_prefix(pool.subnet)
        for network, other in foreign:
            if network.overlaps(subnet):
                yield Finding("overlap", f"subnet {network} of {other}, which another IPAM driver "
                              f"has, overlaps {subnet} of gipam: remove one of the two networks",
                              other)
        if pool.foreign_claim:
            text = f"subnet {subnet} is held here, but claimed in etcd by {pool.foreign_claim}"
            if "`" not in pool.foreign_claim:
                # A text with a backquote names its own remedy.
                text += ": remove one of the two networks"
            yield Finding("claimed_elsewhere", text,
                          DockerAllocation("pool", "", pool.subnet, pool.sub_pool))


def diff(holdings: list[Holding], docker: DockerView, until_s: float) -> Findings:
    """Return all differences, except leaks of pools and leases granted after that time."""
    findings = itertools.chain(
        find_leaks(holdings, docker.ours), find_missing(holdings, docker.ours),
        find_conflicts(holdings, docker.others))
    differences = {}
    for finding in findings:
        is_new = finding.is_leak and finding.holding and finding.holding.granted_s > until_s
        if not is_new:
            differences[finding.key] = finding
    return differences


def confirmed_differences(read_gipam: Callable[[], list[Holding]],
                          read_docker: Callable[[], DockerView], grace_s: int) -> Findings:
    """Compare gipam with Docker twice, to filter out transient differences. Raises: Unreachable.

    The second round follows RECHECK_DELAY_S later, because Docker shows a container as stopped
    before it releases its address.
    """
    first = compare_once(read_gipam, read_docker, grace_s)
    if not first:
        return {}
    time.sleep(RECHECK_DELAY_S)
    second = compare_once(read_gipam, read_docker, grace_s)
    return {key: finding for key, finding in second.items() if key in first}


def compare_once(read_gipam: Callable[[], list[Holding]],
                 read_docker: Callable[[], DockerView], grace_s: int) -> Findings:
    """Read gipam, Docker, gipam; return the differences that both readings of gipam show."""
    holdings = read_gipam()
    until_s = time.time() // 1 - grace_s
    docker = read_docker()
    first = diff(holdings, docker, until_s)
    if not first:
        return {}
    second = diff(read_gipam(), docker, until_s)
    return {key: finding for key, finding in first.items() if key in second}


def request_release(holding: Holding, post: Post) -> None:
    """Release this, if it has not changed since. Raises: as post()."""
    post("/Gipam.Release", {
        "PoolID": holding.pool_id,
        "Address": holding.address,
        "Seq": holding.seq,
    })


def fix(findings: Iterable[Finding], post: Post) -> int:
    """Release leaked pools and leases and import missing ones, unless they changed meanwhile.

    Return how many pools and leases were imported.
    """
    imports: dict[Key, Finding] = {}
    for finding in findings:
        if finding.is_missing:
            # All findings about one pool become one import.
            key = finding.subject.subnet, finding.subject.sub_pool
            first = imports.setdefault(key, finding._replace(missing=()))
            imports[key] = first._replace(missing=first.missing + finding.missing)
        elif finding.is_leak and finding.holding:
            with logged_as_not_fixed(finding):
                request_release(finding.holding, post)

    count = 0
    for finding in imports.values():
        with logged_as_not_fixed(finding):
            count += import_missing(finding, post)
    return count


@contextlib.contextmanager
def logged_as_not_fixed(finding: Finding) -> Iterator[None]:
    """Log that a finding could not be fixed; the others still can.

    An error that does not come from this finding, such as Unavailable or EtcdError, ends the fix,
    because after it Docker has not been compared.
    """
    try:
        yield
    except (RemoteError, Forbidden, InvalidRequest) as error:
        log.warning("not fixed: %s: %s", finding.text, error)


def import_missing(finding: Finding, post: Post) -> int:
    """Import the missing part of a finding; return how many pools and leases that was.

    Raises: as Service.import_pool(), or RemoteError if post() asks another process.
    """
    pool = finding.subject
    count = 0
    seq = finding.holding.seq if finding.holding else 0
    leases = []
    for user in order_for_import(pool, finding.missing):
        leases.append({"Address": user.address, "Kind": user.kind, "MAC": user.mac,
                       "Name": user.container, "Explicit": user.is_explicit})
    # A pool without leases is imported by one request, too.
    chunks = chunks_of(leases, MAX_IMPORT_LEASES) or [[]]
    for chunk in chunks:
        reply = post("/Gipam.Adopt", {
            "Subnet": pool.subnet,
            "SubPool": pool.sub_pool,
            "Name": pool.pool_name,
            "Leases": chunk,
            "Seq": seq,
        })
        count += reply["Adopted"]
        if not seq:
            # The first record granted the pool.
            seq = reply["Seq"] - reply["Adopted"] + 1
    return count


def order_for_import(pool: DockerAllocation,
                     users: Iterable[DockerAllocation]) -> list[DockerAllocation]:
    """Return the users of a pool in descending order of address, starting below the widest gap.

    So if Docker requests an address before the import is complete, gipam grants one of that gap. A
    gateway whose address is not known comes last.
    """
    low, high = address_range(parse_prefix(pool.sub_pool or pool.subnet))
    unknown = []
    users_by_offset = {}
    for user in users:
        if user.address:
            offset = int(ipaddress.ip_address(user.address)) - low
            users_by_offset[offset] = user
        else:
            unknown.append(user)

    descending = sorted(users_by_offset, reverse=True)
    first = index_below_widest_gap(descending, high - low + 1)
    in_order = [users_by_offset[offset] for offset in descending[first:] + descending[:first]]
    return in_order + unknown


def index_below_widest_gap(descending: list[int], size: int) -> int:
    """Return the index of the offset, in a range of that size, that the widest gap follows."""
    inside = [index for index, offset in enumerate(descending) if 0 <= offset < size]
    if not inside:
        return 0
    # The range is a ring: the lowest offset follows the highest.
    above = descending[inside[-1]] + size
    widest = 0
    widest_index = 0
    for index in inside:
        offset = descending[index]
        if above - offset > widest:
            widest = above - offset
            widest_index = index
        above = offset
    return widest_index


def import_from_docker(service: Service, driver: str, timeout_s: float,
                       run_in_loop: RunInLoop, run_with_claim: RunInLoop) -> None:
    """Import everything that Docker uses of this driver.

    run_with_claim() is that of ClusterMember; without etcd, it is run_in_loop() too.
    Another reading of Docker confirms what was imported or adopted; what it no longer shows is
    released. A pool stays unconfirmed until Docker shows it: before Docker 29, an empty network
    that was created with a size hint does not show its subnet.
    Raises: GipamError; what was imported stays.
    """
    path = docker_socket_path()
    deadline_s = time.monotonic() + timeout_s
    docker_import = service.docker_import

    def read_docker() -> DockerView:
        return read_docker_allocations(path, driver, max(deadline_s - time.monotonic(), 0.001))

    def read_gipam(docker: DockerView) -> list[Holding]:
        return read_holdings(service, docker, run_in_loop)

    def post(path: str, body: Json) -> Any:
        return run_with_claim(post_in_loop, service, path, body)

    count = fix(confirmed_missing(read_gipam, read_docker, docker_import.unconfirmed), post)
    unconfirmed: dict[int, Key] = run_in_loop(docker_import.take)
    if unconfirmed:
        docker = read_docker()
        release_unused(read_gipam(docker), docker, unconfirmed, post)
        confirmed = confirmed_seqs(read_gipam(docker), docker, unconfirmed)
        for chunk in chunks_of(confirmed, LEASES_PER_CHUNK):
            run_in_loop(docker_import.confirm, chunk)
    is_complete = run_in_loop(service.end_import)
    if count:
        log.info("compared with Docker: imported %s", plural(count, "missing item"))
    elif is_complete:
        log.info("compared with Docker: nothing is missing")


def confirmed_missing(read_gipam: Callable[[DockerView], list[Holding]],
                      read_docker: Callable[[], DockerView],
                      unconfirmed: Container[int]) -> list[Finding]:
    """Return the missing pools and addresses that two readings of Docker and gipam show.

    The second reading excludes what Docker was just releasing: Docker shows an address a little
    longer than it uses it. If a pool of the lease file lacks an address, the second reading follows
    RECHECK_DELAY_S later; else at once, so that nobody else is granted what is missing.
    """
    docker = read_docker()
    missing = set()
    pause_s = 0.0
    for finding in find_missing(read_gipam(docker), docker.ours):
        if finding.is_missing:
            missing.add(finding.key)
            if finding.holding and finding.holding.seq not in unconfirmed:
                pause_s = RECHECK_DELAY_S
    if not missing:
        return []

    time.sleep(pause_s)
    docker = read_docker()
    findings = find_missing(read_gipam(docker), docker.ours)
    return [finding for finding in findings if finding.key in missing]


def post_in_loop(service: Service, path: str, body: Json, outcome: Outcome = NO_OUTCOME) -> Any:
    """Handle a POST request in the loop; return its reply."""
    method = METHODS[path]
    reply, _ = method.function(service, Arguments(body), outcome)
    return reply


def release_unused(holdings: list[Holding], docker: DockerView, unconfirmed: Container[int],
                   post: Post) -> None:
    """Release imported leases and pools that Docker had released before they were imported."""
    for leak in find_leaks(holdings, docker.ours):
        holding = leak.holding
        if holding is None or holding.seq not in unconfirmed:
            continue
        # Docker itself releases a pool whose id it knows.
        if holding.address or parse_pool_id(holding.pool_id) is None:
            # If it has changed, Docker has just released it.
            with contextlib.suppress(Forbidden):
                request_release(holding, post)


def confirmed_seqs(holdings: list[Holding], docker: DockerView,
                   unconfirmed: Iterable[int]) -> list[int]:
    """Return the records whose pool Docker shows, or whose grant is no longer held."""
    shown = {allocation.key for allocation in docker.ours}
    hidden = set()
    for holding in holdings:
        if (holding.subnet, holding.sub_pool) not in shown:
            hidden.add(holding.seq)
    return [seq for seq in unconfirmed if seq not in hidden]


def is_docker_alive() -> bool:
    """Return whether Docker's pid file names a running process."""
    try:
        with open("/var/run/docker.pid", encoding="ascii") as file:
            os.kill(int(file.read()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def try_import(service: Service, driver: str, timeout_s: float, run_in_loop: RunInLoop,
               run_with_claim: RunInLoop) -> None:
    """Compare with Docker; log only the first of several failures. Raises: ShuttingDown."""
    docker_import = service.docker_import
    # After a failure the worker pauses, unless an adoption sets the event again.
    docker_import.requested.clear()
    try:
        # A garbage collection takes 30 ms for 20,000 leases of Docker.
        with paused_collection():
            import_from_docker(service, driver, timeout_s, run_in_loop, run_with_claim)
            # The next collection need not visit the new leases, in the loop: 37 ms for 20,000.
            gc.freeze()
        docker_import.has_failed = False
    except ShuttingDown:
        raise
    except GipamError as error:
        if not docker_import.has_failed:
            docker_import.has_failed = True
            log.info("not compared with Docker yet, trying again in the background: %s", error)
    except Exception:
        log.exception("cannot compare with Docker, which is a bug in gipam")


def import_worker(service: Service, driver: str, run_in_loop: RunInLoop,
                  run_with_claim: RunInLoop) -> None:
    """Compare with Docker whenever an import is due, until Docker answers. Runs in a thread."""
    docker_import = service.docker_import
    pause_s = IMPORT_BACKOFF_S
    while True:
        is_requested = docker_import.requested.wait(pause_s if docker_import.is_due else None)
        pause_s = IMPORT_BACKOFF_S if is_requested else min(2 * pause_s, MAX_IMPORT_BACKOFF_S)
        try:
            try_import(service, driver, SERVING_IMPORT_TIMEOUT_S, run_in_loop, run_with_claim)
        except ShuttingDown:
            return


def host_warnings(status: Json, allocations: list[DockerAllocation], proc: str) -> Iterator[str]:
    """Yield reasons why this host's containers cannot be reached, or why requests may fail."""
    bases = [parse_prefix(base["prefix"]) for base in status["bases"]]
    yield from etcd_warnings(status)
    if status["trouble"]:
        yield f"the last write of gipam failed, so requests may fail: {status['trouble']}"
    yield from forwarding_warnings({base.version for base in bases}, proc)
    for allocation in allocations:
        if allocation.address or not allocation.routed_option:
            continue
        if ":" in allocation.subnet or not parse_prefix(allocation.subnet).is_private:
            yield (f"network {allocation.network} masquerades {allocation.subnet}, so its "
                   "containers use this host's address outside: create it with -o "
                   f"{allocation.routed_option}")

    onlink = status["config"]["onlink"]["value"]
    if onlink == "off":
        onlink = ""
    if onlink:
        warning = device_warning(onlink)
        if warning:
            yield warning
    held = {pool["subnet"] for pool in status["pools"]}
    for base in bases:
        yield from route_warnings(base, onlink, held, proc)


def etcd_warnings(status: Json) -> Iterator[str]:
    """Yield a failure of etcd, and the claims of hosts that are down."""
    etcd = status.get("etcd", {})
    if etcd.get("failure"):
        waiting = "new networks"
        if etcd["due"]:
            waiting = f"{plural(etcd['due'], 'claim')} and new networks"
        yield f"{etcd['failure']}: {waiting} have to wait"
    for host in status.get("hosts", ()):
        if host["is_present"] is not False:
            continue
        remedy = "if it will never come back, `gipam evict {}` drops them"
        if host["is_own"]:
            remedy = "it is a former name of this host, `gipam evict {}` takes them over"
        yield (f"{host['host']} has not been seen for "
               f"{MISSED_HEARTBEATS * HEARTBEAT_INTERVAL_S:.0f} s and holds "
               f"{plural(host['claims'], 'claim')}: {remedy.format(host['host'])}")


def read_sysctl(proc: str, name: str) -> str:
    """Return the value of a sysctl, whose name has slashes, "" if it does not exist."""
    for words in read_words(f"{proc}/sys/{name}"):
        return words[0].decode()
    return ""


def forwarding_warnings(versions: Container[int], proc: str) -> Iterator[str]:
    """Yield why this host does not forward packets of these families."""
    if 4 in versions and read_sysctl(proc, "net/ipv4/ip_forward") == "0":
        yield "this host does not forward IPv4: sysctl -w net.ipv4.ip_forward=1"
    if 6 in versions:
        is_forwarding = read_sysctl(proc, "net/ipv6/conf/all/forwarding") != "0"
        yield from uplink_warnings(is_forwarding, proc)
        if not is_forwarding:
            yield "this host does not forward IPv6: sysctl -w net.ipv6.conf.all.forwarding=1"


def uplink_warnings(is_forwarding: bool, proc: str) -> Iterator[str]:
    """Yield interfaces that ignore router advertisements on a host that forwards.

    Linux accepts them there only if accept_ra is 2. Default routes that it has learned are deleted
    when forwarding is turned on, which Docker does with its first IPv6 network, or expire later.
    Source: linux/Documentation/networking/ip-sysctl.rst, net/ipv6/addrconf.c.
    """
    learned = set()
    has_default = False
    for row in read_words(proc + "/self/net/ipv6_route"):
        flags = int(row[8], 16)
        if row[1] == b"00" and not flags & RTF_REJECT:
            has_default = True
            if flags & RTF_ADDRCONF:
                learned.add(row[9])
    for row in read_words(proc + "/self/net/route"):
        is_default = row[1] == row[7] == b"00000000"
        if is_default and is_forwarding and not has_default:
            # The missing IPv6 default route would most likely use this interface.
            learned.add(row[0])

    for name in sorted(learned):
        device = os.fsdecode(name)
        if read_sysctl(proc, f"net/ipv6/conf/{device}/accept_ra") == "1":
            state = "will lose its" if has_default else "has no"
            yield (f"this host {state} IPv6 default route, because a host that forwards ignores "
                   f"router advertisements on {device}: sysctl -w "
                   f"net.ipv6.conf.{device.replace('.', '/')}.accept_ra=2")


def route_warnings(base: Network, onlink: str, held: set[str], proc: str) -> Iterator[str]:
    """Yield a warning if the routes to a base lack -onlink or a blackhole."""
    routes = list(read_covering_routes(proc + "/self/net", base))
    if str(base) in held and onlink not in dict(routes):
        # One network has the whole base, so that no packet loops. The route of that network is as
        # long as the base, and does not count.
        routes = [("*", 0), *read_covering_routes(proc + "/self/net", base.supernet())]
    links = []
    has_blackhole = False
    for device, flags in routes:
        if device not in ("lo", "*") and not flags & RTF_GATEWAY:
            links.append(device)
        if device == "*" or flags & RTF_REJECT:
            has_blackhole = True

    if onlink in links:
        yield from onlink_warnings(base.version, onlink, proc)
    elif links:
        yield (f"the base {base} is on-link on {links[0]}: routers there ask for each address; let "
               f"gipam answer with -onlink {links[0]}, or have it routed to this host")
    elif not has_blackhole:
        warning = (f"packets to free blocks of {base} may loop between this host and its router: "
                   f"ip route add blackhole {base} metric 9999")
        if onlink:
            warning += f"; or, if it is on the link of {onlink}, ip route add {base} dev {onlink}"
        yield warning


def onlink_warnings(version: int, device: str, proc: str) -> Iterator[str]:
    """Yield the sysctls that -onlink needs.

    If only the proxy_ndp of the device is set, a router that probes an address in its cache gets no
    answer, and systemd-networkd resets it to 0. IPv4 has no such switch.
    """
    for name, value in ((f"neigh/{device}/proxy_delay", "0"), ("conf/all/proxy_ndp", "1")):
        path = f"net/ipv{version}/{name}"
        if read_sysctl(proc, path) not in ("", value):
            # sysctl(8) writes eth0.7 as eth0/7.
            setting = path.translate({ord("."): "/", ord("/"): "."})
            yield f"-onlink {device} needs sysctl -w {setting}={value}"


# === Cluster ======================================================================================
#
# The thread that runs transactions in etcd. Keys in etcd, below /gipam/DRIVER/:
#
#   head                   a random token, new with each change of claims
#   changes                the latest changes: [[the head before, {key: value}], ...]
#   hosts/HOST             machine, product, process token, transaction count, is_behind, contended
#   claims/SUBNET          the hosts that hold it, since when, whether it is shared
#   claims/SUBNET/ADDRESS  in a shared subnet: the hosts that hold it, the kind of the lease
#
# Every transaction expects `head`, and hosts/HOST with the value that this host wrote last, and
# writes a new one. So a success invalidates all earlier transactions of this host. Requests,
# heartbeats and reconciling all use ClusterMember._run_transactions().


ClaimLog = List[Tuple[str, Json]]  # of each change: head before, values


class EtcdEndpoint(NamedTuple):
    """The address of an etcd server, and the credentials for it."""

    scheme: str
    host: str
    port: int
    user: str
    password: str

    def __str__(self) -> str:
        return f"{self.scheme}://{format_socket_address((self.host, self.port))}"


def to_base64(text: str) -> str:
    """Return the form of a key or a value in the JSON gateway."""
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()


def from_base64(text: str) -> str:
    """Return the text of a key or a value."""
    return base64.b64decode(text).decode("utf-8", "surrogateescape")


class DeadlineReader(io.RawIOBase):
    """Reads from a socket with one deadline for the whole reply.

    A socket timeout would start again at each read.
    """

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock = sock
        self._deadline_s = deadline_s
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, *_: Any) -> io.BufferedReader:
        """Return the file that http.client reads from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Return True, as io.BufferedReader requires."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read the bytes that have arrived. Raises: OSError after the deadline."""
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise OSError("its reply is incomplete")
        self._sock.settimeout(remaining_s)
        return self._raw.readinto(buffer)


class EtcdReply(NamedTuple):
    """A reply of etcd."""

    body: Json
    values: dict[str, str]  # by key
    revision: int


class EtcdClient:
    """A client of etcd's JSON gateway, for one thread. It keeps the endpoint that answered last.

    Source: etcd.io/docs/v3.5/dev-guide/api_grpc_gateway; 64-bit numbers are strings there.
    """

    def __init__(
        self,
        endpoints: list[EtcdEndpoint],
        tls: ssl.SSLContext | None,
        prefix: str,
    ) -> None:
        self._prefix = prefix
        self._tls = tls
        self._endpoints = collections.deque(endpoints)
        self._endpoints_text = ", ".join(map(str, endpoints))
        self._connection: ApiConnection | None = None
        self._token = ""

    def txn(
        self,
        expected: Mapping[str, str | None],
        writes: Mapping[str, str | None],
        deadline_s: float,
    ) -> EtcdReply:
        """Write keys (None: delete), if the expected keys have these values (None: absent).

        The reply has all hosts/ keys; if the transaction failed, also the head and the claim log.
        Raises: Unavailable, EtcdError.
        """
        compare = [self._comparison(key, text) for key, text in expected.items()]
        success = [self._write(key, text) for key, text in writes.items()]
        hosts = self._range("hosts/", "hosts0")  # "0" comes after "/"
        success.append(hosts)
        changes = self._range("changes", "changes\0")
        head = self._range("head", "head\0")
        body = {
            "compare": compare,
            "success": success,
            "failure": [hosts, changes, head],
        }
        return self._post_any("/v3/kv/txn", body, deadline_s)

    def _comparison(self, key: str, text: str | None) -> Json:
        comparison = {"key": self._to_key(key), "result": "EQUAL"}
        if text is None:
            comparison.update(target="VERSION", version="0")
        else:
            comparison.update(target="VALUE", value=to_base64(text))
        return comparison

    def _write(self, key: str, text: str | None) -> Json:
        if text is None:
            return {"request_delete_range": {"key": self._to_key(key)}}
        return {"request_put": {
            "key": self._to_key(key),
            "value": to_base64(text),
        }}

    def _range(self, start: str, end: str) -> Json:
        return {"request_range": {
            "key": self._to_key(start),
            "range_end": self._to_key(end),
        }}

    def read_page(self, start: str, revision: int, deadline_s: float) -> EtcdReply:
        """Read at most ETCD_PAGE_KEYS keys from start on, as of a revision (0: the latest).

        Raises: Unavailable, EtcdError.
        """
        return self._post_any("/v3/kv/range", {
            "key": self._to_key(start),
            "range_end": to_base64(self._prefix[:-1] + "0"),
            "limit": str(ETCD_PAGE_KEYS),
            "revision": str(revision),
        }, deadline_s)

    def _post_any(self, path: str, body: Json, deadline_s: float) -> EtcdReply:
        """Return the first valid reply. An endpoint that gives none is skipped.

        Raises: Unavailable, EtcdError.
        """
        while True:
            attempt_deadline_s = min(deadline_s, time.monotonic() + ETCD_ATTEMPT_S)
            try:
                return self._parse_reply(self._post(path, body, attempt_deadline_s))
            except OSError as error:
                reason = format_os_error(error)
                if isinstance(error, socket.timeout):
                    reason = "timed out"
            except (http.client.HTTPException, RecursionError, ValueError, LookupError, TypeError,
                    AttributeError):
                reason = "the reply is not etcd's"

            # Try the next endpoint, and request a token there.
            if self._connection:
                self._connection.close()
            self._connection = None
            self._token = ""
            self._endpoints.rotate(-1)
            if time.monotonic() + ETCD_PAUSE_S >= deadline_s:
                raise Unavailable(f"etcd does not answer on {self._endpoints_text}: {reason}")
            time.sleep(ETCD_PAUSE_S)

    def _parse_reply(self, body: Json) -> EtcdReply:
        """Return the keys and the revision of a reply. Raises: ValueError and the like."""
        ranges = [body]
        for response in body.get("responses", ()):
            ranges.append(response.get("response_range", {}))
        values = {}
        for key_range in ranges:
            for pair in key_range.get("kvs", ()):
                key = from_base64(pair["key"])[len(self._prefix):]
                values[key] = from_base64(pair.get("value", ""))
        return EtcdReply(body, values, int(body["header"]["revision"]))

    def _connect(self, endpoint: EtcdEndpoint, deadline_s: float) -> ApiConnection:
        """Return the connection, a new one if the last reply has closed it."""
        remaining_s = max(deadline_s - time.monotonic(), ETCD_PAUSE_S)
        connection = self._connection
        if connection is None or connection.sock is None:
            tls = self._tls if endpoint.scheme == "https" else None
            connection = ApiConnection((endpoint.host, endpoint.port), remaining_s, tls)
            self._connection = connection
            connection.connect()
        connection.sock.settimeout(remaining_s)
        return connection

    def _post(self, path: str, body: Json, deadline_s: float) -> Json:
        """Return the reply of the current endpoint.

        Raises: EtcdError; others, if another endpoint may give a valid reply.
        """
        endpoint = self._endpoints[0]
        connection = self._connect(endpoint, deadline_s)
        has_new_token = not self._token
        if endpoint.user and has_new_token and path != ETCD_AUTH_PATH:
            credentials = {"name": endpoint.user, "password": endpoint.password}
            reply = self._post(ETCD_AUTH_PATH, credentials, deadline_s)
            self._token = str(reply["token"])

        headers = {"Authorization": self._token} if self._token else {}
        connection.request("POST", path, encode_json(body), headers)
        reply, http_status = self._read_response(connection, deadline_s)
        if http_status == http.HTTPStatus.OK:
            return dict(reply)

        text = reply["message"]
        code = reply["code"]
        if type(code) is not int or not isinstance(text, str):
            raise ValueError("not an error of etcd")
        if code not in GRPC_PERMANENT_CODES:
            # It has no leader, is starting, or is not etcd.
            raise ConnectionError(printable(text))
        if self._token and not has_new_token:
            # The token may have expired.
            self._token = ""
            return self._post(path, body, deadline_s)
        raise EtcdError(f"etcd at {endpoint} refuses {path}: {printable(text.strip())}")

    @staticmethod
    def _read_response(connection: ApiConnection, deadline_s: float) -> tuple[Any, int]:
        """Return the JSON value of a reply, and its status."""

        def make_response(sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
            reader = DeadlineReader(sock, deadline_s)
            return http.client.HTTPResponse(cast(Any, reader), **options)

        cast(Any, connection).response_class = make_response
        response = connection.getresponse()
        return json.loads(response.read(MAX_ETCD_BYTES)), response.status

    def _to_key(self, key: str) -> str:
        return to_base64(self._prefix + key)


def parse_claim_log(values: Mapping[str, str]) -> ClaimLog:
    """Return the claim log from its key in etcd, [] if its text is malformed.

    Without a head the log is [] too: a person has deleted the head along with a claim, and the log
    in etcd does not list that deletion.
    """
    if "head" not in values:
        return []
    try:
        text = values.get("changes", "[]")
        changes = [(str(before), changed) for before, changed in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []
    is_valid = all(isinstance(changed, dict) for _, changed in changes)
    return changes if is_valid else []


def load_tls(directory: str) -> ssl.SSLContext:
    """Return the TLS settings of the etcd client: the CA, and a client certificate if there is one.

    Raises: ConfigError.
    """
    if not directory:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate_file = os.path.join(directory, "cert.pem")
    key_file = os.path.join(directory, "key.pem")
    try:
        context.load_verify_locations(os.path.join(directory, "ca.pem"))
        if os.path.exists(certificate_file) or os.path.exists(key_file):
            context.load_cert_chain(certificate_file, key_file)
    except OSError as error:
        raise ConfigError(f"-etcdtls {directory!r}: cannot use ca.pem, cert.pem and key.pem in it: "
                          f"{format_os_error(error)}") from None
    return context


def boottime_s() -> float:
    """Return the time of a clock that also runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_machine_id(lease_path: str, machine_id_file: str = "/etc/machine-id",
                    product_file: str = "/sys/class/dmi/id/product_uuid") -> MachineId:
    """Return the MachineId of this machine.

    It does not include device and inode numbers, because a reboot may change them.
    """
    path = os.path.abspath(lease_path)
    machine = f"{first_line(machine_id_file)} {path}"
    product = first_line(product_file)
    return MachineId(digest(machine), digest(product) if product else "")


def first_line(path: str) -> str:
    """Return the first line of a file, "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def digest(text: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the text, which may have surrogates."""
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


class TransactionBatch:
    """Merges the transactions that several requests need into one."""

    MAX_CLAIMS = 2 * CLAIMS_PER_TRANSACTION

    def __init__(self, table: ClaimTable) -> None:
        self.transaction: Transaction | None = None
        self._table = table
        self._parts: dict[PendingRequest, Transaction] = {}
        self._blocked: list[Network] = []

    def add(self, request: PendingRequest, transaction: Transaction) -> None:
        """Merge a transaction, if possible; else its request waits for the next batch."""
        merged = self.transaction
        if merged is None:
            self.transaction = transaction
        elif self._can_merge(merged, transaction):
            claims = {**merged.claims, **transaction.claims}
            self.transaction = merged._replace(claims=claims)
        else:
            return
        # Later requests of the batch must choose other subnets.
        self._parts[request] = transaction
        self._blocked += self._table.block_tentatively(transaction.claims)

    def _can_merge(self, merged: Transaction, other: Transaction) -> bool:
        for transaction in (merged, other):
            if transaction.expected_keys or transaction.deleted_keys:
                return False
        if not merged.claims.keys().isdisjoint(other.claims):
            return False
        count = len(merged.claims) + len(other.claims)
        return count <= self.MAX_CLAIMS

    def close(self) -> None:
        """Undo block_tentatively()."""
        self._table.unblock(self._blocked)

    def outcome_for(self, request: PendingRequest, outcome: Outcome) -> Outcome:
        """Return the outcome for one request, which is granted only its own claims."""
        part = self._parts.get(request)
        if part is None:
            return Outcome(is_fresh=outcome.is_fresh)
        granted = outcome.granted.intersection(part.claims)
        deleted = outcome.deleted.intersection((*part.claims, *part.deleted_keys))
        return outcome._replace(granted=granted, deleted=deleted)


class PendingCall(PendingRequest):
    """A function to run in the loop, which may need transactions, and whose result a thread awaits.

    The function takes the outcome as its last argument.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        super().__init__(self._run)
        self._function = function
        self._args = args
        self._error: GipamError | None = None
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def _run(self, outcome: Outcome) -> Any:
        try:
            return self._function(*self._args, outcome)
        except GipamError as error:
            self._error = error
            return None

    def finish(self, error: GipamError | None) -> None:
        """Wake the thread with the result or the error."""
        failure = error or self._error
        if self.future.done():
            return
        if failure:
            self.future.set_exception(failure)
        else:
            self.future.set_result(self.result)

    def wait(self) -> Any:
        """Wait, and return the function's result. Raises: as the function; StoreError."""
        return self.future.result()


class ClusterMember:
    """The thread that keeps the claims in etcd equal to the state.

    It runs the transactions of requests, sends a heartbeat every HEARTBEAT_INTERVAL_S, and
    reconciles claims. Its decisions run in the loop.

    No two machines use one host name: hosts/HOST says which machine wrote it, and a process whose
    MachineId differs stops with AlreadyRunning (see _check_own_key()).
    """

    def __init__(self, loop: EventLoop, table: ClaimTable, etcd: EtcdClient) -> None:
        self._loop = loop
        self._service = loop.service
        self._run_in_loop = loop.run_in_loop
        self._table = table
        self._etcd = etcd
        self._token = secrets.token_hex(8)  # of this process
        self._sent = 0  # transactions
        self._acknowledged = 0  # count in this host's key
        self._own_key_text: str | None = None  # last known value of this host's key
        self._claim_log: ClaimLog = []  # as of the head
        self._revision = 0  # of the last reply
        self._has_lost_data = False  # etcd, since all claims were read
        self._call_s = 0.0  # how long etcd's last reply took
        self._misses = 0  # consecutive transactions that found another head
        self._resume_s = 0.0  # when the next transaction may follow
        self._followed_s = 0.0  # when the head was last current
        self._next_heartbeat_s = 0.0
        self._next_reading_s = 0.0
        self._queue: collections.deque[PendingRequest] = collections.deque()
        self._wakeup = threading.Event()
        self._start_wait_s = ETCD_TIMEOUT_S  # that is left to the start
        self.name_conflict: AlreadyRunning | None = None
        table.wake_up = self._wakeup.set

    # For the start

    def join(self) -> None:
        """Start the thread; wait until it has read all claims and announced this host.

        If etcd does not answer in time, the start goes on. If another machine uses the host name,
        which the thread may find out later, it stops the loop.
        Raises: AlreadyRunning.
        """
        thread = threading.Thread(target=self._run, name="etcd", daemon=True)
        thread.start()
        try:
            self.run_before_serving(self._table.heartbeat)
        except (Unavailable, EtcdError) as error:
            self._set_failure(str(error))

    def run_before_serving(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(*args, outcome) in the loop, from its own thread, before run_forever().

        A start waits for etcd only here, and in all such calls together for at most
        ETCD_TIMEOUT_S, because the etcd thread may be stuck, as in DNS.
        Durable: what it changed, on return. Raises: as the function; StoreError; Unavailable.
        """
        call = PendingCall(function, *args)
        self.submit(call)
        started_s = time.monotonic()
        self._loop.run_until_done(call.future, self._start_wait_s)
        self._start_wait_s -= time.monotonic() - started_s
        if not call.future.done():
            raise self.name_conflict or Unavailable("etcd has not answered yet")
        return call.wait()

    # For other threads

    def submit(self, request: PendingRequest) -> None:
        """Run the transactions that the request needs, for at most ETCD_TIMEOUT_S."""
        self._queue.append(request)
        self._wakeup.set()

    def run_with_claim(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(*args, outcome) in the loop, from another thread.

        Durable: what it changed, on return. Raises: as the function; StoreError.
        """
        call = PendingCall(function, *args)
        self.submit(call)
        return call.wait()

    # The thread

    def _run(self) -> None:
        while True:
            try:
                self._run_once()
            except ShuttingDown:
                return
            except AlreadyRunning as error:
                self.name_conflict = error
                self._loop.stop()
                return
            except GipamError as error:
                if str(error) != self._table.failure:
                    log.warning("%s", error)
                self._beat_within(ETCD_ATTEMPT_S)
            except Exception:
                log.exception("the etcd thread failed, which is a bug in gipam")
                time.sleep(ETCD_ATTEMPT_S)

    def _beat_within(self, interval_s: float) -> None:
        """Let the next heartbeat follow within this time."""
        self._next_heartbeat_s = min(self._next_heartbeat_s, time.monotonic() + interval_s)

    def _run_once(self) -> None:
        """Run submitted requests, send a heartbeat if it is due, then reconcile dirty keys."""
        wait_s = self._next_heartbeat_s - time.monotonic()
        self._wakeup.wait(max(wait_s, 0.0))
        self._wakeup.clear()
        self._run_transactions(self._take_queue())
        if time.monotonic() >= self._next_heartbeat_s:
            self._beat()

        # Requests that arrive meanwhile share the transactions of reconciling.
        keys = list(self._table.dirty)
        was_behind = self._table.members.is_behind
        while keys:
            part = keys[:CLAIMS_PER_TRANSACTION]
            del keys[:CLAIMS_PER_TRANSACTION]
            call = PendingCall(self._table.reconcile, part)
            self._run_transactions([*self._take_queue(), call])
            call.wait()
        has_caught_up = was_behind and not self._table.members.is_behind
        listed = parse_contended_keys(self._own_key_text or "")
        if has_caught_up or self._table.contending.difference(listed):
            self._next_heartbeat_s = 0.0  # announces it at once

    def _take_queue(self) -> list[PendingRequest]:
        """Return the requests submitted so far; later ones wait, so that each round ends."""
        return [self._queue.popleft() for _ in range(len(self._queue))]

    def _beat(self) -> None:
        """Send a heartbeat; count a reading of the members if one is due.

        Raises: AlreadyRunning, Unavailable, EtcdError.
        """
        interval_s = HEARTBEAT_INTERVAL_S
        if self._table.members.grace_remaining_s() > 0:
            interval_s = ETCD_ATTEMPT_S
        self._next_heartbeat_s = time.monotonic() + interval_s
        call = PendingCall(self._table.heartbeat)
        self._run_transactions([call])
        call.wait()

        # Heartbeats may be more frequent. Readings must not be, else a host would look absent.
        if time.monotonic() >= self._next_reading_s:
            self._next_reading_s = time.monotonic() + HEARTBEAT_INTERVAL_S
            self._run_in_loop(self._table.members.count_reading)

    # Transactions

    def _run_transactions(self, requests: list[PendingRequest]) -> None:
        """Run transactions until each of these requests is decided."""
        try:
            batch = self._attempt(requests, TransactionBatch(self._table), None)
            while batch.transaction is not None:
                deadline_s = min(request.deadline_s for request in undecided(requests))
                result = self._commit_by(batch.transaction, deadline_s)
                batch = self._attempt(requests, batch, result)
        except (ShuttingDown, AlreadyRunning) as error:
            for request in requests:
                request.finish(error)
            raise
        except GipamError as error:
            self._fail(requests, error)
        except Exception:
            self._fail(requests, GipamError("internal error of gipam: see its log"))
            raise

    def _attempt(
        self,
        requests: list[PendingRequest],
        batch: TransactionBatch,
        result: TransactionResult | None,
    ) -> TransactionBatch:
        """In one iteration, attempt all requests; return the batch that the undecided ones need.

        The result is that of the given batch, None if etcd gave none.
        """
        waiting = undecided(requests)
        next_batch: TransactionBatch = self._run_in_loop(
            self._apply_and_attempt, waiting, batch, result)
        for request in waiting:
            if request.is_decided:
                request.finish(None)
        return next_batch

    def _apply_and_attempt(
        self,
        requests: list[PendingRequest],
        batch: TransactionBatch,
        result: TransactionResult | None,
    ) -> TransactionBatch:
        """Apply a result and attempt the requests. Runs in the loop, in one iteration."""
        outcome = NO_OUTCOME
        if result is not None:
            outcome = self._apply(result)
        next_batch = TransactionBatch(self._table)
        try:
            for request in requests:
                transaction = request.attempt(self._outcome_for(request, batch, outcome))
                if transaction is not None:
                    next_batch.add(request, transaction)
        finally:
            next_batch.close()
        return next_batch

    def _outcome_for(
        self,
        request: PendingRequest,
        batch: TransactionBatch,
        outcome: Outcome,
    ) -> Outcome:
        """Return the outcome, or an error if the request has waited too long."""
        is_late = time.monotonic() + ETCD_PAUSE_S >= request.deadline_s
        if outcome.is_committed or not is_late:
            return batch.outcome_for(request, outcome)
        reason = (self._table.failure
                  or "etcd is too slow, or other hosts changed claims each time: try again")
        return Outcome(error=Unavailable(reason))

    def _apply(self, result: TransactionResult) -> Outcome:
        """Apply a result; return its outcome.

        If this process was suspended since it sent the transaction, its host may have been evicted
        meanwhile. So nothing is granted on a result older than TRANSACTION_MAX_AGE_S.
        """
        age_s = boottime_s() - result.sent_s
        if result.outcome.is_committed and age_s > TRANSACTION_MAX_AGE_S:
            self._table.forget_head()
            return NO_OUTCOME
        self._table.apply_result(result)
        if result.is_complete and self._table.members.unclaimed:
            log.warning("this host's claims are missing from etcd (wiped, restored or evicted); "
                        "claiming again what is held here")
            self._next_heartbeat_s = 0.0
        for key, claim in self._table.new_conflicts().items():
            log.error("claimed_elsewhere: %s is held here, and claimed by %s: no new address of it "
                      "is assigned until one host releases it", describe_claim_key(key), claim)
        return result.outcome

    def _fail(self, requests: list[PendingRequest], error: GipamError) -> None:
        """Decide the undecided requests with an error as the outcome, and finish all of them."""
        try:
            self._run_in_loop(self._refuse, undecided(requests), error)
        finally:
            for request in requests:
                request.finish(error)

    @staticmethod
    def _refuse(requests: list[PendingRequest], error: GipamError) -> None:
        for request in requests:
            request.attempt(Outcome(error=error))

    def _commit_by(self, transaction: Transaction, deadline_s: float) -> TransactionResult | None:
        """Return the result of a transaction, None if etcd does not answer by the deadline.

        Raises: EtcdError; AlreadyRunning.
        """
        try:
            return self._commit(transaction, deadline_s)
        except Unavailable:
            return None

    def _commit(self, transaction: Transaction, deadline_s: float) -> TransactionResult:
        """Write the claims and this host's key, if the preconditions hold; return the result.

        Raises: Unavailable, EtcdError; AlreadyRunning.
        """
        self._let_others_go_first(deadline_s)
        expected_head = transaction.expected_head
        if expected_head is None:
            # The request was decided without knowing all claims, so nothing may be written.
            return self._read_all()

        head = expected_head
        claim_log = self._claim_log
        self._sent += 1
        own_key = f"hosts/{self._table.host}"
        own_key_text = self._format_own_key()
        writes: dict[str, str | None] = {own_key: own_key_text}
        writes.update(dict.fromkeys(transaction.deleted_keys))
        changed: Json = {}
        for key, claim in transaction.claims.items():
            changed[key] = claim.to_json() if claim else None
            writes[f"claims/{key}"] = encode_json(changed[key]) if claim else None
        # The first transaction that finds no head writes one, so that a person who then deletes a
        # claim can delete the head as well, which tells each host to read all claims.
        if changed or expected_head.token is None:
            head = Head(secrets.token_hex(8))
            claim_log = self._extended_log(expected_head, changed)
            writes["head"] = head.token
            writes["changes"] = encode_json(claim_log)

        # No claim has changed since the decision, and no other process has written this key.
        expected = {
            "head": expected_head.token,
            own_key: self._own_key_text,
            **transaction.expected_keys,
        }
        sent_s = boottime_s()
        reply = self._call_etcd(self._etcd.txn, expected, writes, deadline_s)
        if self._has_lost_data:
            # Even if it was committed: the claims that it was decided on may be lost.
            return self._read_all()
        if reply.body.get("succeeded") is not True:
            self._misses += 1
            return self._catch_up(reply.values, sent_s)

        if self._misses > 0:
            # About as many hosts compete as there were misses; each needs one transaction.
            spread = random.uniform(1.0, 2.0)  # noqa: S311
            pause_s = min(self._misses * self._call_s * spread, 2 * ETCD_PAUSE_S)
            self._resume_s = time.monotonic() + pause_s
        self._misses = 0
        self._claim_log = claim_log
        self._own_key_text = own_key_text
        self._acknowledged = self._sent
        self._followed_s = time.monotonic()
        if transaction.log_text:
            log.warning("%s", transaction.log_text)
        outcome = self._outcome_of(transaction)
        return TransactionResult(head, transaction.claims, reply.values, outcome, sent_s)

    def _outcome_of(self, transaction: Transaction) -> Outcome:
        """Return the outcome of a transaction that was committed."""
        granted = []
        deleted = list(transaction.deleted_keys)
        for key, claim in transaction.claims.items():
            if claim is None:
                deleted.append(key)
            elif self._table.host in claim.hosts:
                granted.append(key)
        return Outcome(True, frozenset(granted), frozenset(deleted), is_fresh=True)

    def _let_others_go_first(self, deadline_s: float) -> None:
        """Pause after a success that other hosts competed for, if the deadline leaves the time.

        The host that succeeded is the only one that knows the head, and would succeed again and
        again: of ten busy hosts some waited for seconds. A host that failed does not pause.
        Measured with three hosts: 600 claims a second with this pause, 125 with a fixed one of 50
        to 100 ms, and 320 without any.
        """
        now_s = time.monotonic()
        pause_s = self._resume_s - now_s
        if 0 < pause_s < deadline_s - now_s - ETCD_PAUSE_S:
            time.sleep(pause_s)

    def _format_own_key(self) -> str:
        machine = self._table.members.machine
        return encode_json({
            "machine": machine.machine,
            "product": machine.product,
            "token": self._token,
            "count": self._sent,
            "is_behind": self._table.members.is_behind,
            "contended": sorted(self._table.contending),
        })

    def _extended_log(self, before: Head, changed: Json) -> ClaimLog:
        """Return the claim log with this change; the oldest are dropped at the limit."""
        claim_log = [*self._claim_log, (before.token or "", changed)]
        while len(claim_log) > 1 and len(encode_json(claim_log)) > MAX_CLAIM_LOG_CHARS:
            del claim_log[0]
        return claim_log

    def _call_etcd(self, function: Callable[..., EtcdReply], *args: Any) -> EtcdReply:
        """Call etcd; note whether it answers, and whether it has lost data.

        After a failure, whatever it was for, a heartbeat soon shows whether etcd answers again.
        Revisions only grow: a lower one than before means that etcd was restored or replaced.
        Raises: as the function.
        """
        started_s = time.perf_counter()
        failure = ""
        try:
            reply = function(*args)
        except GipamError as error:
            failure = str(error)
            self._beat_within(ETCD_ATTEMPT_S)
            raise
        finally:
            if failure or self._table.failure:
                self._run_in_loop(self._set_failure, failure)

        self._call_s = time.perf_counter() - started_s
        self._service.etcd_s.observe(self._call_s)
        if reply.revision < self._revision:
            self._has_lost_data = True
        self._revision = reply.revision
        return reply

    def _set_failure(self, failure: str) -> None:
        """Note why etcd does not answer, "" if it does; log a change. Runs in the loop."""
        former_failure = self._table.failure
        self._table.failure = failure
        if failure and failure != former_failure:
            log.warning("%s; existing allocations keep working, new ones must wait", failure)
        elif former_failure and not failure:
            log.info("etcd answers")

    # Following the changes of other hosts

    def _catch_up(self, values: dict[str, str], sent_s: float) -> TransactionResult:
        """Return the changes since the known head, from the claim log or by reading all."""
        is_own_key = self._check_own_key(values)
        head = Head(values.get("head"))
        claim_log = parse_claim_log(values)
        index = self._find_in_log(head, claim_log)
        log_length = len(claim_log)
        new_changes = 2 * log_length if index is None else log_length - index
        self._plan_heartbeat(log_length, new_changes)
        if not is_own_key or index is None:
            return self._read_all()

        # Of several changes of one key the last one counts.
        changed: Json = {}
        for _, later in claim_log[index:]:
            changed.update(later)
        self._claim_log = claim_log
        claims = {key: parse_claim(value) for key, value in changed.items()
                  if is_claim_key(key, self._table.claims)}
        return TransactionResult(head, claims, values, Outcome(is_fresh=True), sent_s)

    def _find_in_log(self, head: Head, claim_log: ClaimLog) -> int | None:
        """Return the index of the first unknown change, None if the log begins after it."""
        heads = [*[Head(before or None) for before, _ in claim_log], head]
        for index in reversed(range(len(heads))):
            if heads[index] == self._table.head:
                return index
        return None

    def _plan_heartbeat(self, log_length: int, new_changes: int) -> None:
        """Schedule a heartbeat before other hosts have replaced half of the claim log.

        Heartbeats cost less than a longer log, which each change of claims would write.
        """
        now_s = time.monotonic()
        elapsed_s = now_s - self._followed_s
        self._followed_s = now_s
        if new_changes > 0:
            interval_s = elapsed_s * log_length / (2 * new_changes)
            self._beat_within(max(interval_s, ETCD_MIN_LOOK_S))

    def _check_own_key(self, values: Mapping[str, str]) -> bool:
        """Return whether etcd has this host's key as this process wrote it.

        Raises: AlreadyRunning if another machine wrote it, however long ago. Only `gipam evict`
        frees a host name.
        """
        host = self._table.host
        text = values.get(f"hosts/{host}")
        value = parse_json_object(text)
        if self._table.members.machine.is_foreign(value):
            raise AlreadyRunning(
                f"another machine is host {host!r} in etcd: give this one a -host of its own; if "
                f"that machine is gone for good, run `gipam evict {host}` on another host first")
        self._own_key_text = text
        count = value.get("count")
        if value.get("token") != self._token or type(count) is not int:
            return False
        if count < self._acknowledged:
            return False
        self._acknowledged = count
        return True

    def _read_all(self) -> TransactionResult:
        """Read all claims, and apply them page by page; return a result with the other keys.

        Raises: Unavailable, EtcdError; AlreadyRunning.
        """
        table = self._table
        sent_s = boottime_s()
        # Without a head, no request is decided on claims that are only partly read.
        self._run_in_loop(table.forget_head)
        deleted = set(table.claims)
        other_values: dict[str, str] = {}
        revision = 0
        start = ""
        while True:
            deadline_s = time.monotonic() + ETCD_TIMEOUT_S
            reply = self._call_etcd(self._etcd.read_page, start, revision, deadline_s)
            revision = revision or reply.revision
            claims = self._split_page(reply.values, other_values)
            deleted.difference_update(claims)
            self._apply_in_chunks(claims)
            if reply.body.get("more") is not True or not reply.values:
                break
            start = max(reply.values) + "\0"
        self._apply_in_chunks(dict.fromkeys(deleted))

        is_own_key = self._check_own_key(other_values)
        is_loss = table.has_joined and (self._has_lost_data or not is_own_key)
        self._has_lost_data = False
        self._claim_log = parse_claim_log(other_values)
        self._followed_s = time.monotonic()
        unknown_keys = [key for key in other_values
                        if not re.fullmatch("head|changes|hosts/.*", key, re.DOTALL)]
        if unknown_keys and not table.has_joined:
            log.warning("ignoring %s in etcd, such as %s",
                        plural(len(unknown_keys), "unknown key"), printable(unknown_keys[0]))
        return TransactionResult(
            Head(other_values.get("head")),
            {},
            other_values,
            Outcome(is_fresh=True),
            sent_s,
            is_complete=True,
            is_loss=is_loss,
        )

    def _split_page(self, values: Mapping[str, str], other_values: dict[str, str]) -> ClaimDict:
        """Return the claims of a page; add its other keys to the other values."""
        claims = {}
        for key, text in values.items():
            table_name, _, claim_key = key.partition("/")
            if table_name == "claims" and is_claim_key(claim_key, self._table.claims):
                claims[claim_key] = parse_claim(parse_json_object(text))
            else:
                # The head, the log, a host, or a key that gipam did not write.
                other_values[key] = text
        return claims

    def _apply_in_chunks(self, claims: ClaimChanges) -> None:
        """Apply claims, CLAIMS_PER_ITERATION per iteration of the loop."""
        items = list(claims.items())
        while items:
            self._run_in_loop(self._table.apply_claims, dict(items[:CLAIMS_PER_ITERATION]))
            del items[:CLAIMS_PER_ITERATION]


# === Settings =====================================================================================
#
# The options of gipam. OPTIONS lists them. A value comes from the default, the environment, the
# command line, or the lease file, which people may edit. Settings map the name of each option to
# the Option in effect; a Config has the parsed values.
#
# The rule: of the lease file and the other sources, the one that was changed last wins; see
# latest(). The error for an invalid value names the option, its text, its origin and the rule.


def parse_number(text: str, lowest: int, highest: int, rule: str) -> int:
    """Return a decimal number within the bounds. Raises: ValueError with the rule."""
    if not re.fullmatch("0|[1-9][0-9]{0,4}", text) or not lowest <= int(text) <= highest:
        raise ValueError(rule)
    return int(text)


BOOLEANS = {  # the words of Go's strconv.ParseBool
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def parse_boolean(text: str) -> bool:
    """Return a boolean. Raises: ValueError."""
    if text not in BOOLEANS:
        raise ValueError("not a boolean: use true or false (or 1, 0, t, f)")
    return BOOLEANS[text]


def parse_ipv4_length(text: str) -> int:
    """Return the length of an IPv4 block. Raises: ValueError."""
    return parse_number(text, 1, 31, "not a prefix length from 1 to 31")


def parse_ipv6_length(text: str) -> int:
    """Return the length of an IPv6 block. Raises: ValueError."""
    return parse_number(text, 1, 127, "not a prefix length from 1 to 127")


def parse_prefixes(text: str) -> list[Network]:
    """Return the prefixes of a list in CIDR form. Raises: ValueError."""
    if not text:
        return []
    return [parse_prefix(part.strip()) for part in text.split(",")]


def parse_listen_address(text: str) -> tuple[str, int]:
    """Return (address, port); without a host, the address is 127.0.0.1. Raises: ValueError."""
    rule = "not HOST:PORT with an address as HOST, such as 127.0.0.1:9090"
    match = re.fullmatch(r"\[?([^\[\]]*?)\]?:([0-9]+)", text)
    if not match:
        raise ValueError(rule)
    host, port = match.groups()
    if host in ("", "localhost"):
        host = "127.0.0.1"
    version = 6 if ":" in host else 4
    try:
        address = parse_address(host, version)
    except ValueError:
        raise ValueError(rule) from None
    return format_address(address, version), parse_number(port, 0, 65535, rule)


def parse_file(text: str) -> str:
    """Return the path of a file that may not exist yet, its directory without symbolic links.

    Raises: ValueError.
    """
    directory, name = os.path.split(text)
    if not name or "\0" in text:
        raise ValueError("not the path of a file")
    return os.path.join(os.path.realpath(directory), name)


def parse_socket(text: str) -> str:
    """Return the path of a UNIX socket. Raises: ValueError. Source: unix(7)."""
    rule = "not the path of a socket, which has at most 107 characters"
    try:
        path = parse_file(text)
    except ValueError:
        raise ValueError(rule) from None
    if len(os.fsencode(path)) > 107:
        raise ValueError(rule)
    return path


def parse_directory(text: str) -> str:
    """Return the absolute path of an existing directory. Raises: ValueError."""
    if "\0" in text or not os.path.isdir(text):
        raise ValueError("there is no such directory")
    return os.path.realpath(text)


def parse_device(text: str) -> str:
    """Return the name of a network device, which may not exist yet. Raises: ValueError."""
    if not re.fullmatch(r"[^\s/]{1,15}", text):
        raise ValueError("not the name of a network device")
    return text


def parse_host_name(text: str) -> str:
    """Return the name, or the host's own for an empty text. Raises: ValueError."""
    if not text:
        return socket.gethostname()
    if not re.fullmatch(r"[\w.-]{1,64}", text):
        raise ValueError("not a name of at most 64 letters, digits, '.', '_' and '-'")
    return text


def parse_endpoints(text: str) -> list[EtcdEndpoint]:
    """Return the etcd endpoints of a list of URLs. Raises: ValueError."""
    rule = ("not a list of endpoints, such as http://10.0.0.1:2379 or "
            "https://user:password@etcd2:2379")
    endpoints = []
    for url in text.split(","):
        match = re.fullmatch(
            r"(https?)://(?:([^/]*)@)?(\[[0-9a-f:.]+\]|[\w.-]+)(?::([0-9]+))?/?", url.strip())
        if not match:
            raise ValueError(rule)
        scheme, user, host, port = match.groups("")
        user, _, password = user.partition(":")
        endpoints.append(EtcdEndpoint(
            scheme, host.strip("[]"), parse_number(port or "2379", 1, 65535, rule),
            urllib.parse.unquote(user), urllib.parse.unquote(password)))
    return endpoints


VALUE_TYPES: dict[str, Callable[[str], Any]] = {
    "BOOL": parse_boolean, "1..31": parse_ipv4_length, "1..127": parse_ipv6_length,
    "PREFIXES": parse_prefixes, "HOST:PORT": parse_listen_address, "FILE": parse_file,
    "SOCKET": parse_socket, "DIR": parse_directory, "DEV": parse_device, "NAME": parse_host_name,
    "URLS": parse_endpoints,
}


def suggest(word: str, known: list[str]) -> str:
    """Return ": did you mean WORD?" with the most similar known word, "" if none is similar."""
    matches = difflib.get_close_matches(word, known, 1, 0.75)
    return f": did you mean {matches[0]}?" if matches else ""


class Origin(enum.IntEnum):
    """Where the text of an option comes from; of the first three, the highest wins."""

    DEFAULT = 0
    ENVIRONMENT = 1
    COMMAND_LINE = 2
    LEASE_FILE = 3


class Option(NamedTuple):
    """An option -NAME, which is also the variable GIPAM_NAME, and its text."""

    name: str
    value_type: str  # a key of VALUE_TYPES
    default: str
    help: str
    text: str = ""
    origin: Origin = Origin.DEFAULT
    given_text: str | None = None  # in the environment or on the command line
    lease_file: str = ""  # path, if that is the origin

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return "GIPAM_" + self.name.upper()

    @property
    def origin_text(self) -> str:
        """Return the origin in words."""
        if self.origin is Origin.ENVIRONMENT:
            return f"environment ({self.variable})"
        if self.origin is Origin.LEASE_FILE:
            return f"lease file ({OPTION_KEYS[self.name]} in {self.lease_file})"
        return self.origin.name.lower().replace("_", " ")

    @property
    def redacted_text(self) -> str:
        """Return the text without the credentials of URLs, even if it is invalid."""
        if self.value_type != "URLS":
            return self.text
        return re.sub("(https?://)?((?!, *https?://).)*@", r"\1***@", self.text)

    @property
    def value(self) -> Any:
        """Return the parsed text, None if the option is off. Raises: ConfigError."""
        if self.default == "off" and self.text in ("", "off"):
            return None
        parse = VALUE_TYPES[self.value_type]
        try:
            return parse(self.text)
        except ValueError as error:
            raise self.error(str(error)) from None

    def error(self, rule: str) -> ConfigError:
        """Return the error that names the option, its text, its origin, and the rule."""
        return ConfigError(f"-{self.name} {self.redacted_text!r} from the {self.origin_text}: "
                           f"{rule}")


OPTIONS = (
    Option("unix", "BOOL", "false", "serve on a UNIX socket instead of TCP"),
    Option("address", "HOST:PORT", ":9090", "TCP address, on loopback only; HOST may be omitted"),
    Option("file", "FILE", "leases.json", "lease file"),
    Option("v6", "PREFIXES", "", "IPv6 bases, separated by commas, used in order"),
    Option("v4", "PREFIXES", "", "IPv4 bases, separated by commas, used in order"),
    Option("v6ab", "1..127", "64", "prefix length of IPv6 blocks"),
    Option("v4ab", "1..31", "24", "prefix length of IPv4 blocks"),
    Option("exclude", "PREFIXES", "", "prefixes in the bases that are never assigned"),
    Option("socket", "SOCKET", PLUGIN_SOCKET_DIR + "/gipam.sock",
           "socket path; its base name is the driver name"),
    Option("spec", "FILE", "/etc/docker/plugins/gipam.spec",
           "plugin file of TCP mode; its base name is the driver name"),
    Option("metrics", "HOST:PORT", "off", "address for GET /metrics and /healthz"),
    Option("mac", "BOOL", "true", "have Docker give each container a MAC address; false allows "
           "ipvlan, but before Docker 29 containers then do not get their old addresses back"),
    Option("onlink", "DEV", "off", "network device on which bases are on-link: gipam has the "
           "kernel answer neighbour requests for its containers there"),
    Option("etcd", "URLS", "off", "endpoints of the etcd through which several hosts share the "
           "bases, separated by commas"),
    Option("etcdtls", "DIR", "off", "directory with ca.pem for etcd, and cert.pem and key.pem if "
           "it requires a client certificate"),
    Option("host", "NAME", "", "unique name of this host in etcd, unless its hostname is one"),
)

UNUSABLE_PREFIXES = parse_prefixes("0.0.0.0/8,127.0.0.0/8,224.0.0.0/4,::/127,ff00::/8")
Settings = Dict[str, Option]  # by name


def read_settings(environment: Mapping[str, str], arguments: argparse.Namespace) -> Settings:
    """Return the settings of the command line, the environment and the defaults."""
    settings = {}
    for option in OPTIONS:
        origin = Origin.DEFAULT
        given_text = getattr(arguments, option.name, None)
        if given_text is not None:
            origin = Origin.COMMAND_LINE
        elif option.variable in environment:
            origin = Origin.ENVIRONMENT
            given_text = environment[option.variable]
        text = option.default if given_text is None else given_text
        settings[option.name] = option._replace(text=text, origin=origin, given_text=given_text)
    return settings


def note_of(option: Option) -> list[str | None]:
    """Return the note of an option in the lease file: digests of its text and the text given.

    A digest is safe from search-and-replace in the file.
    """
    given_text = option.given_text
    return [digest(option.text), None if given_text is None else digest(given_text)]


def latest(option: Option, in_file: Option, note: Sequence[Any] | None) -> tuple[Option, str]:
    """Return the setting that was changed last, and why it wins, "" if there is nothing to log.

    The note has digests of the text that gipam wrote into the file, and of the text that the
    option was given then. It is None in a file that gipam has not written.

        edited in the file                        the file
        option not given, nor when it was noted   the file
        option no longer given                    the file
        option given as when it was noted         the file
        option given with another text            the option
    """
    text, given_text = note_of(in_file)
    noted_text, noted_given_text = note or (text, given_text)
    if in_file.text == option.text:
        return option, ""
    if text != noted_text:
        return in_file, "it has been edited there"
    if given_text is None and noted_given_text is None:
        return in_file, ""
    if given_text is None:
        return in_file, (f"it stays although -{option.name} is no longer given; to clear it, start "
                         f"once with {option.variable}={option.default}, or edit it there")
    if given_text == noted_given_text:
        return in_file, ("the file wins; to change it, edit it there or give "
                         f"-{option.name} a new value")
    return option, "existing pools are unaffected"


def apply_lease_file_settings(settings: Settings, document: Json,
                              path: str) -> tuple[Settings, list[str]]:
    """Return the settings with those of the lease file that win, and the differences to log."""
    notes = document.get("Options")
    effective = dict(settings)
    differences = []
    for name, key in OPTION_KEYS.items():
        option = settings[name]
        note = notes.get(name) if isinstance(notes, dict) else None
        if not isinstance(note, list) or len(note) != 2:
            note = None
        text = str(document.get(key) or "")
        if not text and not note:
            continue

        in_file = option._replace(text=text or option.default, origin=Origin.LEASE_FILE,
                                  lease_file=path)
        winner, reason = latest(option, in_file, note)
        effective[name] = winner
        if reason:
            loser = option if winner is in_file else in_file
            differences.append(f"-{name} is {winner.text!r} from the {winner.origin_text}, not "
                               f"{loser.text!r} from the {loser.origin_text}: {reason}")
    return effective, differences


def settings_to_json(settings: Settings) -> Json:
    """Return the settings as keys of the lease file, with the notes that latest() reads."""
    document: Json = {}
    notes: Json = {}
    for name, key in OPTION_KEYS.items():
        option = settings[name]
        document[key] = int(option.text) if option.text.isdecimal() else option.text
        notes[name] = note_of(option)
    document["Options"] = notes
    return document


def describe_daemon(config: Config, address: Any) -> Json:
    """Return the keys of /status about the daemon that listens on an address, without passwords."""
    rows = {}
    for name, option in config.settings.items():
        text = option.redacted_text
        if option.value_type in ("FILE", "SOCKET", "NAME"):
            text = option.value
        rows[name] = {"value": text, "origin": option.origin_text}
    return {"driver": config.driver, "listening": format_socket_address(address), "config": rows}


def build_config(settings: Settings) -> Config:
    """Parse and check all options. Raises: ConfigError."""
    values = {name: option.value for name, option in settings.items()}
    config = Config(settings=settings, **values)
    config.is_spec_given = settings["spec"].origin is not Origin.DEFAULT
    config.families = ((6, config.v6, config.v6ab), (4, config.v4, config.v4ab))
    config.driver = driver_name(settings)

    if not config.unix and not ipaddress.ip_address(config.address[0]).is_loopback:
        raise settings["address"].error("not a loopback address: anyone who can reach the port "
                                        "could take every address; use :PORT or -unix")
    # The hostname of the machine has not been checked: it only has to be valid with etcd.
    if config.etcd:
        config.host = settings["host"]._replace(text=config.host).value
    for version, bases, prefixlen in config.families:
        require_valid_bases(settings, version, bases, prefixlen)
    for network in config.exclude:
        if not any(is_subnet(network, base) for base in config.v4 + config.v6):
            raise settings["exclude"].error(f"{network} is not within any base")
    return config


def driver_name(settings: Settings) -> str:
    """Return the driver name: for Docker, the base name of the file where it finds gipam."""
    path: str = settings["socket"].value if settings["unix"].value else settings["spec"].value
    return os.path.splitext(os.path.basename(path))[0]


def require_valid_bases(settings: Settings, version: int, bases: list[Network],
                        prefixlen: int) -> None:
    """Check the bases of a family, and that blocks of this length fit. Raises: ConfigError."""
    option = settings[f"v{version}"]
    for index, base in enumerate(bases):
        if base.version != version:
            raise option.error(f"{base} is not an IPv{version} prefix")
        if any(base.overlaps(prefix) for prefix in UNUSABLE_PREFIXES):
            raise option.error(f"{base} has addresses that no host can have: loopback, multicast "
                               "or unspecified ones")
        if base.prefixlen > prefixlen:
            raise settings[f"v{version}ab"].error(
                f"a block of /{prefixlen} is larger than its base {base}")
        if any(base.overlaps(other) for other in bases[:index]):
            raise option.error(f"{base} overlaps another base")


def read_lease_file(store: Store) -> Json | None:
    """Return the lease file with its keys as gipam spells them, None if there is none.

    Raises: ConfigError for a newer format; CorruptionError; OSError.
    """
    document = store.read_snapshot(convert_leases)
    if document is None:
        return None
    document = normalise_keys(document, LEASE_FILE_KEYS)
    try:
        require_format(document)
    except ValueError as error:
        raise ConfigError(f"{store.path} {error}") from None
    unknown = document.keys() - LEASE_FILE_KEYS
    entries = document.get("Allocated")
    if entries is None:
        entries = []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise store.corruption(store.path, "has an Allocated that is not a list of pools")

    pools = []
    for entry in entries:
        pool = normalise_keys(entry, POOL_KEYS)
        unknown |= pool.keys() - POOL_KEYS
        pools.append(pool)
    document["Allocated"] = pools
    for key in sorted(unknown):
        log.warning("unknown key %r in %s: dropped", key, store.path)
    return document


def read_state(config: Config, store: Store, document: Json | None) -> State:
    """Recover the state from disk, with the bases of a configuration. Raises: CorruptionError."""
    families = []
    for version, bases, prefixlen in config.families:
        excluded = [network for network in config.exclude if network.version == version]
        families.append(Family(version, bases, prefixlen, excluded))
    state = State(families)
    recover(store, document, state)
    return state


def open_store(settings: Settings) -> tuple[Config, Store, Json | None, State]:
    """Lock the lease file, apply its settings, recover the state. Raises: GipamError, OSError."""
    store = Store(settings["file"].value)
    if not os.path.isdir(os.path.dirname(store.path)):
        raise settings["file"]._replace(text=store.path).error("its directory does not exist")
    # Nothing is read before both locks are held: until then, another process may write it.
    store.lock()
    try:
        store.lock_segments()
        document = read_lease_file(store)
        effective, differences = apply_lease_file_settings(settings, document or {}, store.path)
        config = build_config(effective)
        for difference in differences:
            log.warning("%s", difference)
        state = read_state(config, store, document)
    except OSError as error:
        # Another start may succeed.
        if error.errno in TRANSIENT_ERRNOS:
            raise
        path = error.filename or f"{store.path} or its journal"
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return config, store, document, state


# === Daemon =======================================================================================
#
# `gipam serve` as a process: start, run, stop. The order of the steps matters; comments in
# Daemon.start() and Daemon.stop() give the reasons.
#
# A start that fails logs one line and exits with the status of its error. It never waits for a
# reader of its stderr, so uncaught exceptions go to the log handler too.


class Daemon:
    """The driver as a process."""

    def __init__(self, settings: Settings, log_handler: LogHandler) -> None:
        self._settings = settings
        self._log_handler = log_handler
        self._paths: list[PublishedPath] = []
        self._member: ClusterMember | None = None

    def start(self) -> None:
        """Recover the state and begin to listen. Raises: GipamError, OSError."""
        # This comes before any change, because a second daemon must not disturb the first. Sockets
        # that systemd passes are already bound by this service; it never keeps that of -metrics.
        if "LISTEN_FDS" not in os.environ:
            require_addresses_free(self._settings)
        require_port_free(self._settings["metrics"])

        # The garbage collector would take a third of the time to load a million leases.
        gc.disable()
        config, store, document, state = open_store(self._settings)
        self._service = make_service(config, store, document, state)
        self._loop = EventLoop(self._service, self._log_handler.flush)
        # The claims of other hosts are read before anything is granted, and before the import
        # claims what Docker uses.
        self._member = join_cluster(config, self._loop, store)
        run_with_claim: RunInLoop = self._service.run_once
        if self._member:
            run_with_claim = self._member.run_before_serving
        start_import(config, self._service, document, run_with_claim)
        # The garbage collector need not visit these leases again: 270 ms for a million.
        gc.freeze()
        gc.enable()

        # From here on a signal ends the loop, so that the paths published below are removed.
        self._handle_signals()
        self._listen(config)
        # Threads that call the loop, and dockerd, which connects as soon as gipam listens, wait
        # until run(); everything below is set by then.
        self._start_threads(config)
        log_startup_warnings(config, self._service.state.families[4].subnets, "/proc/self/net")
        addresses = [format_socket_address(server.server_address) for server in self._loop.servers]
        self._service.daemon_info = describe_daemon(config, addresses[0])
        self._service.has_macs = config.mac
        log.info("serving on %s with %s", ", and metrics on ".join(addresses),
                 plural(len(self._service.state.pools), "pool"))

    def _handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup, SIGHUP is ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._loop.stop)

    def _listen(self, config: Config) -> None:
        """Listen, and publish the paths. Raises: GipamError, OSError."""
        paths = unix_paths(config, self._loop) if config.unix else tcp_paths(config, self._loop)
        for path in paths:
            path.create()
            self._paths.append(path)
            self._loop.add_timer(path.restore)
        # This comes last, so that the first server is that of the plugin.
        if config.metrics:
            server = Server(config.metrics, self._loop, paths=METRICS_LISTENER_PATHS)
            self._loop.add_listener(server)

    def _start_threads(self, config: Config) -> None:
        run_in_loop = self._loop.run_in_loop
        run_with_claim: RunInLoop = run_in_loop
        if self._member:
            self._loop.submit_to_etcd = self._member.submit
            run_with_claim = self._member.run_with_claim
        arguments = (self._service, config.driver, run_in_loop, run_with_claim)
        threading.Thread(target=import_worker, args=arguments, name="import", daemon=True).start()

    def run(self) -> None:
        """Serve until a signal or a fatal error."""
        sd_notify("READY=1")
        self._loop.add_timer(send_watchdog, self._service)
        # The replies of an iteration are sent before its log lines.
        self._log_handler.is_buffering = True
        try:
            self._loop.run_forever()
        finally:
            self._log_handler.is_buffering = False

    def stop(self) -> int:
        """End without losing a request; return the exit status."""
        sd_notify("STOPPING=1")
        # The paths are removed while the listeners still accept, so that no client finds a dead
        # socket.
        self._loop.drain(self.unpublish)
        error: GipamError | None = self._service.store.fatal_error
        if not error and self._member:
            error = self._member.name_conflict
        if error:
            log.error("%s", error)
            return error.exit_status
        # This comes last, when nothing changes the state any more.
        Checkpoint(self._service, self._service.run_once).run(is_stopping=True)
        log.info("stopped")
        return 0

    def unpublish(self) -> None:
        """Remove the published paths; a failure is logged."""
        while self._paths:
            published = self._paths.pop()
            try:
                published.remove()
            except OSError as error:
                log.warning("cannot remove %s: %s", published.path, error.strerror)


def cmd_serve(arguments: argparse.Namespace) -> int:
    """Run the Docker IPAM driver until SIGTERM, SIGINT or SIGHUP; the default command."""
    os.umask(0o077)
    # If the watchdog kills gipam (SIGABRT), the log shows where it hung.
    faulthandler.enable()
    log_uncaught_exceptions()
    sys.setswitchinterval(THREAD_SWITCH_S)
    sd_notify(f"EXTEND_TIMEOUT_USEC={START_TIMEOUT_S * 1_000_000}")
    daemon = Daemon(arguments.settings, arguments.log_handler)
    try:
        daemon.start()
        daemon.run()
        return daemon.stop()
    finally:
        daemon.unpublish()


def log_uncaught_exceptions() -> None:
    """Log the exceptions that Python would write to stderr, because that could block for ever."""
    def on_thread_exception(raised: Any) -> None:
        name = f"thread {raised.thread.name}" if raised.thread else "a thread that has ended"
        log.error("a bug in gipam, in %s", name,
                  exc_info=(raised.exc_type, raised.exc_value, raised.exc_traceback))

    def on_unraisable_exception(raised: Any) -> None:
        log.error("%s: %r", raised.err_msg or "exception ignored in", raised.object,
                  exc_info=(raised.exc_type, raised.exc_value, raised.exc_traceback))

    threading.excepthook = on_thread_exception
    sys.unraisablehook = on_unraisable_exception


def require_addresses_free(settings: Settings) -> None:
    """Check that no other process listens on the configured addresses. Raises: GipamError."""
    is_unix = settings["unix"].value
    if is_unix:
        require_no_listener(settings["socket"].value)
    require_no_listener(os.path.join(PLUGIN_SOCKET_DIR, driver_name(settings) + ".sock"))
    if not is_unix:
        require_port_free(settings["address"])


def require_port_free(option: Option) -> None:
    """Check that nothing is bound to the TCP address of an option. Raises: GipamError."""
    if not option.value:
        return
    host, port = option.value
    family = SOCKET_FAMILY[ipaddress.ip_address(host).version]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            rule = f"{error.strerror}: give an address of this host and a port that is free"
            raise AlreadyRunning(str(option.error(rule))) from None


def send_watchdog(service: Service) -> None:
    """Send the service manager a keep-alive, the number of pools and leases, and an error."""
    pools = plural(len(service.state.pools), "pool")
    leases = plural(service.state.lease_count, "lease")
    status = f"{pools}, {leases}"
    if service.store.last_error:
        status += f"; {service.store.last_error}"
    sd_notify(f"READY=1\nWATCHDOG=1\nSTATUS={status}")


def join_cluster(config: Config, loop: EventLoop, store: Store) -> ClusterMember | None:
    """Read the claims in etcd, if it is configured. Raises: AlreadyRunning, ConfigError."""
    if not config.etcd:
        return None
    tls = load_tls(config.etcdtls)
    service = loop.service
    table = ClaimTable(config.host, read_machine_id(store.path), service.state)
    service.claims = table
    client = EtcdClient(config.etcd, tls, f"/gipam/{config.driver}/")
    member = ClusterMember(loop, table, client)
    member.join()
    return member


def make_service(config: Config, store: Store, document: Json | None, state: State) -> Service:
    """Return the service; a first start writes the lease file before anything is served.

    Raises: ConfigError if the kernel refuses to list its routes; OSError.
    """
    try:
        netlink_request(RTM_GETROUTE, bytes((socket.AF_INET, 0, 0, 0)))
    except OSError as error:
        if error.errno in TRANSIENT_ERRNOS:
            raise
        raise ConfigError(f"cannot ask the kernel for routes: {error.strerror}; under systemd, "
                          "RestrictAddressFamilies must include AF_NETLINK, as in gipam.service"
                          ) from None
    keys = settings_to_json(config.settings)
    if document is None:
        store.create_temp()
        store.write_temp(encode_snapshot(keys, copy_state(state), None))
        store.publish_temp(None)
    proxies = None
    if config.onlink:
        proxies = ProxyNeighbours(config.onlink, config.v6 + config.v4, netlink_request)

    def read_state_again() -> State:
        return read_state(config, store, read_lease_file(store))

    return Service(store, state, keys, read_state_again, netlink_request, proxies)


def start_import(config: Config, service: Service, document: Json | None,
                 run_with_claim: RunInLoop) -> None:
    """Import the allocations of Docker before anything is served, if there was no lease file.

    This requires that dockerd is running: while it starts, its socket accepts connections, but
    dockerd waits for gipam. All other starts compare in the background, in import_worker().
    """
    if document is None and is_docker_alive():
        try_import(service, config.driver, IMPORT_TIMEOUT_S, service.run_once, run_with_claim)


def log_startup_warnings(config: Config, used: Container[Network], proc: str) -> None:
    """Log unknown variables, open TCP, missing bases, and on-link routes.

    dockerd up to 26 rejects each pool that overlaps an on-link route of the host, as seen with
    `ip route add 10.99.0.0/16 dev lo` on 26.1.5.
    """
    known = [option.variable for option in OPTIONS]
    for name in sorted(os.environ):
        if name.startswith("GIPAM_") and name not in known:
            log.warning("%s is not an option of gipam%s", printable(name), suggest(name, known))
    if not config.unix:
        log.warning("on TCP every user of this host can take and release addresses; -unix allows "
                    "only root")
    if not config.v4 and not config.v6:
        log.warning("no base is configured (-v4, -v6): only networks with a --subnet are possible")
    if config.onlink and not config.mac:
        log.warning("-onlink with -mac false needs Docker 29: older ones do not say which "
                    "addresses are containers, and gipam answers for none")
    for base in config.v4 + config.v6:
        if base.is_link_local:
            log.warning("base %s is link-local: no router forwards its addresses", base)

    for base in config.v4:
        if base in used:
            continue
        for device, flags in read_covering_routes(proc, base):
            if device in ("*", config.onlink) or flags & RTF_GATEWAY:
                continue
            log.warning("base %s is part of an on-link route of %s: Docker up to 26 rejects every "
                        "block of it; replace the route: ip route add blackhole %s metric 9999",
                        base, printable(device), base)


# === Commands =====================================================================================
#
# The command line. Each command but `serve` asks the running daemon, over its socket or address,
# and prints text for people, or JSON for programs. A command is a function that takes the parsed
# arguments and returns the exit status; COMMANDS lists each with its own arguments. Functions whose
# names begin with render_ or draw_ return text and print nothing. An error is raised as a
# GipamError; only main() prints it, in one line, and chooses the exit status.


def daemon_request(settings: Settings, verb: str, path: str, body: Any = None) -> Any:
    """Send a request to the daemon and return its reply. Raises: as request_json()."""
    addresses = daemon_addresses(settings)
    for address in addresses:
        with contextlib.suppress(NotListening):
            return request_json(ApiConnection(address, DAEMON_TIMEOUT_S), verb, path, body)
    where = " or ".join(map(format_socket_address, addresses))
    raise NotListening(f"no gipam answers on {where}: start it, or say where it is with -socket or "
                       "-address")


def daemon_addresses(settings: Settings) -> list[Any]:
    """Return the addresses where the daemon may listen.

    The socket is left out if the origin of -address is higher than that of -socket and -unix.
    """
    socket_origin = settings["socket"].origin
    if settings["unix"].value:
        socket_origin = max(socket_origin, settings["unix"].origin)
    address = settings["address"].value
    if settings["address"].origin > socket_origin:
        return [address]
    return [settings["socket"].value, address]


def cmd_status(arguments: argparse.Namespace) -> int:
    """Show bases, pools and, with --leases, every lease; or only the item named."""
    has_leases = arguments.leases or bool(arguments.WHAT)
    status = daemon_request(arguments.settings, "GET", f"/status?leases={int(has_leases)}")
    docker_error = ""
    docker = DockerView([], [])
    try:
        docker = read_docker_allocations(docker_socket_path(), status["driver"], NAMES_TIMEOUT_S)
    except GipamError as error:
        docker_error = str(error)
    add_docker_names(status["pools"], docker.ours)

    if arguments.WHAT:
        status["pools"] = search_pools(status, arguments.WHAT, docker_error)
        for key in status.keys() & {"bases", "hosts"}:
            status[key] = []
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:
        print_status(status)
    return 0


def add_docker_names(pools: list[Json], allocations: list[DockerAllocation]) -> None:
    """Sort pools and leases by address, and add the names of networks and containers."""
    nameless = DockerAllocation("")
    by_key = {allocation.key: allocation for allocation in allocations}
    pools.sort(key=pool_order)
    for pool in pools:
        pool_key = (pool["subnet"], pool["sub_pool"])
        pool["network"] = by_key.get(pool_key, nameless).network
        leases = pool.get("addresses", [])
        leases.sort(key=lambda lease: int(ipaddress.ip_address(lease["address"])))
        for lease in leases:
            lease_key = (pool["subnet"], lease["address"])
            lease["container"] = by_key.get(lease_key, nameless).container


def pool_order(pool: Json) -> tuple[int, Range]:
    """Return the key by which pools are sorted: IPv4 first, then by address."""
    network = parse_prefix(pool["sub_pool"] or pool["subnet"])
    return network.version, address_range(network)


def find_pools(pools: list[Json], text: str) -> list[Json]:
    """Return the pools with this id, prefix in any spelling, Docker network or gipam.name."""
    with contextlib.suppress(ValueError):
        text = str(parse_prefix(text, mask=True))
    keys = ("id", "subnet", "sub_pool", "name", "network")
    return [pool for pool in pools if text and text in map(pool.get, keys)]


def search_pools(status: Json, text: str, docker_error: str) -> list[Json]:
    """Return the pools that match, or pools with only the leases that match.

    An address that is not allocated gets a row of its own, in each range of its subnet.
    Raises: InvalidRequest.
    """
    names = {text, text.lower()}
    address = None
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(normalise_address(text))
        names = {str(address)}

    pools = find_pools(status["pools"], text)
    if not pools:
        pools = find_held_leases(status["pools"], names)
    if not pools:
        free_address = str(address) if address and "/" not in text else ""
        pools = find_free_addresses(status, names, free_address)
    if not pools:
        reason = f", and Docker's names are not known: {docker_error}" if docker_error else ""
        if address:
            reason = claimants_text(status, address)
        raise InvalidRequest(f"{text!r} is not an address, subnet, network or container that is "
                             f"held here{reason}")
    return pools


def find_held_leases(pools: list[Json], names: set[str]) -> list[Json]:
    """Return pools with only the leases that have one of the names, addresses or MAC addresses."""
    matches = []
    for pool in pools:
        leases = []
        for lease in pool["addresses"]:
            keys = ("address", "mac", "name", "container")
            if not names.isdisjoint(map(lease.get, keys)):
                leases.append(lease)
        if leases:
            matches.append(dict(pool, addresses=leases))
    return matches


def find_free_addresses(status: Json, names: set[str], address: str) -> list[Json]:
    """Return pools with rows for an unallocated address, or for those last owned by these names."""
    held: set[str] = set()
    for pool in status["pools"]:
        held.update(lease["address"] for lease in pool["addresses"])

    matches = []
    for pool in status["pools"]:
        addresses = [last for owner, last in pool["remembered"].items()
                     if owner in names and last not in held]
        if address and ipaddress.ip_address(address) in parse_prefix(pool["subnet"]):
            addresses = [address]
        if addresses:
            rows = [free_address_row(status, pool, free) for free in addresses]
            matches.append(dict(pool, addresses=rows))
    return matches


def free_address_row(status: Json, pool: Json, address: str) -> Json:
    """Return an unallocated address in the form of a lease.

    Its kind is "resting" if it is kept for its last owners, "claimed" if another host has it,
    "reserved", or "free".
    """
    subnet = Subnet(parse_prefix(pool["subnet"]))
    offset = parse_address(address, subnet.version) - subnet.first
    names = [owner for owner, last in pool["remembered"].items() if last == address]
    kind = "resting" if names else "free"
    if offset in subnet.reserved:
        kind = "reserved"
    for claim in status["claims"]:
        if (claim["subnet"], claim["address"]) == (pool["subnet"], address):
            kind = "claimed"
            names = claim["hosts"]
    return {
        "address": address,
        "kind": kind,
        "name": ", ".join(names),
        "mac": "",
        "container": "",
        "granted_s": 0,
    }


def claimants_text(status: Json, address: Any) -> str:
    """Return the hosts that claim a subnet with this address, as text, or ""."""
    for claim in status["claims"]:
        if address in parse_prefix(claim["subnet"]):
            hosts = ", ".join(claim["hosts"])
            return f"; {claim['subnet']} is claimed by {hosts}"
    return ""


PRESENCE_TEXT = {True: "up", False: "down", None: "unknown"}
LEGEND = "  # held  + partly  . free  x excluded  ~ route, own address  r kept for a name"
MAP_ROW = re.compile(r"  \S+ +[#+.x~ro]+")


def print_status(status: Json) -> None:
    """Print the text form of the status, on a terminal in its width and in colour."""
    is_terminal = sys.stdout.isatty()
    columns = 80
    height = sys.maxsize
    if is_terminal:
        columns, height = shutil.get_terminal_size()
    width = max(columns, 40)
    is_coloured = is_terminal and "NO_COLOR" not in os.environ

    for line in render_status(status, width, int(time.time()), height):
        text = fit_line(line, width)
        print(colour_map(text) if is_coloured else text)


def fit_line(line: str, width: int) -> str:
    """Return the line, cut to the width, but not within a number."""
    if len(line) <= width:
        return line
    return re.sub("[0-9]+$", "", line[:width - 1]) + "…"


def colour_map(line: str) -> str:
    """Return the line; in a row of a map and in the legend, blocks in use are yellow."""
    if MAP_ROW.fullmatch(line) or line.startswith(LEGEND[:8]):
        return re.sub("[#+]+", "\033[33m\\g<0>\033[0m", line)
    return line


def render_status(status: Json, width: int, now_s: int, height: int = sys.maxsize) -> list[str]:
    """Return the text form of the status: bases, hosts, then pools, separated by blank lines.

    If the terminal is too small, the pools come first, so that the summary stays visible.
    """
    bases = render_bases(status, width)
    hosts = render_hosts(status, width)
    pools = render_pools(status, now_s)
    lines = join_paragraphs(bases, hosts, pools)
    if len(lines) < height:
        return lines
    return join_paragraphs(pools, bases, hosts)


def join_paragraphs(*paragraphs: list[str]) -> list[str]:
    """Return the lines of all paragraphs that are not empty, separated by blank lines."""
    lines: list[str] = []
    for paragraph in paragraphs:
        if lines and paragraph:
            lines.append("")
        lines += paragraph
    return lines


def render_bases(status: Json, width: int) -> list[str]:
    """Return a bar and a map of each base, IPv4 first, and a legend."""
    host = status.get("host")
    claimed = []
    for claim in status.get("claims", ()):
        if not claim["address"] and host not in claim["hosts"]:
            claimed.append(claim["subnet"])
    held = {pool["subnet"] for pool in status["pools"]}

    lines: list[str] = []
    for base in sorted(status["bases"], key=lambda base: int(base["family"])):
        lines += render_base(base, held, claimed, width)
    if lines:
        lines += textwrap.wrap(LEGEND, width, subsequent_indent="  ")
    if lines and claimed:
        lines.append("  o held by another host")
    return lines


def render_base(base: Json, held: Iterable[str], claimed: Iterable[str], width: int) -> list[str]:
    """Return the lines of a base: numbers with a bar, then a map in rows with their addresses."""
    prefix = parse_prefix(base["prefix"])
    total = base["blocks"]
    used = base["blocks_used"]
    free = total - used - base["blocks_excluded"] - base["blocks_routed"]
    filled = divide_rounding_up(10 * used, total)
    bar = "".ljust(filled, "#").ljust(10, ".")
    numbers = (f"{prefix}  [{bar}]  {format_count(used)} of {format_count(total)} blocks of "
               f"/{base['block_prefixlen']} held, {format_count(free)} free")
    lines = textwrap.wrap(numbers, width, subsequent_indent="  ")

    last_block = prefix[-(prefix.num_addresses // total)]
    label_width = len(str(last_block))
    row_length = largest_power_of_two(max(width - label_width - 4, 1))
    # Later marks are drawn over earlier ones.
    marks = {
        "r": base["remembered"].values(),
        "o": claimed,
        "~": base["routes"],
        "x": base["excluded"],
        "+": held,
    }
    signs = draw_map(prefix, min(total, 4 * row_length), marks)

    for start in range(0, len(signs), row_length):
        first = prefix[prefix.num_addresses // len(signs) * start]
        label = str(first).ljust(label_width)
        row = signs[start:start + row_length]
        lines.append(f"  {label}  {row}")
    if total > len(signs):
        unit = format_count(total // len(signs))
        lines.append(f"  {unit} blocks per character")
    return lines


def draw_map(base: Network, count: int, marks: Mapping[str, Iterable[str]]) -> str:
    """Return a map of a base: a character for each of its count parts.

    The character is the last mark that has a network there, or # if the networks of + fill it.
    """
    start, end = address_range(base)
    part_size = base.num_addresses // count
    signs = ["." for _ in range(count)]
    held: collections.Counter[int] = collections.Counter()
    for mark, prefixes in marks.items():
        for network in map(parse_prefix, prefixes):
            if network.version != base.version:
                continue
            first, last = address_range(network)
            low = max(first, start) - start
            high = min(last, end) - start

            for part in range(low // part_size, high // part_size + 1):
                signs[part] = mark
                if mark == "+":
                    part_start = part * part_size
                    part_end = part_start + part_size
                    held[part] += min(high + 1, part_end) - max(low, part_start)
    for part, addresses in held.items():
        if addresses == part_size:
            signs[part] = "#"
    return "".join(signs)


def divide_rounding_up(dividend: int, divisor: int) -> int:
    """Return the quotient of two integers of any size, rounded up."""
    return -(-dividend // divisor)


def largest_power_of_two(limit: int) -> int:
    """Return the largest power of two that is at most the limit, which is positive."""
    return 1 << (limit.bit_length() - 1)


def format_count(count: int) -> str:
    """Return a number as text; a large one as the next power of two."""
    if count < 10 ** 7:
        return str(count)
    exponent = (count - 1).bit_length()
    return f"2^{exponent}"


def render_hosts(status: Json, width: int) -> list[str]:
    """Return a table of the hosts that share the bases, and its age; nothing without etcd."""
    rows = [("HOST", "CLAIMS", "STATE")]
    for host in status.get("hosts", ()):
        presence = PRESENCE_TEXT[host["is_present"]]
        rows.append((host["host"], str(host["claims"]), presence))
    lines = format_table(rows)

    etcd = status.get("etcd", {})
    if etcd.get("failure"):
        lines += textwrap.wrap(etcd["failure"], width)
    if lines and etcd.get("age_s") is not None:
        age = format_age(int(etcd["age_s"]))
        lines.append(f"hosts and claims as of {age} ago")
    return lines


def render_pools(status: Json, now_s: int) -> list[str]:
    """Return a table of the pools, each with the leases that the status lists."""
    rows = [("SUBNET", "HELD", "OF", "AGE", "RANGE", "NETWORK")]
    for pool in status["pools"]:
        rows.append((
            pool["subnet"],
            str(pool["leases"]),
            format_count(pool["usable"]),
            age_of(pool, now_s),
            pool["sub_pool"],
            pool["network"] or pool["name"],
        ))
        if pool["claimed_elsewhere"]:
            rows.append(("  claimed by " + pool["claimed_elsewhere"], "", "", "", "", ""))
        for lease in pool.get("addresses", ()):
            owner = lease["container"] or lease["name"] or lease["mac"]
            address = "  " + lease["address"]
            age = age_of(lease, now_s)
            rows.append((address, " ", " ", age, lease["kind"], owner))
    return format_table(rows) or ["no pools yet"]


def age_of(pool_or_lease: Json, now_s: int) -> str:
    """Return how long ago a pool or lease was granted, "" if that is not known."""
    granted_s = pool_or_lease["granted_s"]
    return format_age(now_s - granted_s) if granted_s else ""


def format_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table, none if it has only a header.

    A column without a value is left out, and an empty cell is shown as a dash. A row with only a
    first cell is text, and makes no column wider.
    """
    if not rows[1:]:
        return []
    data_rows = [row for row in rows if any(row[1:])]
    widths: dict[int, int] = {}
    for index, column in enumerate(zip(*data_rows)):
        if any(map(str.strip, column[1:])):
            widths[index] = max(map(len, column))

    lines = []
    for row in rows:
        if not any(row[1:]):
            lines.append(row[0])
            continue
        cells = []
        for index, width in widths.items():
            cell = row[index] or "-"
            cells.append(cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def cmd_check(arguments: argparse.Namespace) -> int:
    """Compare with Docker; with --fix, release leaks and import missing pools and addresses.

    Exit status 0: no difference; 1: some are left; 2: could not compare.
    """
    settings = arguments.settings
    path = docker_socket_path()

    def read_status() -> Json:
        status: Json = daemon_request(settings, "GET", "/status?leases=1")
        return status

    def read_gipam() -> list[Holding]:
        return list(holdings_of_json(read_status()))

    def read_docker() -> DockerView:
        return read_docker_allocations(path, status["driver"], DOCKER_TIMEOUT_S)

    def post(path: str, body: Json) -> Any:
        return daemon_request(settings, "POST", path, body)

    status = read_status()
    differences = confirmed_differences(read_gipam, read_docker, arguments.grace)
    left = differences
    if arguments.fix and differences:
        if not arguments.force:
            require_same_docker(status, read_docker(), path)
        fix(differences.values(), post)
        left = confirmed_differences(read_gipam, read_docker, arguments.grace)
    warnings = list(host_warnings(status, read_docker().ours, "/proc"))
    warnings += failed_starts(path, status)
    print_report(differences, left, list(dict.fromkeys(warnings)), arguments.json)
    return 1 if left else 0


def require_same_docker(status: Json, docker: DockerView, path: str) -> None:
    """Check that this Docker knows a pool that is held, if any is. Raises: Unreachable."""
    held = {pool["subnet"] for pool in status["pools"]}
    known = set()
    for allocation in docker.ours + docker.others:
        if allocation.driver == status["driver"]:
            known.add(allocation.subnet)
    if held and held.isdisjoint(known):
        raise Unreachable(f"the Docker at {path} knows none of the pools held: is it the one that "
                          "gipam serves? If so, use --force")


def print_report(differences: Findings, left: Findings, notes: list[str], as_json: bool) -> None:
    """Print the differences, and those that are left or new."""
    all_findings = {**differences, **left}
    if as_json:
        print_json_report(all_findings, left, notes)
        return
    for key, finding in all_findings.items():
        ending = "" if key in left else "; fixed"
        print(f"{finding.kind}: {finding.text}{ending}")
    for note in notes:
        print(f"note: {note}")
    if all_findings:
        count = f"{plural(len(all_findings), 'difference')}, {len(left)} left"
        print(count + describe_fix(list(left.values())))
    else:
        print("no difference")


def describe_fix(left: list[Finding]) -> str:
    """Return how many of these differences --fix repairs, as the end of a sentence."""
    fixable = [finding for finding in left if finding.is_leak or finding.is_missing]
    if not fixable:
        return ""
    pronoun = "it" if len(left) == 1 else f"{len(fixable)} of them"
    return f"; `gipam check --fix` fixes {pronoun}"


def print_json_report(all_findings: Findings, left: Findings, notes: list[str]) -> None:
    """Print the report as JSON."""
    rows = []
    for key, finding in all_findings.items():
        subject = finding.subject
        rows.append({
            "kind": finding.kind,
            "text": finding.text,
            "is_fixed": key not in left,
            "subnet": subject.subnet,
            "address": subject.address,
            "network": subject.network,
            "container": subject.container,
        })
    print(json.dumps({"findings": rows, "notes": notes}, indent=2))


def cmd_release(arguments: argparse.Namespace) -> int:
    """Release a pool, by id or subnet, or an address in it."""
    settings = arguments.settings
    status = daemon_request(settings, "GET", "/status?leases=1")
    pool = require_pool(status["pools"], arguments.POOL)
    lease = require_lease(pool, arguments.ADDRESS) if arguments.ADDRESS else None
    if not arguments.force:
        require_unused(status, pool, lease)

    leases = plural(len(pool["addresses"]), "lease")
    label = f"pool {pool['subnet']} with {leases}"
    if lease:
        label = f"address {lease['address']} of {pool['subnet']}"
    if not arguments.yes and not confirm(f"release {label}? [y/N] "):
        return 1

    def post(path: str, body: Json) -> Any:
        return daemon_request(settings, "POST", path, body)

    request_release(holding_of_json(pool, lease), post)
    print(f"released {label}")
    return 0


def require_pool(pools: list[Json], name: str) -> Json:
    """Return the only pool that find_pools() finds by this name. Raises: InvalidRequest."""
    matches = find_pools(pools, name)
    if not matches:
        raise InvalidRequest(f"no pool matches {name!r}: `gipam status` lists them")
    if len(matches) > 1:
        ids = [pool["id"] for pool in matches]
        shown = "".join(f"\n  {pool_id}" for pool_id in ids[:9])
        if len(ids) > 9:
            shown += f"\n  and {len(ids) - 9} more"
        raise InvalidRequest(f"{len(ids)} pools match {name!r}: give the id of one{shown}")
    return matches[0]


def require_lease(pool: Json, text: str) -> Json:
    """Return the lease of an address in a pool. Raises: InvalidRequest."""
    leases: dict[str, Json] = {lease["address"]: lease for lease in pool["addresses"]}
    try:
        address = normalise_address(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not an IP address") from None
    if address not in leases:
        addresses = ", ".join(list(leases)[:9]) or "no address"
        raise InvalidRequest(f"{text!r} is not held in {pool['subnet']}, which holds {addresses}")
    return leases[address]


def require_unused(status: Json, pool: Json, lease: Json | None) -> None:
    """Check that Docker does not use a pool or a lease. Raises: Forbidden, Unreachable."""
    docker = read_docker_allocations(docker_socket_path(), status["driver"], DOCKER_TIMEOUT_S)
    holdings = list(holdings_of_json(status))
    leaks = {finding.holding for finding in find_leaks(holdings, docker.ours)}
    if leaks & {holding_of_json(pool, lease), holding_of_json(pool)}:
        return

    key = (pool["subnet"], lease["address"] if lease else "")
    user = "a Docker network"
    for allocation in docker.ours:
        if (allocation.subnet, allocation.address) == key:
            user = f"Docker {allocation}"
            break
    raise Forbidden(f"{user} is using it: remove it first, or use --force")


def confirm(question: str) -> bool:
    """Ask a yes-or-no question at the terminal. Raises: InvalidRequest without a terminal."""
    if not sys.stdin.isatty():
        raise InvalidRequest("not a terminal: use --yes to skip the confirmation")
    with contextlib.suppress(EOFError):
        return input(question).strip().lower() in ("y", "yes")
    print()
    return False


def cmd_evict(arguments: argparse.Namespace) -> int:
    """Drop the claims of a host that is gone for good.

    On a host that has been renamed, its former name: those claims become this host's.
    """
    host = arguments.HOST
    status = daemon_request(arguments.settings, "GET", "/status")
    subnets = []
    for claim in status["claims"]:
        if host in claim["hosts"]:
            subnets.append(claim["subnet"])
    claims = plural(len(subnets), "claim")
    label = f"{claims} of {host}"
    members = {member["host"]: member for member in status.get("hosts", ())}
    is_former_name = host in members and members[host]["is_own"]

    # The daemon refuses an unknown host, so there is nothing to confirm.
    if host in members and not arguments.yes:
        verb = "take over" if is_former_name else "drop"
        names = textwrap.shorten(" ".join(subnets), 200, placeholder=" ...")
        names = f": {names}" if names else ""
        if not confirm(f"{verb} {label}{names}? [y/N] "):
            return 1
    daemon_request(arguments.settings, "POST", "/Gipam.Evict", {"Host": host})
    verb = "took over" if is_former_name else "dropped"
    print(f"{verb} {label}")
    return 0


def cmd_config(arguments: argparse.Namespace) -> int:
    """Print each effective setting of the daemon and its origin."""
    status = daemon_request(arguments.settings, "GET", "/status")
    for name, setting in status["config"].items():
        value = setting["value"] or "none"
        print(f"{name:8} {value:34} {setting['origin']}")
    return 0


class Command(NamedTuple):
    """A command: its function, and the help of each of its own arguments."""

    function: Callable[[argparse.Namespace], int]
    arguments: dict[str, str]


COMMANDS = {
    "serve": Command(cmd_serve, {}),
    "status": Command(cmd_status, {
        "--json": "print JSON, the stable form",
        "--leases": "show every lease",
        "WHAT": "a subnet, network, address, container or MAC address"}),
    "check": Command(cmd_check, {
        "--json": "print JSON",
        "--fix": "repair what differs",
        "--force": "with --fix, even if Docker knows none of the pools",
        "--grace": "ignore entries younger than this (default: 60)"}),
    "release": Command(cmd_release, {
        "POOL": "id, subnet, network or gipam.name",
        "ADDRESS": "release only this address",
        "--yes": "do not ask for confirmation",
        "--force": "even if Docker is using it"}),
    "evict": Command(cmd_evict, {
        "HOST": "as `gipam status` shows it",
        "--yes": "do not ask for confirmation"}),
    "config": Command(cmd_config, {}),
}
META_COMMANDS = {
    "help": "Show this help, or that of a command.",
    "version": "Show the version.",
}
EXAMPLES = """
  gipam -unix -v6 2001:db8:0:100::/56 -v4 10.2.0.0/16
  gipam -unix -v4 10.2.0.0/16,10.9.0.0/20 -v4ab 26 -exclude 10.2.0.0/24
  gipam status --leases
  gipam status web1                    the leases of a container or address
  gipam check                          where Docker and gipam disagree
  gipam check --fix
  gipam release 10.2.0.0/24
  gipam release 10.2.0.0/24 10.2.0.2 --yes
  gipam evict web-2
  gipam evict web-2 --yes
  gipam config
  gipam config -socket /run/web.sock   the instance on that socket
"""


def parse_grace(text: str) -> int:
    """Return a number of seconds. Raises: ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return int(text)


ARGUMENT_SPECS: dict[str, Json] = {  # of arguments that take a value
    "--grace": {"type": parse_grace, "default": 60, "metavar": "SECONDS"},
    "POOL": {},
    "HOST": {},
    "ADDRESS": {"nargs": "?", "default": ""},
    "WHAT": {"nargs": "?", "default": ""},
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises errors, and shows settings with one dash, as README does.

    argparse itself gets them with two dashes, because it accepts abbreviations of one-dash options.
    """

    color: bool  # of Python 3.14
    SETTING = "--((?:" + "|".join(option.name for option in OPTIONS) + r")\b)"

    def format_help(self) -> str:
        """Return the help."""
        text = super().format_help()
        # The space at the end keeps the column of help texts aligned.
        return re.sub(rf"(?m)^  {self.SETTING}( \S+)", r"  -\1\2 ", text)

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        message = re.sub(self.SETTING, r"-\1", message).replace("argument ", "")
        message = message.replace(": expected one argument", " needs a value")
        raise UsageError(f"{message}; see `{self.prog} --help`")


def build_parser(name: str) -> Parser:
    """Return the parser of a command. All take all settings; the help of serve shows them."""
    command = COMMANDS[name]
    is_serve = name == "serve"
    examples = re.findall(f".* gipam {'-' if is_serve else name}.*", EXAMPLES)
    settings_note = ("The settings of `gipam --help` are accepted too: -socket or -address says "
                     "which gipam to ask.")
    notes = [settings_note]
    if is_serve:
        notes = ["commands:", *describe_commands()]
    description = (command.function.__doc__ or "").replace("\n    ", "\n").strip()

    parser = Parser(
        prog="gipam" if is_serve else f"gipam {name}",
        add_help=False,
        allow_abbrev=False,
        usage="gipam [COMMAND] [OPTIONS]" if is_serve else None,
        description="\n".join(wrap_help(description.splitlines())),
        epilog="\n".join([*wrap_help(notes), "", "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.color = False
    # argparse's own group has another title before Python 3.10.
    group = parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("-v", "--version", action="version", version=__version__,
                       help="show the version and exit")
    for option in OPTIONS:
        default = option.default or "none"
        text = f"{option.help} ({option.variable}; default: {default})"
        group.add_argument("--" + option.name, metavar=option.value_type,
                           help=text if is_serve else argparse.SUPPRESS)
    for argument, text in command.arguments.items():
        spec = ARGUMENT_SPECS.get(argument, {"action": "store_true"})
        group.add_argument(argument, help=text, **spec)
    return parser


def wrap_help(lines: Iterable[str]) -> list[str]:
    """Wrap the lines of a help at argparse's width; indent a table's row to its last column."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    wrapped = []
    for line in lines:
        indent = "           " if line.startswith(" ") else ""
        wrapped += textwrap.wrap(line, width, subsequent_indent=indent) or [""]
    return wrapped


def describe_commands() -> Iterator[str]:
    """Yield a line for each command."""
    summaries = {name: command.function.__doc__ or "" for name, command in COMMANDS.items()}
    for name, text in {**summaries, **META_COMMANDS}.items():
        yield f"  {name:8} {text.splitlines()[0]}"


def normalise_arguments(arguments: list[str]) -> list[str]:
    """Replace the one dash of Go's options by two, and join each setting with its value.

    A boolean setting takes the next word only if that is a boolean, and needs no value.
    """
    is_boolean = {"--" + option.name: option.value_type == "BOOL" for option in OPTIONS}
    remaining = collections.deque(arguments)
    words = []
    while remaining:
        word = re.sub(r"^-(?=[a-zA-Z]\w)", "--", remaining.popleft())
        following = remaining[0] if remaining else "-"
        if is_boolean.get(word):
            value = remaining.popleft() if following in BOOLEANS else "true"
            word = f"{word}={value}"
        elif word in is_boolean and not following.startswith("-"):
            word = f"{word}={remaining.popleft()}"
        words.append(word)
    return words


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed arguments, with the command's function as func. Raises: UsageError.

    At a terminal, with no arguments and nothing configured here, print the help and exit with 2.
    """
    if not arguments and sys.stdin.isatty() and not is_configured():
        build_parser("serve").print_help()
        sys.exit(2)

    words = normalise_arguments(arguments)
    names = [word for word in words if not word.startswith("-")]
    meta_commands = []
    while names and names[0] in META_COMMANDS:
        words.remove(names[0])
        meta_commands.append("--" + names.pop(0))
    words += meta_commands
    surplus = names if "--version" in meta_commands else names[1:]
    if meta_commands and surplus:
        raise UsageError(f"unexpected argument {surplus[0]!r}; see `gipam --help`")
    name = "serve"
    if names and (names[0] in COMMANDS or "--help" in words):
        name = names[0]
        if name not in COMMANDS:
            raise UsageError(describe_unknown(name, arguments, list(COMMANDS), "gipam"))
        words.remove(name)

    parser = build_parser(name)
    namespace = argparse.Namespace(func=COMMANDS[name].function)
    parsed, unknown = parser.parse_known_args(words, namespace)
    if unknown:
        known = ["-" + option.name for option in OPTIONS]
        known += COMMANDS[name].arguments
        if name not in names:
            known += COMMANDS
        raise UsageError(describe_unknown(unknown[0], arguments, known, parser.prog))
    return parsed


def is_configured() -> bool:
    """Return whether this directory has a lease file, or a GIPAM_ variable is set."""
    if os.path.lexists("leases.json"):
        return True
    return any(name.startswith("GIPAM_") for name in os.environ)


def describe_unknown(word: str, arguments: list[str], known: list[str], prog: str) -> str:
    """Return why a word is refused, as it was typed, with the most similar known word."""
    previous = ""
    name = word.partition("=")[0].lstrip("-")
    for argument in arguments:
        typed = argument.partition("=")[0]
        if typed.lstrip("-") == name:
            word = typed
            break
        previous = argument.lstrip("-")

    for option in OPTIONS:
        if option.name == previous and option.value_type == "BOOL":
            return f"-{previous} takes true or false (or 1, 0, t, f), or no value: not {word!r}"
    hint = suggest(word, known) or f"; see `{prog} --help`"
    if word.startswith("-") or "serve" in known:
        return f"{word!r} is not an option or command{hint}"
    return f"unexpected argument {word!r}{hint}"


def open_missing_streams() -> None:
    """Open /dev/null in place of standard streams that the caller has closed."""
    sys.stdin = sys.stdin or open(os.devnull, "r+")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "r+")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "r+")  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    handler = LogHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    open_missing_streams()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        arguments.settings = read_settings(os.environ, arguments)
        arguments.log_handler = handler
        exit_status = int(arguments.func(arguments))
        sys.stdout.flush()
        return exit_status
    except GipamError as error:
        handler.write_error(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        # At a question, or while Docker is asked.
        handler.write_line("")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # As in `gipam status | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        text = format_os_error(error)
        if isinstance(error, PermissionError):
            text += "; run gipam as root, or give it -file, -socket and -spec where it may write"
        handler.write_error(text)
        # Another start may succeed.
        return os.EX_IOERR if error.errno in TRANSIENT_ERRNOS else 1
    except Exception:
        log.exception("this is a bug in gipam")
        return 1


if __name__ == "__main__":
    sys.exit(main())
