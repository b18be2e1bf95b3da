"""Hours of the day in which a site begins no round, as its data manager writes them: ``"08:00-18:00"``, local time."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable

_FORM = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY = 24 * 60


@dataclasses.dataclass(frozen=True)
class Hours:
    """One span of every day, by the clock on the wall; it may cross midnight.

    Attributes:
        begin, end: minutes since midnight; the span holds its first minute and not its last.
        text: as it was written.
    """

    begin: int
    end: int
    text: str

    @staticmethod
    def parse(text: str) -> Hours:
        """Read ``HH:MM-HH:MM``; ``24:00`` is allowed as an end.

        Raises:
            ValueError: another form, a time that no clock shows, or an empty span.

        >>> Hours.parse("22:30-06:00").holds(datetime.time(5, 59)), Hours.parse("22:30-06:00").holds(datetime.time(6))
        (True, False)
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f'{text!r}: expected hours like "08:00-18:00" or, over midnight, "22:00-06:00"')
        h1, m1, h2, m2 = map(int, match.groups())
        begin, end = 60 * h1 + m1, 60 * h2 + m2
        if m1 > 59 or m2 > 59 or begin >= _DAY or end > _DAY:
            raise ValueError(f"{text!r}: no clock shows that; expected 00:00 to 23:59, and at most 24:00 as the end")
        if begin == end:
            raise ValueError(f'{text!r}: it begins when it ends; write "00:00-24:00" for the whole day')
        return Hours(begin, end, text)

    def holds(self, time: datetime.time) -> bool:
        """Whether ``time`` (local) lies in the span."""
        minute = 60 * time.hour + time.minute
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


def quiet(spans: Iterable[Hours], now: datetime.datetime) -> Hours | None:
    """The span in which ``now``, a local time, lies; None outside all of them."""
    return next((span for span in spans if span.holds(now.time())), None)
