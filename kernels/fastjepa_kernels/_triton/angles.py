"""Sine and cosine in float32 registers: those of the device library need a stack and float64 for large arguments."""

import triton
import triton.language as tl


@triton.jit
def sine_cosine(angle):
    """sin and cos of an angle in float32, from 0 to 10000, within about one unit in the last place of 1.

    The angle less the nearest multiple of pi / 2, in three steps whose first two products are exact (Cody and Waite),
    and polynomials fitted to +-pi / 4.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - turns * 1.5703125
    rest = rest - turns * 4.837512969970703125e-4
    rest = rest - turns * 7.549789948768648e-8
    square = rest * rest
    sine = rest + rest * square * (-0.166666549436 + square * (0.008332178141 - square * 0.000195172982))
    tail = 0.04166664686631 - square * (0.001388736750935 - square * 0.00002443845084658)
    cosine = 1.0 - 0.5 * square + square * square * tail
    quarter = turns.to(tl.int32) & 3
    swap = (quarter & 1) == 1
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where((quarter & 2) == 2, -sine, sine), tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
