"""Pictures: matches as lines over both images; checkerboard, overlay and arrows that show the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from kglmatch.errors import KGLMatchError
from kglmatch.features import Matches, is_whole
from kglmatch.geometry import resize_matrix, transform_points
from kglmatch.images import load_image
from kglmatch.registration.displacement import DisplacementField
from kglmatch.registration.results import RegistrationCheck
from kglmatch.resampling import covered_by, resize_between, shrink, warp_image

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

DEFAULT_MAX_LINES = 80
DEFAULT_CELLS = 8

# RGB. Green and orange of Okabe and Ito's palette for the colour-blind, brighter, to be seen on grey; they
# differ in lightness too, and inliers are thicker.
INLIER: Colour = (64, 224, 168)
OUTLIER: Colour = (240, 96, 16)
UNDECIDED: Colour = (86, 180, 233)
FRAME: Colour = (240, 228, 66)
_IR_TINT: Colour = (255, 205, 140)
_RED: Colour = (255, 60, 60)
_CYAN: Colour = (60, 255, 255)
# From uncertain to certain: steps of matplotlib's plasma from the middle up, brighter with certainty.
_CERTAINTY: tuple[Colour, ...] = (
    (190, 60, 135), (215, 87, 107), (237, 121, 83), (251, 159, 58), (250, 205, 40), (246, 246, 90),
)  # fmt: skip
_BACKGROUND: Colour = (22, 24, 28)
_TEXT: Colour = (236, 236, 236)
_QUIET_TEXT: Colour = (160, 164, 170)

# Pixels. Small images are enlarged and large ones shrunk, so that lines and text can be read.
_WIDTHS = (1000, 2000)
_LARGEST_HEIGHT = 2000
_GAP = 8
_SUPERSAMPLING = 2
_FARTHEST = 1e5  # beyond it OpenCV's drawing overflows
_SHIFT = 4  # fractional bits of the coordinates given to OpenCV's drawing


def draw_matches(
    vis_image: Any, ir_image: Any, matches: Matches, *, max_lines: int = DEFAULT_MAX_LINES
) -> Picture:
    """Draws two images side by side at the same height, with their matches as points and lines.

    Matches that agree with the homography are green and thick, the others orange, thin and below;
    without `matches.inliers` all are blue. Where there is a homography, a yellow frame shows the outline
    of the visible image in the other one. A strip below counts them.

    Args:
        vis_image, ir_image: images of any size, as for `kglmatch.load_image` (16-bit ones are stretched).
        matches: with keypoints in pixels of the two images.
        max_lines: the most lines that are drawn. Of more matches, those drawn are spread evenly over the
            visible image, inliers and outliers in proportion, but at least half of them inliers if there
            are enough; the points are always drawn.

    Returns:
        (H, W, 3) uint8 RGB, 1000 to 2000 pixels wide (less only for very tall images).

    Raises:
        ImageError: an image that cannot be read.
        KGLMatchError: matches without keypoints, keypoints that are not finite or far outside the images,
            or a `max_lines` that is no whole number of at least 0.
    """
    if matches.keypoints_vis is None or matches.keypoints_ir is None:
        raise KGLMatchError("cannot draw matches without keypoints; Matcher.match_images gives them")
    if not is_whole(max_lines) or max_lines < 0:
        raise KGLMatchError(f"max_lines must be a whole number of at least 0, got {max_lines!r}")
    images = [load_image(vis_image), load_image(ir_image)]
    panes, canvas = _side_by_side(images)
    start = _placed(panes[0], matches.keypoints_vis, "visible", images[0].shape)
    end = _placed(panes[1], matches.keypoints_ir, "ir", images[1].shape)

    framed = matches.homography is not None and _draw_frame(
        canvas, panes, images[0].shape, matches.homography
    )
    inliers = matches.inliers
    groups = [(np.arange(len(matches)), UNDECIDED, True)]
    if inliers is not None:
        groups = [(np.flatnonzero(~inliers), OUTLIER, False), (np.flatnonzero(inliers), INLIER, True)]
    strong_lines = _lines_of_inliers(len(groups[-1][0]), len(matches), max_lines)
    lines = 0
    for rows, colour, strong in groups:
        count = strong_lines if strong else max_lines - strong_lines
        chosen = rows[_spread(matches.keypoints_vis[rows], count)]
        lines += len(chosen)
        _draw_lines(canvas, start[chosen], end[chosen], colour, strong)
    for rows, colour, strong in groups:
        _draw_points(canvas, np.concatenate([start[rows], end[rows]]), colour, strong, len(matches))

    if inliers is None:
        legend = [(UNDECIDED, _count(len(matches), "match", "matches"))]
    else:
        legend = [
            (INLIER, _count(int(inliers.sum()), "inlier")),
            (OUTLIER, _count(int((~inliers).sum()), "outlier")),
        ]
    if framed:
        legend.append((FRAME, "outline of the visible image"))
    elif matches.homography is None and inliers is not None:
        legend.append((_BACKGROUND, "no homography"))
    sizes = " | ".join(
        f"{name} {image.shape[1]} x {image.shape[0]}"
        for name, image in zip(("vis", "ir"), images, strict=True)
    )
    note = sizes if lines == len(matches) else f"{lines} of {len(matches)} lines drawn | {sizes}"
    return np.concatenate([canvas, _strip(canvas.shape[1], legend, note)])


def draw_checkerboard(
    vis_image: Any,
    ir_image: Any,
    homography: NDArray[np.floating],
    *,
    cells: int = DEFAULT_CELLS,
    local: DisplacementField | None = None,
) -> Picture:
    """Draws the visible image with every other square taken from the ir image, warped onto it.

    Where edges continue from square to square, the two are registered. The ir squares are tinted; what
    the ir image does not cover shows the visible one.

    Args:
        vis_image, ir_image: images of any size, as for `kglmatch.load_image`.
        homography: (3, 3), from visible to ir pixels, as in `Matches.homography`.
        cells: squares along the longer side of the visible image.
        local: displacement of the visible pixels before the homography, as `Registration.local`.

    Returns:
        (H, W, 3) uint8 RGB in the frame of the visible image, with a strip below that names the colours;
        enlarged or shrunk to 1000 to 2000 pixels in width (less only for very tall images).

    Raises:
        ImageError: an image that cannot be read.
        KGLMatchError: a homography that is not a finite (3, 3) array, or a `cells` that is no whole number
            of at least 1.
    """
    if not is_whole(cells) or cells < 1:
        raise KGLMatchError(f"cells must be a whole number of at least 1, got {cells!r}")
    vis, warped, covered = _warped_together(vis_image, ir_image, homography, local)
    size = vis.shape[1], vis.shape[0]
    shown = np.repeat(vis[..., None], 3, axis=2)
    side = max(size) / cells
    column, row = (np.floor((np.arange(n) + 0.5) / side).astype(int) for n in size)
    from_ir = ((row[:, None] + column[None, :]) % 2 == 1) & covered
    shown[from_ir] = warped[from_ir, None] * (np.array(_IR_TINT, np.float32) / 255)
    board: Picture = np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)
    legend = [((235, 235, 235), "visible"), (_IR_TINT, "ir, warped onto the visible image")]
    return np.concatenate([board, _strip(size[0], legend, _coverage(covered))])


def draw_overlay(
    vis_image: Any,
    ir_image: Any,
    homography: NDArray[np.floating],
    *,
    local: DisplacementField | None = None,
) -> Picture:
    """Draws both images in one, in false colour: the visible one red, the ir one, warped onto it, cyan.

    What is equally bright in both becomes grey. Edges that coincide show as one line; two parallel
    lines, one red and one cyan, show how far apart they are. Both images are given the same local
    contrast first. What the ir image does not cover stays red.

    Args:
        vis_image, ir_image: images of any size, as for `kglmatch.load_image`.
        homography: (3, 3), from visible to ir pixels, as in `Registration.transform`.
        local: as for `draw_checkerboard`.

    Returns:
        (H, W, 3) uint8 RGB, of the size that `draw_checkerboard` gives, with a strip below.

    Raises:
        ImageError: an image that cannot be read.
        KGLMatchError: a homography that is not a finite (3, 3) array.
    """
    vis, warped, covered = _warped_together(vis_image, ir_image, homography, local)
    red = _even_contrast(vis, np.ones_like(covered))
    cyan = _even_contrast(warped, covered)
    shown = np.stack([red, cyan, cyan], axis=2)
    picture: Picture = np.rint(shown * 255).astype(np.uint8)
    legend = [(_RED, "visible"), (_CYAN, "ir, warped onto the visible image")]
    return np.concatenate([picture, _strip(vis.shape[1], legend, _coverage(covered))])


def draw_displacement(vis_image: Any, check: RegistrationCheck) -> Picture:
    """Draws the residual displacement of two images: an arrow at each grid point, over the visible image.

    An arrow goes from where the ir content should be to where it is, longer by a round factor that the
    key below names; its colour shows how certain it is. Points that could not be judged are small grey
    dots.

    Args:
        vis_image: the image that was checked, as for `kglmatch.load_image`.
        check: what `Matcher.check` gave for it.

    Returns:
        (H, W, 3) uint8 RGB, 1000 to 2000 pixels wide (less only for very tall images), with two
        strips below: the key, and the numbers.

    Raises:
        ImageError: an image that cannot be read.
        KGLMatchError: an image of another size than the one checked.
    """
    vis = load_image(vis_image)
    height, width = vis.shape
    if (width, height) != check.image_size:
        raise KGLMatchError(
            f"the image is {width} x {height}, the one checked was {check.image_size[0]} x "
            f"{check.image_size[1]}"
        )
    size, _ = _picture_size(width, height)
    canvas: Picture = np.repeat(_grey_levels(vis, size, 170)[..., None], 3, axis=2)
    pane = _Pane(0, *size, (size[0] / width, size[1] / height))

    dot = 1.5 * _weight(canvas) * _SUPERSAMPLING
    _draw_discs(canvas, pane.place(check.points[~check.judged]), _QUIET_TEXT, dot, 0.9)
    points, moved = check.points[check.judged], check.displacement[check.judged]
    factor = _arrow_factor(moved, check.image_size)
    start, end = pane.place(points), pane.place(points + factor * moved)
    shade = np.clip(2 * check.certainty[check.judged] - 1, 0, 1) * (len(_CERTAINTY) - 1)
    for number, colour in enumerate(_CERTAINTY):
        rows = np.rint(shade) == number
        _draw_arrows(canvas, start[rows], end[rows], colour)

    length = _key_length(factor, width / 12)
    share = f"{100 * check.judged_share:.0f} % of the points judged"
    if len(points):
        x, y = check.shift
        numbers = (
            f"{check.verdict} | shift ({x:+.2f}, {y:+.2f}) px | error: median {check.median_error:.2f} px, "
            f"95 % within {check.p95_error:.2f} px | {share}"
        )
    else:
        numbers = f"{check.verdict} | {share}"
    legend = [
        (_CERTAINTY[0], "certainty 50 %"),
        (_CERTAINTY[-1], "100 %"),
        (_QUIET_TEXT, "not judged"),
    ]
    key = _strip(size[0], legend, "").copy()
    text = f"{length:g} px (arrows drawn {factor:g} x)" if len(points) else "no arrows"
    _draw_key(key, text, length * factor * pane.scale[0] if len(points) else 0)
    return np.concatenate([canvas, key, _strip(size[0], [(_BACKGROUND, numbers)], "")])


# --- the two images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pane:
    """An image's place on the canvas: picture pixel = scale * (pixel + 0.5) - 0.5 + left."""

    left: int
    width: int
    height: int
    scale: tuple[float, float]

    def place(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 2) pixels of the image -> (N, 2) pixels of the canvas."""
        return (points.astype(np.float64) + 0.5) * self.scale - 0.5 + (self.left, 0)


def _placed(
    pane: _Pane, points: NDArray[np.floating], side: str, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Keypoints on the canvas. Raises `KGLMatchError` where one cannot be of this image."""
    placed = pane.place(points)
    near = (np.abs(placed) <= _FARTHEST).all(axis=1)
    if not near.all():
        x, y = points[int(np.argmin(near))]
        raise KGLMatchError(
            f"the {side} keypoint ({x:g}, {y:g}) is far outside the image of {shape[1]} x {shape[0]} pixels: "
            "are these the matches of these images?"
        )
    return placed


