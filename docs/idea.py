"""Draws docs/idea.svg, the diagram of the README: python docs/idea.py"""

from pathlib import Path

COLOURS = {"trained": "#cfe3ff", "frozen": "#e6e6e6", "loss": "#ffe0cc", "data": "#ffffff"}
parts = []


def box(x, y, width, kind, *lines):
    """A box of two lines of text, its left middle at (x, y)."""
    fill = COLOURS[kind]
    parts.append(f'<rect x="{x}" y="{y - 22}" width="{width}" height="44" rx="6" fill="{fill}" stroke="#444"/>')
    for i, line in enumerate(lines):
        text(x + width / 2, y + 4 + 15 * (i - (len(lines) - 1) / 2), line)


def text(x, y, words, anchor="middle", style=""):
    parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {style}>{words}</text>')


def arrow(*points, dashed=False, label=None, at=None):
    """A line through points, with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#444" marker-end="url(#head)"'
                 + (' stroke-dasharray="5 4"' if dashed else "") + "/>")
    if label:
        text(*at, label, style='font-size="11" fill="#555"')


BOLD = 'font-weight="bold" font-size="15"'

# ------------------------------------------------------------------------------------------------------- Stage I
text(10, 24, "Stage I: match distributions", "start", BOLD)
box(10, 110, 80, "data", "noise, text")
box(130, 110, 130, "trained", "student G", "its own n steps")
box(310, 110, 130, "data", "its sample,", "noised up to σ")
box(500, 60, 200, "frozen", "teacher T", "guided where σ ≤ α (Eq. 4)")
box(500, 160, 200, "trained", "fake score F", "follows G's samples")
box(760, 110, 130, "loss", "T − F", "the way to move G")
arrow((90, 110), (130, 110))
arrow((260, 110), (310, 110), label="importance of σ", at=(285, 148))
arrow((440, 110), (470, 110), (470, 60), (500, 60))
arrow((440, 110), (470, 110), (470, 160), (500, 160))
arrow((700, 60), (730, 60), (730, 110), (760, 110))
arrow((700, 160), (730, 160), (730, 110), (760, 110))
arrow((825, 132), (825, 208), (195, 208), (195, 132), dashed=True, label="gradient", at=(510, 203))

# ------------------------------------------------------------------------------------------------------- Stage II
text(10, 260, "Stage II: refine details, with cached blocks", "start", BOLD)
box(10, 330, 80, "data", "noise, text")
box(130, 330, 130, "trained", "step 1 of G", "all blocks")
box(320, 330, 150, "trained", "step 2 of G", "without blocks a … b")
box(225, 420, 140, "trained", "compensator f", "an MLP a token")
box(530, 330, 80, "frozen", "VAE")
box(650, 330, 130, "trained", "discriminator", "ConvNeXt + heads")
box(660, 420, 230, "frozen", "real images: the same noise", "and text, 4 steps")
box(810, 330, 80, "loss", "real or", "not?")
arrow((90, 330), (130, 330))
arrow((260, 330), (320, 330))
arrow((195, 352), (195, 420), (225, 420), label="Δ0, what a … b added", at=(112, 395))
arrow((365, 420), (395, 420), (395, 352), label="f(Δ0) in their place", at=(460, 395))
arrow((470, 330), (530, 330))
arrow((610, 330), (650, 330))
arrow((720, 398), (720, 352))
arrow((780, 330), (810, 330))
arrow((850, 308), (850, 286), (395, 286), (395, 308), dashed=True, label="gradient", at=(620, 281))

for i, (kind, words) in enumerate({"trained": "trained", "frozen": "frozen", "loss": "loss"}.items()):
    parts.append(f'<rect x="{600 + 100 * i}" y="10" width="16" height="16" fill="{COLOURS[kind]}" stroke="#444"/>')
    text(622 + 100 * i, 23, words, "start")

head = '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">' \
       '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker>'
svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 452" font-family="sans-serif" font-size="13">' \
      f'<rect width="900" height="452" fill="white"/><defs>{head}</defs>\n' + "\n".join(parts) + "\n</svg>\n"
Path(__file__).with_name("idea.svg").write_text(svg, encoding="utf-8")
