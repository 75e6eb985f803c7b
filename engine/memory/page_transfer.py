"""One copy between device and host on behalf of the prefix tree, while it goes on."""

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.memory.page_copier import PageCopy
from engine.memory.prefix_cache import TreeNode


class Direction(Enum):
    OUT = auto()
    """From the device to the host: the nodes keep their pages until it has ended."""
    BACK = auto()
    """From the host to new pages on the device, which are nobody's until it has ended."""


@dataclass(eq=False, slots=True, kw_only=True)
class PageTransfer:
    """Node after node, the pages of both sides. A node that is split meanwhile stays covered: its
    upper part takes the place before it."""

    direction: Direction
    nodes: list[TreeNode]
    host_pages: list[int]
    device_pages: list[int] = field(default_factory=list)
    anchor: TreeNode | None = None
    """BACK: the node on the device below which the pages will hang; locked meanwhile."""
    copy: PageCopy = field(init=False)
    """Set when it is started."""

    def on_split(self, *, upper: TreeNode, lower: TreeNode) -> None:
        self.nodes.insert(self.nodes.index(lower), upper)
