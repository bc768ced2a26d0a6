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
    "prompts": (prompts.main, "run= ones=480 twos=120 steps=0"),
    "tasks": (tasks.main, "run= clips=40 minutes=10 steps=0"),
    "language": (language.main, "run= clips=1000 against= ones=240 twos=120"),
    "worlds": (worlds.main, "run= clips=64 steps=0"),
    "framing": (framing.main, "run= against= clips=240"),
    "scaling": (scaling.main, "run= clips=160 out=out/scaling"),
    "cost": (scaling.costs, ""),
    "bench": (bench.main, "repeats=7"),
}
HELP = {"run": "a folder of train.py (default: the newest)", "against": "an equal run: see above",
        "steps": "of sampling (default: those of sample.py)"}  # fmt: skip


def main() -> None:
    parser = Parser("evaluate.py", description=__doc__, formatter_class=AsIs)
    commands = parser.add_subparsers(required=True, dest="command", metavar="|".join(COMMANDS))
    for name, (measure, flags) in COMMANDS.items():
        about = measure.__doc__ or measure.__globals__["__doc__"]  # of its file
        say = commands.add_parser(name, description=about, formatter_class=AsIs).add_argument
        for flag, value in (flag.split("=") for flag in flags.split()):
            kind = int if value.isdigit() else str
            said = HELP.get(flag, f"default: {value}")
            say("--" + flag, type=kind, default=kind(value), help=said)
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (least := name not in ("twos", "steps")):
            parser.error(f"--{name} {value}: at least {least:d}")
    try:
        if made := COMMANDS[args.command][0](args):
            folder = made[0] if made[0].is_dir() else made[0].parent  # of one of its checkpoints
            path, figures, page = folder / args.command, *made[1:]
            path.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
            if page:
                page.save(path.with_suffix(".png"))
            print(f"wrote {path}.json{' and .png' * bool(page)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
