"""3D consistency: a camera walks through a room and turns.

The room is a square with four walls of different colours, some with a stripe or a door, and two to
four round pillars. The picture is ray-cast: a ray for each column says what it meets and how far
away, and that is as high as it is near. Columns are equal *angles* apart (a cylinder, not a flat
screen), so the same thing moves by as many pixels in every part of the picture when the camera
turns, and a turn of 22.5 degrees is a quarter of the view.

Nothing in the room moves. So all that was seen must look the same when the camera comes back: that
is what a model has to remember, and to place. In training, one of two walks: one who wanders, and
one who mostly looks around.
"""

import numpy as np

from worlds.simulated import Simulated, State, chosen

HIGH, WIDE = 24, 32  # pixels
ROOM, PILLAR, NEAR = 6.0, 0.45, 0.3  # sides; radius of pillars; how near the camera comes
TURNS, VIEW, STEP = 16, 90, 0.4  # headings, degrees in the picture, how far a step goes
TALL = 16.0  # pixels, half the height of what is at a distance of 1
MOST = 6  # pillars
COLORS = {"red": (225, 50, 50), "green": (40, 190, 70), "blue": (60, 90, 235),
          "yellow": (230, 210, 40), "purple": (175, 60, 215), "cyan": (40, 200, 210),
          "orange": (240, 140, 30), "pink": (245, 140, 190)}  # fmt: skip
STRIPE, DOOR = (245, 245, 245), (95, 60, 35)
PALETTE = np.array([*COLORS.values(), STRIPE, DOOR], float)  # materials 0 to 9
FLOOR, CEILING = np.array((60.0, 60, 60)), np.array((150.0, 165, 180))
STYLES = ("the camera walks around", "the camera looks around")


