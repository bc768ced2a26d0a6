"""A digital world: painting. What the brush does to the paper stays there.

The paper has 7 x 8 cells of 4 x 4 pixels, and the brush is at one of them, seen as a dark ring that
leaves the middle of its cell in sight. While it is down, it marks this cell in its colour; the
eraser, the last of its tools, takes a bite of 3 x 3 cells. As in paint programs, a bar below the
paper shows the tool. While the brush is down, all of the bar is in the tool's colour; while it is
lifted, only half. So one frame says everything.

In training, one of three paints: one who draws lines; one who draws squares; one who presses keys
at random, and holds them. The first two press a random key now and then.
"""

import numpy as np

from worlds.simulated import Simulated, State, chosen

CELL, PAPER = 4, np.array((7, 8))  # pixels of a cell; rows and columns of cells, without the bar
COLORS = {"red": (225, 35, 60), "yellow": (250, 200, 0),
          "green": (40, 190, 90), "blue": (50, 100, 245)}  # fmt: skip
TOOLS, ERASER = (*COLORS, "the eraser"), len(COLORS)
CELLS = np.array([(245, 242, 230), *COLORS.values()], np.uint8)  # clean, and painted
BARS = np.array([*COLORS.values(), (255, 140, 225), (50, 50, 60)], np.uint8)  # tools; no tool
RING = np.full((CELL, CELL), True)  # which of a cell's pixels the brush covers
RING[1:-1, 1:-1] = False
FIGURES, DRAWN, LEGS = 11, 5, 5  # of a plan; of a figure: its random numbers, and its goals
WAYS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
STYLES = ("the brush draws lines", "the brush draws squares", "the brush wanders")
KEYS = (1, 1, 1, 2, 3, 4, 5, 6, 6, 7, 7)  # what a random key is one of


