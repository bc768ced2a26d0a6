"""One plot for all figures: panels of curves, one below the other."""

import numpy as np
from PIL import Image, ImageDraw

COLORS = ((255, 190, 80), (110, 170, 255), (120, 200, 120), (255, 110, 110))
WIDE, HIGH, LEFT, TOP = 640, 220, 70, 44  # pixels of a panel, and around it


def plot(panels: dict, log_x: bool = False, log_y: bool = False) -> Image.Image:
    """panels: by title, curves by name, (x, y) as two lists each."""
    page = Image.new("RGB", (LEFT + WIDE + 40, len(panels) * (TOP + HIGH + 30) + 10), (24, 24, 32))
    pen = ImageDraw.Draw(page)
    for k, (title, curves) in enumerate(panels.items()):
        top = TOP + k * (TOP + HIGH + 30)
        pen.text((LEFT, top - 34), title, fill=(255, 255, 255))
        pen.rectangle((LEFT, top, LEFT + WIDE, top + HIGH), outline=(90, 90, 100))
        scaled = {}  # by name, x and y from 0 to 1
        for axis, log in enumerate((log_x, log_y)):
            values = [np.asarray(curve[axis], float) for curve in curves.values()]
            values = [np.log10(np.maximum(v, 1e-12)) if log else v for v in values]
            low, high = min(v.min() for v in values), max(v.max() for v in values)
            for name, v in zip(curves, values, strict=True):
                scaled.setdefault(name, []).append((v - low) / max(high - low, 1e-9))
            for share in (0.0, 0.5, 1.0):  # ticks
                number = low + share * (high - low)
                text = f"{10**number if log else number:.3g}"
                below = (LEFT + share * (WIDE - 30), top + HIGH + 5)
                beside = (8, top + (1 - share) * (HIGH - 12))
                pen.text((below, beside)[axis], text, fill=(160, 160, 160))
        for n, (name, (x, y)) in enumerate(scaled.items()):
            color = COLORS[n % len(COLORS)]
            points = list(zip(LEFT + x * WIDE, top + HIGH - 6 - y * (HIGH - 12), strict=True))
            pen.text((LEFT + 130 * n, top - 18), name, fill=color)
            pen.line(points, fill=color, width=2)
            for a, b in points if len(points) < 20 else ():
                pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=color)
    return page
