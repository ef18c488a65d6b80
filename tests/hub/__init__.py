"""A fake Hub server on the loopback interface: repositories with history, tokens, large files, failures on demand.

It speaks as much of the Hub's protocol as pushing and pulling a model takes, over real HTTP.  Whatever talks to it
must be a process of its own, with the variables of `LoopbackHub.environment`: the client reads them when it is
imported.
"""

from .protocol import BROKEN, CUT, GARBLED, READER, WRITER
from .repository import Commit, Repository
from .server import LoopbackHub


__all__ = ["BROKEN", "CUT", "GARBLED", "READER", "WRITER", "Commit", "LoopbackHub", "Repository"]
