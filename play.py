"""Play: walk into a trained world, live in a browser, beside the real one.

The problem. A clip that a model made can be admired, and is soon forgotten. A world model has
learned a world if one can act in it.

The idea. A key is an action in two worlds. The real one computes what happens. The model makes one
more frame after those that it made before, in a few steps of denoising:

    key -> action -> world.step -> world.render                                  -> the real one
                  -> past latents, a little noisy | noise -> DiT -> VAE decoder  -> the model's

The past stays in latents and the decoder goes on from its cache, so a frame costs one small window,
whatever was played before. Worlds without actions are watched: the prompt says what goes on.

The server is Python's own and listens on 127.0.0.1 alone. Run `python play.py --run out/game`, or
with --bench to see how fast it is.
"""

import argparse
import base64
import json
import sys
import tempfile
import threading
import time
import webbrowser
from collections import Counter, deque
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np

import data
import prompting
from data import HERE, enlarge, sheet
from prompting import Run, extend, new, settings
from sample import Parser
from worlds.media import write_gif

MOST = 8  # sessions at once: the one that nobody has played for longest ends
KEPT = 600  # frames for a recording
FOREVER = 5000  # frames of a clip; then the next one goes on from its end

load = cache(prompting.load_run)  # each run once


class Game:
    """One player's two worlds. The model's is a clip with a known start that goes on and on, of
    which an action is said just before its frame is made."""

    def __init__(self, run: Run, number: int = 0, prompt: str = ""):
        self.run, self.world, self.number = run, data.unseen(run.world), number
        self.shown, self.errors = deque(maxlen=KEPT), []
        self.lock, self.used = threading.Lock(), time.time()
        self.size = run.world["shapes"][0]
        if not self.world.actions:
            some = self.world.prompts(12)
            self.prompt = prompt or some[number % len(some)][0]
            return self.begin(np.zeros((run.vae.config.colors, 0, *self.size), np.uint8), [])
        (clip,) = self.world.clips([number], frames=run.window)
        self.prompt = prompt or clip.caption
        self.state = {name: value[-1:] for name, value in clip.facts.items()}
        self.real = deque(zip(clip.pixels.swapaxes(0, 1), clip.actions, strict=True),
                          maxlen=clip.pixels.shape[1])  # fmt: skip
        self.resync()

    def resync(self) -> None:
        """Give the model the truth: from here on, the past is the real one."""
        frames, actions = zip(*self.real, strict=True)
        self.begin(np.stack(frames, axis=1), actions)

    def begin(self, known: np.ndarray, actions) -> None:
        """The model goes on from known frames [C, k, H, W], if there are any."""
        run, k = self.run, known.shape[1]
        self.actions, self.at = np.zeros(k + FOREVER, int), k
        self.actions[:k] = actions
        if k:
            said = run.lasting(self.prompt)
            task = replace(extend(known, FOREVER, said), actions=self.actions)
        else:  # a caption says how long a clip is, and none is that long
            short = new(run, (max(run.world["durations"]), *self.size), self.prompt)
            self.prompt = prompting.expand(run, [short], [self.number])[0].prompt
            task = new(run, (FOREVER, *self.size), self.prompt)
        self.how = getattr(self, "how", settings(run, task))
        self.how.past = run.window - 1 if self.world.actions else None  # a frame an action
        chunks = prompting.complete(run, [task], [self.number], self.how)
        self.made = islice((x for chunk in chunks for x in chunk[0].swapaxes(0, 1)), k, None)

    def step(self, action: int) -> dict:
        """Both worlds a frame on: "model" and "real" [C, H, W], and of all that can be read in the
        model's frame the share that is wrong."""
        if self.at == len(self.actions):
            last = list(self.shown)[-max(self.run.world["durations"]) :]
            self.begin(np.stack([x[0] for x in last], axis=1), self.actions[-len(last) :])
        self.used, self.actions[self.at] = time.time(), action
        self.at += 1
        made = next(self.made)
        if not self.world.actions:
            self.shown.append((made,))
            return {"model": made}
        self.state = self.world.step(self.state, np.array([action]))
        real = self.world.render(self.state)[0]
        self.real.append((real, action))
        read = [self.world.read(x[:, None]) for x in (made, real)]
        wrong = [np.mean(np.abs(read[0][name].astype(float) - value) > 0.5)
                 for name, value in read[1].items()]  # fmt: skip
        self.errors.append(float(np.mean(wrong)))
        self.shown.append((made, real))
        return {"model": made, "real": real, "error": self.errors[-1]}

    def recording(self) -> bytes:
        """What was played, both worlds side by side, as a GIF."""
        if not self.shown:
            raise ValueError("nothing was played yet")
        titles = ["the model", "the real one"][: len(self.shown[0])]
        pages = [
            sheet([x[:, None] for x in frames], titles, columns=2, scale=4) for frames in self.shown
        ]
        with tempfile.TemporaryDirectory() as folder:
            write_gif(path := Path(folder, "play.gif"), pages, self.run.world["fps"])
            return path.read_bytes()


