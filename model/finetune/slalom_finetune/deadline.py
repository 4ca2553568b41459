"""When a process has to end."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

UNFINISHED = 3  # exit status of a run that ended before its work was done, to go on in the next one


class Deadline:
    """`seconds` from now; SIGTERM brings it forward to now.

    `over` says that no more than `reserve` seconds are left, for saving.  A process that is stuck (in a compiler,
    say) when no time is left at all ends at once, with its last checkpoint.
    """

    def __init__(self, seconds: float | None, reserve: float = 5.0):
        self.end, self.reserve = math.inf if seconds is None else time.time() + seconds, reserve
        signal.signal(signal.SIGTERM, self._stop)
        if seconds is not None:
            guard = threading.Timer(max(seconds, 0.0), os._exit, (UNFINISHED,))
            guard.daemon = True
            guard.start()

    def _stop(self, *unused: object) -> None:
        self.end = 0.0

    def left(self) -> float:
        return self.end - time.time()

    def over(self) -> bool:
        return self.left() <= self.reserve
