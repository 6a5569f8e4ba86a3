"""Process groups and collectives on flat tensors: the public names of the communication layer."""

from lorica.comm.base import Collectives, Done, Event, Handle, Streams, Traffic
from lorica.comm.environment import Place, find_place
from lorica.comm.groups import init_distributed, make_collectives

__all__ = [
    "Collectives",
    "Done",
    "Event",
    "Handle",
    "Place",
    "Streams",
    "Traffic",
    "find_place",
    "init_distributed",
    "make_collectives",
]
