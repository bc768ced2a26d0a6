"""Figures for what the report only shows; each has a --help of its own.

    python evaluate.py prompts      # do clips show what their prompts say?
    python evaluate.py tasks        # is what is known kept, and carried on?
    python evaluate.py language     # are captions and expanded prompts true?
    python evaluate.py worlds       # does a simulated world go on as it must?
    python evaluate.py framing      # what does it cost to train on square crops?
    python evaluate.py scaling      # what does more training bring?
    python evaluate.py cost         # what do the presets cost to train?
    python evaluate.py bench        # how fast are training and the VAE?
"""

import json
from argparse import RawDescriptionHelpFormatter as AsIs

from measure import bench, framing, language, prompts, scaling, tasks, worlds
from sample import Parser

COMMANDS = {
    "prompts": (prompts.main, "run ones=480 twos=120 seed=0 steps guidance no-expand"),
    "tasks": (tasks.main, "run clips=40 minutes=10 seed=0 steps"),
    "language": (language.main, "run clips=1000 seed=0 against ones=240 twos=120"),
    "worlds": (worlds.main, "run clips=64 steps"),
    "framing": (framing.main, "run against clips=240 seed=0"),
    "scaling": (scaling.main, "run steps clips=160 out train"),
    "cost": (scaling.costs, ""),
    "bench": (bench.main, "repeats=7"),
}
FLAGS = {
    "run": {"help": "a folder of train.py (default: the newest; scaling: a new one)"},
    "steps": {"type": int, "help": "of sampling; scaling: of the longest training"},
    "guidance": {"type": float, "help": "1: none (default: as sample.py)"},
    "no-expand": {"action": "store_true", "help": "take the short prompts as they are"},
    "against": {"metavar": "RUN", "help": "an equal run to compare with: see above"},
    "out": {"default": "out/scaling"}, "train": {"nargs": "*", "help": "its flags, after --"},
}


def main() -> None:
    parser = Parser("evaluate.py", description=__doc__, formatter_class=AsIs)
    commands = parser.add_subparsers(required=True, dest="command", metavar="|".join(COMMANDS))
    for name, (measure, flags) in COMMANDS.items():
        about = measure.__doc__ or measure.__globals__["__doc__"]  # of its file
        say = commands.add_parser(name, description=about, formatter_class=AsIs).add_argument
        for flag, _, value in (flag.partition("=") for flag in flags.split()):
            number = {"type": int, "default": int(value or 0), "help": f"default: {value}"}
            say("--" * (flag != "train") + flag, **FLAGS.get(flag, number))
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (least := name not in ("seed", "twos", "no_expand")):
            parser.error(f"--{name} {value}: at least {least:d}")
    try:
        if made := COMMANDS[args.command][0](args):
            path, figures, page = made[0] / args.command, *made[1:]
            path.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
            if page:
                page.save(path.with_suffix(".png"))
            print(f"wrote {path}.json{' and .png' * bool(page)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