class Room(Simulated):
    colors, size = 3, (HIGH, WIDE)
    actions = ("stay", "forward", "back", "turn left", "turn right")
    flags = dict(durations=(32,), time_factor=1, channels=4, images=0.0, image_phase=0.0,
                 items=8000, given=0.15, later=0.6, vae_steps=700, steps=2500, tokens=416, rows=5,
                 vae_batch=4, prediction="x")  # fmt: skip
    sampling = dict(steps=8, guidance=1.0, noise=0.1)
    past = 0.75

    def begin(self, u: np.ndarray) -> State:
        """What training never shows: five or six pillars."""
        n = len(u)
        colors = u[:, :8].argsort(1)  # all different: four walls, then pillars
        colors = np.column_stack([colors, colors[:, 4:6]])  # the fifth and sixth repeat two
        many = chosen(u[:, 8], (5, 6) if self.config.beyond else (2, 3, 4))
        # A pillar stands in a cell of its own of 3 x 3, so that there is a way around it.
        cell = u[:, 9:18].argsort(1)[:, :MOST]
        jitter = (u[:, 18 : 18 + 2 * MOST].reshape(n, MOST, 2) - 0.5) * 0.7
        pillars = (np.stack([cell // 3, cell % 3], axis=-1) + 0.5) * ROOM / 3 + jitter
        state = {
            "pillars": pillars,  # [n, MOST, 2]
            "there": np.arange(MOST) < many[:, None],  # [n, MOST]
            "walls": colors[:, :4],
            "paints": colors[:, 4:],  # [n, MOST], of the pillars
            "extra": chosen(u[:, 30:34], (0, 1, 2)),  # [n, 4]: nothing, a stripe or a door
            "extra_at": 1.0 + (ROOM - 2.0) * u[:, 34:38],  # where along its wall
            "heading": chosen(u[:, 38], range(TURNS)),  # [n]
            "style": chosen(u[:, 39], (0, 1)),
            "done": np.ones(n, int),
        }
        tries = NEAR + (ROOM - 2 * NEAR) * u[:, 40:60].reshape(n, 10, 2)
        free = np.stack([self.free(state, place) for place in tries.swapaxes(0, 1)], axis=1)
        return state | {"place": tries[np.arange(n), free.argmax(1)]}  # [n, 2]

    def free(self, state: State, place: np.ndarray) -> np.ndarray:
        """Whether the camera can be there: place [n, 2] -> [n]."""
        away = np.linalg.norm(state["pillars"] - place[:, None], axis=2)  # [n, MOST]
        inside = ((place >= NEAR) & (place <= ROOM - NEAR)).all(1)
        return inside & ((away > PILLAR + NEAR) | ~state["there"]).all(1)

    def act(self, state: State, u: np.ndarray) -> np.ndarray:
        walk = np.where(u[:, 0] < 0.7, state["done"], chosen(u[:, 1], (1, 2, 2, 2, 2, 3, 4, 5)))
        turned = np.where(state["done"] > 3, state["done"], chosen(u[:, 2], (4, 5)))
        other = chosen(u[:, 1], (1, 2, 2, 3, 4, 4, 5, 5))
        return np.where(state["style"] == 0, walk, np.where(u[:, 0] < 0.85, turned, other))

    def step(self, state: State, action: np.ndarray) -> State:
        turn = (action == 5).astype(int) - (action == 4)
        go = STEP * ((action == 2).astype(int) - (action == 3))
        angle = 2 * np.pi / TURNS * state["heading"]
        to = state["place"] + go[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        place = np.where(self.free(state, to)[:, None], to, state["place"])
        return state | {"heading": (state["heading"] + turn) % TURNS, "place": place}

    def cast(self, state: State) -> tuple[np.ndarray, ...]:
        """What the ray of each column meets: the material of its lower part and of its upper part,
        and its distance, [n, WIDE] each."""
        aside = np.deg2rad(VIEW / WIDE * (np.arange(WIDE) + 0.5 - WIDE / 2))
        angle = 2 * np.pi / TURNS * state["heading"][:, None] + aside  # [n, WIDE]
        ray = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)  # [n, WIDE, 2]
        ray = np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
        place = state["place"][:, None].astype(np.float32)  # [n, 1, 2]
        to_walls = (np.where(ray > 0, np.float32(ROOM), 0) - place) / ray  # [n, WIDE, 2]
        axis = to_walls.argmin(2)  # 0: a wall across x
        far = to_walls.min(2)
        which = 2 * axis + (np.take_along_axis(ray, axis[..., None], 2)[..., 0] > 0)
        along = np.take_along_axis(place + far[..., None] * ray, 1 - axis[..., None], 2)[..., 0]
        wall, extra, at = (np.take_along_axis(state[name], which, 1)
                           for name in ("walls", "extra", "extra_at"))  # fmt: skip
        upper = np.where((extra == 1) & (np.abs(along - at) < 0.3), len(COLORS), wall)
        lower = np.where((extra == 2) & (np.abs(along - at) < 0.5), len(COLORS) + 1, upper)
        # From p along d, a circle around c is b - sqrt(b^2 - |c - p|^2 + r^2) away, b = d (c - p).
        gap = (state["pillars"][:, None] - place[:, :, None]).astype(np.float32)  # [n, 1, MOST, 2]
        b = ray @ gap[:, 0].mT  # [n, WIDE, MOST]
        root = b**2 - (gap**2).sum(-1) + PILLAR**2
        meets = (root > 0) & (b > 0) & state["there"][:, None]
        near = np.where(meets, b - np.sqrt(root.clip(0)), np.inf)  # [n, WIDE, MOST]
        first, closer = near.argmin(2), near.min(2) < far
        paint = np.take_along_axis(state["paints"], first, 1)
        upper, lower = np.where(closer, paint, upper), np.where(closer, paint, lower)
        return lower, upper, np.minimum(near.min(2), far)

    def render(self, state: State) -> np.ndarray:
        lower, upper, far = self.cast(state)
        row = np.arange(HIGH, dtype=np.float32)[:, None] + 0.5 - HIGH / 2  # below the horizon
        half = (TALL / far)[:, None]  # [n, 1, WIDE]
        cover = (half - np.abs(row) + 0.5).clip(0, 1)[..., None]  # [n, HIGH, WIDE, 1]
        door = (row + half / 2 + 0.5).clip(0, 1)[..., None]  # a door is not as high as its wall
        shade = 1 / (1 + 0.07 * far)[:, None, :, None]  # what is far is darker
        palette = PALETTE.astype(np.float32)
        color = (door * palette[lower][:, None] + (1 - door) * palette[upper][:, None]) * shade
        behind = np.where(row[..., None] > 0, FLOOR, CEILING).astype(np.float32)  # [HIGH, 1, 3]
        frames = (cover * color + (1 - cover) * behind).round().astype(np.uint8)
        return frames.transpose(0, 3, 1, 2)

    def read(self, pixels: np.ndarray) -> State:
        """What each column shows [T, WIDE]: the material below the horizon, and its height in
        pixels."""
        x = pixels.transpose(1, 2, 3, 0).astype(float)  # [T, HIGH, WIDE, 3]
        middle = x[:, HIGH // 2]  # [T, WIDE, 3], below the horizon
        tint = middle / np.linalg.norm(middle, axis=-1, keepdims=True).clip(1)
        tints = PALETTE / np.linalg.norm(PALETTE, axis=1, keepdims=True)
        material = ((tint[:, :, None] - tints) ** 2).sum(-1).argmin(-1)
        # Of floor and wall, each pixel is a mixture: how much of the wall is in it?
        below = x[:, HIGH // 2 :]
        way = middle[:, None] - FLOOR
        cover = ((below - FLOOR) * way).sum(-1) / (way**2).sum(-1).clip(1)
        return {"material": material, "height": cover.clip(0, 1).sum(1)}

    def describe(self, states: State, actions: np.ndarray) -> tuple[str, str]:
        names = [[*COLORS][k] for k in states["paints"][0][states["there"][0]]]
        said = f"a room with {', '.join(names[:-1])} and {names[-1]} pillars"
        return f"{said}. {STYLES[states['style'][0]]}.", said


WORLD = Room
