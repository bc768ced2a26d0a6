"""A digital world: a game of bricks. All of it follows from the state and the keys.

The picture has 10 x 10 cells of 4 x 4 pixels. The ball is one of them, and flies along diagonals, a
cell a frame; its rear corner is dark, which shows its way. Walls, the paddle and bricks reflect it;
a brick that is hit vanishes. From the paddle's ends the ball goes off to the left or the right,
from its middle as it came. Where there is no ball, as when one was lost, the next frame has one in
the middle, on its way down to the right; when no brick is left there is a full wall again, the same
each time. So one frame says all that will happen, and a model that loses the ball gets it back.

In training, one of three plays: one who follows the ball, mostly; one who presses keys at random,
and holds them; one who stands still.
"""

import numpy as np

from worlds.simulated import Simulated, State, chosen

SIDE, CELL = 10, 4  # cells; pixels of a cell
TOP, ROWS, WIDE = 1, 4, 2  # the first row of bricks, how many there are, cells of a brick
COLUMNS, PADDLE, FLOOR = SIDE // WIDE, 3, SIDE - 1  # bricks in a row; the paddle, and its row
SERVED = SIDE // 2, SIDE // 2  # where a ball comes back
COLORS = {"red": (230, 60, 60), "orange": (240, 140, 30), "yellow": (225, 215, 40),
          "green": (60, 200, 80), "blue": (70, 110, 240), "purple": (180, 70, 220)}  # fmt: skip
PALETTE = np.array([(12, 12, 32), *COLORS.values(), (50, 190, 200), (255, 255, 255)], np.uint8)
DARK, PLAYER, BALL = 0, len(PALETTE) - 2, len(PALETTE) - 1
FAINT = 128  # for reading: a ball has 194 in each colour, all else at most 70 in one
STYLES = ("the paddle follows the ball", "the paddle moves at random", "the paddle stands still")