# --------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, runs: list[str]):
        super().__init__(("127.0.0.1", port), Handler)
        self.runs, self.games, self.lock = runs, {}, threading.Lock()

    def begin(self, asked: dict) -> dict:
        name, number = asked.get("run", self.runs[0]), asked.get("number", 0)
        if name not in self.runs or not isinstance(number, int) or not 0 <= number < 10**9:
            raise ValueError("a new world needs a run of this server, and a number")
        with self.lock:
            game = Game(load(name), number, str(asked.get("prompt", ""))[:500])
            self.games = dict(sorted(self.games.items(), key=lambda x: x[1].used)[1 - MOST :])
            self.games[name := uuid4().hex] = game
        said = {"session": name, "actions": game.world.actions, "prompt": game.prompt}
        return said | {"steps": game.how.steps, "noise": game.how.noise}

    def game(self, asked: dict) -> Game:
        if (game := self.games.get(asked.get("session"))) is None:
            raise ValueError("this session has ended, or never was: begin a new one")
        return game

    def act(self, asked: dict) -> dict:
        game, action = self.game(asked), asked.get("action", 1)
        steps, noise = asked.get("steps", game.how.steps), asked.get("noise", game.how.noise)
        if not isinstance(action, int) or not 1 <= action <= max(1, len(game.world.actions)):
            raise ValueError(f"action {action}: from 1 to {len(game.world.actions)}")
        if not isinstance(steps, int) or not 1 <= steps <= 100:
            raise ValueError(f"steps {steps}: from 1 to 100")
        if not isinstance(noise, int | float) or not 0 <= noise <= 0.9:
            raise ValueError(f"noise {noise}: from 0 to 0.9")
        with game.lock:
            if asked.get("resync") and game.world.actions:
                game.resync()
            game.how.steps, game.how.noise = steps, noise
            made = game.step(action)
        return {name: x if isinstance(x, float) else as_pixels(x) for name, x in made.items()}

    def end(self, asked: dict) -> dict:
        return {"ended": self.games.pop(asked.get("session"), None) is not None}


