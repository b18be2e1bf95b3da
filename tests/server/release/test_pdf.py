"""The PDF: archival, the same bytes each time, nothing fetched, and words where it cannot be made."""

from __future__ import annotations

import builtins
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from privacy.audit.gates import GatePolicy
from server.release.evidence import Evidence
from server.release.pdf import PdfUnavailable, render_pdf
from server.release.render import render_html
from server.release.report import build_report

PAGE = (
    '<html lang="en"><head><meta name="dcterms.created" content="2026-11-21T10:00:00Z">'
    '<meta name="dcterms.modified" content="2026-11-21T10:00:00Z"><title>t</title></head><body><p>{}</p></body></html>'
)

try:
    render_pdf(PAGE.format(""))
except PdfUnavailable as problem:
    WHY_NOT = str(problem)
else:
    WHY_NOT = ""
drawn = pytest.mark.skipif(bool(WHY_NOT), reason=f"WeasyPrint is an extra: {WHY_NOT}")


@drawn
def test_same_report_same_bytes() -> None:
    html = render_html(build_report(Evidence(study="empty", created="2026-11-21T10:00:00Z"), GatePolicy()), {})
    body = render_pdf(html)
    assert body == render_pdf(html)
    assert body.startswith(b"%PDF-1.7")
    said = b"".join(_streams(body))
    assert re.search(rb"pdfaid:(part>3<|part=.3.)", said)  # archival, as it says of itself
    assert re.search(rb"pdfaid:(conformance>A<|conformance=.A.)", said)  # and readable aloud


@drawn
def test_another_report_is_another_file() -> None:
    assert render_pdf(PAGE.format("a")) != render_pdf(PAGE.format("b"))


@drawn
@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.png", "file:///etc/hostname"])
def test_a_picture_from_elsewhere_is_an_error_and_not_a_gap(address: str) -> None:
    with pytest.raises(ValueError, match="could not be drawn whole"):
        render_pdf(PAGE.format(f'<img src="{address}" alt="x">'))


@drawn
def test_films_that_are_cut_off_are_not_read_because_a_report_was_drawn(tmp_path: Path) -> None:
    """WeasyPrint, once imported, makes Pillow read damaged pictures everywhere in the process."""
    render_pdf(PAGE.format("a"))
    Image.effect_noise((64, 64), 40).save(tmp_path / "film.png")
    body = (tmp_path / "film.png").read_bytes()
    (tmp_path / "film.png").write_bytes(body[: len(body) // 2])
    with pytest.raises(OSError, match="truncated"), Image.open(tmp_path / "film.png") as image:
        image.load()


def _streams(pdf: bytes) -> Iterator[bytes]:
    """Every stream of a PDF, inflated where it is packed."""
    for body in re.findall(rb"stream\n(.*?)\nendstream", pdf, flags=re.S):
        try:
            yield zlib.decompress(body)
        except zlib.error:
            yield body


def _import_that_raises(error: Exception) -> Callable[..., ModuleType]:
    real = builtins.__import__

    def importing(name: str, *rest: Any) -> ModuleType:
        if name.split(".")[0] == "weasyprint":
            raise error
        return real(name, *rest)

    return importing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("No module named 'weasyprint'"), r"pip install 'medgen\[pdf\]'"),
        (OSError("cannot load library 'libpango-1.0-0'"), "apt install libpango-1.0-0"),
    ],
)
def test_without_weasyprint_or_pango_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "weasyprint"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", _import_that_raises(error))
    with pytest.raises(PdfUnavailable, match=words):
        render_pdf(PAGE.format("x"))
