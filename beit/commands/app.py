"""``beit app``: a page on this machine to try checkpoints on images; what it shows is in ``app_models.py``."""

import base64
import contextlib
import html
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from beit.commands.app_models import PRETRAINED, Exhibit, Mask, find_checkpoints, open_exhibit, shrunk
from beit.commands.settings import AppConfig
from beit.data.index import image_files
from beit.errors import InputError
from beit.inference import decoded
from beit.masking import PUBLISHED_SHARE
from beit.visualization.attention import Query
from beit.visualization.figures import Legend

if TYPE_CHECKING:
    from gradio import Blocks

logger = logging.getLogger(__name__)

EXAMPLES = 12
MOST_OPEN = 2  # models in memory
FONTS = ("system-ui", "sans-serif")  # others would be fetched
LOOK, MASK, SEE = "shows its attention", "masks", "unmasks"
STYLE = """
#canvas img {cursor: crosshair; image-rendering: pixelated; width: 100%}
#examples .grid-wrap {min-height: 0; max-height: 340px}
#examples .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr))}
.pictures {display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 8px}
.pictures figure {margin: 0; text-align: center; font-size: 12px}
.pictures img, .painted img {width: 100%; border-radius: 4px}
.painted p {display: flex; flex-wrap: wrap; gap: 4px 14px; margin-top: 8px}
.painted span {border-left: 18px solid; padding-left: 6px}
"""


def main(config: AppConfig) -> None:
    """Serves the page until it is interrupted; raises InputError without Gradio, checkpoints or a free port."""
    page = Page(config)  # a wrong path is told before Gradio's long import
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError("beit app needs Gradio: pip install gradio") from error
    blocks = build_page(page, find_examples(config))
    address = serve(blocks, config.port)
    logger.info("open %s in a browser; Ctrl-C ends it", address)
    blocks.block_thread()


def serve(blocks: "Blocks", port: int | None) -> str:
    """Starts a server for this machine alone, in a thread, and returns its address."""
    import gradio

    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(font=FONTS, font_mono="monospace"),
            css=STYLE,
        )
    except OSError as error:
        raise InputError(
            f"--port {port or 'of 7860 and the next hundred'} is taken or refused: give another"
        ) from error
    return str(address)


def find_examples(config: AppConfig) -> list[str]:
    """Returns some images: of those given or, as in a demo, in the folder's ``images``, or in the folder."""
    folders = [str(path) for path in (Path(config.path, "images"), Path(config.path)) if path.is_dir()]
    with contextlib.suppress(InputError):  # there are none
        return [str(image) for image in image_files(config.images or folders[:1], EXAMPLES)]
    return []


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Shows a mistake of the user's on the page."""
    import gradio

    try:
        yield
    except InputError as error:
        raise gradio.Error(str(error), print_exception=False) from error


