"""Long-lived bidirectional streams: one per pair of processes, carrying all their sessions.

`Dialer` keeps the calling end up for ever, `Acceptor` serves the other; both hand `Link`s to a
`PairHandler`. This module is the front of the ones it imports.
"""

from treecast.wire.acceptor import Acceptor
from treecast.wire.dialer import Dialer
from treecast.wire.frames import BadFrame
from treecast.wire.greeting import accept_any, check_peer, is_hung
from treecast.wire.hop import SERVE, SPECULATE, Hop
from treecast.wire.link import HEARTBEAT_S, SILENCE_S, Link, PairHandler
from treecast.wire.outbox import Outbox

__all__ = [
    "HEARTBEAT_S",
    "SERVE",
    "SILENCE_S",
    "SPECULATE",
    "Acceptor",
    "BadFrame",
    "Dialer",
    "Hop",
    "Link",
    "Outbox",
    "PairHandler",
    "accept_any",
    "check_peer",
    "is_hung",
]
