"""Toy paintings: a built-in, seeded, procedural dataset of small impressionist landscapes.

Quickstarts, tests and controlled experiments need images without a download, the same ones on every run. These have
common structure that a small model learns in minutes (sky above ground, haze, one light, reflections) and variety that
a collapsed generator cannot fake (palettes, clouds, ridges, fields, water, trees). Everything random is sampled in
relative units (x to the right, y downwards, colours: all in [0, 1]) before rasterisation, so an index shows the same
scene, stroke by stroke, at every sample size.
"""

from dataclasses import dataclass

import numpy as np


def _colours(*rows: str) -> np.ndarray:
    """Turn rows of hexadecimal colours into an array (rows, colours, 3) in [0, 1]."""
    return np.array([[list(bytes.fromhex(colour)) for colour in row.split()] for row in rows]) / 255


TOY_PAINTINGS_COUNT = 4000
# By row: dawn, noon, dusk, overcast, night, golden hour, emerald morning.
# By column: sky top, sky middle, horizon, sun or moon, cloud light, cloud shade, ambient light on the land.
PALETTES = _colours(
    "7394d1 deb8cc ffcc99 fff0bd ffd6c7 a38fc2 f2d6db",
    "296bd6 6badf0 d1ebf5 fffad6 fffcf5 a8bfe0 fffff0",
    "453380 d66170 ffa847 ffdb75 ff8f66 73427a cc99a8",
    "758ca8 a8bac9 e0e0d1 faf7e0 ebebeb 7587a3 ccd4d6",
    "0a1245 1a3380 4c75a8 fff5bd 5770ad 17245c 5766a3",
    "5ca3cc f0d68a ffb852 fff7c7 ffeba8 c28f80 ffd69e",
    "1a6b8a 7ac2b8 f7e6a8 fff7d1 f0f2d6 5794a3 dbebd1",
)
OVERCAST, NIGHT, LOW_SUN = 3, 4, (0, 2, 5)
# By row: poppy meadow, wheat, lavender, snow, autumn heath. By column: far, near, furrow, flowers.
FIELDS = _colours(
    "99b25c 47802e 6b9938 f21f14",
    "ebcc6b d69e33 ad802e eb331a",
    "a88ac7 7a52b2 6b853d d6b2fa",
    "e6ebf7 ccdbf5 9eb8eb fff7eb",
    "cc8f5c a35733 756629 ffb233",
)
HILLS, LEAVES = _colours("5c804c 4c7094 755c8f 426b66", "38662e 295742 a86b1f d18594")
STRAW, PATH, STAR, RED = _colours("e0ad4c e6cca3 fff2b2 ff6b33")[0]
SKY, HILL, GROUND, THING = range(4)  # depth codes, from far to near
WAVES, WAVE_WEIGHTS = np.array([0.6, 1.4, 3.1, 6.3]), np.array([0.5, 0.3, 0.14, 0.06])  # of a ridge, per width
BROAD, FINE = (20, 0.16, 0.085), (42, 0.08, 0.027)  # strokes per side, their length and width


@dataclass(frozen=True)
class _Scene:
    """The painted scene, independent of the sample size."""

    night: bool
    palette: np.ndarray  # (7, 3), by column of PALETTES
    sun: np.ndarray  # (6,): x, y, radius (0 when hidden), colour of the disc
    cloudiness: float
    grid: np.ndarray  # (32, 32): lattice of the smooth noise
    horizon: float
    hills: np.ndarray  # (1 to 3, 9), far to near: height, 1 if peaked, phases of the four waves, colour
    water: bool  # instead of the field
    field: np.ndarray  # (4, 3), by column of FIELDS
    ways: np.ndarray  # (3,): x where furrows and path meet the horizon, density of furrows, opacity of the path
    flowers: float  # share of the strokes on dry ground
    things: np.ndarray  # (count, 8), far to near: x, base y, half width, height, centre of the crown, colour
    wind: float  # general direction of the sky's strokes, radians


