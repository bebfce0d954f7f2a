"""Draw tokens_to_loss.svg: held-out loss over tokens of each size's best AdamW and Muon runs in tokens_to_loss.csv.

python docs/tokens_to_loss.py
"""

import csv
from collections import defaultdict
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 240, 46, 34, 62  # of a panel's plot, and the space around it
COLOURS = {"adamw": "#8a8a8a", "muon": "#2f6fde"}
SHOWN = 0.12  # of the longest run's tokens are left out at the beginning, where the loss falls out of the picture


def read() -> dict[int, dict[tuple[str, float], list[dict[str, str]]]]:
    """Return by hidden parameters, then by optimizer and share of the tokens, the rows of the run with the least loss.

    Only runs of the published settings take part: cosine for AdamW, linear for Muon, q, k and v as three matrices.
    """
    runs = defaultdict(list)
    with (HERE / "tokens_to_loss.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["optimizer"], row["schedule"], row["qkv"]) in {("adamw", "cosine", ""), ("muon", "linear", "")}:
                runs[row["run"]].append(row)
    best: dict[int, dict[tuple[str, float], list[dict[str, str]]]] = defaultdict(dict)
    for rows in runs.values():
        last = rows[-1]
        if last["step"] != last["steps"]:  # stopped before its end
            continue
        of_size, key = best[int(last["hidden_parameters"])], (last["optimizer"], float(last["share"]))
        if key not in of_size or float(last["held_out_loss"]) < float(of_size[key][-1]["held_out_loss"]):
            of_size[key] = rows
    return best


def panel(left: int, hidden: int, runs: dict[tuple[str, float], list[dict[str, str]]]) -> list[str]:
    """Return the elements of one size's plot, whose lower left corner is at ``left``."""
    most = max(int(rows[-1]["tokens"]) for rows in runs.values())
    points = {
        key: [(int(row["tokens"]), float(row["held_out_loss"])) for row in rows if int(row["tokens"]) >= SHOWN * most]
        for key, rows in runs.items()
    }
    losses = [loss for curve in points.values() for _, loss in curve]
    low, high = min(losses) - 0.02, max(losses)

    def place(tokens: float, loss: float) -> tuple[float, float]:
        return left + WIDTH * tokens / most, TOP + HEIGHT * (high - loss) / (high - low)

    elements = [
        f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{hidden / 1e6:.3g}M hidden parameters</text>',
        f'<path d="M{left},{TOP}v{HEIGHT}h{WIDTH}" fill="none" stroke="#8a8a8a"/>',
    ]
    for tenth in range(round(low * 10) + 1, int(high * 10) + 1, 2 if high - low < 1.2 else 4):
        x, y = place(0, tenth / 10)
        elements.append(f'<text x="{x - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    for part in (0.25, 0.5, 0.75, 1):
        x, y = place(part * most, low)
        elements.append(f'<text x="{x:.0f}" y="{y + 16:.0f}" text-anchor="middle">{part * most / 1e6:.0f}M</text>')
    x, y = place(*points["adamw", 1][-1])
    elements.append(f'<path d="M{left},{y:.1f}H{x:.1f}" stroke="{COLOURS["adamw"]}" stroke-dasharray="4 4"/>')
    for (optimizer, share), curve in sorted(points.items()):
        places = [place(*point) for point in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        faint = ' opacity="0.55"' if share < 1 else ""
        label = escape(f"{optimizer}, {share:g} of the tokens: {curve[-1][1]:.3f}")
        elements += [
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[optimizer]}" stroke-width="2"{faint}/>',
            f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3.5" fill="{COLOURS[optimizer]}">'
            f"<title>{label}</title></circle>",
        ]
    return elements


def main() -> None:
    """Write the picture."""
    elements, left = [], LEFT
    for hidden, runs in sorted(read().items()):
        elements += panel(left, hidden, runs)
        left += WIDTH + GAP
    for number, (optimizer, label) in enumerate(
        {"adamw": "AdamW, cosine to 10 %", "muon": "Muon, linear to 0"}.items()
    ):
        x, y = LEFT + 190 * number, TOP + HEIGHT + 46
        elements.append(f'<path d="M{x},{y - 4}h24" stroke="{COLOURS[optimizer]}" stroke-width="3"/>')
        elements.append(f'<text x="{x + 32}" y="{y}">{label}</text>')
    text = "held-out loss by tokens; a dot ends a run, the dashed line is AdamW's last loss"
    elements.append(f'<text x="{LEFT + 400}" y="{TOP + HEIGHT + 46}">{text}</text>')
    size = f'width="{left}" height="{TOP + HEIGHT + 60}" viewBox="0 0 {left} {TOP + HEIGHT + 60}"'
    style = 'font-family="sans-serif" font-size="12" fill="#8a8a8a"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *elements, "</svg>"]
    (HERE / "tokens_to_loss.svg").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
