"""What the commands share: errors that are one line, and arguments that are checked where they are given."""

import argparse
import math
import os
import sys

# How long a thread that waits for the others spins before it sleeps; read once, when torch is loaded. By default it spins
# so long that two threads beside another program are ten times slower. OMP_WAIT_POLICY=passive lets it sleep at once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch  # noqa: E402


class UserError(Exception):
    """Something that the user can put right. A command prints it as one line and exits with status 2."""


def run_script(main):
    """Run a command's main function and turn what a user can cause into one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that is not UTF-8
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print("error:", one_line(error, 2000), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults other than None, False and empty."""

    def _get_help_string(self, action):
        nothing = action.default is False or action.default in (None, [], ())
        return action.help if nothing else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """argparse that shows defaults, raises its errors as UserError and does not guess at abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(message)


def one_line(text, most=64):
    """Text on one line of at most `most` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[:most - 1] + "…"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_device(name):
    """A type of arguments: a device that is available."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name} is not available ({str(error).splitlines()[0]})") from error
    return device


# ------------------------------------------------------------------------------------------- types of arguments

def number(least, below=math.inf, kind=float):
    """A type of arguments: numbers from `least` up to, but not including, `below`."""
    def parse(text):
        value = kind(text)
        if not least <= value < below:
            top = f" to below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g}{top}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # argparse says: invalid number value: 'x'
    return parse


count = number(1, 10**7, kind=int)
from_zero = number(0, 10**7, kind=int)
positive = number(1e-30)
seed = number(0, 2**43, kind=int)  # loop.seeded multiplies it by 1,000,003, and torch takes what is below 2^63


def image_size(text):
    """H or HxW -> (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not H or HxW with sides that are multiples of 16")
    return int(sides[0]), int(sides[-1])


def blocks(text):
    """"4-7" -> (4, 7), the first and the last block to cache; "none" -> ()."""
    if text == "none":
        return ()
    parts = text.split("-")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not A-B, the first and the last block counted from 0, or none")
    return int(parts[0]), int(parts[1])
