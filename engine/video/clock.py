"""Time of a file that only goes on, whatever its time stamps say."""

from __future__ import annotations

JUMP = 60.0  # seconds between two frames that are taken for a fault, unless the first one's duration says so
JUMP_OF_BROADCAST = 10.0  # in containers whose clock may begin again, such as MPEG-TS
LONGEST = 1.0  # seconds that a frame may last where one is to be made up


class Clock:
    """Seconds since the beginning, of frames in the order in which they are shown.

    A time stamp that is missing, not later than the one before, or much later, as in joined files and where a clock of
    33 bits wraps, goes on by one frame; from there on its clock counts.

    Args:
        step: seconds of a frame where nothing else is known.
        jump: seconds that no two frames are apart.
    """

    def __init__(self, step: float, jump: float = JUMP) -> None:
        self.step, self._jump = step, jump
        self._raw: float | None = None  # the last time stamp, if it was there
        self._now: float | None = None
        self._number = 0
        self._duration = self._interval = 0.0

    def at(self, number: int, raw: float | None, duration: float = 0.0) -> float:
        """The time of frame ``number`` with the time stamp ``raw`` (the first one should be near 0)."""
        if self._now is None:
            now = raw if raw is not None and abs(raw) < self._jump else number * self.step
        elif raw is None or self._raw is None or not self._follows(raw - self._raw):
            now = self._now + self._frame() * max(number - self._number, 1)
        else:
            self._interval = (raw - self._raw) / max(number - self._number, 1)
            now = self._now + raw - self._raw
        self._raw, self._now, self._number, self._duration = raw, now, number, duration
        return now

    def _follows(self, delta: float) -> bool:
        return 0 < delta <= max(self._jump, 1.5 * self._duration)

    def _frame(self) -> float:
        """Seconds from one frame to the next, as the last two were apart, or as is said of them."""
        return next((s for s in (self._interval, self._duration) if 0 < s <= LONGEST), self.step)
