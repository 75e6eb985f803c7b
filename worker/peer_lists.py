"""What several routers say of a worker's peers, joined into one list.

Each router sends the peers that it knows, complete, at every change. They need not know the same
ones at the same moment, so a peer stays while any router names it. A router that goes takes its
word with it only if another one has spoken: where the only router restarts, KV sessions stay up.
"""

from protos.baton.v1 import worker_pb2
from worker.service import RouterSession


class PeerLists:
    """The last word of each router's session."""

    def __init__(self) -> None:
        self._said: dict[RouterSession, worker_pb2.PeerUpdate] = {}
        self._gone: set[RouterSession] = set()
        """Sessions that ended, and whose word still counts."""

    def say(self, session: RouterSession, update: worker_pb2.PeerUpdate) -> worker_pb2.PeerUpdate:
        """A router's list; the joined one."""
        self._said[session] = update
        self._forget_gone()
        return self.joined()

    def leave(self, session: RouterSession) -> worker_pb2.PeerUpdate:
        """A router's session ended; the joined list without it."""
        if session in self._said:
            self._gone.add(session)
            if self._gone != self._said.keys():
                self._forget_gone()
        return self.joined()

    def joined(self) -> worker_pb2.PeerUpdate:
        """Every peer that anybody names, once; the latest word on its address counts."""
        peers: dict[str, worker_pb2.Peer] = {}
        for update in self._said.values():
            peers |= {peer.instance_id: peer for peer in update.peers}
        return worker_pb2.PeerUpdate(peers=peers.values())

    def _forget_gone(self) -> None:
        for session in self._gone:
            del self._said[session]
        self._gone.clear()