class Game(Simulated):
    colors, size, actions = 3, (SIDE * CELL, SIDE * CELL), ("stay", "left", "right")
    flags = dict(durations=(2,), time_factor=1, channels=4, images=0.0, image_phase=0.0,
                 items=12_000, given=0.03, later=0.9, vae_steps=800, steps=6000,
                 tokens=256, rows=8, prediction="x")  # fmt: skip
    sampling = dict(steps=2, guidance=1.0, noise=0.05)
    noise = 0.3  # little, since what is small must be seen

    def begin(self, u: np.ndarray) -> State:
        """Anywhere in a game: some bricks are gone, and the ball may be among the others, where
        most happens, or lost. What training never shows: other layouts."""
        n, row, column = len(u), np.arange(ROWS), np.arange(COLUMNS)
        rows = row < chosen(u[:, 0], (ROWS - 2, ROWS - 1, ROWS))[:, None]  # [n, ROWS]
        gaps = u[:, 8 : 8 + COLUMNS] < chosen(u[:, 1], (0.0, 0.3))[:, None]  # [n, COLUMNS]
        layout = rows[:, :, None] & ~gaps[:, None]  # [n, ROWS, COLUMNS]
        if self.config.beyond:
            odd = (row[:, None] + column) % 2 == 0
            hill = np.minimum(column, COLUMNS - 1 - column) >= row[::-1, None]
            layout = np.where((u[:, 1] < 0.5)[:, None, None], odd, hill)
        layout |= ~layout.any((1, 2), keepdims=True)
        left = np.where(u[:, 2] < 0.3, 1.0, u[:, 3])[:, None, None]  # the share that is left
        bricks = layout & (u[:, 16 : 16 + ROWS * COLUMNS].reshape(n, ROWS, COLUMNS) < left)
        ball = np.column_stack([chosen(u[:, 4], range(FLOOR)), chosen(u[:, 5], range(SIDE))])
        sign = np.column_stack([chosen(u[:, 6], (-1, 1)), chosen(u[:, 7], (-1, 1))])
        lost = u[:, 57] < 0.05
        ball[lost], sign[lost] = SERVED, 1
        return {
            "bricks": bricks & ~touched(ball),
            "lost": lost,  # [n]: whether there is no ball
            "ball": ball,  # [n, 2]: its row and column, or where it will come back
            "sign": sign,  # [n, 2]: which way it goes
            "paddle": chosen(u[:, 49], range(SIDE - PADDLE + 1)),  # [n]: its left end
            "palette": 1 + u[:, 50 : 50 + len(COLORS)].argsort()[:, :ROWS],  # of the rows
            "style": chosen(u[:, 56], (0, 0, 0, 0, 1, 1, 1, 2)),
            "done": np.ones(n, int),
        }

    def act(self, state: State, u: np.ndarray) -> np.ndarray:
        aim = state["ball"][:, 1] - state["paddle"]  # 0 to PADDLE - 1: below the ball
        follow = np.select([aim < 1, aim > PADDLE - 2], [2, 3], 1)
        any_key = chosen(u[:, 1], (1, 2, 3))
        follow = np.where(u[:, 0] < 0.15, any_key, follow)
        held = np.where(u[:, 0] < 0.2, any_key, state["done"])
        return np.choose(state["style"], [follow, held, 1])

    def step(self, state: State, action: np.ndarray) -> State:
        paddle = state["paddle"] + (action == 3) - (action == 2)
        paddle = paddle.clip(0, SIDE - PADDLE)
        ball, sign, bricks = (state[name].copy() for name in ("ball", "sign", "bricks"))
        for axis in (1, 0):  # sideways, then up or down
            to = ball.copy()
            to[:, axis] += sign[:, axis]
            hit = bricks & touched(to)
            bricks &= ~hit
            back = hit.any((1, 2)) | (to[:, axis] < 0) | (to[:, axis] == SIDE)
            if axis == 0:
                low, on = to[:, 0] == FLOOR, to[:, 1] - paddle
                caught = low & (on >= 0) & (on < PADDLE)
                aside = np.select([on == 0, on == PADDLE - 1], [-1, 1], sign[:, 1])
                sign[:, 1] = np.where(caught, aside, sign[:, 1])
                back |= caught
            sign[:, axis] = np.where(back, -sign[:, axis], sign[:, axis])
            ball[:, axis] = np.where(back, ball[:, axis], to[:, axis])
        lost = low & ~caught
        served = lost | state["lost"]  # in the middle: unseen if it was lost just now
        ball[served], sign[served] = SERVED, 1
        cleared = ~bricks.any((1, 2)) & (ball[:, 0] >= TOP + ROWS)
        palette = np.where(cleared[:, None], 1 + np.arange(ROWS), state["palette"])
        bricks |= cleared[:, None, None]
        return state | {"paddle": paddle, "lost": lost, "ball": ball, "sign": sign,
                        "bricks": bricks, "palette": palette}  # fmt: skip

    def render(self, state: State) -> np.ndarray:
        n, wall = np.arange(len(state["ball"])), state["bricks"] * state["palette"][:, :, None]
        cells = np.full((len(n), SIDE, SIDE), DARK)
        cells[:, TOP : TOP + ROWS] = wall.repeat(WIDE, axis=2)
        cells[n[:, None], FLOOR, state["paddle"][:, None] + np.arange(PADDLE)] = PLAYER
        there, half = np.flatnonzero(~state["lost"]), np.arange(CELL // 2)
        ball, sign = state["ball"][there], state["sign"][there]
        cells[there, ball[:, 0], ball[:, 1]] = BALL
        pixels = cells.repeat(CELL, axis=1).repeat(CELL, axis=2)  # [n, H, W]
        y, x = (CELL * ball + CELL // 2 * (sign < 0)).T[..., None] + half
        pixels[there[:, None, None], y[:, :, None], x[:, None]] = DARK  # the rear corner
        return PALETTE[pixels].transpose(0, 3, 1, 2)

    def read(self, pixels: np.ndarray) -> State:
        """A brick is where colour is, the ball is the brightest cell in all three colours, if one
        is bright, and has its darkest corner behind, and the paddle lies where its row looks most
        like it."""
        x = cells_of(pixels)  # [T, SIDE, SIDE, 3]
        vivid = (x.max(3) - x.min(3))[:, TOP : TOP + ROWS]
        vivid = vivid.reshape(len(x), ROWS, COLUMNS, WIDE).mean(3)
        white = x.min(3).reshape(len(x), -1)
        player = -np.abs(x[:, FLOOR] - PALETTE[PLAYER]).sum(2)  # [T, SIDE]
        player = np.lib.stride_tricks.sliding_window_view(player, PADDLE, axis=1).sum(2).argmax(1)
        ball = np.column_stack(np.unravel_index(white.argmax(1), (SIDE, SIDE)))
        lost = white.max(1) < FAINT
        corners = pixels.mean(0).reshape(len(x), SIDE, 2, CELL // 2, SIDE, 2, -1).mean((3, 6))
        corners = corners[np.arange(len(x)), ball[:, 0], :, ball[:, 1]].reshape(len(x), -1)
        sign = 1 - 2 * np.column_stack(np.unravel_index(corners.argmin(1), (2, 2)))
        ball[lost], sign[lost] = SERVED, 1
        return {"bricks": vivid > 80, "lost": lost, "ball": ball, "sign": sign, "paddle": player}

    def describe(self, states: State, actions: np.ndarray) -> tuple[str, str]:
        names = [[*COLORS][k - 1] for k in states["palette"][0]]
        rows = [x for x, some in zip(names, states["bricks"][0].any(1), strict=True) if some]
        play = STYLES[states["style"][0]]
        return f"a game of bricks: {', '.join(rows) or 'none is left'}. {play}.", "a game of bricks"


def touched(ball: np.ndarray) -> np.ndarray:
    """In whose place a ball [n, 2] would be: bool [n, ROWS, COLUMNS]."""
    rows, columns = TOP + np.arange(ROWS) == ball[:, :1], np.arange(COLUMNS) == ball[:, 1:] // WIDE
    return rows[:, :, None] & columns[:, None]


def cells_of(pixels: np.ndarray) -> np.ndarray:
    """Their mean colours: pixels [3, T, H, W] -> [T, SIDE, SIDE, 3]."""
    x = pixels.astype(float).reshape(3, -1, SIDE, CELL, SIDE, CELL)
    return x.mean((3, 5)).transpose(1, 2, 3, 0)


WORLD = Game
