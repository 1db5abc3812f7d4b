"""Bytes that this process has sent over TCP, as Linux counts them for each of its sockets."""

import os
import socket
import stat
import struct

BYTES_SENT = 200
"""Offset of tcpi_bytes_sent in tcp_info (Linux 4.19 and newer)."""


def sent_bytes() -> int:
    """Add up what the open TCP sockets of this process have sent, headers excluded."""
    total = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
        except OSError:  # that of /proc/self/fd, which is closed by now
            continue
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 8)
                total += struct.unpack_from("<Q", info, BYTES_SENT)[0]
    return total
