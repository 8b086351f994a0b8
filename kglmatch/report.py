"""One self-contained HTML file about a registration or a check: pictures, residuals, verdict, provenance."""

from __future__ import annotations

import base64
import datetime
import html
import io
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from kglmatch.errors import KGLMatchError
from kglmatch.files import atomic_output
from kglmatch.options import __version__
from kglmatch.registration.files import check_ending
from kglmatch.registration.results import Registration, RegistrationCheck
from kglmatch.visualize import draw_checkerboard, draw_overlay

Image = NDArray[np.float32]

REPORT = (".html", ".htm")
_QUALITY = 85  # of the JPEG pictures
_WIDEST = 1400  # pixels of a picture
_BARS = 24  # of the histogram
_ROUND = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Accuracy:
    """What residual displacements amount to, in pixels of the visible image.

    Attributes:
        count: points that were judged.
        rmse: root of the mean squared length.
        ce90: circular error, the length that 90 % of the points do not exceed.
        median, largest: of the lengths.
        bias: (x, y), mean displacement.
    """

    count: int
    rmse: float
    ce90: float
    median: float
    largest: float
    bias: tuple[float, float]


def accuracy_of(check: RegistrationCheck) -> Accuracy | None:
    """The accuracy that a check measured; None where no point was judged."""
    moved = check.displacement[check.judged].astype(np.float64)
    if not len(moved):
        return None
    length = np.linalg.norm(moved, axis=1)
    x, y = moved.mean(axis=0)
    return Accuracy(
        len(moved),
        float(np.sqrt(np.square(length).mean())),
        float(np.percentile(length, 90)),
        float(np.median(length)),
        float(length.max()),
        (float(x), float(y)),
    )


