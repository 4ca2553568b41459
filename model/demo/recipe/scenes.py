"""The little world of the demo model: what a scene is, and how people describe one.

A `Scene` is one choice of object, motion, floor and light.  `caption` puts it into words with some
variety of phrasing.  `is_held_out` decides, by a hash of (colour, shape, motion, floor colour),
which scenes never appear in training: about one combination in eight.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace

# sRGB colours.  Floors use muted relatives of the object colours.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.09),
    "green": (0.12, 0.66, 0.20),
    "blue": (0.10, 0.28, 0.90),
    "yellow": (0.97, 0.85, 0.10),
    "orange": (0.98, 0.48, 0.05),
    "purple": (0.50, 0.16, 0.74),
    "pink": (0.98, 0.48, 0.70),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.07),
    "cyan": (0.10, 0.82, 0.88),
}
FLOOR_COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.66, 0.25, 0.22),
    "green": (0.30, 0.55, 0.30),
    "blue": (0.26, 0.40, 0.66),
    "yellow": (0.80, 0.70, 0.33),
    "purple": (0.47, 0.33, 0.60),
    "brown": (0.50, 0.35, 0.24),
    "gray": (0.48, 0.49, 0.51),
    "white": (0.86, 0.86, 0.84),
}
SHAPES = ["ball", "cube", "cone", "cylinder", "ring", "pyramid", "diamond"]
MOTIONS = ["right", "left", "toward", "away", "bounce", "hop_right", "hop_left",
           "spin", "circle", "rise", "fall"]
TEXTURES = ["plain", "checkered", "tiled", "wooden", "striped"]
SKIES = ["day", "sunset", "night"]
SIZES = {"small": 0.48, "medium": 0.70, "big": 0.92}

SHAPE_WORDS = {
    "ball": ["ball", "ball", "ball", "sphere"],
    "cube": ["cube", "cube", "box"],
    "cone": ["cone"],
    "cylinder": ["cylinder"],
    "ring": ["ring", "ring", "donut"],
    "pyramid": ["pyramid"],
    "diamond": ["diamond"],
}
PATHS = {
    "right": ["from left to right", "from left to right", "to the right"],
    "left": ["from right to left", "from right to left", "to the left"],
    "toward": ["toward the camera", "towards the camera", "toward the viewer"],
    "away": ["away from the camera", "away from the camera", "away from the viewer"],
    "circle": ["in a circle", "around in a circle"],
}
# Verbs of the motions that are more than a path: (third person, -ing form, what follows).
ACTIONS = {
    "bounce": [("bounces", "bouncing", "up and down"), ("bounces", "bouncing", "in place"),
               ("jumps", "jumping", "up and down")],
    "hop_right": [("bounces", "bouncing", "from left to right"), ("hops", "hopping", "from left to right"),
                  ("hops", "hopping", "to the right")],
    "hop_left": [("bounces", "bouncing", "from right to left"), ("hops", "hopping", "from right to left"),
                 ("hops", "hopping", "to the left")],
    "spin": [("spins", "spinning", ""), ("spins", "spinning", "in place"), ("turns", "turning", "in place"),
             ("rotates", "rotating", "")],
    "rise": [("rises", "rising", ""), ("rises", "rising", "into the air"), ("floats", "floating", "up")],
    "fall": [("falls", "falling", ""), ("drops", "dropping", ""), ("falls", "falling", "down")],
}
PREPOSITIONS = {
    "bounce": ["on"], "spin": ["on"], "rise": ["over", "above"], "fall": ["onto", "on"],
    "hop_right": ["over", "on", "across"], "hop_left": ["over", "on", "across"],
    "right": ["over", "over", "on", "across"], "left": ["over", "over", "on", "across"],
    "toward": ["over", "on", "across"], "away": ["over", "on", "across"], "circle": ["on", "over"],
}
SKY_WORDS = {"day": ["", "", "", "", "on a sunny day", "under a blue sky"],
             "sunset": ["at sunset"], "night": ["at night"]}
# Words that mean nothing here.  They are mixed into a few captions, so that the model learns to
# look past what it does not know.
FILLERS = ("very nice happy shiny funny really please show video clip of with and some dog house "
           "car tree water fast slow little quickly slowly beautiful cinematic robot dragon music "
           "realistic quality best hello world my your three two one glowing table kitchen").split()


@dataclass(frozen=True)
class Scene:
    """One scene: words only.  `rolls` says whether a body that travels turns as it goes."""

    color: str
    shape: str
    motion: str
    size: str
    floor: str
    texture: str
    sky: str
    rolls: bool

    def attributes(self) -> dict[str, str]:
        """The facts that a checker can read back."""
        return {"color": self.color, "shape": self.shape, "motion": self.motion, "floor": self.floor,
                "texture": self.texture, "sky": self.sky, "size": self.size}


def is_held_out(scene: Scene) -> bool:
    """True for the one combination in eight that training never sees."""
    key = f"slalom-1:{scene.color}:{scene.shape}:{scene.motion}:{scene.floor}"
    if (scene.color, scene.shape, scene.motion, scene.floor) == ("red", "ball", "right", "green"):
        return True
    return zlib.crc32(key.encode()) % 8 == 0


def draw_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draws a scene from the training set, or from the held-out set."""
    while True:
        shape, motion = rng.choice(SHAPES), rng.choice(MOTIONS)
        can_roll = motion in PATHS and (shape == "ball" or (shape == "ring" and motion in ("right", "left")))
        scene = Scene(
            color=rng.choice(list(COLORS)), shape=shape, motion=motion,
            size=rng.choices(list(SIZES), (1, 3, 1))[0],
            floor=rng.choice(list(FLOOR_COLORS)),
            texture=rng.choices(TEXTURES, (3, 2, 2, 2, 2))[0],
            sky=rng.choices(SKIES, (5, 1, 1))[0],
            rolls=can_roll and rng.random() < 0.7)
        if is_held_out(scene) == held_out:
            return scene


