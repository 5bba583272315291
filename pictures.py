"""Images as tensors, pictures as files: one at a time, or many on a contact sheet."""

import contextlib

import numpy as np
import torch
from PIL import Image, ImageDraw

import weights


def to_picture(image):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    return Image.fromarray(((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def picture_bytes(picture):
    """A PIL image -> uint8 (3, H, W); the other way of `to_picture`, but for the scale."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def contact_sheet(images, rows, columns, gap=4):
    """Images (R · C, 3, H, W), row by row, with a label for each row and a heading for each column -> a PIL image."""
    height, width = images.shape[2:]
    zoom = max(1, 128 // width)
    height, width = zoom * height, zoom * width
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
    """Write each image and, for several, a contact sheet with a row per prompt. Yields the paths.

    jobs: (prompt, seed) of each image, `columns` to a prompt. out: FILE.png or a folder.
    """
    single = out.suffix == ".png"
    if single and len(images) == 1:
        yield write_picture(to_picture(images[0]), out)
        return
    for i, image in enumerate(images):
        name = f"{out.stem}-{i:03}.png" if single else f"{i:03}.png"
        yield write_picture(to_picture(image), (out.parent if single else out) / name)
    if len(images) > 1:
        rows = [prompt for prompt, _ in jobs[::columns]]
        headings = [f"seed {seed}" for _, seed in jobs[:columns]]
        yield write_picture(contact_sheet(images, rows, headings), out if single else out / "sheet.png")


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
