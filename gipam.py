#!/usr/bin/env python3
"""gipam: a Docker IPAM driver. Every network gets its own prefix, every container an address in it.

A prefix is routed to this host. Docker networks made with `--ipam-driver gipam` get the next block
of it, so that their containers can be reached from outside without NAT. To run it, and to test it:

    sudo python3 gipam.py -unix -v6 2001:db8:0:100::/56 -v4 10.2.0.0/16
    python3 test_gipam.py

The sections, each of which uses only what stands above it (`grep -n '^# ===' gipam.py`):

    Constants   defaults and limits
    Errors      what Docker and the operator are told
    Model       prefixes, changes, pools, leases, the state and its text form; no I/O
    Allocator   pure decisions: (state, request) -> change or error
    Store       the lease file and its journal: bytes and descriptors
    Service     the one lock: decide, apply, queue, flush, answer
    Protocol    method name -> function; bytes in, bytes out
    Transport   HTTP on a UNIX socket or on TCP, signals, systemd
    Docker      what Docker uses, for check and for a lost lease file
    Commands    options, configuration in three stages, main

On disk. The lease file is a JSON document for people: the configuration (of it and the options wins
what was changed last), each pool under Allocated with its addresses, and a checksum over the state.
It is a snapshot; what happened since stands beside it in a journal segment (leases.json.journal.1).
There, one flush is one line: length and CRC-32 of the JSON that follows, and in it the sequence
number of the last change, and the changes. A real one:

    00000076 93771baa [4,[["request_address","10.2.0.0/24#1f0c27ab5e94d386","10.2.0.2","endpoint",
    "02:42:0a:02:00:02","web1",1795510069,3]]]

(in the file it is one line). Recovery reads the snapshot, then the segments in order, and skips
what the snapshot already holds. A last line that is short or zero-filled was never acknowledged
and is dropped; whatever else does not add up stops gipam, with a message that says what to do.

What survives. A reply that Docker has read is on disk: it survives SIGKILL and, where the disk
keeps what fdatasync promised, a power cut. A full disk costs an error, never a lease. What does
not survive is what Docker and gipam never told each other: a reply lost in a crash of dockerd, a
release sent while gipam was down. Such an address or pool stays held until somebody releases it.
"""

from __future__ import annotations

import argparse
import array
import bisect
import contextlib
import difflib
import faulthandler
import fcntl
import functools
import gc
import http
import http.client
import http.server
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Union

__version__ = "1.0.0"

# === Constants ====================================================================================

ADDRESS_SPACE = "gipam"  # local and global: Docker >= 27 then leaves the check of routes to us
PLUGIN_SOCKET_DIR = "/run/docker/plugins"  # moby pkg/plugins/discovery_unix.go: hard-coded
REPLY_TYPE = "application/vnd.docker.plugins.v1.2+json"
MAX_BODY_BYTES = 1 << 20
MAX_LINE_BYTES = 65536  # of a request line or a header, as http.server has it
MAX_TEXT_CHARS = 255  # of a name or MAC address that is kept, of what a log line quotes
BACKLOG = 1024  # with socketserver's 5, parallel connects of dockerd fail with EAGAIN
MAX_REMEMBERED = 1024  # owners a subnet, names a family; past it the older half is forgotten
MAX_KEPT = 256  # owners that are remembered of a subnet that is gone
MIN_FOLD_BYTES = 1 << 20  # a journal is folded once it is longer than this and than the snapshot
FOLD_PATIENCE_S = 10.0  # after a fold that failed
ENCODE_LEASES = 250  # of a snapshot at a time; measured: 0.4 ms
WRITE_BYTES = 16384  # of a snapshot at a time; each write is a chance for other threads
LOCK_PATIENCE_S = 2.0  # a predecessor may still be folding
DRAIN_PATIENCE_S = 30.0
REQUEST_PATIENCE_S = 10.0  # on TCP, from the first byte of a request to its last
MAX_TCP_CONNECTIONS = 256  # past it the longest idle one goes: a local client cannot starve Docker
START_PATIENCE_S = 300  # asked of the service manager, for a large state
RETIRE_PATIENCE_S = 0.1  # for a peer that finds its connection closed to dial again
DIAL_PATIENCE_S = 2.0  # at the end, for a peer that has dialled to send its request
CHECK_PAUSE_S = 1.0  # between the two looks of a check
IMPORT_PAUSE_S = 1.0
DAEMON_PATIENCE_S = 60.0  # of commands, for the daemon
NAMES_PATIENCE_S = 2.0  # of status, for Docker
IMPORT_PATIENCE_S = 2.0  # at a start with Docker alive
BITS = {4: 32, 6: 128}
CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
SOCKET_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
GATEWAY, AUXILIARY, ENDPOINT = "gateway", "auxiliary", "endpoint"  # kinds of lease

log = logging.getLogger("gipam")

# === Errors =======================================================================================


class GipamError(Exception):
    """Any refusal. Its text goes to Docker or the operator, its class tells how it is reported."""

    http_status = 500
    exit_status = 1


class InvalidRequest(GipamError):
    """The request breaks a rule, whatever the state is (moby: InvalidParameter)."""

    def __init__(self, text: str, http_status: int = 400) -> None:
        super().__init__(text)
        self.http_status = http_status


class Forbidden(GipamError):
    """What is asked for is held already, or reserved (moby: Forbidden)."""

    http_status = 403


class Unavailable(GipamError):
    """Nothing is left to hand out (moby: Unavailable)."""

    http_status = 503


class StoreError(GipamError):
    """The change could not be written; state and disk are as before it."""

    http_status = 503


class StoreLost(StoreError):
    """Nobody knows what the disk holds: exit, and start again from there."""

    exit_status = 74  # EX_IOERR


class ConfigError(GipamError):
    """An option, a variable or a key of the lease file is invalid, or a file cannot be used."""

    exit_status = 78  # EX_CONFIG: starting again does not help


class DamageError(ConfigError):
    """What is on disk is not what gipam wrote: it never starts on a guess."""


class Unreachable(GipamError):
    """Docker, or the daemon, does not answer: nothing can be compared."""

    exit_status = 2


class Absent(Unreachable):
    """No daemon answers where it should."""


class Refused(GipamError):
    """Docker, or the daemon, answered with an error."""

    exit_status = 2


class BusyError(GipamError):
    """Another daemon holds the lease file or the socket."""

    exit_status = 75  # EX_TEMPFAIL


# === Model ========================================================================================

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Json = Dict[str, Any]  # an object
Undo = Callable[[], Any]


def parse_prefix(text: str, mask: bool = False) -> Network:
    """Return the prefix of CIDR text; with mask, host bits are cleared, not refused.

    Raises: ValueError with the rule (ip_network alone takes netmasks and bare addresses too).
    """
    address, _, length = text.partition("/")
    if "%" in address or not (length.isascii() and length.isdigit()):
        raise ValueError(f"{text!r} is not a prefix in CIDR form, such as 10.2.0.0/16 or "
                         "2001:db8::/56")
    network = ipaddress.ip_network(text, strict=False)
    if not mask and network[0] != ipaddress.ip_address(address):
        raise ValueError(f"{text!r} has host bits set: the prefix is {network}")
    return network


def parse_address(text: str, version: int) -> int:
    """Return a bare address of the family as a number. Raises: ValueError."""
    try:
        return int.from_bytes(socket.inet_pton(SOCKET_FAMILY[version], text), "big")
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is not a bare IPv{version} address") from None


