"""Images as tensors, pictures as files: one at a time, or many on a contact sheet."""

import contextlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

import weights
from commandline import one_line

ON_A_SHEET = 64  # images of sample.py: at 1024² as many megapixels, and viewers refuse larger ones


def to_picture(image):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    return Image.fromarray(((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def picture_bytes(picture):
    """A PIL image -> uint8 (3, H, W); the other way of `to_picture`, but for the scale."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def contact_sheet(images, rows, columns, gap=4):
    """Images (R · C, 3, H, W), row by row, with a label for each row and a heading for each column -> a PIL image.

    A label is one line, cut where it is long.
    """
    height, width = images.shape[2:]
    zoom = max(1, 128 // width)
    height, width = zoom * height, zoom * width
    rows = [one_line(row) for row in rows]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = gap + max((int(draw.textlength(row)) for row in rows), default=0) + gap
    top = 20 if any(columns) else gap
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, column in enumerate(columns):
        draw.text((left + j * (width + gap), 4), column, fill="black")
    for i, row in enumerate(rows):
        draw.text((gap, top + i * (height + gap) + height // 2 - 6), row, fill="black")
        for j in range(len(columns)):
            picture = to_picture(images[i * len(columns) + j]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (width + gap), top + i * (height + gap)))
    return sheet


def write_images(images, out, jobs, columns):
    """Write each image as it comes and, for several, a contact sheet with a row per prompt. Yields the paths.

    images: an iterable. jobs: (prompt, seed) of each, `columns` to a prompt. out: FILE.png or a folder. A sheet has the
    first ON_A_SHEET images, in whole rows.
    """
    sheet = sheet_path(out)
    single = sheet == out
    across = min(columns, ON_A_SHEET)
    rows, shown = [prompt for prompt, _ in jobs[::columns]][:ON_A_SHEET // across], []
    for i, image in enumerate(images):
        name = f"{out.stem}-{i:03}.png" if single else f"{i:03}.png"
        yield write_picture(to_picture(image), out if single and len(jobs) == 1 else sheet.with_name(name))
        if i // columns < len(rows) and i % columns < across:
            shown.append(image)
    if len(shown) < len(jobs):
        print(f"note: {sheet} shows {len(shown)} of the {len(jobs)} images", file=sys.stderr)
    if len(jobs) > 1:
        headings = [f"seed {seed}" for _, seed in jobs[:across]]
        yield write_picture(contact_sheet(torch.stack(shown), rows, headings), sheet)


def sheet_path(out):
    """Of a contact sheet: FILE.png itself, or in a folder."""
    return out if out.suffix.lower() == ".png" else out / "sheet.png"


@contextlib.contextmanager
def figure_for(path, size):
    """A matplotlib figure that is written to `path` afterwards; None where matplotlib, an extra, is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        yield None
        return
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with weights.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def write_picture(picture, path):
    with weights.replacing(path) as part:
        picture.save(part, format="PNG")
    return path
