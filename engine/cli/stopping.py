"""Ctrl-C and SIGTERM end the program within two seconds, whatever it is doing, with one line and nothing half-written.

Three stages. While libraries are imported, and once the command is over, there is nothing to undo: the handler ends the
process. While a command runs, the handler raises :class:`Stopped` in the main thread, whose ``with`` blocks remove what
they made. Python runs handlers only between its own instructions, so a thread of our own reads the signals as well: if
the main thread is in a long call of a library and has not left after :data:`GRACE`, the thread removes the temporary
files and ends the process. A second Ctrl-C does the same at once.

Only this module's imports lie before the handlers, so it may import nothing that takes time.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread
from types import FrameType
from typing import NoReturn, Protocol

GRACE = 1.0  # seconds for the main thread to leave by itself
PATIENCE = 10.0  # seconds for the end of what is worth keeping, a video's last frames for example
FAREWELL = 0.5  # seconds for the last line and for removing temporary files
REPEATED = 0.3  # seconds within which signals are one: timeout(1) sends each twice, to the process and to its group

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(SystemExit):
    """Raised in the main thread by the first signal; exits with 128 + its number, as shells have it."""


class LastWords(Protocol):
    """What the command says when it is stopped."""

    requested: bool

    def line(self) -> str: ...


class Stopping:
    """The handlers, and the thread that watches the main thread leave."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0 before
        self._unwinds = self._handled = self._pending = False
        self._interruption: LastWords | None = None
        self._discard: Callable[[], None] = lambda: None
        self._is_finishing: Callable[[], bool] = lambda: False
        self._ending = Lock()

    def install(self) -> None:
        """Take over the signals; only the program itself does this, never the library."""
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            # nohup means SIGHUP. SIGINT is ignored in a script's background too, but whoever sends it means it.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        Thread(target=self._watch, name="facetrt-signals", daemon=True).start()

    def unwind(self, interruption: LastWords, discard: Callable[[], None], is_finishing: Callable[[], bool]) -> None:
        """Let a signal unwind the main thread from here on.

        Args:
            interruption: told that it happens, and asked for the line.
            discard: removes the temporary files that are there.
            is_finishing: whether something worth keeping is being finished, which a signal waits for.
        """
        self._interruption, self._discard, self._is_finishing = interruption, discard, is_finishing
        self._unwinds = True

    def leave(self) -> None:
        """The command is over. If it was stopped, whatever came of that, the process ends here."""
        self._unwinds = False
        if self.number:
            self.end()

    def resume(self) -> None:
        """Called when what was worth keeping is finished: a signal that waited for it takes effect."""
        if self._pending:
            self._pending = False
            raise Stopped(128 + self.number)

    def end(self) -> NoReturn:
        """Say so and end the process: from any thread, and without waiting for others."""
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * FAREWELL)  # another thread is at it
        duties = [Thread(target=duty, daemon=True) for duty in (self._clean, self._say)]
        for duty in duties:
            try:
                duty.start()
            except RuntimeError:  # the interpreter is ending
                os._exit(128 + self.number)
        limit = time.monotonic() + FAREWELL
        for duty in duties:
            duty.join(max(0.0, limit - time.monotonic()))
        os._exit(128 + self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if not self._unwinds:
            self.end()
        if self._handled:
            return  # the thread sees to it
        self._handled = True
        if self._interruption is not None:
            self._interruption.requested = True
        if self._is_finishing():
            self._pending = True
            return
        raise Stopped(128 + self.number)

    def _watch(self) -> None:
        while not (number := self._next(None)):
            pass
        self.number = self.number or number
        if self._interruption is not None:
            self._interruption.requested = True
        began = now = time.monotonic()
        limit = began + GRACE
        while now < limit:
            again = self._next(0.05)
            now = time.monotonic()
            if again and now - began > REPEATED:
                break
            if self._is_finishing():
                limit = min(now, began + PATIENCE) + GRACE
        self.end()

    def _next(self, timeout: float | None) -> int:
        """The number of the next signal; 0 after ``timeout`` seconds, or for one that is not ours."""
        ready, _, _ = select.select([self._reading], [], [], timeout)
        number = os.read(self._reading, 1)[0] if ready else 0
        return number if number in SIGNALS else 0

    def _clean(self) -> None:
        for _ in range(2):  # threads that still write may undo the first
            self._discard()

    def _say(self) -> None:
        """One line, past Python's buffers, whose locks the main thread may hold."""
        text = "interrupted"
        with suppress(Exception):  # a line less is no reason to stay
            more = self._interruption.line() if self._interruption is not None else ""
            text = f"interrupted: {more}" if more else text
        with suppress(OSError, ValueError, AttributeError):
            if os.isatty(2):
                text = f"\r\x1b[2K\x1b[?25h{text}"  # clear a progress bar, show the cursor that it hid
            os.write(2, f"{text}\n".encode(sys.stderr.encoding or "ascii", "backslashreplace"))