def save_report(
    path: str | os.PathLike[str],
    vis: Image,
    ir: Image,
    check: RegistrationCheck | None,
    *,
    registration: Registration | None = None,
    names: tuple[str, str] = ("visible image", "other image"),
    model: str | None = None,
    command: Sequence[str] | None = None,
    pixel_size: float | None = None,
    on_map: bool = False,
) -> None:
    """Writes a report that opens without a network: nothing in it refers to another file or address.

    Args:
        path: .html or .htm.
        vis, ir: (H, W) float32 grey, as they were registered or checked.
        check: residual displacements: of the two images, or, with a registration, of the visible image and
            the warped one (`Matcher.check(vis, registration.warp(ir))`). None where nothing was checked.
        registration: what was found; None for the report of a check.
        names: of the two images.
        model: that judged.
        command: the command line that wrote the report, as a list of arguments.
        pixel_size: ground size of a visible pixel in metres; lengths are then given in metres too.
        on_map: whether the map put the other image onto the visible one's pixels, before the registration.

    Raises:
        KGLMatchError: a pixel size that is no number above 0.
        OutputError: another ending, or a file that cannot be written.
    """
    check_ending(path, REPORT, "a report")
    if pixel_size is not None and not 0 < pixel_size < float("inf"):
        raise KGLMatchError(f"pixel_size must be a number of metres above 0, got {pixel_size}")
    text = _page(vis, ir, check, registration, names, model, command, pixel_size, on_map)
    with atomic_output(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def _page(
    vis: Image,
    ir: Image,
    check: RegistrationCheck | None,
    registration: Registration | None,
    names: tuple[str, str],
    model: str | None,
    command: Sequence[str] | None,
    pixel_size: float | None,
    on_map: bool,
) -> str:
    verdict = registration.verdict if registration is not None else check.verdict if check else "failed"
    title = "Registration report" if registration is not None else "Check of a registration"
    accuracy = None if check is None else accuracy_of(check)
    parts = [
        _header(title, verdict, names),
        _reasons(verdict, check, registration, accuracy),
        _cards(accuracy, check, pixel_size),
    ]
    if registration is None or registration.transform is not None:
        parts.append(_pictures(vis, ir, registration, None if accuracy is None else check, on_map))
    if check is not None and accuracy is not None:
        parts.append(_residuals(check, accuracy, pixel_size))
    if registration is not None and registration.transform is not None:
        parts.append(_transform(registration, registration.transform, on_map))
    parts.append(_provenance(vis, ir, names, model, command, pixel_size, on_map))
    return _TEMPLATE.format(
        title=_text(f"{title}: {Path(names[1]).name}"), style=_STYLE, body="\n".join(parts)
    )


# --- sections -------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _header(title: str, verdict: str, names: tuple[str, str]) -> str:
    vis, ir = (_text(Path(name).name) for name in names)
    return (
        f'<header><div><h1>{_text(title)}</h1><p class="pair"><b>{ir}</b> on <b>{vis}</b></p></div>'
        f'<p class="verdict {_text(verdict)}">{_text(verdict)}</p></header>'
    )


def _reasons(
    verdict: str,
    check: RegistrationCheck | None,
    registration: Registration | None,
    accuracy: Accuracy | None,
) -> str:
    """Why the verdict is what it is."""
    lines = []
    if registration is not None:
        inliers, places = int(registration.inliers.sum()), len(registration.inliers)
        lines += [
            f"Confidence {registration.confidence:.2f}; the verdict is <i>registered</i> from 0.50.",
            f"Structure: held-out windows support the transform with {registration.support:.2f} "
            f"(below 0.12 it says nothing); {inliers} of {places} places agree with it.",
            f"Network: an agreement of {100 * registration.agreement:.0f} % (50 % is chance). Aligned "
            "patches are more alike than so many of the others; less counts where few of them match.",
        ]
        if registration.num_matches:
            lines.append(
                f"{registration.num_matches} keypoint matches, found without a prior, agree with it."
            )
        correction = registration.correction
        if correction is not None and correction.field is not None:
            lines.append(
                f"Local correction applied: up to {correction.field.largest():.2f} px; on windows that its "
                f"fit "
                f"did not see, correlation rises by {correction.gain:.3f} "
                f"({correction.significance:.1f} standard errors)."
            )
        elif correction is not None:
            lines.append(
                f"Local correction refused: {_text(correction.reason)}. The global transform is used."
            )
    if check is not None:
        where = "after registration" if registration is not None else "between the images"
        if accuracy is None:
            lines.append(f"Residual displacements {where} could not be measured.")
        else:
            lines.append(
                f"Residual displacements {where}: {accuracy.count} of {len(check.points)} points could be "
                f"judged."
            )
    meaning = {
        "registered": "The evidence supports this result.",
        "doubtful": "The evidence is weak: look at the pictures before you use the result.",
        "failed": "The content of the two images was not found to agree; no result should be used.",
    }[verdict]
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section><p class="lead">{meaning}</p><ul>{items}</ul></section>'


def _cards(accuracy: Accuracy | None, check: RegistrationCheck | None, pixel_size: float | None) -> str:
    if accuracy is None or check is None:
        return ""
    values = [
        ("RMSE", accuracy.rmse),
        ("CE90", accuracy.ce90),
        ("median", accuracy.median),
        ("largest", accuracy.largest),
    ]
    cards = [_card(name, f"{value:.2f} px", _metres(value, pixel_size)) for name, value in values]
    x, y = accuracy.bias
    cards.append(_card("mean shift", f"{x:+.2f}, {y:+.2f}", "px" + _metres((x, y), pixel_size, "; ")))
    cards.append(_card("judged", f"{100 * check.judged_share:.0f} %", f"{accuracy.count} points"))
    return f'<section class="cards">{"".join(cards)}</section>'


def _card(name: str, value: str, below: str) -> str:
    return f'<div class="card"><span>{name}</span><strong>{value}</strong><em>{below}</em></div>'


def _metres(value: float | tuple[float, float], pixel_size: float | None, before: str = "") -> str:
    if pixel_size is None:
        return ""
    if isinstance(value, tuple):
        return before + ", ".join(f"{v * pixel_size:+.2f}" for v in value) + " m"
    return f"{before}{value * pixel_size:.3g} m"


def _pictures(
    vis: Image,
    ir: Image,
    registration: Registration | None,
    check: RegistrationCheck | None,
    on_map: bool,
) -> str:
    found = None if registration is None else registration.transform
    transform = np.eye(3) if found is None else found
    local = None if registration is None else registration.local
    figures = []
    if registration is not None and vis.shape == ir.shape:
        before = draw_checkerboard(vis, ir, np.eye(3))
        how = "where the map puts the other image" if on_map else "pixel on pixel, as the files are"
        figures.append(_figure(before, "Checkerboard before registration", how))
    checkerboard = draw_checkerboard(vis, ir, transform, local=local)
    name = "Checkerboard" if registration is None else "Checkerboard after registration"
    figures.append(_figure(checkerboard, name, "edges continue from square to square where the two agree"))
    overlay = draw_overlay(vis, ir, transform, local=local)
    figures.append(
        _figure(overlay, "Overlay", "edges that coincide are grey; red and cyan pairs of lines are apart")
    )
    if check is not None:
        wide = "" if len(figures) % 2 else ' class="wide"'
        caption = (
            "<b>Residual displacement</b> from where the content of the other image should be to where it "
            f"is, drawn {_factor(check):g} x; brighter arrows are more certain, dots could not be judged"
        )
        figures.append(f"<figure{wide}>{_arrows(vis, check)}<figcaption>{caption}</figcaption></figure>")
    return f'<section><h2>Pictures</h2><div class="figures">{"".join(figures)}</div></section>'


def _figure(picture: NDArray[np.uint8], name: str, caption: str) -> str:
    return (
        f'<figure><img alt="{_text(name)}" src="{_data_uri(picture)}">'
        f"<figcaption><b>{_text(name)}</b> {_text(caption)}</figcaption></figure>"
    )


def _data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture (H, W) or (H, W, 3) as a JPEG within the page."""
    if picture.shape[1] > _WIDEST:
        size = _WIDEST, max(1, round(picture.shape[0] * _WIDEST / picture.shape[1]))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _residuals(check: RegistrationCheck, accuracy: Accuracy, pixel_size: float | None) -> str:
    return (
        "<section><h2>Residual displacement</h2><div class='figures'>"
        f"<figure>{_histogram(check, accuracy, pixel_size)}<figcaption><b>Lengths</b> of the residual "
        f"displacements of {accuracy.count} points</figcaption></figure>"
        f"<figure>{_scatter(check, accuracy)}<figcaption><b>Components</b> to the right and downwards, in "
        "pixels; the circle is CE90 about no displacement</figcaption></figure></div></section>"
    )


def _factor(check: RegistrationCheck) -> float:
    """A round enlargement of the arrows: most are at most a tenth of the image long."""
    length = np.linalg.norm(check.displacement[check.judged], axis=1)
    most = max(check.image_size) / 10 / max(float(np.percentile(length, 95)), 1e-3)
    steps = [r * 10.0**power for power in range(3) for r in _ROUND]
    return max((s for s in steps if s <= min(most, 100)), default=1.0)


def _arrows(vis: Image, check: RegistrationCheck) -> str:
    width, height = check.image_size
    unit = max(width, height) / 1000
    factor = _factor(check)
    marks = []
    for (x, y), (dx, dy), certainty, judged in zip(
        (check.points + 0.5).tolist(),  # a pixel's centre, where a picture starts at its corner
        check.displacement.tolist(),
        check.certainty.tolist(),
        check.judged.tolist(),
        strict=True,
    ):
        if not judged:
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 * unit:.2f}" class="none"/>')
            continue
        end_x, end_y = x + factor * dx, y + factor * dy
        length = float(np.hypot(end_x - x, end_y - y))
        head = min(9 * unit, 0.5 * length)
        opacity = f"{0.45 + 0.55 * max(0.0, min(1.0, 2 * certainty - 1)):.2f}"
        path = f"M{x:.1f} {y:.1f}L{end_x:.1f} {end_y:.1f}"
        if head > 0.5 * unit:
            ux, uy = (end_x - x) / length * head, (end_y - y) / length * head
            for sx, sy in ((-ux - 0.55 * uy, -uy + 0.55 * ux), (-ux + 0.55 * uy, -uy - 0.55 * ux)):
                path += f"M{end_x:.1f} {end_y:.1f}l{sx:.1f} {sy:.1f}"
        marks.append(f'<path d="{path}" class="rim"/><path d="{path}" class="arrow" opacity="{opacity}"/>')
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.2 * unit:.2f}" class="start"/>')
    grey = np.rint(np.clip(vis, 0, 1) * 190).astype(np.uint8)
    lengths = [r * 10.0**power for power in range(-2, 3) for r in _ROUND]
    key = max((length for length in lengths if length * factor <= width / 6), default=lengths[0])
    key_x, key_y = 24 * unit, height - 24 * unit
    key_mark = (
        f'<rect x="{12 * unit:.1f}" y="{height - 58 * unit:.1f}" '
        f'width="{max(key * factor + 24 * unit, 110 * unit):.1f}" '
        f'height="{46 * unit:.1f}" rx="{6 * unit:.1f}" class="key"/>'
        f'<path d="M{key_x:.1f} {key_y:.1f}h{key * factor:.1f}" class="arrow"/>'
        f'<text x="{key_x:.1f}" y="{key_y - 10 * unit:.1f}" font-size="{18 * unit:.1f}" '
        f'class="label">{key:g} px</text>'
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Residual displacement" '
        f'style="--line:{2.2 * unit:.2f}px"><image href="{_data_uri(grey)}" width="{width}" '
        f'height="{height}" '
        f'preserveAspectRatio="none"/>{"".join(marks)}{key_mark}</svg>'
    )


def _histogram(check: RegistrationCheck, accuracy: Accuracy, pixel_size: float | None) -> str:
    length = np.linalg.norm(check.displacement[check.judged], axis=1)
    step = _nice(max(accuracy.largest, 0.05) / _BARS)
    edges = np.arange(0, accuracy.largest + 2 * step, step)
    counts, _ = np.histogram(length, edges)
    left, right, top, bottom = 46, 584, 16, 300
    scale_x, scale_y = (right - left) / edges[-1], (bottom - top) / max(counts.max(), 1)
    bars = "".join(
        f'<rect x="{left + edge * scale_x + 0.5:.1f}" y="{bottom - count * scale_y:.1f}" '
        f'width="{max(step * scale_x - 1, 0.5):.1f}" height="{count * scale_y:.1f}" class="bar"/>'
        for edge, count in zip(edges[:-1].tolist(), counts.tolist(), strict=True)
    )
    ticks = []
    tick = _nice(edges[-1] / 6)
    for value in np.arange(0, 0.95 * edges[-1], tick).tolist():
        x = left + value * scale_x
        below = "" if pixel_size is None else f" ({value * pixel_size:.3g} m)"
        ticks.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" class="tick" text-anchor="middle">{value:g}{below}</text>'
        )
    tick = max(1, _nice(counts.max() / 4))
    for value in np.arange(0, counts.max() + 1e-9, tick).tolist():
        y = bottom - value * scale_y
        ticks.append(f'<path d="M{left} {y:.1f}H{right}" class="rule"/>')
        ticks.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick" text-anchor="end">{value:g}</text>')
    # Labels start left of their line where it is far to the right, and the second one lower.
    marks = "".join(
        f'<path d="M{left + value * scale_x:.1f} {bottom}V{top}" class="mark"/>'
        f'<text x="{left + value * scale_x + (5 if value * scale_x < 400 else -5):.1f}" y="{y}" '
        f'class="marked" '
        f'text-anchor="{"start" if value * scale_x < 400 else "end"}">{name} {value:.2f}</text>'
        for name, value, y in (("RMSE", accuracy.rmse, top + 10), ("CE90", accuracy.ce90, top + 28))
    )
    return (
        f'<svg viewBox="0 0 600 350" role="img" aria-label="Histogram">{"".join(ticks)}{bars}{marks}'
        f'<text x="{(left + right) / 2}" y="{bottom + 42}" class="tick" '
        f'text-anchor="middle">pixels</text></svg>'
    )


def _scatter(check: RegistrationCheck, accuracy: Accuracy) -> str:
    moved = check.displacement[check.judged].astype(np.float64)
    reach = max(float(np.percentile(np.abs(moved), 99)), accuracy.ce90, 0.05) * 1.15
    left, top, side = 145, 16, 290
    middle_x, middle_y, scale = left + side / 2, top + side / 2, side / 2 / reach
    inside = (np.abs(moved) <= reach).all(axis=1)
    dots = "".join(
        f'<circle cx="{middle_x + x * scale:.1f}" cy="{middle_y + y * scale:.1f}" r="2.4" class="dot"/>'
        for x, y in moved[inside].tolist()
    )
    tick = _nice(reach / 4)  # two of them, three or four, on each side of 0
    ticks = "".join(
        f'<path d="M{middle_x + v * scale:.1f} {top}v{side}M{left} {middle_y + v * scale:.1f}h{side}" '
        f'class="rule"/>'
        f'<text x="{middle_x + v * scale:.1f}" y="{top + side + 18}" class="tick" '
        f'text-anchor="middle">{v:g}</text>'
        f'<text x="{left - 6}" y="{middle_y + v * scale + 4:.1f}" class="tick" text-anchor="end">{v:g}</text>'
        for v in (np.arange(-int(reach / tick), int(reach / tick) + 1) * tick).tolist()
    )
    return (
        f'<svg viewBox="0 0 600 350" role="img" aria-label="Components">{ticks}'
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="frame"/>{dots}'
        f'<circle cx="{middle_x}" cy="{middle_y}" r="{accuracy.ce90 * scale:.1f}" class="ring"/></svg>'
    )


def _nice(value: float) -> float:
    """The round number, 1, 2 or 5 times a power of ten, that is at least this."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return float(next(r * power for r in (1, 2, 5, 10) if r * power >= value * (1 - 1e-9)))


def _transform(registration: Registration, transform: NDArray[np.float64], on_map: bool) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{value:.8g}</td>" for value in row) + "</tr>" for row in transform.tolist()
    )
    local = registration.local
    more = ""
    if local is not None:
        columns, down = local.cells
        more = (
            f"<p>Before it, each visible pixel x is moved to x + u(x) by a cubic B-spline of {columns} x "
            f"{down} "
            f"cells, up to {local.largest():.2f} px. The file of <code>--save</code> holds it.</p>"
        )
    pixels = "other pixels as the map puts them on the same grid" if on_map else "other pixels"
    return (
        f"<section><h2>Transform</h2><p>{_text(registration.kind)}, from visible to {_text(pixels)} "
        f"(the first pixel's centre is 0, 0):</p><table class='matrix'>{rows}</table>{more}</section>"
    )


