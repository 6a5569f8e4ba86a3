"""The messages between ranks of one host, with both ends in this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lorica.comm.links import Kind, Links, Listener, Message


def pair() -> tuple[Links, Links]:
    """The links of two ranks."""
    listeners = [Listener(), Listener()]
    addresses = [listener.address for listener in listeners]
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(Links, rank, addresses, listeners[rank], 5.0) for rank in (0, 1)]
        first, second = (future.result() for future in made)
    for listener in listeners:
        listener.close()
    return first, second


def test_a_goodbye_is_heard_although_the_leaver_never_read_the_last_acks() -> None:
    leaver, stayer = pair()
    leaver.send(Message(Kind.BARRIER, seq=1))
    stayer.send(Message(Kind.ACK, seq=1))  # stays unread: closing now resets the connection
    leaver.close()
    assert stayer.receive(0, 1, "test").kind is Kind.BARRIER
    assert stayer.acked(99)  # after a goodbye nothing is read any more
    stayer.send(Message(Kind.BARRIER, seq=2))  # to nobody, without an error
    assert not stayer.failure
    stayer.close()
