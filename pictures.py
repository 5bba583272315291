"""Images as tensors, pictures as files: one at a time, or many on a contact sheet."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import weights
from commandline import one_line


def to_picture(image):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    return Image.fromarray(((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def picture_bytes(picture):
    """A PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def contact_sheet(images, rows, columns, width=192):
    """Images (R · C, 3, H, W), row by row, with a label for each row and a heading for each column -> a PIL image.

    A label is one line, cut where it is long. Small images are enlarged to about `width` pixels.
    """
    zoom, gap, top = max(1, width // images.shape[3]), 4, 20
    height, width = (zoom * side for side in images.shape[2:])
    rows = [one_line(row) for row in rows]
    left = gap + max(int(ImageFont.load_default().getlength(row)) for row in rows) + gap
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


def write_picture(picture, path):
    """Write a PIL image as PNG. Returns the path."""
    with weights.replacing(path) as part:
        picture.save(part, format="PNG")
    return path
