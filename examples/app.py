"""A page in the browser: two images as input; matches, a checkerboard and a table as output.

pip install -c constraints.txt ".[demo]"
python examples/app.py            (then open the address that it prints)
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

from kglmatch import KGLMatchError, Matcher, list_pretrained, load_image
from kglmatch.patch_matcher import check_image_size
from kglmatch.visualize import draw_checkerboard, draw_matches

DATA = Path(__file__).parent / "data"
EXAMPLE = [str(DATA / "sentinel2_red.tif"), str(DATA / "sentinel2_nir.tif")]
COLUMNS = ["x_vis", "y_vis", "x_ir", "y_ir", "score", "inlier"]
ROWS_SHOWN = 100
DEFAULT_KEYPOINTS = 500
LARGEST_FILE = "100mb"

INTRODUCTION = """# kglmatch
Matches an image of a visible camera with an image of another sensor. The visible image comes first. Images
may be 8-bit, 16-bit or float: PNG, JPEG, TIFF. If they are registered to within some pixels, give that
distance: matching is then faster and more reliable."""


@functools.cache
def load_matcher(model: str) -> Matcher:
    """The matcher of a bundled model, loaded once."""
    return Matcher.from_pretrained(model)


def match_files(
    vis_file: str | None, ir_file: str | None, model: str, max_displacement: float | None, keypoints: int
) -> dict[str, Any]:
    """Matches two image files.

    Args:
        vis_file, ir_file: paths, None where none was given.
        model: a bundled model.
        max_displacement: pixels, or None for images that are not registered.
        keypoints: of each image.

    Returns:
        `summary`, `picture` and `checkerboard` (H, W, 3) uint8 (the latter None without a homography),
        `rows` of the table and `matches`.

    Raises:
        KGLMatchError: a file that is missing or no image, or a setting out of range.
    """
    if not vis_file or not ir_file:
        raise KGLMatchError(f"give both images: the {'ir' if vis_file else 'visible'} one is missing")
    matcher = load_matcher(model)
    images = []
    for path in (vis_file, ir_file):
        images.append(load_image(path))
        check_image_size(images[-1], matcher.config.patch_size, Path(path).name)
    matches = matcher.match_images(*images, max_displacement=max_displacement, max_keypoints=int(keypoints))
    if matches.homography is None:
        summary, checkerboard = f"**{len(matches)} matches**, too few agree with a homography.", None
    else:
        summary = f"**{len(matches)} matches**, {matches.inliers.sum()} agree on a homography."
        checkerboard = draw_checkerboard(*images, matches.homography)
    if len(matches) > ROWS_SHOWN:
        summary += f" The table shows the best {ROWS_SHOWN}; the file holds all."
    best = matches[:ROWS_SHOWN]
    points = zip(best.keypoints_vis.tolist(), best.keypoints_ir.tolist(), strict=True)
    rows = [
        [*(round(value, 2) for value in (*vis, *ir)), round(float(score), 4), bool(inlier)]
        for (vis, ir), score, inlier in zip(points, best.scores, best.inliers, strict=True)
    ]
    return {
        "summary": summary,
        "picture": draw_matches(*images, matches),
        "checkerboard": checkerboard,
        "rows": rows,
        "matches": matches,
    }


def build(folder: Path) -> Any:
    """The page, a `gradio.Blocks`; tables to download are kept in `folder`."""
    import gradio as gr

    def clear() -> tuple[Any, ...]:
        return "", None, None, None, gr.DownloadButton(interactive=False)

    def answer(
        vis: str | None, ir: str | None, model: str, displacement: float, keypoints: int
    ) -> tuple[Any, ...]:
        try:
            found = match_files(vis, ir, model, displacement or None, keypoints)
        except KGLMatchError as error:
            # Uploads are in a folder whose name means nothing to the reader.
            text = str(error)
            for path in (vis, ir):
                text = text.replace(str(path), Path(str(path)).name)
            raise gr.Error(text, duration=None, print_exception=False) from error
        table = Path(tempfile.mkdtemp(dir=folder)) / "matches.csv"
        found["matches"].save(table)
        download = gr.DownloadButton(value=str(table), interactive=True)
        return found["summary"], found["picture"], found["checkerboard"], found["rows"], download

    shown = {
        "format": "png",
        "show_label": False,
        "interactive": False,
        "buttons": ["download", "fullscreen"],
    }
    with gr.Blocks(title="kglmatch", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1):
                vis = gr.File(label="Visible image", height=170)
                ir = gr.File(label="Image of the other sensor", height=170)
                model = gr.Dropdown(list_pretrained(), value="kglnet-vis-nir", label="Model")
                displacement = gr.Number(
                    0,
                    minimum=0,
                    label="Largest displacement, pixels",
                    info="0: the images are not registered",
                )
                keypoints = gr.Slider(
                    50,
                    2000,
                    DEFAULT_KEYPOINTS,
                    step=50,
                    label="Keypoints of each image",
                    info="more take longer",
                )
                button = gr.Button("Match", variant="primary")
            with gr.Column(scale=3):
                summary = gr.Markdown()
                with gr.Tab("Matches"):
                    picture = gr.Image(**shown)
                with gr.Tab("Checkerboard"):
                    checkerboard = gr.Image(**shown)
                with gr.Tab("Table"):
                    table = gr.Dataframe(headers=COLUMNS, interactive=False, show_label=False)
                download = gr.DownloadButton("Download all matches (csv)", interactive=False)
        inputs = [vis, ir, model, displacement, keypoints]
        gr.Examples([[*EXAMPLE, "kglnet-vis-nir", 8, DEFAULT_KEYPOINTS]], inputs, label="Example: Sentinel-2")
        outputs = [summary, picture, checkerboard, table, download]
        # Cleared first, so that an error is not shown next to the results of another pair.
        button.click(clear, None, outputs, api_visibility="private").then(
            answer, inputs, outputs, api_name="match", show_progress_on=picture
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args()

    import gradio as gr

    with tempfile.TemporaryDirectory() as folder:
        page = build(Path(folder))
        # The reader's own fonts: the page fetches nothing from elsewhere.
        theme = gr.themes.Default(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        page.launch(server_name=args.host, server_port=args.port, max_file_size=LARGEST_FILE, theme=theme)


if __name__ == "__main__":
    main()
