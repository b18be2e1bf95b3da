"""The report as PDF, drawn from its HTML by WeasyPrint: an optional extra that needs the Pango library of the system.

PDF/A-3a (archival, tagged for screen readers). The same HTML gives the same bytes with the same WeasyPrint and fonts: dates
and identifier come from the report, not from the clock. Nothing is fetched; an address in the page would be an error.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from PIL import ImageFile

VARIANT: Literal["pdf/a-3a"] = "pdf/a-3a"


class PdfUnavailable(RuntimeError):
    """No PDF can be made here; the message says what is missing and how to get it."""


def render_pdf(html: str) -> bytes:
    """A PDF of a page of :mod:`server.release.render`.

    Raises:
        PdfUnavailable: WeasyPrint or a library that it needs is not installed.
        ValueError: something in the page could not be drawn.
    """
    try:
        with warnings.catch_warnings(), _damaged_pictures_stay_errors():
            warnings.simplefilter("ignore", DeprecationWarning)  # of optional libraries, at import
            import weasyprint
            from weasyprint.urls import URLFetcher
    except ImportError as error:
        raise PdfUnavailable(
            "no PDF: WeasyPrint is not installed here; pip install 'medgen[pdf]', or print report.html from a browser"
        ) from error
    except OSError as error:  # WeasyPrint is there and cannot load a library of the system
        raise PdfUnavailable(
            "no PDF: the Pango library, which WeasyPrint needs, is not on this machine (Debian and Ubuntu: apt install "
            "libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0; macOS: brew install pango), or print report.html "
            f"from a browser. Seen: {str(error)[:160]}"
        ) from error
    page = weasyprint.HTML(string=html, url_fetcher=URLFetcher(allowed_protocols=("data",)))
    with _nothing_lost(logging.getLogger("weasyprint")), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its colour profile to the garbage collector
        body: bytes = page.write_pdf(
            pdf_identifier=hashlib.sha256(html.encode()).digest()[:16], pdf_variant=VARIANT, pdf_tags=True
        )
    return body


@contextmanager
def _damaged_pictures_stay_errors() -> Iterator[None]:
    """WeasyPrint tells Pillow, for the whole process, to read pictures that are cut off; a hospital's films may not be read so."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _nothing_lost(log: logging.Logger) -> Iterator[None]:
    """WeasyPrint logs what it leaves out. Styles for screens may be; a picture that it cannot draw may not."""
    lost: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                lost.append(record.getMessage())

    before, handlers, passes = log.level, list(log.handlers), log.propagate
    log.handlers, log.propagate = [_Collect()], False
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, passes
        log.setLevel(before)
    if lost:
        raise ValueError(f"the page could not be drawn whole: {lost[0][:160]}")
