"""A photograph with phrases and hand-drawn polygons as a user's own data: NASA's portrait of the
astronaut Eileen Collins, in the public domain, which scikit-image holds."""

import json
from pathlib import Path

import skimage.data
from PIL import Image

FILE = "astronaut.png"

SUIT = [
    *(112, 212, 122, 238, 150, 268, 190, 285, 240, 294, 285, 282, 303, 252, 305, 236),
    *(325, 246, 342, 265, 352, 300, 363, 350, 335, 365, 312, 385, 292, 415, 280, 450),
    *(278, 511, 190, 511, 172, 505, 135, 490, 108, 511, 52, 511, 28, 450, 20, 395),
    *(30, 330, 45, 280, 65, 248),
]
COLLAR = [
    *(115, 190, 122, 175, 140, 158, 165, 150, 185, 148, 186, 183, 250, 190, 256, 173),
    *(280, 190, 300, 220, 305, 240, 300, 262, 285, 282, 240, 294, 190, 285, 150, 268),
    *(122, 238),
]
HAIR = [
    *(155, 98, 153, 70, 165, 50, 192, 32, 225, 16, 260, 20, 285, 40, 301, 75, 298, 105),
    *(280, 126, 272, 120, 268, 90, 248, 84, 210, 78, 190, 74, 182, 95, 178, 118, 165, 108),
]
FACE = [
    *(190, 76, 210, 80, 248, 86, 268, 92, 271, 126, 262, 150, 250, 172, 225, 180),
    *(205, 175, 190, 155, 181, 130, 180, 100),
]
FLAG = [
    *(0, 0, 42, 0, 55, 60, 68, 110, 85, 165, 95, 215, 62, 250, 44, 280, 28, 330),
    *(20, 395, 26, 450, 42, 511, 0, 511),
]
SHUTTLE = [
    *(378, 230, 355, 222, 357, 207, 378, 180, 382, 110, 392, 76, 382, 90, 380, 55),
    *(388, 42, 397, 48, 398, 25, 410, 2, 424, 2, 435, 22, 437, 52, 443, 40, 453, 55),
    *(455, 205, 456, 230, 452, 262, 459, 268, 470, 276, 440, 282, 400, 290, 370, 282),
    *(372, 272, 367, 266, 375, 240),
]
TANK = [
    *(398, 25, 410, 2, 424, 2, 435, 22, 437, 60, 434, 190, 422, 175, 412, 176),
    *(411, 110, 406, 88, 398, 76),
]
HELMET = [
    *(278, 480, 282, 440, 295, 405, 320, 370, 350, 352, 385, 344, 425, 348, 460, 370),
    *(485, 410, 497, 455, 508, 470, 510, 505, 497, 511, 280, 511),
]
PATCH = [
    *(170, 349, 186, 353, 200, 364, 207, 382, 204, 403, 193, 417, 175, 422, 155, 419),
    *(140, 407, 134, 388, 138, 368, 152, 354),
]

# Name, phrases, polygons of each object; x, y in pixels of the 512 x 512 photograph.
OBJECTS: dict[str, tuple[tuple[str, ...], list[list[int]]]] = {
    "woman": (("the smiling woman", "an astronaut"), [SUIT, COLLAR, HAIR, FACE]),
    "suit": (("the orange suit", "what the woman wears"), [SUIT]),
    "hair": (("short brown hair",), [HAIR]),
    "face": (("the woman's face",), [FACE]),
    "flag": (("the flag on the left", "stars and stripes"), [FLAG]),
    "shuttle": (("the model of a space shuttle", "the rocket on the right"), [SHUTTLE]),
    "tank": (("the brown tank of the shuttle",), [TANK]),
    "helmet": (("the black helmet at the bottom right",), [HELMET]),
    "patch": (("the round blue patch on the suit",), [PATCH]),
}


def write_astronaut(root: Path, split: str = "train") -> None:
    """Writes the photograph and `<split>.jsonl`, a line an object, its name as id and category."""
    Image.fromarray(skimage.data.astronaut()).save(root / FILE)
    lines = [
        {"image": FILE, "id": name, "category": name, "phrase": list(phrases), "mask": polygons}
        for name, (phrases, polygons) in OBJECTS.items()
    ]
    (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
