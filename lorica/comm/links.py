"""Small messages between the ranks of one host: abstract unix sockets, one per pair, blocking and without spinning.

Nothing here knows what a collective is. A message says "rank p has come to exchange number `seq`, and its data is
there"; memory segments travel as file descriptors; acknowledgements say that data is not needed any more. A peer that
dies closes its sockets, which is noticed at the next wait, whichever rank is waited for.
"""

from __future__ import annotations

import array
import atexit
import os
import select
import socket
import struct
import time
import uuid
import weakref
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from lorica.comm.segments import attach


class Kind(IntEnum):
    """What a message is about: an exchange of a collective, or the links' own business."""

    ALL_GATHER = 0
    REDUCE_SCATTER = 1
    ALL_REDUCE = 2
    ALL_REDUCE_SUM = 3  # the second half of an all-reduce: "my part is summed"
    BROADCAST = 4
    BARRIER = 5
    SEGMENT = 16  # a file descriptor comes along; numel is its size in bytes
    DROP = 17  # the segment may be unmapped once exchange `seq` is complete
    ACK = 18  # "I am done with all exchanges up to seq"
    BYE = 19  # "I close, and read nothing any more"
    ABORT = 20  # "I failed"; the text follows

    def __str__(self) -> str:
        return self.name.lower()


class Message(NamedTuple):
    """One message; the meaning of the numbers depends on the kind."""

    kind: Kind
    dtype: int = 0
    direct: int = 0
    seq: int = 0
    numel: int = 0
    segment: int = 0
    offset_bytes: int = 0


_LAYOUT = struct.Struct("<BBBxxxxxQQQQ")
_HELLO = struct.Struct("<Q32s")
_MAX_MESSAGE_BYTES = 1024
_RIGHTS_BYTES = 64  # one file descriptor and its header
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_EVERYTHING = 1 << 62


