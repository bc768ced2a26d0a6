"""Text as token ids: known words are one token each, everything else is spelled in bytes.

The problem. A network reads numbers from a fixed list, and people write anything: misspellings,
umlauts, emoji. A list of words has no number for a word it does not know. Bytes can spell every
text, but make a caption five times as long, and attention pays for each token.

The idea. Both. Cut the text into pieces, each a word with the space in front of it (as GPT-2 does
before its byte pair encoding, Radford et al. 2019). A known piece is one token; any other is its
UTF-8 bytes, a token each. So common captions are short, and no text is impossible:

    "a 7 moving left"   ->   " a"  " 7"  " moving"  " left"                     4 tokens
    "a 7 moving löft"   ->   " a"  " 7"  " moving"  20 6c c3 b6 66 74           9 tokens

GPT-2 learns which bytes to merge; we take the frequent words of the captions whole. That is enough
for captions of a few hundred different words, and wasteful for free prose.

    id        0 ... 255     256         257     258 ...
    meaning   a byte        NOTHING     END     a known piece

NOTHING stands for "no caption": what the model is given when it may draw anything, and what
classifier-free guidance compares with. END ends a text that is being written.

Run `python text.py` for a picture of captions cut into tokens; and, with a trained run,

    python text.py --caption clip.gif               # say what a clip shows
    python text.py --expand "a 7 moving left"       # say more
"""

import re
import sys
from collections import Counter

from PIL import Image, ImageDraw

NOTHING, END, SPECIALS = 256, 257, 258

# A word or a sign, either with at most one space in front, or a single blank. Every character is
# one of the three, so the pieces joined together are the text again.
PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")


def pieces(text: str) -> list[str]:
    """Cut a text. A space is put before it: its first word is the same piece as anywhere else."""
    return PIECE.findall(" " + text)


def spell(piece: str) -> bytes:
    """UTF-8. Half a surrogate pair (of a broken file name, say) is no character: it becomes "?"."""
    return piece.encode("utf-8", "replace")


