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
    Commands    options, configuration in three stages, main

On disk. The lease file is a JSON document for people: the configuration (which wins over options
and environment), each pool under Allocated with its addresses, and a checksum over the state. It
is a snapshot; what happened since stands beside it in a journal segment (leases.json.journal.1).
There, one flush is one line: length and CRC-32 of the JSON that follows, and in it the sequence
number of the last change, and the changes. A real one:

    00000078 c2b28b31 [4,[["request_address","10.2.0.0/24#1f0c27ab5e94d386","10.2.0.2","endpoint",
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
import bisect
import contextlib
import fcntl
import functools
import http
import http.server
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Tuple, Union

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
MIN_FOLD_BYTES = 1 << 20  # a journal is folded once it is longer than this and than the snapshot
FOLD_PATIENCE_S = 10.0  # after a fold that failed
ENCODE_LEASES = 2000  # between two chances for other threads; measured: 3 ms
LOCK_PATIENCE_S = 2.0  # a predecessor may still be folding
DRAIN_PATIENCE_S = 30.0
BITS = {4: 32, 6: 128}
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


class BusyError(GipamError):
    """Another daemon holds the lease file or the socket."""

    exit_status = 75  # EX_TEMPFAIL


# === Model ========================================================================================

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Undo = Callable[[], Any]


def parse_prefix(text: str, mask: bool = False) -> Network:
    """Return the prefix of CIDR text; with mask, host bits are cleared, not refused.

    Raises: ValueError with the rule (ip_network alone takes netmasks and bare addresses too).
    """
    address, _, length = text.partition("/")
    if "%" in address or not (length.isascii() and length.isdigit()):
        raise ValueError(f"{text!r} is not a prefix in CIDR form, such as 10.2.0.0/16 or 2001:db8::/56")
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


def make_pool_id(subnet: Network, sub_pool: Network | None, token: str) -> str:
    """Return SUBNET[,SUB_POOL]#TOKEN: enough to make the pool again, and never given twice."""
    return f"{subnet},{sub_pool}#{token}" if sub_pool else f"{subnet}#{token}"


def parse_pool_id(pool_id: str) -> tuple[Network, Network | None] | None:
    """Return (subnet, sub_pool) of an id that gipam made, None for any other text."""
    match = re.fullmatch(r"([0-9a-f.:/]+)(?:,([0-9a-f.:/]+))?#[0-9a-f]{16}", pool_id)
    try:
        return match and (parse_prefix(match[1]), parse_prefix(match[2]) if match[2] else None)
    except ValueError:
        return None


def dumps(value: Any) -> str:
    """Return JSON in the one form that is checksummed."""
    return json.dumps(value, separators=(",", ":"))


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


Change = Union[RequestPool, ReleasePool, RequestAddress, ReleaseAddress]
CHANGES: dict[str, Any] = {
    "request_pool": RequestPool, "release_pool": ReleasePool,
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
    before = mapping.get(key)
    steps.append(lambda: mapping.pop(key, None) if before is None else mapping.__setitem__(key, before))
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

    def cover(self, network: Network, times: int = 1) -> None:
        """Add the prefix, or with times=-1 take it away once, and bring its ancestors up to date."""
        node = self.node(network)
        put(self._covers, node, self._covers.get(node, 0) + times or None, [])
        while node:
            length = node.bit_length() - 1
            left, right = self.free(2 * node), self.free(2 * node + 1)
            if node in self._covers:
                self._free[node] = (self.bits + 1, 0)
            elif left[0] == right[0] == length + 1 or length == self.bits:
                self._free.pop(node, None)  # both halves are free
            else:
                self._free[node] = (min(left[0], right[0]), left[1] + right[1])
            node >>= 1

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
        return self._lasts[at] if at < len(self._lasts) and self._firsts[at] <= int(network[-1]) else None


class Memory(Dict[str, Tuple[Any, int]]):
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
        """Return the offsets that are never handed out. Source: moby defaultipam, protocol.md 5.3."""
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
        return self.high - self.low + 1 - sum(self.low <= at <= self.high for at in self.subnet.reserved)


class Family:
    """IPv4 or IPv6: the bases, what is free in them, cursors, names, and the subnets in use."""

    def __init__(self, version: int, bases: list[Network], prefixlen: int, excluded: list[Network]) -> None:
        self.version, self.bases = version, bases
        self.prefixlen = prefixlen  # of a block, where the network does not ask for another
        self.held, self.usable, self.free, self.fresh = (PrefixTree(BITS[version]) for _ in range(4))
        for network in excluded:  # usable: but for exclusions; free: and subnets in use;
            for tree in (self.usable, self.free, self.fresh):  # fresh: and blocks kept for names
                tree.cover(network)
        self.subnets: dict[Network, Subnet] = {}
        self.cursors: dict[int, int] = {}  # prefixlen -> number of the block to try next
        self.names = Memory()  # gipam.name -> Network

    def blocks(self, prefixlen: int) -> int:
        """Return how many blocks of this length the bases have, free or not."""
        return sum(1 << prefixlen - base.prefixlen for base in self.bases if base.prefixlen <= prefixlen)

    def candidates(self, tree: PrefixTree, prefixlen: int, obstacles: Obstacles) -> Iterator[tuple[int, Network]]:
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
        for shift, node, end in ahead + behind:
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

    def hold(self, subnet: Subnet, times: int, steps: list[Undo]) -> None:
        """Count the subnet as in use, or with times=-1 as free again."""
        put(self.subnets, subnet.network, subnet if times > 0 else None, steps)
        for tree in (self.held, self.free, self.fresh):
            self._cover(tree, subnet.network, times, steps)

    def remember(self, name: str, network: Network, seq: int, steps: list[Undo]) -> None:
        """Keep the block for the name: others get it only when nothing else is left."""
        self._cover(self.fresh, network, 1, steps)
        for forgotten in self.names.remember(name, network, seq, steps):
            self._cover(self.fresh, forgotten, -1, steps)

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
        if subnet.network != network or None in subnet.pools or subnet.pools and not pool.sub_pool:
            raise ValueError(f"pool {network} overlaps {subnet.network}")
        if pool.pool_id in self.pools or pool.sub_pool in subnet.pools:
            raise ValueError(f"pool {pool.pool_id!r} is held twice")
        if not subnet.pools:
            family.hold(subnet, 1, steps)
        put(subnet.pools, pool.sub_pool, pool, steps)
        put(self.pools, pool.pool_id, pool, steps)
        if change.next_block >= 0:
            put(family.cursors, network.prefixlen, change.next_block, steps)
        if pool.name:
            family.remember(pool.name, network, pool.seq, steps)

    def _release_pool(self, change: ReleasePool, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        put(self.pools, pool.pool_id, None, steps)
        put(pool.subnet.pools, pool.sub_pool, None, steps)
        if not pool.subnet.pools:
            self.families[pool.subnet.version].hold(pool.subnet, -1, steps)
            return
        for offset in pool.leases:
            pool.subnet.release(offset)
            steps.append(functools.partial(pool.subnet.held.add, offset))

    def _request_address(self, change: RequestAddress, steps: list[Undo]) -> None:
        pool = self._pool(change.pool_id)
        offset = pool.offset(change.address)
        if not 0 <= offset <= pool.subnet.last_offset or offset in pool.subnet.held:
            raise ValueError(f"address {change.address} is held already or outside {pool.subnet.network}")
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


STATE_KEYS = ("Seq", "V6Idx", "V4Idx", "Cursors", "Names", "Free", "Allocated")  # under the checksum
POOL_KEYS = ("ID", "V", "Pool", "SubPool", "Name", "Granted", "Seq", "Idx", "Remembered", "Free", "Allocated",
             "Leases")
CONFIG_KEYS = ("V6Pool", "V6AllocateBlock", "V4Pool", "V4AllocateBlock", "Exclude")
OTHER_NAMES = {"v6": "V6Pool", "v6ab": "V6AllocateBlock", "v4": "V4Pool", "v4ab": "V4AllocateBlock"}


def copy_state(state: State) -> tuple[dict[str, Any], list[tuple[Pool, int, dict[int, Lease], Memory]]]:
    """Return (the small keys, (pool, cursor, leases, memory) of each pool): a shallow copy.

    It is taken under the lock in milliseconds; the rest of a pool, and a lease, never change.
    """
    families = state.families
    cursors = {(version, length): number for version in families for length, number in families[version].cursors.items()}
    names = [(name, *entry) for family in families.values() for name, entry in family.names.items()]
    head = {
        "Seq": state.seq,
        **{f"V{version}Idx": cursors.pop((version, families[version].prefixlen), 0) for version in (6, 4)},
        "Cursors": {f"{version}/{length}": number for (version, length), number in cursors.items()},
        "Names": [[name, str(block), seq] for name, block, seq in names],
        "Free": [{"V": block.version, "Pool": str(block)} for _, block, _ in names
                 if families[block.version].is_block(block)],
    }
    pools = []
    for pool in state.pools.values():
        is_first = next(iter(pool.subnet.pools.values())) is pool  # it stands for its subnet
        pools.append((pool, pool.cursor, dict(pool.leases), Memory(pool.subnet.memory if is_first else ())))
    return head, pools


def encode_snapshot(config: dict[str, Any], copy: Any, segment: int | None) -> Iterator[str]:
    """Yield the lease file in portions: configuration, the segment that goes on, state, checksum."""
    head, pools = copy
    yield "{" + "".join(f"{dumps(key)}:{dumps(value)},\n" for key, value in config.items())
    yield f'"Journal":{segment},\n' if segment else ""
    checksum = 0
    for chunk in encode_state(head, pools):
        checksum = zlib.crc32(chunk.encode(), checksum)
        yield chunk + "\n"
    yield f',"Checksum":"{checksum:08x}"}}\n'


def encode_state(head: dict[str, Any], pools: list[Any]) -> Iterator[str]:
    """Yield the state as the JSON text that is checksummed, cut between elements."""
    yield dumps(head)[1:-1] + ',"Allocated":['
    comma = ""
    for pool, cursor, leases, memory in pools:
        owners = {owner: [pool.format(offset), seq] for owner, (offset, seq) in memory.items()}
        free = [pool.format(offset) for offset, _ in memory.values() if offset not in leases]
        values = (pool.pool_id, pool.subnet.version, str(pool.subnet.network), str(pool.sub_pool or ""), pool.name,
                  pool.granted_s, pool.seq, cursor, owners, free)
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


def decode_snapshot(document: dict[str, Any], state: State) -> None:
    """Fill the empty state from a lease file; the Go program's ones have no checksum.

    Raises: ValueError for a wrong checksum or a contradiction; KeyError, TypeError for other shapes.
    """
    if "Checksum" in document:
        text = dumps({key: document[key] for key in STATE_KEYS})[1:-1]
        if document["Checksum"] != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("its checksum does not match what it holds from Seq on")
    for entry in document.get("Allocated") or []:
        decode_pool(entry, state)
    for version, family in state.families.items():
        if document.get(f"V{version}Idx"):
            family.cursors[family.prefixlen] = int(document[f"V{version}Idx"])
    for key, number in (document.get("Cursors") or {}).items():
        version, _, prefixlen = key.partition("/")
        state.families[int(version)].cursors[int(prefixlen)] = int(number)
    for name, text, seq in document.get("Names") or []:
        block = parse_prefix(text)
        state.families[block.version].remember(name, block, seq, [])
    state.seq = int(document.get("Seq") or 0)


def decode_pool(entry: dict[str, Any], state: State) -> None:
    """Add a pool of a lease file, with its leases. Raises: as decode_snapshot()."""
    pool_id, addresses = entry["ID"], entry.get("Allocated") or []
    state.apply(RequestPool(pool_id, entry["Pool"], entry.get("SubPool") or "", "", entry.get("Granted") or 0,
                            int(entry.get("Idx") or 0), -1))
    pool = state.pools[pool_id]
    pool.name, pool.seq = entry.get("Name") or "", int(entry.get("Seq") or 0)
    leases = entry.get("Leases", [(ENDPOINT, "", "", 0, 0)] * len(addresses))
    if len(leases) != len(addresses):
        raise ValueError(f"pool {pool_id!r} has {len(addresses)} addresses and {len(leases)} leases")
    subnet, reserved = pool.subnet, pool.subnet.reserved
    for address, lease in zip(addresses, leases):
        offset = pool.offset(address)
        if not 0 <= offset <= subnet.last_offset:
            raise ValueError(f"address {address} is outside {subnet.network}")
        if offset in pool.leases or offset in subnet.held and offset not in reserved:
            raise ValueError(f"address {address} of {subnet.network} is held twice")
        subnet.held.add(offset)
        pool.leases[offset] = Lease(*lease)
    for owner, (address, seq) in (entry.get("Remembered") or {}).items():
        subnet.memory[owner] = (pool.offset(address), seq)


def normalise_keys(document: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Return (the document with its keys spelt as these, the keys that are none of them)."""
    spelling = {**{key.lower(): key for key in keys}, **OTHER_NAMES}
    known = {spelling[key.lower()]: value for key, value in document.items() if key.lower() in spelling}
    return known, [key for key in document if key.lower() not in spelling]


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
    cursor = int(sub_pool[0]) - int(subnet[0]) if sub_pool else 0
    return RequestPool(make_pool_id(subnet, sub_pool, token), str(subnet), str(sub_pool or ""),
                       request.name, now_s, cursor, next_block)


def decide_adoption(state: State, pool_id: str, now_s: int, token: str) -> RequestPool:
    """Take over a pool that Docker holds and the state does not know.

    Its addresses start at a random place, for the first ones are the likeliest to be in use.
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
    dynamic = sub_pool or subnet
    cursor = int(dynamic[0]) - int(subnet[0]) + int(token, 16) % dynamic.num_addresses
    return RequestPool(pool_id, str(subnet), str(sub_pool or ""), "", now_s, cursor, -1)


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
                    "`gipam.py check --fix` releases it")


def format_age(age_s: int) -> str:
    """Return a duration in its largest whole unit, such as 3h."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= unit_s:
            return f"{age_s // unit_s}{unit}"
    return f"{max(age_s, 0)}s"


def choose_block(family: Family, request: PoolRequest,
                 obstacles: Obstacles) -> tuple[Network, int]:
    """Return a free block, and the number of the block to try next (-1: as it was).

    First the block that the name had; then next-fit among those that no name had; then among all
    that are free. Raises: InvalidRequest for an impossible length, Unavailable.
    """
    prefixlen = family.prefixlen if request.prefixlen is None else request.prefixlen
    check_prefixlen(family, prefixlen)
    kept = family.names[request.name][0] if request.name in family.names else None
    if kept and kept.prefixlen == prefixlen and family.is_block(kept) \
            and obstacles.find_overlap(kept) is None:
        return kept, -1
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
    usable, free = (sum(tree.free(tree.node(base))[1] for base in family.bases) / size
                    for tree in (family.usable, family.free))
    return (f"of {total} blocks of /{prefixlen} in {', '.join(map(str, family.bases))}, "
            f"{usable - free:g} are held, {total - usable:g} excluded, and {free:g} overlap routes "
            "or addresses of this host or lie in smaller pieces")


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
        raise InvalidRequest(f"invalid address: {error}, as {pool.subnet.network} has them") from None


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


def encode_line(seq: int, records: list[Any]) -> bytes:
    """Return the line: length and CRC-32 of the JSON that follows them, and that."""
    payload = dumps([seq, records]).encode()
    return b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)


def decode_lines(data: bytes, is_last: bool) -> Iterator[Line]:
    """Yield the lines of a segment, without what a crash tore from the end of the last segment.

    A torn line was never acknowledged: it has no end of line and is shorter than it says, or the
    file system had given it room but no contents: NULs, of which JSON has none (a single one is a
    damaged byte). A line that is whole but for its end counts. Raises: ValueError with the place.
    """
    offset, number = 0, 1
    while offset < len(data):
        head = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ").match(data, offset)
        end = offset + 18 + int(head[1], 16) if head else len(data)
        payload, rest = data[offset + 18:end], len(data) - end
        is_whole = head and rest >= 0 and zlib.crc32(payload) == int(head[2], 16)
        if is_whole and (data[end:end + 1] == b"\n" or is_last and rest <= 1):
            yield Line(number, offset, end + 1, *json.loads(payload))
        else:
            is_short = rest <= 0 if head else len(data) - offset < 18
            if is_last and data.find(b"\n", offset, -1) < 0 and (
                    data.find(b"\0\0", offset) >= 0 or is_short and data[-1:] != b"\n"):
                return
            raise ValueError(f"line {number} at byte {offset} has not the length and checksum that it says")
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
        self.snapshot_bytes = self.journal_bytes = 0
        self._fd = -1
        self._end = 0  # bytes of the segment that are on disk

    def lock(self) -> None:
        """Keep others off the lease file for the life of the process. Raises: BusyError, OSError."""
        fd = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)

    def read_snapshot(self) -> dict[str, Any] | None:
        """Return the JSON object of the lease file, None if there is none. Raises: ConfigError."""
        try:
            with open(self.path, "rb") as file:
                text = file.read()
            document = json.loads(text)
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

    def damage(self, place: str, what: str, remedy: str = "") -> DamageError:
        """Return the error that names the place, what is wrong there, and what to do."""
        remedy = remedy or (f"put back a backup; or move {self.path}* away: gipam then starts as if "
                            "they were lost, and takes over what Docker uses")
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

    def replay(self, document: dict[str, Any] | None, seq: int) -> Iterator[tuple[str, Any]]:
        """Yield (place, record) of each change after the snapshot's seq, and be ready to append.

        Raises: DamageError for a damaged line, for a segment that is missing or there twice.
        """
        self.seq, numbers = seq, self.segments()
        named = document.get("Journal") if document else None
        self.is_named = named is not None
        if self.is_named and named not in numbers:
            raise self.damage(f"{self.path}.journal.{named}", "is missing", "put it back; or give up "
                              f'what it held: delete the line "Journal" from {self.path}, start '
                              "gipam, and run `gipam.py check --fix`")
        for self.segment in numbers:
            path = self.segment_path(self.segment)
            for line in self._read_segment(path, self.segment == numbers[-1]):
                first = line.seq - len(line.records) + 1
                if document is None and line.seq:
                    raise self.damage(path, f"is there without its lease file {self.path}")
                if first > self.seq + 1 or line.records and seq < first <= self.seq:
                    raise self.damage(path, f"goes on with change {first}, but {self.seq + 1} is due",
                                      "put the missing segment back, or move the surplus one away")
                for at, record in enumerate(line.records, first):
                    if at > self.seq:
                        self.seq = at
                        yield f"{path} line {line.number} at byte {line.offset}", record

    def _read_segment(self, path: str, is_last: bool) -> Iterator[Line]:
        with open(path, "rb") as file:
            data = file.read()
        self._end = 0
        try:
            for line in decode_lines(data, is_last):
                self._end = line.end
                yield line
        except ValueError as error:
            raise self.damage(path, f"is damaged: {error}", "put back a backup; or give up that line "
                              f"and all after it: truncate -s {self._end} {path}, move later "
                              "segments away, start gipam, run `gipam.py check --fix`") from None
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
            raise StoreLost(f"cannot sync {self.segment_path(self.segment)}: {error.strerror}") from None
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
        if self.segment:
            self._fd = self.calls.open(self.segment_path(self.segment), os.O_WRONLY | os.O_CLOEXEC)
            self.calls.ftruncate(self._fd, self._end)
            self._write(self._fd, b"\n" if self._end else b"", self._end - 1)
        else:
            self.rotate()

    def rotate(self) -> None:
        """Begin a new segment. Durable: its name and an empty line with the seq that it follows.

        Raises: OSError; the old segment is in use then.
        """
        path = self.segment_path(self.segment + 1)
        fd = self.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        data = encode_line(self.seq, [])
        try:
            self._write(fd, data, 0)
            self.calls.fdatasync(fd)
            self._sync_directory()
        except OSError:
            self.calls.close(fd)
            self.calls.unlink(path)
            raise
        if self._fd >= 0:
            self.calls.close(self._fd)
        self._fd, self._end, self.segment = fd, len(data), self.segment + 1

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        while data:
            written = self.calls.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def _sync_directory(self) -> None:
        fd = self.calls.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.calls.fsync(fd)
        finally:
            self.calls.close(fd)

    def write_snapshot(self, chunks: Iterable[str], is_named: bool) -> None:
        """Replace the lease file. Durable: on return. Raises: OSError; the old one is whole then."""
        path, offset = self.path + ".tmp", 0
        fd = self.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for chunk in chunks:
                data = chunk.encode()
                self._write(fd, data, offset)
                offset += len(data)
            self.calls.fsync(fd)
        except OSError:
            self.calls.unlink(path)
            raise
        finally:
            self.calls.close(fd)
        self.calls.replace(path, self.path)
        self._sync_directory()
        self.snapshot_bytes, self.is_named = offset, is_named

    def remove_segments(self, below: int) -> None:
        """Remove segments that the snapshot has made superfluous. Raises: OSError."""
        for number in self.segments():
            if number < below:
                self.calls.unlink(self.segment_path(number))
        self.journal_bytes = self._end


# === Service ======================================================================================


class Ticket:
    """What a request waits for: its change, and all that its decision could see, on disk."""

    def __init__(self, change: Change | None, seq: int, undo: Undo) -> None:
        self.change, self.seq, self.undo = change, seq, undo
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


class Flusher:
    """Group commit: a thread that writes, in one flush, what queued up while the last one ran."""

    def __init__(self, state: State, store: Store, lock: threading.Lock,
                 on_loss: Callable[[], None]) -> None:
        self._state, self._store, self._lock, self._on_loss = state, store, lock, on_loss
        self._queue: list[Ticket] = []
        self._is_busy = self._is_rotating = False
        self._wakeup = threading.Semaphore(0)
        self.fold_is_due = threading.Event()
        self.loss: StoreError | None = None  # after it, nothing is written any more
        threading.Thread(target=self._run, name="flusher", daemon=True).start()

    def submit(self, change: Change | None, is_rotating: bool = False) -> Ticket:
        """Apply the change and queue it. The caller holds the lock. Raises: StoreLost.

        Without a change, the ticket waits for those before it; with is_rotating, also for a new
        segment, which holds all that is queued after.
        """
        if self.loss:
            raise self.loss
        undo = self._state.apply(change) if change else lambda: None
        ticket = Ticket(change, self._state.seq, undo)
        if change or is_rotating or self._is_busy:
            self._is_rotating |= is_rotating
            self._queue.append(ticket)
            if not self._is_busy:
                self._is_busy = True
                self._wakeup.release()
        else:
            ticket.finish()
        return ticket

    def retract(self, length: int) -> None:
        """Undo what the caller, who has held the lock all the time, queued past this length."""
        while len(self._queue) > length:
            self._queue.pop().undo()

    def __len__(self) -> int:
        return len(self._queue)

    def _run(self) -> None:
        while True:
            with self._lock:
                batch, self._queue = self._queue, []
                is_rotating, self._is_rotating = self._is_rotating, False
                self._is_busy = bool(batch)
            if not batch:
                self._wakeup.acquire()
                continue
            error = None
            try:
                self._flush(batch, is_rotating)
            except StoreError as failure:
                error = failure
                batch = self._revert(batch, failure)
            for ticket in batch:
                ticket.finish(error)

    def _flush(self, batch: list[Ticket], is_rotating: bool) -> None:
        store = self._store
        if is_rotating:
            try:
                store.rotate()
            except OSError as error:
                log.warning("cannot begin a new journal segment: %s", error)
        records = [[CHANGE_NAMES[type(ticket.change)], *ticket.change] for ticket in batch if ticket.change]
        if records:
            store.append(store.seq + len(records), records)
            if not store.is_named or store.journal_bytes > max(MIN_FOLD_BYTES, store.snapshot_bytes):
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

    def __init__(self, store: Store, state: State, config: dict[str, Any], proc: str = "/proc/self/net",
                 on_loss: Callable[[], None] = lambda: None) -> None:
        self.state, self._store, self._proc = state, store, proc
        self._config = config  # the keys of the lease file
        self._lock, self._fold_lock = threading.Lock(), threading.Lock()
        self.flusher = Flusher(state, store, self._lock, on_loss)
        threading.Thread(target=self._fold_when_due, name="folder", daemon=True).start()

    def request_pool(self, request: PoolRequest) -> Ticket:
        """Grant a subnet. Durable: on return. Raises: as decide_request_pool(); StoreError."""
        obstacles = Obstacles()
        if request.subnet is None:  # read now, never cached: a VPN may have come up
            bases = self.state.families[request.version].bases
            obstacles = read_obstacles(self._proc, request.version, bases)
        now_s, token = int(time.time()), secrets.token_hex(8)
        return self._commit(lambda: decide_request_pool(self.state, request, obstacles, now_s, token))

    def release_pool(self, pool_id: str) -> Ticket:
        """Release a pool with its leases; an unknown one is gone already. Durable. Raises: StoreError."""
        return self._commit(lambda: ReleasePool(pool_id) if pool_id in self.state.pools else None)

    def request_address(self, pool_id: str, request: AddressRequest) -> tuple[Ticket, int]:
        """Grant an address; return the prefixlen of its subnet too. Durable: on return.

        A pool that Docker holds and the state does not know is adopted first.
        Raises: as decide_request_address() and decide_adoption(); StoreError.
        """
        now_s, prefixlen = int(time.time()), 0

        def decide() -> Change:
            nonlocal prefixlen
            if pool_id not in self.state.pools:
                adoption = decide_adoption(self.state, pool_id, now_s, secrets.token_hex(8))
                self.flusher.submit(adoption)
                log.warning("adopting pool_id=%r: Docker holds it, the lease file does not", pool_id)
            pool = self.state.pools[pool_id]
            prefixlen = pool.subnet.network.prefixlen
            return decide_request_address(pool, request, now_s)

        return self._commit(decide), prefixlen

    def release_address(self, pool_id: str, address: str) -> Ticket:
        """Release an address; what is not held is gone already. Durable. Raises: InvalidRequest, StoreError."""
        def decide() -> Change | None:
            pool = self.state.pools.get(pool_id)
            return decide_release_address(pool, address) if pool else None

        return self._commit(decide)

    def take_back(self, ticket: Ticket) -> None:
        """Release what a reply granted that never arrived, if that is still the very same."""
        change = ticket.change

        def decide() -> Change | None:
            pool = self.state.pools.get(change.pool_id) if change else None
            if pool and isinstance(change, RequestPool) and pool.seq == ticket.seq:
                return ReleasePool(change.pool_id)
            if pool and isinstance(change, RequestAddress):
                lease = pool.leases.get(pool.offset(change.address))
                if lease and lease.seq == ticket.seq:
                    return ReleaseAddress(change.pool_id, change.address)
            return None  # a release is never undone

        if self._commit(decide).change:
            log.warning("took back what a lost reply had granted: %s", change)

    def _commit(self, decide: Callable[[], Change | None]) -> Ticket:
        """Decide and apply under the lock; return, or raise the refusal, when all is on disk."""
        refusal = None
        with self._lock:
            length = len(self.flusher)
            try:
                ticket = self.flusher.submit(decide())
            except GipamError as error:
                refusal = error
                self.flusher.retract(length)
                ticket = self.flusher.submit(None)
        ticket.wait()
        if refusal:
            raise refusal
        return ticket

    def fold(self, is_stopping: bool = False) -> bool:
        """Write the state to the lease file, drop the journal that it replaces; False: it failed.

        At a clean stop the lease file is left alone, whole in itself, for people to copy.
        """
        store = self._store
        with self._fold_lock:
            try:
                with self._lock:
                    copy, before = copy_state(self.state), store.segment
                    ticket = self.flusher.submit(None, is_rotating=not is_stopping)
                ticket.wait()  # now the copy is on disk, and what came later in a new segment
                segment = None if is_stopping else store.segment
                if segment == before:
                    return False
                store.write_snapshot(encode_snapshot(self._config, copy, segment), not is_stopping)
                store.remove_segments(store.segment + is_stopping)
            except (OSError, StoreError) as error:
                log.warning("could not fold the journal into %s: %s", store.path, error)
                return False
            return True

    def _fold_when_due(self) -> None:
        while self.flusher.fold_is_due.wait():
            self.flusher.fold_is_due.clear()
            if not self.fold():
                time.sleep(FOLD_PATIENCE_S)


def recover(store: Store, document: dict[str, Any] | None, state: State) -> None:
    """Fill the state with what is on disk. Raises: DamageError with the place and what to do."""
    if document is not None:
        try:
            decode_snapshot(document, state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise store.damage(store.path, f"contradicts itself: {error!r}") from None
    for place, record in store.replay(document, state.seq):
        try:
            state.apply(CHANGES[record[0]](*record[1:]))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise store.damage(place, f"contradicts what stands before it: {error}") from None


def read_obstacles(proc: str, version: int, bases: list[Network]) -> Obstacles:
    """Return the routes and addresses of this host that lie in a base, as the kernel has them now.

    A route that contains a whole base is the routed prefix itself, or the default route.
    """
    return Obstacles(network for network in read_host_prefixes(proc, version)
                     if any(network.prefixlen > base.prefixlen and base.overlaps(network) for base in bases))


def read_host_prefixes(proc: str, version: int) -> Iterator[Network]:
    """Yield each route, and each own address at full length. Source: proc(5), net/ipv4/fib_trie.c."""
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
    """What goes back: HTTP status, body, and what must be undone should it never arrive."""

    status: int
    body: bytes
    ticket: Ticket | None = None


def dispatch(service: Service, verb: str, path: str, body: bytes) -> Reply:
    """Answer a request: bytes in, bytes out. Never raises; a refused request changes nothing."""
    started = time.perf_counter()
    try:
        if path not in CONSTANT_ANSWERS and path not in METHODS:
            raise InvalidRequest(f"unknown method {path!r}: this is an IPAM driver", 404)
        if verb != "POST":
            raise InvalidRequest(f"{path} takes POST, not {verb}", 405)
        if path in CONSTANT_ANSWERS:
            return Reply(200, CONSTANT_ANSWERS[path])
        answer, ticket = METHODS[path](service, decode_fields(body))
    except GipamError as error:
        log.warning("refused %s: %s; got %r", path, error, body[:MAX_TEXT_CHARS])
        return refuse(error)
    except Exception:  # a bug: Docker gets an answer, the operator the traceback
        log.exception("failed %s; got %r", path, body[:MAX_TEXT_CHARS])
        return refuse(GipamError("internal error of gipam: see its log"))
    if ticket.change:
        what = " ".join(f"{key}={value}" for key, value in ticket.change._asdict().items() if value != "")
        log.info("%s %s seq=%d ms=%.2f", CHANGE_NAMES[type(ticket.change)], what, ticket.seq,
                 (time.perf_counter() - started) * 1e3)
    else:
        log.warning("nothing to do for %s: not held; got %r", path, body[:MAX_TEXT_CHARS])
    return Reply(200, dumps(answer).encode(), ticket)


def refuse(error: GipamError) -> Reply:
    """Turn an error into a reply: dockerd reads Err of a status that is not 200, others Error."""
    return Reply(error.http_status, dumps({"Err": str(error), "Error": str(error)}).encode())


def decode_fields(body: bytes) -> dict[str, Any]:
    """Return the arguments of a call. Raises: InvalidRequest.

    An empty body is a retry of dockerd that lost them (moby#39331): never read it as defaults.
    """
    if not body:
        raise InvalidRequest("the request has no body: dockerd lost it in a retry; run the command again")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object")
    return fields


def read_text(fields: dict[str, Any], key: str, is_needed: bool = False) -> str:
    """Return a text field, "" where there is none. Raises: InvalidRequest."""
    value = fields.get(key, "")
    if not isinstance(value, str) or is_needed and not value:
        raise InvalidRequest(f"{key} is not a string{' with something in it' * is_needed}: {value!r}")
    return value


def read_prefix(fields: dict[str, Any], key: str) -> Network | None:
    """Return a prefix, its host bits cleared (Docker <= 24 passes them). Raises: InvalidRequest."""
    text = read_text(fields, key)
    try:
        return parse_prefix(text, mask=True) if text else None
    except ValueError as error:
        raise InvalidRequest(f"invalid address {key.lower()}: {error}") from None


def read_options(fields: dict[str, Any]) -> dict[str, str]:
    """Return the map of options, {} where there is none. Raises: InvalidRequest."""
    options = fields.get("Options") or {}
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise InvalidRequest(f"Options is not a map of strings: {options!r}")
    for key in (NAME_OPTION, ENDPOINT_NAME, ENDPOINT_MAC):
        if len(options.get(key, "")) > MAX_TEXT_CHARS:
            raise InvalidRequest(f"option {key} is longer than {MAX_TEXT_CHARS} characters")
    return options


def read_pool_request(fields: dict[str, Any]) -> PoolRequest:
    """Return what a network asks for. Raises: InvalidRequest."""
    space, is_v6 = read_text(fields, "AddressSpace"), fields.get("V6", False)
    subnet, sub_pool = read_prefix(fields, "Pool"), read_prefix(fields, "SubPool")
    options = read_options(fields)
    if space not in ("", ADDRESS_SPACE):
        raise InvalidRequest(f"invalid address space: {space!r} is not {ADDRESS_SPACE!r}")
    if not isinstance(is_v6, bool) or is_v6 and subnet and subnet.version == 4:
        raise InvalidRequest(f"invalid address pool: {subnet} with V6 {is_v6!r}")
    version = subnet.version if subnet else 6 if is_v6 else 4
    prefixlen = read_prefixlen(options, version)
    if subnet and not int(subnet[0]):  # 0.0.0.0/26 or ::/72: any block of this length
        prefixlen, subnet = subnet.prefixlen, None
    if sub_pool and not subnet:
        raise InvalidRequest(f"invalid address subpool: {sub_pool} comes without the subnet it is in")
    return PoolRequest(version, subnet, sub_pool, prefixlen, options.get(NAME_OPTION, ""))


def read_prefixlen(options: dict[str, str], version: int) -> int | None:
    """Return the length of block asked for. Raises: InvalidRequest, for unknown gipam options too."""
    known = (NAME_OPTION, *LENGTH_OPTIONS.values())
    for key, text in options.items():
        if key.startswith("gipam.") and key not in known:
            raise InvalidRequest(f"unknown option {key!r}: gipam has {', '.join(known)}")
        if key in known[1:] and not re.fullmatch("[0-9]{1,3}", text):
            raise InvalidRequest(f"option {key} is not a prefix length: {text!r}")
    text = options.get(LENGTH_OPTIONS[version], "")
    return int(text) if text else None


def request_pool(service: Service, fields: dict[str, Any]) -> tuple[Any, Ticket]:
    """Grant a network its subnet."""
    ticket = service.request_pool(read_pool_request(fields))
    assert isinstance(ticket.change, RequestPool)
    return {"PoolID": ticket.change.pool_id, "Pool": ticket.change.subnet, "Data": {}}, ticket


def release_pool(service: Service, fields: dict[str, Any]) -> tuple[Any, Ticket]:
    """Release the subnet of a network that is removed."""
    return {}, service.release_pool(read_text(fields, "PoolID", is_needed=True))


def request_address(service: Service, fields: dict[str, Any]) -> tuple[Any, Ticket]:
    """Grant an address to a gateway, to a container, or aside for the user (auxiliary)."""
    pool_id, address = read_text(fields, "PoolID", is_needed=True), read_text(fields, "Address")
    options = read_options(fields)
    mac, name = options.get(ENDPOINT_MAC, ""), options.get(ENDPOINT_NAME, "")
    kind = ENDPOINT if mac or name or not address else AUXILIARY
    if options.get("RequestAddressType") == "com.docker.network.gateway":
        kind = GATEWAY
    ticket, prefixlen = service.request_address(pool_id, AddressRequest(address, kind, mac, name))
    assert isinstance(ticket.change, RequestAddress)
    return {"Address": f"{ticket.change.address}/{prefixlen}", "Data": {}}, ticket


def release_address(service: Service, fields: dict[str, Any]) -> tuple[Any, Ticket]:
    """Release the address of a container that has stopped."""
    pool_id = read_text(fields, "PoolID", is_needed=True)
    return {}, service.release_address(pool_id, read_text(fields, "Address", is_needed=True))


CONSTANT_ANSWERS = {
    "/Plugin.Activate": b'{"Implements":["IpamDriver"]}',
    # MAC addresses tell owners; replay could make dockerd panic or release live pools (protocol.md 3.6)
    "/IpamDriver.GetCapabilities": b'{"RequiresMACAddress":true,"RequiresRequestReplay":false}',
    "/IpamDriver.GetDefaultAddressSpaces": dumps({"LocalDefaultAddressSpace": ADDRESS_SPACE,
                                                  "GlobalDefaultAddressSpace": ADDRESS_SPACE}).encode(),
}
METHODS = {
    "/IpamDriver.RequestPool": request_pool,
    "/IpamDriver.ReleasePool": release_pool,
    "/IpamDriver.RequestAddress": request_address,
    "/IpamDriver.ReleaseAddress": release_address,
}


# === Transport ====================================================================================


class Handler(http.server.BaseHTTPRequestHandler):
    """Moves bytes between one connection and dispatch()."""

    protocol_version = "HTTP/1.1"
    server: Server
    ticket: Ticket | None = None  # of the last reply, until the peer has shown that it read it

    def address_string(self) -> str:
        """Name the peer; on a UNIX socket it has no address, and the stock method fails."""
        return str(self.client_address[0]) if self.client_address else "unix"

    def handle(self) -> None:
        """Serve the connection to its end; take back what a reply granted that never arrived."""
        try:
            super().handle()
        except ConnectionError:
            if self.ticket:
                self.server.service.take_back(self.ticket)

    def handle_one_request(self) -> None:
        """Read one request and answer it, in one write."""
        self.raw_requestline = self.rfile.readline(MAX_LINE_BYTES + 1)
        self.ticket = None
        if not self.raw_requestline:
            self.close_connection = True
        elif len(self.raw_requestline) > MAX_LINE_BYTES:
            self.send_error(414)
        elif self.parse_request():
            try:
                self._refuse_browsers()
                body = self._read_body()
            except GipamError as error:
                self.send_error(error.http_status, str(error))
            else:
                self._send(dispatch(self.server.service, self.command, self.path, body))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not a request, and close: nobody knows where the next one begins."""
        self.close_connection = True
        error = InvalidRequest(message or http.HTTPStatus(code).phrase, code)
        log.warning("refused %r from %s: %s", self.raw_requestline[:MAX_TEXT_CHARS],
                    self.address_string(), error)
        self._send(refuse(error))

    def _send(self, reply: Reply) -> None:
        self.ticket = reply.ticket
        close = "Connection: close\r\n" if self.close_connection else ""
        head = (f"HTTP/1.1 {reply.status} {http.HTTPStatus(reply.status).phrase}\r\n"
                f"Content-Type: {REPLY_TYPE}\r\nContent-Length: {len(reply.body)}\r\n{close}\r\n")
        self.connection.sendall(head.encode() + reply.body)

    def _refuse_browsers(self) -> None:
        """Keep out web pages, which can reach a loopback port but must say that they are one."""
        if self.server.address_family != socket.AF_UNIX:
            if "Origin" in self.headers or "Sec-Fetch-Site" in self.headers:
                raise Forbidden("requests from web pages are not served")

    def _read_body(self) -> bytes:
        """Return the body: Content-Length bytes, or chunks. Raises: InvalidRequest."""
        lengths = self.headers.get_all("Content-Length", [])
        coding = self.headers.get("Transfer-Encoding")
        if coding is None:
            if len(lengths) > 1 or lengths and not re.fullmatch("[0-9]{1,19}", lengths[0]):
                raise InvalidRequest(f"Content-Length is not one number: {', '.join(lengths)}")
            return self._read_exactly(int(lengths[0]) if lengths else 0, 0)
        if coding.lower() != "chunked" or lengths:
            raise InvalidRequest("Transfer-Encoding is served only as chunked, without Content-Length")
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
    """The plugin on TCP: a thread a connection. (HTTPServer would look up the host's name.)"""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = BACKLOG

    def __init__(self, address: Any, service: Service) -> None:
        self.service = service
        self.connections: set[Any] = set()
        self.is_changed = threading.Condition()
        if isinstance(address, tuple):
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind. Raises: OSError that names the address."""
        try:
            super().server_bind()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.server_address)) from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count the connection in, and serve it in a thread."""
        if self.address_family != socket.AF_UNIX:  # Nagle's algorithm could hold a reply for 40 ms
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.is_changed:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End the connection, and count it out."""
        super().shutdown_request(request)
        with self.is_changed:
            self.connections.discard(request)
            self.is_changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection."""
        log.exception("connection failed")

    def drain(self) -> None:
        """End without cutting anybody off between request and reply, nor in the backlog.

        Whoever writes later finds the connection closed before a byte of the request was taken,
        and dials again with its whole body. serve_forever() must have ended.
        """
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.process_request(*self.socket.accept())
        with self.is_changed:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # the peer is gone already
                    connection.shutdown(socket.SHUT_RD)  # it reads what is there, then the end
            self.is_changed.wait_for(lambda: not self.connections, DRAIN_PATIENCE_S)
        self.server_close()


class UnixServer(Server):
    """The plugin on a UNIX socket."""

    address_family = socket.AF_UNIX
    allow_reuse_address = False


def clear_path(path: str) -> None:
    """Make the directory of a socket or link to be, and remove a dead one. Raises: GipamError, OSError."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISSOCK(mode) and not stat.S_ISLNK(mode):
        raise ConfigError(f"{path} is in the way and is not a socket: remove it, or use another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) == 0:
            raise BusyError(f"another daemon answers on {path}: stop it, or use another name")
    os.unlink(path)


def write_whole(path: str, text: str) -> None:
    """Write a small file, whole or not at all. Raises: OSError."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def open_server(config: Config, service: Service, made: contextlib.ExitStack) -> Server:
    """Listen, and leave word for dockerd where; closing `made` removes that. Raises: GipamError, OSError."""
    def remove_later(path: str) -> None:
        made.callback(lambda: os.unlink(path) if os.path.lexists(path) else None)

    if not config.unix:
        server = Server(config.address, service)
        name = os.path.splitext(os.path.basename(config.spec))[0]
        shadow = os.path.join(PLUGIN_SOCKET_DIR, name + ".sock")
        if os.path.lexists(shadow):
            clear_path(shadow)
            log.warning("removed %s, which hid %s; restart dockerd if it has used it", shadow, config.spec)
        host, port = str(server.server_address[0]), server.server_address[1]
        write_whole(config.spec, f"tcp://{f'[{host}]' if ':' in host else host}:{port}\n")
        remove_later(config.spec)
        return server
    clear_path(config.socket)
    server = UnixServer(config.socket, service)
    remove_later(config.socket)
    link = os.path.join(PLUGIN_SOCKET_DIR, os.path.basename(config.socket))
    if config.socket != link:
        try:
            if os.path.islink(link) and os.readlink(link) == config.socket:
                os.unlink(link)
            clear_path(link)
            os.symlink(config.socket, link)
            remove_later(link)
        except PermissionError:
            if not config.is_spec_given:  # rootless Docker finds the socket by its plugin file
                raise
    if config.is_spec_given:
        write_whole(config.spec, f"unix://{config.socket}\n")
        remove_later(config.spec)
    return server


def notify(state: str) -> None:
    """Tell the service manager, if there is one. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(re.sub("^@", "\0", address))
            manager.sendall(state.encode())


# === Commands =====================================================================================


def parse_bool(text: str) -> bool:
    """Return a boolean as Go's strconv.ParseBool reads it. Raises: ValueError."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError("not a boolean, such as true or false")


def parse_number(text: str) -> int:
    """Return a number of at most three decimal digits. Raises: ValueError."""
    if not re.fullmatch("[0-9]{1,3}", text):
        raise ValueError("not a prefix length in bits, such as 24")
    return int(text)


def parse_prefixes(text: str) -> list[Network]:
    """Return the prefixes of a list with commas. Raises: ValueError."""
    return [parse_prefix(part.strip()) for part in text.split(",")] if text else []


def parse_path(text: str) -> str:
    """Return the absolute path of a file to be, its directory without symbolic links. Raises: ValueError."""
    directory, name = os.path.split(text)
    if not name or "\0" in text:
        raise ValueError("not the path of a file")
    return os.path.join(os.path.realpath(directory), name)


def parse_listen(text: str) -> tuple[str, int]:
    """Return (host, port); without a host it is the loopback address, the only kind. Raises: ValueError."""
    match = re.fullmatch(r"\[?([^\[\]]*?)\]?:([0-9]{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise ValueError("not HOST:PORT, such as 127.0.0.1:9090")
    host = "127.0.0.1" if match[1] in ("", "localhost") else match[1]
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError("not a loopback address: whoever reaches the port could take every address")
    return host, int(match[2])


class Option(NamedTuple):
    """An option: the flag -name, the variable GIPAM_NAME, and what is checked of the text."""

    name: str
    parse: Callable[[str], Any]
    default: str
    metavar: str
    help: str
    key: str = ""  # in the lease file

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return "GIPAM_" + self.name.upper()


OPTIONS = (
    Option("unix", parse_bool, "false", "BOOL", "serve on a UNIX socket instead of TCP"),
    Option("address", parse_listen, ":9090", "HOST:PORT", "TCP address; only loopback, also without HOST"),
    Option("file", parse_path, "leases.json", "FILE", "lease file"),
    Option("v6", parse_prefixes, "", "PREFIXES", "IPv6 bases, separated by commas, used in order", "V6Pool"),
    Option("v4", parse_prefixes, "", "PREFIXES", "IPv4 bases, likewise", "V4Pool"),
    Option("v6ab", parse_number, "64", "BITS", "prefix length of the IPv6 block that a network gets", "V6AllocateBlock"),
    Option("v4ab", parse_number, "24", "BITS", "prefix length of the IPv4 block that a network gets", "V4AllocateBlock"),
    Option("exclude", parse_prefixes, "", "PREFIXES", "prefixes in the bases that are never handed out", "Exclude"),
    Option("socket", parse_path, PLUGIN_SOCKET_DIR + "/gipam.sock", "PATH", "socket; its base name names the driver"),
    Option("spec", parse_path, "/etc/docker/plugins/gipam.spec", "PATH", "plugin file of TCP mode; likewise"),
)


class Setting(NamedTuple):
    """The text of an option, and where it comes from."""

    text: str
    origin: str


class Config(NamedTuple):
    """All options, parsed and checked; the names are theirs."""

    unix: bool
    address: tuple[str, int]
    file: str
    v6: list[Network]
    v4: list[Network]
    v6ab: int
    v4ab: int
    exclude: list[Network]
    socket: str
    spec: str
    is_spec_given: bool


def read_settings(environment: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, Setting]:
    """Return the first two stages: the command line wins over the environment, and that over defaults."""
    settings = {}
    for option in OPTIONS:
        settings[option.name] = Setting(option.default, "default")
        if option.variable in environment:
            settings[option.name] = Setting(environment[option.variable], f"environment ({option.variable})")
        if hasattr(arguments, option.name):
            settings[option.name] = Setting(getattr(arguments, option.name), "command line")
    return settings


def overrule_settings(settings: dict[str, Setting], document: dict[str, Any], path: str) -> None:
    """Let the lease file win, the third stage; say so where it is not what was asked for."""
    for option in OPTIONS:
        if document.get(option.key) not in (None, "", 0):
            before, text = settings[option.name], str(document[option.key])
            settings[option.name] = Setting(text, f"lease file ({option.key} in {path})")
            if before.origin != "default" and before.text != text:
                log.warning("-%s is %r as the lease file %s says, not %r as the %s does: the lease file wins; to "
                            "change it, stop gipam and edit %s there",
                            option.name, text, path, before.text, before.origin, option.key)


def build_config(settings: dict[str, Setting]) -> Config:
    """Parse and check all options. Raises: ConfigError: which, from where, its value, and the rule."""
    def fail(name: str, rule: object) -> None:
        setting = settings[name]
        raise ConfigError(f"-{name} {setting.text!r} from the {setting.origin}: {rule}")

    values: dict[str, Any] = {}
    for option in OPTIONS:
        try:
            values[option.name] = option.parse(settings[option.name].text)
        except ValueError as error:
            fail(option.name, error)
    config = Config(**values, is_spec_given=settings["spec"].origin != "default")
    for version, bases, prefixlen in ((4, config.v4, config.v4ab), (6, config.v6, config.v6ab)):
        if not 1 <= prefixlen < BITS[version]:
            fail(f"v{version}ab", f"not from 1 to {BITS[version] - 1}: a block has two addresses or more")
        for at, base in enumerate(bases):
            if base.version != version:
                fail(f"v{version}", f"{base} is not an IPv{version} prefix")
            if base.prefixlen > prefixlen:
                fail(f"v{version}ab", f"a block of /{prefixlen} is larger than its base {base}")
            if any(base.overlaps(other) for other in bases[:at]):
                fail(f"v{version}", f"{base} overlaps another base")
    for network in config.exclude:
        if not any(base.version == network.version and base.overlaps(network)
                   and base.prefixlen <= network.prefixlen for base in config.v4 + config.v6):
            fail("exclude", f"{network} lies in none of the bases")
    return config


def open_store(settings: dict[str, Setting]) -> Store:
    """Return the store of the lease file. Raises: ConfigError if there is no such directory."""
    path = parse_path(settings["file"].text)
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"-file {path!r} from the {settings['file'].origin}: its directory is not there")
    return Store(path)


def read_lease_file(store: Store, settings: dict[str, Setting]) -> dict[str, Any] | None:
    """Return the snapshot with its keys as gipam spells them, and let its settings win."""
    document = store.read_snapshot()
    if document is None:
        return None
    document, unknown = normalise_keys(document, (*CONFIG_KEYS, *STATE_KEYS, "Journal", "Checksum"))
    try:
        entries = [normalise_keys(entry, POOL_KEYS) for entry in document.get("Allocated") or ()]
    except (TypeError, AttributeError):
        raise store.damage(store.path, "has something else than pools in Allocated") from None
    document["Allocated"] = [entry for entry, _ in entries]
    for key in sorted({*unknown, *(key for _, keys in entries for key in keys)}):
        log.warning("unknown key %r in %s: dropped", key, store.path)
    overrule_settings(settings, document, store.path)
    return document


def cmd_config(arguments: argparse.Namespace) -> int:
    """Print each effective value with its origin."""
    settings = read_settings(os.environ, arguments)
    read_lease_file(open_store(settings), settings)
    build_config(settings)
    for name, setting in settings.items():
        print(f"{name:8} {setting.text or 'none':34} {setting.origin}")
    return 0


def cmd_serve(arguments: argparse.Namespace) -> int:
    """Run the driver until SIGTERM or SIGINT."""
    os.umask(0o077)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = read_settings(os.environ, arguments)
    store = open_store(settings)
    store.lock()
    document = read_lease_file(store, settings)
    config = build_config(settings)
    service = open_service(config, settings, store, document, stop.set)
    with contextlib.ExitStack() as made:
        server = open_server(config, service, made)
        thread = threading.Thread(target=server.serve_forever, name="server", daemon=True)
        thread.start()
        warn_of_bases(config, "/proc/self/net/route")
        log.info("serving on %s with %d pools", server.server_address, len(service.state.pools))
        notify("READY=1")
        stop.wait()
        notify("STOPPING=1")
    server.shutdown()
    server.drain()
    if service.flusher.loss:
        raise service.flusher.loss
    service.fold(is_stopping=True)
    log.info("stopped")
    return 0


def open_service(config: Config, settings: dict[str, Setting], store: Store, document: dict[str, Any] | None,
                 on_loss: Callable[[], None]) -> Service:
    """Recover the state; at a first start, write the lease file before anything is served."""
    keys: dict[str, Any] = {}
    for key, name, bases, prefixlen in (("V6", "v6", config.v6, config.v6ab), ("V4", "v4", config.v4, config.v4ab)):
        if bases:
            keys.update({f"{key}Pool": settings[name].text, f"{key}AllocateBlock": prefixlen})
    if config.exclude:
        keys["Exclude"] = settings["exclude"].text
    state = State(Family(version, bases, prefixlen, [network for network in config.exclude if network.version == version])
                  for version, bases, prefixlen in ((6, config.v6, config.v6ab), (4, config.v4, config.v4ab)))
    recover(store, document, state)
    if document is None:
        store.write_snapshot(encode_snapshot(keys, copy_state(state), None), is_named=False)
    return Service(store, state, keys, on_loss=on_loss)


def warn_of_bases(config: Config, path: str) -> None:
    """Log what about the bases will surprise: none, or one that is an on-link route (protocol.md 3.3)."""
    if not config.v4 and not config.v6:
        log.warning("no base is configured (-v4, -v6): only networks with a --subnet can be made")
    for base in config.v4:
        for row in read_rows(path)[1:]:
            first, mask = (int.from_bytes(bytes.fromhex(row[at]), sys.byteorder) for at in (1, 7))
            is_on_link = row[0] != "*" and not int(row[3], 16) & 2  # RTF_GATEWAY
            if is_on_link and mask and int(base[0]) & mask == first and bin(mask).count("1") <= base.prefixlen:
                log.warning("the base %s is part of an on-link route of %s: Docker will refuse every block of it; "
                            "replace the route: ip route add blackhole %s", base, row[0], base)


def normalise_arguments(arguments: list[str]) -> list[str]:
    """Turn Go's one dash into two, and a boolean flag into one with a value: argparse then guesses nothing."""
    booleans = ["--" + option.name for option in OPTIONS if option.parse is parse_bool]
    result = []
    for argument in arguments:
        if re.match(r"-[a-zA-Z]\w", argument):
            argument = "-" + argument
        result.append(argument + "=true" if argument in booleans else argument)
    return result


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: options may stand before the command or after it."""
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS:
        options.add_argument("--" + option.name, metavar=option.metavar, help=f"{option.help} "
                             f"({option.variable}; default: {option.default or 'none'})")
    parser = argparse.ArgumentParser(prog="gipam.py", parents=[options], allow_abbrev=False,
                                     description="Docker IPAM driver that hands out routed prefixes")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(func=cmd_serve)
    commands = parser.add_subparsers(metavar="COMMAND", help="default: serve")
    for function in (cmd_serve, cmd_config):
        command = commands.add_parser(function.__name__[4:], parents=[options], allow_abbrev=False,
                                      help=function.__doc__, description=function.__doc__)
        command.set_defaults(func=function)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, or that of the error."""
    arguments = build_parser().parse_args(normalise_arguments(sys.argv[1:] if argv is None else argv))
    is_journal = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(level=logging.INFO, format="%(message)s" if is_journal else "%(asctime)s %(levelname)s %(message)s")
    try:
        return int(arguments.func(arguments))
    except GipamError as error:
        print(f"gipam: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        hint = "; run gipam as root, or give it -file, -socket and -spec where it may write" * isinstance(error, PermissionError)
        print(f"gipam: {error.filename}: {error.strerror}{hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