class Listener:
    """Where the peers of this rank connect. Its address is a name that no file system holds."""

    def __init__(self) -> None:
        self.address = uuid.uuid4().hex
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(_abstract(self.address))
        self._socket.listen(socket.SOMAXCONN)

    def accept(self, deadline: float) -> tuple[int, socket.socket]:
        """Return the rank and the socket of the next peer of the same user that knows the address.

        Raises:
            TimeoutError: if none comes before `deadline`.
        """
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            link, _ = self._socket.accept()
            link.settimeout(max(deadline - time.monotonic(), 0.001))
            hello = link.recv(_HELLO.size) if _same_user(link) else b""
            if len(hello) == _HELLO.size:
                rank, address = _HELLO.unpack(hello)
                if address.decode() == self.address:
                    return rank, link
            link.close()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class Links:
    """Connections of this rank to all others of its group.

    Args:
        rank: of this process in the group.
        addresses: of the listeners of all ranks, in rank order.
        listener: of this rank.
        timeout_s: how long to wait for a peer before giving up.
    """

    def __init__(self, rank: int, addresses: Sequence[str], listener: Listener, timeout_s: float) -> None:
        self.rank = rank
        self.peers = [p for p in range(len(addresses)) if p != rank]
        self._timeout_s = timeout_s
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._arrived: dict[int, dict[int, Message]] = {p: {} for p in self.peers}
        self._last: dict[int, Message | None] = dict.fromkeys(self.peers)
        self._acked = dict.fromkeys(self.peers, 0)
        self._drops: list[tuple[int, int, int]] = []
        self._left: set[int] = set()
        self._broken = ""  # what a peer's end means for this rank
        self.failure = ""  # why this rank's links are of no use any more
        self._sockets = self._connect(addresses, listener)
        self._pids = {p: _peer_pid(link) for p, link in self._sockets.items()}
        self._by_fd = {link.fileno(): p for p, link in self._sockets.items()}
        self._poller = select.poll()
        for link in self._sockets.values():
            link.setblocking(False)
            self._poller.register(link.fileno(), select.POLLIN)
        _open_links.add(self)

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send `message` to all peers."""
        for peer in self.peers:
            self._send(peer, _LAYOUT.pack(*message))

    def send_segment(self, segment: int, num_bytes: int, fd: int) -> None:
        """Let all peers map a new segment of this rank."""
        body = _LAYOUT.pack(*Message(Kind.SEGMENT, numel=num_bytes, segment=segment))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        for peer in self.peers:
            self._send(peer, body, rights)

    def _send(self, peer: int, body: bytes, rights: Sequence[tuple[int, int, array.array[int]]] = ()) -> None:
        deadline = time.monotonic() + self._timeout_s
        while peer not in self._left:
            if self.failure:
                raise RuntimeError(self.failure)
            try:
                self._sockets[peer].sendmsg([body], rights, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._wait_writable(peer, deadline)
            except (BrokenPipeError, ConnectionResetError):
                self._drain(peer)  # the peer's last words: a goodbye, or why it failed
                self._require_alive()

    def _wait_writable(self, peer: int, deadline: float) -> None:
        """Wait until the peer takes messages, taking in what comes: it may be blocked on our queue in the same way."""
        fd = self._sockets[peer].fileno()
        self._poller.modify(fd, select.POLLIN | select.POLLOUT)
        self._pump(deadline, peer, f"rank {self.rank} sends")
        self._require_alive()
        if peer not in self._left:
            self._poller.modify(fd, select.POLLIN)

    # -- waiting -----------------------------------------------------------------------------------------------------

    def receive(self, peer: int, seq: int, what: str) -> Message:
        """Return the message of `peer` for exchange `seq`, waiting for it.

        Raises:
            RuntimeError: if any peer died or failed, or this one left or does not come in time.
        """
        arrived = self._arrived[peer]
        deadline = time.monotonic() + self._timeout_s
        while seq not in arrived:
            self._require_alive()
            if peer in self._left:
                raise self.fail(
                    f"{what}: rank {peer} has closed its transport and will not come. "
                    "Fix: all ranks must make the same collectives before close()."
                )
            self._pump(deadline, peer, what)
        return arrived.pop(seq)

    def acked(self, seq: int) -> bool:
        """Say whether all peers are known to be done with exchange `seq`, after a look at what has arrived."""
        if any(done < seq for done in self._acked.values()):
            self._take_in(0.0)
        return all(done >= seq for done in self._acked.values())

    def wait_acked(self, seq: int, what: str) -> None:
        """Return once all peers are done with exchange `seq`."""
        deadline = time.monotonic() + self._timeout_s
        while (late := next((p for p in self.peers if self._acked[p] < seq), None)) is not None:
            self._require_alive()
            self._pump(deadline, late, what)

    def memory(self, peer: int, segment: int) -> Tensor:
        """Return the bytes of a peer's segment."""
        return self._memory[peer, segment]

    def completed(self, seq: int) -> None:
        """Unmap the peers' segments that were only needed up to exchange `seq`."""
        for drop in [drop for drop in self._drops if drop[0] <= seq]:
            self._drops.remove(drop)
            self._memory.pop(drop[1:], None)

    def _pump(self, deadline: float, peer: int, what: str) -> None:
        """Wait for something to happen on any link and take it in.

        Raises:
            RuntimeError: at the deadline, naming `peer` as the late one.
        """
        if self._take_in(deadline - time.monotonic()) or time.monotonic() < deadline:
            return
        last = self._last[peer]
        came = f"its last signal was {last.kind} number {last.seq}" if last else "it has not signalled anything"
        raise self.fail(
            f"{what}: rank {peer} (pid {self._pids[peer]}) did not come within {self._timeout_s:g} s; {came}. "
            "Fix: look at what that rank is doing (py-spy dump --pid), or raise timeout= of init_distributed."
        )

    def _take_in(self, timeout_s: float) -> bool:
        """Take in what arrives within `timeout_s`; say whether anything happened."""
        events = self._poller.poll(max(timeout_s, 0.0) * 1000)
        for fd, event in events:
            if event & ~select.POLLOUT:
                self._drain(self._by_fd[fd])
        return bool(events)

    def _drain(self, peer: int) -> None:
        while True:
            try:
                body, rights, _, _ = self._sockets[peer].recvmsg(_MAX_MESSAGE_BYTES, _RIGHTS_BYTES, _CLOSE_ON_EXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # the peer closed with acks of ours unread; what it sent before, its goodbye too, comes next
            if not body:
                self._end(peer)
                return
            self._take(peer, body, rights)

    def _take(self, peer: int, body: bytes, rights: list[tuple[int, int, bytes]]) -> None:
        kind, *numbers = _LAYOUT.unpack_from(body)
        message = Message(Kind(kind), *numbers)
        if message.kind < Kind.SEGMENT:
            self._arrived[peer][message.seq] = self._last[peer] = message
        elif message.kind is Kind.SEGMENT:
            (fd,) = struct.unpack("i", rights[0][2])
            self._memory[peer, message.segment] = attach(fd, message.numel)
        elif message.kind is Kind.ACK:
            self._acked[peer] = max(self._acked[peer], message.seq)
        elif message.kind is Kind.DROP:
            self._drops.append((message.seq, peer, message.segment))
        elif message.kind is Kind.BYE:
            self._left.add(peer)
            self._acked[peer] = _EVERYTHING  # it reads nothing any more
        else:
            self._broken = f"rank {peer} (pid {self._pids[peer]}) gave up: {body[_LAYOUT.size :].decode()}"

    # -- the end -----------------------------------------------------------------------------------------------------

    def fail(self, reason: str) -> RuntimeError:
        """Tell all peers that this rank gives up, refuse all further use, and return the error to raise."""
        self.failure = reason
        text = reason.encode("ascii", "replace")[: _MAX_MESSAGE_BYTES - _LAYOUT.size]
        self._farewell(_LAYOUT.pack(*Message(Kind.ABORT)) + text)
        return RuntimeError(reason)

    def close(self) -> None:
        """Say goodbye and close the sockets; the memory goes when nobody uses it."""
        for link in self._sockets.values():
            link.settimeout(1.0)
        if not self.failure:
            self._farewell(_LAYOUT.pack(*Message(Kind.BYE)))
        self.forget()

    def forget(self) -> None:
        """Close the sockets without a word (also in a forked child, which must not keep them open)."""
        for link in self._sockets.values():
            link.close()
        self._sockets = {}
        self._memory = {}
        self.failure = self.failure or "shm: this transport is closed. Fix: make a new one with make_collectives()."

    def _end(self, peer: int) -> None:
        """The peer's socket has ended: fine after its goodbye, else it died."""
        self._poller.unregister(self._sockets[peer].fileno())
        if peer not in self._left:
            self._left.add(peer)
            self._broken = self._broken or (
                f"rank {peer} (pid {self._pids[peer]}) has died: its socket closed without a goodbye. "
                "Fix: look at that rank's own output (none: it was killed, perhaps for lack of memory)."
            )

    def _require_alive(self) -> None:
        """Raise RuntimeError if this rank or a peer has failed; what arrived before may still be used."""
        if self.failure:
            raise RuntimeError(self.failure)
        if self._broken:
            raise self.fail(self._broken)

    def _farewell(self, body: bytes) -> None:
        for peer, link in self._sockets.items():
            if peer not in self._left:
                try:
                    link.send(body, socket.MSG_NOSIGNAL)
                except (BlockingIOError, TimeoutError, BrokenPipeError, ConnectionResetError):
                    continue  # it is gone, or does not read: the closing socket will tell it

    # -- the beginning -----------------------------------------------------------------------------------------------

    def _connect(self, addresses: Sequence[str], listener: Listener) -> dict[int, socket.socket]:
        """Connect to the ranks below, accept the ranks above."""
        deadline = time.monotonic() + self._timeout_s
        links: dict[int, socket.socket] = {}
        for peer in range(self.rank):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.settimeout(self._timeout_s)
            link.connect(_abstract(addresses[peer]))
            link.send(_HELLO.pack(self.rank, addresses[peer].encode()))
            links[peer] = link
        while len(links) < len(self.peers):
            try:
                peer, link = listener.accept(deadline)
            except TimeoutError:
                missing = [p for p in self.peers if p not in links]
                for link in links.values():
                    link.close()
                raise RuntimeError(
                    f"shm: ranks {missing} of the group did not connect to rank {self.rank} within "
                    f"{self._timeout_s:g} s. Fix: look at their output; all ranks must call make_collectives()."
                ) from None
            links[peer] = link
        return links


def _abstract(address: str) -> bytes:
    return b"\0lorica-" + address.encode()


def _credentials(link: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid, gid


def _same_user(link: socket.socket) -> bool:
    return _credentials(link)[1] == os.getuid()


def _peer_pid(link: socket.socket) -> int:
    return _credentials(link)[0]


# A forked child (a data loader's worker) holds copies of the sockets: as long as it lives, its parent's death would go
# unnoticed. So every child closes them; hooks cannot be taken back, hence one hook and a set of weak references.
_open_links: weakref.WeakSet[Links] = weakref.WeakSet()


def _close_in_child() -> None:
    for links in list(_open_links):
        links.forget()


def _say_goodbye() -> None:
    for links in list(_open_links):
        links.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
atexit.register(_say_goodbye)  # a rank that ends well has not died, even if nobody closed its transport