class Page:
    """What the page's controls do; of checkpoints, only those of the list are opened."""

    def __init__(self, config: AppConfig) -> None:
        self.checkpoints = find_checkpoints(config.path)
        self.exhibit: Callable[[str], Exhibit] = lru_cache(MOST_OPEN)(
            lambda name: open_exhibit(self.checkpoints[name], config.device, config.tokenizer)
        )

    def start(self, name: str, path: str | None) -> tuple[object, ...]:
        """Shows a checkpoint on an image: mask, query, what fits the kind, the classes and the segmentation."""
        from gradio import update

        with told():
            shown, image = self.exhibit(name), decoded(path) if path else None
            model, (rows, columns), predicts = shown.model, shown.grid, shown.target is not None
            patches, blocks = round(PUBLISHED_SHARE * rows * columns), model.get_num_layers()
            classes, overlay = (shown.classify(image), shown.segmentation(image)) if image else (None, None)
            return (
                shown.blocks(patches if predicts else 0, 0),
                (rows // 2, columns // 2),
                describe(shown),
                update(choices=[MASK, SEE, LOOK] if predicts else [LOOK], value=MASK if predicts else LOOK),
                update(maximum=rows * columns - 1, value=patches),
                update(maximum=blocks - 1, value=blocks - 1),
                update(choices=["mean", "all", *map(str, range(model.num_heads))], value="mean"),
                update(visible=predicts),
                update(visible=classes is not None, value=classes),
                update(visible=overlay is not None, value=segmentation(*overlay) if overlay else ""),
            )

    def draw(
        self, name: str, path: str | None, mask: Mask, query: Query, steps: int, block: int, head: str
    ) -> tuple[object, ...]:
        """Draws canvas, predictions and attention."""
        with told():
            shown = self.exhibit(name)
            if not path or mask.shape != shown.grid:  # no image, or one that another checkpoint has yet to take up
                return None, "", None
            image = decoded(path)
            predicted = markup(*shown.predict(image, mask, steps))
            return shown.canvas(image, mask, query), predicted, shown.attend(image, mask, query, block, head)

    def blocks(self, name: str, patches: int, seed: float) -> Mask:
        """Draws a mask of blocks."""
        with told():
            return self.exhibit(name).blocks(patches, int(seed))


def after_click(place: Query, mask: Mask, query: Query, tool: str, brush: int) -> tuple[Mask, Query]:
    """Returns mask and query after a click on a patch; the brush is a square of ``brush`` patches around it."""
    if tool == LOOK:
        return mask, place
    painted = mask.copy()
    rows, columns = (slice(max(middle - (brush - 1) // 2, 0), middle + brush // 2 + 1) for middle in place)
    painted[rows, columns] = tool == MASK
    return painted, query


def describe(shown: Exhibit) -> str:
    """Returns a line about a checkpoint, and another about what it lacks."""
    model, (rows, columns), (height, width) = shown.model, shown.grid, shown.model.img_size
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.get_num_layers()} blocks"
    lacks = f"\n\n**No predictions: {shown.missing}**" if shown.missing else ""
    return f"{size}, {height} × {width} pixels in {rows} × {columns} patches{lacks}"


def markup(pictures: Sequence[tuple[Image.Image, str]], score: str) -> str:
    """Returns pictures with titles as HTML, in as many columns as fit, and the score in words."""
    cells = "".join(
        f"<figure>{inline(picture)}<figcaption>{title}</figcaption></figure>" for picture, title in pictures
    )
    return f'<div class="pictures">{cells}</div><p>{score}</p>' if cells else ""


def segmentation(painted: Image.Image, legend: Legend) -> str:
    """Returns a segmentation with its legend as HTML."""
    names = (f'<span style="border-color: rgb{colour}">{html.escape(name)}</span>' for name, colour in legend)
    return f'<div class="painted">{inline(painted)}<p>{" ".join(names)}</p></div>'


def inline(picture: Image.Image) -> str:
    """Returns a picture as HTML that holds all of it."""
    picture.save(file := io.BytesIO(), format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def build_page(page: Page, examples: Sequence[str]) -> "Blocks":
    """Lays the page out and connects its controls."""
    import gradio as gr

    names, on = list(page.checkpoints), SimpleNamespace()
    first = next((name for name in names if name.endswith(PRETRAINED)), names[0])
    plain: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": []}
    with gr.Blocks(title="BEiT", analytics_enabled=False) as blocks:
        on.path, on.query = gr.State(examples[0] if examples else None), gr.State((0, 0))
        on.mask = gr.State(np.zeros((1, 1), dtype=bool))
        on.name = gr.Dropdown(names, value=first, label="Checkpoint", elem_id="checkpoint")
        on.about = gr.Markdown()
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                on.file = gr.File(label="Image", file_types=["image"], height=120, elem_id="file")
                shelf = [shrunk(decoded(example), 160) for example in examples]
                on.shelf = gr.Gallery(shelf, columns=3, allow_preview=False, elem_id="examples", **plain)
            with gr.Column(scale=4, min_width=300):
                on.canvas = gr.Image(label="What the model sees", format="png", elem_id="canvas", **plain)
                on.tool = gr.Radio([LOOK], value=LOOK, label="A click on a patch", elem_id="tool")
                with gr.Group(visible=False) as on.masking:
                    with gr.Row():
                        on.brush = gr.Slider(1, 5, 1, step=1, label="Brush", min_width=130)
                        on.steps = gr.Slider(1, 8, 1, step=1, label="Passes", min_width=130)
                    with gr.Row():
                        on.patches = gr.Slider(1, 2, 1, step=1, label="Patches", min_width=130)
                        on.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=130)
                    with gr.Row():
                        on.fill = gr.Button("Mask blocks", elem_id="blocks", min_width=130)
                        on.clear = gr.Button("Clear", elem_id="clear", min_width=130)
            with gr.Column(scale=6, min_width=300):
                on.classes = gr.Label(num_top_classes=5, visible=False, show_label=False, elem_id="classes")
                on.overlay = gr.HTML(visible=False, elem_id="segmentation")
                on.pictures = gr.HTML(elem_id="prediction")
                on.attention = gr.Image(label="Attention", elem_id="attention", **plain)
                with gr.Row():
                    on.block = gr.Slider(0, 1, 0, step=1, label="Block", min_width=130)
                    on.head = gr.Dropdown(["mean"], value="mean", label="Head", min_width=130, elem_id="head")
        connect(page, blocks, on, examples)
    return blocks


def connect(page: Page, blocks: "Blocks", on: SimpleNamespace, examples: Sequence[str]) -> None:
    """Lets the controls of the page act."""
    import gradio as gr

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    seen = [on.name, on.path, on.mask, on.query, on.steps, on.block, on.head]
    draw = {**quiet, "fn": page.draw, "inputs": seen, "outputs": [on.canvas, on.pictures, on.attention]}
    fitted = [on.mask, on.query, on.about, on.tool, on.patches, on.block, on.head, on.masking]
    start = {**quiet, "fn": page.start, "inputs": [on.name, on.path], "outputs": [*fitted, on.classes, on.overlay]}

    def pick(event: gr.SelectData) -> str:
        return examples[event.index]

    def click(event: gr.SelectData, name: str, *state: Any) -> tuple[Mask, Query]:
        return after_click(page.exhibit(name).patch_at(*event.index), *state)

    blocks.load(**start).success(**draw)
    on.name.change(**start).success(**draw)
    on.file.upload(lambda given: given, on.file, on.path, **quiet).success(**start).success(**draw)
    on.shelf.select(pick, None, on.path, **quiet).success(**start).success(**draw)
    clicked = [on.name, on.mask, on.query, on.tool, on.brush]
    on.canvas.select(click, clicked, [on.mask, on.query], **quiet).success(**draw)
    on.fill.click(page.blocks, [on.name, on.patches, on.seed], on.mask, **quiet).success(**draw)
    on.clear.click(np.zeros_like, on.mask, on.mask, **quiet).success(**draw)
    for control in (on.steps, on.block, on.head):
        control.input(trigger_mode="always_last", **draw)
