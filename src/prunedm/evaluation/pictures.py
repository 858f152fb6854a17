"""Pictures of results: sheets of samples as PNG, curves of losses as inline SVG."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from prunedm.errors import UserError

POINTS = 100  # of a smoothed curve
_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 330, 12, 182
_MODES = {1: "LA", 3: "RGBA"}

Point = tuple[float, float]  # (step, loss)


def grid(images_NHWC: np.ndarray, columns: int, *, gap: int = 1) -> Image.Image:
    """uint8 images, gray or RGB, row by row on one sheet; what is no image is transparent."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] not in _MODES:
        raise UserError(
            f"images are {images_NHWC.dtype} {images_NHWC.shape}; "
            "a grid takes uint8 (N, H, W, 1 or 3)"
        )
    if not len(images_NHWC) or columns < 1:
        raise UserError(f"a grid needs images and columns, not {len(images_NHWC)} and {columns}")
    count, height, width, channels = images_NHWC.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    shape = lines * (height + gap) - gap, columns * (width + gap) - gap, channels + 1
    sheet_HWC = np.zeros(shape, np.uint8)
    for k, image_HWC in enumerate(images_NHWC):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        sheet_HWC[y : y + height, x : x + width, :-1] = image_HWC
        sheet_HWC[y : y + height, x : x + width, -1] = 255
    return Image.fromarray(sheet_HWC, _MODES[channels])


def data_uri(image: Image.Image) -> str:
    """The image as a PNG inside an address: a page that holds it needs no other file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Curve:
    """The training of one stage: smoothed training losses and held-out losses over its steps."""

    name: str
    training: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)
    window: int = 1  # losses behind one point of `training`

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.training + self.held_out if math.isfinite(loss)]


def curve_of(
    name: str,
    losses: Sequence[float | None],
    held_out: Sequence[Sequence[float | None]] = (),
) -> Curve:
    """Means of neighbouring losses, as many as leave about a hundred points; None was no number."""
    window = max(1, len(losses) // POINTS)
    losses_N = np.array(losses, dtype=np.float64)  # None becomes NaN
    starts = range(0, len(losses) - window + 1, window)
    training = [(k + (window + 1) / 2, float(np.mean(losses_N[k : k + window]))) for k in starts]
    points = [(float(p[0]), float(p[1])) for p in np.array(held_out, dtype=np.float64)]
    return Curve(name, training, points, window)


def loss_curves(curves: Sequence[Curve], *, dense: float | None = None) -> list[str]:
    """One inline SVG a curve, all on one loss axis; `dense` is drawn across as a dashed line.

    The lines carry classes (`training`, `held-out`, `dense`, `axis`), so that the page's style
    decides colours, in light and dark. A curve without finite losses gives "".
    """
    values = [loss for curve in curves for loss in curve.losses]
    values += [dense] if dense is not None and math.isfinite(dense) else []
    if not values:
        return ["" for _ in curves]
    axis = _Axis.over(values)
    return [_panel(curve, axis, dense) if curve.losses else "" for curve in curves]


@dataclass(frozen=True)
class _Axis:
    """The shared loss axis: logarithmic where losses span more than a factor of three."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Axis":
        low, high = min(values), max(values)
        if low > 0 and high > 3 * low:
            return cls(low / 1.15, high * 1.15, True)
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - margin, high + margin, False)

    def y(self, value: float) -> float:
        low, high, value = (
            map(math.log, (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return round_ticks(self.low, self.high, about=6)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        # 1 2 5 per decade, or the decades alone where those would crowd
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [step * 10.0**power for power in decades for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def round_ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _panel(curve: Curve, axis: _Axis, dense: float | None) -> str:
    steps = [step for step, _ in curve.training + curve.held_out]
    last = max(*steps, 1.0)

    def x(step: float) -> float:
        return _LEFT + step / last * (_RIGHT - _LEFT)

    parts = [_loss_tick(tick, axis.y(tick)) for tick in axis.ticks()]
    parts += [_step_tick(tick, x(tick)) for tick in round_ticks(0, last)]
    if dense is not None and math.isfinite(dense):
        parts.append(_line("dense", [(_LEFT, axis.y(dense)), (_RIGHT, axis.y(dense))]))
    for kind, points in (("training", curve.training), ("held-out", curve.held_out)):
        drawn = [(x(step), axis.y(loss)) for step, loss in points if math.isfinite(loss)]
        parts.append(_line(kind, drawn))
        if kind == "held-out":
            parts += [
                f'<circle class="{kind}" cx="{u:.1f}" cy="{v:.1f}" r="2.4"/>' for u, v in drawn
            ]
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return (
        f'<svg class="curve" viewBox="{box}" role="img" aria-label="losses">{"".join(parts)}</svg>'
    )


def _line(kind: str, points: Sequence[Point]) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _loss_tick(value: float, y: float) -> str:
    line = _line("axis", [(_LEFT, y), (_RIGHT, y)])
    return f'{line}<text x="{_LEFT - 7}" y="{y + 3.6:.1f}" text-anchor="end">{value:.4g}</text>'


def _step_tick(step: float, x: float) -> str:
    anchor = "end" if x > _RIGHT - 12 else "middle"
    text = f"{step:,.0f}".replace(",", "\u2009")  # thin spaces
    return f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{text}</text>'