class Paint(Simulated):
    colors = 3
    actions = ("stay", "up", "down", "left", "right", "lift or lower", "next colour")
    flags = dict(durations=(3,), time_factor=1, channels=8, images=0.0, image_phase=0.0,
                 items=12_000, given=0.03, later=0.9, vae_steps=1000, steps=3000,
                 tokens=256, rows=8, prediction="x")  # fmt: skip
    sampling = dict(steps=2, guidance=1.0, noise=0.05)
    past, noise = 0.7, 0.3  # two frames, which say all; what is small must be seen

    def begin(self, u: np.ndarray) -> State:
        """In the middle of a plan: its first figures are on the paper. What training never shows:
        a paper full of diagonal stripes."""
        each, own = u[:, : FIGURES * DRAWN].reshape(-1, FIGURES, DRAWN), u[:, FIGURES * DRAWN :]
        style, first = chosen(own[:, 0], (0, 0, 0, 1, 1, 1, 2, 2)), chosen(own[:, 1], range(1, 6))
        earlier = np.arange(FIGURES) < first[:, None]  # these are lines and squares
        way = chosen(each[..., 0], range(8))  # from 4 on: a square
        way = np.where(earlier, way, way % 4 + 4 * (style == 1)[:, None])
        tool = chosen(each[..., 1], (0, 0, 1, 1, 2, 3, 4)).cumsum(1) % len(TOOLS)
        # A figure starts near the one before, on a walk that the edges of the paper reflect.
        walk = chosen(each[..., 2:4], range(-3, 4)).cumsum(1)
        walk += (own[:, None, 2:4] * PAPER).astype(int) + PAPER - 1
        start = np.abs(walk % (2 * PAPER - 2) - PAPER + 1)  # [n, FIGURES, 2]
        end = start + chosen(each[..., 4], range(2, 5))[..., None] * WAYS[way]
        end = np.where((end < 0) | (end >= PAPER), 2 * start - end, end)  # to where there is room
        end = end.clip(0, PAPER - 1)
        paper = np.zeros((len(u), *PAPER), int)
        for k in range(first.max(initial=0)):
            paper = painted(paper, start[:, k], end[:, k], tool[:, k], earlier[:, k])
        if self.config.beyond:
            sign, shift = chosen(own[:, 4:5], (-1, 1)), chosen(own[:, 5:6], range(12))
            row, column = map(np.arange, PAPER)
            along = row[:, None] + (sign * column + shift)[:, None]
            paper = np.where(along % 3 < 2, 1 + along // 3 % len(COLORS), 0)
        plan, at = goals(start, end, tool, way), LEGS * first + chosen(own[:, 6], range(LEGS))
        row, column, down, tool = plan[np.arange(len(u)), at - 1].T
        brush, down = np.column_stack([row, column]), down > 0
        return {
            "paper": painted(paper, brush, brush, tool, down),  # [n, 7, 8]: 0 is clean
            "brush": brush,  # [n, 2]: the row and column of its cell
            "down": down,
            "tool": tool,
            "plan": plan,  # [n, FIGURES * LEGS, 4]: row, column, down and tool to reach
            "at": at,  # [n]: which of these is next
            "style": style,
            "done": np.ones(len(u), int),
        }

    def act(self, state: State, u: np.ndarray) -> np.ndarray:
        goal = state["plan"][np.arange(len(u)), state["at"]]
        away = goal[:, :2] - state["brush"]
        row, column = np.where(away[:, 0] < 0, 2, 3), np.where(away[:, 1] < 0, 4, 5)
        wrong = [goal[:, 2] != state["down"], goal[:, 3] != state["tool"], *(away != 0).T]
        planned = np.select(wrong, [6, 7, row, column], 1)
        any_key, moves = chosen(u[:, 1], KEYS), (state["done"] > 1) & (state["done"] < 6)
        held = np.where(moves & (u[:, 0] < 0.7), state["done"], any_key)
        return np.where(state["style"] == 2, held, np.where(u[:, 0] < 0.12, any_key, planned))

    def step(self, state: State, action: np.ndarray) -> State:
        row = (action == 3).astype(int) - (action == 2)
        column = (action == 5).astype(int) - (action == 4)
        brush = (state["brush"] + np.column_stack([row, column])).clip(0, PAPER - 1)
        down, tool = state["down"] ^ (action == 6), (state["tool"] + (action == 7)) % len(TOOLS)
        paper, at = painted(state["paper"], brush, brush, tool, down), state["at"]
        now, k = np.column_stack([brush, down, tool]), np.arange(len(at))
        for _ in range(LEGS):  # goals of a line coincide
            at = (at + (state["plan"][k, at] == now).all(1)) % (FIGURES * LEGS)
        return state | {"paper": paper, "brush": brush, "down": down, "tool": tool, "at": at}

    def render(self, state: State) -> np.ndarray:
        half = np.stack([state["tool"], np.where(state["down"], state["tool"], -1)], 1)  # [n, 2]
        bar = BARS[half].repeat(PAPER[1] // 2, axis=1)[:, None]  # [n, 1, 8, 3]
        frames = np.concatenate([CELLS[state["paper"]], bar], axis=1)  # [n, 8, 8, 3]
        frames = frames.repeat(CELL, axis=1).repeat(CELL, axis=2)
        frames[:, CELL * PAPER[0]] = BARS[-1]  # where the paper ends
        place = inside(state["brush"])
        frames[place] = np.where(RING[..., None], BARS[-1], frames[place])
        return frames.transpose(0, 3, 1, 2)

    def read(self, pixels: np.ndarray) -> State:
        """The brush is where the pixels of a ring look most like it, and least like paint. A cell,
        and a half of the bar, is what its pixels look most like, but for those of the ring."""
        T, (rows, columns) = pixels.shape[1], PAPER
        x = pixels.swapaxes(0, 1)  # [T, 3, H, W]
        paper, bar = x[:, :, : rows * CELL], x[:, :, rows * CELL + 1 :]
        cells = unlike(paper, CELLS)  # [T, colours, H, W]
        gain = cells.min(1) - unlike(paper, BARS[-1:])[:, 0]  # [T, H, W]
        ring = np.einsum("trycx,yx->trc", gain.reshape(T, rows, CELL, columns, CELL), RING)
        brush = np.column_stack(np.unravel_index(ring.reshape(T, -1).argmax(1), PAPER))
        bare = np.ones((T, *CELL * PAPER), bool)
        bare[inside(brush)] = ~RING
        cells = (cells * bare[:, None]).reshape(T, len(CELLS), rows, CELL, columns, CELL)
        halves = unlike(bar, BARS).reshape(T, len(BARS), CELL - 1, 2, -1)
        halves = halves.sum((2, 4))  # [T, bars, 2]
        tool, down = halves[:, :-1, 0].argmin(1), halves[..., 1].argmin(1) < len(TOOLS)
        return {"paper": cells.sum((3, 5)).argmin(1), "brush": brush, "down": down, "tool": tool}

    def describe(self, states: State, actions: np.ndarray) -> tuple[str, str]:
        used = dict.fromkeys(states["tool"][states["down"]].tolist())  # in this order
        used = ", ".join(TOOLS[k] for k in used) or "nothing new"
        return f"a painting: {used}. {STYLES[states['style'][0]]}.", "a painting"


def painted(paper: np.ndarray, start, end, tool: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The paper [n, rows, columns] after tools went along the square, or line, with the corners
    start and end [n, 2], where they were down."""
    low, high = np.minimum(start, end)[..., None], np.maximum(start, end)[..., None]  # [n, 2, 1]
    cell = np.arange(PAPER.max())
    outside = np.maximum(low - cell, cell - high)  # of its rows, its columns [n, 2, 8]
    away = np.maximum(outside[:, 0, : PAPER[0], None], outside[:, 1, None])
    away = np.abs(away)  # [n, rows, columns]: 0 on its outline
    touched = (away <= (tool == ERASER)[:, None, None]) & down[:, None, None]
    return np.where(touched, (tool + 1)[:, None, None] % len(TOOLS), paper)


def goals(start: np.ndarray, end: np.ndarray, tool: np.ndarray, way: np.ndarray) -> np.ndarray:
    """What a brush is to reach, in this order: lifted, where a figure starts; then, down, corner by
    corner of a square, or the end of a line. [n, FIGURES * LEGS, 4]"""
    back = np.where(way[..., None] > 3, start, end)
    turn, last = (np.stack([x[..., 0], y[..., 1]], -1) for x, y in ((end, start), (back, end)))
    place = np.stack([start, turn, end, last, back], 2)  # [n, FIGURES, LEGS, 2]
    down = np.broadcast_to(np.arange(LEGS) > 0, place.shape[:3])
    tool = np.broadcast_to(tool[..., None], place.shape[:3])
    return np.concatenate([place, down[..., None], tool[..., None]], 3).reshape(len(place), -1, 4)


def inside(brush: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where the pixels of cells [n, 2] are."""
    y, x = CELL * brush.T[..., None, None]
    return np.arange(len(brush))[:, None, None], y + np.arange(CELL)[:, None], x + np.arange(CELL)


def unlike(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """How far pixels [T, 3, H, W] are from each of the colours: [T, colours, H, W]."""
    return np.stack([((pixels - c[:, None, None]) ** 2).sum(1) for c in colors.astype(float)], 1)


WORLD = Paint
