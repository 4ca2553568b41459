"""Line charts as SVG, without any library."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

COLORS = ("#1b6ca8", "#c8553d", "#3d8361", "#8a5fa8", "#b08900", "#555555")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 150, 40, 52

Series = dict[str, list[tuple[float, float]]]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    span = max(high - low, 1e-9)
    for step in sorted(m * 10**e for m in (1, 2, 5) for e in range(-6, 7)):
        if span / step <= 6:
            break
    first = int(low / step) * step
    return [round(first + i * step, 8) for i in range(8) if low - 1e-9 <= first + i * step <= high + 1e-9]


def line_chart(path: Path, title: str, x_name: str, y_name: str, series: Series) -> None:
    points = [point for line in series.values() for point in line]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    pad = 0.05 * (y1 - y0)
    y0, y1 = y0 - pad, y1 + pad
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * across, TOP + (y1 - y) / (y1 - y0) * up

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             text(LEFT + across / 2, 22, title, more='font-size="14"'),
             text(LEFT + across / 2, HEIGHT - 14, x_name),
             text(18, TOP + up / 2, y_name, more=f'transform="rotate(-90 18 {TOP + up / 2})"')]
    for x in _ticks(x0, x1):
        parts.append(text(at(x, y0)[0], HEIGHT - BOTTOM + 18, f"{x:g}"))
    for y in _ticks(y0, y1):
        height = at(x0, y)[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}h{across}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 8, height + 4, f"{y:g}", "end"))
    for i, (name, line) in enumerate(series.items()):
        color, places = COLORS[i % len(COLORS)], [at(*point) for point in sorted(line)]
        path_data = " ".join(f"{'ML'[j > 0]}{x:.1f} {y:.1f}" for j, (x, y) in enumerate(places))
        parts.append(f'<path d="{path_data}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
        parts.append(text(WIDTH - RIGHT + 14, TOP + 14 + 18 * i, name, "start", f'fill="{color}"'))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
