"""Draws how attention's time grows with length and with the share of kept blocks, from what
`kernels_bench --filter sweep --json` and `peer_attention.py --parts sweep --json` wrote.

  plot_sweeps.py OUT.svg JSON...

Prints the same numbers as two tables.
"""

import json
import math
import re
import sys

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 450, 330, 58, 34, 142, 44
COLOURS = {
    "FlashAttention-2": "#444444",
    "cuDNN": "#9a6fb0",
    "dense, ours": "#1f77b4",
    "SLA 0.05": "#2ca02c",
    "SLA": "#2ca02c",
    "SALAD 0.10": "#d6722d",
    "SLA 64x64 marginal": "#8c8c2d",
}


def series(files):
    """{"length" or "topk": {name: [(x, ms)]}}"""
    found = {"length": {}, "topk": {}}
    for path in files:
        with open(path) as file:
            rows = json.load(file)["rows"]
        for row in rows:
            match = re.fullmatch(r"sweep (length|topk) ([\d.]+): (.+)", row["name"])
            if match:
                kind, x, name = match.groups()
                name = {"dense": "dense, ours"}.get(name, name.removesuffix(": with map"))
                found[kind].setdefault(name, []).append((float(x), row["ms"]))
    return found


def table(lines, unit):
    xs = sorted({x for points in lines.values() for x, _ in points})
    print(f"| {unit} | " + " | ".join(lines) + " |")
    print("|---" * (len(lines) + 1) + "|")
    for x in xs:
        values = [dict(points).get(x) for points in lines.values()]
        cells = ["" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values]
        print(f"| {x:g} | " + " | ".join(cells) + " |")
    print()


def ticks(low, high):
    """1, 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5))
    return [m for m in marks if low * 0.999 <= m <= high * 1.001]


def panel(lines, left, title, unit, x_marks):
    """One chart with logarithmic axes."""
    points = [p for line in lines.values() for p in line]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points) * 0.8, max(p[1] for p in points) * 1.25
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_at(x):
        return left + LEFT + inner_width * math.log(x / x_low) / math.log(x_high / x_low)

    def y_at(y):
        return TOP + inner_height * (1 - math.log(y / y_low) / math.log(y_high / y_low))

    def text(x, y, words, anchor="middle", colour="#222"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    def grid(x1, y1, x2, y2):
        return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'

    right, bottom = left + LEFT + inner_width, TOP + inner_height
    out = [text((left + LEFT + right) / 2, 18, title)]
    for mark in ticks(y_low, y_high):
        out.append(grid(left + LEFT, y_at(mark), right, y_at(mark)))
        out.append(text(left + LEFT - 6, y_at(mark) + 4, f"{mark:g} ms", "end"))
    for mark, label in x_marks:
        if x_low <= mark <= x_high:
            out.append(grid(x_at(mark), TOP, x_at(mark), bottom))
            out.append(text(x_at(mark), bottom + 16, label))
    out.append(text((left + LEFT + right) / 2, bottom + 34, unit))
    labels = []
    for name, line in lines.items():
        line, colour = sorted(line), COLOURS[name]
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in line)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in line]
        labels.append([y_at(line[-1][1]) + 4, name, colour])
    labels.sort()
    for i in range(1, len(labels)):  # apart from each other
        labels[i][0] = max(labels[i][0], labels[i - 1][0] + 14)
    out += [text(right + 7, y, name, "start", colour) for y, name, colour in labels]
    return out


def main():
    target, *files = sys.argv[1:]
    found = series(files)
    table(found["length"], "tokens")
    table(found["topk"], "topk")
    lengths = [(1024 * n, f"{n}k") for n in (8, 16, 32, 64, 128)]
    shares = [(s, f"{s:g}") for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    body = panel(found["length"], 0, "12 heads of 128", "tokens", lengths)
    if found["topk"]:
        body += panel(found["topk"], WIDTH, "32,760 tokens, 12 heads of 128", "topk", shares)
    width = WIDTH * (2 if found["topk"] else 1)
    with open(target, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
            'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(body)
            + "\n</svg>\n"
        )


if __name__ == "__main__":
    main()