def _provenance(
    vis: Image,
    ir: Image,
    names: tuple[str, str],
    model: str | None,
    command: Sequence[str] | None,
    pixel_size: float | None,
    on_map: bool,
) -> str:
    place = " on the grid of the visible image" if on_map else ""
    rows = [
        ("visible image", f"{names[0]}, {vis.shape[1]} x {vis.shape[0]}"),
        ("other image", f"{names[1]}, {ir.shape[1]} x {ir.shape[0]}{place}"),
    ]
    if pixel_size is not None:
        rows.append(("ground size of a visible pixel", f"{pixel_size:g} m"))
    if model is not None:
        rows.append(("model", model))
    rows.append(
        (
            "versions",
            f"kglmatch {__version__}, Python {platform.python_version()}, numpy {np.__version__}, "
            f"OpenCV {cv2.__version__}",
        )
    )
    rows.append(("written", datetime.datetime.now().astimezone().isoformat(timespec="seconds")))
    if command is not None:
        rows.append(("command", shlex.join(command)))
    body = "".join(
        f"<tr><th>{_text(name)}</th><td>{'<code>' if name == 'command' else ''}{_text(value)}"
        f"{'</code>' if name == 'command' else ''}</td></tr>"
        for name, value in rows
    )
    return (
        f"<section><h2>How it was made</h2><table class='facts'>{body}</table>"
        "<p class='note'>RMSE is the root of the mean squared length of the residual displacements at the "
        "points "
        "that could be judged; CE90 is the length that 90 % of them do not exceed. Both are measured from "
        "the "
        "images' content, and include what the two sensors show differently.</p></section>"
    )