def _scale(width: float, height: float) -> float:
    smallest, largest = _WIDTHS
    return float(min(max(1.0, smallest / width), largest / width, _LARGEST_HEIGHT / height))


def _picture_size(width: int, height: int) -> tuple[tuple[int, int], float]:
    """(width, height) in the picture of an image of that size, and picture pixels per image pixel."""
    scale = _scale(width, height)
    return (max(1, round(width * scale)), max(1, round(height * scale))), scale


def _grey_levels(image: NDArray[np.float32], size: tuple[int, int], white: int) -> NDArray[np.uint8]:
    """The image at picture size, with `white` for 1: darker than lines and points."""
    return np.rint(np.clip(_resize(image, size), 0, 1) * white).astype(np.uint8)


def _resize(image: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    shrinks = size[0] < image.shape[1]
    resized: NDArray[np.float32] = cv2.resize(
        image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    ).astype(np.float32)
    return resized


def _warp(
    image: NDArray[np.float32], transform: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float32]:
    warped: NDArray[np.float32] = cv2.warpPerspective(
        image, transform, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    ).astype(np.float32)
    return warped


def _warped_together(
    vis_image: Any, ir_image: Any, homography: NDArray[np.floating], local: DisplacementField | None
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """The visible image in picture size, the ir image warped onto it, and where it covers it."""
    homography = np.asarray(homography)
    if homography.shape != (3, 3) or homography.dtype.kind not in "iuf" or not np.isfinite(homography).all():
        given = homography.tolist() if homography.size <= 9 else f"shape {homography.shape}"
        raise KGLMatchError(f"homography must be (3, 3) finite numbers, got {given!r}")
    vis, ir = load_image(vis_image), load_image(ir_image)
    height, width = vis.shape
    size, scale = _picture_size(width, height)
    # Picture pixels -> visible pixels -> ir pixels.
    to_ir = homography.astype(np.float64) @ resize_matrix(1 / scale, 1 / scale)
    # Nothing aliases, and OpenCV warps no image of more than 32,766 pixels a side. The ir image has no
    # more detail to lose than its own longer side.
    zoom = float(np.exp(np.linalg.slogdet(to_ir[:2, :2])[1] / 2))
    small = shrink(ir, 1 / min(max(zoom, 1e-3), max(ir.shape)))
    to_ir = resize_between(ir, small) @ to_ir
    ir = small
    if local is not None:
        displacement = local.resized(size).on_grid
        warped = warp_image(ir, to_ir, size, interpolation="linear", displacement=displacement)
        covered = covered_by(to_ir, size, np.ones(ir.shape, bool), displacement=displacement)
        return _resize(vis, size), warped, covered
    warped = _warp(ir, to_ir, size)
    # What is beyond the horizon of the homography, seen from the image's centre, is no image.
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    depth = to_ir[2, 0] * x + to_ir[2, 1] * y + to_ir[2, 2]
    covered = (_warp(np.ones_like(ir), to_ir, size) > 0.999) & (depth * depth[size[1] // 2, size[0] // 2] > 0)
    return _resize(vis, size), warped, covered


def _even_contrast(image: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The image with about the same mean and contrast everywhere, in [0, 1]; 0 where not covered."""
    size = image.shape[1], image.shape[0]
    small = max(1, size[0] // 8), max(1, size[1] // 8)

    def around(values: NDArray[np.float32]) -> NDArray[np.float32]:
        reduced = cv2.resize(values, small, interpolation=cv2.INTER_AREA)
        blurred = cv2.GaussianBlur(reduced, (0, 0), max(small) / 16)
        return cv2.resize(blurred, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)

    weight = around(covered.astype(np.float32)) + np.float32(1e-6)
    inside = image * covered
    mean, square = around(inside) / weight, around(inside * inside) / weight
    deviation = np.sqrt(np.maximum(square - mean * mean, 0))
    even: NDArray[np.float32] = np.clip(0.5 + 0.2 * (image - mean) / (deviation + 0.03), 0, 1) * covered
    return even.astype(np.float32)


def _coverage(covered: NDArray[np.bool_]) -> str:
    return f"ir covers {100 * covered.mean():.0f} % of the visible image"


def _side_by_side(images: list[NDArray[np.float32]]) -> tuple[list[_Pane], Picture]:
    height = max(image.shape[0] for image in images)
    aspects = [image.shape[1] / image.shape[0] for image in images]
    scale = _scale(height * sum(aspects) + _GAP, height)
    total = (height * sum(aspects) + _GAP) * scale
    rows = max(1, round((total - _GAP) / sum(aspects)))
    panes: list[_Pane] = []
    left = 0
    for image, aspect in zip(images, aspects, strict=True):
        columns = max(1, round(rows * aspect))
        panes.append(_Pane(left, columns, rows, (columns / image.shape[1], rows / image.shape[0])))
        left += columns + _GAP
    canvas = np.full((rows, left - _GAP, 3), _BACKGROUND, np.uint8)
    for pane, image in zip(panes, images, strict=True):
        grey = _grey_levels(image, (pane.width, pane.height), 235)
        canvas[:, pane.left : pane.left + pane.width] = grey[..., None]
    return panes, canvas


# --- drawing --------------------------------------------------------------------------------------


def _spread(points: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """`count` rows of (N, 2) points, best first as they come, spread evenly over the area they cover."""
    if count >= len(points):
        return np.arange(len(points))
    if count == 0:
        return np.empty(0, np.int64)
    corner = points.min(axis=0)
    extent = np.maximum(points.max(axis=0) - corner, 1)
    side = np.sqrt(extent.prod() / count)
    column, row = np.floor((points - corner) / side).astype(np.int64).T
    cell = row * (column.max() + 1) + column
    # The best of each cell first, then each cell's second, and so on.
    order = np.argsort(cell, kind="stable")
    first = np.searchsorted(cell[order], cell[order])
    rank = np.empty(len(points), np.int64)
    rank[order] = np.arange(len(points)) - first
    return np.sort(np.argsort(rank, kind="stable")[:count])


def _lines_of_inliers(inliers: int, matches: int, max_lines: int) -> int:
    """How many of at most `max_lines` lines are for inliers."""
    if matches <= max_lines:
        return inliers
    return min(inliers, max(round(max_lines * inliers / matches), max_lines // 2))


def _paint(canvas: Picture, mask: NDArray[np.uint8], colour: Colour, opacity: float) -> None:
    """Paints a colour over the canvas where the mask, drawn at higher resolution, covers it."""
    alpha = cv2.resize(mask, canvas.shape[1::-1], interpolation=cv2.INTER_AREA) * np.float32(opacity / 255)
    rows, columns = np.nonzero(alpha)
    weight = alpha[rows, columns, None]
    painted = canvas[rows, columns] * (1 - weight) + np.array(colour, np.float32) * weight
    canvas[rows, columns] = np.rint(painted).astype(np.uint8)


def _mask(canvas: Picture) -> NDArray[np.uint8]:
    return np.zeros([n * _SUPERSAMPLING for n in canvas.shape[:2]], np.uint8)


def _fixed(points: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Canvas pixels -> the mask's, as OpenCV's fixed-point numbers."""
    fine = ((points + 0.5) * _SUPERSAMPLING - 0.5) * (1 << _SHIFT)
    return [(int(x), int(y)) for x, y in np.rint(fine)]


def _weight(canvas: Picture) -> float:
    """Relative thickness of lines and points: 1 in a picture 1000 pixels wide, more in a larger one."""
    return float(max(1.0, canvas.shape[1] / 1000) ** 0.75)


def _draw_lines(
    canvas: Picture, start: NDArray[np.float64], end: NDArray[np.float64], colour: Colour, strong: bool
) -> None:
    mask = _mask(canvas)
    thickness = max(1, round((1.1 if strong else 0.6) * _weight(canvas) * _SUPERSAMPLING))
    for a, b in zip(_fixed(start), _fixed(end), strict=True):
        cv2.line(mask, a, b, 255, thickness, cv2.LINE_AA, _SHIFT)
    _paint(canvas, mask, colour, 0.7 if strong else 0.6)


def _draw_points(
    canvas: Picture, points: NDArray[np.float64], colour: Colour, strong: bool, matches: int
) -> None:
    crowd = min(1.0, (400 / max(1, matches)) ** 0.25)  # smaller where there are many
    radius = (2.4 if strong else 1.7) * crowd * _weight(canvas) * _SUPERSAMPLING
    # A dark rim keeps a point visible on a bright image.
    _draw_discs(canvas, points, _BACKGROUND, radius + crowd * _SUPERSAMPLING, 0.7)
    _draw_discs(canvas, points, colour, radius, 1.0)


def _draw_discs(
    canvas: Picture, points: NDArray[np.float64], colour: Colour, radius: float, opacity: float
) -> None:
    """Discs of a radius in pixels of the mask."""
    mask = _mask(canvas)
    _add_discs(mask, points, radius)
    _paint(canvas, mask, colour, opacity)


def _add_discs(mask: NDArray[np.uint8], points: NDArray[np.float64], radius: float) -> None:
    for centre in _fixed(points):
        cv2.circle(mask, centre, round(radius * (1 << _SHIFT)), 255, -1, cv2.LINE_AA, _SHIFT)


def _draw_arrows(
    canvas: Picture, start: NDArray[np.float64], end: NDArray[np.float64], colour: Colour
) -> None:
    """Arrows with a dot at their start, so that those of length 0 can be seen too."""
    head = 7 * _weight(canvas)
    along = end - start
    length = np.linalg.norm(along, axis=1, keepdims=True)
    unit = along / np.maximum(length, 1e-9)
    side = unit[:, ::-1] * (-1, 1)
    back = np.minimum(head, 0.5 * length)
    left, right = end - back * (unit - 0.5 * side), end - back * (unit + 0.5 * side)
    for rim, fill, opacity in ((2, _BACKGROUND, 0.75), (0, colour, 1.0)):
        mask = _mask(canvas)
        thickness = max(1, round(1.6 * _weight(canvas) * _SUPERSAMPLING)) + rim
        for a, b, c, d in zip(_fixed(start), _fixed(end), _fixed(left), _fixed(right), strict=True):
            cv2.line(mask, a, b, 255, thickness, cv2.LINE_AA, _SHIFT)
            triangle = np.array([b, c, d], np.int32)
            cv2.fillPoly(mask, [triangle], 255, cv2.LINE_AA, _SHIFT)
            if rim:
                cv2.polylines(mask, [triangle], True, 255, rim, cv2.LINE_AA, _SHIFT)
        _add_discs(mask, start, 2.4 * _weight(canvas) * _SUPERSAMPLING + rim)
        _paint(canvas, mask, fill, opacity)


_ROUND = (1.0, 2.0, 5.0)


def _arrow_factor(moved: NDArray[np.floating], size: tuple[int, int]) -> float:
    """A round factor from 1 to 100: no arrow longer than a quarter of the image, most at most a twelfth."""
    if not len(moved):
        return 1.0
    length = np.maximum(np.linalg.norm(moved, axis=1), 1e-6)
    most = max(size) * min(1 / 12 / np.percentile(length, 95), 1 / 4 / length.max())
    return max(
        r * 10.0**power for power in range(3) for r in _ROUND if r * 10**power <= max(min(most, 100), 1)
    )


def _key_length(factor: float, room: float) -> float:
    """A round displacement in pixels whose arrow takes about `room` pixels of the visible image."""
    lengths = [r * 10.0**power for power in range(-3, 4) for r in _ROUND]
    return max((n for n in lengths if n * factor <= room), default=lengths[0])


def _draw_key(strip: Picture, text: str, length: float) -> None:
    """Writes on the right of a strip, with an arrow `length` pixels long before it."""
    height, width = strip.shape[:2]
    size = round(height / 2.2)
    font = ImageFont.load_default(size)
    image = Image.fromarray(strip)
    draw = ImageDraw.Draw(image)
    draw.text((width - size, height / 2), text, fill=_TEXT, font=font, anchor="rm")
    left = width - 2 * size - draw.textlength(text, font=font)
    strip[:] = np.asarray(image)
    if length > 0:
        middle = (height - 1) / 2
        _draw_arrows(strip, np.array([[left - length, middle]]), np.array([[left, middle]]), _CERTAINTY[-1])


def _draw_frame(
    canvas: Picture, panes: list[_Pane], vis_shape: tuple[int, ...], homography: NDArray[np.float64]
) -> bool:
    """Draws the outline of the visible image in the other one; whether there is such an outline."""
    height, width = vis_shape
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64) - 0.5
    depth = corners @ homography[2, :2] + homography[2, 2]
    if not ((depth > 0).all() or (depth < 0).all()):
        return False  # the horizon crosses the image
    outline = panes[1].place(transform_points(homography, corners))
    if not np.abs(outline).max() <= _FARTHEST:
        return False  # NaN too
    mask = _mask(canvas)
    thickness = max(1, round(1.2 * _weight(canvas) * _SUPERSAMPLING))
    polygon = np.array(_fixed(outline), np.int32)
    cv2.polylines(mask, [polygon], True, 255, thickness, cv2.LINE_AA, _SHIFT)
    mask[:, : panes[1].left * _SUPERSAMPLING] = 0
    _paint(canvas, mask, FRAME, 0.75)
    return True


# --- the strip below ------------------------------------------------------------------------------


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _strip(width: int, legend: list[tuple[Colour, str]], note: str) -> Picture:
    """A dark strip: coloured dots with text on the left, a note on the right where there is room."""
    size = round(15 * max(1.0, width / 1000) ** 0.75)
    height = round(2.2 * size)
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    middle, x = height / 2, float(size)
    for colour, text in legend:
        radius = 0.32 * size
        draw.ellipse((x, middle - radius, x + 2 * radius, middle + radius), fill=colour)
        x += 3.2 * radius
        draw.text((x, middle), text, fill=_TEXT, font=font, anchor="lm")
        x += draw.textlength(text, font=font) + 1.4 * size
    if x + draw.textlength(note, font=font) + size <= width:
        draw.text((width - size, middle), note, fill=_QUIET_TEXT, font=font, anchor="rm")
    return np.asarray(strip, np.uint8)