class Tokenizer:
    """`words`, the known pieces in the order of their ids, is all there is to save."""

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.size = SPECIALS + len(self.words)  # how many different ids there are
        self.id_of = {word: SPECIALS + k for k, word in enumerate(self.words)}

    @classmethod
    def from_captions(cls, captions: list[str], size: int) -> "Tokenizer":
        """Know the most frequent pieces of these captions, as many as make `size` ids in all."""
        if size < SPECIALS:
            raise ValueError(f"a vocabulary of {size} ids is too small: bytes take {SPECIALS}")
        counts = Counter(piece for caption in captions for piece in pieces(caption))
        words = [word for word in counts if len(spell(word)) > 1]  # a single byte has an id
        words.sort(key=lambda word: (-counts[word], word))  # ties by alphabet: the same every time
        return cls(words[: size - SPECIALS])

    def encode(self, text: str) -> list[int]:
        """Text -> ids. No text is [NOTHING]."""
        ids = []
        for piece in pieces(text) if text else []:
            known = self.id_of.get(piece)
            ids.extend(spell(piece) if known is None else [known])
        return ids or [NOTHING]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. NOTHING and END are skipped; a character cut short becomes U+FFFD."""
        spelled = b"".join(self.spelling(int(i)) for i in ids)
        return spelled.decode("utf-8", "replace").removeprefix(" ")  # the space that `pieces` put

    def spelling(self, i: int) -> bytes:
        """The bytes of one id; none for NOTHING and END."""
        if i in (NOTHING, END):
            return b""
        return bytes([i]) if i < NOTHING else spell(self.words[i - SPECIALS])


# --------------------------------------------------------------------------------- command line


def command(argv: list[str]) -> None:
    """What the language model writes (language.py). It knows this file, and this function alone
    knows it: so it is imported here."""
    import prompting
    import sample
    import weights

    parser = sample.Parser(prog="text.py", description="Captions of clips and of short prompts.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--caption", metavar="CLIP", help="caption this clip or image")
    task.add_argument("--expand", metavar="PROMPT", help="make a descriptive caption of this")
    parser.add_argument("--run", help="a folder that train.py wrote (default: the newest)")
    parser.add_argument("--frames", type=int, help="with --expand: of the clip (default: longest)")
    parser.add_argument("--seed", type=int, default=0, help="with --expand: what chance adds")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0 or args.frames is not None and args.frames < 1:
            raise ValueError("--seed is 0 or more, --frames 1 or more")
        folder = args.run or weights.newest_run(name="text")
        language = prompting.load_language(folder, "cpu")
        world = language.world
        if args.caption:
            vae = prompting.load_vae(folder, "cpu")
            clip, done = read_for_captioner(args.caption, vae.config, language)
            print(done, file=sys.stderr)
            latent = vae.encode(prompting.to_float(clip[None]))  # [1, Z, t, h, w]
            print(language.caption(list(latent))[0])
        else:
            if "digit" not in world:
                raise ValueError(f"{folder} learned from own clips: it captions, and nothing else")
            if not args.expand.strip():
                raise ValueError("--expand: an empty prompt leaves nothing to expand")
            if (count := len(language.tokenizer.encode(args.expand))) > sample.MOST_WORDS:
                raise ValueError(f"the prompt is {count} tokens long: at most {sample.MOST_WORDS}")
            size = (args.frames or max(world["durations"]), *world["shapes"][0])
            print(language.expand([args.expand], size, [args.seed])[0])
    except (ValueError, OSError) as error:
        parser.error(str(error))


def read_for_captioner(path: str, vae, language):
    """A clip [C, T, H, W] of the captioner's world, and what was done to the file: its first
    frames, if it is longer than those trained on, and smaller, if it is larger."""
    from clips import read_clip

    sides = vae.space_factor * language.model.config.patch
    most = max(language.world["durations"])
    clip, done = read_clip(path, vae.colors, sides, most_frames=most)
    if max(clip.shape[2:]) > max(map(max, language.world["shapes"])):
        ratio = clip.shape[2] / clip.shape[3]
        ways = {max(h / w / ratio, ratio * w / h): (h, w) for h, w in language.world["shapes"]}
        clip, done = read_clip(path, vae.colors, sides, ways[min(ways)], most_frames=most)
    whole = 1 + (clip.shape[1] - 1) // vae.time_factor * vae.time_factor  # frames that fill latents
    return clip[:, :whole], f"{done}, of which the first {whole} are looked at"


# --------------------------------------------------------------------------------------------- demo


def main():
    known = ["a 7 moving left", "a 3 moving up and an 8 moving right", "an 8 moving down"]
    tokenizer = Tokenizer.from_captions(known, size=SPECIALS + 12)
    print(f"{tokenizer.size} ids: 256 bytes, NOTHING, END, and {tokenizer.words}")
    texts = known + ["a 7 moving löft", "two  spaces\n", "🙂", ""]
    sheet = Image.new("RGB", (700, 24 * len(texts) + 10), (40, 40, 40))
    pen = ImageDraw.Draw(sheet)
    for k, text in enumerate(texts):
        ids = tokenizer.encode(text)
        print(f"{text!r} -> {ids} -> {tokenizer.decode(ids)!r}")
        x, y = 10, 10 + 24 * k
        for i in ids:
            if i < NOTHING:
                label, colour = f"{i:02x}", (90, 90, 90)
            elif i < SPECIALS:
                label, colour = "NOTHING", (170, 60, 60)
            else:
                label, colour = tokenizer.words[i - SPECIALS], (40, 110, 70)
            width = 8 + int(pen.textlength(label))
            pen.rectangle((x, y, x + width - 2, y + 18), fill=colour)
            pen.text((x + 3, y + 3), label)
            x += width
    sheet.save("text_demo.png")
    print("wrote text_demo.png")


if __name__ == "__main__":
    command(sys.argv[1:]) if sys.argv[1:] else main()
