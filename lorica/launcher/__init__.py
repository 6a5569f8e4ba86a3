"""The launcher: one node's ranks, started, watched and ended. Never imports torch, so that a job starts at once.

flags      the command line -> Options                slots     which devices, how many processes
devices    how many accelerators this machine has     cores     how many CPU cores, and which rank gets which
job        Options -> one command per rank            supervise start, watch, end
bootstrap  the first code inside each rank            reaper    finds and ends every process of a job
verdict    which rank failed first, and why           report    `lorica report`

[Note: why the ranks of one node are not started by torchrun]
Measured on 2 cores with torch 2.13, two ranks: an empty script takes 3.5 s under torchrun, whose agent imports torch
before any rank does, and 0.25 s here; a script that makes a gloo group takes 9.0 s under torchrun and 6.2 s started
directly. torchrun's store listens on every interface; a killed agent leaves its ranks training; an exit code other
than 1 is lost; and of 13 injected faults it named the right rank in 6. So this package starts the processes of one
node itself and sets the same environment variables, which is all that a script sees of torchrun: a script started by
torchrun runs as well (docs/launcher.md). Several nodes need a rendezvous, and that is torchrun's work: its agents will
run `bootstrap` in place of the script.
"""
