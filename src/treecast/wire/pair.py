"""Long-lived bidirectional streams: one per pair of processes, carrying all their sessions.

`Dialer` keeps the calling end up for ever, `Acceptor` serves the other; both hand `Link`s to a
`PairHandler`. This module is the front of the ones it imports.
"""

from treecast.wire.acceptor import Acceptor
from treecast.wire.dialer import Dialer
from treecast.wire.frames import BadFrame
from treecast.wire.greeting import is_hung
from treecast.wire.hop import SERVE, SPECULATE
from treecast.wire.link import Link

__all__ = ["SERVE", "SPECULATE", "Acceptor", "BadFrame", "Dialer", "Link", "is_hung"]