def as_pixels(frame: np.ndarray) -> dict:
    """[C, H, W] -> what a canvas takes."""
    rgb = enlarge(frame[:, None], scale=1)[0]  # [H, W, 3]
    text = base64.b64encode(rgb.tobytes()).decode()
    return {"height": len(rgb), "width": rgb.shape[1], "rgb": text}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(self.get)

    def do_POST(self) -> None:
        self.reply(self.post)

    def reply(self, answer) -> None:
        """Another site's page must not drive this server, under whatever name it found it."""
        mine = [f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")]
        origins = (None, *(f"http://{x}" for x in mine))
        try:
            if self.headers.get("Host") in mine and self.headers.get("Origin") in origins:
                status, kind, body = answer()
            else:
                body = b"only pages of this machine may play here\n"
                status, kind = 403, "text/plain"
        except (ValueError, TypeError, OSError) as error:
            status, kind, body = 400, "text/plain", f"{error}\n".encode()
        self.close_connection |= status != 200  # not all of the request may have been read
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def get(self) -> tuple[int, str, bytes]:
        path, _, session = self.path.partition("?session=")
        if path == "/":
            page = (HERE / "assets" / "play.html").read_bytes()
            page = page.replace(b"RUNS", json.dumps(self.server.runs).encode())
            return 200, "text/html; charset=utf-8", page
        if path == "/play.gif":
            game = self.server.game({"session": session})
            with game.lock:
                return 200, "image/gif", game.recording()
        return 404, "text/plain", b"there is only one page here: /\n"

    def post(self) -> tuple[int, str, bytes]:
        length = int(self.headers.get("Content-Length", ""))
        if not 0 <= length <= 4096:
            raise ValueError("a request has at most 4,096 bytes")
        asked = json.loads(self.rfile.read(length) or b"{}")
        if not isinstance(asked, dict):
            raise ValueError("a request is a JSON object")
        does = {"/new": self.server.begin, "/step": self.server.act, "/end": self.server.end}
        if self.path not in does:
            raise ValueError("there are /new, /step and /end")
        return 200, "application/json", json.dumps(does[self.path](asked)).encode()

    def log_message(self, *_) -> None:
        pass


# ------------------------------------------------------------------------------------- command line


def bench(run: Run, frames: int, how: dict) -> str:
    """Play without a page: frames a second, where the time goes, and whether it goes wrong."""
    game, spent = Game(run), Counter()  # seconds
    for name, part in (("transformer", run.dit), ("VAE decoder", run.vae.decoder)):
        part.register_forward_pre_hook(lambda *_, k=name: spent.update({k: -time.perf_counter()}))
        part.register_forward_hook(lambda *_, k=name: spent.update({k: time.perf_counter()}))
    keys = np.random.default_rng(0).integers(1, len(game.world.actions) + 1, frames)
    keys = np.where(np.arange(frames) // 100 % 2, keys, 1).tolist()  # every other 100 frames: still
    vars(game.how).update(how)
    for key in keys[:20]:
        game.step(key)
    spent.clear()
    begun = time.perf_counter()
    for key in keys:
        game.step(key)
    seconds = time.perf_counter() - begun
    shares = ", ".join(f"{name} {x / seconds:.0%}" for name, x in spent.items())
    return (
        f"{frames / seconds:.1f} frames a second: {shares}; wrong at first "
        f"{np.mean(game.errors[:20]):.1%}, at the end {np.mean(game.errors[-20:]):.1%}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser("play.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    about = "a folder of train.py (default: the newest below out/, or what ships)"
    parser.add_argument("--run", help=about)
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--no-open", action="store_true", help="open no browser")
    parser.add_argument("--bench", action="store_true", help="play without a page, and time it")
    parser.add_argument("--frames", type=int, default=200, help="of --bench")
    parser.add_argument("--steps", type=int, help="of denoising, of --bench")
    args = parser.parse_args(argv)
    try:
        first = Path(args.run or prompting.newest_run("game"))
        run = load(str(first))
        if args.bench:
            if not run.world["actions"]:
                raise ValueError(f"--bench: in {first} there is nothing to do, only to watch")
            how = {"steps": args.steps} if args.steps else {}
            return print(bench(run, max(1, args.frames), how)) or 0
        others = sorted(str(x.parent) for x in first.parent.glob("*/dit.pt") if x.parent != first)
        server = Server(args.port, [str(first), *others])
    except (OSError, ValueError, OverflowError) as error:
        print(f"play.py: {error}", file=sys.stderr)
        return 2
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"{address} plays {first}; Ctrl-C stops", flush=True)
    if not args.no_open:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
