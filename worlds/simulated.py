"""Simulated worlds: what happens next is a function of the state and of what is done.

The problem. To say whether a network has learned how a world works, one must know how it works:
what happens behind a wall, or what another key would have done. Of real videos nobody knows.

The idea. A world here is six functions over states of n clips at once (a dict of arrays [n, ...]):

    begin(u)  u [n, draws] in [0, 1) -> state          where a clip starts
    act(state, u)  u [n, 4] -> actions [n]             who plays: numbers in `actions`, from 1
    step(state, actions) -> state                      what happens: no chance in it
    render(state) -> pixels [n, C, H, W] uint8         what is seen
    read(pixels [C, T, H, W]) -> state, [T, ...]       what can be seen of it, in pixels alone
    describe(states, actions [T]) -> caption, brief    of one clip, whose states are [T, ...]

`read` finds the state again in our pixels, or in what a network makes, by the names that it has
there. Clip i is then a pure function of (seed, i), as `data.World` asks, and what it would have
been under other actions is known, too.
"""

import numpy as np

from data import Clip, World, WorldConfig, hashed_uniform

DRAWS = 64  # random numbers that decide where a clip starts; then there are 4 for each frame

State = dict[str, np.ndarray]


class Simulated(World):
    size = (32, 32)  # H, W

    def __init__(self, config: WorldConfig):
        super().__init__(config)
        self.shapes, self.image_shapes = (self.size,), ()

    def played(self, i, frames: int, actions=None, after: int = 1) -> tuple[State, np.ndarray]:
        """Clips i [n] from their start: states [frames, n, ...], actions [frames, n]. With actions
        [frames], those are done before each frame from `after` on."""
        u = hashed_uniform(self.config.seed, i, 2 + DRAWS + 4 * frames)[:, 2:]
        state, done = self.begin(u[:, :DRAWS]), np.zeros(len(u), int)
        states, done_by, u = [state], [done], u[:, DRAWS:].reshape(len(u), frames, 4)
        for t in range(1, frames):
            said = actions is not None and t >= after
            done = np.full(len(u), actions[t]) if said else self.act(state, u[:, t - 1])
            state = self.step(state | {"done": done}, done)
            states.append(state)
            done_by.append(done)
        return {k: np.stack([s[k] for s in states]) for k in states[0]}, np.stack(done_by)

    def clips(
        self, i, image=False, later=0, frames=None, pixels: bool = True, actions=None, after=1
    ) -> list[Clip]:
        """As the contract says; with actions [T] from the frame `after` on, if there are any."""
        i, T = np.asarray(i), self.sizes(i, image)[:, 0]
        T, later = (np.broadcast_to(x, len(i)) for x in (frames or T, later))
        states, done = self.played(i, int((later + T).max(initial=0)), actions, after)
        clips = []
        for k, (first, last) in enumerate(zip(later, later + T, strict=True)):
            own = {name: value[first:last, k] for name, value in states.items()}
            acts = done[first:last, k]
            name = f"{'image' if image else 'clip'} {i[k]} of seed {self.config.seed}"
            name += f", from frame {first}" * bool(first)
            seen = self.render(own).swapaxes(0, 1) if pixels else None  # [C, T, H, W]
            clips.append(Clip(name, *self.describe(own, acts), seen, acts, own))
        return clips

    @staticmethod
    def lasting(caption: str) -> str:
        """What there is can be seen, and who plays may change."""
        return caption.partition(":")[0]


def chosen(u: np.ndarray, among) -> np.ndarray:
    """One of `among` for each u in [0, 1)."""
    return np.asarray(among)[(np.asarray(u) * len(among)).astype(int)]