def _compose(rng: np.random.Generator) -> _Scene:
    """Sample everything that distinguishes one painting from another, except the positions of the strokes."""
    kind = int(rng.choice(7, p=[0.16, 0.2, 0.17, 0.1, 0.13, 0.12, 0.12]))
    low, shown = kind in LOW_SUN, rng.random() > (0.7 if kind == OVERCAST else 0.1)
    palette = PALETTES[kind] + (PALETTES[rng.integers(7)] - PALETTES[kind]) * rng.uniform(0, 0.25)
    palette = (palette + rng.normal(0, 0.025, (7, 3))).clip(0, 1)
    horizon, water = rng.uniform(0.46, 0.7), bool(rng.random() < 0.45)
    place = rng.uniform(0.12, 0.88), horizon * (rng.uniform(0.4, 0.85) if low else rng.uniform(0.15, 0.45))
    disc = palette[3] + (RED - palette[3]) * rng.uniform() * low
    layers, peaks = int(rng.integers(1, 4)), rng.random() < 0.5
    heights = horizon * (rng.uniform(0.5, 0.95) if peaks else rng.uniform(0.15, 0.4)) * 0.55 ** np.arange(layers)
    hill_colours = HILLS[rng.integers(0, 4, layers)] + rng.normal(0, 0.04, (layers, 3))
    # A row of poplars, round trees, haystacks (never on water) or nothing; near ones are larger and stand lower.
    poplars, stacks = rng.random() < 0.4, rng.random() < 0.25 and not water
    count = int(rng.integers(2, 5 if stacks else 8)) * int(rng.random() < 0.75)
    near = np.sort(rng.random(count)) * (not water)
    x = rng.uniform(0, 0.6) + np.arange(count) * rng.uniform(0.05, 0.12) if poplars else rng.random(count)
    shape = np.array([0.075, 0.13, 0] if stacks else [0.027, 0.34, 0.54] if poplars else [0.085, 0.17, 0.56])
    sizes = shape * np.column_stack([rng.uniform(0.75, 1.2, count) * (0.7 + 0.8 * near)] * 2 + [np.ones(count)])
    colours = (STRAW if stacks else LEAVES[rng.choice(4, p=[0.4, 0.3, 0.18, 0.12])]) + rng.normal(0, 0.03, (count, 3))
    return _Scene(
        night=kind == NIGHT,
        palette=palette,
        sun=np.array([*place, shown * rng.uniform(0.04, 0.075), *disc]),
        cloudiness=rng.choice([0.15, 0.38, 0.5, 0.62]),
        grid=rng.random((32, 32)),
        horizon=horizon,
        hills=np.column_stack([heights, peaks * (np.arange(layers) == 0), rng.random((layers, 4)), hill_colours]),
        water=water,
        field=FIELDS[rng.choice(5, p=[0.4, 0.22, 0.16, 0.1, 0.12])] + rng.normal(0, 0.03, (4, 3)),
        ways=np.array([rng.uniform(0.1, 0.9), rng.uniform(10, 24) * (rng.random() < 0.6), 0.8 * (rng.random() < 0.3)]),
        flowers=rng.uniform(0.02, 0.25) * (rng.random() < 0.6),
        wind=rng.normal(0, 0.15),
        things=np.column_stack([x, horizon + 0.01 + 0.35 * (1 - horizon) * near, sizes, colours]),
    )


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Blend colours, (count, 3) or (3,), from `first` where the (count,) weight is 0 to `second` where it is 1."""
    return first + (second - first) * weight[:, None]


def _noise(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth value noise in [0, 1], (count,), with features about one unit wide."""
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, down = (part * part * (3 - 2 * part) for part in (x - column, y - row))
    left, right, top, bottom = column & 31, (column + 1) & 31, row & 31, (row + 1) & 31
    upper = grid[top, left] * (1 - across) + grid[top, right] * across
    return upper * (1 - down) + (grid[bottom, left] * (1 - across) + grid[bottom, right] * across) * down