def format_address(number: int, version: int) -> str:
    """Return the bare address as text (RFC 5952)."""
    return socket.inet_ntop(SOCKET_FAMILY[version], number.to_bytes(BITS[version] // 8, "big"))


def format_place(place: Any) -> str:
    """Return where somebody listens: the path of a socket, or HOST:PORT."""
    if not isinstance(place, tuple):
        return os.fsdecode(place)
    host, port = place[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_pool_id(subnet: Network, sub_pool: Network | None, token: str) -> str:
    """Return SUBNET[,SUB_POOL]#TOKEN: enough to make the pool again, and never given twice."""
    return f"{subnet},{sub_pool}#{token}" if sub_pool else f"{subnet}#{token}"


def parse_pool_id(pool_id: str) -> tuple[Network, Network | None] | None:
    """Return (subnet, sub_pool) of an id that gipam made, None for any other text."""
    match = re.fullmatch(r"([0-9a-f.:/]+)(?:,([0-9a-f.:/]+))?#([0-9a-f]{16})", pool_id)
    with contextlib.suppress(ValueError):
        if match:
            subnet, sub_pool = parse_prefix(match[1]), parse_prefix(match[2]) if match[2] else None
            if make_pool_id(subnet, sub_pool, match[3]) == pool_id:
                return subnet, sub_pool
    return None


ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps() would make one each time: 2 us


def dumps(value: Any) -> str:
    """Return JSON in the one form that is checksummed."""
    return ENCODER.encode(value)


class RequestPool(NamedTuple):
    """Change: a pool is granted: as asked for, from a base, or by adoption of its id."""

    pool_id: str
    subnet: str  # CIDR
    sub_pool: str  # CIDR or ""
    name: str  # gipam.name or ""
    granted_s: int  # UNIX time
    cursor: int  # offset in the subnet of the address to try next
    next_block: int  # number of the block of this length to try next, -1: as it was


class ReleasePool(NamedTuple):
    """Change: a pool goes, with whatever leases it still has."""

    pool_id: str


class RequestAddress(NamedTuple):
    """Change: an address is granted."""

    pool_id: str
    address: str  # bare
    kind: str
    mac: str
    name: str  # of the container, where Docker sends it (29 and later)
    granted_s: int
    cursor: int


class ReleaseAddress(NamedTuple):
    """Change: an address is free again, and who had it is remembered."""

    pool_id: str
    address: str


class BindPool(NamedTuple):
    """Change: a pool that was taken over from Docker's API, which has no ids, gets its id."""

    pool_id: str
    new_id: str


Change = Union[RequestPool, ReleasePool, BindPool, RequestAddress, ReleaseAddress]
CHANGES: dict[str, Any] = {
    "request_pool": RequestPool, "release_pool": ReleasePool, "bind_pool": BindPool,
    "request_address": RequestAddress, "release_address": ReleaseAddress,
}
CHANGE_NAMES = {kind: name for name, kind in CHANGES.items()}


class Lease(NamedTuple):
    """An address that is held. There may be a million of these."""

    kind: str
    mac: str
    name: str
    granted_s: int
    seq: int  # of the change that granted it

    @property
    def owner(self) -> str:
        """Return who shall have the address again: the container's name, else its MAC address."""
        return self.name or self.mac


class AddressSet:
    """A set of numbers that finds the next absent one: bitmaps of 64 Ki numbers each.

    So a /16 is one bitmap, a full /8 takes 256 steps, and a /64 costs only what is held in it.
    """

    SHIFT = 16
    MASK = (1 << SHIFT) - 1

    def __init__(self) -> None:
        self._bitmaps: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        return bool(self._bitmaps.get(number >> self.SHIFT, 0) >> (number & self.MASK) & 1)

    def add(self, number: int) -> None:
        """Put the number in."""
        index = number >> self.SHIFT
        self._bitmaps[index] = self._bitmaps.get(index, 0) | 1 << (number & self.MASK)

    def discard(self, number: int) -> None:
        """Take the number out."""
        index = number >> self.SHIFT
        bitmap = self._bitmaps.pop(index, 0) & ~(1 << (number & self.MASK))
        if bitmap:
            self._bitmaps[index] = bitmap

    def next_absent(self, number: int) -> int:
        """Return the least number, from this one on, that is not in the set."""
        while True:
            rest = self._bitmaps.get(number >> self.SHIFT, 0) >> (number & self.MASK)
            number += (~rest & rest + 1).bit_length() - 1  # past the ones at its low end
            if not rest & 1 or number & self.MASK:
                return number


def put(mapping: dict[Any, Any], key: Any, value: Any, steps: list[Undo]) -> None:
    """Set the key, or delete it where the value is None; append what takes that back."""
    steps.append(functools.partial(put, mapping, key, mapping.get(key), []))
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value


class PrefixTree:
    """A multiset of prefixes ("covers") of one family, and what they leave free.

    A node is a prefix, numbered as in a heap: 1 is all addresses, 2n and 2n+1 are the halves of n.
    Nodes that no cover touches are not stored; of the others the tree keeps the length of the
    largest free block inside, and how many addresses are free. So each answer takes a walk of at
    most 32 or 128 steps, however many prefixes are held and however they nest.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._covers: dict[int, int] = {}  # node -> times covered
        self._free: dict[int, tuple[int, int]] = {}  # node -> (shortest free prefixlen, addresses)

    def node(self, network: Network) -> int:
        """Return the number of a prefix."""
        return 1 << network.prefixlen | int(network[0]) >> self.bits - network.prefixlen

    def network(self, node: int) -> Network:
        """Return the prefix of a number."""
        prefixlen = node.bit_length() - 1
        first = (node ^ 1 << prefixlen) << self.bits - prefixlen
        return ipaddress.ip_network((first.to_bytes(self.bits // 8, "big"), prefixlen))

    def free(self, node: int) -> tuple[int, int]:
        """Return (prefixlen of the largest free block, count of free addresses) inside a node."""
        length = node.bit_length() - 1
        return self._free.get(node) or (length, 1 << max(self.bits - length, 0))

    def addresses(self, network: Network) -> int:
        """Return how many addresses of the prefix are free."""
        node = self.node(network)
        is_covered = any(node >> up in self._covers for up in range(network.prefixlen + 1))
        return 0 if is_covered else self.free(node)[1]

    def cover(self, network: Network, times: int = 1) -> None:
        """Add the prefix, or with times=-1 take it away once; bring its ancestors up to date."""
        node, length = self.node(network), network.prefixlen
        put(self._covers, node, self._covers.get(node, 0) + times or None, [])
        while node:
            half = (length + 1, 1 << max(self.bits - length - 1, 0))  # as free() has a free half
            left, right = self._free.get(2 * node, half), self._free.get(2 * node + 1, half)
            if node in self._covers:
                self._free[node] = (self.bits + 1, 0)
            elif left == right == half:
                self._free.pop(node, None)
            else:
                self._free[node] = (min(left[0], right[0]), left[1] + right[1])
            node, length = node >> 1, length - 1

    def find_overlap(self, network: Network) -> Network | None:
        """Return a cover that contains the prefix, else one inside it, else None."""
        node = self.node(network)
        for up in range(network.prefixlen + 1):
            if node >> up in self._covers:
                return self.network(node >> up)
        if node not in self._free:
            return None
        while node not in self._covers:
            node = 2 * node if 2 * node in self._free else 2 * node + 1
        return self.network(node)

    def find_free(self, prefixlen: int, low: int, node: int = 1) -> int | None:
        """Return the least free node of this length, from node low on, inside a node."""
        shift = prefixlen - node.bit_length() + 1
        if self.free(node)[0] > prefixlen or node + 1 << shift <= low:
            return None
        if node not in self._free:
            return max(node << shift, low)
        left = self.find_free(prefixlen, low, 2 * node)
        return self.find_free(prefixlen, low, 2 * node + 1) if left is None else left


class Obstacles:
    """Ranges that no block may touch, merged and sorted: routes and addresses of the host."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted((int(network[0]), int(network[-1])) for network in networks):
            if self._lasts and first <= self._lasts[-1] + 1:
                self._lasts[-1] = max(self._lasts[-1], last)
            else:
                self._firsts.append(first)
                self._lasts.append(last)

    def find_overlap(self, network: Network) -> int | None:
        """Return the last address of the first range that overlaps, None if there is none."""
        at = bisect.bisect_left(self._lasts, int(network[0]))
        is_hit = at < len(self._lasts) and self._firsts[at] <= int(network[-1])
        return self._lasts[at] if is_hit else None


class Memory(Dict[str, Any]):
    """Who had what last: key -> (value, seq). At its limit it forgets the older half."""

    def remember(self, key: str, value: Any, seq: int, steps: list[Undo]) -> list[Any]:
        """Remember the value; return those that are forgotten for it."""
        forgotten = [self[key][0]] if key in self else []
        put(self, key, (value, seq), steps)
        if len(self) > MAX_REMEMBERED:
            for old in sorted(self, key=lambda name: self[name][1])[:MAX_REMEMBERED // 2]:
                forgotten.append(self[old][0])
                put(self, old, None, steps)
        return forgotten


class Subnet:
    """A prefix in use, and what all pools in it share: an address is held only once."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.version: int = network.version
        self.first = int(network[0])
        self.last_offset = network.num_addresses - 1
        self.held = AddressSet()  # offsets from first; the reserved ones are always held
        self.memory = Memory()  # owner -> offset
        self.pools: dict[Network | None, Pool] = {}  # by sub_pool
        for offset in self.reserved:
            self.held.add(offset)

    @property
    def reserved(self) -> set[int]:
        """Return the offsets that are never handed out. Source: protocol.md 5.3."""
        if self.version == 6:
            return {0}  # the subnet-router anycast address
        return {0, self.last_offset} if self.last_offset >= 3 else set()

    def release(self, offset: int) -> None:
        """Free the offset, unless it is reserved (the Go program gave broadcast addresses out)."""
        if offset not in self.reserved:
            self.held.discard(offset)


class Pool:
    """What one Docker network got: a subnet or a range of it, and the leases made there."""

    def __init__(self, change: RequestPool, subnet: Subnet, seq: int) -> None:
        self.pool_id, self.subnet, self.seq = change.pool_id, subnet, seq
        self.sub_pool = parse_prefix(change.sub_pool) if change.sub_pool else None
        self.name, self.granted_s, self.cursor = change.name, change.granted_s, change.cursor
        self.leases: dict[int, Lease] = {}  # by offset in the subnet
        dynamic = self.sub_pool or subnet.network
        self.low, self.high = int(dynamic[0]) - subnet.first, int(dynamic[-1]) - subnet.first

    def format(self, offset: int) -> str:
        """Return the bare address at the offset."""
        return format_address(self.subnet.first + offset, self.subnet.version)

    def offset(self, address: str) -> int:
        """Return the offset of a bare address, which may lie outside. Raises: ValueError."""
        return parse_address(address, self.subnet.version) - self.subnet.first

    def usable(self) -> int:
        """Return how many addresses of its range can be handed out."""
        reserved = sum(self.low <= offset <= self.high for offset in self.subnet.reserved)
        return self.high - self.low + 1 - reserved


class Kept(NamedTuple):
    """What is remembered of a gipam.name: its block, and who had what there while it is gone."""

    network: Network
    owners: dict[str, tuple[int, int]]  # -> (offset, seq)


class Family:
    """IPv4 or IPv6: the bases, what is free in them, cursors, names, and the subnets in use."""

    def __init__(self, version: int, bases: list[Network], prefixlen: int,
                 excluded: list[Network]) -> None:
        self.version, self.bases, self.excluded = version, bases, excluded
        self.prefixlen = prefixlen  # of a block, where the network does not ask for another
        self.held = PrefixTree(BITS[version])  # subnets in use
        self.usable = PrefixTree(BITS[version])  # all but exclusions
        self.free = PrefixTree(BITS[version])  # nor subnets in use
        self.fresh = PrefixTree(BITS[version])  # nor blocks kept for names
        for network in excluded:
            for tree in (self.usable, self.free, self.fresh):
                tree.cover(network)
        self.subnets: dict[Network, Subnet] = {}
        self.cursors: dict[int, int] = {}  # prefixlen -> number of the block to try next
        self.names = Memory()  # gipam.name -> Kept

    def blocks(self, prefixlen: int) -> int:
        """Return how many blocks of this length the bases have, free or not."""
        return sum(1 << prefixlen - base.prefixlen for base in self.bases
                   if base.prefixlen <= prefixlen)

    def candidates(self, tree: PrefixTree, prefixlen: int,
                   obstacles: Obstacles) -> Iterator[tuple[int, Network]]:
        """Yield (number, block) for the free blocks, from the cursor on, once round the bases."""
        cursor = self.cursors.get(prefixlen, 0) % max(self.blocks(prefixlen), 1)
        number, ahead, behind = 0, [], []
        for base in self.bases:
            if base.prefixlen <= prefixlen:
                count = 1 << prefixlen - base.prefixlen
                low = tree.node(base) << prefixlen - base.prefixlen
                middle = low + min(max(cursor - number, 0), count)
                ahead.append((number - low, middle, low + count))
                behind.append((number - low, low, middle))
                number += count
        for shift, start, end in ahead + behind:
            node = start
            while node < end:
                found = tree.find_free(prefixlen, node)
                if found is None or found >= end:
                    break
                block = tree.network(found)
                obstacle = obstacles.find_overlap(block)
                if obstacle is None:
                    yield found + shift, block
                    obstacle = int(block[-1])
                node = (1 << prefixlen | obstacle >> tree.bits - prefixlen) + 1

    def find_overlap(self, network: Network) -> Subnet | None:
        """Return a subnet in use that overlaps the prefix."""
        overlap = self.held.find_overlap(network)
        return self.subnets[overlap] if overlap else None

    def is_block(self, network: Network) -> bool:
        """Return whether the prefix lies in a base and is free."""
        return self.free.find_overlap(network) is None and any(
            base.prefixlen <= network.prefixlen and base.overlaps(network) for base in self.bases)

    def count_touched(self, networks: Iterable[Network]) -> int:
        """Return how many free blocks of the usual length the prefixes touch."""
        touched: Any = (network if network.prefixlen < self.prefixlen
                        else network.supernet(new_prefix=self.prefixlen) for network in networks)
        free = sum(map(self.free.addresses, ipaddress.collapse_addresses(touched)))
        return -(-free >> BITS[self.version] - self.prefixlen)

    def hold(self, subnet: Subnet, times: int, steps: list[Undo]) -> None:
        """Count the subnet as in use, or with times=-1 as free again."""
        put(self.subnets, subnet.network, subnet if times > 0 else None, steps)
        for tree in (self.held, self.free, self.fresh):
            self._cover(tree, subnet.network, times, steps)

    def remember(self, name: str, kept: Kept, seq: int, steps: list[Undo]) -> None:
        """Keep the block for the name: others get it only when nothing else is left."""
        self._cover(self.fresh, kept.network, 1, steps)
        for forgotten in self.names.remember(name, kept, seq, steps):
            self._cover(self.fresh, forgotten.network, -1, steps)

    def recall(self, name: str) -> Kept | None:
        """Return what is remembered of the name."""
        return self.names[name][0] if name in self.names else None

    def is_live(self, name: str) -> bool:
        """Return whether the block of the name is in use under it."""
        kept = self.recall(name)
        subnet = self.subnets.get(kept.network) if kept else None
        return subnet is not None and any(pool.name == name for pool in subnet.pools.values())

    @staticmethod
    def _cover(tree: PrefixTree, network: Network, times: int, steps: list[Undo]) -> None:
        tree.cover(network, times)
        steps.append(lambda: tree.cover(network, -times))


class State:
    """All that gipam knows. Only apply() changes it, in service and in recovery alike."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.seq = 0
        self.pools: dict[str, Pool] = {}
        self.families = {family.version: family for family in families}

    def apply(self, change: Change) -> Undo:
        """Apply the change under the next sequence number; return what takes it back.

        That is for changes that could not be written, newest first. Raises: ValueError if the
        change contradicts the state, which then is as before.
        """
        steps: list[Undo] = [functools.partial(setattr, self, "seq", self.seq)]
        getattr(self, "_" + CHANGE_NAMES[type(change)])(change, steps)
        self.seq += 1

        def undo() -> None:
            for step in reversed(steps):
                step()

        return undo

    def _request_pool(self, change: RequestPool, steps: list[Undo]) -> None:
        network = parse_prefix(change.subnet)
        family = self.families[network.version]
        subnet = family.find_overlap(network) or Subnet(network)
        pool = Pool(change, subnet, self.seq + 1)
        is_whole = None in subnet.pools or not pool.sub_pool
        if subnet.network != network or (subnet.pools and is_whole):
            raise ValueError(f"pool {network} overlaps {subnet.network}")
        if pool.pool_id in self.pools or pool.sub_pool in subnet.pools:
            raise ValueError(f"pool {pool.pool_id!r} is held twice")
        if not 0 <= pool.low <= pool.high <= subnet.last_offset:
            raise ValueError(f"sub_pool {pool.sub_pool} is outside {network}")
        is_second = family.is_live(pool.name)  # its name stays with the first
        if not subnet.pools:
            family.hold(subnet, 1, steps)
        put(subnet.pools, pool.sub_pool, pool, steps)
        put(self.pools, pool.pool_id, pool, steps)
        if change.next_block >= 0:
            put(family.cursors, network.prefixlen, change.next_block, steps)
        if pool.name and not is_second:
            kept = family.recall(pool.name)
            if kept and kept.network == network:
                for owner, (offset, seq) in kept.owners.items():
                    put(subnet.memory, owner, (offset, seq), steps)
                    pool.cursor = max(pool.cursor, offset + 1)  # who is new comes after them
            family.remember(pool.name, Kept(network, {}), pool.seq, steps)

    def _release_pool(self, change: ReleasePool, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        put(self.pools, pool.pool_id, None, steps)
        put(pool.subnet.pools, pool.sub_pool, None, steps)
        if not pool.subnet.pools:
            family, network = self.families[pool.subnet.version], pool.subnet.network
            family.hold(pool.subnet, -1, steps)
            kept = family.recall(pool.name)
            if kept and kept.network == network:
                latest = sorted(pool.subnet.memory.items(), key=lambda item: int(item[1][1]))
                family.remember(pool.name, Kept(network, dict(latest[-MAX_KEPT:])), self.seq + 1,
                                steps)
            return
        for offset in pool.leases:
            pool.subnet.release(offset)
            steps.append(functools.partial(pool.subnet.held.add, offset))

    def _bind_pool(self, change: BindPool, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        if change.new_id in self.pools:
            raise ValueError(f"pool {change.new_id!r} is held twice")
        put(self.pools, change.pool_id, None, steps)
        put(self.pools, change.new_id, pool, steps)
        steps.append(functools.partial(setattr, pool, "pool_id", change.pool_id))
        pool.pool_id = change.new_id

    def _request_address(self, change: RequestAddress, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        offset = pool.offset(change.address)
        if not 0 <= offset <= pool.subnet.last_offset or offset in pool.subnet.held:
            raise ValueError(f"address {change.address} is held already or outside "
                             f"{pool.subnet.network}")
        lease = Lease(change.kind, change.mac, change.name, change.granted_s, self.seq + 1)
        put(pool.leases, offset, lease, steps)
        pool.subnet.held.add(offset)
        steps.append(functools.partial(pool.subnet.held.discard, offset))
        steps.append(functools.partial(setattr, pool, "cursor", pool.cursor))
        pool.cursor = change.cursor

    def _release_address(self, change: ReleaseAddress, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        offset = pool.offset(change.address)
        lease = pool.leases.get(offset)
        if lease is None:
            raise ValueError(f"address {change.address} is not held in {pool.subnet.network}")
        put(pool.leases, offset, None, steps)
        pool.subnet.release(offset)
        steps.append(functools.partial(pool.subnet.held.add, offset))
        if lease.owner:
            pool.subnet.memory.remember(lease.owner, offset, self.seq + 1, steps)

    def _pool(self, pool_id: str) -> Pool:
        if pool_id not in self.pools:
            raise ValueError(f"pool {pool_id!r} is not held")
        return self.pools[pool_id]


UNBOUND = "unbound"  # in place of the token, until Docker sends the id of a pool taken over
STATE_KEYS = ("Seq", "V6Idx", "V4Idx", "Cursors", "Names", "Free", "Allocated")  # are checksummed
POOL_KEYS = ("ID", "V", "Pool", "SubPool", "Name", "Granted", "Seq", "Idx", "Remembered", "Free",
             "Allocated", "Leases")
OTHER_NAMES = {"v6": "V6Pool", "v6ab": "V6AllocateBlock", "v4": "V4Pool", "v4ab": "V4AllocateBlock"}
FILE_KEYS = {**OTHER_NAMES, "exclude": "Exclude"}  # option -> its key in the lease file
FILE_NAMES = (*FILE_KEYS.values(), "Options", *STATE_KEYS, "Journal", "Import", "Checksum")


def copy_state(state: State) -> tuple[Json, list[Any]]:
    """Return (the small keys, what changes of each pool): a shallow copy.

    It is taken under the lock in milliseconds; the rest of a pool, and a lease, never change.
    """
    families = [state.families[version] for version in (6, 4)]
    names = [(name, *entry) for family in families for name, entry in family.names.items()]
    head: Json = {"Seq": state.seq}
    head.update((f"V{family.version}Idx", family.cursors.get(family.prefixlen, 0))
                for family in families)
    head["Cursors"] = {f"{family.version}/{length}": number for family in families
                       for length, number in family.cursors.items() if length != family.prefixlen}
    head["Names"] = [[name, str(kept.network), seq, kept.owners] for name, kept, seq in names]
    head["Free"] = [{"V": kept.network.version, "Pool": str(kept.network)} for _, kept, _ in names
                    if state.families[kept.network.version].is_block(kept.network)]
    pools = []
    for pool in state.pools.values():
        is_first = next(iter(pool.subnet.pools.values())) is pool  # it stands for its subnet
        memory = pool.subnet.memory.copy() if is_first else {}
        free = {offset for offset, _ in memory.values() if offset not in pool.subnet.held}
        pools.append((pool, pool.pool_id, pool.cursor, dict(pool.leases), memory, free))
    return head, pools


def encode_snapshot(config: Json, copy: Any, segment: int | None,
                    is_import_due: bool = False) -> Iterator[str]:
    """Yield the lease file in portions: configuration, segment that goes on, state, checksum."""
    keys = {**config, "Journal": segment, "Import": is_import_due}
    yield "{\n" + "".join(f"{dumps(key)}:{dumps(value)},\n" for key, value in keys.items() if value)
    checksum = 0
    for chunk in encode_state(*copy):
        checksum = zlib.crc32(chunk.encode(), checksum)
        yield chunk + "\n"
    yield f',"Checksum":"{checksum:08x}"}}\n'


def encode_state(head: Json, pools: list[Any]) -> Iterator[str]:
    """Yield the state as the JSON text that is checksummed, cut between elements."""
    yield dumps(head)[1:-1] + ',"Allocated":['
    comma = ""
    for pool, pool_id, cursor, leases, memory, free in pools:
        owners = {owner: [pool.format(offset), seq] for owner, (offset, seq) in memory.items()}
        values = (pool_id, pool.subnet.version, str(pool.subnet.network), str(pool.sub_pool or ""),
                  pool.name, pool.granted_s, pool.seq, cursor, owners,
                  [pool.format(offset) for offset in sorted(free)])
        yield comma + dumps(dict(zip(POOL_KEYS, values)))[:-1] + ',"Allocated":['
        yield from encode_list([pool.format(offset) for offset in leases])
        yield '],"Leases":['
        yield from encode_list(list(leases.values()))
        yield "]}"
        comma = ","
    yield "]"


def encode_list(values: list[Any]) -> Iterator[str]:
    """Yield the inside of a JSON array in portions."""
    for start in range(0, len(values), ENCODE_LEASES):
        yield ("," if start else "") + dumps(values[start:start + ENCODE_LEASES])[1:-1]


def decode_snapshot(document: Json, state: State) -> None:
    """Fill the empty state from a lease file; the Go program's ones have no checksum.

    Raises: ValueError for a wrong checksum or a contradiction; KeyError, TypeError for bad shapes.
    """
    if "Checksum" in document:
        text = dumps({key: document[key] for key in STATE_KEYS})[1:-1]
        if document["Checksum"] != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("its checksum does not match what it holds from Seq on")
    entries = document.get("Allocated") or []
    entries.reverse()
    while entries:
        decode_pool(entries.pop(), state)  # whose memory serves the next
    for version, family in state.families.items():
        if document.get(f"V{version}Idx"):
            family.cursors[family.prefixlen] = int(document[f"V{version}Idx"])
    for key, number in (document.get("Cursors") or {}).items():
        version, _, prefixlen = key.partition("/")
        state.families[int(version)].cursors[int(prefixlen)] = int(number)
    for name, text, seq, *rest in document.get("Names") or []:
        owners = {owner: (offset, of) for owner, (offset, of) in (rest or [{}])[0].items()}
        kept = Kept(parse_prefix(text), owners)
        state.families[kept.network.version].remember(name, kept, seq, [])
    state.seq = int(document.get("Seq") or 0)


def compact_leases(entry: Json) -> Json:
    """Make the leases of a pool what they will be while the JSON is still being read (object_hook).

    Lists that live longer leave holes: measured, 495 bytes a lease instead of 315.
    """
    with contextlib.suppress(LookupError, ValueError, TypeError):  # decode_pool() tells what it is
        entry["Leases"] = [Lease(sys.intern(kind), *rest) for kind, *rest in entry["Leases"]]
    return entry


def decode_pool(entry: Json, state: State) -> None:
    """Add a pool of a lease file, with its leases. Raises: as decode_snapshot()."""
    pool_id, addresses = entry["ID"], entry.get("Allocated") or []
    state.apply(RequestPool(pool_id, entry["Pool"], entry.get("SubPool") or "", "",
                            entry.get("Granted") or 0, int(entry.get("Idx") or 0), -1))
    pool = state.pools[pool_id]
    pool.name, pool.seq = entry.get("Name") or "", int(entry.get("Seq") or 0)
    leases = entry.get("Leases", [(ENDPOINT, "", "", 0, 0)] * len(addresses))
    if len(leases) != len(addresses):
        raise ValueError(f"pool {pool_id!r} has {len(addresses)} addresses, {len(leases)} leases")
    subnet, reserved = pool.subnet, pool.subnet.reserved
    for address, lease in zip(addresses, leases):
        offset = pool.offset(address)
        if not 0 <= offset <= subnet.last_offset:
            raise ValueError(f"address {address} is outside {subnet.network}")
        if offset in pool.leases or (offset in subnet.held and offset not in reserved):
            raise ValueError(f"address {address} of {subnet.network} is held twice")
        subnet.held.add(offset)
        pool.leases[offset] = lease if isinstance(lease, Lease) else Lease(*lease)
    for owner, (address, seq) in (entry.get("Remembered") or {}).items():
        subnet.memory[owner] = (pool.offset(address), seq)


def describe_base(family: Family, base: Network) -> Json:
    """Return what `status --json` shows of a base."""
    size = 1 << BITS[family.version] - family.prefixlen
    usable, free = family.usable.addresses(base), family.free.addresses(base)
    names = {name: str(kept.network) for name, (kept, _) in family.names.copy().items()
             if base.overlaps(kept.network)}
    return {
        "prefix": str(base), "family": family.version, "block_prefixlen": family.prefixlen,
        "blocks": 1 << family.prefixlen - base.prefixlen,
        "blocks_used": -((free - usable) // size),
        "blocks_excluded": -((usable - base.num_addresses) // size),
        "excluded": [str(network) for network in family.excluded if base.overlaps(network)],
        "remembered": names,
    }


def describe_pool(pool: Pool, has_leases: bool) -> Json:
    """Return what `status --json` shows of a pool."""
    leases = pool.leases.copy() if has_leases else {}
    addresses = [{"address": pool.format(at), **lease._asdict()} for at, lease in leases.items()]
    return {
        "id": pool.pool_id, "subnet": str(pool.subnet.network),
        "sub_pool": str(pool.sub_pool or ""), "name": pool.name, "leases": len(pool.leases),
        "usable": pool.usable(), "granted_s": pool.granted_s, "seq": pool.seq,
        **({"addresses": addresses} if has_leases else {}),
    }


def describe_state(state: State, has_leases: bool) -> Json:
    """Return what `status --json` shows; it takes copies, each in one step, and needs no lock."""
    bases = [describe_base(family, base) for family in state.families.values()
             for base in family.bases]
    pools = [describe_pool(pool, has_leases) for pool in list(state.pools.values())]
    return {"version": __version__, "seq": state.seq, "bases": bases, "pools": pools}


def normalise_keys(document: Json, keys: Iterable[str]) -> tuple[Json, list[str]]:
    """Return (the document with its keys spelt as these, the keys that are none of them)."""
    spelling = {**{key.lower(): key for key in keys}, **OTHER_NAMES}
    known, unknown = {}, []
    for key, value in document.items():
        if key.lower() in spelling:
            known[spelling[key.lower()]] = value
        else:
            unknown.append(key)
    return known, unknown


def carry_over(keys: Json, document: Json) -> dict[str, Any]:
    """Return the settings in a lease file that are not what gipam has written there."""
    found, _ = normalise_keys(document, FILE_NAMES)
    return {key: found.get(key) for key in FILE_KEYS.values()
            if (found.get(key) or None) != (keys.get(key) or None)}


# === Allocator ====================================================================================


class PoolRequest(NamedTuple):
    """What a network asks for: a subnet, or any free block of a length."""

    version: int
    subnet: Network | None
    sub_pool: Network | None
    prefixlen: int | None  # of the block, None: the family's default
    name: str


class AddressRequest(NamedTuple):
    """What a container, a gateway or an auxiliary address asks for."""

    address: str  # bare, or "": any
    kind: str
    mac: str
    name: str


def decide_request_pool(state: State, request: PoolRequest, obstacles: Obstacles, now_s: int,
                        token: str) -> RequestPool:
    """Decide which subnet a network gets. Raises: InvalidRequest, Forbidden, Unavailable."""
    subnet, sub_pool, next_block = request.subnet, request.sub_pool, -1
    if subnet is None:
        subnet, next_block = choose_block(state.families[request.version], request, obstacles)
    else:
        check_subnet(state, subnet, sub_pool, now_s)
    return grant(subnet, sub_pool, token, now_s)._replace(name=request.name, next_block=next_block)


def grant(subnet: Network, sub_pool: Network | None, token: str, now_s: int) -> RequestPool:
    """Return the change that grants a subnet, or a range of it, from its first address on."""
    cursor = int((sub_pool or subnet)[0]) - int(subnet[0])
    return RequestPool(make_pool_id(subnet, sub_pool, token), str(subnet), str(sub_pool or ""), "",
                       now_s, cursor, -1)


def decide_adoption(state: State, pool_id: str, now_s: int, token: str) -> RequestPool:
    """Take over a pool that Docker holds and the state does not know.

    Its addresses start at a random place: past the first ones, of which one likely is the gateway,
    which Docker does not ask for again; and in the lower half, so that these come last.
    Raises: InvalidRequest if the id is not one of ours, or its subnet could not be granted now.
    """
    parsed = parse_pool_id(pool_id)
    if parsed is None:
        raise InvalidRequest(f"cannot find address pool for {pool_id!r}: no pool has this id", 404)
    subnet, sub_pool = parsed
    try:
        check_subnet(state, subnet, sub_pool, now_s)
    except GipamError as error:
        raise InvalidRequest(f"cannot find address pool for {pool_id!r}, nor adopt it: {error}",
                             404) from None
    change, room = grant(subnet, sub_pool, "", now_s), (sub_pool or subnet).num_addresses // 2 - 2
    ahead = 2 + int(token, 16) % max(room, 1)
    return change._replace(pool_id=pool_id, cursor=change.cursor + ahead)


def decide_import(state: State, subnet: Network, sub_pool: Network | None,
                  requests: list[AddressRequest], seq: int | None, now_s: int) -> Iterator[Change]:
    """Take over what Docker uses and the state does not hold; apply each change before the next.

    With seq, only if the pool still is the one granted as that change; 0: if there is none.
    Raises: Forbidden, as check_subnet() and check_address().
    """
    other = state.families[subnet.version].find_overlap(subnet)
    pool = other.pools.get(sub_pool) if other and other.network == subnet else None
    if seq is not None and seq != (pool.seq if pool else 0):
        raise Forbidden(f"pool {sub_pool or subnet} is not what it was as change {seq}: look again")
    if pool is None:
        check_subnet(state, subnet, sub_pool, now_s)
        change = grant(subnet, sub_pool, UNBOUND, now_s)
        yield change
        pool = state.pools[change.pool_id]
    for request in requests:
        if request.address:
            is_held = parse_offset(pool, request.address) in pool.subnet.held
        else:  # the gateway, wherever it is
            is_held = any(lease.kind == GATEWAY for lease in pool.leases.values()) \
                or pool.subnet.held.next_absent(pool.low) > pool.high
        if not is_held:
            yield decide_request_address(pool, request, now_s)


def check_subnet(state: State, subnet: Network, sub_pool: Network | None, now_s: int) -> None:
    """Check that a subnet, or a range of it, may be granted. Raises: InvalidRequest, Forbidden.

    Ranges share their subnet, if it is equal (macvlan networks; moby TestMacvlanIPAMOverlap).
    """
    if sub_pool and (sub_pool.version != subnet.version or not sub_pool.overlaps(subnet)
                     or sub_pool.prefixlen < subnet.prefixlen):
        raise InvalidRequest(f"invalid address subpool: {sub_pool} does not lie in {subnet}")
    other = state.families[subnet.version].find_overlap(subnet)
    if other is None or (sub_pool and other.network == subnet
                         and None not in other.pools and sub_pool not in other.pools):
        return
    pool = other.pools.get(sub_pool) or next(iter(other.pools.values()))
    raise Forbidden(f"Pool overlaps with other one on this address space: {subnet} with "
                    f"{other.network}, held by pool {pool.pool_id!r} for "
                    f"{format_age(now_s - pool.granted_s)}; should no network use that any more, "
                    "`gipam check --fix` releases it")


def format_age(age_s: int) -> str:
    """Return a duration in its largest whole unit, such as 3h."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s // unit_s}{unit}"
    return f"{max(age_s, 0)}s"


def choose_block(family: Family, request: PoolRequest, obstacles: Obstacles) -> tuple[Network, int]:
    """Return a free block, and the number of the block to try next (-1: as it was).

    First the block that the name had; then next-fit among those that no name had; then among all
    that are free. Raises: InvalidRequest for an impossible length, Unavailable.
    """
    prefixlen = family.prefixlen if request.prefixlen is None else request.prefixlen
    check_prefixlen(family, prefixlen)
    kept = family.recall(request.name)
    if kept and kept.network.prefixlen == prefixlen and family.is_block(kept.network) \
            and obstacles.find_overlap(kept.network) is None:
        return kept.network, -1
    for tree in (family.fresh, family.free):
        for number, block in family.candidates(tree, prefixlen, obstacles):
            return block, (number + 1) % family.blocks(prefixlen)
    raise Unavailable("all predefined address pools have been fully subnetted: "
                      + describe_blocks(family, prefixlen))


def check_prefixlen(family: Family, prefixlen: int) -> None:
    """Check that the bases have blocks of this length. Raises: InvalidRequest, Unavailable."""
    if not family.bases:
        raise Unavailable(f"no IPv{family.version} base to take a subnet from: start gipam with "
                          f"-v{family.version} PREFIX, or give the network a --subnet")
    lowest, highest = min(base.prefixlen for base in family.bases), BITS[family.version] - 1
    if not lowest <= prefixlen <= highest:
        raise InvalidRequest(f"invalid address pool: the IPv{family.version} bases have blocks of "
                             f"/{lowest} to /{highest}, not of /{prefixlen}")


def describe_blocks(family: Family, prefixlen: int) -> str:
    """Say in numbers where the blocks of this length have gone."""
    total, size = family.blocks(prefixlen), 1 << BITS[family.version] - prefixlen
    bases = [base for base in family.bases if base.prefixlen <= prefixlen]
    usable, free = (sum(map(tree.addresses, bases)) / size for tree in (family.usable, family.free))
    return (f"of {total} blocks of /{prefixlen} in {', '.join(map(str, bases))}, "
            f"{usable - free:.12g} are held, {total - usable:.12g} excluded, and {free:.12g} "
            "overlap routes or addresses of this host or lie in smaller pieces")


def decide_request_address(pool: Pool, request: AddressRequest, now_s: int) -> RequestAddress:
    """Decide which address is given. Raises: InvalidRequest, Forbidden, Unavailable."""
    cursor = pool.cursor
    if request.address:
        offset = check_address(pool, request.address)
    elif request.kind == GATEWAY:
        offset = pool.subnet.held.next_absent(pool.low)
    else:
        offset, cursor = choose_offset(pool, request.name or request.mac)
    if not request.address and offset > pool.high:
        raise Unavailable(f"no available addresses on this pool: all {pool.usable()} of "
                          f"{pool.sub_pool or pool.subnet.network} are held")
    return RequestAddress(pool.pool_id, pool.format(offset), request.kind, request.mac,
                          request.name, now_s, cursor)


def choose_offset(pool: Pool, owner: str) -> tuple[int, int]:
    """Return (offset, cursor): what the owner had last, else the next that is free, wrapping round.

    An offset beyond the range means that it is full.
    """
    last = pool.subnet.memory.get(owner, (-1, 0))[0]
    if pool.low <= last <= pool.high and last not in pool.subnet.held:
        return last, pool.cursor
    offset = pool.subnet.held.next_absent(max(pool.cursor, pool.low))
    if offset > pool.high:
        offset = pool.subnet.held.next_absent(pool.low)
    return offset, offset + 1


def parse_offset(pool: Pool, address: str) -> int:
    """Return the offset of an address, inside or not. Raises: InvalidRequest."""
    try:
        return pool.offset(address)
    except ValueError as error:
        raise InvalidRequest(f"invalid address: {error}, as {pool.subnet.network} "
                             "has them") from None


def check_address(pool: Pool, address: str) -> int:
    """Return the offset of an address that is free, in the sub_pool or not.

    Raises: InvalidRequest, Forbidden.
    """
    offset, network = parse_offset(pool, address), pool.subnet.network
    if not 0 <= offset <= pool.subnet.last_offset:
        raise InvalidRequest(f"requested address is out of range: {address} is not in {network}")
    if offset in pool.subnet.held:
        how = "reserved" if offset in pool.subnet.reserved else "held"
        raise Forbidden(f"Address already in use: {address} is {how} in {network}")
    return offset


def decide_release_address(pool: Pool, address: str) -> ReleaseAddress | None:
    """Release what this very pool holds, None: nothing. Raises: InvalidRequest."""
    offset = parse_offset(pool, address)
    return ReleaseAddress(pool.pool_id, pool.format(offset)) if offset in pool.leases else None


# === Store ========================================================================================


class Line(NamedTuple):
    """One flush, as a journal segment holds it."""

    number: int
    offset: int  # of its first byte in the segment
    end: int  # and past its last
    seq: int  # of its last change
    records: list[Any]
    next_segment: int = 0  # where the journal goes on, once this segment is complete


def encode_line(seq: int, records: list[Any], *next_segment: int) -> bytes:
    """Return the line: length and CRC-32 of the JSON that follows them, and that."""
    payload = dumps([seq, records, *next_segment]).encode()
    return b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)


def decode_lines(data: bytes, is_last: bool) -> Iterator[Line]:
    """Yield the lines of a segment, without what a crash tore from its end.

    A torn line was never acknowledged: it has no end of line and is shorter than it says, or the
    file system had given it room but no contents: NULs, of which JSON has none (a single one is a
    damaged byte). In the last segment, a line that is whole but for its end counts.
    Raises: ValueError with the place.
    """
    offset, number = 0, 1
    while offset < len(data):
        head = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ").match(data, offset)
        end = offset + 18 + int(head[1], 16) if head else len(data)
        payload, rest = data[offset + 18:end], len(data) - end
        is_whole = head and rest >= 0 and zlib.crc32(payload) == int(head[2], 16)
        if is_whole and (data[end:end + 1] == b"\n" or (is_last and rest <= 1)):
            yield Line(number, offset, end + 1, *json.loads(payload))
        else:
            is_short = rest <= 0 if head else len(data) - offset < 18
            if data.find(b"\n", offset, -1) < 0 and (
                    data.find(b"\0\0", offset) >= 0 or (is_short and data[-1:] != b"\n")):
                return
            raise ValueError(f"line {number} at byte {offset} has not the length and checksum "
                             "that it says")
        offset, number = end + 1, number + 1


class Store:
    """The lease file, its journal segments and its lock. It knows records, not what they mean.

    What touches the disk goes through `calls`, so that a test can watch it and let it fail.
    """

    def __init__(self, path: str, calls: Any = os) -> None:
        self.path, self.calls = path, calls
        self.seq = 0  # of the last change on disk
        self.segment = 0  # number of the one that is written, 0: none yet
        self.is_named = False  # by the snapshot, so that its loss would be noticed
        self.identity: tuple[int, ...] = ()  # of the snapshot as gipam has read or written it
        self.snapshot_bytes = self.journal_bytes = 0
        self._fd = -1
        self._end = 0  # bytes of the segment that are on disk

    def lock(self) -> None:
        """Keep others off the lease file while the process lives. Raises: BusyError, OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.path + ".lock", flags, 0o600)
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                    raise BusyError(f"lease file {self.path} is held by process {holder}: stop it, "
                                    "or give this one another -file") from None
                time.sleep(0.02)
        with contextlib.suppress(OSError):  # a full disk must not forbid starting
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)

    def read_snapshot(self, object_hook: Any = None) -> Json | None:
        """Return the JSON object of the lease file, None if there is none. Raises: ConfigError."""
        def open_file(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NOFOLLOW)

        try:
            with open(self.path, "rb", opener=open_file) as file:
                self.identity = self._identify()
                if os.fstat(file.fileno()).st_mode & 0o077:
                    log.warning("%s is open to other users: chmod 600 it", self.path)
                text = file.read()
            document = json.loads(text, object_hook=object_hook)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read lease file {self.path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise self.damage(self.path, f"is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise self.damage(self.path, "is not a JSON object")
        self.snapshot_bytes = len(text)
        return document

    def _identify(self) -> tuple[int, ...]:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def is_edited(self) -> bool:
        """Return whether the lease file is there, and not as gipam has read or written it last."""
        return self._identify() not in ((), self.identity)

    def keep_aside(self) -> str:
        """Give the lease file a second name, which stays when it is replaced. Raises: OSError."""
        numbers = range(1, len(self.calls.listdir(os.path.dirname(self.path) or ".")) + 2)
        path = next(path for path in (f"{self.path}.edited-{number}" for number in numbers)
                    if not os.path.lexists(path))
        os.link(self.path, path, follow_symlinks=False)
        self.identity = self._identify()
        return path

    def discard(self) -> None:
        """Remove what a start has written that has not come to serve. Raises: OSError."""
        if os.path.lexists(self.path):
            os.unlink(self.path)
        self.remove_segments(self.segment + 1)

    def damage(self, place: str, what: str, remedy: str = "") -> DamageError:
        """Return the error that names the place, what is wrong there, and what to do."""
        remedy = remedy or (f"put back a backup; or move {self.path}* away: gipam then starts as "
                            "if they were lost, and takes over what Docker uses")
        return DamageError(f"{place} {what}; gipam does not start on a guess: {remedy}")

    def segments(self) -> list[int]:
        """Return the numbers of the segments that are there, oldest first."""
        prefix = os.path.basename(self.path) + ".journal."
        names = self.calls.listdir(os.path.dirname(self.path) or ".")
        return sorted(int(name[len(prefix):]) for name in names
                      if name.startswith(prefix) and name[len(prefix):].isdecimal())

    def segment_path(self, number: int) -> str:
        """Return where a segment lies."""
        return f"{self.path}.journal.{number}"

    def replay(self, document: Json | None, seq: int) -> Iterator[tuple[str, Any]]:
        """Yield (place, record) of each change after the snapshot's seq, and be ready to append.

        Raises: DamageError for a damaged line, for a segment that is missing or there twice.
        """
        self.seq, numbers = seq, self.segments()
        named = document.get("Journal") if document else None
        self.is_named = named is not None
        if named is not None and named not in numbers:
            raise self.damage(
                self.segment_path(named), "is missing", "put it back; or give up what it held: "
                f'delete the line "Journal" from {self.path}, start gipam, and run '
                "`gipam check --fix`")
        for self.segment in numbers:
            path, following = self.segment_path(self.segment), 0
            for line in self._read_segment(path, self.segment == numbers[-1]):
                following, first = line.next_segment, line.seq - len(line.records) + 1
                if document is None and line.seq:
                    raise self.damage(path, f"is there without its lease file {self.path}")
                if first > self.seq + 1 or (line.records and seq < first <= self.seq):
                    raise self.damage(
                        path, f"goes on with change {first}, but {self.seq + 1} is due",
                        "put the missing segment back, or move the surplus one away")
                for at, record in enumerate(line.records, first):
                    if at > self.seq:
                        self.seq = at
                        yield f"{path} line {line.number} at byte {line.offset}", record
            is_needed = self.segment >= named if named else self.seq > seq
            if following and is_needed and following not in numbers:
                raise self.damage(
                    self.segment_path(following), "is missing", "put it back; or give up what it "
                    f"held: truncate -s {line.offset} {path}, start gipam, and run "
                    "`gipam check --fix`")

    def _read_segment(self, path: str, is_last: bool) -> Iterator[Line]:
        with open(path, "rb") as file:
            data = file.read()
        self._end = 0
        try:
            for line in decode_lines(data, is_last):
                self._end = line.end
                yield line
        except ValueError as error:
            raise self.damage(
                path, f"is damaged: {error}", "put back a backup; or give up that line and all "
                f"after it: truncate -s {self._end} {path}, move later segments away, start gipam, "
                "run `gipam check --fix`") from None
        if self._end < len(data):
            log.warning("dropped the end of %s from byte %d on: a crash cut it off before it was "
                        "acknowledged", path, self._end)
        self.journal_bytes += self._end

    def append(self, seq: int, records: list[Any]) -> None:
        """Write the changes up to seq as one line. Durable: on return.

        Raises: StoreError, and the journal is as before; StoreLost.
        """
        data = encode_line(seq, records)
        try:
            if self._fd < 0:
                self._open_segment()
            self._write(self._fd, data, self._end)
        except OSError as error:
            problem = f"cannot write {self.segment_path(self.segment or 1)}: {error.strerror}"
            self._cut_back(problem)
            raise StoreError(f"{problem}; nothing has changed") from None
        try:
            self.calls.fdatasync(self._fd)
        except OSError as error:
            path = self.segment_path(self.segment)
            raise StoreLost(f"cannot sync {path}: {error.strerror}") from None
        self._end += len(data)
        self.journal_bytes += len(data)
        self.seq = seq

    def _cut_back(self, problem: str) -> None:
        try:
            if self._fd >= 0:
                self.calls.ftruncate(self._fd, self._end)
        except OSError as error:
            raise StoreLost(f"{problem}, nor cut it back: {error.strerror}") from None

    def _open_segment(self) -> None:
        """Open the first segment, or the one where recovery ended: without its torn end."""
        if not self.segment:
            self.rotate()
        elif self._fd < 0:
            fd = self.calls.open(self.segment_path(self.segment), os.O_WRONLY | os.O_CLOEXEC)
            try:
                self.calls.ftruncate(fd, self._end)
                self._write(fd, b"\n" if self._end else b"", self._end - 1)
                self.calls.fdatasync(fd)
            except OSError:
                self._close(fd)
                raise
            self._fd = fd

    def settle(self) -> None:
        """Sync what recovery has read: a process that was killed may not have. Raises: OSError."""
        if self.segment:
            self._open_segment()
        self._sync_directory()

    def rotate(self) -> None:
        """Begin a new segment: an empty line with the seq that it follows; the old one names it.

        Durable: both, and its name. Raises: OSError; the old segment is in use then.
        """
        if self.segment:
            self._open_segment()
        number, data = self.segment + 1, encode_line(self.seq, [])
        fd = self.calls.open(self.segment_path(number), CREATE, 0o600)
        try:
            self._write(fd, data, 0)
            self.calls.fdatasync(fd)
            self._sync_directory()
            if self._fd >= 0:
                self._write(self._fd, encode_line(self.seq, [], number), self._end)
                self.calls.fdatasync(self._fd)
        except OSError as error:
            self._cut_back(f"cannot begin segment {number}: {error.strerror}")
            self._close(fd)
            self.calls.unlink(self.segment_path(number))
            raise
        before, self._fd, self._end, self.segment = self._fd, fd, len(data), number
        if before >= 0:
            self._close(before)

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # it is synced, or given up
            self.calls.close(fd)

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        while data:
            written = self.calls.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def _sync_directory(self) -> None:
        fd = self.calls.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.calls.fsync(fd)
        finally:
            self._close(fd)

    def write_snapshot(self, chunks: Iterable[str], is_named: bool) -> None:
        """Replace the lease file. Durable: on return. Raises: OSError; the old one is whole."""
        path, offset, data = self.path + ".tmp", 0, b""
        fd = self.calls.open(path, CREATE, 0o600)
        try:
            for chunk in chunks:
                data += chunk.encode()
                if len(data) >= WRITE_BYTES:
                    self._write(fd, data, offset)
                    offset, data = offset + len(data), b""
            self._write(fd, data, offset)
            self.calls.fsync(fd)
        except OSError as error:
            self.calls.unlink(path)
            raise OSError(error.errno, error.strerror, self.path) from None
        finally:
            self._close(fd)
        self.calls.replace(path, self.path)
        self.identity = self._identify()
        self._sync_directory()
        self.snapshot_bytes, self.is_named = offset + len(data), is_named

    def remove_segments(self, below: int) -> None:
        """Remove segments that the snapshot has made superfluous. Raises: OSError."""
        for number in self.segments():
            if number < below:
                self.calls.unlink(self.segment_path(number))
        self.journal_bytes = self._end


# === Service ======================================================================================


class Histogram:
    """How often something took how long. Source: Prometheus text format 0.0.4."""

    BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(self.BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def samples(self, name: str) -> Iterator[str]:
        """Yield the lines."""
        total = 0
        for bound, count in zip((*self.BOUNDS_S, "+Inf"), self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum_s:.6f}"
        yield f"{name}_count {total}"


RESULTS = ("ok", "bug", "InvalidRequest", "Forbidden", "Unavailable", "StoreError", "StoreLost")


class Metrics:
    """What is counted while serving."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: dict[tuple[str, str], int] = {}  # (method, result) -> count
        self.request_s, self.sync_s = Histogram(), Histogram()
        self.last_write_s = 0.0

    def count(self, method: str, result: str, duration_s: float) -> None:
        """Count one request."""
        with self.lock:
            self.requests[method, result] = self.requests.get((method, result), 0) + 1
            self.request_s.observe(duration_s)


METRICS = {  # -> type, help
    "build_info": ("gauge", "1, with the version of gipam"),
    "base_blocks": ("gauge", "Blocks of the usual length in a base"),
    "base_blocks_used": ("gauge", "Blocks of it that are held"),
    "base_blocks_excluded": ("gauge", "Blocks of it that are never handed out"),
    "pool_addresses": ("gauge", "Addresses of a pool that can be handed out"),
    "pool_addresses_used": ("gauge", "Addresses of it that are held"),
    "requests_total": ("counter", "Requests, by method and result"),
    "request_duration_seconds": ("histogram", "Time from a request to its reply"),
    "journal_sync_duration_seconds": ("histogram", "Time of one write and sync of the journal"),
    "journal_bytes": ("gauge", "Length of the journal"),
    "last_write_timestamp_seconds": ("gauge", "When the journal was last written"),
}


def sample(name: str, values: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yield the lines of one metric: help, type and, for each set of labels, its value."""
    kind, text = METRICS[name]
    yield from (f"# HELP gipam_{name} {text}", f"# TYPE gipam_{name} {kind}")
    for labels, value in values:
        yield f"gipam_{name}{{{labels}}} {value}" if labels else f"gipam_{name} {value}"


class Ticket:
    """What a request waits for: its change, and all that its decision could see, on disk."""

    def __init__(self, change: Change | None, seq: int, undo: Undo) -> None:
        self.change, self.seq, self.undo = change, seq, undo
        self.asked_s = time.perf_counter()
        self.error: StoreError | None = None
        self._lock = threading.Lock()  # cheaper than an Event: one release wakes one waiter
        self._lock.acquire()

    def finish(self, error: StoreError | None = None) -> None:
        """Wake the request that waits."""
        self.error = error
        self._lock.release()

    def wait(self) -> None:
        """Return when it is on disk. Raises: StoreError when it could not be written."""
        self._lock.acquire()
        if self.error:
            raise self.error


IS_PLAIN = re.compile(r"[\w.:/#,@+=-]*").fullmatch  # needs no quotes in the log


def log_changes(tickets: Iterable[Ticket]) -> None:
    """Log a line for each change: what, for whom, how long until it was durable; all in one write.

    With a write for each, 64 connections got half the calls done: each gives the interpreter away.
    """
    now_s, lines = time.perf_counter(), []
    for ticket in tickets:
        if ticket.change:
            pairs = [f"{key}={text if IS_PLAIN(text) else ascii(text)}" for key, text in
                     zip(ticket.change._fields, map(str, ticket.change)) if text]
            lines.append(f"{CHANGE_NAMES[type(ticket.change)]} {' '.join(pairs)} seq={ticket.seq} "
                         f"ms={(now_s - ticket.asked_s) * 1e3:.2f}")
    if lines:
        log.info("%s", "\n".join(lines))


class Flusher:
    """Group commit: one flush writes what queued up while the last one ran.

    A request that finds nothing being flushed does it itself, which saves two changes of thread:
    measured, a call takes 0.7 of the time. What queues up meanwhile is left to the flusher thread.
    """

    def __init__(self, state: State, store: Store, lock: threading.Lock, metrics: Metrics,
                 on_loss: Callable[[], None]) -> None:
        self._state, self._store, self._lock, self._on_loss = state, store, lock, on_loss
        self._metrics = metrics
        self._queue: list[Ticket] = []
        self._is_busy = self._is_rotating = False
        self._wakeup = threading.Semaphore(0)
        self.fold_is_due = threading.Event()
        self.loss: StoreError | None = None  # after it, nothing is written any more
        threading.Thread(target=self._run, name="flusher", daemon=True).start()

    def commit(self, decide: Callable[[], Change | None], is_rotating: bool = False,
               is_last: bool = False) -> Ticket:
        """Decide and apply under the lock; return, or raise the refusal, when all is on disk.

        decide() may itself submit() changes that come before; a refusal undoes them. After the
        last one, nothing is written any more. Raises: as decide() and submit(); StoreError.
        """
        refusal: GipamError | None = None
        with self._lock:
            length = len(self._queue)
            try:
                ticket = self.submit(decide(), is_rotating)
            except GipamError as error:
                refusal = error
                while len(self._queue) > length:
                    self._queue.pop().undo()
                ticket = self.submit(None)
            if is_last:
                self.loss = StoreError("gipam is stopping: try again")
            is_leader = bool(self._queue) and not self._is_busy
            self._is_busy |= is_leader
        if is_leader and self._flush_queue():
            self._wakeup.release()
        ticket.wait()
        if refusal:
            raise refusal
        return ticket

    def submit(self, change: Change | None, is_rotating: bool = False) -> Ticket:
        """Apply the change and queue it: in a commit(). Raises: StoreLost.

        Without a change, the ticket waits for those before it; with is_rotating, also for a new
        segment, which holds all that is queued after.
        """
        if self.loss:
            raise self.loss
        undo = self._state.apply(change) if change else lambda: None
        ticket = Ticket(change, self._state.seq, undo)
        if change or is_rotating or self._is_busy or self._queue:
            self._is_rotating |= is_rotating
            self._queue.append(ticket)
        else:
            ticket.finish()
        return ticket

    def _run(self) -> None:
        while self._wakeup.acquire():
            while self._flush_queue():
                pass

    def _flush_queue(self) -> bool:
        """Flush what is queued, and wake who waits for it; return whether more has queued up."""
        with self._lock:
            batch, self._queue = self._queue, []
            is_rotating, self._is_rotating = self._is_rotating, False
        error: StoreError | None = None
        try:
            self._flush(batch, is_rotating)
        except Exception as failure:
            if not isinstance(failure, StoreError):  # a bug: nobody may wait for ever
                log.exception("the journal cannot be written")
                failure = StoreLost("internal error of gipam: see its log")
            error, batch = failure, self._revert(batch, failure)
        for ticket in batch:
            ticket.finish(error)
        if not error:
            log_changes(batch)
        with self._lock:
            self._is_busy = bool(self._queue)
            return self._is_busy

    def _flush(self, batch: list[Ticket], is_rotating: bool) -> None:
        store = self._store
        if is_rotating:
            try:
                store.rotate()
            except OSError as error:
                log.warning("cannot begin a new journal segment: %s", error)
        changes = [ticket.change for ticket in batch if ticket.change]
        records = [[CHANGE_NAMES[type(change)], *change] for change in changes]
        if records:
            started = time.perf_counter()
            store.append(store.seq + len(records), records)
            self._metrics.sync_s.observe(time.perf_counter() - started)
            self._metrics.last_write_s = time.time()
            limit_bytes = max(MIN_FOLD_BYTES, store.snapshot_bytes)
            if not store.is_named or store.journal_bytes > limit_bytes:
                self.fold_is_due.set()

    def _revert(self, batch: list[Ticket], error: StoreError) -> list[Ticket]:
        """Undo what was to be written, and what has been decided on top of it, newest first."""
        with self._lock:
            batch, self._queue = batch + self._queue, []
            for ticket in reversed(batch):
                ticket.undo()
            if isinstance(error, StoreLost):
                self.loss = error
        log.error("%s", error)
        if self.loss:
            self._on_loss()
        return batch


class Service:
    """The driver: decide, apply, queue, flush, answer. Its one lock guards the state."""

    def __init__(self, store: Store, state: State, config: Json,
                 proc: str = "/proc/self/net", on_loss: Callable[[], None] = lambda: None) -> None:
        self.state, self._store, self._proc = state, store, proc
        store.settle()
        self._config = config  # the keys of the lease file
        self.about: Json = {}  # what /status tells of the daemon
        self._lock, self._fold_lock = threading.Lock(), threading.Lock()
        self.metrics = Metrics()
        self.import_is_due = threading.Event()  # ask Docker what it uses, once it answers
        self.adopted: set[int] = set()  # changes of the import, until Docker is asked once more
        self.flusher = Flusher(state, store, self._lock, self.metrics, on_loss)
        threading.Thread(target=self._fold_when_due, name="folder", daemon=True).start()

    def request_pool(self, request: PoolRequest) -> Ticket:
        """Grant a subnet. Durable: on return. Raises: as decide_request_pool(); StoreError."""
        obstacles = Obstacles()
        if request.subnet is None:  # read now, never cached: a VPN may have come up
            bases = self.state.families[request.version].bases
            obstacles = Obstacles(read_obstacles(self._proc, request.version, bases))
        now_s, token = int(time.time()), secrets.token_hex(8)
        return self.flusher.commit(functools.partial(decide_request_pool, self.state, request,
                                                     obstacles, now_s, token))

    def release_pool(self, pool_id: str) -> Ticket:
        """Release a pool with its leases; an unknown one is gone already. Durable: on return."""
        return self.flusher.commit(
            lambda: ReleasePool(pool_id) if self._find_pool(pool_id) else None)

    def request_address(self, pool_id: str, request: AddressRequest) -> tuple[Ticket, int]:
        """Grant an address; return the prefixlen of its subnet too. Durable: on return.

        A pool that Docker holds and the state does not know is adopted first.
        Raises: as decide_request_address() and decide_adoption(); StoreError.
        """
        now_s, prefixlen = int(time.time()), 0

        def decide() -> Change:
            nonlocal prefixlen
            if not self._find_pool(pool_id):
                adoption = decide_adoption(self.state, pool_id, now_s, secrets.token_hex(8))
                self.flusher.submit(adoption)
                self.import_is_due.set()
                log.warning("adopting pool_id=%r: Docker holds it, the lease file does not",
                            pool_id)
            pool = self.state.pools[pool_id]
            prefixlen = pool.subnet.network.prefixlen
            return decide_request_address(pool, request, now_s)

        return self.flusher.commit(decide), prefixlen

    def release_address(self, pool_id: str, address: str) -> Ticket:
        """Release an address; what is not held is gone already. Raises: InvalidRequest."""
        def decide() -> Change | None:
            pool = self._find_pool(pool_id)
            return decide_release_address(pool, address) if pool else None

        return self.flusher.commit(decide)

    def _find_pool(self, pool_id: str) -> Pool | None:
        """Return the pool of the id; one taken over without an id gets it now. The lock is held."""
        if pool_id not in self.state.pools:
            parsed = parse_pool_id(pool_id)
            unbound = make_pool_id(*parsed, UNBOUND) if parsed else ""
            if unbound in self.state.pools:
                self.flusher.submit(BindPool(unbound, pool_id))
        return self.state.pools.get(pool_id)

    def release_if(self, pool_id: str, address: str, seq: int) -> Ticket:
        """Release the pool, or the address in it, if it still is what was granted as change seq."""
        def decide() -> Change:
            pool = self.state.pools.get(pool_id)
            lease = pool.leases.get(parse_offset(pool, address)) if pool and address else None
            if not pool or (lease.seq if lease else None if address else pool.seq) != seq:
                raise Forbidden(f"{address or 'pool'} of {pool_id!r} is not what it was as change "
                                f"{seq}: look again")
            return ReleaseAddress(pool_id, address) if address else ReleasePool(pool_id)

        return self.flusher.commit(decide)

    def adopt(self, subnet: Network, sub_pool: Network | None, requests: list[AddressRequest],
              seq: int | None = None) -> range:
        """Adopt, as decide_import(); return the numbers of the changes. Durable: on return.

        Raises: as decide_import(), and nothing is taken over; StoreError.
        """
        now_s, first = int(time.time()), 0

        def decide() -> None:
            nonlocal first
            first = self.state.seq + 1
            for change in decide_import(self.state, subnet, sub_pool, requests, seq, now_s):
                self.flusher.submit(change)

        ticket = self.flusher.commit(decide)
        return range(first, ticket.seq + 1)

    def status(self, has_leases: bool) -> Json:
        """Return what `status --json` shows, with the routes of the host inside the bases."""
        status = {**self.about, **describe_state(self.state, has_leases)}
        routes = {version: list(read_obstacles(self._proc, version, family.bases))
                  for version, family in self.state.families.items() if family.bases}
        for base in status["bases"]:
            prefix = parse_prefix(base["prefix"])
            inside = [route for route in routes[prefix.version] if prefix.overlaps(route)]
            base["routes"] = [str(route) for route in inside]
            base["blocks_routed"] = self.state.families[prefix.version].count_touched(inside)
        return status

    def samples(self, methods: Iterable[str]) -> Iterator[str]:
        """Yield the lines of GET /metrics; the counts of these methods from 0 on (increase())."""
        metrics, status = self.metrics, describe_state(self.state, has_leases=False)
        bases = [(f'base="{base["prefix"]}",family="{base["family"]}"', base)
                 for base in status["bases"]]
        pools = [(f'pool="{pool["sub_pool"] or pool["subnet"]}"', pool) for pool in status["pools"]]
        yield from sample("build_info", [(f'version="{__version__}"', 1)])
        for key in ("blocks", "blocks_used", "blocks_excluded"):
            yield from sample("base_" + key, [(labels, base[key]) for labels, base in bases])
        for name, key in (("pool_addresses", "usable"), ("pool_addresses_used", "leases")):
            yield from sample(name, [(labels, pool[key]) for labels, pool in pools])
        with metrics.lock:
            counts = {(method, result): 0 for method in methods for result in RESULTS}
            yield from sample("requests_total", [
                (f'method="{method}",result="{result}"', count)
                for (method, result), count in {**counts, **metrics.requests}.items()])
            for name, histogram in (("request_duration_seconds", metrics.request_s),
                                    ("journal_sync_duration_seconds", metrics.sync_s)):
                yield from (*sample(name, ()), *histogram.samples(f"gipam_{name}"))
        yield from sample("journal_bytes", [("", self._store.journal_bytes)])
        if metrics.last_write_s:
            yield from sample("last_write_timestamp_seconds", [("", metrics.last_write_s)])

    def take_back(self, ticket: Ticket) -> None:
        """Release what a reply granted that never arrived, if that is still the very same."""
        change = ticket.change
        if isinstance(change, (RequestPool, RequestAddress)):  # a release is never undone
            address = change.address if isinstance(change, RequestAddress) else ""
            with contextlib.suppress(Forbidden):
                self.release_if(change.pool_id, address, ticket.seq)
                log.warning("took back what a lost reply had granted: %s", change)

    def probe(self) -> None:
        """Return once all that is queued is on disk; hang if a flush does. Raises: StoreError."""
        self.flusher.commit(lambda: None)

    def fold(self, is_stopping: bool = False) -> bool:
        """Write the state to the lease file, drop the journal that it replaces; False: it failed.

        At a clean stop the lease file is left alone, whole in itself, for people to copy.
        """
        store, copies = self._store, []

        def begin() -> None:
            copies.append(copy_state(self.state))

        with self._fold_lock:
            before = store.segment
            try:
                self.flusher.commit(begin, is_rotating=not is_stopping, is_last=is_stopping)
                segment = None if is_stopping else store.segment
                if segment == before:
                    return False
                self._config = keep_edits(store, self._config)
                is_import_due = self.import_is_due.is_set()
                chunks = encode_snapshot(self._config, copies[0], segment, is_import_due)
                store.write_snapshot(chunks, not is_stopping)
                store.remove_segments(store.segment + is_stopping)
            except (OSError, StoreError) as error:
                log.warning("could not fold the journal into %s: %s", store.path, error)
                return False
            return True

    def _fold_when_due(self) -> None:
        while self.flusher.fold_is_due.wait():
            if not self.fold():
                time.sleep(FOLD_PATIENCE_S)
            self.flusher.fold_is_due.clear()  # each flush looks anew


def keep_edits(store: Store, keys: Json) -> Json:
    """Return the keys to write, with what a person has edited in the lease file. Raises: OSError.

    The note of what gipam wrote there stays: so the next start sees that it was edited.
    """
    if not store.is_edited():
        return keys
    try:
        edits = carry_over(keys, store.read_snapshot() or {})
    except ConfigError as error:
        log.warning("%s; what is there now is kept as %s", error, store.keep_aside())
        return keys
    log.warning("%s was edited while gipam runs: %s will take effect at the next start; what else "
                "was edited there is lost", store.path, edits or "no setting")
    return {**keys, **edits}


def recover(store: Store, document: Json | None, state: State) -> None:
    """Fill the state with what is on disk. Raises: DamageError with the place and what to do."""
    if document is not None:
        try:
            decode_snapshot(document, state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = str(error) if type(error) is ValueError else repr(error)
            raise store.damage(store.path, f"contradicts itself: {what}") from None
    for place, record in store.replay(document, state.seq):
        try:
            state.apply(CHANGES[record[0]](*record[1:]))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise store.damage(place, f"contradicts what stands before it: {error}") from None


def read_obstacles(proc: str, version: int, bases: list[Network]) -> Iterator[Network]:
    """Yield the routes and addresses of this host that lie in a base, as the kernel has them now.

    A route that contains a whole base is the routed prefix itself, or the default route.
    """
    for network in read_host_prefixes(proc, version):
        if any(network.prefixlen > base.prefixlen and base.overlaps(network) for base in bases):
            yield network


def read_host_prefixes(proc: str, version: int) -> Iterator[Network]:
    """Yield each route, and each own address at full length. Source: net/ipv4/fib_trie.c."""
    if version == 6:
        for row in read_rows(proc + "/ipv6_route"):
            yield ipaddress.ip_network((bytes.fromhex(row[0]), int(row[1], 16)))
        for row in read_rows(proc + "/if_inet6"):
            yield ipaddress.ip_network((bytes.fromhex(row[0]), 128))
        return
    for row in read_rows(proc + "/route")[1:]:
        first, mask = (int.from_bytes(bytes.fromhex(row[at]), sys.byteorder) for at in (1, 7))
        yield ipaddress.ip_network((first, bin(mask).count("1")))
    address = ""
    for row in read_rows(proc + "/fib_trie"):
        if row[0] == "|--":
            address = row[1]
        elif row[1:] == ["host", "LOCAL"]:
            yield ipaddress.ip_network(address + row[0])


def read_rows(path: str) -> list[list[str]]:
    """Return the words of each line; none if there is no such file (IPv6 is off)."""
    try:
        with open(path, encoding="ascii") as file:
            return [line.split() for line in file]
    except FileNotFoundError:
        return []


# === Protocol =====================================================================================

NAME_OPTION, LENGTH_OPTIONS = "gipam.name", {4: "gipam.v4ab", 6: "gipam.v6ab"}
ENDPOINT_NAME = "com.docker.network.endpoint.name"
ENDPOINT_MAC = "com.docker.network.endpoint.macaddress"


class Reply(NamedTuple):
    """What goes back, and what must be undone should it never arrive."""

    status: int
    body: bytes
    ticket: Ticket | None = None
    content_type: str = REPLY_TYPE


class Fields(Dict[str, Any]):
    """The arguments of a call. A method that reads one raises InvalidRequest."""

    def text(self, key: str, is_needed: bool = False) -> str:
        """Return a string, "" where there is none."""
        value = self.get(key, "")
        if not isinstance(value, str) or (is_needed and not value):
            more = " with something in it" if is_needed else ""
            raise InvalidRequest(f"{key} is not a string{more}: {value!r}")
        return value

    def pool_id(self) -> str:
        """Return the PoolID, which must be there."""
        return self.text("PoolID", is_needed=True)

    def address(self, is_needed: bool = False) -> str:
        """Return a bare address of either family, "" where there is none."""
        text = self.text("Address", is_needed)
        if not text:
            return text
        for version in BITS:
            with contextlib.suppress(ValueError):
                return format_address(parse_address(text, version), version)
        raise InvalidRequest(f"invalid address: {text!r} is not a bare IP address")

    def seq(self) -> int:
        """Return the number of a change."""
        value = self.get("Seq")
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidRequest(f"Seq is not a number: {value!r}")
        return value

    def prefix(self, key: str) -> Network | None:
        """Return a prefix, its host bits cleared: Docker <= 24 passes them."""
        text = self.text(key)
        try:
            return parse_prefix(text, mask=True) if text else None
        except ValueError as error:
            raise InvalidRequest(f"invalid address {key.lower()}: {error}") from None

    def options(self) -> dict[str, str]:
        """Return the map of options, {} where there is none."""
        options = {} if self.get("Options") is None else self["Options"]
        if not isinstance(options, dict) \
                or not all(isinstance(text, str) for text in options.values()):
            raise InvalidRequest(f"Options is not a map of strings: {options!r}")
        for key in (NAME_OPTION, ENDPOINT_NAME, ENDPOINT_MAC):
            text = options.get(key, "")
            if len(text) > MAX_TEXT_CHARS:
                raise InvalidRequest(f"option {key} is longer than {MAX_TEXT_CHARS} characters")
            if not text.isprintable():
                raise InvalidRequest(
                    f"option {key} has characters that cannot be printed: {text!r}")
        return options


def dispatch(service: Service, verb: str, target: str, body: bytes,
             is_public: bool = False) -> Reply:
    """Answer a request, in public only for pages. Never raises; if refused, nothing changes."""
    started, result, got = time.perf_counter(), "ok", body[:MAX_TEXT_CHARS]
    path, _, query = target.partition("?")
    try:
        if is_public and path not in PAGES:
            raise InvalidRequest(f"{path} is not served here, only {', '.join(PAGES)}", 404)
        reply = answer(service, verb, path, query, body)
    except GipamError as error:
        log.warning("refused %s: %s; got %r", path, error, got)
        reply, result = refuse(error), type(error).__name__
    except Exception:  # a bug: Docker gets an answer, the operator the traceback
        log.exception("failed %s; got %r", path, got)
        reply, result = refuse(GipamError("internal error of gipam: see its log")), "bug"
    method = path if path in PATHS else "unknown"
    service.metrics.count(method, result, time.perf_counter() - started)
    if reply.ticket and not reply.ticket.change:
        log.warning("nothing to do for %s: not held; got %r", path, got)
    return reply


def answer(service: Service, verb: str, path: str, query: str, body: bytes) -> Reply:
    """Find the function for a path, and call it. Raises: GipamError."""
    if path not in PATHS:
        raise InvalidRequest(f"unknown method {path!r}: this is an IPAM driver", 404)
    needed = "GET" if path in PAGES else "POST"
    if verb != needed:
        raise InvalidRequest(f"{path} takes {needed}, not {verb}", 405)
    if path in PAGES:
        content_type, page = PAGES[path]
        return Reply(200, page(service, query).encode(), None, content_type)
    if path in CONSTANT_ANSWERS:
        return Reply(200, CONSTANT_ANSWERS[path])
    result, ticket = METHODS[path](service, decode_fields(body))
    return Reply(200, dumps(result).encode(), ticket)


def refuse(error: GipamError) -> Reply:
    """Turn an error into a reply: dockerd reads Err of a status that is not 200, others Error."""
    return Reply(error.http_status, dumps({"Err": str(error), "Error": str(error)}).encode())


def decode_fields(body: bytes) -> Fields:
    """Return the arguments of a call. Raises: InvalidRequest."""
    if not body:  # moby#39331: never read it as defaults
        raise InvalidRequest("the request has no body: dockerd lost it in a retry; "
                             "run the command again")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object")
    return Fields(fields)


def read_pool_request(fields: Fields) -> PoolRequest:
    """Return what a network asks for. Raises: InvalidRequest."""
    space, is_v6 = fields.text("AddressSpace"), fields.get("V6", False)
    subnet, sub_pool, options = fields.prefix("Pool"), fields.prefix("SubPool"), fields.options()
    if space not in ("", ADDRESS_SPACE):
        raise InvalidRequest(f"invalid address space: {space!r} is not {ADDRESS_SPACE!r}")
    if not isinstance(is_v6, bool) or (is_v6 and subnet and subnet.version == 4):
        raise InvalidRequest(f"invalid address pool: {subnet} with V6 {is_v6!r}")
    version = subnet.version if subnet else 6 if is_v6 else 4
    prefixlen = read_prefixlen(options, version)
    if subnet and not int(subnet[0]):  # 0.0.0.0/26 or ::/72: any block of this length
        prefixlen, subnet = subnet.prefixlen, None
    if sub_pool and not subnet:
        raise InvalidRequest(
            f"invalid address subpool: {sub_pool} comes without the subnet it is in")
    return PoolRequest(version, subnet, sub_pool, prefixlen, options.get(NAME_OPTION, ""))


def read_prefixlen(options: dict[str, str], version: int) -> int | None:
    """Return the length of block asked for. Raises: InvalidRequest, also for unknown options."""
    known = (NAME_OPTION, *LENGTH_OPTIONS.values())
    for key, text in options.items():
        if key.startswith("gipam.") and key not in known:
            raise InvalidRequest(f"unknown option {key!r}: gipam has {', '.join(known)}")
        if "gipam." + key in known:
            log.warning("option %r does nothing: is 'gipam.%s' meant?", key, key)
        if key in known[1:] and not re.fullmatch("[0-9]{1,3}", text):
            raise InvalidRequest(f"option {key} is not a prefix length: {text!r}")
    text = options.get(LENGTH_OPTIONS[version], "")
    return int(text) if text else None


def request_pool(service: Service, fields: Fields) -> tuple[Any, Ticket]:
    """Grant a network its subnet."""
    request = read_pool_request(fields)
    ticket = service.request_pool(request)
    assert isinstance(ticket.change, RequestPool)
    kept = service.state.families[request.version].recall(request.name)
    if kept and str(kept.network) != ticket.change.subnet:
        log.warning("gipam.name %r is in use for %s: %s is kept for no name", request.name,
                    kept.network, ticket.change.subnet)
    return {"PoolID": ticket.change.pool_id, "Pool": ticket.change.subnet, "Data": {}}, ticket


def request_address(service: Service, fields: Fields) -> tuple[Any, Ticket]:
    """Grant an address to a gateway, to a container, or aside for the user (auxiliary)."""
    pool_id, address, options = fields.pool_id(), fields.address(), fields.options()
    mac, name = options.get(ENDPOINT_MAC, ""), options.get(ENDPOINT_NAME, "")
    kind = ENDPOINT if mac or name or not address else AUXILIARY
    if options.get("RequestAddressType") == "com.docker.network.gateway":
        kind = GATEWAY
    ticket, prefixlen = service.request_address(pool_id, AddressRequest(address, kind, mac, name))
    assert isinstance(ticket.change, RequestAddress)
    return {"Address": f"{ticket.change.address}/{prefixlen}", "Data": {}}, ticket


def adopt_by_hand(service: Service, fields: Fields) -> tuple[Any, None]:
    """Take over what Docker uses; answer how many changes that was, and the last one's Seq."""
    subnet, sub_pool = fields.prefix("Subnet"), fields.prefix("SubPool")
    leases, kinds = fields.get("Leases"), (GATEWAY, AUXILIARY, ENDPOINT)
    if not subnet or not isinstance(leases, list) \
            or not all(isinstance(lease, dict) for lease in leases):
        raise InvalidRequest("Subnet or the list Leases is missing")
    keys = ("Address", "Kind", "MAC", "Name")
    requests = [AddressRequest(*(Fields(lease).text(key)[:MAX_TEXT_CHARS] for key in keys))
                for lease in leases]
    for request in requests:
        if request.kind not in kinds:
            raise InvalidRequest(f"Kind is none of {', '.join(kinds)}: {request.kind!r}")
    done = service.adopt(subnet, sub_pool, requests, fields.seq())
    log.info("adopt subnet=%s sub_pool=%s leases=%s adopted=%d", subnet, sub_pool or "",
             ",".join(request.address for request in requests), len(done))
    return {"Adopted": len(done), "Seq": done.stop - 1}, None


def show_health(service: Service, _: str) -> str:
    """Say whether gipam answers and can still write. Raises: StoreLost."""
    service.probe()
    return "ok\n"


def show_metrics(service: Service, _: str) -> str:
    """Return what Prometheus reads."""
    return "".join(line + "\n" for line in service.samples((*PATHS, "unknown")))


CONSTANT_ANSWERS = {path: dumps(value).encode() for path, value in {
    "/Plugin.Activate": {"Implements": ["IpamDriver"]},
    # MACs tell owners; a replay could make dockerd panic or release live pools (protocol.md 3.6)
    "/IpamDriver.GetCapabilities": {"RequiresMACAddress": True, "RequiresRequestReplay": False},
    "/IpamDriver.GetDefaultAddressSpaces": {"LocalDefaultAddressSpace": ADDRESS_SPACE,
                                            "GlobalDefaultAddressSpace": ADDRESS_SPACE},
}.items()}
METHODS: dict[str, Callable[[Service, Fields], tuple[Any, Ticket | None]]] = {
    "/IpamDriver.RequestPool": request_pool,
    "/IpamDriver.ReleasePool": lambda service, fields: ({}, service.release_pool(fields.pool_id())),
    "/IpamDriver.RequestAddress": request_address,
    "/IpamDriver.ReleaseAddress": lambda service, fields: (
        {}, service.release_address(fields.pool_id(), fields.address(is_needed=True))),
    "/Gipam.Release": lambda service, fields: (  # of what `check --fix` or `release` saw
        {}, service.release_if(fields.pool_id(), fields.address(), fields.seq())),
    "/Gipam.Adopt": adopt_by_hand,
}
PAGES: dict[str, tuple[str, Callable[[Service, str], str]]] = {  # -> content type, text
    "/status": ("application/json",
                lambda service, query: dumps(service.status("leases=1" in query.split("&")))),
    "/metrics": ("text/plain; version=0.0.4; charset=utf-8", show_metrics),
    "/healthz": ("text/plain; charset=utf-8", show_health),
}
PATHS = {*CONSTANT_ANSWERS, *METHODS, *PAGES}


# === Transport ====================================================================================

# What dockerd writes, to the letter (protocol.md 1.6): read in 2 us; http.server's parser takes 20.
PLAIN_REQUEST = re.compile(
    rb"POST (/[A-Za-z.]+) HTTP/1\.1\r\nHost: [!-~]+\r\nUser-Agent: [!-~]+\r\n"
    rb"Content-Length: ([0-9]{1,4})\r\nAccept: [!-~]+\r\n(?:Accept-Encoding: gzip\r\n)?\r\n").match
FD_NAME = "gipam"  # of the socket that the service manager keeps
IDLE, BUSY = 0.0, float("inf")  # states of a connection; else the time by which its request is due


class Handler(http.server.BaseHTTPRequestHandler):
    """Moves bytes between one connection and dispatch()."""

    protocol_version = "HTTP/1.1"
    server: Server
    rfile: io.BufferedReader
    command = ""
    ticket: Ticket | None = None  # of the last reply, until the peer has shown that it read it

    def address_string(self) -> str:
        """Name the peer; on a UNIX socket it has no address, and the stock method fails."""
        return "unix" if self.server.address_family == socket.AF_UNIX else self.client_address[0]

    def handle(self) -> None:
        """Serve the connection to its end; take back what a reply granted that never arrived."""
        try:
            super().handle()
        except OSError:  # a connection that breaks, of TLS or not
            if self.ticket:
                self.server.service.take_back(self.ticket)

    def handle_one_request(self) -> None:
        """Read one request and answer it, in one write."""
        start = self.rfile.peek(1)
        if not start and self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise ConnectionResetError  # TCP: the peer had closed, and reset when the reply came
        self.ticket = None
        self.server.mark(self.request, time.monotonic() + REQUEST_PATIENCE_S)
        plain = PLAIN_REQUEST(start)
        if plain and len(start) >= plain.end() + int(plain[2]):
            self.close_connection, self.command, self.path = False, "POST", plain[1].decode()
            self._answer(self.rfile.read(plain.end() + int(plain[2]))[plain.end():])
        else:
            try:
                if self._read_head():
                    self._answer(self._read_body())
            except GipamError as error:
                self.send_error(error.http_status, str(error))

    def _answer(self, body: bytes) -> None:
        self.server.mark(self.request, BUSY)
        self.server.silent.discard(self.request)
        self._send(dispatch(self.server.service, self.command, self.path, body,
                            self.server.is_public))
        self.server.mark(self.request, IDLE)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not a request, and close: nobody knows where the next one begins."""
        self.close_connection = True
        error = InvalidRequest(message or http.HTTPStatus(code).phrase, code)
        log.warning("refused %r from %s: %s", self.raw_requestline[:MAX_TEXT_CHARS],
                    self.address_string(), error)
        self._send(refuse(error))

    def _send(self, reply: Reply) -> None:
        self.ticket = reply.ticket
        self.close_connection |= self.server.is_retiring
        close = "Connection: close\r\n" if self.close_connection else ""
        head = (f"HTTP/1.1 {reply.status} {http.HTTPStatus(reply.status).phrase}\r\n"
                f"Content-Type: {reply.content_type}\r\n"
                f"Content-Length: {len(reply.body)}\r\n{close}\r\n")
        self.connection.sendall(head.encode() + (b"" if self.command == "HEAD" else reply.body))

    def _read_head(self) -> bool:
        """Read the head; return False at the end, and when it was refused. Raises: Forbidden."""
        for _ in range(2):  # an empty line may come before (RFC 9112 section 2.2)
            self.raw_requestline = self.rfile.readline(MAX_LINE_BYTES + 1)
            if self.raw_requestline not in (b"\r\n", b"\n"):
                break
        is_long = len(self.raw_requestline) > MAX_LINE_BYTES
        if is_long or (self.raw_requestline and not str(self.raw_requestline, "latin-1").strip()):
            self.send_error(414 if is_long else 400)  # of blanks, parse_request() says nothing
            return False
        is_read = self.parse_request()  # of nothing: False, and it closes
        if is_read and self.server.address_family != socket.AF_UNIX and not self.server.is_public \
                and ("Origin" in self.headers or "Sec-Fetch-Site" in self.headers):
            raise Forbidden("requests from web pages are not served")  # but they reach loopback
        return is_read

    def _read_body(self) -> bytes:
        """Return the body: Content-Length bytes, or chunks. Raises: InvalidRequest."""
        lengths = self.headers.get_all("Content-Length", [])
        coding = self.headers.get("Transfer-Encoding")
        if coding is None:
            length = ", ".join(text.strip() for text in lengths or ["0"])
            if not re.fullmatch("[0-9]{1,19}", length):
                raise InvalidRequest(f"Content-Length is not one number: {length}")
            return self._read_exactly(int(length), 0)
        if coding.lower() != "chunked" or lengths:
            raise InvalidRequest("Transfer-Encoding is served only as chunked, "
                                 "without Content-Length")
        body, size = b"", 1
        while size:  # RFC 9112 section 7.1
            text = self._read_line().split(b";")[0].strip()
            if not re.fullmatch(b"[0-9A-Fa-f]{1,8}", text):
                raise InvalidRequest(f"{text!r} is not the size of a chunk")
            size = int(text, 16)
            body += self._read_exactly(size, len(body))
            while self._read_line().strip():  # the end of the chunk, or the trailer
                if size:
                    raise InvalidRequest("a chunk is longer than its size")
        return body

    def _read_line(self) -> bytes:
        line = self.rfile.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise InvalidRequest("the chunked body ends early, or has a line too long")
        return line

    def _read_exactly(self, length: int, before: int) -> bytes:
        if before + length > MAX_BODY_BYTES:
            raise InvalidRequest(f"the body is longer than {MAX_BODY_BYTES} bytes", 413)
        body = self.rfile.read(length)
        if len(body) < length:
            raise InvalidRequest(f"the body ends after {len(body)} of {length} bytes")
        return body


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The plugin on TCP, a thread a connection; HTTPServer would look up the host's name."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = BACKLOG
    is_public = False  # whether only pages are served, to whoever may reach the address
    is_retiring = False  # whether each reply is the last of its connection
    is_kept = False  # whether the service manager keeps the socket, for the next process

    def __init__(self, address: Any, service: Service, listener: socket.socket | None = None,
                 tls: ssl.SSLContext | None = None) -> None:
        self.service, self.tls = service, tls
        self.connections: dict[Any, float] = {}  # -> IDLE, BUSY or when its request is due
        self.silent: set[Any] = set()  # connections that no request has come from yet
        self.retired: set[Any] = set()  # connections that stay open, half, to the end of drain()
        self.is_changed = threading.Condition()
        if isinstance(address, tuple):
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler, bind_and_activate=listener is None)
        if listener:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()

    def server_bind(self) -> None:
        """Bind. Raises: OSError that names the address."""
        try:
            super().server_bind()
        except OSError as error:
            raise OSError(error.errno, error.strerror, format_place(self.server_address)) from None

    def get_request(self) -> Any:
        """Accept; a TLS handshake is left to the connection's thread, where it holds nobody up."""
        request, client_address = super().get_request()
        if self.tls:
            request = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, client_address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count the connection in, and serve it in a thread."""
        if self.address_family != socket.AF_UNIX:  # Nagle's algorithm could hold a reply for 40 ms
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.reap(MAX_TCP_CONNECTIONS - 1)
        with self.is_changed:
            self.connections[request] = time.monotonic() + REQUEST_PATIENCE_S if self.tls else IDLE
            self.silent.add(request)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, then serve."""
        if self.tls:
            try:
                request.do_handshake()
            except OSError as error:
                log.warning("refused TLS peer %s: %s", client_address[0], error)
                return
            self.mark(request, IDLE)
        super().finish_request(request, client_address)

    def mark(self, request: Any, state: float) -> None:
        """Note what a connection on TCP does; the one that has done it longest stands first."""
        if self.address_family != socket.AF_UNIX:
            with self.is_changed:
                if self.connections.pop(request, None) is not None:
                    self.connections[request] = state

    def reap(self, limit: int) -> None:
        """On TCP, end connections that are overdue, and the longest idle ones past the limit."""
        with self.is_changed:
            surplus, now = len(self.connections) - limit, time.monotonic()
            for request, state in list(self.connections.items()):
                if state != BUSY and (IDLE < state < now or surplus > 0):
                    surplus -= 1
                    self._end(request, socket.SHUT_RDWR)

    def _end(self, request: Any, how: int) -> None:
        with contextlib.suppress(OSError):  # the peer is gone already
            socket.socket.shutdown(request, how)  # of TLS too: the bytes below it

    def shutdown_request(self, request: Any) -> None:
        """Count the connection out, and end it."""
        with self.is_changed:
            self.connections.pop(request, None)
            self.silent.discard(request)
            self.is_changed.notify_all()
        if request not in self.retired:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection."""
        log.error("connection failed", exc_info=sys.exc_info())

    def retire(self) -> None:
        """End the kept connections while somebody still listens.

        Go's HTTP client that cannot write to one dials at once, with the body at hand. Not so on a
        connection that it has just dialled, nor when it sees one end while it takes it up
        (golang/go#22158): there dockerd's own retry comes, without the body (protocol.md 2.3). So
        silent ones are left alone, and on a UNIX socket the others only shut for reading; the
        service manager keeps them until dockerd hangs up.
        """
        self.is_retiring = True
        with self.is_changed:
            retired = self.connections.keys() - self.silent
            for request in retired:
                self._end(request, socket.SHUT_RD)  # it reads what is there, then the end
            if self.address_family != socket.AF_UNIX:
                return  # its peer notices nothing until the end
            self.retired |= retired
            for request in retired if self.is_kept else ():
                notify("FDSTORE=1\nFDNAME=retired", [request.fileno()])

    def drain(self) -> None:
        """Answer those in the backlog too, then close. serve_forever() must have ended.

        Whoever dials later is refused, and dials again with its whole body; or waits in the socket
        that the service manager keeps, as the backlog then does too.
        """
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # at the latest: nobody is left in it
            while not self.is_kept:
                self.process_request(*self.get_request())
        with self.is_changed:
            self.is_changed.wait_for(lambda: not self.silent, DIAL_PATIENCE_S)
            self.silent.clear()
            self.retire()
            self.is_changed.wait_for(lambda: not self.connections, DRAIN_PATIENCE_S)
        self.server_close()
        for request in self.retired:
            request.close()


class UnixServer(Server):
    """The plugin on a UNIX socket."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind, for root only. Raises: OSError."""
        super().server_bind()
        os.chmod(self.socket.getsockname(), 0o600)


def listen(kind: type[Server], address: Any, service: Service,
           tls: ssl.SSLContext | None = None) -> Server:
    """Listen; the service manager keeps the socket, so that a restart never refuses Docker."""
    listener = take_listener(address)
    if listener is None and isinstance(address, str):
        clear_path(address)
    server = kind(address, service, listener, tls)
    server.is_kept = listener is not None or "FDSTORE" in os.environ
    if "FDSTORE" in os.environ:
        notify(f"FDSTORE=1\nFDNAME={FD_NAME}", [server.socket.fileno()])
    return server


def take_listener(address: Any) -> socket.socket | None:
    """Return the socket for the address that the service manager handed over (sd_listen_fds(3)).

    It may come twice, from a socket unit and from the store: the copy is closed, never shut down,
    which would end both. One for another address, kept from before a change of options, is given
    back, and its name goes: it must not look alive.
    """
    found = None
    is_for_us = os.environ.get("LISTEN_PID") == str(os.getpid())
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for at in range(int(os.environ.get("LISTEN_FDS", "0")) if is_for_us else 0):
        listener = socket.socket(fileno=3 + at)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.close()  # a retired connection, which the store keeps
            continue
        bound = listener.getsockname()
        is_ours = (bound == address and os.path.exists(bound)) if isinstance(address, str) \
            else bound[:2] == address
        if is_ours and found is None:
            listener.setblocking(True)
            found = listener
            continue
        listener.close()
        if not is_ours and names[at:at + 1] == [FD_NAME]:
            notify(f"FDSTOREREMOVE=1\nFDNAME={FD_NAME}")
            if isinstance(bound, str) and os.path.lexists(bound):
                os.unlink(bound)
    return found


def clear_path(path: str) -> None:
    """Make the directory of a socket or link, remove a dead one. Raises: GipamError, OSError."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISSOCK(mode) and not stat.S_ISLNK(mode):
        raise ConfigError(f"{path} is in the way and is not a socket: "
                          "remove it, or use another name")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise BusyError(f"another daemon answers on {path}: stop it, or use another name")
    os.unlink(path)


def notify(state: str, fds: list[int] | None = None) -> None:
    """Tell the service manager, if there is one. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, \
                contextlib.suppress(OSError):  # a manager that is gone is no reason not to serve
            manager.connect(re.sub("^@", "\0", address))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            manager.sendmsg([state.encode()], rights)


def open_unix(config: Config, service: Service, remove: Callable[[str], None]) -> Server:
    """Listen on the socket, and show Docker where it is. Raises: GipamError, OSError."""
    server = listen(UnixServer, config.socket, service)
    if not server.is_kept:
        remove(config.socket)
    link = os.path.join(PLUGIN_SOCKET_DIR, os.path.basename(config.socket))
    if config.socket != link:
        try:
            if os.path.islink(link) and os.readlink(link) == config.socket:
                os.unlink(link)  # ours: else it would pass for another daemon
            clear_path(link)
            os.symlink(config.socket, link)
            if "FDSTORE" not in os.environ:
                remove(link)
        except PermissionError:
            if not config.is_spec_given:  # rootless Docker finds the socket by its plugin file
                raise
    if config.is_spec_given:
        write_spec(config.spec, f"unix://{config.socket}\n", remove)
    return server


def open_tcp(config: Config, service: Service, remove: Callable[[str], None]) -> Server:
    """Listen on the address, and write the plugin file. Raises: GipamError, OSError."""
    server = listen(Server, config.address, service, load_tls(config.tls, is_server=True))
    address, stem = format_place(server.server_address), os.path.splitext(config.spec)[0]
    shadows = {os.path.join(PLUGIN_SOCKET_DIR, os.path.basename(stem) + ".sock"): clear_path}
    path, text = config.spec, f"tcp://{address}\n"
    if config.tls:
        shadows[path] = os.unlink
        files = {key: os.path.join(config.tls, name) for key, name in
                 (("CAFile", "ca.pem"), ("CertFile", "cert.pem"), ("KeyFile", "key.pem"))}
        path = stem + ".json"
        text = json.dumps({"Addr": f"https://{address}", "TLSConfig": files}) + "\n"
    for shadow, clear in shadows.items():
        if os.path.lexists(shadow):
            clear(shadow)
            log.warning("removed %s, which hid %s; restart dockerd if it has used it", shadow, path)
    write_spec(path, text, remove)
    return server


def write_spec(path: str, text: str, remove: Callable[[str], None]) -> None:
    """Write the plugin file, whole or not at all; it goes at the end. Raises: OSError."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8",
              opener=lambda path, _: os.open(path, CREATE, 0o600)) as file:
        file.write(text)
    os.replace(path + ".tmp", path)
    remove(path)


def load_tls(directory: str, is_server: bool) -> ssl.SSLContext | None:
    """Return what both sides need: TLS 1.2, a certificate, and the other's. Raises: ConfigError."""
    if not directory:
        return None
    stem = "server-" if is_server else ""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(os.path.join(directory, "ca.pem"))
        context.load_cert_chain(os.path.join(directory, f"{stem}cert.pem"),
                                os.path.join(directory, f"{stem}key.pem"))
    except OSError as error:
        raise ConfigError(f"-tls {directory!r}: cannot use ca.pem, {stem}cert.pem and "
                          f"{stem}key.pem in it: {error}") from None
    return context


# === Docker =======================================================================================


class Connection(http.client.HTTPConnection):
    """HTTP to Docker or to our own daemon: at the path of a socket, or at (host, port)."""

    def __init__(self, address: Any, timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        host, port = address if isinstance(address, tuple) else ("localhost", None)
        super().__init__(host, port, timeout=timeout_s)
        self._address, self._tls = address, tls

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


def call(connection: http.client.HTTPConnection, verb: str, path: str, body: Any = None) -> Any:
    """Return the JSON reply. Raises: Unreachable; Refused with the text of the other side."""
    try:
        connection.request(verb, path, dumps(body) if body else None)
        response = connection.getresponse()
        reply = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"no answer to {verb} {path}: {error}") from None
    finally:
        connection.close()  # the next call connects again
    if response.status != 200:
        text = (reply.get("Error") or reply.get("message")) if isinstance(reply, dict) else reply
        raise Refused(f"{verb} {path}: {text}")
    return reply


def docker_socket() -> str:
    """Return where Docker listens. Raises: Unreachable for a Docker on another host."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not host.startswith("unix://"):
        raise Unreachable(
            f"DOCKER_HOST {host!r} is not a UNIX socket (unix:///...): gipam serves the Docker of "
            "its own host, and to another one everything would look leaked")
    return host[7:]


def hint_of(subnet: str) -> str:
    """Return the size hint that asks for any block of this length."""
    return f"{'::' if ':' in subnet else '0.0.0.0'}/{subnet.partition('/')[2]}"  # noqa: S104


class Claim(NamedTuple):
    """What Docker uses: a subnet (address ""), or an address in it."""

    driver: str | None
    network: str  # name
    identity: str  # new whenever Docker makes the network or the endpoint anew
    subnet: str
    sub_pool: str
    address: str = ""  # bare
    kind: str = "pool"
    mac: str = ""
    name: str = ""  # of the container

    @property
    def key(self) -> tuple[str, str]:
        """Return what tells pools apart."""
        return self.subnet, self.sub_pool

    @property
    def is_pool(self) -> bool:
        """Return whether it is a subnet, not only the length asked for (Docker < 29 shows that)."""
        return not self.address and self.subnet != hint_of(self.subnet)

    def __str__(self) -> str:
        return f"container {self.name}" if self.name else f"network {self.network}"


def is_inside(address: str, subnet: str) -> bool:
    """Return whether the bare address lies in the subnet, and there is one."""
    return bool(subnet) and ipaddress.ip_address(address) in parse_prefix(subnet)


def normalise_address(text: str) -> str:
    """Return an address as gipam spells it; Docker shows what the user typed, or a CIDR."""
    address = ipaddress.ip_address(text.partition("/")[0])
    return format_address(int(address), address.version)


def read_claims(path: str, driver: str, timeout_s: float = 60.0) -> tuple[list[Claim], list[Claim]]:
    """Return (what Docker uses of this driver, the subnets of others). Raises: Unreachable."""
    end = time.monotonic() + timeout_s

    def get(target: str) -> Any:
        return call(Connection(path, max(end - time.monotonic(), 0.001)), "GET", target)

    try:
        networks, containers = get("/networks"), get("/containers/json?all=1")
        networks = [get(f"/networks/{network['Id']}")  # the list leaves the IPAM of such a one out
                    if (network.get("ConfigFrom") or {}).get("Network") else network
                    for network in networks]
        return find_claims(networks, containers, driver)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unreachable(f"the Docker at {path} answers what gipam does not understand: "
                          f"{error!r}") from error


def find_claims(networks: list[Json], containers: list[Json],
                driver: str) -> tuple[list[Claim], list[Claim]]:
    """Return (the claims of our networks and of containers in them, the subnets of others)."""
    claims = [claim for network in networks for claim in claim_network(network)]
    foreign = [claim for claim in claims if claim.driver != driver and not claim.address]
    claims = [claim for claim in claims if claim.driver == driver]
    subnets: dict[str, list[Claim]] = {}  # of our networks, by id
    for claim in claims:
        if not claim.address:
            subnets.setdefault(claim.identity, []).append(claim)
    for container in containers:
        claims += claim_container(container, subnets)
    known = {(claim.identity, hint_of(claim.subnet)) for claim in claims if claim.is_pool}
    return [claim for claim in claims if (claim.identity, claim.subnet) not in known], foreign


def claim_network(network: Json) -> Iterator[Claim]:
    """Yield the claims of a network: subnets, gateways and auxiliary addresses."""
    ipam = network.get("IPAM") or {}
    for config in ipam.get("Config") or []:
        family = "EnableIPv6" if ":" in config.get("Subnet", "") else "EnableIPv4"
        if not config.get("Subnet") or network.get("ConfigOnly") or not network.get(family, True):
            continue  # it is shown, but was never asked for
        subnet, sub_pool = (str(parse_prefix(config[key], mask=True)) if config.get(key) else ""
                            for key in ("Subnet", "IPRange"))
        claim = Claim(ipam.get("Driver"), network["Name"], network["Id"], subnet, sub_pool)
        yield claim
        if config.get("Gateway"):
            yield claim._replace(address=normalise_address(config["Gateway"]), kind=GATEWAY)
        for address in (config.get("AuxiliaryAddresses") or {}).values():
            yield claim._replace(address=normalise_address(address), kind=AUXILIARY)


def claim_container(container: Json, subnets: dict[str, list[Claim]]) -> Iterator[Claim]:
    """Yield the claims of a container in the networks with these subnets, by id; and to gateways.

    Of a network made with a size hint, Docker < 29 shows only 0.0.0.0/26; these show its subnet.
    """
    if container.get("State") not in ("running", "paused", "restarting"):
        return  # after a crash of dockerd, or a failed start, what it had is still shown
    name = (container.get("Names") or ["/" + container["Id"][:12]])[0][1:]
    for endpoint in ((container.get("NetworkSettings") or {}).get("Networks") or {}).values():
        pools = subnets.get(endpoint.get("NetworkID"))
        for keys in (("IPAddress", "IPPrefixLen", "Gateway"),
                     ("GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway")):
            address, length, gateway = (endpoint.get(key) or "" for key in keys)
            if not pools or not address:
                continue
            subnet = str(parse_prefix(f"{address}/{length}", mask=True))
            hint = hint_of(subnet)
            hinted = [pool._replace(subnet=subnet) for pool in pools if pool.subnet == hint]
            home = next((pool for pool in (*pools, *hinted) if is_inside(address, pool.subnet)),
                        pools[0]._replace(subnet="", sub_pool=""))
            if home in hinted:
                yield home
            if gateway and is_inside(gateway, home.subnet):
                yield home._replace(address=normalise_address(gateway), kind=GATEWAY,
                                    identity="gateway of " + home.identity)
            yield home._replace(address=normalise_address(address), kind=ENDPOINT, name=name,
                                mac=endpoint.get("MacAddress") or "",
                                identity=endpoint.get("EndpointID") or container["Id"])


class Finding(NamedTuple):
    """A difference between gipam and Docker, and the request that mends it."""

    kind: str
    identity: Any  # the same as long as this difference lasts
    text: str
    path: str = ""  # "": gipam cannot mend it
    body: Any = None


def release_body(pool: Json, lease: Json | None = None) -> Json:
    """Return what /Gipam.Release takes of a pool, or of a lease in it."""
    held = lease or pool
    return {"PoolID": pool["id"], "Address": held.get("address", ""), "Seq": held["seq"]}


def adopt_body(pool: Claim, uses: list[Claim], seq: int) -> Json:
    """Return what /Gipam.Adopt takes; seq is that of the pool."""
    leases = [{"Address": use.address, "Kind": use.kind, "MAC": use.mac, "Name": use.name}
              for use in uses]
    return {"Subnet": pool.subnet, "SubPool": pool.sub_pool, "Leases": leases, "Seq": seq}


def group_uses(claims: list[Claim]) -> Iterator[tuple[Claim, list[Claim]]]:
    """Yield each pool with the claims to its addresses, the first to each, and one to a gateway.

    Docker does not show the gateway of a network with a --subnet and no --gateway. It then is the
    first address that was free (in the claim ""), and must not become a container's.
    """
    uses: dict[tuple[str, str], dict[str, Claim]] = {}
    for claim in claims:
        if claim.address:
            uses.setdefault(claim.key, {}).setdefault(claim.address, claim)
    for key, pool in {claim.key: claim for claim in claims if claim.is_pool}.items():
        found = list(uses.get(key, {}).values())
        has_gateway = any(use.kind == GATEWAY for use in found)
        yield pool, found if has_gateway else [*found, pool._replace(kind=GATEWAY)]


def find_leaks(status: Json, claims: list[Claim], until_s: float) -> Iterator[Finding]:
    """Yield what gipam holds, granted until that time, and Docker does not use."""
    claimed = {claim.key: claim for claim in claims if not claim.address}
    used = {(claim.subnet, claim.address) for claim in claims}
    shown = {claim._replace(address="", kind="pool") for claim in claims if claim.kind == GATEWAY}
    for pool in status["pools"]:
        key = (pool["subnet"], pool["sub_pool"])
        if key not in claimed:
            if (hint_of(key[0]), "") not in claimed and pool["granted_s"] <= until_s:
                yield Finding("leaked_pool", (pool["id"], pool["seq"]),
                              f"subnet {' range '.join(filter(None, key))} is held with "
                              f"{pool['leases']} addresses, but no network has it",
                              "/Gipam.Release", release_body(pool))
            continue
        for lease in pool["addresses"]:
            address, owner = lease["address"], lease["name"] or lease["mac"] or lease["kind"]
            is_hidden = lease["kind"] == GATEWAY and claimed[key] not in shown
            if not is_hidden and (key[0], address) not in used and lease["granted_s"] <= until_s:
                yield Finding("leaked_address", (pool["id"], address, lease["seq"]), f"address "
                              f"{address} of network {claimed[key].network} is held for {owner}, "
                              "but nothing has it", "/Gipam.Release", release_body(pool, lease))


def find_missing(status: Json, claims: list[Claim]) -> Iterator[Finding]:
    """Yield what Docker uses and gipam does not hold, or holds only once."""
    pools = {(pool["subnet"], pool["sub_pool"]): pool for pool in status["pools"]}
    held = {(pool["subnet"], lease["address"])
            for pool in status["pools"] for lease in pool["addresses"]}
    for claim, uses in group_uses(claims):
        if claim.key not in pools:
            yield Finding("missing_pool", claim, f"subnet {claim.subnet} of {claim} is not held: "
                          "another network could get it",
                          "/Gipam.Adopt", adopt_body(claim, uses, 0))
    users: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        if claim.address:
            users.setdefault((claim.subnet, claim.address), []).append(claim)
    for key, sharers in users.items():
        claim, what = sharers[0], f"address {key[1]}"
        if not claim.subnet:
            yield Finding("address_outside", claim, f"{what} of {claim} is in no subnet of network "
                          f"{claim.network}: make the network anew")
        elif key not in held and claim.key in pools:
            yield Finding("missing_address", claim,
                          f"{what} of {claim} is not held: another container could get it",
                          "/Gipam.Adopt", adopt_body(claim, [claim], pools[claim.key]["seq"]))
        holders = {sharer.identity: str(sharer) for sharer in sharers if sharer.kind == ENDPOINT}
        if len(holders) > 1:
            yield Finding("address_twice", (what, *sorted(holders)), f"{what} is in "
                          f"{' and '.join(holders.values())}: restart one of them")


def compare(status: Json, claims: list[Claim], foreign: list[Claim],
            until_s: float) -> dict[Any, Finding]:
    """Return all that differs, and where subnets of other drivers overlap, by kind and identity."""
    found = [*find_leaks(status, claims, until_s), *find_missing(status, claims)]
    pools = [(pool["id"], parse_prefix(pool["subnet"])) for pool in status["pools"] if foreign]
    for claim in foreign:
        prefix = parse_prefix(claim.subnet)
        found += [Finding("overlap", (claim.identity, pool_id), f"subnet {prefix} of network "
                          f"{claim.network}, of another IPAM driver, overlaps {subnet} of ours: "
                          "remove one of the two networks")
                  for pool_id, subnet in pools if prefix.overlaps(subnet)]
    return {finding[:2]: finding for finding in found}


def find_differences(read_status: Callable[[], Json], path: str, driver: str,
                     grace_s: int) -> dict[Any, Finding]:
    """Compare gipam with Docker until no passing difference can be left. Raises: Unreachable.

    A round reads gipam, Docker, gipam, and keeps what both readings show. What is left is looked at
    again a moment later, for Docker shows a container that stops before it releases its address.
    """
    found: dict[Any, Finding] = {}
    for pause_s in (0.0, CHECK_PAUSE_S):
        time.sleep(pause_s)
        before, until_s = read_status(), int(time.time()) - grace_s
        docker = read_claims(path, driver)
        first = compare(before, *docker, until_s)
        again = compare(read_status(), *docker, until_s) if first else {}
        kept = again.keys() & (found or again).keys()
        found = {key: finding for key, finding in first.items() if key in kept}
        if not found:
            break
    return found


def release_surplus(status: Json, claims: list[Claim], adopted: set[int],
                    release: Callable[[Json], Any]) -> None:
    """Release what was adopted, and let go by Docker before gipam held it: nobody claims it."""
    for finding in find_leaks(status, claims, time.time()):
        if finding.body["Seq"] in adopted:
            with contextlib.suppress(Forbidden, Refused):  # Docker has just released it itself
                release(finding.body)


def take_over(service: Service, driver: str, timeout_s: float) -> None:
    """Adopt all that Docker uses of this driver. Raises: Unreachable; what is adopted stays so."""
    path, end = docker_socket(), time.monotonic() + timeout_s
    for claim, uses in group_uses(read_claims(path, driver, timeout_s)[0]):
        subnet = parse_prefix(claim.subnet)
        sub_pool = parse_prefix(claim.sub_pool) if claim.sub_pool else None
        requests = [AddressRequest(use.address, use.kind, use.mac, use.name) for use in uses]
        try:
            done = service.adopt(subnet, sub_pool, requests)
            service.adopted.update(done)
            if done:
                log.warning("took over subnet %s of %s with %d addresses from Docker",
                            subnet, claim, len(requests))
        except GipamError as error:
            log.error("cannot take over subnet %s of %s from Docker: %s", subnet, claim, error)
    if service.adopted:
        claims, _ = read_claims(path, driver, max(end - time.monotonic(), 0.001))
        release_surplus(service.status(has_leases=True), claims, service.adopted, lambda body: (
            service.release_if(body["PoolID"], body["Address"], body["Seq"])))
        service.adopted.clear()
    service.import_is_due.clear()
    service.fold()  # Docker need not be asked again


def is_docker_alive() -> bool:
    """Return whether Docker's pid file names a process that lives."""
    try:
        with open("/var/run/docker.pid", encoding="ascii") as file:
            os.kill(int(file.read()), 0)
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)
    return True


def take_over_when_due(service: Service, driver: str) -> None:
    """Wait until the state is not to be trusted, then until Docker answers; for ever, in a thread.

    Never in a request: Docker may be waiting for gipam (protocol.md 3.5).
    """
    while service.import_is_due.wait():
        try:
            take_over(service, driver, timeout_s=60.0)
        except GipamError:  # Docker does not answer yet, or the disk is full
            time.sleep(IMPORT_PAUSE_S)


# === Commands =====================================================================================


BOOLEANS = {**dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
            **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False)}


def parse_bool(text: str) -> bool:
    """Return a boolean as Go's strconv.ParseBool reads it. Raises: ValueError."""
    if text not in BOOLEANS:
        raise ValueError("not a boolean, such as true or false")
    return BOOLEANS[text]


def parse_number(text: str) -> int:
    """Return a number of at most three decimal digits. Raises: ValueError."""
    if not re.fullmatch("[0-9]{1,3}", text):
        raise ValueError("not a prefix length in bits, such as 24")
    return int(text)


def parse_prefixes(text: str) -> list[Network]:
    """Return the prefixes of a list with commas. Raises: ValueError."""
    return [parse_prefix(part.strip()) for part in text.split(",")] if text else []


def parse_path(text: str) -> str:
    """Return the path of a file to be, its directory absolute and without symbolic links."""
    directory, name = os.path.split(text)
    if not name or "\0" in text:
        raise ValueError("not the path of a file")
    return os.path.join(os.path.realpath(directory), name)


def parse_directory(text: str) -> str:
    """Return the absolute path of a directory that is there, "" for none. Raises: ValueError."""
    if text not in ("", "off") and not os.path.isdir(text):
        raise ValueError("there is no such directory")
    return "" if text in ("", "off") else os.path.realpath(text)


def parse_listen(text: str) -> tuple[str, int]:
    """Return (host, port), without a host the loopback one. Raises: ValueError."""
    match = re.fullmatch(r"\[?([^\[\]]*?)\]?:([0-9]{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise ValueError("not HOST:PORT, such as 127.0.0.1:9090")
    host = "127.0.0.1" if match[1] in ("", "localhost") else match[1]
    return str(ipaddress.ip_address(host)), int(match[2])


Config = argparse.Namespace  # all options under their names, parsed; and what build_config() adds
Settings = Dict[str, "Setting"]  # all options under their names, as text


class Option(NamedTuple):
    """An option: the flag -name, the variable GIPAM_NAME, and what is checked of the text."""

    name: str
    parse: Callable[[str], Any]
    default: str
    metavar: str
    help: str

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return "GIPAM_" + self.name.upper()


OPTIONS = (
    Option("unix", parse_bool, "false", "BOOL", "serve on a UNIX socket instead of TCP"),
    Option("address", parse_listen, ":9090", "HOST:PORT",
           "TCP address, without HOST on loopback; elsewhere with -tls"),
    Option("file", parse_path, "leases.json", "FILE", "lease file"),
    Option("v6", parse_prefixes, "", "PREFIXES", "IPv6 bases, separated by commas, used in order"),
    Option("v4", parse_prefixes, "", "PREFIXES", "IPv4 bases, likewise"),
    Option("v6ab", parse_number, "64", "BITS", "prefix length of a network's IPv6 block"),
    Option("v4ab", parse_number, "24", "BITS", "prefix length of a network's IPv4 block"),
    Option("exclude", parse_prefixes, "", "PREFIXES",
           "prefixes in the bases that are never handed out"),
    Option("socket", parse_path, PLUGIN_SOCKET_DIR + "/gipam.sock", "PATH",
           "socket; its base name names the driver"),
    Option("spec", parse_path, "/etc/docker/plugins/gipam.spec", "PATH",
           "plugin file of TCP mode; likewise"),
    Option("metrics", lambda text: None if text in ("", "off") else parse_listen(text), "off",
           "HOST:PORT", "address for GET /metrics, /healthz and /status"),
    Option("tls", parse_directory, "off", "DIR", "certificates for TCP: ca.pem, server-cert.pem, "
           "server-key.pem; for dockerd cert.pem, key.pem"),
)


class Setting(NamedTuple):
    """The text of an option, and where it comes from."""

    option: Option
    text: str
    origin: str
    given: str | None = None  # the text of the first two stages, None: only the default

    def error(self, rule: object) -> ConfigError:
        """Return the error that names all three, and the rule that the text breaks."""
        return ConfigError(f"-{self.option.name} {self.text!r} from the {self.origin}: {rule}")

    def parse(self) -> Any:
        """Return the value. Raises: ConfigError."""
        try:
            return self.option.parse(self.text)
        except ValueError as error:
            raise self.error(error) from None


def read_settings(environment: Mapping[str, str], arguments: argparse.Namespace) -> Settings:
    """Return the first two stages: command line over environment over default."""
    settings = {}
    for option in OPTIONS:
        given, origin = None, "default"
        if option.variable in environment:
            given, origin = environment[option.variable], f"environment ({option.variable})"
        if hasattr(arguments, option.name):
            given, origin = getattr(arguments, option.name), "command line"
        text = option.default if given is None else given
        settings[option.name] = Setting(option, text, origin, given)
    return settings


def overrule_settings(settings: Settings, document: Json, path: str) -> None:
    """Add the lease file, the third stage: what was changed last wins; say what has changed.

    Its key Options has, for each option, what gipam wrote into the file and what was given then.
    """
    notes = document.get("Options")
    for name, key in FILE_KEYS.items():
        option, text, origin, given = settings[name]
        found = str(document.get(key) or "")
        note = notes.get(name) if isinstance(notes, dict) else None
        written, noted = note if isinstance(note, list) and len(note) == 2 else (None, given)
        is_edited = note is not None and found != written
        if not is_edited and given not in (None, noted):
            if text != found:
                log.warning("-%s changes from %r in the lease file %s to %r from the %s: pools "
                            "that are held stay", name, found, path, text, origin)
        elif found:
            settings[name] = Setting(option, found, f"lease file ({key} in {path})", given)
            if is_edited:
                log.warning("%s has been edited in %s, from %r to %r", key, path, written, found)
            if given not in (None, found):
                log.warning("-%s is %r as the lease file %s says, not %r as the %s does: the lease "
                            "file wins; to change it, edit %s there or give -%s a new value",
                            name, found, path, text, origin, key, name)
            elif given is None and noted is not None:
                log.warning("-%s is not given any more and stays %r, as the lease file %s says; "
                            "to change it, give it another value", name, found, path)


def config_keys(settings: Settings) -> Json:
    """Return the settings as the lease file has them, and what overrule_settings() needs later."""
    chosen = {name: settings[name] for name in FILE_KEYS}
    keys: Json = {FILE_KEYS[name]: int(setting.text) if setting.text.isdecimal() else setting.text
                  for name, setting in chosen.items()}
    return {**keys, "Options": {name: [setting.text, setting.given]
                                for name, setting in chosen.items()}}


def find_driver(settings: Settings) -> str:
    """Return the driver's name to Docker: the base name of the socket or the plugin file."""
    path: str = settings["socket" if settings["unix"].parse() else "spec"].parse()
    return os.path.splitext(os.path.basename(path))[0]


def describe_daemon(settings: Settings, place: Any) -> Json:
    """Return what /status tells of a daemon that listens there, "" without one; no passwords."""
    shown = {}
    for name, setting in settings.items():
        text = str(setting.parse()) if setting.option.parse is parse_path else setting.text
        shown[name] = {"value": re.sub("//[^/@,]*@", "//***@", text), "origin": setting.origin}
    return {"driver": find_driver(settings), "listening": format_place(place), "config": shown}


def build_config(settings: Settings) -> Config:
    """Parse and check all options. Raises: ConfigError."""
    config = Config(**{name: setting.parse() for name, setting in settings.items()})
    config.is_spec_given = settings["spec"].origin != "default"
    config.driver = find_driver(settings)
    config.families = ((6, config.v6, config.v6ab), (4, config.v4, config.v4ab))
    if not (config.unix or config.tls or ipaddress.ip_address(config.address[0]).is_loopback):
        raise settings["address"].error("not a loopback address: whoever reaches the port could "
                                        "take every address; use -tls")
    for version, bases, prefixlen in reversed(config.families):
        given, block = settings[f"v{version}"], settings[f"v{version}ab"]
        longest = BITS[version] - 1
        if not 1 <= prefixlen <= longest:
            raise block.error(f"not from 1 to {longest}: a block has two addresses or more")
        for at, base in enumerate(bases):
            if base.version != version:
                raise given.error(f"{base} is not an IPv{version} prefix")
            if base.prefixlen > prefixlen:
                raise block.error(f"a block of /{prefixlen} is larger than its base {base}")
            if any(base.overlaps(other) for other in bases[:at]):
                raise given.error(f"{base} overlaps another base")
    for network in config.exclude:
        if not any(base.overlaps(network) and base.prefixlen <= network.prefixlen
                   for base in config.v4 + config.v6):
            raise settings["exclude"].error(f"{network} lies in none of the bases")
    return config


def read_lease_file(store: Store, settings: Settings) -> Json | None:
    """Return the snapshot with its keys as gipam spells them, and let its settings win."""
    document = store.read_snapshot(compact_leases)
    if document is None:
        return None
    document, unknown = normalise_keys(document, FILE_NAMES)
    try:
        pools = [normalise_keys(entry, POOL_KEYS) for entry in document.get("Allocated") or ()]
    except (TypeError, AttributeError):
        raise store.damage(store.path, "has something else than pools in Allocated") from None
    document["Allocated"] = [entry for entry, _ in pools]
    for key in sorted({*unknown, *(key for _, keys in pools for key in keys)}):
        log.warning("unknown key %r in %s: dropped", key, store.path)
    overrule_settings(settings, document, store.path)
    return document


def load(settings: Settings, is_daemon: bool = False) -> tuple[Config, Store, Json | None]:
    """Add the third stage; return the configuration and the lease file, which a daemon locks."""
    store = Store(settings["file"].parse())
    if not os.path.isdir(os.path.dirname(store.path)):
        raise settings["file"]._replace(text=store.path).error("its directory is not there")
    if is_daemon:
        store.lock()
    document = read_lease_file(store, settings)
    return build_config(settings), store, document


def find_daemon(settings: Settings) -> Connection:
    """Return how to call the running daemon, by its socket or its address. Raises: Unreachable."""
    path, tcp, tls_directory = (settings[name].parse() for name in ("socket", "address", "tls"))
    for address, tls in ((path, ""), (tcp, tls_directory)):
        connection = Connection(address, DAEMON_PATIENCE_S, load_tls(tls, is_server=False))
        try:
            with contextlib.suppress(ConnectionError, FileNotFoundError, socket.timeout), \
                    contextlib.closing(connection):
                connection.connect()
                return connection
        except OSError as error:
            raise Unreachable(f"cannot reach the daemon, by {path} or {format_place(tcp)}: "
                              f"{error}") from None
    raise Absent(f"no gipam answers on {path} or {format_place(tcp)}: start it, or say where it is "
                 "with -socket or -address")


def read_status(settings: Settings, has_leases: bool, is_second_look: bool = False) -> Json:
    """Return the status that the daemon gives, or where none runs, what the lease file holds."""
    about = describe_daemon(settings, "?")  # should the daemon be of an earlier version
    try:
        return {**about, **call(find_daemon(settings), "GET", f"/status?leases={int(has_leases)}")}
    except Absent as error:
        config, store, document = load(settings)
        if document is None:
            raise Absent(f"{error}; nor is there a lease file {config.file}") from None
        print(f"gipam: {error}; this is what {config.file} holds", file=sys.stderr)
    state = make_state(config)
    try:
        recover(store, document, state)
    except DamageError:  # perhaps a daemon was just ending, and folded the journal into the file
        if is_second_look:
            raise
        return read_status(settings, has_leases, is_second_look=True)
    return {**describe_daemon(settings, ""), **describe_state(state, has_leases)}


def make_state(config: Config) -> State:
    """Return the empty state of a configuration."""
    return State(Family(version, bases, prefixlen,
                        [network for network in config.exclude if network.version == version])
                 for version, bases, prefixlen in config.families)


def cmd_status(arguments: argparse.Namespace) -> int:
    """Show bases, pools and, with --leases, each lease; or just what is asked for."""
    status = read_status(arguments.settings, arguments.leases or bool(arguments.what))
    claims: list[Claim] = []
    with contextlib.suppress(GipamError):  # names are welcome, and no reason to wait or to fail
        claims = read_claims(docker_socket(), status["driver"], NAMES_PATIENCE_S)[0]
    add_names(status["pools"], claims)
    if arguments.what:
        status.update(bases=[], pools=select(status["pools"], arguments.what))
    if arguments.json:
        print(json.dumps(status, indent=2))
        return 0
    is_terminal = sys.stdout.isatty()
    has_colour = is_terminal and "NO_COLOR" not in os.environ
    width = max(shutil.get_terminal_size().columns, 40) if is_terminal else 80
    for line in render_status(status, width, int(time.time())):
        is_map = has_colour and line.startswith("  ")
        print(re.sub("[#+]+", "\033[33m\\g<0>\033[0m", line) if is_map else line)
    return 0


def add_names(pools: list[Json], claims: list[Claim]) -> None:
    """Put pools and leases in order of address; name network and container, where Docker does."""
    networks = {claim.key: claim.network for claim in claims if not claim.address}
    containers = {(claim.subnet, claim.address): claim.name for claim in claims}
    pools.sort(key=lambda pool: ipaddress.get_mixed_type_key(
        parse_prefix(pool["sub_pool"] or pool["subnet"])))
    for pool in pools:
        pool["network"] = networks.get((pool["subnet"], pool["sub_pool"]), "")
        leases = pool.get("addresses", [])
        leases.sort(key=lambda lease: int(ipaddress.ip_address(lease["address"])))
        for lease in leases:
            lease["container"] = containers.get((pool["subnet"], lease["address"]), "")


def find_pools(pools: list[Json], text: str) -> list[Json]:
    """Return those of an id, a prefix in any spelling, a network of Docker, or a gipam.name."""
    with contextlib.suppress(ValueError):
        text = str(parse_prefix(text, mask=True))
    keys = ("id", "subnet", "sub_pool", "name", "network")
    return [pool for pool in pools if text in map(pool.get, keys)]


def select(pools: list[Json], what: str) -> list[Json]:
    """Return what find_pools() does, or the lease of an address. Raises: InvalidRequest."""
    found = find_pools(pools, what)
    with contextlib.suppress(ValueError):
        address = normalise_address(what)
        found = found or [
            {**pool, "addresses": [held for held in pool["addresses"] if address in held.values()]}
            for pool in pools if is_inside(address, pool["subnet"])]
    if not found:
        raise InvalidRequest(f"{what!r} is no address, subnet or network of a pool that is held")
    return found


def render_status(status: Json, width: int, now_s: int) -> Iterator[str]:
    """Yield the lines of the text form: a bar and a map for each base, a table of the pools."""
    for base in status["bases"]:
        yield from render_base(base, status["pools"], width)
    if status["bases"]:
        legend = "  # held  + partly  . free  x excluded  ~ route, own address  r kept for a name"
        yield legend[:width]
    rows = [("SUBNET", "RANGE", "HELD", "OF", "AGE", "NETWORK")]
    for pool in status["pools"]:
        age = format_age(now_s - pool["granted_s"])
        rows.append((pool["subnet"], pool["sub_pool"] or "-", str(pool["leases"]),
                     format_count(pool["usable"]), age, pool["network"] or pool["name"] or "-"))
        for lease in pool.get("addresses", ()):
            age = format_age(now_s - lease["granted_s"]) if lease["granted_s"] else "?"
            owner = lease["container"] or lease["name"] or lease["mac"] or "-"
            rows.append(("  " + lease["address"], lease["kind"], "", "", age, owner))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows if status["pools"] else ():
        yield "  ".join(map(str.ljust, row, widths)).rstrip()[:width]


def render_base(base: Json, pools: list[Json], width: int) -> Iterator[str]:
    """Yield the lines of a base: a bar, and rows of a map, each behind its first address."""
    prefix, total, used = parse_prefix(base["prefix"]), base["blocks"], base["blocks_used"]
    free = total - used - base["blocks_excluded"] - base.get("blocks_routed", 0)
    bar = ("#" * -(-10 * used // total)).ljust(10, ".")
    yield (f"{prefix}  [{bar}]  {used} of {format_count(total)} blocks of "
           f"/{base['block_prefixlen']} held, {format_count(free)} free")[:width]
    last = int(prefix[-1]) + 1 - prefix.num_addresses // total
    indent = len(format_address(last, prefix.version))
    length = 1 << max(width - indent - 4, 1).bit_length() - 1
    cells = draw_map(base, pools, 4 * length)
    for start in range(0, len(cells), length):
        first = int(prefix[0]) + prefix.num_addresses // len(cells) * start
        label = format_address(first, prefix.version)
        yield f"  {label:{indent}}  {cells[start:start + length]}"


def format_count(count: int) -> str:
    """Return a number, a large one as a power of two that it nearly is."""
    return str(count) if count < 10 ** 9 else f"2^{(count - 1).bit_length()}"


def draw_map(base: Json, pools: list[Json], limit: int) -> str:
    """Return a character for each block of the base, or for each group of 2, 4, 8 … blocks."""
    network, count = parse_prefix(base["prefix"]), base["blocks"]
    while count > limit:
        count //= 2
    size, first = network.num_addresses // count, int(network[0])
    cells, held = ["."] * count, [0] * count
    for mark, texts in (("r", base["remembered"].values()), ("~", base.get("routes", ())),
                        ("x", base["excluded"]), ("+", {pool["subnet"] for pool in pools})):
        for inside in filter(network.overlaps, map(parse_prefix, texts)):
            low = max(int(inside[0]) - first, 0)
            end = min(int(inside[-1]) - first, network.num_addresses - 1) + 1
            for cell in range(low // size, (end - 1) // size + 1):
                cells[cell] = mark
                if mark == "+":
                    held[cell] += min(end, (cell + 1) * size) - max(low, cell * size)
    return "".join("#" if there == size else mark for mark, there in zip(cells, held))


def cmd_check(arguments: argparse.Namespace) -> int:
    """Compare with Docker; with --fix, release what leaked and take over what is missing.

    Exit status 0: no difference; 1: some are left; 2: could not compare.
    """
    settings, path = arguments.settings, docker_socket()
    driver = read_status(settings, has_leases=False)["driver"]
    read_docker = functools.partial(read_claims, path, driver)
    read_gipam = functools.partial(read_status, settings, has_leases=True)
    found = left = find_differences(read_gipam, path, driver, arguments.grace)
    if arguments.fix and found:
        held = {pool["subnet"] for pool in read_gipam()["pools"]}
        if held and not arguments.force \
                and held.isdisjoint(claim.subnet for claim in read_docker()[0]):
            raise Unreachable(f"the Docker at {path} knows none of the pools held: is it the one "
                              "that gipam serves? If so, use --force")
        mend(settings, list(found.values()), read_docker)
        left = find_differences(read_gipam, path, driver, arguments.grace)
    all_found = {**found, **left}
    if arguments.json:
        print(json.dumps({"findings": [
            {"kind": finding.kind, "text": finding.text, "is_fixed": key not in left}
            for key, finding in all_found.items()]}, indent=2))
        return 1 if left else 0
    for key, finding in all_found.items():
        mendable = "; `gipam check --fix` mends it" if finding.path else ""
        print(f"{finding.kind}: {finding.text}{mendable if key in left else '; fixed'}")
    print(f"{len(found)} differences, {len(left)} left" if all_found else "no difference")
    return 1 if left else 0


def mend(settings: Settings, findings: list[Finding],
         read_docker: Callable[[], tuple[list[Claim], list[Claim]]]) -> None:
    """Ask the daemon to mend what it can, unless it has changed since. Raises: Unreachable."""
    daemon = find_daemon(settings)
    adopted: set[int] = set()
    for finding in findings:
        if finding.path:
            try:
                reply = {"Adopted": 0, "Seq": 0, **call(daemon, "POST", finding.path, finding.body)}
                adopted.update(range(reply["Seq"] - reply["Adopted"] + 1, reply["Seq"] + 1))
            except Refused as error:
                log.warning("not mended: %s: %s", finding.text, error)
    if adopted:
        release_surplus(call(daemon, "GET", "/status?leases=1"), read_docker()[0], adopted,
                        functools.partial(call, daemon, "POST", "/Gipam.Release"))


def cmd_release(arguments: argparse.Namespace) -> int:
    """Release a pool, by id or subnet, or an address in it."""
    status = read_status(arguments.settings, has_leases=True)
    pool, lease = find_lease(status["pools"], arguments.pool, arguments.lease)
    body = release_body(pool, lease)
    address = body["Address"]
    if not arguments.force:
        claims, _ = read_claims(docker_socket(), status["driver"])
        leaks = [finding.body for finding in find_leaks(status, claims, time.time())]
        if body not in leaks and release_body(pool) not in leaks:
            users = [str(claim) for claim in claims
                     if (claim.subnet, claim.address) == (pool["subnet"], address)]
            raise Forbidden(f"{(users or ['a network'])[0]} of Docker uses it: remove that first, "
                            "or use --force")
    what = f"address {address} of" if address else f"pool with {len(pool['addresses'])} leases,"
    if not arguments.yes and not ask(f"release {what} {pool['subnet']}? [y/N] "):
        return 1
    call(find_daemon(arguments.settings), "POST", "/Gipam.Release", body)
    print(f"released {what} {pool['subnet']}")
    return 0


def find_lease(pools: list[Json], name: str, text: str) -> tuple[Json, Json | None]:
    """Return the one pool of find_pools(), and its lease of an address, if there is one to be.

    Raises: InvalidRequest.
    """
    found = find_pools(pools, name)
    if len(found) != 1:
        raise InvalidRequest(
            f"{name!r} names {len(found)} pools: give the id of one, as `gipam status --json` "
            "has it" + "".join(f"\n  {pool['id']}" for pool in found))
    try:
        address = text and normalise_address(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a bare IP address") from None
    pool = found[0]
    lease = next((lease for lease in pool["addresses"] if lease["address"] == address), None)
    if address and not lease:
        raise InvalidRequest(f"{address} is not held in {pool['subnet']}")
    return pool, lease


def ask(question: str) -> bool:
    """Return whether somebody is there who says yes. Raises: InvalidRequest without a terminal."""
    if not sys.stdin.isatty():
        raise InvalidRequest("there is no terminal to ask at: give --yes to go on without")
    with contextlib.suppress(EOFError):
        return input(question).strip().lower() in ("y", "yes")
    print()
    return False


def cmd_config(arguments: argparse.Namespace) -> int:
    """Print each effective value with its origin: as the daemon says, where one answers."""
    try:
        shown = call(find_daemon(arguments.settings), "GET", "/status").get("config", {})
    except Absent as error:
        load(arguments.settings)
        print(f"gipam: {error}; this environment and lease file would give", file=sys.stderr)
        shown = describe_daemon(arguments.settings, "")["config"]
    for name, setting in shown.items():
        print(f"{name:8} {setting['value'] or 'none':34} {setting['origin']}")
    return 0


def cmd_serve(arguments: argparse.Namespace) -> int:
    """Run the driver until SIGTERM or SIGINT."""
    os.umask(0o077)
    faulthandler.enable()  # the watchdog's SIGABRT then says where each thread hung
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    notify(f"EXTEND_TIMEOUT_USEC={START_PATIENCE_S * 1_000_000}")
    gc.disable()  # it would take a third of the time to load a million leases
    config, store, document = load(arguments.settings, is_daemon=True)
    if config.unix and "LISTEN_FDS" not in os.environ:
        clear_path(config.socket)  # a second daemon writes and imports nothing
    with contextlib.ExitStack() as made, contextlib.ExitStack() as unserved:
        if document is None:
            unserved.callback(store.discard)
        service = open_service(config, arguments.settings, store, document, stop.set)
        gc.freeze()  # nor need it look at them later: 270 ms for a million
        gc.enable()

        def remove(path: str) -> None:
            made.callback(lambda: os.unlink(path) if os.path.lexists(path) else None)

        servers = [(open_unix if config.unix else open_tcp)(config, service, remove)]
        if config.metrics:
            servers.append(Server(config.metrics, service))
            servers[-1].is_public = True
        for server in servers:
            threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
        unserved.pop_all()
        warn_of_surprises(config, "/proc/self/net/route")
        places = [format_place(server.server_address) for server in servers]
        service.about = describe_daemon(arguments.settings, places[0])
        log.info("serving on %s with %d pools", ", and metrics on ".join(places),
                 len(service.state.pools))
        notify("READY=1")
        watch(service, servers, stop)
        notify("STOPPING=1")
        for server in servers:
            if server.is_kept:
                server.shutdown()  # who dials now is for the next process
            server.retire()
        time.sleep(RETIRE_PATIENCE_S)
    for server in servers:
        server.shutdown()
        server.drain()
    if service.flusher.loss:
        raise service.flusher.loss
    service.fold(is_stopping=True)
    log.info("stopped")
    return 0


def watch(service: Service, servers: list[Server], stop: threading.Event) -> None:
    """Until the end, each second: end overdue TCP connections, prove life to the watchdog."""
    told = ""
    while not stop.wait(1.0):
        for server in servers:
            if server.address_family != socket.AF_UNIX:
                server.reap(MAX_TCP_CONNECTIONS)
        pools = list(service.state.pools.values())
        status = f"STATUS={len(pools)} pools, {sum(len(pool.leases) for pool in pools)} leases"
        with contextlib.suppress(StoreError):  # it is logged, and stops gipam if it is fatal
            service.probe()  # hangs if a flush does
        notify("WATCHDOG=1" + f"\n{status}" * (status != told))
        told = status


def open_service(config: Config, settings: Settings, store: Store,
                 document: Json | None, on_loss: Callable[[], None]) -> Service:
    """Recover the state; at a first start, write the lease file before anything is served.

    No lease file may mean a lost one: then Docker is asked what is in use, at once if it is alive,
    else when it answers. (While it starts, Docker accepts connections, but waits for gipam.)
    """
    keys, state, driver = config_keys(settings), make_state(config), config.driver
    recover(store, document, state)
    if document is None:
        chunks = encode_snapshot(keys, copy_state(state), None, is_import_due=True)
        store.write_snapshot(chunks, is_named=False)
    service = Service(store, state, keys, on_loss=on_loss)
    if document is None or document.get("Import"):
        service.import_is_due.set()
        if is_docker_alive():
            try:
                take_over(service, driver, IMPORT_PATIENCE_S)
            except GipamError as error:
                log.warning("Docker cannot be asked yet what is in use: %s", error)
    threading.Thread(target=take_over_when_due, args=(service, driver), name="import",
                     daemon=True).start()
    return service


def warn_of_surprises(config: Config, path: str) -> None:
    """Log what will surprise: open TCP, no base, or an on-link route (protocol.md 3.3)."""
    if not config.unix and not config.tls:
        log.warning("TCP without -tls: every user of this host can take and release addresses; "
                    "-unix lets only root")
    if not config.v4 and not config.v6:
        log.warning("no base is configured (-v4, -v6): only networks with a --subnet can be made")
    for row in read_rows(path)[1:]:
        first, mask = (int.from_bytes(bytes.fromhex(row[at]), sys.byteorder) for at in (1, 7))
        is_on_link = row[0] != "*" and not int(row[3], 16) & 2  # RTF_GATEWAY
        for base in config.v4 if is_on_link and mask else ():
            if int(base[0]) & mask == first and bin(mask).count("1") <= base.prefixlen:
                log.warning("the base %s is part of an on-link route of %s: Docker will refuse "
                            "every block of it; replace the route: ip route add blackhole %s",
                            base, row[0], base)


def normalise_arguments(arguments: list[str]) -> list[str]:
    """Turn Go's one dash into two, and a boolean flag into one with a value.

    It takes the next word only if that is one, such as false; no command is.
    """
    booleans = ["--" + option.name for option in OPTIONS if option.parse is parse_bool]
    words: list[str] = []
    for argument in arguments:
        if words and words[-1] in booleans and argument in BOOLEANS:
            words[-1] += "=" + argument
        else:
            words.append(re.sub(r"^-(?=[a-zA-Z]\w)", "--", argument))
    return [word + "=true" if word in booleans else word for word in words]


COMMANDS: tuple[tuple[Callable[[argparse.Namespace], int], dict[str, str]], ...] = (
    (cmd_serve, {}),
    (cmd_status, {"--json": "as JSON, the stable form", "--leases": "with each lease",
                  "what": "only this; by Docker's name or gipam.name"}),
    (cmd_check, {"--json": "as JSON", "--fix": "mend what differs",
                 "--force": "with --fix, also when Docker knows none of the pools",
                 "--grace": "overlook what is younger (default: 60)"}),
    (cmd_release, {"pool": "id or subnet", "lease": "in it", "--yes": "do not ask",
                   "--force": "even if Docker uses it"}),
    (cmd_config, {}),
)
VALUES: dict[str, Json] = {  # the arguments of commands that are no switches
    "--grace": {"type": int, "default": 60, "metavar": "SECONDS"}, "pool": {"metavar": "POOL"},
    "lease": {"metavar": "ADDRESS", "nargs": "?", "default": ""},
    "what": {"metavar": "ADDRESS|NETWORK|SUBNET", "nargs": "?", "default": ""},
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: options may stand before the command or after it."""
    shown, hidden = (argparse.ArgumentParser(
        add_help=False, argument_default=argparse.SUPPRESS) for _ in range(2))
    for option in OPTIONS:
        text = f"{option.help} ({option.variable}; default: {option.default or 'none'})"
        shown.add_argument("--" + option.name, metavar=option.metavar, help=text)
        hidden.add_argument("--" + option.name, help=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="gipam", parents=[shown], allow_abbrev=False,
                                     description="Docker IPAM driver that hands out routed "
                                                 "prefixes")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(func=cmd_serve)
    commands = parser.add_subparsers(metavar="COMMAND", help="default: serve")
    for function, flags in COMMANDS:
        purpose = function.__doc__ or ""
        is_serve = function is cmd_serve
        command = commands.add_parser(
            function.__name__[4:], parents=[shown if is_serve else hidden], allow_abbrev=False,
            help=purpose.split("\n")[0], description=purpose,
            epilog=None if is_serve else "It takes the options of `gipam --help`, too.")
        command.set_defaults(func=function)
        for flag, text in flags.items():
            command.add_argument(flag, help=text, **VALUES.get(flag, {"action": "store_true"}))
    return parser


class LogFormatter(logging.Formatter):
    """Puts the head of a message before each of its lines: to the journal every line is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines."""
        text = super().format(record)
        return text.replace("\n", "\n" + text[:text.index(record.message)])


def set_up_log() -> None:
    """Log to stderr: with priorities under systemd (sd-daemon(3)), with the time elsewhere."""
    form = "%(asctime)s %(levelname)s %(message)s"
    if "JOURNAL_STREAM" in os.environ:
        form = "%(levelname)s%(message)s"
        for level, priority in ((logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)):
            logging.addLevelName(level, f"<{priority}>")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, or that of the error."""
    parser, words = build_parser(), normalise_arguments(sys.argv[1:] if argv is None else argv)
    known = ["--help", "--version", *("--" + option.name for option in OPTIONS),
             *(flag for _, flags in COMMANDS for flag in flags)]
    for flag in (word.partition("=")[0] for word in words):
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, 1)
            hint = f"do you mean {near[0]}?" if near else "see `gipam --help`"
            parser.error(f"unknown option {flag}: {hint}")
    arguments = parser.parse_args(words)
    arguments.settings = read_settings(os.environ, arguments)  # the first two stages
    set_up_log()
    try:
        status = int(arguments.func(arguments))
        sys.stdout.flush()
        return status
    except GipamError as error:
        print(f"gipam: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        hint = "; run gipam as root, or give it -file, -socket and -spec where it may write"
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"gipam: {problem}{hint * isinstance(error, PermissionError)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