# --- the page -------------------------------------------------------------------------------------

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root{--back:#f5f6f7;--card:#fff;--text:#1c2126;--quiet:#5d6872;--rule:#dfe3e7;--accent:#00796b;--bar:#4f9d94}
@media (prefers-color-scheme:dark){:root{--back:#15181b;--card:#1f2429;--text:#e8eaec;--quiet:#9aa5af;
--rule:#343b42;--accent:#4db6ac;--bar:#3d8b82}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 48px}
header{display:flex;justify-content:space-between;align-items:flex-start;gap:24px;margin-bottom:20px}
h1{font-size:28px;line-height:1.2;margin:0}
h2{font-size:19px;margin:0 0 14px}
.pair{margin:6px 0 0;color:var(--quiet);overflow-wrap:anywhere}.pair b{color:var(--text);font-weight:600}
.verdict{margin:0;padding:7px 18px;border-radius:999px;font-weight:600;color:#fff;white-space:nowrap}
.registered{background:#1b7f4b}.doubtful{background:#a86400}.failed{background:#b3261e}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 22px;
margin:0 0 18px}
.lead{margin:0 0 8px;font-size:17px;font-weight:600}
ul{margin:0;padding-left:20px;color:var(--quiet)}li{margin:2px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:1px;padding:0;
overflow:hidden;
background:var(--rule)}
.card{background:var(--card);padding:14px 18px;display:flex;flex-direction:column}
.card span{color:var(--quiet);font-size:13px}.card strong{font-size:20px;font-weight:600;white-space:nowrap}
.card em{font-style:normal;color:var(--quiet);font-size:13px;min-height:20px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:22px}
figure{margin:0}.wide{grid-column:1/-1}
figure img,figure svg{display:block;width:100%;height:auto;border-radius:6px}
.wide svg{max-height:760px;background:#111;object-fit:contain}
figcaption{color:var(--quiet);font-size:14px;margin-top:8px}figcaption b{color:var(--text);font-weight:600}
svg .rim{fill:none;stroke:#101214;stroke-opacity:.6;stroke-width:calc(var(--line)*2);stroke-linecap:round}
svg .arrow{fill:none;stroke:#ffd633;stroke-width:var(--line);stroke-linecap:round}
svg .start{fill:#ffd633}svg .none{fill:#fff;opacity:.45}
svg .key{fill:#101214;opacity:.75}svg .label{fill:#fff;font-family:inherit}
svg .bar,svg .dot{fill:var(--bar)}svg .dot{opacity:.65}
svg .rule{stroke:var(--rule);fill:none}svg .frame{stroke:var(--quiet);fill:none}
svg .tick{fill:var(--quiet);font-size:13px}
svg .mark{stroke:var(--text);stroke-dasharray:4 3;fill:none}svg .marked{fill:var(--text);font-size:13px}
svg .ring{fill:none;stroke:var(--text);stroke-dasharray:4 3}
table{border-collapse:collapse}
.facts th{text-align:left;font-weight:600;padding:4px 24px 4px 0;vertical-align:top;
white-space:nowrap}.facts td{padding:4px 0;overflow-wrap:anywhere}
.matrix td{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:14px;text-align:right;
padding:3px 26px 3px 0}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:14px}
.note{color:var(--quiet);font-size:14px;margin:14px 0 0}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
