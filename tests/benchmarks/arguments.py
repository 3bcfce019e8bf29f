"""Types of the benchmarks' arguments, whose errors argparse shows in one line."""

import argparse

import utils


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def whole_blocks(text):
    """A batch size of which each layer's tiles fill whole blocks, in which their parts are timed."""
    if positive(text) % 4:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of 4")
    return int(text)


def device(text):
    try:
        return utils.get_device(text)
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
