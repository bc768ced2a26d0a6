"""Files of weights: read to continue, to sample, or to start another training from.

The problem. What training needs to go on is several times what sampling needs, and a .pt file is a
pickle, which other programs cannot read, or rightly refuse to.

The idea. Of each network (vae, text, dit) a run's folder holds one or both of

    dit.pt            all that training needs to go on (loop.py): weights, their moving average
                      (EMA), optimizers, step. `torch.load` with weights_only, so that nothing is
                      unpickled but tensors and plain values
    dit.safetensors   the EMA weights alone, a quarter of it, for everybody: a header of names,
                      types and shapes in JSON, then the numbers. `train.py --stage export` makes it

and all else that sampling needs (the network's configuration, the tokenizer's words, the world, the
flags) as plain values: in the .pt beside the weights; in the .safetensors as JSON, in its metadata
under "sora". Where both are there, the .pt is read: it may be newer.
"""

import json
import os
from pathlib import Path

import torch
from torch import nn

STAGES = ("vae", "text", "dit")
SUFFIXES = (".pt", ".safetensors")  # of two, the first is read


def find(folder: str | Path, name: str) -> Path:
    """The file of a network in a run's folder; its .pt, which is not there, if none is."""
    paths = [Path(folder, name + suffix) for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def newest_run(root: str = "out", name: str = "dit") -> Path:
    """The folder below `root` whose DiT was saved last."""
    found = [path for suffix in SUFFIXES for path in Path(root).glob(f"*/{name}{suffix}")]
    if not found:
        raise FileNotFoundError(
            f"no trained run below {root}/: python train.py --preset tiny makes one"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


# ------------------------------------------------------------------------------------------ reading


def package():
    """safetensors, for those who use it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("the package safetensors is missing: pip install safetensors") from None
    return safetensors


def read(path: str | Path, device: str | torch.device) -> dict:
    """All that a file of weights holds: {"ema": {name: tensor}}, and all else by name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {path}: train there first, or name another folder")
    safe = package() if Path(path).suffix == ".safetensors" else None
    try:
        if safe is None:
            saved = torch.load(path, map_location=device, weights_only=True)
            return saved | {"ema": saved["ema"]}
        with safe.safe_open(path, "pt", str(device)) as file:
            about = json.loads((file.metadata() or {}).get("sora", "{}"))
            return about | {"ema": {name: file.get_tensor(name) for name in file.keys()}}
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of ours ({type(error).__name__})") from None


def load_checkpoint(path: str | Path, device: str | torch.device) -> dict:
    """The same, of a file that says what network it is of."""
    saved = read(path, device)
    if "model" not in saved:
        raise ValueError(f"{path} is not a checkpoint of ours (it says not of what network)")
    return saved


def load_ema(path: Path, network: type, config: type, device: str | torch.device) -> tuple:
    """The EMA weights of one file of a run, in a network made for them; and all else in it."""
    saved = load_checkpoint(path, device)
    try:
        made = network(config(**saved["model"])).to(device).eval().requires_grad_(False)
        made.load_state_dict(saved["ema"])
    except (RuntimeError, TypeError):
        raise ValueError(f"{path} was made by another version of the code: train anew") from None
    return made, saved


def begin_with(model: nn.Module, start: dict) -> None:
    """Into a new network, the weights of what `read` gave, with its "path" added; {}: leave it.
    ValueError says what does not match."""
    if not start:
        return
    own, given, network = model.state_dict(), start["ema"], type(model).__name__
    wrong = [f"{name} is missing" for name in own.keys() - given.keys()]
    wrong += [f"{name} has no place here" for name in given.keys() - own.keys()]
    for name in own.keys() & given.keys():
        there, here = list(given[name].shape), list(own[name].shape)
        wrong += [f"{name} is {there} there and {here} here"] if there != here else []
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{start['path']} is not of this {network}: {min(wrong)}{more}")
    model.load_state_dict(given)


# ------------------------------------------------------------------------------------------ writing


def export(folder: Path) -> list[Path]:
    """Write a .safetensors beside each .pt of a run's folder."""
    found = [folder / f"{name}.pt" for name in STAGES if (folder / f"{name}.pt").is_file()]
    if not found:
        raise FileNotFoundError(f"nothing to export in {folder}: train there first")
    safe, written = package(), []
    for path in found:
        saved = load_checkpoint(path, "cpu")
        tensors = {name: x.contiguous() for name, x in saved["ema"].items()}
        about = {k: v for k, v in saved.items() if k not in ("ema", "weights", "optimizers")}
        written.append(path.with_suffix(".safetensors"))
        part = written[-1].with_suffix(".part")
        try:
            safe.torch.save_file(tensors, part, {"sora": json.dumps(about)})
        except (OSError, safe.SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise OSError(f"{written[-1]} could not be written: {error}") from None
        os.replace(part, written[-1])
    return written