def _sky(scene: _Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour (count, 3) of the sky: gradient, glow, clouds and disc."""
    top, middle, low, light, cloud_light, cloud_shade, _ = scene.palette
    height = 2 * (y / scene.horizon).clip(0, 1)
    distance = (x - scene.sun[0]) ** 2 + (y - scene.sun[1]) ** 2
    glow = 0.65 * np.exp(-60 * distance) + 0.3 * np.exp(-9 * distance)
    colour = _mix(_mix(_mix(top, middle, height.clip(0, 1)), low, (height - 1).clip(0, 1)), light, glow)
    # Clouds are wider than tall, and shaded where they are thick.
    density = 0.65 * _noise(scene.grid, 3 * x, 7 * y + 3) + 0.35 * _noise(scene.grid, 8 * x + 9, 17 * y)
    thickness = density - 0.88 + scene.cloudiness
    cloud = _mix(_mix(cloud_light, light, glow), cloud_shade, (thickness * 4 - 0.35).clip(0, 0.9))
    colour = _mix(colour, cloud, (thickness * 7).clip(0, 0.9))
    return np.where((distance < scene.sun[2] ** 2)[:, None], scene.sun[3:], colour)


def _look(scene: _Scene, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour (count, 3) and depth code (count,) of the scene at points x, y of shape (count,)."""
    horizon, haze, ambient, ground = scene.horizon, scene.palette[2], scene.palette[6], y > scene.horizon
    nearness = ((y - horizon) / (1 - horizon)).clip(0, 1)
    # Water reflects the scene above the horizon: use the mirrored height.
    view_y = np.where(ground, 2 * horizon - y, y) if scene.water else y
    relief = _noise(scene.grid, 11 * x, 13 * view_y)
    layers = []
    for number, (height, peaked, *phases, red, green, blue) in enumerate(scene.hills, start=1):
        waves = np.sin(np.pi * (WAVES * x[:, None] + phases))
        below = view_y - horizon + height * (0.12 + (1 - np.abs(waves) if peaked else waves**2) @ WAVE_WEIGHTS)
        slope = np.array([red, green, blue]) * ambient * (0.3 + 1.4 * relief).clip(0.4, 1.2)[:, None]
        farness = 0.45 - 0.4 * number / len(scene.hills)
        layers.append((below > 0, _mix(slope, haze, farness + below.clip(0, 0.3)), HILL))
    if not scene.water:
        across = (x - scene.ways[0]) / (nearness + 0.12)  # furrows and path converge where this fans out
        patches = nearness + _noise(scene.grid, 5 * x, 14 * np.sqrt(nearness)) - 0.5
        field = _mix(scene.field[0], scene.field[1], patches.clip(0, 1))
        field = _mix(field, scene.field[2], 0.4 + 0.4 * np.sin(across * scene.ways[1]))
        bend = np.abs(across + 0.5 * np.sin(4 * nearness + 20 * scene.wind))
        layers.append((ground, _mix(field, PATH, scene.ways[2] * (3 - 20 * bend).clip(0, 1)) * ambient, GROUND))
    for centre, base, half_width, tall, crown, *paint_colour in scene.things:
        side, rise = (x - centre) / half_width, (base - view_y) / tall  # rise: 0 at the foot, 1 at the top
        hides = side**2 + ((rise - crown) / (1 - crown)) ** 2 < 0.55 + 0.7 * relief  # a ragged crown or dome
        hides = (hides | (np.abs(side) < 0.12) & (rise < crown)) & (rise > 0)
        light = 0.65 + 0.3 * np.sign(scene.sun[0] - centre) * side + 0.25 * relief + 0.15 * rise
        layers.append((hides, light.clip(0.4, 1.35)[:, None] * paint_colour * ambient, THING))
    colour, depth = _sky(scene, x, view_y), np.full(len(x), SKY)
    for hides, layer_colour, code in layers:
        colour, depth = np.where(hides[:, None], layer_colour, colour), np.where(hides, code, depth)
    if scene.water:
        deep = _mix(0.88 * colour, 0.7 * scene.palette[0], 0.15 + 0.35 * nearness)
        colour, depth = np.where(ground[:, None], deep, colour), np.where(ground, GROUND, depth)
    return colour, depth


def _strokes(scene: _Scene, rng: np.random.Generator) -> np.ndarray:
    """Strokes that cover the painting, (count, 9) as in `_lay`: broad before fine, then far to near."""
    x, y, length, width = np.concatenate(
        [
            [
                *((np.indices((side, side)).reshape(2, -1) + rng.uniform(-0.2, 1.2, (2, side * side))) / side),
                np.full(side * side, length),
                np.full(side * side, width),
            ]
            for side, length, width in (BROAD, FINE)
        ],
        axis=1,
    )
    fine, (turn, tone), chance = length == FINE[1], rng.normal(0, 1, (2, len(x))), rng.random((3, len(x)))
    colour, depth = _look(scene, x, y)
    nearness, sun_x, sun_y = (y - scene.horizon) / (1 - scene.horizon), x - scene.sun[0], y - scene.sun[1]
    from_sun = np.hypot(sun_x, sun_y)
    # Accents among the fine strokes: stars, and either glitter on water or flowers on a field.
    star = fine & (depth == SKY) & (chance[0] < 0.05 * scene.night)
    glitter = (np.abs(sun_x) < 0.025 + 0.05 * nearness) & (chance[0] < 0.35) & (scene.sun[2] > 0)
    bloom = fine & (depth == GROUND) & (glitter if scene.water else chance[0] < scene.flowers)
    flower = scene.sun[3:] if scene.water else scene.field[3] * (0.3 + 0.7 * scene.palette[6])
    colour = np.where(star[:, None], STAR, np.where(bloom[:, None], flower, colour))
    colour += 0.035 * tone[:, None] + rng.normal(0, 0.03, colour.shape)
    # Direction: sky along the wind but around the sun, hills along slopes, water level, fields towards the horizon.
    sky = scene.wind + 1.2 * (_noise(scene.grid, 4 * x, 4 * y) - 0.5) + 0.15 * turn
    sky = np.where(from_sun < (0.26 if scene.night else 0.13), np.arctan2(sun_x, -sun_y), sky)
    hill = (0.5 + 3 * scene.hills[0, 1]) * (_noise(scene.grid, 6 * x, 3 * y) - 0.5) + 0.15 * turn
    ground = 0.05 * turn if scene.water else np.arctan2(y - scene.horizon + 0.1, x - scene.ways[0]) + 0.25 * turn
    angle = np.choose(depth, [sky, hill, ground, np.pi / 2 + 0.5 * turn])
    size = np.choose(depth, [np.where(from_sun < 0.09, 0.7, 1.0), 0.7, 0.55 + 0.55 * nearness, 0.6])
    size = (0.7 + 0.35 * chance[1]) * np.where(fine, size, 1.1)
    length = np.where(star | bloom & (not scene.water), 0.5 * width, length)
    strokes = np.column_stack([x, y, angle, length * size, width * size, 2 * np.pi * chance[2], colour])
    return strokes[np.argsort(10 * fine + depth + bloom + 0.4 * y + 0.5 * chance[2], kind="stable")].astype(np.float32)


def _lay(canvas: np.ndarray, strokes: np.ndarray) -> None:
    """Paint strokes on `canvas` (size, size, 3) in place, later ones over earlier ones.

    Columns of `strokes`, (count, 9): x, y, angle, length, width, phase of the bristles' streaks, red, green, blue.
    """
    size = len(canvas)
    x, y, angle, length, width = strokes[:, :5, None].transpose(1, 0, 2)
    # All strokes share one footprint, with points a pixel apart in the largest stroke, so closer in the others.
    steps = [int(np.ceil(extent.max() * size)) + 1 for extent in (length, width)]
    along, across = np.meshgrid(*(np.linspace(-0.5, 0.5, step, dtype=np.float32) for step in steps))
    inside = (2 * along) ** 4 + (2 * across) ** 2 <= 1
    along, across = along[inside], across[inside]
    margin = sum(steps)  # wider than any stroke's overhang, so points need no bounds check
    side = size + 2 * margin
    cosine, sine = size * np.cos(angle), size * np.sin(angle)
    column = (cosine * length) * along - (sine * width) * across + (x * size + margin)
    row = (sine * length) * along + (cosine * width) * across + (y * size + margin)
    pixel = row.astype(np.int32) * np.int32(side) + column.astype(np.int32)
    # The last stroke must win: a maximum guarantees this, assignment with repeated indices does not.
    winner = np.full(side * side, -1, dtype=np.int32)
    np.maximum.at(winner, pixel.ravel(), np.arange(pixel.size, dtype=np.int32))
    winner = winner.reshape(side, side)[margin:-margin, margin:-margin].ravel()
    painted = np.flatnonzero(winner >= 0)
    stroke, point = np.divmod(winner[painted], np.int32(along.size))
    streaks = 1 + 0.07 * np.sin(15 * across[point] + strokes[stroke, 5])
    canvas.reshape(-1, 3)[painted] = strokes[stroke, 6:] * streaks[:, None]


def paint(index: int, sample_size: int = 64, seed: int = 0) -> np.ndarray:
    """Paint one landscape: a pure function of its arguments.

    Args:
        index: Number of the painting, 0 or more; a dataset uses the first `TOY_PAINTINGS_COUNT`.
        sample_size: Side in pixels, 8 or more; the scene does not depend on it.
        seed: Seed of the dataset, 0 or more.

    Returns:
        RGB pixels in [0, 255], uint8, of shape (sample_size, sample_size, 3).

    Raises:
        ValueError: If an argument is below its minimum.
    """
    for name, value, least in (("index", index, 0), ("sample_size", sample_size, 8), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rng = np.random.default_rng([seed, index])
    strokes = _strokes(_compose(rng), rng)
    enlarge = -(-96 // sample_size)  # small paintings are supersampled, so that no stroke falls between pixels
    size = sample_size * enlarge
    canvas = np.tile(strokes[:, 6:].mean(axis=0), (size, size, 1))  # a toned ground, seen in the rare gaps
    for layer in np.split(strokes, [BROAD[0] ** 2]):
        _lay(canvas, layer)
    canvas = canvas.reshape(sample_size, enlarge, -1).mean(axis=1).reshape(sample_size, sample_size, enlarge, 3)
    return (canvas.mean(axis=2).clip(0, 1) * 255 + 0.5).astype(np.uint8)
