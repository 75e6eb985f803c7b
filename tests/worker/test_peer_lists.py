"""What several routers say of peers is joined; one that goes takes only its own word with it."""

from protos.baton.v1 import worker_pb2
from worker.peer_lists import PeerLists
from worker.service import RouterSession


def update(**addresses: str) -> worker_pb2.PeerUpdate:
    peers = [worker_pb2.Peer(instance_id=i, address=a) for i, a in addresses.items()]
    return worker_pb2.PeerUpdate(peers=peers)


def names(joined: worker_pb2.PeerUpdate) -> set[str]:
    return {peer.instance_id for peer in joined.peers}


def test_a_peer_stays_while_any_router_names_it() -> None:
    lists, one, other = PeerLists(), RouterSession("one"), RouterSession("other")
    assert names(lists.say(one, update(a="x:1", b="x:2"))) == {"a", "b"}
    assert names(lists.say(other, update(b="x:2", c="x:3"))) == {"a", "b", "c"}
    assert names(lists.say(one, update(b="x:2"))) == {"b", "c"}
    assert names(lists.say(other, update())) == {"b"}
    assert names(lists.say(one, update())) == set()


def test_a_router_that_goes_takes_its_word_with_it() -> None:
    lists, one, other = PeerLists(), RouterSession("one"), RouterSession("other")
    lists.say(one, update(a="x:1"))
    lists.say(other, update(b="x:2"))
    assert names(lists.leave(one)) == {"b"}


def test_where_the_only_router_goes_peers_stay_until_the_next_one_speaks() -> None:
    lists, one, other = PeerLists(), RouterSession("one"), RouterSession("one")
    lists.say(one, update(a="x:1", b="x:2"))
    assert names(lists.leave(one)) == {"a", "b"}
    assert names(lists.say(other, update(b="x:2"))) == {"b"}


def test_where_all_routers_go_the_last_ones_word_counts() -> None:
    lists, one, other = PeerLists(), RouterSession("one"), RouterSession("other")
    lists.say(one, update(a="x:1"))
    lists.say(other, update(b="x:2"))
    lists.leave(one)
    assert names(lists.leave(other)) == {"b"}


def test_a_router_that_never_spoke_changes_nothing() -> None:
    lists, one, silent = PeerLists(), RouterSession("one"), RouterSession("silent")
    lists.say(one, update(a="x:1"))
    assert names(lists.leave(silent)) == {"a"}
    assert names(lists.leave(one)) == {"a"}


def test_each_peer_is_named_once_under_its_latest_address() -> None:
    lists, one, other = PeerLists(), RouterSession("one"), RouterSession("other")
    lists.say(one, update(a="old:1"))
    joined = lists.say(other, update(a="new:1"))
    assert [(peer.instance_id, peer.address) for peer in joined.peers] == [("a", "new:1")]
