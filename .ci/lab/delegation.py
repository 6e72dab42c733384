"""A DHCPv6 server that delegates one prefix, as a home router does.

To run: `python3 delegation.py DEVICE FILE SECONDS`. The server reads the prefix from FILE for each
reply. Another one written there reaches the client when it next renews, after SECONDS; the reply
also withdraws what the client had before (RFC 8415, section 18.3.4). The route to the prefix leads
to the client that has it. The Debian trees of the lab have no such server.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from ipaddress import IPv6Network
from typing import Iterator

SERVER_PORT = 547
SERVERS = "ff02::1:2"  # All_DHCP_Relay_Agents_and_Servers
VALID_S = 600
SERVER_DUID = b"\0\3\0\1\2\0\0\0\0\1"  # of an Ethernet address

# Message types and options, RFC 8415.
SOLICIT = 1
ADVERTISE = 2
REPLY = 7
CLIENT_ID = 1
SERVER_ID = 2
IA_PD = 25
IA_PREFIX = 26


def read_options(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each option's code and content."""
    while data:
        code, length = struct.unpack_from("!HH", data)
        end = 4 + length
        yield code, data[4:end]
        data = data[end:]


def make_option(code: int, content: bytes) -> bytes:
    header = struct.pack("!HH", code, len(content))
    return header + content


def make_prefix(prefix: IPv6Network, valid_s: int) -> bytes:
    header = struct.pack("!IIB", valid_s, valid_s, prefix.prefixlen)
    return make_option(IA_PREFIX, header + prefix.network_address.packed)


def read_prefixes(association: bytes) -> Iterator[IPv6Network]:
    """Yield the prefixes that a client names in its IA_PD."""
    for code, content in read_options(association[12:]):
        if code == IA_PREFIX:
            prefix = content[9:25]
            yield IPv6Network((prefix, content[8]))


def delegate(association: bytes, prefix: IPv6Network, renew_s: int) -> bytes:
    """Return the IA_PD that gives the client this prefix and withdraws every other."""
    times = struct.pack("!II", renew_s, 2 * renew_s)
    content = association[:4] + times + make_prefix(prefix, VALID_S)
    for former in read_prefixes(association):
        is_hint = former.network_address.is_unspecified
        if former != prefix and not is_hint:
            content += make_prefix(former, 0)
    return make_option(IA_PD, content)


def make_reply(message: bytes, prefix: IPv6Network, renew_s: int) -> bytes:
    message_type = ADVERTISE if message[0] == SOLICIT else REPLY
    transaction = message[1:4]
    reply = bytes([message_type]) + transaction
    reply += make_option(SERVER_ID, SERVER_DUID)
    for code, content in read_options(message[4:]):
        if code == CLIENT_ID:
            reply += make_option(CLIENT_ID, content)
        elif code == IA_PD:
            reply += delegate(content, prefix, renew_s)
    return reply


def set_route(prefix: IPv6Network, gateway: str, device: str) -> None:
    route = ["ip", "-6", "route"]
    subprocess.run([*route, "flush", "proto", "dhcp"], check=True)
    next_hop = ["via", gateway, "dev", device]
    subprocess.run([*route, "add", str(prefix), *next_hop, "proto", "dhcp"], check=True)


def open_server(device: str) -> socket.socket:
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("::", SERVER_PORT))
    group = socket.inet_pton(socket.AF_INET6, SERVERS)
    index = struct.pack("@I", socket.if_nametoindex(device))
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + index)
    return server


def main(device: str, path: str, renew_s: int) -> None:
    server = open_server(device)
    while True:
        message, client = server.recvfrom(4096)
        with open(path, encoding="ascii") as file:
            prefix = IPv6Network(file.read().strip())

        reply = make_reply(message, prefix, renew_s)
        server.sendto(reply, client)
        if reply[0] == REPLY:
            gateway = client[0].partition("%")[0]
            set_route(prefix, gateway, device)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