MIRRORED = {"right": "left", "left": "right", "hop_right": "hop_left", "hop_left": "hop_right", "toward": "away",
            "away": "toward"}


def twin(scene: Scene, rng: random.Random) -> Scene:
    """A training scene whose captions have the same words in another order, where there is one: object and floor trade
    their colours, left and right trade places, or both.  Else another scene."""
    swapped = [scene]
    if scene.color != scene.floor and scene.color in FLOOR_COLORS and scene.floor in COLORS:
        swapped.append(replace(scene, color=scene.floor, floor=scene.color))
    if scene.motion in MIRRORED:
        swapped += [replace(one, motion=MIRRORED[scene.motion]) for one in swapped]
    allowed = [one for one in swapped[1:] if not is_held_out(one)]
    return rng.choice(allowed) if allowed else draw_scene(rng)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words


def _verb(rng: random.Random, scene: Scene) -> tuple[str, str, str]:
    """(third person, -ing form, path) of the scene's motion."""
    if scene.motion in ACTIONS:
        return rng.choice(ACTIONS[scene.motion])
    path = rng.choice(PATHS[scene.motion])
    if scene.rolls:
        verbs = [("rolls", "rolling"), ("rolls", "rolling"), ("moves", "moving")]
    elif scene.shape == "ball":
        verbs = [("slides", "sliding"), ("glides", "gliding")]
    else:
        verbs = [("slides", "sliding"), ("glides", "gliding"), ("moves", "moving")]
    third, ing = rng.choice(verbs)
    return third, ing, path


def _floor(rng: random.Random, scene: Scene) -> str:
    """Noun phrase of the floor, with its article."""
    color, texture = scene.floor, scene.texture
    if texture == "plain":
        return _article(f"{color} floor")
    if texture == "wooden" and color == "brown" and rng.random() < 0.7:
        return "a wooden floor"
    if rng.random() < 0.25:
        return _article(f"{texture} {color} floor")
    return _article(f"{color} {texture} floor")


def caption(scene: Scene, rng: random.Random) -> str:
    """A full caption: every attribute of the scene is said."""
    size = {"small": "small ", "medium": "", "big": rng.choice(["big ", "large "])}[scene.size]
    thing = _article(f"{size}{scene.color} {rng.choice(SHAPE_WORDS[scene.shape])}")
    third, ing, path = _verb(rng, scene)
    verb = ing if rng.random() < 0.15 else third
    where = f"{rng.choice(PREPOSITIONS[scene.motion])} {_floor(rng, scene)}"
    sky = rng.choice(SKY_WORDS[scene.sky])
    parts = [thing, verb, path, where, sky]
    if rng.random() < 0.08:
        parts = [where + ",", thing, verb, path, sky]
    return " ".join(part for part in parts if part)


def partial_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that leaves something open, as people do."""
    thing = rng.choice(SHAPE_WORDS[scene.shape])
    if rng.random() < 0.8:
        thing = f"{scene.color} {thing}"
    parts = [_article(thing)]
    if rng.random() < 0.8:
        third, _, path = _verb(rng, scene)
        parts += [third, path]
    if rng.random() < 0.4:
        parts.append(f"{rng.choice(PREPOSITIONS[scene.motion])} {_floor(rng, scene)}")
    return " ".join(part for part in parts if part)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as training sees it: mostly full, sometimes partial, capitalised or with strange words."""
    text = partial_caption(scene, rng) if rng.random() < 0.08 else caption(scene, rng)
    if rng.random() < 0.08:
        words = text.split()
        for _ in range(rng.randint(1, 3)):
            strange = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6)))
            words.insert(rng.randrange(len(words) + 1), rng.choice(FILLERS + [strange]))
        text = " ".join(words)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text
