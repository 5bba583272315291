"""What the scripts' command lines share: errors that are one line, arguments that are checked where they are given."""

import argparse
import contextlib
import math
import signal
import sys
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can put right. The scripts print its one line and exit with status 2."""


def run_script(main, *going_on):
    """Run a script's main; what the user can put right becomes one line on stderr and exit status 2.

    SIGTERM, which schedulers of clusters send, is taken as Ctrl-C is. going_on: how to go on with what was stopped.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print("error:", one_line(str(error), 2000), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("; ".join([*(stop.args or ["stopped"]), *going_on]), file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def asked_to_stop():
    """Ctrl-C and SIGTERM wait for the end of an iteration: a list of those that came. The second ends at once."""
    asked, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        asked.append(number)
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CommandLine(argparse.ArgumentParser):
    """argparse with one-line errors and no guessing at abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(message)


def one_line(text, most=64):
    """Text as it is shown: one line, of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most - 1] + "…"


def find_device(name):
    """The device asked for, or the best there is. Raises UserError where it isn't there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name} is not there ({str(error).splitlines()[0]})") from error
    return device


# ----------------------------------------------------------------------------------------------- types of arguments

def utf8(text):
    text.encode()  # fails on what a terminal of another encoding passed on
    return text


def number(least, below=math.inf, kind=float):
    """A type of arguments: numbers from `least` up to, but without, `below`. NaN is none."""
    def parse(text):
        value = kind(text)
        if not least <= value < below:
            top = f" to {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g}{top}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # as argparse names it: invalid number value: 'x'
    return parse


count = number(1, 10**7, kind=int)
positive = number(1e-30)
seed = number(0, 2**43, kind=int)  # prompts.seeded multiplies it by 1,000,003, and torch takes what is below 2^63


def image_size(text):
    """H or HxW -> (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not H or HxW with sides that are multiples of 16")
    return int(sides[0]), int(sides[-1])


FILES = {f".{name}" for name in "png jpg jpeg webp gif bmp tif tiff pdf json jsonl csv tsv txt md safetensors ckpt pt "
         "pth bin gguf".split()}


def output(ending=None):
    """A type of arguments: a folder or, with `ending`, a file too. A name of another file, say cat.jpg, is refused."""
    def parse(text):
        path = Path(text)
        if path.suffix.lower() in FILES - {ending} and not path.is_dir():
            wanted = f"FILE{ending} or a folder" if ending else "a folder"
            raise argparse.ArgumentTypeError(f"{text} is the name of another file; give {wanted}")
        return path

    return parse


NAMED_BLOCKS = {"none": None, "slow": (2, 7), "fast": (2, 9)}  # SD3-Medium's; where the 8 of "fast" lie is ours


def blocks(text):
    """"4-7" -> (4, 7), the first and the last block to cache; "none" -> None; and the paper's by name."""
    if text in NAMED_BLOCKS:
        return NAMED_BLOCKS[text]
    parts = text.split("-")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not A-B, the first and the last block, counted from 0, or none")
    return int(parts[0]), int(parts[1])
