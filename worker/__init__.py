"""What every worker process has, whatever its role.

A worker is two processes joined by a typed channel: the *front* speaks gRPC on asyncio, the
*engine* schedules and computes. Python's lock therefore never makes a decode step wait for a
socket. Either process's death ends the other within a second.
"""
