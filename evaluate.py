"""Figures for what the report only shows. Each of these has its own --help:

    python evaluate.py prompts      # do clips show what their prompts say?
    python evaluate.py tasks        # is what is known kept, and carried on?
    python evaluate.py language     # are captions and expanded prompts true?
    python evaluate.py scaling      # what does more training bring?
    python evaluate.py cost         # what do the presets cost to train?
    python evaluate.py bench        # how fast are training and the VAE?
"""

import sys
from argparse import RawDescriptionHelpFormatter

import sample
from measure import bench, language, prompts, scaling, tasks

LEAST = {"ones": 1, "twos": 0, "clips": 1, "minutes": 1, "steps": 1, "repeats": 1, "seed": 0}
FLAGS = {
    "run": {"help": "a folder that train.py wrote (default: the newest)"},
    "seed": {"type": int, "default": 0},
    "steps": {"type": int, "help": "of sampling (default: as sample.py); scaling: of the training"},
    "guidance": {"type": float, "help": "1: none (default: as sample.py)"},
    "no-expand": {"action": "store_true", "help": "take the short prompts as they are"},
    "ones": {"type": int, "help": "how many clips of one digit"},
    "twos": {"type": int, "help": "how many clips of two digits"},
    "clips": {"type": int, "help": "how many for each figure"},
    "minutes": {"type": int, "help": "how many clips of a minute"},
    "against": {"metavar": "RUN", "help": "an equal run with --captions written: do the clips of "
                "--run follow prompts better?"},
    "out": {"default": "out/scaling", "help": "a folder for runs and pictures"},
    "repeats": {"type": int, "help": "the median of so many is printed"},
}  # fmt: skip
COMMANDS = {
    "prompts": (prompts.main, "run ones=480 twos=120 seed steps guidance no-expand"),
    "tasks": (tasks.main, "run clips=40 minutes=10 seed steps"),
    "language": (language.main, "run clips=1000 against ones=240 twos=120 seed"),
    "scaling": (scaling.main, "run steps ones=160 out"),
    "cost": (scaling.costs, ""),
    "bench": (bench.main, "repeats=7"),
}


def main() -> None:
    parser = sample.Parser("evaluate.py", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="|".join(COMMANDS))
    for name, (measure, flags) in COMMANDS.items():
        about = measure.__doc__ or sys.modules[measure.__module__].__doc__
        command = commands.add_parser(name, description=about, formatter_class=RawDescriptionHelpFormatter)
        for flag, _, default in (flag.partition("=") for flag in flags.split()):
            how = {"type": int, "default": int(default)} if default else {}
            command.add_argument(f"--{flag}", **FLAGS[flag] | how)
        if name == "scaling":
            command.add_argument("train", nargs="*", help="flags of train.py, behind --")
    args = parser.parse_args()
    for name, least in LEAST.items():
        if (value := getattr(args, name, None)) is not None and value < least:
            parser.error(f"--{name} {value}: at least {least}")
    try:
        COMMANDS[args.command][0](args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
