"""Which landed pages decode's role gets at once."""

import torch

from kvtransfer.events import PagesLanded, joined_landings
from kvtransfer.ticket import LandedPage

WINDOW = torch.zeros((4, 8), dtype=torch.uint8)


def landed(ticket: int, position: int, *, first_slot: int = 0) -> PagesLanded:
    page = LandedPage(slot=position, position=position, valid_tokens=1, seal=b"", chain_hash=b"")
    return PagesLanded(
        request_id=f"r{ticket}",
        ticket_id=ticket,
        window=WINDOW[:],  # as gRPC cuts it out of all windows' memory, anew for each event
        pages=(page,),
        first_slot=first_slot,
    )


def test_pages_of_one_ticket_in_one_window_are_one_event() -> None:
    joined = joined_landings(landed(1, 0), landed(1, 1))
    assert joined is not None
    assert [page.position for page in joined.pages] == [0, 1]


def test_pages_of_two_tickets_or_in_two_windows_are_two() -> None:
    assert joined_landings(landed(1, 0), landed(2, 1)) is None
    assert joined_landings(landed(1, 0), landed(1, 1, first_slot=4)) is None
